#!/usr/bin/env bash
# A small WorldVLA on libero_object, from scripted demonstrations (not LIBERO's own): collect, tokenizer and its gate, tokens,
# training, one round on the states that the policy itself visits (DAgger), evaluation on held-out and on training initial states.
# Needs: pip install -e '.[libero]' -c constraints.txt. Hardware: two CPU cores; hours of each part in docs/LOG.md. Every step
# resumes or skips what is done.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=out/libero_object
RESULTS=${RESULTS:-results/libero}   # set it elsewhere to run again: a record is not mixed with another model's
VIEWS="--views agentview=128x128 wrist=64x64"
EXECUTE=3
worldvla() { .venv/bin/python -m worldvla "$@"; }
train() {  # recipe, directory of the exported model
    OMP_NUM_THREADS=1 .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 -m worldvla \
        train "$1" --out "$OUT/run_$1" --train.num-threads 1 --train.compile
    worldvla export "$OUT/run_$1" --out "$2"
}

worldvla collect libero_object --out $OUT/demos --episodes 26 $VIEWS --workers "$(nproc)" --label 5
worldvla train-tokenizer $OUT/demos --out $OUT/image_tokenizer --steps 1500 --config.patch 8 --config.channels 64 \
    --config.num-codes 16384 --config.embed-dim 5 --config.fsq-levels 8 8 8 8 4
worldvla probe $OUT/image_tokenizer $OUT/demos --steps 600 --out $RESULTS/probe.json
worldvla tokenize $OUT/demos --tokenizer $OUT/image_tokenizer --out $OUT/store
train libero_object $OUT/first
worldvla collect libero_object --out $OUT/dagger1 --policy $OUT/first --episodes 10 --seed 1 $VIEWS --label 5 \
    --execute $EXECUTE --workers "$(nproc)"
worldvla tokenize $OUT/dagger1 --tokenizer $OUT/image_tokenizer --out $OUT/dagger1_store
train libero_object_dagger1 worldvla/assets/libero_object

worldvla eval worldvla/assets/libero_object --suite libero_object --episodes 20 --execute $EXECUTE --out $RESULTS/libero_object
worldvla eval worldvla/assets/libero_object --suite libero_object --first 50 --episodes 5 --execute $EXECUTE --videos 0 \
    --out $RESULTS/libero_object_training_states
