"""The suites of tasks, and what a simulator gives for one: its tasks, an environment, an expert.

task = tasks("tabletop_object")[0]
env = make(task)
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from worldvla.sim.protocol import AXES, Expert, Suite, Task

if TYPE_CHECKING:
    import gymnasium as gym

SUITES = {
    suite.name: suite
    for suite in (
        Suite("tabletop_spatial", "tabletop", 80),
        Suite("tabletop_object", "tabletop", 80),
        Suite("tabletop_goal", "tabletop", 80),
        Suite("tabletop_long", "tabletop", 160),
        Suite("libero_spatial", "libero", 220),
        Suite("libero_object", "libero", 280),
        Suite("libero_goal", "libero", 300),
        Suite("libero_10", "libero", 520),
        Suite("libero_90", "libero", 400),  # openvla run_libero_eval.py, too
    )
}
FOUR = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
PERTURBATIONS = ("lan", "object", "swap", "task")
"""LIBERO-PRO's: another wording; other looks of things; other places; another goal with its own wording."""
SUITES |= {
    f"{name}_{kind}": replace(SUITES[name], name=f"{name}_{kind}", base=name)
    for kinds in (PERTURBATIONS, AXES)
    for name in FOUR
    for kind in kinds
}
TABLETOP = tuple(name for name, suite in SUITES.items() if suite.simulator == "tabletop")
GROUPS = {
    "tabletop": TABLETOP,
    "libero": FOUR,
    "libero_pro": tuple(f"{name}_{kind}" for name in FOUR for kind in PERTURBATIONS),
    **{f"libero_{axis}": tuple(f"{name}_{axis}" for name in FOUR) for axis in AXES},
}
"""Names that stand for several suites in an evaluation."""

INITIAL_STATES = "the stored one with the episode's index, simulator reseeded before every episode"
"""An index that counts across episodes starts elsewhere (lerobot#4152), and so does a seed set once a task
(openvla#342)."""


def members(name: str) -> tuple[str, ...]:
    """Return the suites that `name`, a suite or one of GROUPS, stands for."""
    return GROUPS[name] if name in GROUPS else (suite(name).name,)


def suite(name: str) -> Suite:
    """Return the suite called `name`; an unknown name raises ValueError that offers the nearest ones."""
    if name not in SUITES:
        near = difflib.get_close_matches(name, [*SUITES, *GROUPS], n=3, cutoff=0.4) or list(SUITES)
        raise ValueError(f"unknown suite {name!r}; did you mean {', '.join(near)}?")
    return SUITES[name]


def protocol(name: str, views: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Return what a record says of how episodes of suite `name` started, were seen and ended."""
    row = suite(name)
    axis = name.rpartition("_")[2]
    return {
        "reset": INITIAL_STATES,
        "settling": row.rules.settling,
        "horizon": row.horizon,
        "views": {view: list(size) for view, size in views.items()},
        **({"perturbation": AXES[axis]} if axis in AXES else {}),
    }


def with_scene(instruction: str, task: str) -> str:
    """Return the instruction behind the scene that the task's name starts with, if it does: "KITCHEN SCENE3
    turn on ...", the prompts that the released LIBERO-10 checkpoints were trained on (WorldVLA
    data/action_model_conv_generation.py:58); the published evaluation leaves the scene out."""
    scene = re.match(r"[A-Z_]+SCENE\d+(?=_)", task)
    return f"{scene[0].replace('_', ' ')} {instruction}" if scene else instruction


def tasks(name: str) -> tuple[Task, ...]:
    """Return the tasks of a suite in their fixed order."""
    if suite(name).simulator == "tabletop":
        from worldvla.sim.tabletop.tasks import tasks as tabletop_tasks

        return tabletop_tasks(name)
    from worldvla.sim.libero.env import tasks as libero_tasks

    return libero_tasks(suite(name))


def make(task: Task, views: dict[str, tuple[int, int]] | None = None) -> "gym.Env[Any, Any]":
    """Return a fresh environment of `task`. `views` maps a view to its (rows, columns) in pixels; None: the
    simulator's default.

    Without views the environment renders nothing (physics only), and observations hold the state alone.
    """
    if suite(task.suite).simulator == "libero":
        from worldvla.sim.libero.env import LiberoEnv

        return LiberoEnv(task, suite(task.suite).horizon, views)
    from worldvla.sim.tabletop.env import TabletopEnv

    return TabletopEnv(task, suite(task.suite).horizon, views)


def check_drawing(name: str, views: Mapping[str, tuple[int, int]] | None) -> None:
    """Raise ValueError where no OpenGL draws `views` of suite `name` (None: the default ones)."""
    if suite(name).simulator == "libero":
        from worldvla.sim.libero import opengl

        opengl.choose(rendering=views is None or bool(views))


def expert(env: "gym.Env[Any, Any]") -> Expert:
    """Return the scripted expert of the environment's task."""
    task: Task = env.task  # pyright: ignore[reportAttributeAccessIssue]
    if suite(task.suite).simulator == "tabletop":
        from worldvla.sim.tabletop.expert import TabletopExpert as make_expert
    else:
        from worldvla.sim.libero.expert import LiberoExpert as make_expert
    simulator: Any = env
    return make_expert(simulator)
