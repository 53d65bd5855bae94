#!/usr/bin/env bash
# The shipped LIBERO model, from nothing but the shipped tabletop model, which it grows from: all four suites in one
# model of 3.7 million parameters that acts and imagines. Needs pip install -e '.[libero]' -c constraints.txt. Two CPU
# cores: HOURS. Run it again after a stop: finished steps are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

OUT=out/libero    # the recipe reads this folder
SUITES="libero_spatial libero_object libero_goal libero_10"
collect() {  # part, suite, what else
    worldvla collect "$2" --out $OUT/"$1"/"$2" --views agentview=128x128 wrist=64x64 "${@:3}"
}

collect demos libero_10 --label 5 --episodes 10
collect demos libero_goal --label 5 --episodes 10
collect demos libero_spatial --label 5 --episodes 8
collect demos libero_object --label 5 --episodes 5
[ -e $OUT/levels/report ] || worldvla train-tokenizer $OUT/demos --levels --config.patch 8 --out $OUT/levels --steps 2200
for suite in $SUITES; do
    worldvla tokenize $OUT/demos/"$suite" --tokenizer $OUT/levels --out $OUT/store_"$suite"
done

worldvla config libero > $OUT/libero.json
[ -e $OUT/grown ] || python -m paper.grow --old tabletop --config-file $OUT/libero.json --out $OUT/grown
OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m worldvla train libero \
    --out $OUT/run --train.num-threads 1 --train.compile
worldvla export $OUT/run --out $OUT/model

worldvla doctor
for suite in $SUITES; do    # stored initial states, from which no demonstration starts
    worldvla eval $OUT/model --suite "$suite" --episodes 20 --execute 3 --videos 0
    collect held_out "$suite" --episodes 2 --seed 99
done
worldvla eval-world $OUT/model --demos $OUT/held_out --clips 64 --horizons 10 30
