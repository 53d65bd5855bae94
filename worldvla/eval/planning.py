"""A policy that thinks first: draw some chunks, imagine each, execute the one whose end is nearest success.

The world model imagines codes alone; a judge (eval/judge.py) says how near success they are. Dims: B
observations, N chunks of each, U actions of a chunk, A action dims.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldvla.eval.actors import ModelActor, Query
from worldvla.eval.judge import Judge, check_policy, encoded
from worldvla.infer.model import load
from worldvla.infer.world import World

TEMPERATURE = 1.0
"""Of the chunks that are drawn."""


class PlanningActor(ModelActor):
    """`chunks`: N, the likeliest chunk and N - 1 drawn. `judge`: weights that `worldvla rank` or `improve`
    left, which fit `world`. `dtype` of the world model's transformer."""

    name = "planning"

    def __init__(
        self,
        checkpoint: Path | str,
        world: Path | str,
        judge: Path,
        chunks: int,
        dtype: str = "float32",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(checkpoint, **options)
        if chunks < 2:
            raise ValueError(f"planning chooses among at least 2 chunks, got {chunks}")
        self.world, self.dtype = load(world, dtype=getattr(torch, dtype)), dtype
        self.chunks = chunks
        self.judge, self._facts = Judge.load(judge, self.world)
        check_policy(self.model, self.world)
        self._tasks = {(task.suite, task.name): i for i, task in enumerate(self.judge.tasks)}
        self._rng = np.random.default_rng(seed)
        self._first: dict[tuple[str, str, int], np.ndarray] = {}
        """Codes (N,) of the first frame of the episodes that run."""
        self.seconds, self.decisions = 0.0, 0

    def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
        began, observations = time.perf_counter(), [query.observation for query in queries]
        numbers = np.repeat([self._number(query) for query in queries], self.chunks)
        first = np.repeat(self._first_codes(queries), self.chunks, axis=0)
        drawn = [o for o in observations for _ in range(self.chunks - 1)]
        seeds = self._rng.integers(0, 2**31, len(drawn)).tolist()
        likeliest = np.stack([actions for actions in super().act(queries) if actions is not None])
        others = self._policy.act(drawn, TEMPERATURE, seeds)[:, : self.execute]
        plans = np.concatenate((likeliest[:, None], others.reshape(len(queries), -1, *others.shape[1:])), 1)
        world, (_, _, length, _) = World(self.world), plans.shape
        world.reset(
            {name: np.stack([o[name] for o in observations]) for name in (*self.world.view_sizes, "state")}
        )
        world.keep(np.repeat(np.arange(len(queries)), self.chunks))
        for t in range(length):
            world.advance(plans[:, :, t].reshape(len(numbers), -1))
        codes = np.concatenate([grid.reshape(len(grid), -1) for grid in world.codes.values()], 1)
        value = self.judge.value(codes, first, numbers, world.state)
        best = value.reshape(len(queries), -1).argmax(1)
        self.seconds += time.perf_counter() - began
        self.decisions += len(queries)
        return list(plans[np.arange(len(queries)), best])

    def _number(self, query: Query) -> int:
        number = self._tasks.get((query.task.suite, query.task.name))
        if number is None:
            known = ", ".join(sorted({task.suite for task in self.judge.tasks}))
            raise ValueError(f"the judge knows no {query.task.suite}: give one of it, this is of {known}")
        return number

    def _first_codes(self, queries: Sequence[Query]) -> np.ndarray:
        keys = [(query.task.suite, query.task.name, query.init) for query in queries]
        new = [(key, q.observation) for key, q in zip(keys, queries, strict=True) if q.step == 0]
        if new:
            frames = {v: np.stack([o[v] for _, o in new]) for v in self.world.view_sizes}
            self._first |= dict(zip((key for key, _ in new), encoded(self.world, frames), strict=True))
        return np.stack([self._first[key] for key in keys])

    def identity(self) -> dict[str, Any]:
        plan = {
            "chunks": self.chunks,
            "temperature": TEMPERATURE,
            "dtype": self.dtype,
            "judge": self._facts["errors"],
        }
        return {**super().identity(), "planning": {**plan, "world": self.world.identity()["digest"]}}

    def describe(self) -> dict[str, Any]:
        spent = {"ms_a_decision": round(1000 * self.seconds / self.decisions, 1)} if self.decisions else {}
        return {**super().describe(), **spent}
