"""Write the data set beside this file with lerobot 0.4.4's own writer, in an environment of its own: its hub
client conflicts with ours. 0.6.1 writes the same numbers. Two cameras as video, state and action of LIBERO's
shape. lerobot 0.3.3 writes v2.1: tests/lerobot_v21 is the first 50 of these steps by it.

Run: python make.py OUT
"""

import shutil
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import datasets  # noqa: F401  # pyright: ignore[reportMissingImports]
import numpy as np

if find_spec("torchvision") is None:  # PyPI has it for CUDA alone, and no writer of lerobot uses it
    sys.modules["torchvision"] = ModuleType("torchvision")
    sys.modules["torchvision"].transforms = None  # pyright: ignore[reportAttributeAccessIssue]
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # pyright: ignore[reportMissingImports]

is_v21 = version("lerobot").startswith("0.3.")
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
for episode, length in enumerate([30, 20] if is_v21 else [30, 30, 30]):
    for t in range(length):
        picture = base.copy()
        picture[20:30, 5 + t : 15 + t] = (220, 30, 30)
        frame = {
            "observation.images.image": picture,
            "observation.images.wrist_image": picture[::-1].copy(),
            "observation.state": rng.normal(size=8).astype(np.float32),
            "action": np.clip(rng.normal(0, 0.3, 7), -1, 1).astype(np.float32),
        }
        task = ["pick up the milk", "pick up the butter"][episode % 2]
        if is_v21:
            dataset.add_frame(frame, task)
        else:
            dataset.add_frame(frame | {"task": task})
    dataset.save_episode()
if not is_v21:
    dataset.finalize()
