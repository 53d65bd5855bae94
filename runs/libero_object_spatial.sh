#!/usr/bin/env bash
# One model for libero_object and libero_spatial, from nothing: scripted demonstrations (not LIBERO's own), one image tokenizer, one
# training; evaluated on stored initial states, which no demonstration starts from, by its bins and by its continuous head.
# Needs: pip install -e '.[libero]' -c constraints.txt. Hardware: two CPU cores, about two hours; training alone on a GPU:
# DEVICE=cuda. Run it again after a stop: what is done is skipped, what is half done goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python} DEVICE=${DEVICE:-cpu}
OUT=out/libero_object_spatial RESULTS=${RESULTS:-results/libero/object_spatial}
worldvla() { "$PYTHON" -m worldvla "$@"; }

SUITES=libero ONLY=stores ROWS=full runs/tables.sh
if [ ! -e $OUT/model/train.json ]; then
    if [ "$DEVICE" = cuda ]; then
        worldvla train libero_object_spatial --out $OUT/run --train.device cuda
    else
        OMP_NUM_THREADS=1 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m worldvla \
            train libero_object_spatial --out $OUT/run --train.num-threads 1 --train.compile
    fi
    worldvla export $OUT/run --out $OUT/model
    "$PYTHON" -c "import sys; from worldvla.eval.tables import train_record; train_record(*sys.argv[1:])" $OUT/run $OUT/model
fi
mkdir -p "$RESULTS"
cp $OUT/model/train.json "$RESULTS/train.json"
evaluate() {  # name of the record, suite, options
    worldvla eval $OUT/model --suite "$2" --videos 0 --out "$RESULTS/$1" "${@:3}"
}
for suite in libero_object libero_spatial; do
    evaluate ${suite}_discrete $suite --episodes 20 --execute 3
    evaluate ${suite}_continuous $suite --episodes 10 --head continuous --execute 3
    evaluate ${suite}_training_states $suite --first 50 --episodes 5 --execute 3
done
