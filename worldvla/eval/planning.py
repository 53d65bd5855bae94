"""A policy that thinks first: draw some chunks, imagine each, execute the one whose end is nearest success.

The world model imagines the codes of each and, if asked, of what the policy would do after it; a judge
(eval/judge.py) says how near success the last ones are. Dims: B observations, N chunks of each, U actions of
a chunk, A action dims.
"""

import math
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


class PlanningActor(ModelActor):
    """`chunks`: N, the likeliest chunk and N - 1 drawn, at `temperature`; 0: all the likeliest. `spread`:
    standard deviation, in the units of actions, of one vector that is added to the first three dims of all
    actions of a drawn chunk, so that it leads elsewhere. `ahead`: how many chunks are imagined; those after
    the first are the likeliest. `judge`: weights that `worldvla rank` or `improve` left, which fit `world`.
    `dtype` of the world model's transformer."""

    name = "planning"

    def __init__(
        self,
        checkpoint: Path | str,
        world: Path | str,
        judge: Path,
        chunks: int,
        temperature: float = 1.0,
        spread: float = 0.0,
        ahead: int = 1,
        dtype: str = "float32",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(checkpoint, **options)
        if chunks < 2:
            raise ValueError(f"planning chooses among at least 2 chunks, got {chunks}")
        if ahead < 1 or not (0 <= temperature < math.inf and 0 <= spread < math.inf):
            raise ValueError(
                "expected --ahead >= 1 and --temperature and --spread from 0 on, got "
                f"{ahead}, {temperature} and {spread}"
            )
        if not (temperature or spread):
            raise ValueError("all chunks would be the same: give a --temperature or a --spread above 0")
        self.temperature, self.spread, self.ahead = temperature, spread, ahead
        self.world, self.dtype = load(world, dtype=getattr(torch, dtype)), dtype
        self.chunks = chunks
        self.judge, self._facts = Judge.load(judge, self.world)
        check_policy(self.model, self.world)
        self._tasks = {(task.suite, task.name): i for i, task in enumerate(self.judge.tasks)}
        self.seed = seed
        self._first: dict[tuple[str, str, int], np.ndarray] = {}
        """Codes (N,) of the first frame of the episodes that run."""
        self.seconds, self.decisions = 0.0, 0

    def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
        began, observations = time.perf_counter(), [query.observation for query in queries]
        numbers = np.repeat([self._number(query) for query in queries], self.chunks)
        first = np.repeat(self._first_codes(queries), self.chunks, axis=0)
        drawn = [o for o in observations for _ in range(self.chunks - 1)]
        seeds = [n for query in queries for n in self._seeds(query)]
        likeliest = np.stack([actions for actions in super().act(queries) if actions is not None])
        if self.temperature:
            others = self._policy.act(drawn, self.temperature, seeds)[:, : self.execute]
        else:
            others = np.repeat(likeliest, self.chunks - 1, axis=0)
        if self.spread:
            shifts = np.stack([np.random.default_rng(seed).normal(0, self.spread, (1, 3)) for seed in seeds])
            others = others + np.pad(shifts, ((0, 0), (0, 0), (0, others.shape[2] - 3))).astype(np.float32)
            others = np.clip(others, -1, 1)
        plans = np.concatenate((likeliest[:, None], others.reshape(len(queries), -1, *others.shape[1:])), 1)
        value = self._values(queries, plans, first, numbers)
        best = value.reshape(len(queries), -1).argmax(1)
        self.seconds += time.perf_counter() - began
        self.decisions += len(queries)
        return list(plans[np.arange(len(queries)), best])

    def _values(
        self, queries: Sequence[Query], plans: np.ndarray, first: np.ndarray, numbers: np.ndarray
    ) -> np.ndarray:
        """Return how near success the end of each of `plans` (B, N, U, A) is, (B N,)."""
        observations = [query.observation for query in queries]
        world, length = World(self.world), plans.shape[2]
        world.reset(
            {name: np.stack([o[name] for o in observations]) for name in (*self.world.view_sizes, "state")}
        )
        world.keep(np.repeat(np.arange(len(queries)), self.chunks))
        actions = plans.reshape(-1, *plans.shape[2:])
        for chunk in range(self.ahead):
            if chunk:
                actions = self._policy.act(self._imagined(world, queries, first, numbers))[:, :length]
            for t in range(length):
                world.advance(actions[:, t])
        return self.judge.value(world.image_codes, first, numbers)

    def _imagined(
        self, world: World, queries: Sequence[Query], first: np.ndarray, numbers: np.ndarray
    ) -> list[dict[str, Any]]:
        """Return what the policy would see and feel now; what the world does not say the judge reads."""
        felt = world.state
        state = self.judge.read(world.image_codes, first, numbers)[0] if felt is None else felt
        frame = {**world.frame(), "state": state}
        texts = np.repeat([query.observation["instruction"] for query in queries], self.chunks)
        rows = [{name: of_name[i] for name, of_name in frame.items()} for i in range(len(texts))]
        return [{**row, "instruction": text} for row, text in zip(rows, texts.tolist(), strict=True)]

    def _seeds(self, query: Query) -> list[int]:
        """Return a seed of each chunk that is drawn, a function of the episode and the step alone."""
        rng = np.random.default_rng([self.seed, query.task.index, query.init, query.step])
        return rng.integers(0, 2**31, self.chunks - 1).tolist()

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
            "temperature": self.temperature,
            **({"spread": self.spread} if self.spread else {}),
            "ahead": self.ahead,
            "dtype": self.dtype,
            "judge": self._facts["errors"],
        }
        return {**super().identity(), "planning": {**plan, "world": self.world.identity()["digest"]}}

    def timing(self) -> dict[str, Any]:
        return {"ms_a_decision": round(1000 * self.seconds / self.decisions, 1)} if self.decisions else {}
