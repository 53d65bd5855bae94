"""What a real arm needs beside a policy: targets made of differences, and limits that hold. NumPy alone.

    with Guard(Limits(low=[-90] * 6, high=[90] * 6, step=5), measure, move) as guard:
        guard.send(target)

Numbers are in the units of the arm's actions. Dims: A numbers of an action.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SHARES = 16
"""Parts of a step that are tried at the border of the workspace."""


def delta_dims(actions: Sequence[str], states: Sequence[str]) -> dict[int, int]:
    """Return action dim -> state dim of the same name, or at the same place where the two share no name.

    Grippers stay as they are: their command is no motion.
    """
    shared = {name: i for i, name in enumerate(states)} if set(actions) & set(states) else {}
    places = shared or {name: i for i, name in enumerate(actions[: len(states)])}
    return {
        i: places[name] for i, name in enumerate(actions) if name in places and "grip" not in name.lower()
    }


@dataclass(frozen=True)
class Deltas:
    """Which numbers of an action are differences to the state at its step (`worldvla tokenize --delta`)."""

    pairs: Mapping[int, int]
    """Action dim -> state dim."""

    @classmethod
    def of(cls, features: Mapping[str, Any]) -> "Deltas":
        """`features`: those of a checkpoint's manifest, or of a server's metadata; of a model of several
        datasets those of one, features["datasets"][unnorm_key]."""
        if "datasets" in features:
            raise ValueError(f"features of the datasets {list(features['datasets'])}: expected those of one")
        if not (delta := features.get("delta")):
            return cls({})
        names = features["action_names"]
        pairs = delta_dims(names, features["state_names"])
        return cls({i: state for i, state in pairs.items() if names[i] in delta})

    def add(self, actions: Any, states: Any) -> Any:
        """Return targets (..., A): the actions with the state of their own step added; arrays or tensors."""
        targets = actions + 0
        targets[..., list(self.pairs)] += states[..., list(self.pairs.values())]
        return targets


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Where an arm may go in one control step."""

    low: Sequence[float]
    high: Sequence[float]
    """Of each target."""
    step: float | Sequence[float]
    """Farthest from the measured position, of all targets or of each."""
    workspace: tuple[Sequence[float], Sequence[float]] | None = None
    """Two corners of the box that the hand stays in, metres; with `position`."""
    position: Callable[[np.ndarray], np.ndarray] | None = None
    """Joints -> where the hand is, metres (3,)."""

    def __post_init__(self) -> None:
        if not (np.asarray(self.low) < np.asarray(self.high)).all() or (np.asarray(self.step) <= 0).any():
            raise ValueError(
                f"limits {self.low} to {self.high}, step {self.step}: expected low < high, step > 0"
            )
        if (self.workspace is None) != (self.position is None):
            raise ValueError("a workspace needs to know where the hand is: give both, workspace and position")

    def clip(self, target: Sequence[float] | np.ndarray, measured: np.ndarray) -> np.ndarray:
        """Return the target (A,) nearest to `target` that is allowed from where the arm is measured to be.

        At the border of the workspace the arm goes as far along its step as the hand stays inside; a hand
        that is outside already may only come nearer. A number that is not finite raises ValueError.
        """
        target = np.asarray(target, dtype=np.float64)
        if target.shape != measured.shape or not np.isfinite(target).all():
            raise ValueError(f"target {target}: expected {measured.shape[0]} finite numbers")
        if not np.isfinite(measured).all():
            raise ValueError(f"the arm is measured to be at {measured}: expected finite numbers")
        step = np.clip(np.clip(target, self.low, self.high) - measured, np.negative(self.step), self.step)
        shares = np.linspace(1, 0, SHARES + 1)
        farthest = self._outside(measured)
        return measured + next(s for s in shares if self._outside(measured + s * step) <= farthest) * step

    def _outside(self, joints: np.ndarray) -> float:
        """Return how far the hand is out of the workspace, metres."""
        if self.workspace is None or self.position is None:
            return 0.0
        hand = self.position(joints)
        return float(np.linalg.norm(hand - np.clip(hand, *np.sort(self.workspace, axis=0))))


class Guard:
    """Moves an arm within its limits, and holds it where it is when the block ends: by a lost connection, any
    other error, or Ctrl-C."""

    def __init__(
        self, limits: Limits, measure: Callable[[], np.ndarray], move: Callable[[np.ndarray], Any]
    ) -> None:
        self.limits, self.measure, self.move = limits, measure, move

    def send(self, target: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the target that was sent."""
        allowed = self.limits.clip(target, self.measure())
        self.move(allowed)
        return allowed

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, *_: object) -> None:
        self.move(self.measure())
