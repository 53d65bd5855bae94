"""A policy acts in imagination or in the simulator, what succeeds becomes demonstrations, and it learns them.

Run: pytest tests/test_improve.py
"""

import functools
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import worldvla
from worldvla.data.collect import collect
from worldvla.data.episode import read_episodes
from worldvla.data.store import TokenStore
from worldvla.eval.page import write_improvement
from worldvla.improve import _replayed, improve, starts_of
from worldvla.infer.model import load
from worldvla.sim import suites as sim

MODEL = Path(worldvla.__file__).parent / "assets/tabletop"
SUITE = "tabletop_object"


def test_what_replayed_is_what_happened_and_is_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, short = sim.tasks(SUITE)[:1], replace(sim.suite(SUITE), horizon=25)
    collect(SUITE, tmp_path / "demos", episodes=3, tasks=(0,), workers=1)
    monkeypatch.setattr(sim, "tasks", lambda _: tasks)
    monkeypatch.setattr(sim, "suite", lambda _: short)
    demos = sorted((tmp_path / "demos").glob("*.hdf5"))
    given = {"episodes": 2, "steps": 1, "judge_steps": 150, "temperature": 0.0}
    run = functools.partial(improve, MODEL, MODEL, demos, [SUITE], **given)

    record = run(tmp_path / "real", kind="simulator")
    (count,) = record["rounds"]
    assert count["episodes"] == 2
    assert count["kept"] == count["successes"] >= 1  # the shipped model can do this
    (file,) = (tmp_path / "real/round_0/demos").rglob("*.hdf5")
    kept, shown = list(read_episodes(file)), list(read_episodes(demos[0]))
    env: Any = sim.make(tasks[0], load(MODEL).view_sizes)
    with closing(env):
        for episode in kept:  # its first frame is a demonstration's, and its actions do again what they did
            start = next(
                e for e in shown if np.array_equal(e.images["agentview"][0], episode.images["agentview"][0])
            )
            env.reset(options={"init": max(start.init, 0)})
            env.set_state(start.sim_states[0])
            for t, action in enumerate(episode.actions):
                observation, *_, info = env.step(action)
                if t + 1 < len(episode):
                    assert np.array_equal(observation["wrist"], episode.images["wrist"][t + 1])
                    assert np.array_equal(observation["state"], episode.states[t + 1])
                assert info["success"] == (t + 1 == len(episode))
    assert len(TokenStore.open(tmp_path / "real/round_0/store").episodes) == len(kept)
    assert load(record["checkpoint"]).manifest["step"] == 1
    page = write_improvement(tmp_path / "real").read_text()
    assert page.count("<video") == 1  # a file is one task's
    assert "badge success" in page

    monkeypatch.setattr("worldvla.improve._roll", None)  # nobody acts again
    assert run(tmp_path / "real", kind="simulator")["checkpoint"] == record["checkpoint"]
    with pytest.raises(
        ValueError, match=r"other settings \(keep_all: False there, True now\): choose another"
    ):
        run(tmp_path / "real", kind="simulator", keep_all=True)
    monkeypatch.undo()
    monkeypatch.setattr(sim, "tasks", lambda _: tasks)
    monkeypatch.setattr(sim, "suite", lambda _: short)

    judge = tmp_path / "real/judge.safetensors"
    with pytest.raises(ValueError, match="knows no tabletop_goal: give a judge of these suites"):
        improve(MODEL, MODEL, demos, ["tabletop_goal"], tmp_path / "other", judge=judge)
    monkeypatch.setattr("worldvla.eval.judge.train_judge", None)  # it learnt before
    record = run(tmp_path / "dream", keep_all=True, judge=judge)
    assert record["rounds"][0]["kept"] == 2
    assert 0 <= record["rounds"][0]["in_simulator"] <= record["rounds"][0]["successes"]
    with pytest.raises(ValueError, match=r"other settings \(judge: .*: choose another"):
        run(tmp_path / "dream", keep_all=True)
    with pytest.raises(ValueError, match="gives 5 actions at a time, asked to execute 8"):
        run(tmp_path / "long", execute=8)
    starts, world = starts_of(demos, tasks, [SUITE], 2, 0, ["agentview", "wrist"]), load(MODEL)
    (start,) = (s for s in starts if np.array_equal(s.observation["state"], kept[0].states[0]))
    still = replace(kept[0], actions=0 * kept[0].actions)
    assert list(_replayed([(start, kept[0]), (start, still)], tasks, world)) == [True, False]
    (file,) = (tmp_path / "dream/round_0/demos").rglob("*.hdf5")
    dreamt = list(read_episodes(file))
    first = [e.images["agentview"][0] for e in shown[:2]]
    assert all(np.array_equal(e.images["agentview"][0], f) for e, f in zip(dreamt, first, strict=True))
    assert all(len(e) <= 25 and np.isfinite(e.states).all() for e in dreamt)


@pytest.mark.parametrize("wrong", [{"episodes": 0}, {"rounds": 0}, {"execute": -1}, {"temperature": np.nan}])
def test_bad_numbers_are_refused_before_anything_is_written(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match="expected episodes, rounds and steps >= 1, execute, seed and a finite"
    ):
        improve(MODEL, MODEL, [], [SUITE], tmp_path / "o", **wrong)
    with pytest.raises(ValueError, match="did you mean tabletop_object"):
        improve(MODEL, MODEL, [], ["tabletop_objects"], tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_settings_may_change_until_a_round_has_begun(tmp_path: Path) -> None:
    for seed in range(2):
        with pytest.raises(ValueError, match=r"for the judge: collect it anew"):
            improve(MODEL, MODEL, [], [SUITE], tmp_path / "o", seed=seed)


def test_a_policy_that_never_replayed_has_nothing_to_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = sim.tasks(SUITE)[:1]
    collect(SUITE, tmp_path / "demos", episodes=3, tasks=(0,), workers=1)
    brief = replace(sim.suite(SUITE), horizon=2)
    monkeypatch.setattr(sim, "tasks", lambda _: tasks)
    monkeypatch.setattr(sim, "suite", lambda _: brief)
    demos = sorted((tmp_path / "demos").glob("*.hdf5"))
    with pytest.raises(
        ValueError, match="none of 1 episodes succeeded in simulator: start from a better policy"
    ):
        improve(MODEL, MODEL, demos, [SUITE], tmp_path / "o", episodes=1, kind="simulator", judge_steps=5)
