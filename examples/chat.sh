#!/usr/bin/env bash
# Talk to any checkpoint that the scripts read:  CKPT_DIR=runs/solver NPROC=1 bash examples/chat.sh [flags of llama_rlhf.chat]
# Needs: a model with a chat template, or --chat_format. Prints at the end: nothing.
# An answer appears as it is generated, its tokens and their rate below it. Without CKPT_DIR: the fine-tuned model of quickstart.sh.
# Variables: CKPT_DIR, NPROC (1), PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${PYTHON:-}" ] || { PYTHON=python3; [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python; }
if [ -z "${CKPT_DIR:-}" ] && [ ! -e runs/quickstart/lora ]; then
    echo "error: set CKPT_DIR: the model to talk to. Such as: CKPT_DIR=runs/solver bash $0. Without it this takes the model that quickstart.sh makes" >&2
    exit 1
fi
set -- --ckpt_dir "${CKPT_DIR:-runs/quickstart/lora}" "$@"
if [ "${NPROC:-1}" = 1 ]; then exec "$PYTHON" -m llama_rlhf.chat "$@"; fi
exec "$PYTHON" -m torch.distributed.run --nproc_per_node "$NPROC" -m llama_rlhf.chat "$@"
