#!/usr/bin/env bash
# The shipped LIBERO model, from nothing: libero_object and libero_spatial in one model of 8.9 million parameters.
# Needs pip install -e '.[libero]' -c constraints.txt. Two CPU cores: about two hours for the data; the first
# training wants a GPU (four minutes on an H200), the second takes half an hour on two cores. Run it again after
# a stop: finished steps are skipped. The models beside it: python -m paper.run.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

DATA=out/tables_libero OUT=out/libero_object_spatial    # the recipes read these folders
DEMOS="--label 5 --views agentview=128x128 wrist=64x64"
CODES="--config.encoder cell --config.patch 8 --config.channels 64 --config.num-codes 16384 --config.embed-dim 5 --config.fsq-levels 8 8 8 8 4"

for suite in libero_object libero_spatial; do
    worldvla collect $suite --out $DATA/demos/$suite --episodes 24 $DEMOS
done
worldvla collect libero_spatial --out $OUT/more --episodes 24 --seed 1 $DEMOS
worldvla collect libero_spatial --out $OUT/drawer --tasks 4 --episodes 48 --seed 3 $DEMOS
[ -e $DATA/image_tokenizer/report ] || worldvla train-tokenizer $DATA/demos --out $DATA/image_tokenizer --steps 1500 $CODES
for suite in libero_object libero_spatial; do
    worldvla tokenize $DATA/demos/$suite --tokenizer $DATA/image_tokenizer --out $DATA/store_$suite
done
for part in more drawer; do
    worldvla tokenize $OUT/$part --tokenizer $DATA/image_tokenizer --out $OUT/store_$part
done

worldvla train libero_object_spatial_long --out $OUT/run_long --train.device cuda --train.compile
worldvla export $OUT/run_long --out $OUT/model_long
OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m worldvla train libero_object_spatial_drawer \
    --out $OUT/run_drawer --train.num-threads 1 --train.compile
worldvla export $OUT/run_drawer --out $OUT/model_drawer

worldvla doctor
for suite in libero_object libero_spatial; do
    worldvla eval $OUT/model_drawer --suite $suite --episodes 20 --execute 3 --videos 0
done
