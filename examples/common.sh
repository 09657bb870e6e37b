# shellcheck shell=bash
# What the recipes share; they source it. It runs nothing by itself.
#
# Environment variables that every recipe understands:
#   LOAD_PATH         the pretrained model: a Hugging Face folder, Meta's shards, a single file, or a folder of checkpoint_split.py
#   TOKENIZER_MODEL   tokenizer file or folder, when it is not beside the weights
#   DATASET_PATH      training data: json, jsonl or parquet (docs/DATA.md)
#   SAVE_PATH         where everything goes; on several nodes a folder that all of them see
#   NPROC             processes on this node, one per GPU
#   MODEL_PARALLEL    tensor-parallel ranks; the rest are data-parallel replicas. Default: all processes
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT        for more than one node: examples/two_nodes.sh
#   EXTRA             flags for every script, such as "--dtype bf16"; SOLVER_TRAIN_EXTRA, SOLVER_EVALUATE_EXTRA, VERIFIER_TRAIN_EXTRA and
#                     PPO_TRAIN_EXTRA: for one of them. They replace a recipe's own flag of the same name. No spaces inside a value
#   PYTHON            an interpreter that has the package; default: that of quickstart.sh if it is there, else python
# Paths are as seen from the repository's folder. A recipe that was stopped, given again, continues: training that is finished ends at once, an interrupted one
# goes on from its newest save, short evaluations are made again.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ -n "${PYTHON:-}" ] || { PYTHON=python; [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python; }
NPROC=${NPROC:-8}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MODEL_PARALLEL=${MODEL_PARALLEL:--1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
torchrun=("$PYTHON" -m torch.distributed.run --nproc_per_node "$NPROC")

trap 'exit 143' TERM        # after the running script, which saves first

say() { printf '\n== %s (%dm%02ds)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

# needs NAME MEANING: stop with a sentence unless the variable is set
needs() { [ -n "${!1:-}" ] || { echo "error: set $1: $2. Such as: $1=... bash $0" >&2; exit 1; }; }

if [ "$NNODES" != 1 ] && [ "${PLAN:-0}" != 1 ]; then
    needs MASTER_ADDR "the first node's name or address"
    torchrun+=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
fi

# once COMMAND...: on the first node only, in one process
once() { [ "$NODE_RANK" != 0 ] || "$@"; }

# launch SCRIPT FLAGS...: torchrun on every node, with the flags of EXTRA
launch() {
    local script=$1 own kept=() more=() keep=1 word; shift
    own=${script%.py}; own=${own^^}_EXTRA
    read -ra more <<<"${EXTRA:-} ${!own:-}" || true
    [ -z "${TOKENIZER_MODEL:-}" ] || more+=(--tokenizer_file "$TOKENIZER_MODEL")
    [ "$MODEL_PARALLEL" = -1 ] || more+=(--model_parallel_size "$MODEL_PARALLEL")
    for word in "$@"; do
        if [[ $word == --* ]]; then
            keep=1; [[ " ${more[*]%%=*} " != *" ${word%%=*} "* ]] || keep=0
        fi
        [ $keep = 0 ] || kept+=("$word")
    done
    "${torchrun[@]}" "$script" ${kept[@]+"${kept[@]}"} ${more[@]+"${more[@]}"}
}

# plan SCRIPT FLAGS...: what a rank will need of memory; one process, no checkpoint
plan() {
    local script=$1; shift
    local torchrun=("$PYTHON") TOKENIZER_MODEL=
    launch "$script" --plan --plan_ranks $((NPROC * NNODES)) "$@"
}
