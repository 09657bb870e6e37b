#!/usr/bin/env bash
# Fine-tune on the official GSM8K train split with its last 200 records held out; loss, perplexity and accuracy before and after.
#
#   TRAIN=/data/gsm8k/train.jsonl CKPT_DIR=runs/quickstart/split bash examples/gsm8k_official.sh
#
# TRAIN: the official train.jsonl. CKPT_DIR: any model. Others: RUN, NPROC, MAX_STEPS, LR, LORA_RANK, BATCH_SIZE, CHAT=0, PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-runs/gsm8k}
NPROC=${NPROC:-2}
chat=(); [ "${CHAT:-1}" = 1 ] && chat=(--use_chat_template)
python=${PYTHON:-}
[ -n "$python" ] || { python=python3; [ ! -x .venv/bin/python ] || python=.venv/bin/python; }
torchrun=("$python" -m torch.distributed.run --nproc_per_node "$NPROC")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

: "${TRAIN:?path of the official train.jsonl}" "${CKPT_DIR:?the model to start from}"
mkdir -p "$RUN"
"$python" dataset/GSM8K/prepare.py --source "$TRAIN" --save_file "$RUN/train.json" --hold_out 200 --hold_out_file "$RUN/held_out.json"
"${torchrun[@]}" solver_evaluate.py --ckpt_dir "$CKPT_DIR" --log_dir "$RUN/before" --label_file "$RUN/held_out.json" --perplexity "${chat[@]}"
"${torchrun[@]}" solver_train.py --ckpt_dir "$CKPT_DIR" --save_dir "$RUN/solver" --train_file "$RUN/train.json" \
    --lora_rank "${LORA_RANK:-16}" --lr "${LR:-1e-3}" --max_batch_size "${BATCH_SIZE:-4}" --max_steps "${MAX_STEPS:-200}" "${chat[@]}"
"${torchrun[@]}" solver_evaluate.py --ckpt_dir "$RUN/solver" --log_dir "$RUN/after" --label_file "$RUN/held_out.json" --perplexity "${chat[@]}"
"$python" solver_evaluate.py --compare "$RUN/before,$RUN/after"
