"""Drive an SO-100 or SO-101 by a policy server; without hardware, a simulated arm with the same interface.

    worldvla serve out/train/my --resize
    python examples/so101.py "put the cube into the box"
    python examples/so101.py "put the cube into the box" --device /dev/ttyACM0 --camera front=0 wrist=2

On hardware only --device and --camera change; `pip install lerobot[feetech]` first. Joints are in degrees and
the gripper in percent, as LeRobot records them. Look at LIMITS before the arm moves.
"""

import argparse
import itertools
import math
import time
from typing import Any

import numpy as np

from worldvla.robot import Deltas, Guard, Limits
from worldvla.serve.client import AsyncClient, Client

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
SHOULDER, UPPER, LOWER, HAND = 0.117, 0.1159, 0.1350, 0.16
"""Metres: height of the shoulder above the table, length of both links and of wrist to fingertip, about. The
links are those of XLeRobot's SO101Kinematics; measure the others on your arm."""
BENT = (math.atan2(0.028, 0.11257), math.atan2(0.0052, 0.1349))
"""Radians by which the links are bent against the joints (SO101Kinematics)."""


def fingertip(joints: np.ndarray) -> np.ndarray:
    """Return where the fingertip is, metres (3,): forward, left, up from the foot of the arm."""
    return chain(joints)[-1]


def chain(joints: np.ndarray) -> np.ndarray:
    """Return shoulder, elbow, wrist and fingertip, metres (4, 3)."""
    pan, lift, elbow, wrist = np.radians(joints[:4])
    upper = math.pi / 2 - lift - BENT[0]
    lower = BENT[1] - lift - elbow
    angles, lengths = np.array([upper, lower, lower - wrist]), np.array([UPPER, LOWER, HAND])
    out = np.concatenate([[0], np.cumsum(lengths * np.cos(angles))])
    up = np.concatenate([[0], np.cumsum(lengths * np.sin(angles))]) + SHOULDER
    return np.stack([out * math.cos(pan), -out * math.sin(pan), up], 1)


LIMITS = Limits(
    low=[-100, -100, -95, -95, -160, 0],
    high=[100, 100, 95, 95, 160, 100],
    step=[5, 5, 5, 5, 8, 15],
    workspace=([-0.1, -0.35, 0.0], [0.45, 0.35, 0.45]),
    position=fingertip,
)


class SimulatedArm:
    """The arm without hardware: joints that follow their targets, drawn from the side. No objects."""

    def __init__(self, cameras: dict[str, tuple[int, int]]) -> None:
        self.cameras = cameras
        self.joints = np.array([0.0, -60, 60, 60, 0, 20])

    def connect(self) -> None: ...

    def disconnect(self) -> None: ...

    def get_observation(self) -> dict[str, Any]:
        pictures = {name: self._draw(*size) for name, size in self.cameras.items()}
        return {f"{name}.pos": float(self.joints[i]) for i, name in enumerate(JOINTS)} | pictures

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        self.joints += 0.8 * (np.array([action[f"{name}.pos"] for name in JOINTS]) - self.joints)
        return action

    def _draw(self, rows: int, cols: int) -> np.ndarray:
        points = chain(self.joints)
        line = np.concatenate([np.linspace(a, b, 100) for a, b in itertools.pairwise(points)])
        row = np.clip(rows - 1 - (rows - 1) * line[:, 2] / 0.5, 0, rows - 1).astype(int)
        col = np.clip((cols - 1) * (line[:, 0] + 0.1) / 0.6, 0, cols - 1).astype(int)
        picture = np.full((rows, cols, 3), 230, np.uint8)
        picture[row, col] = (40, 60, 160)
        return picture


def make_arm(device: str, cameras: dict[str, str], sizes: dict[str, tuple[int, int]]) -> Any:
    if device == "simulated":
        return SimulatedArm(sizes)
    from lerobot.cameras.opencv import OpenCVCameraConfig
    from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

    ports = {name: int(port) if port.isdecimal() else port for name, port in cameras.items()}
    configs = {
        n: OpenCVCameraConfig(index_or_path=p, fps=30, width=640, height=480) for n, p in ports.items()
    }
    return SO101Follower(SO101FollowerConfig(port=device, id="so101", cameras=configs))


def camera_names(client: Client) -> dict[str, str]:
    """Return the arm's camera of each view: that of the data, or of the view's own name."""
    known = client.metadata.get("features", {}).get("cameras", {})
    return {v: known.get(v, {}).get("feature", v).split(".")[-1] for v in client.metadata["views"]}


def drive(arm: Any, client: Client, task: str, seconds: float) -> int:
    """Move the arm until the time is over; return the number of steps. Whatever happens, it then holds."""
    features = client.metadata.get("features", {})
    names = features.get("action_names") or [f"{name}.pos" for name in JOINTS]
    if sorted(names) != sorted(f"{name}.pos" for name in JOINTS):
        raise ValueError(f"the policy moves {', '.join(names)}: expected the joints {', '.join(JOINTS)}")
    cameras = camera_names(client)
    deltas, fps = Deltas.of(features), features.get("fps") or 30
    order = [names.index(f"{name}.pos") for name in JOINTS]
    robot = AsyncClient(client, still=[0 if i in deltas.pairs else math.nan for i in range(len(names))])

    def measure() -> np.ndarray:
        seen = arm.get_observation()
        return np.array([seen[f"{name}.pos"] for name in JOINTS])

    def move(target: np.ndarray) -> None:
        arm.send_action({f"{name}.pos": float(target[i]) for i, name in enumerate(JOINTS)})

    with Guard(LIMITS, measure, move) as guard:
        for _ in range(int(seconds * fps)):
            until, seen = time.perf_counter() + 1 / fps, arm.get_observation()
            state = np.array([seen[name] for name in features.get("state_names") or names], np.float32)
            action = robot.act(
                {view: seen[camera] for view, camera in cameras.items()} | {"state": state, "prompt": task}
            )
            if robot.latency:  # an answer has come
                guard.send(deltas.add(action, state)[order])
            time.sleep(max(0.0, until - time.perf_counter()))
    return int(seconds * fps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task")
    parser.add_argument("--device", default="simulated", help="simulated, or the port of the arm")
    parser.add_argument("--camera", nargs="*", default=[], help="NAME=INDEX of each camera, as in your data")
    parser.add_argument("--server", default="ws://127.0.0.1:8000")
    parser.add_argument("--seconds", type=float, default=30)
    options = parser.parse_args()
    with Client(options.server, timeout_s=2) as client:
        if not client.metadata.get("features"):
            parser.error(
                f"the policy at {options.server} does not say which joints it moves: train it on a LeRobot "
                "data set"
            )
        views = client.metadata["views"]
        sizes = {camera: tuple(views[view]) for view, camera in camera_names(client).items()}
        arm = make_arm(options.device, dict(c.split("=", 1) for c in options.camera), sizes)
        arm.connect()
        try:
            print(f"{drive(arm, client, options.task, options.seconds)} steps")
        finally:
            arm.disconnect()


if __name__ == "__main__":
    main()
