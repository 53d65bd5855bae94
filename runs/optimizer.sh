#!/usr/bin/env bash
# AdamW against Muon at a few learning rates: 250 steps of pilot_chunk each, errors on held-out episodes. Needs the stores that runs/tables.sh
# makes. Hardware: two CPU cores, about seven minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
RESULTS=${RESULTS:-results/optimizer.jsonl}
: > "$RESULTS.tmp"
for run in "adamw 1.2e-3" "adamw 2.4e-3" "muon 1.2e-3" "muon 3e-3" "muon 6e-3"; do
    set -- $run
    OMP_NUM_THREADS=1 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m worldvla train pilot_chunk \
        --out "out/optimizer/$1_$2" --optim.method "$1" --optim.learning-rate "$2" --optim.warmup-steps 50 --train.steps 250 \
        --train.eval-every 250 --train.num-eval-batches 16 --train.num-threads 1 --train.compile
    grep '"val"' "out/optimizer/$1_$2/metrics.jsonl" | sed "s/^{/{\"method\": \"$1\", \"learning_rate\": $2, /" >> "$RESULTS.tmp"
done
mv "$RESULTS.tmp" "$RESULTS"
