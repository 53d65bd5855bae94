"""The protocol of a simulator and the table of suites. Nothing under `sim` imports torch.

An environment is a `gymnasium.Env` whose observation is `{"<view>": uint8 (Y, X, 3), ..., "state": float32
(8,)}` and whose
action is float32 (7,) in [-1, 1], LIBERO's convention: end-effector position delta (1.0 = 5 cm), rotation
delta (axis-angle,
1.0 = 0.5 rad), gripper (-1 open, +1 closed). State: end-effector position (m, 3), orientation (axis-angle,
rad, 3), finger
joint positions (m, 2). `reset(options={"init": i})` starts from the i-th fixed initial state; `step`
returns reward 1.0 and
terminated=True on success; `info` holds `success` and `grasped` (target object held now) as bools.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import gymnasium as gym

VIEWS = ("agentview", "wrist")
NUM_ACTION_DIMS = 7
NUM_STATE_DIMS = 8
NUM_INITS = 50


@dataclass(frozen=True)
class Task:
    """One task of a suite, as the user of a simulator sees it."""

    suite: str
    index: int
    name: str
    """Stable file-name-safe name."""
    instruction: str


def with_scene(instruction: str, task: str) -> str:
    """Return the instruction behind the scene that the task's name starts with, if it does: "KITCHEN SCENE3
    turn on ...", the prompts that the released LIBERO-10 checkpoints were trained on (WorldVLA
    data/action_model_conv_generation.py:58); the published evaluation leaves the scene out."""
    scene = re.match(r"[A-Z_]+SCENE\d+(?=_)", task)
    return f"{scene[0].replace('_', ' ')} {instruction}" if scene else instruction


@dataclass(frozen=True)
class Rules:
    """How every episode of a simulator starts and is seen, whatever its suite."""

    settling: int
    """Steps at rest before the first observation, while things fall into place; not counted as steps."""
    views: Mapping[str, tuple[int, int]]
    """View -> (rows, columns) in pixels, where none are asked for."""
    demonstrations: Mapping[str, tuple[int, int]]
    """The same of demonstrations that are collected."""
    source: str


_TABLETOP_VIEWS = {"agentview": (64, 64), "wrist": (32, 32)}
RULES = {
    "tabletop": Rules(0, _TABLETOP_VIEWS, _TABLETOP_VIEWS, "ours"),
    "libero": Rules(
        10,
        {"agentview": (256, 256), "wrist": (256, 256)},
        {"agentview": (128, 128), "wrist": (128, 128)},
        "openpi examples/libero/main.py: num_steps_wait, LIBERO_ENV_RESOLUTION; "
        "LIBERO scripts/create_dataset.py: camera_heights, camera_widths",
    ),
}
INITIAL_STATES = "the stored one with the episode's index, simulator reseeded before every episode"
"""An index that counts across episodes starts elsewhere (lerobot#4152), and so does a seed set once a task
(openvla#342)."""


@dataclass(frozen=True)
class Suite:
    name: str
    simulator: str
    """`tabletop` or `libero`."""
    horizon: int
    """Steps after which an episode has failed, settling excluded."""
    source: str
    """Where the horizon comes from."""
    base: str = ""
    """For a perturbed suite of LIBERO-PRO: the suite that it perturbs."""

    @property
    def rules(self) -> Rules:
        return RULES[self.simulator]


PUBLISHED = "WorldVLA libero_util; openpi examples/libero/main.py"
SUITES = {
    suite.name: suite
    for suite in (
        Suite("tabletop_spatial", "tabletop", 80, "ours"),
        Suite("tabletop_object", "tabletop", 80, "ours"),
        Suite("tabletop_goal", "tabletop", 80, "ours"),
        Suite("tabletop_long", "tabletop", 160, "ours"),
        Suite("libero_spatial", "libero", 220, PUBLISHED),
        Suite("libero_object", "libero", 280, PUBLISHED),
        Suite("libero_goal", "libero", 300, PUBLISHED),
        Suite("libero_10", "libero", 520, PUBLISHED),
        Suite("libero_90", "libero", 400, "openpi examples/libero/main.py; openvla run_libero_eval.py"),
    )
}
PERTURBATIONS = ("lan", "object", "swap", "task")
"""LIBERO-PRO's: another wording; other looks of things; other places; another goal with its own wording."""
SUITES |= {
    f"{name}_{kind}": replace(
        SUITES[name], name=f"{name}_{kind}", source=f"that of {name}; LIBERO-PRO README", base=name
    )
    for name in ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    for kind in PERTURBATIONS
}


class Environment(Protocol):
    """What rollout, collect and replay need of a simulator's environment (a `gymnasium.Env` for one task)."""

    task: Task
    horizon: int
    rendering: bool
    """Set False to step without cameras: observations then hold the state alone."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]: ...
    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]: ...
    def observe(self) -> dict[str, Any]:
        """Return the current observation, rendered whatever `rendering` says."""
        ...

    def get_state(self) -> Any:
        """Return the full simulator state, float64 (S,)."""
        ...

    def set_state(self, state: Any) -> None: ...
    def close(self) -> None: ...


class Expert(Protocol):
    """A scripted policy with privileged access; a function of the measured state alone, so it can label any
    visited state."""

    def act(self) -> Any:
        """Return the action (7,) float32 for the environment's current state."""
        ...


def suite(name: str) -> Suite:
    """Return the suite called `name`; an unknown name raises ValueError that offers the nearest ones."""
    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, n=3, cutoff=0.4) or list(SUITES)
        raise ValueError(f"unknown suite {name!r}; did you mean {', '.join(near)}?")
    return SUITES[name]


def protocol(name: str, views: Mapping[str, tuple[int, int]], fast_render: bool = False) -> dict[str, Any]:
    """Return what a record says of how episodes of suite `name` started, were seen and ended."""
    row = suite(name)
    return {
        "reset": INITIAL_STATES,
        "settling": row.rules.settling,
        "horizon": row.horizon,
        "views": {view: list(size) for view, size in views.items()},
        "fast_render": fast_render,
    }


def spaces(views: Mapping[str, tuple[int, int]]) -> "tuple[gym.spaces.Dict, gym.spaces.Box]":
    """Return the observation and the action space of an environment with these views."""
    import gymnasium as gym
    import numpy as np

    parts: dict[str, Any] = {v: gym.spaces.Box(0, 255, (*size, 3), np.uint8) for v, size in views.items()}
    parts["state"] = gym.spaces.Box(-np.inf, np.inf, (NUM_STATE_DIMS,), np.float32)
    return gym.spaces.Dict(parts), gym.spaces.Box(-1.0, 1.0, (NUM_ACTION_DIMS,), np.float32)


def init_index(options: Mapping[str, Any] | None, random: Any) -> int:
    """Return the initial state that `reset` was asked for, or one of the fixed ones drawn by `random`."""
    init = (options or {}).get("init")
    index = int(random.integers(NUM_INITS)) if init is None else int(init)
    if index < 0:
        raise ValueError(f"init must be >= 0, got {index}")
    return index


def tasks(name: str) -> tuple[Task, ...]:
    """Return the tasks of a suite in their fixed order."""
    if suite(name).simulator == "tabletop":
        from worldvla.sim.tabletop.tasks import tasks as list_tasks
    else:
        from worldvla.sim.libero import tasks as list_tasks
    return list_tasks(name)


def make(
    task: Task, views: dict[str, tuple[int, int]] | None = None, fast_render: bool = False
) -> "gym.Env[Any, Any]":
    """Return a fresh environment of `task`. `views` maps a view to its (rows, columns) in pixels; None: the
    simulator's default.

    Without views the environment renders nothing (physics only), and observations hold the state alone.
    `fast_render`: LIBERO without multisampling, reflections and shadows; not the published pictures.
    """
    if suite(task.suite).simulator == "libero":
        from worldvla.sim.libero import LiberoEnv

        return LiberoEnv(task, views, fast_render)
    if fast_render:
        raise ValueError(f"fast_render is a setting of LIBERO; {task.suite} has one way to draw")
    from worldvla.sim.tabletop.env import TabletopEnv

    return TabletopEnv(task, views)


def check_drawing(name: str, views: Mapping[str, tuple[int, int]] | None) -> None:
    """Raise ValueError where no OpenGL draws `views` of suite `name` (None: the default ones)."""
    if suite(name).simulator == "libero":
        from worldvla.sim import opengl

        opengl.choose(rendering=views is None or bool(views))


def expert(env: "gym.Env[Any, Any]") -> Expert:
    """Return the scripted expert of the environment's task."""
    task: Task = env.task  # pyright: ignore[reportAttributeAccessIssue]
    if suite(task.suite).simulator == "tabletop":
        from worldvla.sim.experts.tabletop import TabletopExpert as make_expert
    else:
        from worldvla.sim.experts.libero import LiberoExpert as make_expert
    simulator: Any = env
    return make_expert(simulator)
