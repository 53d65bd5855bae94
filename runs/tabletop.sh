#!/usr/bin/env bash
# The shipped small model, from nothing: demonstrations, image tokenizer, its gate, tokens, training, two rounds on the states that
# the policy itself visits (DAgger), evaluation, imagination. Hardware: two CPU cores; about five hours, see docs/LOG.md. Seeds are
# written out. Every step resumes or skips what is done: run it again after a stop. In a clone set RESULTS=out/again MODEL=out/again/model, or
# it meets, and overwrites, the shipped model's. Training runs as two processes of one thread,
# which compute one batch together.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=out/tabletop
RESULTS=${RESULTS:-results/tabletop}   # set it elsewhere to run again: a record is not mixed with another model's
MODEL=${MODEL:-worldvla/assets/tabletop}
SUITES="tabletop_spatial tabletop_object tabletop_goal tabletop_long"
STATES="--first 10 --episodes 10 --workers 2"   # workers make the batches; initial states 10..19 of each task; choices were made on 0, 1 and 40..49
EXECUTE=3         # actions of each chunk of five that are executed before the next look

worldvla() { .venv/bin/python -m worldvla "$@"; }

for suite in $SUITES; do
    worldvla collect "$suite" --out "$OUT/demos/$suite" --episodes 100 --workers "$(nproc)" --label 5
    worldvla replay "$OUT/demos/$suite"
    worldvla collect "$suite" --out "$OUT/clean/$suite" --episodes 10 --seed 7 --noise 0 --views agentview=16x16
    worldvla replay "$OUT/clean/$suite" --bins
done

worldvla train-tokenizer "$OUT/demos" --out "$OUT/image_tokenizer" --steps 2056
.venv/bin/python -m paper.probe "$OUT/image_tokenizer" "$OUT"/demos/tabletop_{object,goal,spatial} --steps 600 --out "$RESULTS/probe.json"

for suite in $SUITES; do
    worldvla tokenize "$OUT/demos/$suite" --tokenizer "$OUT/image_tokenizer" --out "$OUT/store_$suite"
done

train() {  # recipe, directory of the exported model
    OMP_NUM_THREADS=1 .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 -m worldvla \
        train "$1" --out "$OUT/run_$1" --train.num-threads 1 --train.compile
    worldvla export "$OUT/run_$1" --out "$2"
}

visit() {  # round, policy, episodes of a task: its states, labelled by the expert; seed = round, initial states of their own
    for suite in $SUITES; do
        worldvla collect "$suite" --out "$OUT/dagger$1/$suite" --policy "$2" --episodes "$3" --seed "$1" --label 5 \
            --execute $EXECUTE --workers "$(nproc)"
        worldvla tokenize "$OUT/dagger$1/$suite" --tokenizer "$OUT/image_tokenizer" --out "$OUT/dagger$1_$suite"
    done
}

train tabletop "$OUT/first"
visit 1 "$OUT/first" 40     # the shipped model: 60 of tabletop_spatial
train tabletop_dagger1 "$OUT/second"
for suite in $SUITES; do
    worldvla eval "$OUT/second" --suite "$suite" $STATES --execute $EXECUTE --videos 0 --out "$RESULTS/round1/$suite"
done
visit 2 "$OUT/second" 40
train tabletop_dagger2 "$MODEL"
for recipe in tabletop_dagger1 tabletop_dagger2; do    # errors on held-out episodes
    grep '"val"' "$OUT/run_$recipe/metrics.jsonl" | sed "s/^{/{\"run\": \"$recipe\", /"
done > "$RESULTS/validation.jsonl"

for suite in $SUITES; do
    worldvla eval "$MODEL" --suite "$suite" $STATES --execute $EXECUTE --videos 0 --out "$RESULTS/$suite"
    for execute in 1 5; do
        worldvla eval "$MODEL" --suite "$suite" $STATES --execute $execute --videos 0 --out "$RESULTS/${suite}_execute$execute"
    done
    # The states on which the first model, before its rounds, is on record in results/tabletop/first: a paired comparison.
    worldvla eval "$MODEL" --suite "$suite" --episodes 10 --workers 2 --execute $EXECUTE --videos 0 --out "$RESULTS/states_0_9/$suite"
    worldvla compare "$RESULTS/states_0_9/$suite" "results/tabletop/first/$suite"
    worldvla eval random --suite "$suite" $STATES --videos 0 --out "$RESULTS/${suite}_random"
    worldvla eval open-loop --demos "$OUT/demos/$suite" --suite "$suite" $STATES --videos 0 --out "$RESULTS/${suite}_blind"
    worldvla eval expert --suite "$suite" --episodes 50 --videos 0 --out "$RESULTS/${suite}_expert"
done
for suite in $SUITES; do
    worldvla collect "$suite" --out "$OUT/held_out/$suite" --episodes 1 --seed 9 --tasks 0 3    # seeds 0, 1 and 2 were trained on
done
worldvla eval-world "$MODEL" --demos "$OUT"/held_out/*/ --clips 8 --horizons 30 --shorter --out "$RESULTS/imagine"
