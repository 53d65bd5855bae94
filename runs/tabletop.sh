#!/usr/bin/env bash
# The shipped small model, from nothing: demonstrations, image tokenizer, its gate, tokens, training, evaluation, imagination.
# Hardware: two CPU cores. Seed 0. Hours of each step: docs/LOG.md. After a stop, run it again: what is done is not done twice.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=out/tabletop
SUITES="tabletop_spatial tabletop_object tabletop_goal tabletop_long"
EPISODES=50  # successful demonstrations of each of the 40 tasks
WORKERS=$(nproc)
worldvla() { .venv/bin/python -m worldvla "$@"; }

for suite in $SUITES; do
    worldvla collect "$suite" --out "$OUT/demos/$suite" --episodes "$EPISODES" --workers "$WORKERS"
done
for suite in $SUITES; do
    worldvla replay "$OUT/demos/$suite"
    worldvla replay "$OUT/demos/$suite" --bins  # what 256 bins cost
done

test -f "$OUT/image_tokenizer/report/report.json" || worldvla train-tokenizer "$OUT/demos" --out "$OUT/image_tokenizer"
worldvla probe "$OUT/image_tokenizer" "$OUT/demos/tabletop_object" --out results/tabletop_probe.json

for suite in $SUITES; do
    worldvla tokenize "$OUT/demos/$suite" --tokenizer "$OUT/image_tokenizer" --out "$OUT/store_$suite"
done

worldvla train tabletop --out "$OUT/run"

for suite in $SUITES; do
    for who in "$OUT/run" random blind; do
        name=$(basename "$who")
        worldvla eval "$who" --suite "$suite" --episodes 10 --workers "$WORKERS" --demos "$OUT/demos/$suite" \
            --out "$OUT/eval/$name/$suite"
        cp "$OUT/eval/$name/$suite/record.json" "results/${suite}_${name}.json"
    done
done
worldvla imagine "$OUT/run" "$OUT"/demos/* --out "$OUT/imagine"
cp "$OUT/imagine/record.json" results/tabletop_imagine.json

# What is shipped inside the package: the newest checkpoint without the optimiser.
newest=$(find "$OUT/run/ckpt" -maxdepth 1 -name 'step_*' | sort -V | tail -n 1)
mkdir -p worldvla/assets/tabletop/image_tokenizer
cp "$newest"/{config,vocab,statistics,text,manifest}.json "$newest/model.safetensors" worldvla/assets/tabletop/
cp "$newest"/image_tokenizer/{config.json,model.safetensors} worldvla/assets/tabletop/image_tokenizer/
