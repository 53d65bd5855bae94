#!/usr/bin/env bash
# A model of libero_object alone, from nothing: scripted demonstrations (not LIBERO's own), image tokenizer and its gate, tokens,
# training, evaluation on held-out and on training initial states; the same with the front view alone, as the paper has it.
# Needs: pip install -e '.[libero]' -c constraints.txt. Hardware: two CPU cores; about two hours, see docs/LOG.md. Every step resumes
# or skips what is done. In a clone set RESULTS=out/again: the records there are another model's.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=out/libero_object
RESULTS=${RESULTS:-results/libero}   # set it elsewhere to run again: a record is not mixed with another model's
MODEL=${MODEL:-$OUT/model}

worldvla() { .venv/bin/python -m worldvla "$@"; }
train() {  # recipe, directory of the exported model
    OMP_NUM_THREADS=1 .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 -m worldvla \
        train "$1" --out "$OUT/run_$1" --train.num-threads 1 --train.compile
    worldvla export "$OUT/run_$1" --out "$2"
}
evaluate() {  # model, name of the record, options
    worldvla eval "$1" --suite libero_object --videos 0 --out "$RESULTS/$2" "${@:3}"
}

worldvla collect libero_object --out $OUT/demos --episodes 26 --views agentview=128x128 wrist=64x64 --workers "$(nproc)" --label 5
worldvla train-tokenizer $OUT/demos --out $OUT/image_tokenizer --steps 1500 --config.patch 8 --config.channels 64 \
    --config.num-codes 16384 --config.embed-dim 5 --config.fsq-levels 8 8 8 8 4
.venv/bin/python -m paper.probe $OUT/image_tokenizer $OUT/demos --steps 600 --out "$RESULTS/probe.json" || echo "the gate failed: see $RESULTS/probe.json"
worldvla tokenize $OUT/demos --tokenizer $OUT/image_tokenizer --out $OUT/store

worldvla doctor    # numbers are of a healthy installation alone, and their records say so
train libero_object "$MODEL"
evaluate "$MODEL" libero_object --episodes 20 --execute 3
evaluate "$MODEL" libero_object_quiet --episodes 10 --execute 3    # with nothing else on the machine: how long it takes
evaluate "$MODEL" libero_object_training_states --first 50 --episodes 5 --execute 3
evaluate "$MODEL" libero_object_execute5 --episodes 10 --execute 5

train libero_object_front $OUT/front
evaluate $OUT/front libero_object_front --episodes 10 --execute 3

for recipe in libero_object libero_object_front; do    # errors on held-out episodes; seconds of training in the last line of each
    (grep '"val"' "$OUT/run_$recipe/metrics.jsonl"; grep '"train"' "$OUT/run_$recipe/metrics.jsonl" | tail -n 1) |
        sed "s/^{/{\"run\": \"$recipe\", /"
done > "$RESULTS/validation.jsonl"
worldvla demo --suite libero_object --checkpoint "$MODEL"    # imagines two clips besides: its imagined/record.json is results/libero/imagine
