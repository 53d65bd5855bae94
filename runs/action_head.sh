#!/usr/bin/env bash
# One transformer, two heads: the tabletop recipe with bins alone, and with the continuous head beside them, on the same two suites for
# the same steps from the same initial transformer; three policies on each suite, compared in pairs. Needs the stores and the image
# tokenizer that runs/tabletop.sh makes. Every step resumes or skips what is done: run it again after a stop.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=out/tabletop
RESULTS=${RESULTS:-results/action_head}   # set it elsewhere to run again: a record is not mixed with another model's
STEPS=${STEPS:-2000}
SUITES="tabletop_object tabletop_goal"
STATES="--first 10 --episodes 10"   # initial states 10..19 of each task
EXECUTE=3         # actions of each chunk of five that are executed before the next look

worldvla() { .venv/bin/python -m worldvla "$@"; }

for recipe in tabletop tabletop_head; do
    # shellcheck disable=SC2046,SC2086
    OMP_NUM_THREADS=1 .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 -m worldvla \
        train "$recipe" --out "$OUT/pilot_$recipe" --train.num-threads 1 --train.compile --train.steps "$STEPS" \
        --data.stores $(printf "$OUT/store_%s " $SUITES)
done

mkdir -p "$RESULTS"
for recipe in tabletop tabletop_head; do    # errors on held-out episodes
    grep '"val"' "$OUT/pilot_$recipe/metrics.jsonl" | sed "s/^{/{\"run\": \"$recipe\", /"
done > "$RESULTS/validation.jsonl"

evaluate() {  # name, recipe, suite, head
    worldvla eval "$OUT/pilot_$2" --suite "$3" $STATES --execute $EXECUTE --head "$4" --videos 0 --out "$RESULTS/$1/$3"
}

for suite in $SUITES; do
    evaluate discrete tabletop "$suite" discrete
    evaluate joint_discrete tabletop_head "$suite" discrete
    evaluate joint_continuous tabletop_head "$suite" continuous
    for name in joint_discrete joint_continuous; do
        worldvla compare "$RESULTS/$name/$suite" "$RESULTS/discrete/$suite"
    done
done
