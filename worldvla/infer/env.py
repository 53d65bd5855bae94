"""A world model as Gymnasium's Env and VectorEnv: any library of reinforcement learning can train in it.

    starts = [real.reset(options={"init": i})[0] for i in range(50)]
    env = WorldEnv(model.world(), starts, horizon=40, judge=judge)

Frames are imagined, and the robot's state where the model says it (layout.world_state). Actions are in
physical units, between those of the training data.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import batch_space

from worldvla.infer.world import World

Frames = dict[str, np.ndarray]


def spaces(world: World) -> tuple[gym.Space[Any], gym.Space[np.ndarray]]:
    """Return the observation space (a Dict of views, and `state`) and the action space of one world."""
    model = world.model
    views: dict[str, Any] = {
        view: gym.spaces.Box(0, 255, (*size, 3), np.uint8) for view, size in model.view_sizes.items()
    }
    statistics, layout = model.builder.statistics, model.config.layout
    if layout.world_state:
        views["state"] = gym.spaces.Box(-np.inf, np.inf, (layout.num_state_dims,), np.float32)
    low, high = (np.array(v, np.float32) for v in (statistics.action_low, statistics.action_high))
    return gym.spaces.Dict(views), gym.spaces.Box(low, high)


def _observation(world: World, frames: Frames) -> Frames:
    return frames if world.state is None else {**frames, "state": world.state}


class WorldEnv(gym.Env[Frames, np.ndarray]):
    """`starts`: real frames to begin from, `reset(options={"start": i})` with the i-th, or with one drawn.
    `judge`: frames -> reward, and whether the episode has ended; without it the reward is 0. An episode is
    truncated after `horizon` steps.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - as gymnasium.Env has it

    def __init__(
        self,
        world: World,
        starts: Sequence[Mapping[str, Any]],
        horizon: int,
        judge: Callable[[Frames], tuple[float, bool]] | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.world, self.starts, self.horizon, self.judge = world, starts, horizon, judge
        self.render_mode = render_mode
        self.observation_space, self.action_space = spaces(world)
        self._frames: Any = {}
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frames, dict[str, Any]]:
        super().reset(seed=seed)
        if unknown := sorted(set(options or {}) - {"start"}):
            raise ValueError(f"unknown option of reset {unknown[0]!r}: expected start")
        start = (options or {}).get("start", int(self.np_random.integers(len(self.starts))))
        if not 0 <= start < len(self.starts):
            raise ValueError(f"start must be in 0..{len(self.starts) - 1}, got {start}")
        frames = self.world.reset(self.starts[start])
        self._steps, self._frames = 0, _observation(self.world, frames)
        return self._frames, {"start": start}

    def step(self, action: np.ndarray) -> tuple[Frames, float, bool, bool, dict[str, Any]]:
        self._steps, self._frames = self._steps + 1, _observation(self.world, self.world.step(action))
        reward, is_over = self.judge(self._frames) if self.judge else (0.0, False)
        return self._frames, reward, is_over, self._steps >= self.horizon, {}

    def render(self) -> np.ndarray | None:
        """Return the current frame of the first view."""
        if not self._frames:
            raise gym.error.ResetNeeded("call reset() before render()")
        return next(iter(self._frames.values())) if self.render_mode else None


class WorldVectorEnv(gym.vector.VectorEnv[Frames, np.ndarray, np.ndarray]):
    """`num_envs` worlds, imagined in one batch. `judge`: frames (B, Y, X, 3) -> rewards (B,).

    All episodes begin together and are truncated together after `horizon` steps, the next step begins new
    ones (AutoresetMode.NEXT_STEP): worlds of a batch have equally many frames before them.
    """

    def __init__(
        self,
        world: World,
        starts: Sequence[Mapping[str, Any]],
        horizon: int,
        num_envs: int,
        judge: Callable[[Frames], np.ndarray] | None = None,
    ) -> None:
        self.world, self.starts, self.horizon, self.judge = world, starts, horizon, judge
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
        self.single_observation_space, self.single_action_space = spaces(world)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frames, dict[str, Any]]:
        super().reset(seed=seed)
        if options:
            raise ValueError(f"unknown option of reset {next(iter(options))!r}: expected none")
        chosen = self.np_random.integers(len(self.starts), size=self.num_envs)
        names = self.single_observation_space.spaces  # pyright: ignore[reportAttributeAccessIssue]
        first = {name: np.stack([self.starts[i][name] for i in chosen]) for name in names}
        frames = _observation(self.world, self.world.reset(first))
        self._steps = 0
        return frames, {"start": chosen}

    def step(self, actions: np.ndarray) -> tuple[Frames, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        nothing = np.zeros(self.num_envs)
        if self._steps >= self.horizon:
            first, info = self.reset()
            return first, nothing, nothing > 0, nothing > 0, info
        frames = _observation(self.world, self.world.step(actions))
        self._steps += 1
        rewards = np.asarray(self.judge(frames), np.float64) if self.judge else nothing
        return frames, rewards, nothing > 0, np.full(self.num_envs, self._steps >= self.horizon), {}
