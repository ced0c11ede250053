#!/usr/bin/env bash
# One node by torchrun:
#   scripts/torchrun_one_node.sh 8 search --config configs/scale/mixtral_8x7b.yaml --config configs/scale/search.yaml --out runs/search
# The first argument is the number of GPUs, the rest is the command.
set -euo pipefail
devices=$1
shift
exec torchrun --standalone --nproc-per-node "$devices" "$(dirname "$0")/../train.py" "$@" --trainer.devices "$devices"
