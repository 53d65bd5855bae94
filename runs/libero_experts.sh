#!/usr/bin/env bash
# The scripted experts on LIBERO's stored initial states: results/libero/SUITE_expert/record.json. No cameras, no OpenGL; two cores,
# thirteen minutes for all 50 states a task of the four suites (EPISODES=10: three). Needs: pip install -e '.[libero]' -c constraints.txt
set -euo pipefail
cd "$(dirname "$0")/.."
RESULTS=${RESULTS:-results/libero}   # set it elsewhere to run again
.venv/bin/python -m worldvla doctor    # numbers are of a healthy installation alone, and their records say so
for suite in libero_spatial libero_object libero_goal libero_10; do
    OMP_NUM_THREADS=1 .venv/bin/python -m worldvla eval expert --suite "$suite" --episodes "${EPISODES:-50}" --videos 0 \
        --out "$RESULTS/${suite}_expert" || true
done    # the exit code counts errors: libero_10 task 9 has no expert, and its episodes are errors
