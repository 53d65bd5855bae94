"""What the README's first command costs: clone HEAD, install, run the demo; the last line is JSON.

    python -m paper.bench_demo

`install_s`: `make .venv/.installed`, downloads included. `demo_s`: `make demo` after it. `peak_gib`: of the
largest process, the demo.
"""

import json
import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from worldvla.machine import provenance

ROOT = Path(__file__).parents[1]


def main() -> None:
    record: dict[str, Any] = {"bench": "demo"}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
        for name, target in (("install_s", ".venv/.installed"), ("demo_s", "demo")):
            start = time.monotonic()
            subprocess.run(["make", target], cwd=folder, env=env, check=True)
            record[name] = round(time.monotonic() - start, 1)
    # Linux counts KiB.
    record["peak_gib"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2)
    print(json.dumps(record | provenance()))


if __name__ == "__main__":
    main()
