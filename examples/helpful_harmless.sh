#!/usr/bin/env bash
# Preferences between answers of an assistant: fine-tuning on the chosen ones, a verifier on the pairs, PPO on the verifier.
#
#   LOAD_PATH=/models/Llama-2-7b-hf DATASET_PATH=hh/train.jsonl TEST_PATH=hh/test.jsonl bash examples/helpful_harmless.sh
#
# Needs: a model, and files of "chosen" and "rejected": with a "prompt", or as whole conversations, "\n\nHuman: ...\n\nAssistant: ..." or lists
# of messages (docs/DATA.md; the helpful and harmless pairs of Anthropic/hh-rlhf are such files once unpacked). 8 GPUs for 7B.
# Prints at the end: pair accuracy of the verifier on TEST_PATH, then what the last PPO iterations' scores and KL were.
# There is no exact rule for such answers: read samples in the reports, and stop early. A score that still rises while answers get longer or
# alike is the verifier's weakness, not progress.
#
# Variables besides those in common.sh: POLICY_LOAD (a fine-tuned model: skips stage 1), REWARD_LOAD (a verifier: skips stage 2), REWARD_BASE
# (what the verifier starts from, if not the fine-tuned model), TEST_PATH, CHAT_FORMAT (default llama-2; "own": the tokenizer has a template;
# "none": prompts are plain text already), LORA_RANK (-1: all weights), BATCH_SIZE, MAX_SEQ_LEN, MAX_NEW_TOKENS, EPOCHS, MAX_STEPS,
# MAX_BUFFER_SIZE, PPO_ITERATIONS
source "$(dirname "$0")/common.sh"

needs DATASET_PATH "a file of chosen and rejected answers"
SAVE_PATH=${SAVE_PATH:-runs/helpful-harmless}
CHAT_FORMAT=${CHAT_FORMAT:-llama-2}
chat=(--use_chat_template --chat_format "$CHAT_FORMAT")
[ "$CHAT_FORMAT" != own ] || chat=(--use_chat_template)
[ "$CHAT_FORMAT" != none ] || chat=()
train=(--max_batch_size "${BATCH_SIZE:-6}" --activation_checkpointing all --lora_rank "${LORA_RANK:--1}" "${chat[@]}")
held_out=(); [ -z "${TEST_PATH:-}" ] || held_out=(--label_file "$TEST_PATH")

if [ -z "${POLICY_LOAD:-}" ]; then
    needs LOAD_PATH "the pretrained model"
    say "1. fine-tuning on the chosen answers"
    once "$PYTHON" examples/chosen_only.py "$DATASET_PATH" "$SAVE_PATH/chosen.jsonl"
    launch solver_train.py --ckpt_dir "$LOAD_PATH" --save_dir "$SAVE_PATH/solver" --train_file "$SAVE_PATH/chosen.jsonl" --epochs "${EPOCHS:-1}" \
        --max_steps "${MAX_STEPS:--1}" --max_seq_len "${MAX_SEQ_LEN:-1024}" "${train[@]}"
    POLICY_LOAD=$SAVE_PATH/solver
fi

if [ -z "${REWARD_LOAD:-}" ]; then
    say "2. a verifier on the pairs"
    launch verifier_train.py --ckpt_dir "${REWARD_BASE:-$POLICY_LOAD}" --save_dir "$SAVE_PATH/verifier" --train_file "$DATASET_PATH" --loss pairwise \
        --centre 0.01 --max_steps "${MAX_STEPS:--1}" --max_seq_len "${MAX_SEQ_LEN:-1024}" "${held_out[@]}" "${train[@]}"
    REWARD_LOAD=$SAVE_PATH/verifier
fi

say "3. PPO on the verifier"
launch ppo_train.py --actor_ckpt_dir "$POLICY_LOAD" --actor_save_dir "$SAVE_PATH/actor" --critic_ckpt_dir "$REWARD_LOAD" \
    --critic_save_dir "$SAVE_PATH/critic" --reward_model_ckpt_dir "$REWARD_LOAD" --train_file "$DATASET_PATH" --kl_target 6 \
    --max_buffer_size "${MAX_BUFFER_SIZE:-96}" --max_iterations "${PPO_ITERATIONS:--1}" --max_new_tokens "${MAX_NEW_TOKENS:-256}" --save_steps 50 "${train[@]}"

say "the verifier on held-out pairs, and every tenth and the last iteration of PPO"
once "$PYTHON" - "$SAVE_PATH"/verifier/log/metrics.jsonl "$SAVE_PATH/actor/log/metrics.jsonl" <<'PY'
import json
import os
import sys

verifier, actor = ([json.loads(line) for line in open(file)] if os.path.exists(file) else [] for file in sys.argv[1:])
for row in [row for row in verifier if row["kind"] == "evaluation"][-1:]:
    print(f"pair accuracy {row['pair_accuracy']:.1%} over {row['n_pairs']} pairs")
iterations = [row for row in actor if row["kind"] == "iteration"]
for row in iterations[:-1:10] + iterations[-1:]:
    print(f"iteration {row['step']}  score {row['score']:.3f}  KL {row.get('kl_sequence', 0):.2f}  length {row['response_length']:.0f}  finished {row['finished_share']:.0%}")
PY
