#!/usr/bin/env bash
# LLaMA-2 on math word problems in three stages: fine-tuning, a verifier from sampled answers, PPO. Then a table of all of them.
#
#   LOAD_PATH=/models/Llama-2-7b-hf bash examples/llama2.sh                       7B on 8 GPUs, PPO on the verifier
#   REWARD=rule LOAD_PATH=/models/Llama-2-7b-hf bash examples/llama2.sh           PPO on the exact rule, no verifier
#   MODEL_SIZE=13B LOAD_PATH=/models/Llama-2-13b-hf bash examples/llama2.sh
#   MODEL_SIZE=70B LOAD_PATH=/models/Llama-2-70b-hf bash examples/llama2.sh       LoRA; all weights: on 32 GPUs, see below
#   PLAN=1 MODEL_SIZE=70B bash examples/llama2.sh                                 only what each stage needs of memory, no checkpoint
#
# Needs: the model, and problems whose solutions end in "#### number" (dataset/GSM8K is there). NPROC=8 GPUs of the size below.
# Prints at the end: accuracy of the pretrained (if BEFORE=1), fine-tuned and optimised model on TEST_PATH, with intervals, and what changed.
#
# What the largest rank needs, as `EXTRA="--device cpu" PLAN=1 MODEL_SIZE=... bash examples/llama2.sh` prints it (activations as on a CPU):
#
#   MODEL_SIZE                            solver_train   verifier_train   ppo_train
#   7B, all weights                          15.291 GB        14.996 GB   31.088 GB    8 GPUs of 40 GB
#   13B, all weights                         29.438 GB        29.070 GB   59.789 GB    8 GPUs of 80 GB
#   70B, LoRA of rank 16                     22.776 GB        22.711 GB   38.429 GB    8 GPUs of 80 GB, or of 48 GB
#   70B, NNODES=4 LORA_RANK=-1               41.443 GB        41.296 GB   86.433 GB    32 GPUs of 141 GB, or of 80 GB with idle roles on the host
#
# On a GPU, idle models of the PPO stage wait in host memory when they exceed half of the card (--keep_resident).
#
# Variables besides those in common.sh: MODEL_SIZE (7B, 13B, 70B), POLICY_LOAD (a fine-tuned model: skips stage 1), REWARD_LOAD (a
# verifier: skips stage 2), REWARD (verifier, rule), REWARD_BASE (what the verifier starts from, if not the fine-tuned model), TEST_PATH, LORA_RANK (-1: all weights), BATCH_SIZE, MAX_SEQ_LEN, MAX_NEW_TOKENS,
# EPOCHS, MAX_STEPS, ANSWER_LIMIT (problems answered for the verifier), MAX_BUFFER_SIZE, PPO_ITERATIONS, TEST_LIMIT
source "$(dirname "$0")/common.sh"

MODEL_SIZE=${MODEL_SIZE:-7B}
case ${MODEL_SIZE#llama2-} in
    7B)  model=llama-2-7b;  LORA_RANK=${LORA_RANK:--1} ;;
    13B) model=llama-2-13b; LORA_RANK=${LORA_RANK:--1} ;;
    70B) model=llama-2-70b; LORA_RANK=${LORA_RANK:-16} ;;
    *) echo "error: MODEL_SIZE=$MODEL_SIZE: use 7B, 13B or 70B" >&2; exit 1 ;;
esac
SAVE_PATH=${SAVE_PATH:-runs/llama2-$MODEL_SIZE}
DATASET_PATH=${DATASET_PATH:-dataset/GSM8K/train.json}
TEST_PATH=${TEST_PATH:-dataset/GSM8K/test.json}
REWARD=${REWARD:-verifier}
train=(--max_batch_size "${BATCH_SIZE:-6}" --activation_checkpointing all --lora_rank "$LORA_RANK")
whole=(--max_seq_len "${MAX_SEQ_LEN:-512}")
answers=(--max_new_tokens "${MAX_NEW_TOKENS:-256}")

