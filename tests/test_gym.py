"""Environments as Gymnasium's users expect them: ids, its own checks, RecordVideo, vectors, the instruction.

Run: pytest tests/test_gym.py
"""

import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import worldvla
from worldvla.infer.env import WorldEnv, WorldVectorEnv
from worldvla.infer.model import Model, load
from worldvla.infer.world import World
from worldvla.sim.suites import SUITES, tasks


@pytest.mark.parametrize(
    "code",
    [
        "import gymnasium as gym, worldvla; env = gym.make('worldvla/tabletop_goal-v0')",
        "import worldvla, gymnasium as gym; env = gym.make('worldvla/tabletop_goal-v0')",
        "import worldvla, importlib.util as u; u.find_spec('gymnasium'); import gymnasium as gym"
        "; env = gym.make('worldvla/tabletop_goal-v0')",
        "import worldvla.sim.tabletop.env, gymnasium as gym; env = gym.make('worldvla/tabletop_goal-v0')",
        "import gymnasium as gym; env = gym.make('worldvla.sim.instructed:worldvla/tabletop_goal-v0')",
    ],
)
def test_gymnasium_finds_every_suite(code: str) -> None:
    """In a process of its own: nothing here has imported anything for it."""
    names = [f"worldvla/{name}-v0" for name in SUITES]
    code += f"; assert not set({names}) - set(gym.registry); print(env.spec.id)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "worldvla/tabletop_goal-v0\n"


def test_bad_options_are_refused() -> None:
    for options, reason in (
        ({"render_mode": "human"}, "render_mode must be rgb_array or None, got 'human'"),
        ({"task": "x"}, r"got index 'x': expected 0\.\.9"),
    ):
        with pytest.raises(ValueError, match=reason):
            gym.make("worldvla/tabletop_goal-v0", **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"init must be an integer >= 0, got 2\.5"):
        gym.make("worldvla/tabletop_goal-v0").reset(options={"init": 2.5})


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


def test_videos_are_recorded(tmp_path: Path):
    pytest.importorskip("moviepy", reason="gymnasium.wrappers.RecordVideo needs it")
    env = gym.make("worldvla/tabletop_goal-v0", task=3, render_mode="rgb_array")
    env = gym.wrappers.RecordVideo(env, str(tmp_path / "videos"))
    env.reset(seed=0)
    for _ in range(3):
        env.step(env.action_space.sample())
    env.close()
    assert (tmp_path / "videos/rl-video-episode-0.mp4").stat().st_size > 0


def test_ppo_of_stable_baselines3_trains_on_both_views():
    sb3 = pytest.importorskip("stable_baselines3")
    sizes = {"agentview": (64, 64), "wrist": (64, 64)}  # its network needs at least 36 pixels a side
    env = gym.make("worldvla/tabletop_goal-v0", task=3, views=sizes)
    env = gym.wrappers.FilterObservation(env, [*sizes, "state"])  # it knows no texts
    agent = sb3.PPO("MultiInputPolicy", env, n_steps=64)
    agent.learn(64)
    action, _ = agent.predict(env.reset(seed=0)[0])
    assert env.action_space.contains(action)


@pytest.fixture(scope="module")
def starts(model: Model) -> list[dict[str, np.ndarray]]:
    env = worldvla.make("tabletop_object", views=model.view_sizes)
    return [env.reset(options={"init": i})[0] for i in range(3)]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return load(checkpoint)


def test_a_world_model_is_an_environment(model: Model, starts: list[dict[str, np.ndarray]]):
    def judge(frames: dict[str, np.ndarray]) -> tuple[float, bool]:
        return float(frames["wrist"].mean()), False

    env = WorldEnv(World(model), starts, horizon=3, judge=judge, render_mode="rgb_array")
    with pytest.raises(gym.error.ResetNeeded):
        env.render()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(minimum|maximum) value is|.*normalized space|.*32-bit")
        check_env(env, skip_render_check=True)
    first, info = env.reset(options={"start": 2})
    assert info == {"start": 2}
    action = env.action_space.sample()
    frames, reward, terminated, truncated, _ = env.step(action)
    world = World(model)
    assert np.array_equal(world.reset(starts[2])["wrist"], first["wrist"])
    assert np.array_equal(world.step(action)["wrist"], frames["wrist"])
    assert (reward, terminated, truncated) == (frames["wrist"].mean(), False, False)
    env.step(action)
    assert env.step(action)[3]
    assert np.array_equal(env.render(), env._frames["agentview"])  # pyright: ignore
    for options, reason in (({"init": 2}, "unknown option of reset 'init'"), ({"start": 3}, r"in 0\.\.2")):
        with pytest.raises(ValueError, match=reason):
            env.reset(options=options)


def test_worlds_are_imagined_as_a_vector(model: Model, starts: list[dict[str, np.ndarray]]):
    env = WorldVectorEnv(World(model), starts, 2, 4, lambda frames: frames["wrist"].mean((1, 2, 3)))
    observation, info = env.reset(seed=0)
    assert observation in env.observation_space
    action = env.action_space.sample()
    one = World(model)
    one.reset(starts[info["start"][1]])
    frames, rewards, _, truncated, _ = env.step(action)
    assert np.array_equal(one.step(action[1])["wrist"], frames["wrist"][1])
    assert rewards.shape == (4,)
    assert not truncated.any()
    assert env.step(action)[3].all()
    frames, rewards, _, truncated, info = env.step(action)  # a new episode
    assert (rewards.any(), truncated.any(), info["start"].shape) == (False, False, (4,))
    assert gym.wrappers.vector.RecordEpisodeStatistics(env).reset(seed=0)[0] in env.observation_space
