"""The tabletop world as an environment of lerobot-eval: --env.type=worldvla_tabletop"""

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

from worldvla.sim.instructed import make
from worldvla.sim.suites import SUITES

VIEWS = {"agentview": (64, 64), "wrist": (32, 32)}


class ForLeRobot(gym.Wrapper):
    """LeRobot's names of what is seen, its task_description and is_success."""

    def __init__(self, env: gym.Env, horizon: int) -> None:
        super().__init__(env)
        self.task_description, self._max_episode_steps = env.instruction, horizon
        parts = env.observation_space.spaces
        pixels = gym.spaces.Dict({view: parts[view] for view in VIEWS})
        self.observation_space = gym.spaces.Dict({"pixels": pixels, "agent_pos": parts["state"]})

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict, dict]:
        del options  # LeRobot's own
        observation, info = self.env.reset(options={"init": (seed or 0) % 50})
        return self._named(observation), info | {"is_success": False}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._named(observation), reward, terminated, truncated, info | {"is_success": info["success"]}

    def _named(self, observation: dict) -> dict:
        return {"pixels": {view: observation[view] for view in VIEWS}, "agent_pos": observation["state"]}


@EnvConfig.register_subclass("worldvla_tabletop")
@dataclass
class TabletopConfig(EnvConfig):
    task: str | None = "tabletop_object"
    index: int = 0
    fps: int = 12
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (7,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (8,)),
            **{f"pixels/{view}": PolicyFeature(FeatureType.VISUAL, (*VIEWS[view], 3)) for view in VIEWS},
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            **{f"pixels/{view}": f"observation.images.{view}" for view in VIEWS},
        }
    )

    @property
    def gym_kwargs(self) -> dict:
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        del use_async_envs
        horizon = SUITES[self.task].horizon
        envs = [lambda: ForLeRobot(make(self.task, self.index, VIEWS, "rgb_array"), horizon)] * n_envs
        return {
            self.task: {
                self.index: gym.vector.SyncVectorEnv(envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
            }
        }
