"""Environments as Gymnasium's users expect them: registered ids, and the instruction where a policy reads it.

    import gymnasium, worldvla
    env = gymnasium.make("worldvla/tabletop_goal-v0", task=3, render_mode="rgb_array")
    observation, info = env.reset(options={"init": 0})
    observation["instruction"], info["instruction"]

The ids exist once worldvla and gymnasium are imported; "worldvla.sim.instructed:worldvla/tabletop_goal-v0"
needs no import. AsyncVectorEnv copies texts once: give make_vec vector_kwargs={"shared_memory": False}.
"""

from numbers import Integral
from typing import Any, Literal

import gymnasium as gym

from worldvla.sim import suites
from worldvla.sim.protocol import Task

NAMESPACE = "worldvla"


class InstructedEnv(gym.Wrapper[dict[str, Any], Any, dict[str, Any], Any]):
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
) -> InstructedEnv:
    """Return the environment of a task, by its index in the suite or as `suites.tasks` gives it."""
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode must be rgb_array or None, got {render_mode!r}")
    if not isinstance(task, Task):
        tasks = suites.tasks(suite)
        if not isinstance(task, Integral) or not 0 <= task < len(tasks):
            raise ValueError(
                f"{suite} has {len(tasks)} tasks, got index {task!r}: expected 0..{len(tasks) - 1}"
            )
        task = tasks[int(task)]
    env = suites.make(task, views)
    env.render_mode = render_mode
    return InstructedEnv(env, task.instruction)


def _register() -> None:
    """Register `worldvla/SUITE-v0` of every suite."""
    for name in suites.SUITES:
        if (id_ := f"{NAMESPACE}/{name}-v0") not in gym.registry:
            gym.register(id_, f"{__name__}:make", kwargs={"suite": name}, disable_env_checker=True)


_register()