if [ "${PLAN:-0}" = 1 ]; then
    say "solver_train.py"
    plan solver_train.py --model_type "$model" --dtype bf16 "${train[@]}" "${whole[@]}"
    say "verifier_train.py"
    plan verifier_train.py --model_type "$model" --dtype bf16 --loss mse "${train[@]}" "${whole[@]}"
    say "ppo_train.py"
    plan ppo_train.py --model_type "$model" --dtype bf16 --reward_model_ckpt_dir verifier "${train[@]}" "${answers[@]}"
    exit
fi

if [ -z "${POLICY_LOAD:-}" ]; then
    needs LOAD_PATH "the pretrained LLaMA-2"
    if [ "${BEFORE:-0}" = 1 ]; then
        say "0. the pretrained model"
        launch solver_evaluate.py --ckpt_dir "$LOAD_PATH" --log_dir "$SAVE_PATH/before" --label_file "$TEST_PATH" --limit "${TEST_LIMIT:--1}" "${answers[@]}"
    fi
    say "1. fine-tuning"
    launch solver_train.py --ckpt_dir "$LOAD_PATH" --save_dir "$SAVE_PATH/solver" --train_file "$DATASET_PATH" --model_type "$model" \
        --epochs "${EPOCHS:-2}" --max_steps "${MAX_STEPS:--1}" "${train[@]}" "${whole[@]}"
    POLICY_LOAD=$SAVE_PATH/solver
fi
launch solver_evaluate.py --ckpt_dir "$POLICY_LOAD" --log_dir "$SAVE_PATH/solver-test" --label_file "$TEST_PATH" --limit "${TEST_LIMIT:--1}" "${answers[@]}"

reward=(--rule_weight 1)
if [ "$REWARD" = verifier ]; then
    if [ -z "${REWARD_LOAD:-}" ]; then
        say "2. a verifier: eight answers to each training problem, right or wrong by the rule"
        [ -e "$SAVE_PATH/answers/metrics.json" ] ||
            launch solver_evaluate.py --ckpt_dir "$POLICY_LOAD" --log_dir "$SAVE_PATH/answers" --label_file "$DATASET_PATH" \
            --limit "${ANSWER_LIMIT:--1}" --num_samples_per_prompt 8 --max_batch_size 384 "${answers[@]}"
        launch verifier_train.py --ckpt_dir "${REWARD_BASE:-$POLICY_LOAD}" --save_dir "$SAVE_PATH/verifier" --train_file "$SAVE_PATH/answers/samples.jsonl" \
            --loss mse --max_steps "${MAX_STEPS:--1}" "${train[@]}" "${whole[@]}"
        REWARD_LOAD=$SAVE_PATH/verifier
    fi
    reward=(--reward_model_ckpt_dir "$REWARD_LOAD" --critic_ckpt_dir "$REWARD_LOAD")
fi

say "3. PPO, the $REWARD as the reward"
launch ppo_train.py --actor_ckpt_dir "$POLICY_LOAD" --actor_save_dir "$SAVE_PATH/actor" --critic_save_dir "$SAVE_PATH/critic" \
    --train_file "$DATASET_PATH" --max_buffer_size "${MAX_BUFFER_SIZE:-96}" --max_iterations "${PPO_ITERATIONS:--1}" --save_steps 50 \
    "${reward[@]}" "${train[@]}" "${answers[@]}"
launch solver_evaluate.py --ckpt_dir "$SAVE_PATH/actor" --log_dir "$SAVE_PATH/actor-test" --label_file "$TEST_PATH" --limit "${TEST_LIMIT:--1}" "${answers[@]}"

say "the fine-tuned and the optimised model on $TEST_PATH"
runs=$SAVE_PATH/solver-test,$SAVE_PATH/actor-test
[ ! -e "$SAVE_PATH/before/metrics.json" ] || runs=$SAVE_PATH/before,$runs
once "$PYTHON" solver_evaluate.py --compare "$runs"
