"""A simulator of one number for rollout tests: a dot moves right by action[0]; past 1.0 the task is done. No
torch, no physics.
"""

import os
import time
from typing import Any

import numpy as np

from worldvla.sim import suites as sim
from worldvla.sim.protocol import Task

CRASH, DIE, HANG = 1, 2, 3
"""Initial states in which task 1 raises, kills its process, stands still."""
SLOW_S = 2.0
TABLE = tuple(Task("tabletop_object", i, f"move_{i}", f"move dot {i}") for i in range(3))


class FakeEnv:
    """Its picture holds the number of steps so far, and in green how many pictures there were before."""

    def __init__(self, task: Task, views: dict[str, tuple[int, int]]) -> None:
        self.task, self.views, self.horizon, self.rendering = task, views, 12, True
        self.renders = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        assert seed is not None
        assert options is not None
        self.init, self.place, self.steps = options["init"], 0.0, 0
        return self._observe_if(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        assert np.shape(action) == (7,)
        if self.task.index == 1:
            self._misbehave()
        self.steps += 1
        self.place += float(action[0])
        success = self.place >= 1.0
        info = {"success": success, "grasped": 0.4 <= self.place < 0.9}
        return self._observe_if(), float(success), success, self.steps >= self.horizon and not success, info

    def _misbehave(self) -> None:
        if self.init == CRASH:
            raise RuntimeError("the dot\nfell off")
        if self.init == DIE:
            os._exit(9)
        if self.init == HANG:
            time.sleep(60)

    def observe(self) -> dict[str, Any]:
        colour = np.array([self.steps, self.renders, self.steps], dtype=np.uint8)
        self.renders += 1
        images = {view: np.full((*size, 3), colour) for view, size in self.views.items()}
        return {**images, "state": np.full(8, self.place, dtype=np.float32)}

    def get_state(self) -> np.ndarray:
        return np.array([self.place])

    def _observe_if(self) -> dict[str, Any]:
        return self.observe() if self.rendering else {"state": np.full(8, self.place, dtype=np.float32)}

    def close(self) -> None:
        pass


class SlowEnv(FakeEnv):
    """Task 0 takes long to reset, as LIBERO does."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.task.index == 0:
            time.sleep(SLOW_S)
        return super().reset(seed=seed, options=options)


def make_slow(task: Task, views: dict[str, tuple[int, int]] | None) -> FakeEnv:
    return SlowEnv(task, views or {})


def make_short(task: Task, views: dict[str, tuple[int, int]] | None) -> FakeEnv:
    """One look and five steps."""
    env = FakeEnv(task, views or {})
    env.horizon = 5
    return env


def make(task: Task, views: dict[str, tuple[int, int]] | None) -> FakeEnv:
    return FakeEnv(task, views or {})


def make_brief(task: Task, views: dict[str, tuple[int, int]]) -> Any:
    """The real environment, for ten steps."""
    env: Any = sim.make(task, views)
    env.horizon = 10
    return env
