"""Policies act in the simulator and in imagination; a judge reads success off frames; ranks are compared.

Run: pytest tests/test_rank.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import worldvla
from worldvla.data.collect import collect
from worldvla.eval import rank
from worldvla.sim import env as sim

MODEL = Path(worldvla.__file__).parent / "assets/tabletop"
SUITE = "tabletop_object"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_ranks_and_correlations_are_scipys(rng: np.random.Generator) -> None:
    for _ in range(20):
        a, b = rng.integers(0, 4, 9), rng.integers(0, 4, 9)
        assert np.array_equal(rank.ranks(a), stats.rankdata(a) - 1)
        assert rank.correlation(rank.ranks(a), rank.ranks(b)) == pytest.approx(stats.spearmanr(a, b)[0])
    assert np.isnan(rank.correlation(np.ones(3), np.arange(3.0)))


def test_success_has_to_be_seen_twice_in_a_row() -> None:
    said = np.array([1, 0, 1, 1, 0, 1], dtype=bool)
    assert rank.confirmed(said).tolist() == [False, False, False, True, False, False]


def test_the_same_outcomes_agree_and_opposite_ones_do_not(rng: np.random.Generator) -> None:
    outcomes_MN = (rng.random((5, 40)) < np.linspace(0.1, 0.9, 5)[:, None]).astype(int)
    same, opposite = rank.agreement(outcomes_MN, outcomes_MN), rank.agreement(outcomes_MN, 1 - outcomes_MN)
    assert same["spearman"] == {"value": 1.0, "interval_95": [1.0, 1.0]}
    assert same["same_episodes"] == [200, 200]
    assert opposite["pearson"]["value"] == -1.0
    assert rank.agreement(np.ones((3, 4)), np.ones((3, 4)))["spearman"] == {
        "value": None,
        "interval_95": None,
    }


def test_a_policy_acts_in_both_and_the_record_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = sim.tasks(SUITE)[:1]
    collect(SUITE, tmp_path / "demos", episodes=3, tasks=(0,), workers=1)
    monkeypatch.setattr(sim, "tasks", lambda _: tasks)
    demos = sorted((tmp_path / "demos").glob("*.hdf5"))
    options = {"episodes": 1, "first": 10, "execute": (3, 9, 5), "judge_steps": 60, "films": 1}
    record = rank.rank_policies([MODEL], MODEL, demos, [SUITE], tmp_path / "out", **options)
    assert [row["execute"] for row in record["policies"]] == [3, 5]  # no more than the chunk, each once
    assert all(np.shape(row["outcomes"]) == (3, 1) for row in record["policies"])
    assert record["policies"][0]["outcomes"][0] == [1]  # the shipped model succeeds from this state
    assert json.loads((tmp_path / "out/record.json").read_text())["judge"] == record["judge"]
    assert all((tmp_path / "out" / name).stat().st_size for name in ("rank.png", "imagined.mp4"))


def test_what_the_judge_cannot_learn_is_said(tmp_path: Path) -> None:
    collect(SUITE, tmp_path / "demos", episodes=1, tasks=(0,), workers=1)
    demos, views = sorted((tmp_path / "demos").glob("*.hdf5")), {"agentview": (64, 64), "wrist": (32, 32)}
    with pytest.raises(ValueError, match=f"no demonstration of {SUITE}/"):
        rank.gather(demos, [SUITE], views, 5)
    with pytest.raises(ValueError, match=r"view wrist is \(32, 32\) pixels, the models see \(16, 16\)"):
        rank.gather(demos, [SUITE], views | {"wrist": (16, 16)}, 5)
