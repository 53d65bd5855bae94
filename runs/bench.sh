#!/usr/bin/env bash
# Speed of the built-in world and of decoding, shipped (3m) and random weights, beside transformers: one core (25m on two as well), about eight minutes. Each last
# line printed is the record. Then the picture of the README.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python -m paper.bench --sizes 3m 25m 92m | tail -n 1 | tee results/bench/decoding.json
.venv/bin/python -m paper.bench --sizes 25m 92m --dtype bfloat16 | tail -n 1 | tee results/bench/decoding_bfloat16.json
.venv/bin/python -m paper.bench --sizes 25m --seconds 3 --threads 2 | tail -n 1 | tee results/bench/decoding_two_cores.json
.venv/bin/python -m paper.bench --sizes 25m --seconds 3 --threads 2 --compile | tail -n 1 | tee results/bench/decoding_two_cores_compiled.json
.venv/bin/python -m paper.bench --sizes 92m --dtype bfloat16 --seconds 3 --threads 2 | tail -n 1 | tee results/bench/decoding_two_cores_92m.json
.venv/bin/python -m paper.picture --speed results/bench/decoding.json results/bench/decoding_bfloat16.json --out docs/speed.svg
# On a GPU: .venv/bin/python -m paper.bench --device cuda --dtype bfloat16 --sizes 7b --seconds 0.3 --batch 4 | tail -n 1 | tee results/bench/cuda.json
# and with --compile: results/bench/cuda_compiled.json; with --sizes 3m --seconds 0.3, float32 and bfloat16: cuda_3m.json, cuda_3m_bfloat16.json
# and the memory table: .venv/bin/python -m paper.memory --measure | tail -n 1 | tee results/bench/memory_7b.json
# Frames of the shipped models by guesses and without, on demonstrations that they were not trained on.
drafts() {  # model, suite, tasks, options
    .venv/bin/python -m worldvla collect "$2" --out "out/drafts/$1" --episodes 3 --seed 77 --tasks $3 "${@:4}"
    .venv/bin/python -m paper.drafts "worldvla/assets/$1" "out/drafts/$1" | tee /dev/stderr | tail -n 1 > "results/bench/drafts_$1.json"
}
drafts tabletop tabletop_object "0 3"
! .venv/bin/python -c "import libero" 2> /dev/null || drafts libero libero_spatial "0 5" --views agentview=128x128 wrist=64x64
# A LIBERO evaluation beside the plain loop that most use (needs the libero extra): results/bench/libero_eval.json.
if .venv/bin/python -c "import libero" 2> /dev/null; then
    for model in "" "--checkpoint worldvla/assets/libero"; do
        OMP_NUM_THREADS=1 .venv/bin/python -m paper.bench_libero --task 0 --episodes 10 --workers 2 $model | tail -n 1 |
            tee "results/bench/libero_eval${model:+_model}.json"
    done
fi
