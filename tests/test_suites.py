"""The table of suites: published horizons, LIBERO-PRO's suites as their base, and what a record says of it.

Run: pytest tests/test_suites.py
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import worldvla
from worldvla.sim import suites as sim
from worldvla.sim.libero import axes
from worldvla.sim.protocol import AXES, RULES

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
    kinds = ("lan", "object", "swap", "task", *AXES)
    assert set(perturbed) == {f"libero_{b}_{k}" for b in bases for k in kinds}
    for name, row in perturbed.items():
        assert name.startswith(row.base + "_")
        assert row.horizon == PUBLISHED[row.base]
        assert row.simulator == "libero"


def test_every_row_knows_its_name():
    assert all(row.name == name for name, row in sim.SUITES.items())


def test_record_says_how_episodes_start_and_are_seen():
    said = sim.protocol("libero_goal_swap", {"agentview": (128, 96)})
    assert said == {
        "reset": sim.INITIAL_STATES,
        "settling": 10,
        "horizon": 300,
        "views": {"agentview": [128, 96]},
    }
    assert sim.protocol("tabletop_long", {})["settling"] == 0


def test_an_axis_says_in_the_record_what_it_changes():
    assert sim.protocol("libero_10_light", {})["perturbation"] == AXES["light"]
    assert sim.suite("libero_10_light").base == "libero_10"
    assert axes.split("libero_10_light") == ("libero_10", "light")
    assert axes.split("libero_10_swap") == ("libero_10_swap", "")
    page = (Path(__file__).parent.parent / "docs/CONVENTIONS.md").read_text()
    assert all(f"| `_{axis}` | {text} |" in page for axis, text in AXES.items())


def test_groups_are_suites():
    assert sim.members("libero") == ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    assert len(sim.members("libero_pro")) == 16
    assert sim.members("libero_noise")[3] == "libero_10_noise"
    assert sim.members("libero_object") == ("libero_object",)
    assert not sim.GROUPS.keys() & sim.SUITES.keys()
    assert all(sim.suite(name) for names in sim.GROUPS.values() for name in names)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("pick up the milk and place it in the basket", "please grab the milk and set it down in the basket"),
        ("put both moka pots on the stove", "please place both moka pots on the stove"),
        (
            "open the top drawer and put the bowl inside",
            "please pull open the top drawer and then place the bowl inside",
        ),
    ],
)
def test_other_words_mean_the_same(said, meant):
    assert axes.paraphrase(said) == meant


def test_changes_are_a_function_of_axis_task_and_state():
    image = np.full((8, 8, 3), 128, np.uint8)
    first, again, other = (axes.noisy(image, axes.draw("noise", 0, i, 5)) for i in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert 5 < first.std() < 35
    turn = np.array([np.sqrt(0.5), 0.0, 0.0, np.sqrt(0.5)])  # a quarter about z
    assert np.allclose(axes._rotated(turn, np.array([1.0, 0.0, 2.0])), [0.0, 1.0, 2.0])
    assert np.allclose(axes._product(turn, turn), [0.0, 0.0, 0.0, 1.0])


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
