#!/usr/bin/env bash
# What the shipped tabletop world model is good for: a policy of 400 demonstrations, a judge, policies ranked in
# imagination, and plans. Two CPU cores: about three hours. Run it again after a stop: finished steps are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

OUT=out/judge
SUITES="tabletop_spatial tabletop_object tabletop_goal"

for suite in $SUITES tabletop_long; do
    worldvla collect "$suite" --out $OUT/expert/"$suite" --episodes 10 --seed 55 --label 5
    worldvla tokenize $OUT/expert/"$suite" --tokenizer tabletop --out $OUT/store_"$suite"
done
worldvla train tabletop_world --train.steps 1200 --data.world-fraction 0 --data.stores $OUT/store_* --train.init-from "" \
    --tokenizer tabletop --train.num-threads 1 --out $OUT/few_run
worldvla export $OUT/few_run --out $OUT/few

LEVELS="0.2 0.25 0.3 0.34 0.36 0.38 0.4 0.42 0.44 0.46 0.5"
[ -e $OUT/noisy ] || python -m paper.noisy tabletop --levels $LEVELS --out $OUT/noisy
[ -e $OUT/noisy_few ] || python -m paper.noisy $OUT/few --levels 0.1 0.15 0.2 --out $OUT/noisy_few
for suite in $SUITES; do
    for kind in world:40:71:noisy/noise_0.4 world_few:20:72:few held_out:2:99:noisy/noise_0.4 held_out_more:4:123:noisy/noise_0.4; do
        IFS=: read -r name episodes seed policy <<< $kind
        worldvla collect "$suite" --kind world --out $OUT/"$name"/"$suite" --episodes "$episodes" --seed "$seed" \
            --policy $OUT/"$policy"
    done
done
worldvla rank $OUT/few tabletop $OUT/noisy{,_few}/noise_* --world tabletop --demos $OUT/world $OUT/world_few --judged 40 \
    --held-out $OUT/held_out $OUT/held_out_more --suites $SUITES --execute 5 --dtype auto --out $OUT/rank

PLAN="--execute 5 --world tabletop --judge $OUT/rank/judge.safetensors --dtype auto"
for suite in $SUITES; do
    worldvla eval $OUT/few --suite "$suite" --execute 5 --episodes 14 --out $OUT/unplanned/"$suite"
    worldvla eval $OUT/few --suite "$suite" --episodes 14 --plan 8 --out $OUT/planned/"$suite" $PLAN
    worldvla compare $OUT/planned/"$suite" $OUT/unplanned/"$suite"
    # By the number of chunks, and any of eight by chance, on the first five states of each task.
    for chunks in 2 4 8; do
        worldvla eval $OUT/few --suite "$suite" --episodes 5 --plan $chunks --out $OUT/planned_$chunks/"$suite" $PLAN
    done
    python -m paper.planning $OUT/few --by-chance --judge $OUT/rank/judge.safetensors --suite "$suite" --episodes 5 \
        --out $OUT/by_chance/"$suite"
done
# The same with the simulator in the place of imagination: what planning with this judge can bring at most.
worldvla eval $OUT/few --suite tabletop_object --execute 5 --first 20 --episodes 5 --out $OUT/unplanned_20/tabletop_object
python -m paper.planning $OUT/few --judge $OUT/rank/judge.safetensors --suite tabletop_object --first 20 --episodes 5 \
    --out $OUT/planned_in_simulator/tabletop_object
