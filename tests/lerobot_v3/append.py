"""Append an episode to what `worldvla export-dataset` wrote of the data set beside this file, with the writer
of lerobot 0.6.1. load.py then compares the readers.

    python tests/lerobot_v3/append.py DATASET    in the environment of lerobot
"""

import sys

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # pyright: ignore[reportMissingImports]

data = LeRobotDataset.resume("any/name", root=sys.argv[1])
rng = np.random.default_rng(0)
for _ in range(10):
    frame = {"next.done": np.array([False]), "next.success": np.array([False]), "is_expert": np.array([True])}
    for name in ("action", "observation.state"):
        frame[name] = rng.normal(size=data.meta.features[name]["shape"]).astype(np.float32)
    for name in data.meta.camera_keys:
        frame[name] = np.full(data.meta.features[name]["shape"], 90, np.uint8)
    data.add_frame(frame | {"task": "wait"})
data.save_episode()
data.finalize()
print(f"{data.meta.total_episodes} episodes")
