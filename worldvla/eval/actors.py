"""Whoever chooses the actions of a rollout: the model, and its baselines. Importing this brings no torch."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from worldvla.sim.protocol import NUM_ACTION_DIMS, Task
from worldvla.sim.suites import SUITES, suite

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


class Actor:
    """Answers all waiting environments at once; a subclass gives `act`."""

    name = "actor"
    views: Mapping[str, tuple[int, int]] = {}
    """View -> (rows, columns) in pixels that it needs to see; empty: it sees nothing."""
    history = 1
    execute = CHUNK
    """Replan interval: steps between two queries."""
    example: Mapping[str, Any] | None = None
    """The first observation that it was shown, where `write_example` reads one."""

    def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
        """Return actions (execute, A) for each, or None: the task's expert takes `execute` steps."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Return what a record names as its checkpoint."""
        return {"name": self.name}

    def describe(self) -> dict[str, Any]:
        """Return what a record's protocol says of how it chooses actions."""
        return {}

    def timing(self) -> dict[str, Any]:
        """Return what a record says of the time that it took, beyond that of each episode."""
        return {}

    def write_example(self, directory: Path) -> None:
        """Write an observation as the actor reads it, for the page; most read none."""


class ModelActor(Actor):
    name = "model"

    def __init__(
        self,
        checkpoint: Path | str,
        execute: int | None = None,
        device: str = "cpu",
        head: str = "discrete",
        quantize: Literal["", "int8", "int4"] = "",
        unnorm_key: str = "",
    ) -> None:
        from worldvla.infer.model import load
        from worldvla.infer.policy import Policy

        self.model = load(checkpoint, device, quantize=quantize, unnorm_key=unnorm_key)
        _ = self.model.builder.statistics  # of one dataset, or an error that says how to choose
        self.views = self.model.view_sizes
        layout = self.model.config.layout
        self.history, self.execute = layout.history, layout.chunk if execute is None else execute
        if not 1 <= self.execute <= layout.chunk:
            raise ValueError(
                f"the model gives {layout.chunk} actions at a time, asked to execute {self.execute}: "
                f"--execute takes 1 to {layout.chunk}"
            )
        self.head = head
        self._policy = Policy(self.model, head)

    def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
        if self.example is None:
            self.example = queries[0].observation
            self._warn_of_an_unseen_suite(queries)
        return list(self._policy.act([q.observation for q in queries])[:, : self.execute])

    def _warn_of_an_unseen_suite(self, queries: Sequence[Query]) -> None:
        """Write to stderr how well first frames survive the image tokenizer, where the names of the stores
        that the model was trained on name other suites than this one."""
        row = suite(queries[0].task.suite)
        stores = [Path(store).name for store in self.model.config.data.stores]
        seen = sorted(name for name in SUITES if any(store.endswith(name) for store in stores))
        if not seen or row.name in seen or row.base in seen:
            return
        frames = [query.observation for query in queries]
        errors = []
        for view, images in self.model.decode_frames(self.model.encode_frames(frames)).items():
            true = np.stack([frame[view] for frame in frames]).astype(np.float64)
            errors.append(f"{view} {10 * np.log10(255**2 / np.square(true - images).mean()):.1f} dB")
        sys.stderr.write(
            f"warning: {self.model.config.name} was trained on {', '.join(seen)}, not on {row.name}; "
            f"PSNR of its first frames through the image tokenizer: {', '.join(errors)}\n"
        )

    def identity(self) -> dict[str, Any]:
        return self.model.identity()

    def describe(self) -> dict[str, Any]:
        return {"head": self.head, "decoding": self._policy.decoding}

    def write_example(self, directory: Path) -> None:
        from worldvla.eval.tokens import write_example

        if self.example is not None:
            write_example(directory, self.model, self.example, self.head)


class ExpertActor(Actor):
    """The scripted expert, which sees the simulator's state: what the suite allows at best."""

    name = "expert"

    def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
        return [None] * len(queries)


class RandomActor(Actor):
    """Uniform actions, a function of (seed, task, initial state, step)."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
        places = [[self.seed, q.task.index, q.init, q.step] for q in queries]
        shape = (self.execute, NUM_ACTION_DIMS)
        return [np.random.default_rng(place).uniform(-1, 1, shape).astype(np.float32) for place in places]

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "seed": self.seed}


class OpenLoopActor(Actor):
    """The mean trajectory of each task's demonstrations, whatever happens."""

    name = "open-loop"

    def __init__(self, trajectories: Mapping[str, np.ndarray], source: str = "") -> None:
        self.trajectories, self.source = dict(trajectories), source

    @classmethod
    def from_demos(cls, directory: Path) -> "OpenLoopActor":
        """Average the episodes of every HDF5 file in `directory`."""
        from worldvla.data.episode import demonstration_files, read_episodes

        by_task: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for file in demonstration_files([directory]):
            for episode in read_episodes(file, images=False):
                by_task.setdefault(episode.task, []).append((episode.actions, episode.is_expert))
        means = {task: mean_trajectory(*zip(*own, strict=True)) for task, own in by_task.items()}
        return cls(means, str(directory))

    def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
        return [self._act(query) for query in queries]

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "demonstrations": self.source}

    def _act(self, query: Query) -> np.ndarray:
        if query.task.name not in self.trajectories:
            raise ValueError(
                f"no demonstrations of task {query.task.name!r} in {self.source}: collect the whole suite"
            )
        actions_TA = self.trajectories[query.task.name]
        steps = np.arange(query.step, query.step + self.execute)
        return actions_TA[np.minimum(steps, len(actions_TA) - 1)]


def mean_trajectory(actions: Sequence[np.ndarray], is_expert: Sequence[np.ndarray]) -> np.ndarray:
    """Return (T, 7) float32, T the longest episode: at each step the mean of the expert's actions of the
    episodes that reach it.

    A step at which no episode has the expert's action repeats the one before.
    """
    longest = max(len(a) for a in actions)
    total, number = np.zeros((longest, actions[0].shape[1])), np.zeros((longest, 1))
    for episode, is_own in zip(actions, is_expert, strict=True):
        total[: len(episode)][is_own] += episode[is_own]
        number[: len(episode)][is_own] += 1
    reached = np.maximum.accumulate(np.where(number[:, 0] > 0, np.arange(longest), 0))
    return (total / np.maximum(number, 1))[reached].astype(np.float32)
