#!/usr/bin/env bash
# The paper's tables at pilot size: ablation (Table 3), history, resolution, world model (Table 2), chunk length. Two suites, two seeds,
# 15 rows; `worldvla config pilot_ROW` prints one. Hardware: two CPU cores, about ten minutes to train a row and seed (longer with
# history), about six hours in all. Run it again after a stop: what is done is skipped, what is half done goes on.
# ROWS="action full" SEEDS=0 runs/tables.sh does a part; the rows are in order of importance.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=out/tables
RESULTS=${RESULTS:-results/tables}
SUITES="tabletop_object tabletop_goal"
ROWS=${ROWS:-"action action_world chunk_causal chunk full world world_no_action history2 history4 low head chunk10_causal chunk10 chunk2_causal chunk2"}
SEEDS=${SEEDS:-"0 1"}
PYTHON=${PYTHON:-.venv/bin/python}
worldvla() { "$PYTHON" -m worldvla "$@"; }

stores() {  # directory, views: demonstrations whose labels hold ten actions, as long chunks need; tokenizer; tokens
    for suite in $SUITES; do
        worldvla collect "$suite" --out "$1/demos/$suite" --episodes 100 --workers "$(nproc)" --label 10 --views $2
    done
    [ -e "$1/image_tokenizer/report/report.json" ] || worldvla train-tokenizer "$1/demos" --out "$1/image_tokenizer" --config.encoder cell --steps 1500
    for suite in $SUITES; do
        worldvla tokenize "$1/demos/$suite" --tokenizer "$1/image_tokenizer" --out "$1/store_$suite"
    done
}
stores $OUT "agentview=64x64 wrist=32x32"
case " $ROWS " in *" low "*) stores ${OUT}_low "agentview=32x32 wrist=16x16" ;; esac    # half the resolution
mkdir -p "$RESULTS"
cp $OUT/image_tokenizer/report/report.json "$RESULTS/image_tokenizer.json"
worldvla tokenize $OUT/demos/tabletop_object --tokenizer worldvla/assets/tabletop/image_tokenizer --out ${OUT}_vqgan/store    # beside it, the
cp $OUT/store_tabletop_object/manifest.json "$RESULTS/codes_cell.json"                                                  # published encoder
cp ${OUT}_vqgan/store/manifest.json "$RESULTS/codes_vqgan.json"
for suite in $SUITES; do    # the clips of the world models; seed 0 was trained on
    worldvla collect "$suite" --out "$OUT/held_out/$suite" --episodes 5 --seed 9 --workers "$(nproc)"
done
# 50 steps: only some episodes of tabletop_long are that long. Its tasks are none that the rows train on.
worldvla collect tabletop_long --out $OUT/held_out_long --episodes 15 --seed 9 --workers "$(nproc)"

evaluate() {  # run, head, directory: initial states 10..19, every action of a chunk executed, as the paper does
    for suite in $SUITES; do
        worldvla eval "$1" --suite "$suite" --first 10 --episodes 10 --head "$2" --videos 0 --out "$3/$suite"
    done
}

set -- $ROWS
total=$(($# * $(wc -w <<< "$SEEDS"))) at=0 started=$SECONDS trained=0
for seed in $SEEDS; do
    for row in $ROWS; do
        run=$OUT/run_${row}_$seed result=$RESULTS/${row}_$seed
        at=$((at + 1))
        [ ! -e "$result/train.json" ] || continue    # written last: this row is whole
        left=$((trained ? (SECONDS - started) * (total - at + 1) / trained / 60 : (total - at + 1) * 12))
        echo "== row $at of $total: $row, seed $seed; about $left minutes left =="
        OMP_NUM_THREADS=1 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m worldvla \
            train "pilot_$row" --out "$run" --train.seed "$seed" --train.num-threads 1 --train.compile
        trained=$((trained + 1))
        case $row in world*) ;; *)
            evaluate "$run" discrete "$result"
        esac
        [ "$row" != head ] || evaluate "$run" continuous "$RESULTS/head_continuous_$seed"
        "$PYTHON" -c "import sys; from worldvla.eval.tables import train_record; train_record(*sys.argv[1:])" "$run" "$result"
    done
done

have() { for row in "$@"; do [ ! -d "$OUT/run_${row}_0" ] || echo "$OUT/run_${row}_0"; done; }
worlds=$(have world full world_no_action)
if [ -n "$worlds" ]; then
    worldvla eval-world $worlds --demos $OUT/held_out --clips 64 --horizons 10 --out "$RESULTS/world10"
    worldvla eval-world $worlds --demos $OUT/held_out_long --clips 16 --horizons 50 --out "$RESULTS/world50"
fi
chunks=$(have action chunk2_causal chunk2 chunk_causal chunk chunk10_causal chunk10)
[ -z "$chunks" ] || worldvla chunk-error $chunks --out "$RESULTS/chunk_error.json"
worldvla tables
