#!/usr/bin/env bash
# The paper's tables at small size: ablation (Table 3), history, resolution, world model (Table 2), chunk length. `worldvla config
# pilot_ROW` prints a row. Run it again after a stop: what is done is skipped, what is half done goes on. Rows whose record is in $RESULTS
# are done: in a clone, RESULTS=out/again makes them anew.
#   ROWS="action full" SEEDS=0 runs/tables.sh     a part; the rows are in order of importance
#   SUITES=libero runs/tables.sh                  rows libero_pilot_ROW, on libero_object and libero_spatial (needs the extra libero)
#   DEVICE=cuda JOBS=8 runs/tables.sh             trains eight rows at a time on one GPU
#   ONLY=stores, ONLY=train                       stops after that part: stores and evaluations want processor cores, training a GPU
# Hardware: stores ten minutes on two cores (LIBERO: an hour); a row and seed a minute on a GPU or half an hour on two cores; its
# evaluation three to fifteen minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."

SUITES=${SUITES:-tabletop}
ROWS=${ROWS:-"action action_world chunk_causal chunk full full_even world world_long world_no_action history2 history4 low head head_after chunk10_causal chunk10 chunk2_causal chunk2 full2 full2_even action_history2 action_history4"}
DEVICE=${DEVICE:-cpu} JOBS=${JOBS:-1} ONLY=${ONLY:-}
PYTHON=${PYTHON:-.venv/bin/python}
if [ "$SUITES" = libero ]; then
    OUT=out/tables_libero RECIPE=libero_pilot_ RESULTS=${RESULTS:-results/libero/tables} SEEDS=${SEEDS:-0}
    SUITES="libero_object libero_spatial" VIEWS="agentview=128x128 wrist=64x64" DEMOS="--episodes 24 --label 5"
    CODES="--config.patch 8 --config.channels 64 --config.num-codes 16384 --config.embed-dim 5 --config.fsq-levels 8 8 8 8 4"
    STATES="--episodes 5 --workers 2"
else
    OUT=out/tables RECIPE=pilot_ RESULTS=${RESULTS:-results/tables} SEEDS=${SEEDS:-"0 1 2"}
    SUITES="tabletop_spatial tabletop_object tabletop_goal tabletop_long" VIEWS="agentview=64x64 wrist=32x32"
    DEMOS="--episodes 100 --label 10" CODES=""
    STATES="--first 10 --episodes 10 --workers 2"
fi
export OUT RECIPE DEVICE PYTHON
worldvla() { "$PYTHON" -m worldvla "$@"; }

stores() {  # directory, views: demonstrations whose labels hold as many actions as the longest chunk; tokenizer; tokens
    for suite in $SUITES; do
        worldvla collect "$suite" --out "$1/demos/$suite" --workers "$(nproc)" $DEMOS --views $2
    done
    [ -e "$1/image_tokenizer/report/report.json" ] ||
        worldvla train-tokenizer "$1/demos" --out "$1/image_tokenizer" --config.encoder cell --steps 1500 $CODES
    for suite in $SUITES; do
        worldvla tokenize "$1/demos/$suite" --tokenizer "$1/image_tokenizer" --out "$1/store_$suite"
    done
}
if [ "$ONLY" != train ]; then
    stores $OUT "$VIEWS"
    case " $ROWS " in *" low "*) stores ${OUT}_low "agentview=32x32 wrist=16x16" ;; esac    # half the resolution
    mkdir -p "$RESULTS"
    cp $OUT/image_tokenizer/report/report.json "$RESULTS/image_tokenizer.json"
fi
[ "$ONLY" != stores ] || exit 0

train() {  # row, seed -> the exported model and its train.json
    local run=$OUT/run_$1_$2 model=$OUT/$1_$2 after=
    [ ! -e "$model/train.json" ] || return 0
    [ "$1" != head_after ] || { train chunk "$2"; after="--train.init-from $OUT/chunk_$2"; }
    if [ "$DEVICE" = cuda ]; then
        "$PYTHON" -m worldvla train "$RECIPE$1" --out "$run" --train.seed "$2" --train.device cuda --train.compile $after
    else
        OMP_NUM_THREADS=1 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m worldvla \
            train "$RECIPE$1" --out "$run" --train.seed "$2" --train.num-threads 1 --train.compile $after
    fi
    "$PYTHON" -m worldvla export "$run" --out "$model"
    "$PYTHON" -c "import sys; from worldvla.eval.tables import train_record; train_record(*sys.argv[1:])" "$run" "$model"
}
export -f train
for seed in $SEEDS; do for row in $ROWS; do echo "$row $seed"; done; done > "$OUT/rows"
side_by_side() { xargs -r -P "$JOBS" -L 1 bash -euc 'train "$@" > "$OUT/log_$1_$2" 2>&1' _; }
[ "$DEVICE" != cuda ] || { sed /head_after/d "$OUT/rows" | side_by_side; sed -n /head_after/p "$OUT/rows" | side_by_side; }
[ "$ONLY" != train ] || exit 0

