"""Write the data set beside this file with lerobot 0.4.4's own writer, in an environment of its own: its hub
client conflicts with ours. 0.6.1 writes the same numbers. Two cameras as video, state and action of LIBERO's
shape.

Run: python make.py OUT
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # pyright: ignore[reportMissingImports]

root = Path(sys.argv[1])
shutil.rmtree(root, ignore_errors=True)
camera = {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channel"]}
pose = ["x", "y", "z", "rx", "ry", "rz"]
features = {
    "observation.images.image": camera,
    "observation.images.wrist_image": camera,
    "observation.state": {"dtype": "float32", "shape": (8,), "names": [*pose, "g1", "g2"]},
    "action": {"dtype": "float32", "shape": (7,), "names": [*pose, "gripper"]},
}
dataset = LeRobotDataset.create(
    "me/tiny", fps=20, root=root, features=features, robot_type="panda", use_videos=True
)
rng = np.random.default_rng(0)
base = rng.integers(40, 200, (8, 8, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
for episode in range(3):
    for t in range(30):
        picture = base.copy()
        picture[20:30, 5 + t : 15 + t] = (220, 30, 30)
        frame = {
            "observation.images.image": picture,
            "observation.images.wrist_image": picture[::-1].copy(),
            "observation.state": rng.normal(size=8).astype(np.float32),
            "action": np.clip(rng.normal(0, 0.3, 7), -1, 1).astype(np.float32),
            "task": ["pick up the milk", "pick up the butter"][episode % 2],
        }
        dataset.add_frame(frame)
    dataset.save_episode()
dataset.finalize()
