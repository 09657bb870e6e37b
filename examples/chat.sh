#!/usr/bin/env bash
# Talk to any checkpoint that the scripts read:  CKPT_DIR=runs/solver NPROC=1 bash examples/chat.sh [flags of llama_rlhf.chat]
# Needs: a model with a chat template, or --chat_format. Prints at the end: nothing.
# An answer appears as it is generated, its tokens and their rate below it. Without CKPT_DIR: the fine-tuned model of quickstart.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
set -- --ckpt_dir "${CKPT_DIR:-runs/quickstart/lora}" "$@"
if [ "${NPROC:-1}" = 1 ]; then exec python3 -m llama_rlhf.chat "$@"; fi
exec torchrun --nproc_per_node "$NPROC" -m llama_rlhf.chat "$@"
