"""Collecting: the same episodes however it is stopped, resumed and spread; only the expert's own steps are
labels; stored actions reproduce the simulator's states bit by bit.

Run: pytest tests/test_collect.py
"""

import inspect
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from worldvla import cli
from worldvla.data.collect import FIRST_INIT, INITS_PER_SEED, Job, _attempt, collect, kept, record
from worldvla.data.drivers import Astray, DaggerDriver, PerturbedExpert, Play
from worldvla.data.episode import demonstration_files, facts, read_episodes, write_episodes
from worldvla.data.rerun import regenerate, rerun, start
from worldvla.sim import suites as sim
from worldvla.sim.protocol import NUM_INITS, Task

SUITE, TASK = "tabletop_object", sim.tasks("tabletop_object")[0]
CRASH_AT, DIE_AT = "TEST_COLLECT_CRASH_AT", "TEST_COLLECT_DIE_AT"


class Line:
    """A point that must come to x = 1; from initial states whose index ends in 3 it cannot move."""

    def __init__(self, task: Task, views: Any = None) -> None:
        assert "torch" not in sys.modules or "pytest" in sys.modules, "a worker imported torch"
        self.task, self.views, self.horizon, self.rendering = task, views, 100, True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        del seed
        self.init = (options or {})["init"]
        if str(self.init - FIRST_INIT) == os.environ.get(CRASH_AT):
            raise RuntimeError("crashed as told")
        if str(self.init - FIRST_INIT) == os.environ.get(DIE_AT):
            os.kill(os.getpid(), signal.SIGKILL)
        self.x = np.random.default_rng(self.init).uniform(-0.5, 0.0)
        return self.observe(), {}

    def step(self, action: np.ndarray) -> Any:
        if self.init % 10 != 3:
            self.x += 0.1 * float(action[0])
        return self.observe(), 0.0, self.x >= 1, False, {}

    def observe(self) -> dict[str, Any]:
        state = np.full(8, self.x, dtype=np.float32)
        return {"state": state, "agentview": np.full((4, 4, 3), int(100 * abs(self.x)), np.uint8)}

    def get_state(self) -> np.ndarray:
        return np.array([self.x])

    def set_state(self, state: np.ndarray) -> None:
        self.x = float(state[0])

    def points_of_interest(self) -> np.ndarray:
        return np.array([[self.x, 0.0, 0.0], [1.0, 0.0, 0.0]])

    def in_contact(self) -> bool:
        return self.x > 0

    def close(self) -> None:
        CLOSED.append(self.init)


CLOSED: list[int] = []
"""Initial states of closed environments."""


