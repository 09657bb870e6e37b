#!/usr/bin/env bash
# LoRA on an instruction-tuned Qwen: fine-tuning, then GRPO with the exact rule as the reward, both with adapters on one frozen base.
#
#   LOAD_PATH=/models/Qwen2.5-7B-Instruct NPROC=2 bash examples/qwen_lora.sh
#   MODEL=qwen-14b LOAD_PATH=/models/Qwen-14B-Chat CHAT_FORMAT=chatml bash examples/qwen_lora.sh        first generation, qwen.tiktoken
#   PLAN=1 MODEL_SIZE=72B NPROC=8 bash examples/qwen_lora.sh                                            only what each stage needs of memory
#
# Needs: the model, and problems whose solutions end in "#### number" (dataset/GSM8K is there).
# Prints at the end: accuracy before, fine-tuned and after GRPO on TEST_PATH, with intervals, and where the merged model and the adapters are.
#
# What the largest rank needs, as `EXTRA="--device cpu" PLAN=1 MODEL_SIZE=... NPROC=... bash examples/qwen_lora.sh` prints it:
#
#   MODEL_SIZE, NPROC      solver_train   ppo_train (grpo)
#   7B, 1                     17.257 GB          31.917 GB
#   7B, 2                      9.062 GB          16.117 GB
#   14B, 4                     9.683 GB          16.534 GB
#   72B, 8                    23.718 GB          38.610 GB
#
# Variables besides those in common.sh: MODEL_SIZE (0.5B to 72B of Qwen2.5), MODEL (any other preset of that kind, such as qwen3-8b), POLICY_LOAD (a
# model fine-tuned with LoRA: skips fine-tuning), CHAT_FORMAT (own: the tokenizer's template), TEST_PATH, LORA_RANK, BATCH_SIZE, MAX_SEQ_LEN,
# MAX_NEW_TOKENS, MAX_STEPS, MAX_BUFFER_SIZE, PPO_ITERATIONS, TEST_LIMIT
source "$(dirname "$0")/common.sh"

MODEL_SIZE=${MODEL_SIZE:-7B}
MODEL=${MODEL:-qwen2.5-${MODEL_SIZE,,}}
SAVE_PATH=${SAVE_PATH:-runs/$MODEL-lora}
DATASET_PATH=${DATASET_PATH:-dataset/GSM8K/train.json}
TEST_PATH=${TEST_PATH:-dataset/GSM8K/test.json}
chat=(--use_chat_template)
[ "${CHAT_FORMAT:-own}" = own ] || chat+=(--chat_format "$CHAT_FORMAT")
train=(--max_batch_size "${BATCH_SIZE:-6}" --lora_rank "${LORA_RANK:-16}" --activation_checkpointing all)
answers=(--max_new_tokens "${MAX_NEW_TOKENS:-256}")
grpo=(--algorithm grpo --num_samples_per_prompt 8 --max_buffer_size "${MAX_BUFFER_SIZE:-256}")

if [ "${PLAN:-0}" = 1 ]; then
    say "solver_train.py"
    plan solver_train.py --model_type "$MODEL" --dtype bf16 "${train[@]}" --max_seq_len "${MAX_SEQ_LEN:-512}"
    say "ppo_train.py"
    plan ppo_train.py --model_type "$MODEL" --dtype bf16 "${train[@]}" "${answers[@]}" "${grpo[@]}"
    exit
fi

test_on() { launch solver_evaluate.py --ckpt_dir "$1" --log_dir "$SAVE_PATH/$2-test" --label_file "$TEST_PATH" --limit "${TEST_LIMIT:--1}" "${answers[@]}" "${chat[@]}"; }

runs=
if [ -z "${POLICY_LOAD:-}" ]; then
    needs LOAD_PATH "an instruction-tuned model"
    say "1. before"
    test_on "$LOAD_PATH" before
    say "2. fine-tuning"
    launch solver_train.py --ckpt_dir "$LOAD_PATH" --save_dir "$SAVE_PATH/solver" --train_file "$DATASET_PATH" --model_type "$MODEL" \
        --max_seq_len "${MAX_SEQ_LEN:-512}" --max_steps "${MAX_STEPS:--1}" "${train[@]}" "${chat[@]}"
    POLICY_LOAD=$SAVE_PATH/solver
    runs=$SAVE_PATH/before-test,
fi
test_on "$POLICY_LOAD" solver

say "3. GRPO, the rule as the reward"
launch ppo_train.py --actor_ckpt_dir "$POLICY_LOAD" --actor_save_dir "$SAVE_PATH/actor" --train_file "$DATASET_PATH" \
    --max_iterations "${PPO_ITERATIONS:--1}" --save_steps 20 "${grpo[@]}" "${train[@]}" "${answers[@]}" "${chat[@]}"
test_on "$SAVE_PATH/actor" actor

say "4. the adapters for the peft package, and a merged Hugging Face folder"
[ -e "$SAVE_PATH/peft" ] || once "$PYTHON" checkpoint_split.py --ckpt_file "$SAVE_PATH/actor" --save_path "$SAVE_PATH/peft" --format peft
[ -e "$SAVE_PATH/hf" ] || once "$PYTHON" checkpoint_split.py --ckpt_file "$SAVE_PATH/actor" --save_path "$SAVE_PATH/hf" --format hf --merge_lora

say "before, fine-tuned and after GRPO on $TEST_PATH"
runs+=$SAVE_PATH/solver-test,$SAVE_PATH/actor-test
once "$PYTHON" solver_evaluate.py --compare "$runs"
