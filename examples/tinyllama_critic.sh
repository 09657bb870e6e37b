#!/usr/bin/env bash
# A LLaMA-2-7B policy with a TinyLlama-1.1B verifier and critic, on 8 GPUs: the three stages of llama2.sh, stage 2 from another model.
#
#   LOAD_PATH=/models/Llama-2-7b-hf REWARD_BASE=/models/TinyLlama-1.1B bash examples/tinyllama_critic.sh
#
# Needs: both models. They must have one tokenizer, which is checked id by id before PPO starts; LLaMA-2's and TinyLlama's base model do.
# Prints at the end: as llama2.sh. Variables: those of llama2.sh (POLICY_LOAD and REWARD_LOAD skip stages) and REWARD_BASE.
#
# What the verifier's training needs on each of 8 ranks, as printed by
#   python verifier_train.py --plan --model_type tinyllama-1.1b --plan_ranks 8 --dtype bf16 --loss mse --max_seq_len 512 \
#       --activation_checkpointing all --device cpu
# is 2.450 GB. For PPO --plan takes all roles to be of one size: with this critic a run needs less than the 31.088 GB in llama2.sh.
source "$(dirname "$0")/common.sh"
[ "${PLAN:-0}" = 1 ] || needs REWARD_BASE "the small model that becomes verifier and critic"
SAVE_PATH=${SAVE_PATH:-runs/tinyllama-critic} exec bash examples/llama2.sh
