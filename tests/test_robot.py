"""A real arm: targets of differences, and limits of joints, steps and workspace that hold whatever happens.

Run: pytest tests/test_robot.py
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldvla.robot import Deltas, Guard, Limits

NAMES = ["lift.pos", "gripper.pos", "pan.pos"]


def test_differences_become_targets_of_the_same_names():
    features = {"action_names": NAMES, "state_names": NAMES[::-1], "delta": ["lift.pos", "pan.pos"]}
    deltas = Deltas.of(features)
    targets = deltas.add(np.array([[1.0, 2.0, 3.0]]), np.array([[10.0, 20.0, 30.0]]))
    assert targets.tolist() == [[31.0, 2.0, 13.0]]  # the gripper's command is none
    assert Deltas.of({"action_names": NAMES, "state_names": NAMES}).pairs == {}
    with pytest.raises(ValueError, match=r"datasets \['home'\]: expected those of one"):
        Deltas.of({"datasets": {"home": features}})


def reach(joints: np.ndarray) -> np.ndarray:
    return np.array([joints[0] / 100, 0.0, joints[1] / 100])


LIMITS = Limits(low=[-50, -50], high=[50, 50], step=10, workspace=([-1, -1, 0], [1, 1, 1]), position=reach)


@pytest.mark.parametrize(
    ("target", "measured", "allowed"),
    [
        ([5, 5], [0, 2], [5, 5]),
        ([80, 5], [45, 5], [50, 5]),  # joint
        ([40, 5], [0, 5], [10, 5]),  # step
        ([0, -10], [0, 5], [0, 0]),  # workspace: the table is at 0
        ([0, -10], [0, -4], [0, -4]),  # below it already: not deeper
        ([0, 40], [0, -4], [0, 6]),  # but out
    ],
)
def test_a_target_is_clipped(target: list[float], measured: list[float], allowed: list[float]):
    assert LIMITS.clip(target, np.array(measured, float)) == pytest.approx(allowed, abs=0.7)
    assert reach(LIMITS.clip(target, np.array(measured, float)))[2] >= min(0, reach(np.array(measured))[2])


def test_what_is_no_target_is_refused():
    for target in ([np.nan, 0], [0, 0, 0]):
        with pytest.raises(ValueError, match="expected 2 finite numbers"):
            LIMITS.clip(target, np.zeros(2))
    with pytest.raises(ValueError, match=r"the arm is measured to be at .*nan.*: expected finite numbers"):
        LIMITS.clip([0, 0], np.array([0, np.nan]))
    with pytest.raises(ValueError, match="expected low < high, step > 0"):
        Limits(low=[1], high=[0], step=1)
    with pytest.raises(ValueError, match="give both, workspace and position"):
        Limits(low=[0], high=[1], step=1, position=reach)


def test_a_lost_connection_stops_the_arm_where_it_is():
    sent = []

    def loop() -> None:
        with Guard(LIMITS, lambda: np.full(2, 3.0), sent.append) as guard:
            guard.send([40, 5])
            raise ConnectionError("it went away")

    with pytest.raises(ConnectionError):
        loop()
    assert [list(target) for target in sent] == [[13, 5], [3, 3]]


# examples/so101.py

_spec = importlib.util.spec_from_file_location("so101", Path(__file__).parents[1] / "examples/so101.py")
assert _spec is not None
assert _spec.loader is not None
so101 = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(so101)
JOINTS = [f"{name}.pos" for name in so101.JOINTS]


class Server:
    """Stands in for `Client`: answers with one target, and goes away after `requests` of them."""

    def __init__(self, target: list[float], requests: int = 10**6, **features: Any) -> None:
        self.target, self.requests, self.asked = target, requests, []
        features = {"fps": 200, "action_names": JOINTS, "state_names": JOINTS, **features}
        self.metadata = {"views": {"front": [24, 32]}, "features": features}

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append(observation)
        if len(self.asked) > self.requests:
            raise ConnectionError("it went away")
        return {"actions": np.tile(np.array(self.target, np.float32), (5, 1))}


class Recorded(so101.SimulatedArm):
    def __init__(self) -> None:
        super().__init__({"front": (24, 32)})
        self.path = [self.joints.copy()]

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        self.path.append(np.array([action[name] for name in JOINTS]))
        return super().send_action(action)


def test_the_hand_is_where_the_kinematics_say():
    joints = np.array([0, 20.182, -19.708, 0, 0, 0])  # by inverse_kinematics(0.2, 0.1) of SO101Kinematics
    assert so101.chain(joints)[2] == pytest.approx([0.2, 0, 0.1 + so101.SHOULDER], abs=1e-3)
    joints[0] = 90  # LeRobot's pan is clockwise from above
    assert so101.chain(joints)[2] == pytest.approx([0, -0.2, 0.1 + so101.SHOULDER], abs=1e-3)


def test_a_policy_gone_wild_stays_inside_the_limits():
    arm, server = Recorded(), Server([500, 500, -500, 500, -500, 500])
    steps = so101.drive(arm, server, "wave", 0.3)
    assert (steps, server.asked[0]["prompt"]) == (60, "wave")
    assert (server.asked[0]["front"].shape, server.asked[0]["state"].shape) == ((24, 32, 3), (6,))
    path = np.array(arm.path)
    assert len(path) > 20
    assert (path >= np.subtract(so101.LIMITS.low, 1e-6)).all()
    assert (path <= np.add(so101.LIMITS.high, 1e-6)).all()
    assert min(so101.fingertip(joints)[2] for joints in path) >= 0
    assert path[-1, 0] > 20  # and it did move


def test_a_server_that_goes_away_stops_the_arm():
    arm, server = Recorded(), Server([30, 0, 0, 0, 0, 0], requests=3)
    with pytest.raises(ConnectionError):
        so101.drive(arm, server, "wave", 5)
    assert len(arm.path) < 200
    assert arm.path[-1] == pytest.approx(arm.joints)  # told to be where it is


def test_differences_are_added_to_the_state_of_each_step():
    arm, server = Recorded(), Server([1, 0, 0, 0, 0, 50], delta=JOINTS[:5])
    so101.drive(arm, server, "wave", 0.3)
    assert arm.joints[0] > 5
    assert arm.joints[5] == pytest.approx(50, abs=1)
    server.metadata["features"]["action_names"] = ["x", "y"]
    with pytest.raises(ValueError, match="the policy moves x, y: expected the joints shoulder_pan"):
        so101.drive(arm, server, "wave", 1)