evaluate() {  # model, head, directory, options: states that no demonstration starts from; all of a chunk executed, as the paper does
    for suite in $SUITES; do
        worldvla eval "$1" --suite "$suite" $STATES --head "$2" --videos 0 --out "$3/$suite" "${@:4}"
    done
}
total=$(wc -l < "$OUT/rows") at=0 ran=0 left=0 eta=
while read -r row seed; do [ -e "$RESULTS/${row}_$seed/train.json" ] || left=$((left + 1)); done < "$OUT/rows"
SECONDS=0
while read -r row seed <&3; do
    model=$OUT/${row}_$seed result=$RESULTS/${row}_$seed
    at=$((at + 1))
    [ ! -e "$result/train.json" ] || continue    # written last: this row is whole
    [ $ran = 0 ] || eta=", about $((SECONDS * left / ran / 60 + 1)) min left"
    echo "== row $at of $total: $row, seed $seed$eta =="
    train "$row" "$seed"
    case $row in
        world*) ;;
        head_after) evaluate "$model" continuous "$result" ;;    # by its bins it is chunk
        *) evaluate "$model" discrete "$result" ;;
    esac
    [ "$row" != head ] || evaluate "$model" continuous "$RESULTS/head_continuous_$seed"
    case $row in chunk|full|full2) evaluate "$model" discrete "$RESULTS/${row}_execute1_$seed" --execute 1 ;; esac
    mkdir -p "$result"
    cp "$model/train.json" "$result/train.json"
    ran=$((ran + 1)) left=$((left - 1))
done 3< "$OUT/rows"
[ $OUT = out/tables ] || { worldvla tables; exit 0; }

# What the tokenizer keeps of the codes, beside the published encoder.
worldvla tokenize $OUT/demos/tabletop_object --tokenizer worldvla/assets/tabletop/image_tokenizer --out ${OUT}_vqgan/store
cp $OUT/store_tabletop_object/manifest.json "$RESULTS/codes_cell.json"
cp ${OUT}_vqgan/store/manifest.json "$RESULTS/codes_vqgan.json"
have() { for row in "$@"; do [ ! -d "$OUT/${row}_0" ] || echo "$OUT/${row}_0"; done; }
worlds=$(have world world_long full full_even world_no_action)
if [ -n "$worlds" ]; then
    for suite in $SUITES; do    # the clips of the world models; seed 0 was trained on
        worldvla collect "$suite" --out "$OUT/held_out/$suite" --episodes 5 --seed 9 --workers "$(nproc)"
    done
    worldvla collect tabletop_long --out $OUT/held_out_long --episodes 15 --seed 9 --workers "$(nproc)"    # some last 50 steps
    more="--probe $OUT/demos"
    ! "$PYTHON" -c "import efficientnet_lite_pytorch" 2> /dev/null || more="$more --features"    # pip install -e '.[features]'
    worldvla eval-world $worlds --demos $OUT/held_out --clips 64 --horizons 10 --out "$RESULTS/world10" $more
    worldvla eval-world $worlds --demos $OUT/held_out_long --clips 16 --horizons 50 --out "$RESULTS/world50" $more
    # Distances between sets of clips (pip install -e '.[features]'), of a row and of the shipped model.
    [ "$more" = "--probe $OUT/demos" ] || worldvla eval-world $(have full2) worldvla/assets/tabletop \
        --demos $OUT/held_out --clips 64 --horizons 10 --features --out "$RESULTS/distances"
fi
policies=$(for seed in 0 1; do ls -d $OUT/{action,chunk_causal,chunk,full}_$seed 2> /dev/null; done || true)
if [ -d $OUT/world_0 ] && [ -n "$policies" ] && [ ! -e "$RESULTS/rank/record.json" ]; then    # in imagination and in the simulator
    worldvla rank $policies --world $OUT/world_0 --demos $OUT/demos --suites tabletop_spatial tabletop_object tabletop_goal \
        --episodes 2 --first 10 --execute 5 1 --out "$RESULTS/rank"
fi
chunks=$(have action chunk_causal chunk)
[ -z "$chunks" ] || "$PYTHON" -m paper.chunk_error $chunks --out "$RESULTS/chunk_error.json"
chunks=$(ls -d $OUT/{chunk2_causal,chunk2,chunk10_causal,chunk10}_1 2> /dev/null || true)
[ -z "$chunks" ] || "$PYTHON" -m paper.chunk_error $chunks --out "$RESULTS/chunk_error_lengths.json"
worldvla tables
