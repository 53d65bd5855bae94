"""Environments as Gymnasium's users expect them: ids, its own checks, RecordVideo, vectors, the instruction.

Run: pytest tests/test_gym.py
"""

import tomllib
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import worldvla
from worldvla.sim import instructed
from worldvla.sim.suites import SUITES, tasks


@pytest.fixture(autouse=True)
def _registered():
    instructed.register()  # Gymnasium does so itself where the package is installed


def test_gymnasium_finds_every_suite():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["gymnasium.envs"] == {"__root__": "worldvla.sim.instructed:register"}
    assert {f"worldvla/{name}-v0" for name in SUITES} <= set(gym.registry)


def test_gymnasiums_own_check_passes():
    env = gym.make("worldvla/tabletop_goal-v0", task=3, render_mode="rgb_array")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*(minimum|maximum) value is|.*not normalized|.*different from the unwrapped"
        )
        check_env(env.unwrapped)
        check_env(env)
    assert env.metadata["render_fps"] == 12.5
    env.close()


def test_the_instruction_is_seen_and_told():
    env = gym.make("worldvla/tabletop_goal-v0", task=3)
    instruction = tasks("tabletop_goal")[3].instruction
    observation, info = env.reset(seed=0, options={"init": 2})
    assert observation["instruction"] == info["instruction"] == instruction
    assert env.observation_space.contains(observation)
    observation, _, _, _, info = env.step(env.action_space.sample())
    assert observation["instruction"] == info["instruction"] == instruction
    with pytest.raises(ValueError, match="unknown option of reset 'inti': expected init"):
        env.reset(options={"inti": 2})
    with pytest.raises(ValueError, match=r"tabletop_goal has 10 tasks, got index 10: expected 0\.\.9"):
        gym.make("worldvla/tabletop_goal-v0", task=10)
    again, _ = worldvla.make("tabletop_goal", 3).reset(options={"init": 2})
    first, _ = env.reset(options={"init": 2})
    assert np.array_equal(again["agentview"], first["agentview"])
    env.close()


def test_environments_are_stepped_as_a_vector():
    env = gym.make_vec("worldvla/tabletop_object-v0", num_envs=2, vectorization_mode="sync", task=1)
    observation, info = env.reset(seed=3)
    assert observation["agentview"].shape == (2, 64, 64, 3)
    assert not np.array_equal(observation["agentview"][0], observation["agentview"][1])
    assert len(set(info["instruction"])) == 1
    env.step(env.action_space.sample())
    env.close()
