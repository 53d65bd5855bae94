"""Our server around a policy of a few lines, for another process: `python policy_server.py JSON`, which says
how it behaves. Writes its address to stdout. No torch.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from worldvla.serve.server import Served, serve


def act(observation: dict[str, Any], told: dict[str, Any]) -> np.ndarray:
    """Move right by 0.2; the first action's other dims are the first pixels of the frames it was shown."""
    told["requests"] = told.get("requests", 10**9) - 1
    if told["requests"] < 0:
        os._exit(9)
    word, _, path = observation["instruction"].partition(" ")
    while word == "await" and not Path(path).exists():
        time.sleep(0.01)
    if word == "raise":
        raise RuntimeError("the policy\nfell off")
    actions = np.full((5, 7), 0.2, np.float32)
    seen = [int(frame["agentview"].flat[0]) for frame in (*observation.get("previous", ()), observation)]
    actions[0, 1 : 1 + len(seen)] = seen
    actions[0, 6] = observation["state"][0]
    return actions


if __name__ == "__main__":
    TOLD: dict[str, Any] = json.loads(sys.argv[1])
    SERVED = Served(
        act=lambda observation: act(observation, TOLD),
        views={"agentview": (4, 4)},
        history=TOLD.get("history", 1),
        metadata=TOLD.get("metadata", {"name": "right", "views": {"agentview": [4, 4]}}),
        resize=TOLD.get("resize", False),
    )
    PORT, KEY = TOLD.get("port", 0), TOLD.get("api_key", "")
    asyncio.run(serve(SERVED, port=PORT, api_key=KEY, on_start=lambda at: os.write(1, f"{at}\n".encode())))
