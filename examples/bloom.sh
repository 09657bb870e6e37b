#!/usr/bin/env bash
# A BLOOM-1b1 policy with a BLOOM-560m verifier and critic, on preference pairs: the three stages of helpful_harmless.sh.
#
#   LOAD_PATH=/models/bloom-1b1 REWARD_BASE=/models/bloom-560m DATASET_PATH=pairs.jsonl bash examples/bloom.sh
#
# Needs: both models (they have one tokenizer) and pairs whose prompts are plain text, such as "\n\nHuman: ...\n\nAssistant:" with "chosen" and
# "rejected" beside them; whole conversations: with CHAT_FORMAT=chatml. One GPU; NPROC=2 for two.
# Prints at the end: as helpful_harmless.sh. Variables: those of helpful_harmless.sh (POLICY_LOAD and REWARD_LOAD skip stages).
#
# What fine-tuning all weights of the 1b1 needs on one rank, as printed by
#   python solver_train.py --plan --model_type bloom-1b1 --plan_ranks 1 --dtype bf16 --max_seq_len 512 --activation_checkpointing all --device cpu
# is 19.958 GB. Most of the activations and logits are the vocabulary's: 250880 words.
export NPROC=${NPROC:-1} CHAT_FORMAT=${CHAT_FORMAT:-none} MAX_SEQ_LEN=${MAX_SEQ_LEN:-512}
source "$(dirname "$0")/common.sh"
needs REWARD_BASE "the small model that becomes verifier and critic"
SAVE_PATH=${SAVE_PATH:-runs/bloom} exec bash examples/helpful_harmless.sh
