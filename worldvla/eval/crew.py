"""A policy and its environments roll episodes out: one crew on this machine, or one on each of a cluster's.

Where simulation is cheap all environments are answered at once, in lockstep; where it is dear (LIBERO), each
as soon as it asks. In both the record is a function of the arguments.
"""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from worldvla.cluster import Cluster
from worldvla.eval.actors import Actor, ActorError, Query
from worldvla.eval.record import placeless
from worldvla.eval.workers import PATIENCE_S, Job, Report, Settings, Worker, open_workers
from worldvla.machine import cores
from worldvla.sim.protocol import Task

OnEnd = Callable[[Job, Report, float, list[dict[str, np.ndarray]]], None]
"""(job, last report, seconds, film)"""
MOST_AT_ONCE = 1
"""Queries answered together out of lockstep. One: the record is then a function of the arguments, as it is in
lockstep, because no answer depends on who else was waiting."""


def roll_out(
    actor: Actor,
    jobs: Sequence[Job],
    settings: Settings,
    workers: int,
    on_end: OnEnd,
    patience_s: float = PATIENCE_S,
) -> None:
    """Run every job to its end; `on_end` is called once for each."""
    with open_workers(min(workers, len(jobs)), settings, patience_s) as pool:
        roll_out_in(pool, actor, jobs, on_end)


def roll_out_in(pool: Sequence[Worker], actor: Actor, jobs: Sequence[Job], on_end: OnEnd) -> None:
    """As `roll_out`, in workers that are there."""
    waiting, lockstep = list(jobs), pool[0].settings.lockstep
    arrived: dict[Worker, Report] = {}
    with _spared_cores(0 if lockstep else len(pool)):

        def begin() -> None:
            for worker in pool:
                if worker.job is None and waiting:
                    worker.begin(_next(waiting, worker.task, {w.task for w in pool}))

        begin()
        while busy := [w for w in pool if w.job is not None]:
            silent = [w for w in busy if w not in arrived]
            if silent and (lockstep or not arrived):
                left = min(w.deadline for w in silent) - time.monotonic()
                wait([w.connection for w in silent], max(0.0, left))
            arrived |= {w: report for w in silent if (report := w.poll()) is not None}
            if lockstep and len(arrived) < len(busy):
                continue
            for worker in [w for w in pool if w in arrived and arrived[w].status != "running"]:
                report, job, worker.job = arrived.pop(worker), worker.job, None
                assert job is not None
                on_end(job, report, time.monotonic() - worker.started, worker.film)
            begin()  # before the actor computes: the others' simulators go on meanwhile
            asking = [w for w in pool if w in arrived] if lockstep else list(arrived)[:MOST_AT_ONCE]
            if not asking:
                continue
            queries = [_query(w, arrived.pop(w)) for w in asking]
            asked = time.monotonic()
            try:
                answers = actor.act(queries)
            except ActorError as error:  # nobody else can go on either
                steps = dict(zip(asking, (q.step for q in queries), strict=True))
                steps |= {w: report.steps for w, report in arrived.items()}
                for worker in pool:
                    if worker.job is not None:
                        report = Report("error", reason=str(error), steps=steps.get(worker, 0))
                        on_end(worker.job, report, time.monotonic() - worker.started, worker.film)
                raise
            for worker, actions in zip(asking, answers, strict=True):
                worker.policy_s += (time.monotonic() - asked) / len(asking)
                worker.send(actor.execute if actions is None else actions)


@contextmanager
def _spared_cores(busy: int) -> Iterator[None]:
    """Leave `busy` cores to the workers: threads of torch that wait for one another spin, and a small model's
    query costs eight times the processor time where they do so beside busy workers.
    """
    torch = sys.modules.get("torch")  # absent where the actor needs none
    before = torch.get_num_threads() if torch else 1
    if torch:
        torch.set_num_threads(min(before, max(1, cores() - busy)))
    try:
        yield
    finally:
        if torch:
            torch.set_num_threads(before)


def _query(worker: Worker, report: Report) -> Query:
    assert worker.job is not None
    return Query(worker.job.task, worker.job.init, report.steps, report.observation)


def _next(waiting: list[Job], task: Task | None, taken: set[Task | None]) -> Job:
    """Take one of the same task, else one of a task that no worker has: an environment is dear to make."""
    same = (i for i, job in enumerate(waiting) if job.task == task)
    free = (i for i, job in enumerate(waiting) if job.task not in taken)
    return waiting.pop(next(same, next(free, 0)))


# -- on a cluster -------------------------------------------------------------------------------------------

PORTION = 4
"""Episodes an environment that a crew is given at a time, at most: those are lost with it."""


@dataclass(frozen=True)
class Crew:
    """What a process of a cluster needs to know to roll episodes out; travels with each portion of them.

    Pictures stay there, where the policy is: only ends and films come back.
    """

    open_actor: Callable[[], Actor]
    """Importable, as `settings.make`; reads a checkpoint from a file system that all nodes see."""
    identity: Mapping[str, Any]
    """The actor's, as it is known here."""
    settings: Settings
    workers: int
    patience_s: float
    key: float = field(default_factory=time.time)
    """Another one means another crew."""

    def roll_out(self, cluster: Cluster, jobs: Sequence[Job], on_end: OnEnd) -> Mapping[str, Any] | None:
        """As `roll_out`, in portions; return the first portion's example of what the actor was shown."""
        size = max(1, min(PORTION * self.workers, len(jobs) // (2 * cluster.processes)))
        jobs = sorted(jobs, key=lambda job: job.init)  # of many tasks: an environment is dear to make
        portions = [jobs[i : i + size] for i in range(0, len(jobs), size)]
        futures = [cluster.submit(_roll_portion, self, portion) for portion in portions]
        for future in as_completed(futures):
            ends, stopped, said, _ = future.result()
            for end in ends:
                on_end(*end)
            sys.stderr.write(said)
            if stopped:
                raise ActorError(stopped)
        return futures[0].result()[3]


_here: list[tuple[float, Actor, list[Worker]]] = []
"""This process's crew."""
Portion = tuple[list[tuple[Job, Report, float, list[Any]]], str, str, Mapping[str, Any] | None]
"""How the episodes ended, why the actor cannot go on, its warnings, its example."""


def _roll_portion(crew: Crew, jobs: Sequence[Job]) -> Portion:
    ends, stopped = [], ""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        actor, pool = _join(crew)
        try:
            roll_out_in(pool, actor, jobs, lambda *end: ends.append(end))
        except ActorError as error:
            stopped = str(error)
    # A report's observation is of no use any more, and large.
    ends = [(job, replace(report, observation={}, frames=[]), *rest) for job, report, *rest in ends]
    return ends, stopped, said.getvalue(), actor.example


def _join(crew: Crew) -> tuple[Actor, list[Worker]]:
    """Return the policy and the environments of this process, made where it has none of this crew."""
    if not _here or _here[0][0] != crew.key:
        for worker in _here.pop()[2] if _here else ():
            worker.stop()
        actor = crew.open_actor()
        there, here = placeless(actor.identity()), placeless(crew.identity)
        if there != here:
            raise ValueError(f"the actor is another one here: {there}, expected {here}")
        _here.append((crew.key, actor, [Worker(crew.settings, crew.patience_s) for _ in range(crew.workers)]))
    return _here[0][1:]
