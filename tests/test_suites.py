"""The table of suites: published horizons, LIBERO-PRO's suites as their base, and what a record says of it.

Run: pytest tests/test_suites.py
"""

import re
from pathlib import Path
from typing import Any

import pytest

import worldvla
from worldvla.sim import suites as sim
from worldvla.sim.protocol import RULES

PUBLISHED = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}


def test_horizons_are_the_published_ones():
    plain = {n: row.horizon for n, row in sim.SUITES.items() if row.simulator == "libero" and not row.base}
    assert plain == PUBLISHED


def test_the_page_says_the_same():
    page = (Path(__file__).parent.parent / "docs/CONVENTIONS.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| steps until an episode"))
    for name, horizon in PUBLISHED.items():
        short = name if name[-1].isdigit() else name.removeprefix("libero_")
        assert re.search(rf"\b{short} {horizon}\b", row), name
    assert f"| {RULES['libero'].settling} steps of (0, 0, 0, 0, 0, 0, -1), not counted |" in page


def test_perturbed_suites_follow_their_base():
    perturbed = {name: row for name, row in sim.SUITES.items() if row.base}
    bases = ("spatial", "object", "goal", "10")
    assert set(perturbed) == {f"libero_{b}_{k}" for b in bases for k in ("lan", "object", "swap", "task")}
    for name, row in perturbed.items():
        assert name.startswith(row.base + "_")
        assert row.horizon == PUBLISHED[row.base]
        assert row.simulator == "libero"


def test_every_row_knows_its_name_and_its_source():
    for name, row in sim.SUITES.items():
        assert row.name == name
        assert row.source
        assert row.rules.source


def test_record_says_how_episodes_start_and_are_seen():
    said = sim.protocol("libero_goal_swap", {"agentview": (128, 96)})
    assert said == {
        "reset": sim.INITIAL_STATES,
        "settling": 10,
        "horizon": 300,
        "views": {"agentview": [128, 96]},
    }
    assert sim.protocol("tabletop_long", {})["settling"] == 0


def test_unknown_suite_offers_the_nearest():
    with pytest.raises(ValueError, match="libero_goal_lan"):
        sim.suite("libero_goal_lang")


def test_an_environment_is_one_call_away() -> None:
    env: Any = worldvla.make("tabletop_goal", 3, views={})
    task: Any = env.unwrapped.task
    assert task == sim.tasks("tabletop_goal")[3]
    observation, _ = worldvla.make(task, views={}).reset()
    assert observation["instruction"] == task.instruction
    assert env.observation_space.contains(env.reset()[0])
    with pytest.raises(ValueError, match=r"tabletop_goal has 10 tasks, got index 10: expected 0\.\.9"):
        worldvla.make("tabletop_goal", 10)
