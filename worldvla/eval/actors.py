"""Whoever chooses the actions of a rollout: the model, and its baselines. Importing this brings no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from worldvla.sim.protocol import NUM_ACTION_DIMS, Task

CHUNK = 5
"""Steps between two queries of an actor that has no chunk of its own."""


@dataclass(frozen=True)
class Query:
    """One environment that waits for actions."""

    task: Task
    init: int
    step: int
    """Steps executed so far."""
    observation: Mapping[str, Any]
    """As `Policy.act` takes it; without images where the actor needs none."""


class ActorError(ValueError):
    """The actor cannot go on: its message, one line, is why the waiting episodes and the run end."""


class Actor(Protocol):
    """`act` answers all waiting environments at once: actions (n, 7) each, or None, upon which the task's
    expert takes n steps.
    """

    name: str
    views: dict[str, tuple[int, int]]
    """View -> (rows, columns) in pixels that it needs to see; empty: it is blind."""
    history: int
    execute: int
    """n, steps between two queries."""

    def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]: ...
    def identity(self) -> dict[str, Any]:
        """Return what a record names as its checkpoint."""
        ...


class ModelActor:
    name = "model"

    def __init__(
        self,
        checkpoint: Path | str,
        execute: int | None = None,
        device: str = "cpu",
        head: str = "discrete",
        quantize: Literal["", "int8", "int4"] = "",
    ) -> None:
        from worldvla.infer.model import load
        from worldvla.infer.policy import Policy

        self.model = load(checkpoint, device, quantize=quantize)
        self.views = self.model.view_sizes
        layout = self.model.config.layout
        self.history, self.execute = layout.history, layout.chunk if execute is None else execute
        if not 1 <= self.execute <= layout.chunk:
            raise ValueError(
                f"the model gives {layout.chunk} actions at a time, asked to execute {self.execute}: "
                "execute fewer"
            )
        self.example: Mapping[str, Any] | None = None
        """The first observation it saw, for the report."""
        self.head = head
        """Of the model's two: `discrete` or `continuous`."""
        self._policy = Policy(self.model, head)
        self.decoding = self._policy.decoding
        """How it decodes: `side by side`, or why not."""

    def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
        self.example = self.example or queries[0].observation
        return list(self._policy.act([q.observation for q in queries])[:, : self.execute])

    def identity(self) -> dict[str, Any]:
        return self.model.identity()


class Blind:
    """An actor that sees no pictures, one query at a time; `_choose` answers it."""

    name, history, execute = "blind", 1, CHUNK

    def __init__(self) -> None:
        self.views: dict[str, tuple[int, int]] = {}

    def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
        return [self._choose(query) for query in queries]

    def identity(self) -> dict[str, Any]:
        return {"name": self.name}

    def _choose(self, query: Query) -> np.ndarray | None:
        raise NotImplementedError


class ExpertActor(Blind):
    """The scripted expert, which sees the simulator's state: what the suite allows at best."""

    name = "expert"

    def _choose(self, query: Query) -> np.ndarray | None:  # noqa: ARG002
        return None


class RandomActor(Blind):
    """Uniform actions, a function of (seed, task, initial state, step)."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def _choose(self, query: Query) -> np.ndarray:
        rng = np.random.default_rng([self.seed, query.task.index, query.init, query.step])
        return rng.uniform(-1, 1, (self.execute, NUM_ACTION_DIMS)).astype(np.float32)

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "seed": self.seed}


class BlindActor(Blind):
    """The mean trajectory of each task's demonstrations, executed without looking."""

    name = "blind replay"

    def __init__(self, trajectories: Mapping[str, np.ndarray], source: str = "") -> None:
        super().__init__()
        self.trajectories, self.source = dict(trajectories), source

    @classmethod
    def from_demos(cls, directory: Path) -> "BlindActor":
        """Average the episodes of every HDF5 file in `directory`."""
        from worldvla.data.episode import read_episodes

        files = sorted(Path(directory).glob("*.hdf5"))
        if not files:
            raise FileNotFoundError(f"{directory} holds no *.hdf5 files: `worldvla collect` makes them")
        trajectories: dict[str, np.ndarray] = {}
        for file in files:
            episodes = list(read_episodes(file, images=False))
            trajectories[episodes[0].task] = mean_trajectory(
                [e.actions for e in episodes], [e.is_expert for e in episodes]
            )
        return cls(trajectories, str(directory))

    def _choose(self, query: Query) -> np.ndarray:
        if query.task.name not in self.trajectories:
            raise ValueError(
                f"no demonstrations of task {query.task.name!r} in {self.source}: collect the whole suite"
            )
        actions_TA = self.trajectories[query.task.name]
        steps = np.arange(query.step, query.step + self.execute)
        return actions_TA[np.minimum(steps, len(actions_TA) - 1)]

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "demonstrations": self.source}


def mean_trajectory(actions: Sequence[np.ndarray], is_expert: Sequence[np.ndarray]) -> np.ndarray:
    """Return (T, 7) float32, T the longest episode: at each step the mean of the expert's actions of the
    episodes that reach it.

    A step at which no episode has the expert's action repeats the one before.
    """
    longest = max(len(a) for a in actions)
    total, number = np.zeros((longest, actions[0].shape[1])), np.zeros((longest, 1))
    for episode, own in zip(actions, is_expert, strict=True):
        total[: len(episode)][own] += episode[own]
        number[: len(episode)][own] += 1
    reached = np.maximum.accumulate(np.where(number[:, 0] > 0, np.arange(longest), 0))
    return (total / np.maximum(number, 1))[reached].astype(np.float32)
