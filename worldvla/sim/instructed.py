"""Environments as Gymnasium's users expect them: registered ids, and the instruction where a policy reads it.

    env = gymnasium.make("worldvla/tabletop_goal-v0", task=3, render_mode="rgb_array")
    observation, info = env.reset(options={"init": 0})
    observation["instruction"], info["instruction"]

The ids exist once the package is installed: pyproject.toml names `register` as Gymnasium's plugin.
"""

from typing import Any, Literal

import gymnasium as gym

from worldvla.sim import suites
from worldvla.sim.protocol import Task

NAMESPACE = "worldvla"


class Instructed(gym.Wrapper[dict[str, Any], Any, dict[str, Any], Any]):
    """An environment whose observations and `info` hold the task's instruction, as `Policy.act` reads it."""

    def __init__(self, env: gym.Env[Any, Any], instruction: str) -> None:
        super().__init__(env)
        self.instruction = instruction
        parts: Any = env.observation_space
        text = gym.spaces.Text(len(instruction), min_length=len(instruction), charset=frozenset(instruction))
        self.observation_space = gym.spaces.Dict({**parts, "instruction": text})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self._told(observation), self._told(info)

    def step(self, action: Any) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._told(observation), reward, terminated, truncated, self._told(info)

    def _told(self, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "instruction": self.instruction}


def make(
    suite: str,
    task: int | Task = 0,
    views: dict[str, tuple[int, int]] | None = None,
    render_mode: Literal["rgb_array"] | None = None,
) -> Instructed:
    """Return the environment of a task, by its index in the suite or as `suites.tasks` gives it."""
    if not isinstance(task, Task):
        tasks = suites.tasks(suite)
        if not 0 <= task < len(tasks):
            raise ValueError(
                f"{suite} has {len(tasks)} tasks, got index {task}: expected 0..{len(tasks) - 1}"
            )
        task = tasks[task]
    env = suites.make(task, views)
    env.render_mode = render_mode
    return Instructed(env, task.instruction)


def register() -> None:
    """Register `worldvla/SUITE-v0` of every suite; Gymnasium calls it when it is imported."""
    for name in suites.SUITES:
        if (id_ := f"{NAMESPACE}/{name}-v0") not in gym.registry:
            gym.register(id_, f"{__name__}:make", kwargs={"suite": name}, disable_env_checker=True)
