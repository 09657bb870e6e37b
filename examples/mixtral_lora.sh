#!/usr/bin/env bash
# LoRA on Mixtral-8x7B-Instruct, on 8 GPUs: the stages of qwen_lora.sh. Adapters stand on attention; experts and router stay frozen.
#
#   LOAD_PATH=/models/Mixtral-8x7B-Instruct-v0.1 bash examples/mixtral_lora.sh
#   PLAN=1 bash examples/mixtral_lora.sh                                          only what each stage needs of memory
#
# Needs: the model, and problems whose solutions end in "#### number" (dataset/GSM8K is there).
# Prints at the end: as qwen_lora.sh. Variables: those of qwen_lora.sh.
#
# What the largest of 8 ranks needs, as `EXTRA="--device cpu" PLAN=1 bash examples/mixtral_lora.sh` prints it:
# solver_train 12.683 GB, ppo_train (grpo) 13.168 GB
export MODEL=${MODEL:-mixtral-8x7b-instruct-v0.1} BATCH_SIZE=${BATCH_SIZE:-4}
exec bash "$(dirname "$0")/qwen_lora.sh"
