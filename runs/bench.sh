#!/usr/bin/env bash
# Speed of the built-in world and of decoding; the last line printed is results/bench/tabletop.json.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python tools/bench.py --seconds 2 | tail -n 1 | tee results/bench/tabletop.json
