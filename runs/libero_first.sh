#!/usr/bin/env bash
# The whole line once on real LIBERO, as small as can be: three libero_object tasks, two scripted demonstrations each, minutes of
# training. It shows that nothing is tabletop-only; its success rate means nothing. Needs: pip install -e '.[libero]' -c constraints.txt
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=out/libero
worldvla() { .venv/bin/python -m worldvla "$@"; }

worldvla collect libero_object --out $OUT/demos/libero_object --tasks 0 1 2 --episodes 2 --views agentview=64x64 wrist=32x32 --workers 1
worldvla train-tokenizer $OUT/demos --out $OUT/image_tokenizer --steps 40
worldvla tokenize $OUT/demos/libero_object --tokenizer $OUT/image_tokenizer --out $OUT/store_libero_object
worldvla train libero_object_small --out $OUT/run --train.steps "${STEPS:-40}"
worldvla eval $OUT/run --suite libero_object --tasks 0 1 2 --episodes 1 --workers 1 --out results/libero_first/libero_object
worldvla eval-world $OUT/run --demos $OUT/demos/libero_object --clips 4 --horizons 30 --shorter --out results/libero_first/imagine