class Right:
    """The expert of Line: moves right by half."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def act(self) -> np.ndarray:
        return np.array([0.5, 0, 0, 0, 0, 0, -1], dtype=np.float32)


class Wrong(Right):
    """Stays where it is."""

    def act(self) -> np.ndarray:
        return 0 * super().act()


def _collect(out: Path, **changed: Any) -> Any:
    arguments: dict[str, Any] = {"episodes": 6, "views": {"agentview": (4, 4)}, "seed": 0, "workers": 1}
    return collect(SUITE, out, tasks=(0, 2), make=Line, expert=Right, **(arguments | changed))


def _content(out: Path) -> list[Any]:
    return [
        {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(e).items() if k != "images"}
        | {"images": e.images["agentview"].tolist()}
        for path in sorted(out.glob("*.hdf5"))
        for e in read_episodes(path)
    ]


def test_stopped_and_resumed_equals_not_stopped(tmp_path, monkeypatch):
    report = _collect(tmp_path / "whole", workers=2)
    whole = _content(tmp_path / "whole")
    assert [e["init"] - FIRST_INIT for e in whole] == [0, 1, 2, 4, 5, 6] * 2  # 3 cannot succeed
    assert {name: (r["episodes"], r["failed"]) for name, r in report.items()} == {
        sim.tasks(SUITE)[i].name: (6, 1) for i in (0, 2)
    }
    assert sum(r["steps"] for r in report.values()) == sum(len(e["actions"]) for e in whole)
    monkeypatch.setenv(CRASH_AT, "5")
    with pytest.raises(RuntimeError, match="crashed as told"):
        _collect(tmp_path / "parts")
    assert not list((tmp_path / "parts").glob("*.hdf5"))
    parts = {p.name for p in (tmp_path / "parts" / f".{TASK.name}.parts").iterdir()}
    assert {"0.hdf5", "3.failed"} <= parts
    assert all(name.endswith((".hdf5", ".failed")) for name in parts)
    with pytest.raises(FileNotFoundError, match="holds no"):
        demonstration_files([tmp_path / "parts"])
    monkeypatch.delenv(CRASH_AT)
    assert _collect(tmp_path / "parts") == report
    assert _content(tmp_path / "parts") == whole
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {
        p.name for p in (tmp_path / "whole").iterdir()
    }
    times = [p.stat().st_mtime_ns for p in sorted((tmp_path / "whole").iterdir())]
    assert _collect(tmp_path / "whole") == report  # nothing left to do
    assert times == [p.stat().st_mtime_ns for p in sorted((tmp_path / "whole").iterdir())]
    with pytest.raises(ValueError, match=r"other settings \(noise: 0.15 there, 0.3 now\): choose another"):
        _collect(tmp_path / "whole", noise=0.3)


def test_a_killed_worker_is_one_line_and_the_same_call_goes_on(tmp_path, monkeypatch):
    run = partial(collect, SUITE, tmp_path, tasks=(0,), episodes=4, workers=1, make=Line, expert=Right)
    monkeypatch.setenv(DIE_AT, "2")
    with pytest.raises(
        OSError, match=r"a worker process was killed, .*: the same command goes on .* --workers"
    ):
        run()
    monkeypatch.delenv(DIE_AT)
    assert (tmp_path / f".{TASK.name}.parts/0.hdf5").exists()
    assert run()[TASK.name]["episodes"] == 4


def test_what_failed_at_once_does_not_refuse_its_correction(tmp_path, monkeypatch):
    monkeypatch.setenv(CRASH_AT, "0")
    with pytest.raises(RuntimeError, match="crashed as told"):
        collect(SUITE, tmp_path, tasks=(0,), episodes=1, workers=1, make=Line, expert=Right, noise=0.3)
    monkeypatch.delenv(CRASH_AT)
    for _ in range(2):
        collect(SUITE, tmp_path, tasks=(0,), episodes=1, workers=1, make=Line, expert=Right, noise=0.2)
    assert json.loads((tmp_path / "collect.json").read_text())["noise"] == 0.2


@pytest.mark.parametrize(("workers", "views"), [(-1, {}), (1, {"agentview": (0, 4)})])
def test_nothing_is_rendered_again_with_bad_arguments(tmp_path, workers, views):
    with pytest.raises(ValueError, match=r"workers >= 0|agentview=0x4"):
        regenerate([], tmp_path / "out", views, workers=workers)
    assert not (tmp_path / "out").exists()


def test_there_is_a_worker_for_each_core(tmp_path, monkeypatch):
    asked = []

    def one_thread(workers, _context, **_options):
        asked.append(workers)
        return ThreadPoolExecutor(1)

    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(7))
    monkeypatch.setattr("worldvla.data.collect.ProcessPoolExecutor", one_thread)
    collect(SUITE, tmp_path, tasks=(0,), episodes=1, make=Line, expert=Right)
    regenerate([], tmp_path / "again", {})
    assert asked == [7, 7]
    verbs = cli.collect, cli.evaluate, cli.regenerate
    assert {inspect.signature(verb).parameters["workers"].default for verb in verbs} == {0}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"noise": 0.9}, "0 <= noise < 0.9"),
        ({"episodes": 0}, "1 to 49995 episodes .* got 0.15, 0 and 0"),
        ({"episodes": 49_996}, "1 to 49995 episodes"),
        ({"seed": 2**32}, r"a seed from 0 to 2\^32 - 1, got"),
        ({"workers": -1}, "workers >= 0"),
        ({"seed": -1}, "a seed from 0"),
        ({"views": {"agentview": (0, 0)}}, "view agentview=0x0: expected 1x1 to 1,048,576 pixels"),
        ({"views": {"agentview": (2**16, 2**16)}}, "view agentview=65536x65536: expected"),
        ({"label": -1}, "label >= 0"),
        ({"execute": 0}, "execute >= 1"),
        ({"kind": "world", "label": 2}, "no policy's targets, got label 2"),
        ({"kind": "grasps", "policy": int}, "kind grasps has no policy"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        _collect(tmp_path / "out", **changed)
    with pytest.raises(ValueError, match=r"tasks 0 to 9, got \[10\]"):
        collect(SUITE, tmp_path / "out", tasks=(10,))
    with pytest.raises(ValueError, match="did you mean tabletop_object"):
        collect("tabletop_objects", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fraction", [0.0, 0.15, 0.3])
def test_perturbations_come_in_bursts_of_the_wanted_share(fraction):
    driver = PerturbedExpert(Right(None), np.random.default_rng(0), fraction)
    steps = [driver({}) for _ in range(20_000)]
    clean = np.array([is_expert for _, is_expert in steps])
    actions = np.array([action for action, _ in steps])
    assert actions.dtype == np.float32
    assert np.abs(actions).max() <= 1
    np.testing.assert_array_equal(actions[clean], np.tile(Right(None).act(), (clean.sum(), 1)))
    assert (~clean).mean() == pytest.approx(fraction, rel=0.15)
    if fraction:
        assert np.abs(actions[~clean] - Right(None).act())[:, :3].mean() > 0.4
        assert (actions[~clean][:, 6] > 0).mean() == pytest.approx(0.1, abs=0.03)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], ~clean, [0]]).astype(int)))
        bursts = edges[1::2] - edges[::2]
        assert bursts.min() == 2  # two bursts may touch: there is no longest one


def test_initial_states_are_never_those_of_the_evaluation():
    env, seen = Line(TASK), []
    for seed in (0, 1):
        for attempt in (0, 99_999):
            init = FIRST_INIT + seed * INITS_PER_SEED + attempt
            env.reset(options={"init": init})
            seen.append(env.init)
    assert min(seen) == NUM_INITS
    assert len(set(seen)) == 4


def test_an_episode_ends_with_the_action_that_succeeds():
    env = Line(TASK)
    episode = record(env, PerturbedExpert(Right(env), np.random.default_rng(0), 0.0), init=60, seed=4)
    assert episode is not None
    assert (episode.init, episode.seed, episode.instruction) == (60, 4, TASK.instruction)
    assert episode.sim_states[-1, 0] < 1 <= episode.sim_states[-1, 0] + 0.1 * episode.actions[-1, 0] + 1e-9
    np.testing.assert_array_equal(episode.states[:, 0], episode.sim_states[:, 0].astype(np.float32))
    assert record(env, PerturbedExpert(Right(env), np.random.default_rng(0), 0.0), init=63, seed=4) is None


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_labels_are_what_the_expert_would_do_from_each_visited_state(tmp_path, noise):
    collect(SUITE, tmp_path, episodes=2, tasks=(0,), views={"agentview": (8, 8)}, noise=noise, label=3)
    (path,) = tmp_path.glob("*.hdf5")
    for episode in read_episodes(path):
        assert episode.expert_actions is not None
        assert episode.expert_actions.shape == (len(episode), 3, 7)
        own = episode.is_expert
        assert np.allclose(episode.expert_actions[own, 0], episode.actions[own], atol=1e-6)
        if not noise:
            stacked = np.stack([episode.actions[i : len(episode) - 2 + i] for i in range(3)], axis=1)
            assert np.allclose(episode.expert_actions[:-2], stacked, atol=1e-3)
        else:
            assert not np.allclose(episode.expert_actions[~own, 0], episode.actions[~own], atol=0.05)
    assert all(rerun(path))  # labelling leaves the episode's own physics alone


def _stay() -> Any:
    return lambda observation: np.full((5, 7), 0.01 if "line" in observation["instruction"] else 0.02)


def test_a_policy_drives_and_the_expert_ends_the_episode():
    line = Line(SimpleNamespace(instruction="line"))  # pyright: ignore[reportArgumentType]
    driver = DaggerDriver(_stay(), Right(line), "line", np.random.default_rng(0), until=40, execute=3)
    episode_actions, flags = [], []
    observation, _ = line.reset(options={"init": FIRST_INIT})
    success = False
    while not success:
        action, is_expert = driver(observation)
        episode_actions.append(action[0])
        flags.append(is_expert)
        observation, _, success, _, _ = line.step(action)
    assert np.array_equal(np.array(episode_actions) > 0.1, flags)  # the flag says who acted
    early, late = flags[:39], flags[42:]
    assert 0.5 < 1 - np.mean(early) < 1.0
    assert all(late)
    runs = np.diff(np.flatnonzero(np.diff([True, *early, True])))
    assert (runs % 3 == 0).all()  # whole stretches of `execute` steps


def test_policy_driven_demonstrations_name_the_policy(tmp_path):
    arguments: Any = {"label": 2, "policy": _stay, "policy_name": "abc", "tasks": (0,), "episodes": 1}
    collect(SUITE, tmp_path, views={"agentview": (8, 8)}, **arguments)
    (path,) = tmp_path.glob("*.hdf5")
    (episode,) = read_episodes(path)
    assert not episode.is_expert.all()
    assert episode.expert_actions is not None
    for told in (json.loads((tmp_path / "collect.json").read_text()), facts(path)):
        assert (told["policy"], told["noise"]) == ("abc", 0.0)  # no noise was applied
    with pytest.raises(ValueError, match="choose another directory"):
        collect(SUITE, tmp_path, views={"agentview": (8, 8)}, **{**arguments, "policy_name": "other"})


def test_an_environment_that_raised_is_closed(tmp_path, monkeypatch):
    job = Job(
        tmp_path / "a.hdf5", lambda init: _line().reset(options={"init": FIRST_INIT + init}), 1, 1, tmp_path
    )
    monkeypatch.setenv(CRASH_AT, "7")
    CLOSED.clear()
    with pytest.raises(RuntimeError, match="crashed as told"):
        _attempt(job, 7)
    assert CLOSED == [FIRST_INIT + 7]


def _line() -> Line:
    return kept("line", lambda: (Line(TASK),))[0]


# -- world data ----------------------------------------------------------------------------------------------


def test_world_data_keep_failures_and_are_no_targets(tmp_path):
    counts = _collect(tmp_path, kind="world", workers=1, episodes=8, policy=_stay, policy_name="abc")
    assert _collect(tmp_path, kind="world", workers=1, episodes=8, policy=_stay, policy_name="abc") == counts
    for path in tmp_path.glob("*.hdf5"):
        episodes, told = list(read_episodes(path)), facts(path)
        frames = {"contact": 0, "moving": 0, "failure": 0}
        for e in episodes:
            assert not e.is_expert.any()
            assert e.contact is not None
            assert e.moving is not None
            places = np.append(e.sim_states[:, 0], np.nan)[1:-1]
            np.testing.assert_array_equal(e.contact[:-1], places > 0)
            np.testing.assert_array_equal(e.moving[:-1], np.abs(np.diff(e.sim_states[:, 0])) > 1e-3)
            frames["contact"] += int(e.contact.sum())
            frames["moving"] += int(e.moving.sum())
            frames["failure"] += 0 if e.success else len(e)
        total = sum(map(len, episodes))
        assert [e.init - FIRST_INIT for e in episodes] == list(range(8))  # none is left out
        assert not episodes[3].success
        assert {e.success for e in episodes} == {True, False}
        assert told["shares"] == {name: n / total for name, n in frames.items()}
        assert (told["kind"], told["noise"], told["failed"]) == ("world", 0.0, 0)
        assert counts[path.name.removesuffix("_demo.hdf5")]["shares"] == told["shares"]


@pytest.mark.parametrize("suite", ["tabletop_object", "tabletop_goal"])
def test_play_touches_and_moves_things_smoothly(suite):
    env: Any = sim.make(sim.tasks(suite)[0], {})
    noted: dict[str, list[float]] = {"contact": [], "moving": [], "jerk": []}
    for init in range(4):
        rng = np.random.default_rng(init)
        episode = record(env, Play(env, rng), FIRST_INIT + init, 0, limit=100, after=100)
        assert episode is not None
        assert episode.contact is not None
        assert episode.moving is not None
        assert len(episode) == 100
        assert not episode.is_expert.any()
        assert np.abs(episode.states[:, 3:6]).max() < 0.6  # stays about upright
        noted["contact"].append(float(episode.contact.mean()))
        noted["moving"].append(float(episode.moving.mean()))
        noted["jerk"].append(float(np.abs(np.diff(episode.actions[:, :3], axis=0)).mean()))
    env.close()
    means = {name: np.mean(values) for name, values in noted.items()}
    assert means["contact"] > 0.15, means
    assert means["moving"] > 0.05, means
    assert means["jerk"] < 0.35, means


def test_grasps_hold_and_miss(tmp_path: Path) -> None:
    suite = "tabletop_object"
    collect(suite, tmp_path, kind="grasps", episodes=4, tasks=(0, 3), workers=1, seed=5)
    held = []
    for path in sorted(tmp_path.glob("*.hdf5")):
        for episode in read_episodes(path, images=False):
            assert not episode.is_expert.any()
            assert len(episode) == sim.suite(suite).horizon
            command, width = episode.actions[:-3, 6], np.abs(episode.states[:, 6:]).sum(1)
            closes = np.flatnonzero((command > 0) & (np.append(-1, command[:-1]) < 0) & (width[:-3] > 0.08))
            held += (width[closes + 3] > 0.015).tolist()
    assert len(held) >= 16  # two of each episode
    assert 0.25 < np.mean(held) < 0.85


def test_a_folder_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tasks": (0,), "episodes": 1, "workers": 1, "make": Line, "expert": Right}
    collect(SUITE, tmp_path, **options)
    (tmp_path / "collect.json").unlink()
    with pytest.raises(ValueError, match=r"but not collect\.json, which says how they were made"):
        collect(SUITE, tmp_path, **options)


def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tasks": (0,), "episodes": 1, "workers": 1, "make": Line}
    with pytest.raises(ValueError, match="mend it, or ask for less noise"):
        collect(SUITE, tmp_path, expert=Wrong, **options)
    collect(SUITE, tmp_path, expert=Right, **options)  # the expert is mended
    assert facts(next(tmp_path.glob("*.hdf5")))["num_demos"] == 1


def test_an_astray_hand_acts_beside_the_thing_and_then_recovers() -> None:
    env: Any = sim.make(TASK, {})
    scout: Any = sim.make(TASK, {})
    scout.reset(options={"init": 0})
    then = PerturbedExpert(sim.expert(env), np.random.default_rng(0), 0.0)
    driver = Astray(env, scout, sim.expert(scout), then, np.array([0.06, 0.0]), env.horizon)
    aside, closed = [], []

    def noting(observation: dict[str, Any]) -> tuple[np.ndarray, bool]:
        action, is_expert = driver(observation)
        if not driver.moves and driver.lost:
            aside.append(env.grip_position() - scout.grip_position())
            closed.append(action[6] > 0 and bool(env.info()["grasped"]))
        return action, is_expert

    episode = record(env, noting, FIRST_INIT, 0, limit=env.horizon, after=4)
    assert episode is not None
    assert episode.success
    assert len(aside) < len(episode) - 8  # success there came first, then here
    np.testing.assert_allclose(np.median(aside, axis=0)[:2], [0.06, 0.0], atol=0.01)
    assert not any(closed)
    assert env.info()["success"]


def test_replay_reports_success(tmp_path, monkeypatch):
    monkeypatch.setattr(sim, "make", Line)
    env = Line(TASK)
    episode = record(env, PerturbedExpert(Right(env), np.random.default_rng(0), 0.15), init=60, seed=0)
    assert episode is not None
    short = replace(
        episode,
        **{name: getattr(episode, name)[:-1] for name in ("actions", "states", "sim_states", "is_expert")},
        images={"agentview": episode.images["agentview"][:-1]},
    )
    foreign = replace(episode, init=-1)  # starts from the stored state, not from an index
    write_episodes(tmp_path / "a.hdf5", [episode, short, foreign], {})
    assert list(rerun(tmp_path / "a.hdf5")) == [True, False, True]
    assert list(rerun(tmp_path / "a.hdf5", lambda actions: actions * 0.5)) == [False] * 3
    write_episodes(tmp_path / "b.hdf5", [replace(episode, task="juggle")], {})
    with pytest.raises(ValueError, match="tabletop_object has no task 'juggle'"):
        list(rerun(tmp_path / "b.hdf5"))


def test_tabletop_demonstrations_replay_to_the_same_bits(tmp_path):
    env: Any = sim.make(TASK, {"wrist": (8, 8)})
    episodes = []
    for init in (FIRST_INIT, FIRST_INIT + 1, FIRST_INIT + 2):
        driver = PerturbedExpert(sim.expert(env), np.random.default_rng(init), 0.15)
        episodes.append(record(env, driver, init, seed=0))
    found = [e for e in episodes if e is not None]
    assert len(found) >= 2
    write_episodes(tmp_path / "a.hdf5", found, {})
    assert all(rerun(tmp_path / "a.hdf5"))
    for episode in read_episodes(tmp_path / "a.hdf5"):
        start(env, episode)
        for action, state in zip(episode.actions, episode.sim_states, strict=True):
            np.testing.assert_array_equal(env.get_state(), state)
            env.step(action)


def test_the_driver_sees_what_a_policy_would_see():
    seen = []

    def driver(observation: dict[str, Any]) -> tuple[np.ndarray, bool]:
        seen.append(SimpleNamespace(**observation))
        return Right(None).act(), True

    episode = record(Line(TASK), driver, init=61, seed=0)
    assert episode is not None
    np.testing.assert_array_equal(np.array([o.state for o in seen]), episode.states)
    np.testing.assert_array_equal(np.array([o.agentview for o in seen]), episode.images["agentview"])
