#!/usr/bin/env bash
# From a run to a Hugging Face folder, and from there to anything that reads one: transformers, an evaluation harness, a server.
#
#   POLICY_LOAD=runs/llama2-7B/actor bash examples/export_and_serve.sh
#
# Needs: a run of ours, or any checkpoint that the scripts load. No GPU for the export.
# Prints at the end: an answer to PROMPT by transformers, and the commands that serve and evaluate the folder; runs `lm_eval --model hf` itself if
# LM_EVAL_TASK is set (pip install lm_eval; tasks from the hub need a network, examples/lm_eval holds one that needs none).
#
# Variables: POLICY_LOAD, SAVE_PATH (default: POLICY_LOAD-hf), TOKENIZER_MODEL, DTYPE (bf16), PROMPT, LM_EVAL_TASK, LM_EVAL_LIMIT, DEVICE, PYTHON
source "$(dirname "$0")/common.sh"

needs POLICY_LOAD "the folder to export: a save_dir, or one of its epoch-N and step-N"
SAVE_PATH=${SAVE_PATH:-${POLICY_LOAD%/}-hf}
tokenizer=(); [ -z "${TOKENIZER_MODEL:-}" ] || tokenizer=(--tokenizer_file "$TOKENIZER_MODEL")

if [ ! -e "$SAVE_PATH" ]; then
    say "1. $POLICY_LOAD as a Hugging Face folder, adapters merged"
    merge=(); [[ $({ PYTHONUNBUFFERED=1 "$PYTHON" checkpoint_split.py --inspect "$POLICY_LOAD" || true; } | head -n 1) != *", adapters of rank "* ]] || merge=(--merge_lora)
    "$PYTHON" checkpoint_split.py --ckpt_file "$POLICY_LOAD" --save_path "$SAVE_PATH" --format hf --dtype "${DTYPE:-bf16}" "${merge[@]}" "${tokenizer[@]}"
fi

say "2. transformers reads it"
"$PYTHON" - "$SAVE_PATH" "${PROMPT:-Three apples and four apples are how many apples?}" <<'PY'
import os
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights, {model.dtype}")
if os.path.exists(os.path.join(folder, "tokenizer_config.json")) or os.path.exists(os.path.join(folder, "tokenizer.json")):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if getattr(tokenizer, "chat_template", None):
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=not getattr(tokenizer, "chat_template", None))
    answer = model.generate(**tokens, max_new_tokens=64, do_sample=False)[0, tokens["input_ids"].shape[1]:]
    print(tokenizer.decode(answer, skip_special_tokens=True))
PY

if [ -n "${LM_EVAL_TASK:-}" ]; then
    say "3. lm_eval"
    "$PYTHON" -m lm_eval --model hf --model_args "pretrained=$SAVE_PATH" --tasks "$LM_EVAL_TASK" --include_path examples/lm_eval \
        --batch_size 8 --device "${DEVICE:-cuda}" ${LM_EVAL_LIMIT:+--limit "$LM_EVAL_LIMIT"}
fi

cat <<TEXT

written: $SAVE_PATH. It holds config.json, safetensors and the tokenizer; whatever serves Hugging Face folders serves it:

  vllm serve $SAVE_PATH
  python -m sglang.launch_server --model-path $SAVE_PATH
  transformers serve $SAVE_PATH
  lm_eval --model hf --model_args pretrained=$SAVE_PATH --tasks gsm8k --batch_size 8
TEXT
