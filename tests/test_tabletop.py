"""The built-in world: deterministic, solvable by its expert, restorable, and a proper gymnasium environment.

Run: pytest tests/test_tabletop.py
"""

import gymnasium as gym
import numpy as np
import pytest

from worldvla.sim.protocol import NUM_INITS
from worldvla.sim.suites import SUITES, expert, make, tasks

ALL = [task for name, suite in SUITES.items() if suite.simulator == "tabletop" for task in tasks(name)]


def run_expert(env, init: int) -> tuple[bool, bool, int]:
    env.reset(options={"init": init})
    policy, grasped = expert(env), False
    for step in range(env.horizon):
        _, _, success, truncated, info = env.step(policy.act())
        grasped |= info["grasped"]
        if success or truncated:
            return success, grasped, step + 1
    raise AssertionError("the episode neither succeeded nor reached its horizon")


def test_four_suites_of_ten_distinct_tasks():
    assert len(ALL) == 40
    for name in {task.suite for task in ALL}:
        assert len({task.name for task in tasks(name)}) == 10


@pytest.mark.parametrize("task", ALL, ids=lambda t: f"{t.suite}-{t.index}")
def test_expert_solves_every_task(task):
    env = make(task, {})
    env.rendering = False  # pyright: ignore[reportAttributeAccessIssue]
    success, grasped, steps = run_expert(env, 1)
    assert success
    assert steps < 80
    assert grasped or "press" in task.name or "push" in task.name or "close" in task.name


@pytest.mark.slow
@pytest.mark.parametrize("task", ALL, ids=lambda t: f"{t.suite}-{t.index}")
def test_expert_solves_49_of_50_initial_states(task):
    env = make(task, {})
    env.rendering = False  # pyright: ignore[reportAttributeAccessIssue]
    assert sum(run_expert(env, i)[0] for i in range(NUM_INITS)) >= 49


def test_same_init_and_actions_give_the_same_bytes():
    task = tasks("tabletop_goal")[0]
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 7))
    runs = []
    for _ in range(2):
        env = make(task)
        observation, _ = env.reset(options={"init": 3})
        frames = [observation]
        frames += [env.step(action)[0] for action in actions]
        runs.append(frames)
    for a, b in zip(*runs, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_inits_differ_and_stay_within_the_table():
    env = make(tasks("tabletop_object")[0], {})
    starts = []
    for i in range(20):
        env.reset(options={"init": i})
        starts.append(env.target_position())  # pyright: ignore[reportAttributeAccessIssue]
    spread = np.ptp(np.array(starts), axis=0)
    assert (spread[:2] > 0.03).all()
    assert (spread[:2] < 0.07).all()


def test_state_round_trip_reproduces_the_future():
    env = make(tasks("tabletop_long")[7])
    env.reset(options={"init": 0})
    policy = expert(env)
    for _ in range(6):
        env.step(policy.act())
    state = env.get_state()  # pyright: ignore[reportAttributeAccessIssue]
    actions = np.random.default_rng(1).uniform(-1, 1, (4, 7))
    first = [env.step(a)[0] for a in actions]
    env.set_state(state)  # pyright: ignore[reportAttributeAccessIssue]
    second = [env.step(a)[0] for a in actions]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a["agentview"], b["agentview"])
        np.testing.assert_array_equal(a["state"], b["state"])


def test_observations_lie_in_their_space_and_rendering_can_be_switched_off():
    env = make(tasks("tabletop_spatial")[2], {"agentview": (48, 64), "wrist": (32, 32)})
    observation, _ = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    assert observation["agentview"].shape == (48, 64, 3)
    env.rendering = False  # pyright: ignore[reportAttributeAccessIssue]
    assert set(env.step(np.zeros(7))[0]) == {"state"}


def test_position_action_of_one_moves_five_centimetres():
    env = make(tasks("tabletop_object")[0], {})
    observation, _ = env.reset(options={"init": 0})
    start = observation["state"][:3]
    for axis in range(3):
        action = np.zeros(7)
        action[axis] = 1.0 if start[axis] < 0.15 else -1.0
        before = env.observe()["state"][:3]  # pyright: ignore[reportAttributeAccessIssue]
        moved = env.step(action)[0]["state"][:3] - before
        assert abs(abs(moved[axis]) - 0.05) < 0.012, moved


def test_runs_in_a_process_vector():
    task = tasks("tabletop_object")[0]
    envs = gym.vector.AsyncVectorEnv([lambda: make(task, {"agentview": (32, 32)})] * 2)
    try:
        observation, _ = envs.reset(seed=[0, 1])
        assert observation["agentview"].shape == (2, 32, 32, 3)
        assert envs.step(np.zeros((2, 7), dtype=np.float32))[0]["state"].shape == (2, 8)
    finally:
        envs.close()


def test_bad_input_is_one_clear_line():
    env = make(tasks("tabletop_object")[0], {})
    env.reset(options={"init": 0})
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.step(np.full(7, np.nan))
    with pytest.raises(ValueError, match="init must be an integer >= 0"):
        env.reset(options={"init": -1})
    with pytest.raises(ValueError, match="unknown views"):
        make(tasks("tabletop_object")[0], {"side": (64, 64)})
    with pytest.raises(ValueError, match="did you mean"):
        tasks("tabletop_objects")
