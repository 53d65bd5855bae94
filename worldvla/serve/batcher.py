"""Requests of many clients -> batches for the one thread that infers.

The thread takes all that wait, the oldest first, at most `max_batch`; while it is busy the next ones gather.
When it is idle a request waits for company, at most `wait_s`, and only while other clients that have asked
before are still to ask again.
"""

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Observation = dict[str, Any]
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class LateError(Exception):
    """The answer would come after the request's deadline."""


@dataclass
class Histogram:
    """A Prometheus histogram: `bounds` in ascending order, above them one more bucket."""

    bounds: Sequence[float]
    total: float = 0.0
    counts: Counter[int] = field(default_factory=Counter)

    def add(self, value: float) -> None:
        self.total += value
        self.counts[sum(value > bound for bound in self.bounds)] += 1

    def lines(self, name: str) -> list[str]:
        below = itertools.accumulate(self.counts[i] for i in range(len(self.bounds) + 1))
        edges = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        buckets = [f'{name}_bucket{{le="{edge}"}} {n}' for edge, n in zip(edges, below, strict=True)]
        count = self.counts.total()
        return [f"# TYPE {name} histogram", *buckets, f"{name}_sum {self.total:.6f}", f"{name}_count {count}"]


@dataclass(frozen=True)
class Answer:
    """Actions (U, 7), and what they cost."""

    actions: np.ndarray
    queue_s: float
    infer_s: float
    """Of the whole batch."""
    batch: int


@dataclass
class _Job:
    observation: Observation
    arrival: float
    deadline: float
    future: "asyncio.Future[Answer]"


class Batcher:
    """`act`: observations -> actions (B, U, 7). Lives on one event loop, where `run` is a task."""

    def __init__(
        self,
        act: Callable[[Sequence[Observation]], np.ndarray],
        max_batch: int,
        wait_s: float,
    ) -> None:
        self.act, self.max_batch, self.wait_s = act, max_batch, wait_s
        self.active = 0
        """Clients that have asked before and are still there: how many may ask at a time."""
        self.failures = 0
        """Batches in succession of which no request was answered, each by a fault of ours."""
        self.queue_s = Histogram(SECONDS)
        self.sizes = Histogram((1, 2, 4, 8, 16, 32, 64))
        self._jobs: deque[_Job] = deque()
        self._has_news = asyncio.Event()
        self._began: float | None = None

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def busy_s(self) -> float:
        """Seconds that the running batch has taken; 0 while nothing runs."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    async def ask(self, observation: Observation, deadline: float) -> Answer:
        """Return the answer, or raise LateError after `deadline` (time.monotonic). Skipped if cancelled."""
        job = _Job(observation, time.monotonic(), deadline, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._has_news.set()
        return await job.future

    async def run(self) -> None:
        """Answer until cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "inference") as thread:
            while True:
                jobs = await self._gather()
                self._began = start = time.monotonic()
                results = await loop.run_in_executor(thread, self._compute, [job.observation for job in jobs])
                end, self._began = time.monotonic(), None
                is_dead = not any(isinstance(r, np.ndarray | ValueError) for r in results)
                self.failures = self.failures + 1 if is_dead else 0
                self.sizes.add(len(jobs))
                for job, result in zip(jobs, results, strict=True):
                    self.queue_s.add(start - job.arrival)
                    if job.future.done():  # its client has left
                        continue
                    if isinstance(result, Exception):
                        job.future.set_exception(result)
                    elif end > job.deadline:
                        job.future.set_exception(_late(job, end))
                    else:
                        answer = Answer(result, start - job.arrival, end - start, len(jobs))
                        job.future.set_result(answer)

    async def _gather(self) -> list[_Job]:
        """Wait for requests; return those that are still wanted, at most `max_batch`."""
        while True:
            while not self._jobs:
                await self._news(None)
            until = self._jobs[0].arrival + self.wait_s
            while len(self._jobs) < min(self.max_batch, self.active) and time.monotonic() < until:
                await self._news(until - time.monotonic())
            jobs: list[_Job] = []
            while self._jobs and len(jobs) < self.max_batch:
                job, now = self._jobs.popleft(), time.monotonic()
                if job.future.done():
                    continue
                if now > job.deadline:
                    job.future.set_exception(_late(job, now))
                else:
                    jobs.append(job)
            if jobs:
                return jobs

    async def _news(self, timeout_s: float | None) -> None:
        self._has_news.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._has_news.wait()
        except TimeoutError:
            return

    def _compute(self, observations: Sequence[Observation]) -> list[np.ndarray | Exception]:
        """Return each one's actions, or what went wrong: what breaks a batch is asked again one by one."""
        try:
            answers = list(self.act(observations))
            if len(answers) != len(observations):
                raise RuntimeError(f"{len(answers)} answers to {len(observations)} requests")
            return answers
        except Exception as error:  # goes to its client
            if len(observations) == 1:
                return [error]
        return [result for observation in observations for result in self._compute([observation])]


def _late(job: _Job, now: float) -> LateError:
    return LateError(
        f"late by {1000 * (now - job.deadline):.0f} ms: send newer pictures, or a longer deadline_ms"
    )
