"""The tabletop world as a robot of lerobot-rollout: --robot.type=worldvla_tabletop

When it is disconnected it writes what it showed and was told to `record`, for worldvla to be asked the same.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig

import worldvla
from worldvla.data.sources import hdf5

ACTION = [f"{name}.pos" for name in hdf5.ACTION_NAMES]
STATE = [f"{name}.pos" for name in hdf5.STATE_NAMES]
"""lerobot-rollout passes on what ends in .pos or .vel, and leaves out all else without a word."""
VIEWS = {"agentview": (64, 64, 3), "wrist": (32, 32, 3)}


@RobotConfig.register_subclass("worldvla_tabletop")
@dataclass(kw_only=True)
class TabletopConfig(RobotConfig):
    record: Path
    suite: str = "tabletop_goal"
    index: int = 0
    init: int = 0


class Tabletop(Robot):
    """Stands still once the task is done."""

    config_class = TabletopConfig
    name = "worldvla_tabletop"

    def __init__(self, config: TabletopConfig) -> None:
        super().__init__(config)
        self.config, self.env = config, worldvla.make(config.suite, config.index)
        self.now: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []
        self.is_done = False

    observation_features = property(lambda _: dict.fromkeys(STATE, float) | VIEWS)
    action_features = property(lambda _: dict.fromkeys(ACTION, float))
    is_connected = property(lambda self: bool(self.now))
    is_calibrated = property(lambda _: True)

    def connect(self, calibrate: bool = True) -> None:
        del calibrate
        self.now, _ = self.env.reset(options={"init": self.config.init})

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...

    def get_observation(self) -> dict[str, Any]:
        numbers = dict(zip(STATE, map(float, self.now["state"]), strict=True))
        return numbers | {view: self.now[view] for view in VIEWS}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        if not self.is_done:
            told = np.array([action[name] for name in ACTION], np.float32)
            self.steps.append({name: self.now[name] for name in ("state", *VIEWS)} | {"action": told})
            self.now, _, self.is_done, _, _ = self.env.step(told)
        return action

    def disconnect(self) -> None:
        self.now = {}
        arrays = {name: np.stack([step[name] for step in self.steps]) for name in self.steps[0]}
        np.savez(self.config.record, success=self.is_done, **arrays)
