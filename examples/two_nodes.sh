#!/usr/bin/env bash
# Any recipe on two nodes (or more) with torchrun: start it once on every node, with the same variables but for NODE_RANK.
#
#   on the first:     NODE_RANK=0 MASTER_ADDR=node-a LOAD_PATH=/shared/Llama-2-7b-hf SAVE_PATH=/shared/run bash examples/two_nodes.sh
#   on the second:    NODE_RANK=1 MASTER_ADDR=node-a LOAD_PATH=/shared/Llama-2-7b-hf SAVE_PATH=/shared/run bash examples/two_nodes.sh
#
# RECIPE is the recipe (examples/llama2.sh), NPROC the GPUs of one node, NNODES the number of nodes (2). MODEL_PARALLEL=8 keeps the two
# reductions per layer inside a node and makes each node a replica; without it all 16 ranks are tensor parallel, over the network.
# Needs: the model, the data and SAVE_PATH under the same path on every node (a save waits for the files of all ranks), and port MASTER_PORT
# (29500) open on the first one.
# Prints at the end: what the recipe prints, on the first node.
export NNODES=${NNODES:-2}
: "${NODE_RANK:?is not set: 0 on the first node, 1 on the second}"
source "$(dirname "$0")/common.sh"
needs SAVE_PATH "a folder that all nodes see"
exec bash "${RECIPE:-examples/llama2.sh}"
