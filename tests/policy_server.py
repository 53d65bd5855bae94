"""Our server around a policy of a few lines, for another process: `python policy_server.py JSON`, which says
how it behaves. Writes its address to stdout. No torch. And what its tests ask it.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from worldvla.serve.server import Limits, ServedPolicy, serve


def act(observations: Sequence[dict[str, Any]], settings: dict[str, Any]) -> np.ndarray:
    """Move right by 0.2; the first action's other dims are the first pixels of the frames it was shown."""
    wanted = [o for o in observations if o["instruction"] != "lose"]
    return np.stack([np.zeros((5, 7)), *(_act(o, settings) for o in wanted)])[1:]


def _act(observation: dict[str, Any], settings: dict[str, Any]) -> np.ndarray:
    settings["requests"] = settings.get("requests", 10**9) - 1
    if settings["requests"] < 0:
        os._exit(9)
    word, _, rest = observation["instruction"].partition(" ")
    while word == "await" and not Path(rest).exists():
        time.sleep(0.01)
    if word == "sleep":
        time.sleep(float(rest))
    if word == "count":
        Path(rest).write_text(f"{int(Path(rest).read_text()) + 1}")
    if word == "raise":
        raise RuntimeError("the policy\nfell off")
    actions = np.full((5, 7), 0.2, np.float32)
    seen = [int(frame["agentview"].flat[0]) for frame in (*observation.get("previous", ()), observation)]
    actions[0, 1 : 1 + len(seen)] = seen
    actions[0, 6] = observation["state"][0]
    return actions


@contextmanager
def policy_process(**settings: Any) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run tests/policy_server.py in another process; yield its address, HOST:PORT, and the process."""
    words = [sys.executable, __file__, json.dumps(settings)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()


@contextmanager
def policy_server(**settings: Any) -> Iterator[str]:
    with policy_process(**settings) as (at, _):
        yield at


def image(value: int = 3, side: int = 4) -> np.ndarray:
    return np.full((side, side, 3), value, dtype=np.uint8)


def request(**other: Any) -> dict[str, Any]:
    """Return a request as openpi's client sends it: the state is float64, the wrist is always there."""
    state = np.full(8, 0.25)
    keys = {"observation/image": image(), "observation/wrist_image": image(), "observation/state": state}
    return {**keys, "prompt": "go", **other}


if __name__ == "__main__":
    SETTINGS: dict[str, Any] = json.loads(sys.argv[1])
    OPTIONS = {k: SETTINGS[k] for k in ("port", "api_key", "certificate", "key_file") if k in SETTINGS}
    SERVED = ServedPolicy(
        act=lambda observations: act(observations, SETTINGS),
        views={"agentview": (4, 4)},
        history=SETTINGS.get("history", 1),
        metadata=SETTINGS.get("metadata", {"name": "right", "views": {"agentview": [4, 4]}}),
        resize=SETTINGS.get("resize", False),
    )
    LIMITS = Limits(**SETTINGS.get("limits", {}))
    asyncio.run(
        serve(
            SERVED,
            **{"port": 0, **OPTIONS},
            limits=LIMITS,
            on_start=lambda at: os.write(1, f"{at}\n".encode()),
        )
    )
