#!/usr/bin/env bash
# Several nodes by torchrun; run it on every node, with the same first address:
#   HEAD=node0:29500 NODES=2 scripts/torchrun_nodes.sh 8 prune --config configs/scale/mixtral_8x22b.yaml --config configs/scale/lottery.yaml --out /shared/runs/lottery
# The first argument is the number of GPUs of a node, the rest is the command. --out, model and text must lie where all
# nodes see them.
set -euo pipefail
devices=$1
shift
exec torchrun --nnodes "$NODES" --nproc-per-node "$devices" --rdzv-backend c10d --rdzv-endpoint "$HEAD" \
  --rdzv-id "${JOB_ID:-lightning-moe}" "$(dirname "$0")/../train.py" "$@" \
  --trainer.devices "$devices" --trainer.num_nodes "$NODES"
