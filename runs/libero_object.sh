#!/usr/bin/env bash
# A small WorldVLA on libero_object, from scripted demonstrations (not LIBERO's own): collect, tokenizer and its gate, tokens,
# training, evaluation on held-out and on training initial states. Needs: pip install -e '.[libero]' -c constraints.txt
# Hardware: two CPU cores, about 70 minutes to collect (0.16 s a step with two pictures and labels); training wants a GPU or ten
# hours. Every step resumes or skips what is done.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=out/libero_object
RESULTS=results/libero
worldvla() { .venv/bin/python -m worldvla "$@"; }

worldvla collect libero_object --out $OUT/demos --episodes 50 --views agentview=128x128 wrist=64x64 --workers "$(nproc)" --label 5
worldvla train-tokenizer $OUT/demos --out $OUT/image_tokenizer --minutes 20
worldvla probe $OUT/image_tokenizer $OUT/demos --steps 600 --out $RESULTS/probe.json
worldvla tokenize $OUT/demos --tokenizer $OUT/image_tokenizer --out $OUT/store
OMP_NUM_THREADS=1 .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 -m worldvla \
    train libero_object --out $OUT/run --train.num-threads 1 --train.compile
worldvla eval $OUT/run --suite libero_object --episodes 20 --out $RESULTS/libero_object
worldvla eval $OUT/run --suite libero_object --first 50 --episodes 5 --videos 0 --out $RESULTS/libero_object_training_states
