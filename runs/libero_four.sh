#!/usr/bin/env bash
# One LIBERO model of all four suites that acts and imagines, grown from the shipped tabletop model, on codes by
# levels. Needs pip install -e '.[libero]' -c constraints.txt. Two CPU cores: about two hours for the data, two for
# codes and training, and more than one for the evaluation. Run it again after a stop: finished steps are skipped.
# The shipped model was made by these steps, one by one; the first 800 of libero_four were in batches of 48.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

OUT=out/libero    # the recipes read this folder
SUITES="libero_spatial libero_object libero_goal libero_10"
declare -A DEMOS=([libero_spatial]=6 [libero_object]=2 [libero_goal]=10 [libero_10]=10)      # episodes a task
declare -A VISITED=([libero_spatial]=4 [libero_object]=6 [libero_10]=5)    # the shipped model: of five tasks of spatial
collect() {  # part, suite, what else
    worldvla collect "$2" --out $OUT/"$1"/"$2" --views agentview=128x128 wrist=64x64 "${@:3}"
}
tokenize() {  # part, suite, store, seed of the changes to images
    worldvla tokenize $OUT/"$1"/"$2" --tokenizer $OUT/levels --out $OUT/"$3"_"$2" --augment "$4"
}
train() {  # recipe, run
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m worldvla train "$1" \
        --out $OUT/"$2"_run --train.num-threads 1 --train.compile
    [ -e $OUT/"$2" ] || worldvla export $OUT/"$2"_run --out $OUT/"$2"
}

for suite in $SUITES; do
    collect demos "$suite" --label 5 --episodes "${DEMOS[$suite]}"
done
[ -e $OUT/levels/report ] || worldvla train-tokenizer $OUT/demos --levels --config.patch 8 --out $OUT/levels --steps 1200
for suite in $SUITES; do
    tokenize demos "$suite" store 0
done
worldvla config libero_four > $OUT/libero_four.json
[ -e $OUT/grown ] || python -m paper.grow --old tabletop --config-file $OUT/libero_four.json --out $OUT/grown
train libero_four four

for suite in libero_spatial libero_object libero_10; do
    collect visited "$suite" --label 5 --episodes "${VISITED[$suite]}" --seed 11 --policy $OUT/four --execute 3
    tokenize visited "$suite" visited 0
    tokenize visited "$suite" visited_shifted 3
done
for suite in $SUITES; do
    tokenize demos "$suite" shifted_1 1
    tokenize demos "$suite" shifted_2 2
done
train libero_visited model

worldvla doctor
for suite in $SUITES; do    # stored initial states, from which no demonstration starts
    worldvla eval $OUT/model --suite "$suite" --episodes 20 --execute 3 --videos 0
    collect held_out "$suite" --episodes 2 --seed 99
done
worldvla eval-world $OUT/model --demos $OUT/held_out --clips 64 --horizons 10 30
