#!/usr/bin/env bash
# One model for libero_object and libero_spatial, from nothing: scripted demonstrations (not LIBERO's own), one image tokenizer, one
# training; evaluated on stored initial states, which no demonstration starts from, by its bins and by its continuous head if it has one.
# In a clone set RESULTS=out/again: the records there are other models'. Needs: pip install -e '.[libero]' -c constraints.txt. Run it again after a stop: what is done is skipped, what is half done goes on.
#   runs/libero_object_spatial.sh                             9.4 M parameters with a head; two CPU cores, about two hours
#   MODEL=_long DEVICE=cuda runs/libero_object_spatial.sh     8.8 M, bins alone, 4.4 times the samples; a GPU: four minutes of training.
#   MODEL=_drawer runs/libero_object_spatial.sh               after _long: trains that model on, with more of the drawer; an hour on two cores.
#   MODEL=_head runs/libero_object_spatial.sh                 after _drawer: a continuous head on it, which leaves the bins as they are; half an hour.
#                                                             _drawer is the shipped model: its demonstrations of the drawer are the expert's of bf4fcb8, all others older
#   MODEL=_all DEVICE=cuda runs/libero_object_spatial.sh      as _long, with libero_goal and libero_10, of all of whose frames its image tokenizer is made.
#   MODEL=_goal runs/libero_object_spatial.sh                 libero_goal alone, with that tokenizer; half an hour of training on two cores.
#   MODEL=_10 runs/libero_object_spatial.sh                   after _goal: trains that model on, with libero_10 alone; a quarter of an hour.
#   MODEL=_all_front DEVICE=cuda runs/libero_object_spatial.sh    the same data, seen as the paper sees it: the front view alone, no state.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python} DEVICE=${DEVICE:-cpu} MODEL=${MODEL:-}
OUT=out/libero_object_spatial NAME=object_spatial$MODEL EPISODES=20
RUN=$OUT/run$MODEL EXPORT=$OUT/model$MODEL
case "$MODEL" in
    ""|_long) ;;
    _goal) NAME=goal ;;
    _10) NAME=10 AFTER=_goal EPISODES=5 ;;
    _all) NAME=all EPISODES=10 ;;
    _all_front) NAME=all_front EPISODES=5 ;;
    _drawer) AFTER=_long ;;
    _head) AFTER=_drawer ;;
    *) echo "MODEL: got '$MODEL', expected nothing, _long, _drawer, _head, _goal, _10, _all or _all_front" >&2; exit 2 ;;
esac
RESULTS=${RESULTS:-results/libero/$NAME}
[ -z "${AFTER:-}" ] || [ -e "$OUT/model$AFTER/train.json" ] || { echo "no $OUT/model$AFTER: MODEL=$AFTER $0 makes it" >&2; exit 2; }
worldvla() { "$PYTHON" -m worldvla "$@"; }
demonstrations() {  # directory, name, suite, options
    worldvla collect "$3" --out "$1/$2" --workers "$(nproc)" --label 5 --views agentview=128x128 wrist=64x64 "${@:4}"
    [ "$1" != $OUT ] || worldvla tokenize "$1/$2" --tokenizer out/tables_libero/image_tokenizer --out "$1/store_$2"
}
CODES="--config.patch 8 --config.channels 64 --config.num-codes 16384 --config.embed-dim 5 --config.fsq-levels 8 8 8 8 4"

SUITES=libero ONLY=stores ROWS=full runs/tables.sh
mkdir -p "$RESULTS"
# The gates: what the codes hold of the target's position, and what the bins cost a perfect policy (its actions executed open loop).
"$PYTHON" -m paper.probe out/tables_libero/image_tokenizer out/tables_libero/demos/libero_spatial --steps 600 --out "$RESULTS/probe.json" ||
    echo "the gate failed: see $RESULTS/probe.json"
for suite in libero_object libero_spatial; do
    worldvla collect $suite --out "$OUT/clean/$suite" --episodes 1 --noise 0 --seed 5
    worldvla replay "$OUT/clean/$suite" --bins
done
[ -z "$MODEL" ] || demonstrations $OUT more libero_spatial --episodes 24 --seed 1
case "$MODEL" in _drawer|_head|_goal|_10|_all*) demonstrations $OUT drawer libero_spatial --tasks 4 --episodes 48 --seed 3 ;; esac
RECIPE=libero_object_spatial$MODEL SUITES="libero_spatial libero_object"
if [ "$NAME" != "object_spatial$MODEL" ]; then
    RECIPE=libero$MODEL SUITES="libero_goal libero_10 libero_spatial libero_object" ALL=out/libero_all OLD=out/tables_libero/demos
    case "$MODEL" in _goal|_10) SUITES=libero$MODEL ;; esac
    demonstrations $ALL goal libero_goal --episodes 20 --seed 1
    demonstrations $ALL 10 libero_10 --tasks 0 1 2 3 4 5 6 7 8 --episodes 8 --seed 1    # the expert cannot do task 9
    [ -e $ALL/image_tokenizer/report/report.json ] || worldvla train-tokenizer $OLD/libero_object $OLD/libero_spatial $ALL/goal $ALL/10 \
        --out $ALL/image_tokenizer --config.encoder cell --steps 3000 $CODES
    for demos in $OLD/libero_object $OLD/libero_spatial $OUT/more $OUT/drawer $ALL/goal $ALL/10; do
        name=$(basename $demos)
        worldvla tokenize $demos --tokenizer $ALL/image_tokenizer --out $ALL/store_${name#libero_}
    done
fi
if [ ! -e "$EXPORT/train.json" ]; then
    if [ "$DEVICE" = cuda ]; then
        worldvla train "$RECIPE" --out "$RUN" --train.device cuda --train.compile
    else
        OMP_NUM_THREADS=1 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m worldvla \
            train "$RECIPE" --out "$RUN" --train.num-threads 1 --train.compile
    fi
    worldvla export "$RUN" --out "$EXPORT"
    "$PYTHON" -c "import sys; from worldvla.eval.tables import train_record; train_record(*sys.argv[1:])" "$RUN" "$EXPORT"
fi
worldvla doctor    # numbers are of a healthy installation alone, and their records say so
cp "$EXPORT/train.json" "$RESULTS/train.json"
evaluate() {  # name of the record, suite, options
    worldvla eval "$EXPORT" --suite "$2" --videos 0 --out "$RESULTS/$1" "${@:3}"
}
for suite in $SUITES; do
    if [ "$MODEL" = _head ]; then    # by its bins it is _drawer
        evaluate ${suite}_continuous $suite --episodes 20 --head continuous --execute 3
        continue
    fi
    evaluate ${suite}_discrete $suite --episodes $EPISODES --execute 3
    [ -n "$MODEL" ] || evaluate ${suite}_continuous $suite --episodes 10 --head continuous --execute 3
    [ "$MODEL" = _all_front ] || evaluate ${suite}_training_states $suite --first 50 --episodes 5 --execute 3
done
