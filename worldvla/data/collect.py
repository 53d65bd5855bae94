"""Episodes of scripted experts, of policies and of play, collected in parallel as LIBERO's HDF5.

`worldvla collect tabletop_object --episodes 50`. The same command again goes on where it stopped: each
attempt leaves a part of its own in `.<task>.parts/` until its file is complete, and the result is the same
as without the stop, for any number of workers. Workers never import torch.

Kind "demonstrations": successes of the expert, or of a policy and the expert in turn (DAgger). Kind "world",
for a world model alone: gross noise, grasps beside the things, play and weak policies as well, failures kept,
no step for a policy; kind "grasps", too: nothing but grasps, which hold or miss.
"""

import itertools
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from worldvla.cluster import Cluster
from worldvla.data.drivers import (
    WORLD_MIX,
    Act,
    DaggerDriver,
    Driver,
    Labeller,
    PerturbedExpert,
    world_driver,
)
from worldvla.data.episode import Episode, facts, read_episodes, write_episodes
from worldvla.files import differing, only_writer, read_json, whole_file, write_json
from worldvla.image import MAX_PIXELS
from worldvla.machine import cores, end_with_parent, version
from worldvla.progress import progress_bar
from worldvla.sim import suites as sim
from worldvla.sim.protocol import NUM_INITS, Expert, Task

FIRST_INIT = NUM_INITS
"""Initial states below are for evaluation alone."""
INITS_PER_SEED = 100_000
MAX_FAILED = 10
"""Failed attempts above one a wanted episode after which the expert is taken to be broken."""
MAX_EPISODES = (INITS_PER_SEED - MAX_FAILED) // 2
"""Of a task: with the failed attempts that are allowed, all begin from initial states of their own seed."""
MOVING = 1e-3
"""Metres that a thing moves in a step, at least, to count as moving."""

Kind = Literal["demonstrations", "world", "grasps"]
Views = dict[str, tuple[int, int]]
LoadPolicy = Callable[[], Act]
"""Importable by a worker; returns what `DaggerDriver.act` is, loaded once a process."""


def record(
    env: Any,
    driver: Driver,
    init: int,
    seed: int,
    label: Labeller | None = None,
    begin: Callable[[], dict[str, Any]] | None = None,
    limit: int | None = None,
    after: int | None = None,
) -> Episode | None:
    """Return `driver`'s episode from initial state `init` up to its success; None if it has none.

    `label` asks the expert for its chunk from every state on. `begin`, in place of a reset, returns the first
    observation; `limit`: steps, default the horizon. With `after`, the episode goes on for so many steps from
    its success, is kept without one, and notes at which steps the hand touches a thing and things move.
    """
    observation = begin() if begin else env.reset(seed=seed, options={"init": init})[0]
    steps: dict[str, list[Any]] = {name: [] for name in ("actions", "states", "sim_states", "is_expert")}
    steps |= {} if after is None else {"contact": [], "moving": []}
    images: dict[str, list[np.ndarray]] = {name: [] for name in observation if name != "state"}
    places = None if after is None else env.points_of_interest()
    left, has_succeeded = env.horizon if limit is None else limit, False
    while left > 0:
        action, is_expert = driver(observation)
        row = {"actions": action, "states": observation["state"], "sim_states": env.get_state()}
        for name, frames in images.items():
            frames.append(observation[name])
        observation, _, success, _, _ = env.step(action)
        left -= 1
        row |= {"is_expert": is_expert}
        if after is not None:
            before, places = places, env.points_of_interest()
            row |= {"contact": env.in_contact(), "moving": np.abs(places - before).max() > MOVING}
        for name, value in row.items():
            steps[name].append(value)
        if success and not has_succeeded:
            has_succeeded, left = True, min(left, after or 0)
    if after is None and not has_succeeded:
        return None
    types = {"actions": np.float32, "states": np.float32, "sim_states": np.float64}
    labels = label and label.label(*(steps[name] for name in ("actions", "is_expert", "sim_states")))
    return Episode(
        instruction=env.task.instruction,
        suite=env.task.suite,
        task=env.task.name,
        images={name: np.array(frames) for name, frames in images.items()},
        init=init,
        seed=seed,
        expert_actions=labels,
        success=has_succeeded,
        **{name: np.array(values, dtype=types.get(name, np.bool_)) for name, values in steps.items()},
    )


# -- environments, one a process -----------------------------------------------------------------------------

_kept: dict[str, tuple[Any, ...]] = {}
"""This process's last environments; LIBERO's cost seconds to make."""


def kept(key: Any, make: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return the environments that `make` made for this key the last time; others are closed."""
    if str(key) not in _kept:
        close_kept()
        _kept[str(key)] = make()
    return _kept[str(key)]


def close_kept() -> None:
    for env in filter(None, itertools.chain(*_kept.values())):
        env.close()
    _kept.clear()


def choose(suite: str, table: Sequence[Task], indices: Sequence[int]) -> list[Task]:
    """Return the tasks with these indices, all where there are none; an unknown one raises ValueError."""
    if bad := [i for i in indices if not 0 <= i < len(table)]:
        raise ValueError(f"{suite} has tasks 0 to {len(table) - 1}, got {bad}")
    return [task for task in table if not indices or task.index in indices]


def check_sizes(views: Views | None, workers: int) -> None:
    """Raise ValueError for pictures that cannot be rendered, or a negative number of workers."""
    for name, (rows, cols) in (views or {}).items():
        if not (rows and cols and rows * cols <= MAX_PIXELS):
            raise ValueError(
                f"view {name}={rows}x{cols}: expected 1x1 to {MAX_PIXELS:,} pixels, such as {name}=128x128"
            )
    if workers < 0:
        raise ValueError(f"expected workers >= 0 (0: one a core), got {workers}")


# -- files made of parts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One file of demonstrations, made attempt by attempt."""

    path: Path
    attempt: Callable[[int], Episode | None]
    """Number of an attempt -> its episode, None if it failed. Pickled for the workers."""
    wanted: int
    """Episodes after which the file is complete."""
    attempts: int
    """The most that are made."""
    parts: Path
    """Folder of the episodes, `<attempt>.hdf5`, and the empty `<attempt>.failed`, until they are merged."""

    def forget_failures(self) -> None:
        """Let the attempts that failed be made again, once what made them fail is mended."""
        for part in self.parts.glob("*.failed"):
            part.unlink()

    def done(self) -> tuple[list[int], list[int]]:
        """Return the numbers of the attempts that succeeded and of those that failed."""
        good, bad = (sorted(int(p.stem) for p in self.parts.glob(f"*.{end}")) for end in ("hdf5", "failed"))
        return good, bad

    def merge(self, env_args: dict[str, Any]) -> None:
        """Write the file from its parts and remove them."""
        good, _ = self.done()
        episodes = (e for number in good for e in read_episodes(self.parts / f"{number}.hdf5"))
        write_episodes(self.path, episodes, env_args)
        shutil.rmtree(self.parts)


def work_off(jobs: Sequence[Job], workers: int, title: str, cluster: Cluster | None = None) -> Iterator[Job]:
    """Make the attempts that the jobs still need, in `workers` processes (0: one a core) or those of a
    cluster, and yield each job as it has all its episodes or no attempt left. Files that are there stay as
    they are.

    As many attempts are on their way as episodes are missing, always the lowest numbers not tried yet: which
    attempts are made does not depend on which ends first.
    """
    spawn = multiprocessing.get_context("spawn")
    pool = cluster or ProcessPoolExecutor(workers or cores(), spawn, initializer=end_with_parent)
    attempt = _attempt_away if cluster else _attempt
    pending: dict[Future[bool | bytes], tuple[Job, int]] = {}
    untried: dict[Path, Iterator[int]] = {}
    for job in jobs:
        if job.path.exists():  # a kill may have left its parts
            shutil.rmtree(job.parts, ignore_errors=True)
    jobs = [job for job in jobs if not job.path.exists()]
    try:
        with progress_bar() as progress:
            bar = progress.add_task(title, total=sum(job.wanted for job in jobs))
            for job in jobs:
                job.parts.mkdir(parents=True, exist_ok=True)
                good, bad = job.done()
                progress.advance(bar, len(good))
                untried[job.path] = (i for i in range(job.attempts) if i not in {*good, *bad})
                for number in itertools.islice(untried[job.path], job.wanted - len(good)):
                    pending[pool.submit(attempt, job, number)] = job, number
            yield from (job for job in jobs if not any(job is other for other, _ in pending.values()))
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    (job, number), success = pending.pop(future), future.result()
                    if isinstance(success, bytes):
                        with whole_file(job.parts / f"{number}.{'hdf5' if success else 'failed'}") as part:
                            part.write_bytes(success)
                    progress.advance(bar, bool(success))
                    number = None if success else next(untried[job.path], None)
                    if number is not None:
                        pending[pool.submit(attempt, job, number)] = job, number
                    elif not any(job is other for other, _ in pending.values()):
                        yield job
    except BrokenProcessPool:
        raise OSError(
            "a worker process was killed, for want of memory perhaps: the same command goes on where this "
            "one stopped; fewer --workers take less memory"
        ) from None
    finally:
        if not cluster:
            pool.shutdown(cancel_futures=True)


def _attempt(job: Job, number: int) -> bool:
    """Make an attempt, leave its part and return its success; an error closes this process's environments."""
    try:
        episode = job.attempt(number)
    except BaseException:
        close_kept()
        raise
    if episode is None:
        (job.parts / f"{number}.failed").touch()
    else:
        write_episodes(job.parts / f"{number}.hdf5", [episode], {})
    return episode is not None


def _attempt_away(job: Job, number: int) -> bytes:
    """As `_attempt`, on a machine that may not see the folder of parts: return the part, b"" of a failure."""
    with tempfile.TemporaryDirectory() as folder:
        there = replace(job, parts=Path(folder))
        return (there.parts / f"{number}.hdf5").read_bytes() if _attempt(there, number) else b""


@contextmanager
def guard(path: Path, arguments: dict[str, Any]) -> Iterator[None]:
    """Write the directory of `path` alone, and refuse demonstrations made with other arguments in it. Where
    none has been made, arguments may change.
    """
    with only_writer(path.parent):
        is_begun = any(p.suffix in (".hdf5", ".failed") for p in path.parent.rglob("*"))
        if not path.exists() and any(path.parent.glob("*.hdf5")):
            raise ValueError(
                f"{path.parent} holds demonstrations, but not {path.name}, which says how they were made: "
                "choose another directory"
            )
        if not (path.exists() and is_begun):
            write_json(path, arguments)
        if changed := differing(read_json(path), arguments):
            raise ValueError(
                f"{path.parent} holds demonstrations made with other settings "
                f"({', '.join(changed.values())}): choose another directory"
            )
        yield


# -- collection ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attempt:
    """What an attempt depends on besides its number."""

    kind: Kind
    task: Task
    views: Views | None
    seed: int
    noise: float
    label: int
    policy: LoadPolicy | None
    execute: int
    make: Callable[..., Any]
    expert: Callable[[Any], Expert]

    def __call__(self, number: int) -> Episode | None:
        env, scout = kept((self.make, self.task, self.views, self._scouts), self._environments)
        init = FIRST_INIT + self.seed * INITS_PER_SEED + number
        expert = self.expert(env)
        if self.kind != "demonstrations":
            rng = np.random.default_rng([self.seed, self.task.index, init, 1])
            act = self.policy() if self.policy else None
            ahead = scout, self.expert(scout)
            driver, limit, after = world_driver(
                env, expert, ahead, rng, act, self.execute, self.kind == "grasps"
            )
            episode = record(env, driver, init, self.seed, limit=limit, after=after)
            return episode and replace(episode, is_expert=np.zeros(len(episode), dtype=np.bool_))
        rng = np.random.default_rng([self.seed, self.task.index, init])
        label = Labeller(scout, self.expert(scout), self.label) if scout is not None else None
        driver = PerturbedExpert(expert, rng, self.noise)
        if self.policy is not None:
            until = int(rng.uniform(0.2, 0.7) * env.horizon)
            driver = DaggerDriver(self.policy(), expert, self.task.instruction, rng, until, self.execute)
        return record(env, driver, init, self.seed, label)

    @property
    def _scouts(self) -> bool:
        """Whether a second environment is needed, in which the expert runs ahead."""
        return bool(self.label) or self.kind != "demonstrations"

    def _environments(self) -> tuple[Any, Any]:
        scout = self.make(self.task, {}) if self._scouts else None
        if scout is not None:
            scout.reset(options={"init": 0})
        return self.make(self.task, self.views), scout


def collect(
    suite: str,
    out_dir: Path,
    *,
    kind: Kind = "demonstrations",
    episodes: int = 50,
    views: Views | None = None,
    seed: int = 0,
    workers: int = 0,
    noise: float = 0.15,
    label: int = 0,
    policy: LoadPolicy | None = None,
    policy_name: str = "",
    execute: int = 3,
    tasks: tuple[int, ...] = (),
    make: Callable[..., Any] = sim.make,
    expert: Callable[[Any], Expert] = sim.expert,
    cluster: Cluster | None = None,
) -> dict[str, dict[str, Any]]:
    """Write `episodes` episodes of every task of `suite` (or of those in `tasks`), one file a task.

    `workers`: processes that simulate; 0: one a core that this process may use; a `cluster` has its own.
    `kind`, `noise`, `label`, `policy` and `execute` as of `worldvla collect`; `policy_name` says in the files
    which one it was. Return {task name: {episodes, steps, failed}}: how many were written, how many attempts
    failed; of world data also `shares`, see `facts`. `make`, `expert` and `policy` must be importable by the
    workers.
    """
    chosen = choose(suite, sim.tasks(suite), tasks)
    check_sizes(views, workers)
    if not 0 <= noise < 0.9 or not 1 <= episodes <= MAX_EPISODES or not 0 <= seed < 2**32:
        raise ValueError(
            f"expected 0 <= noise < 0.9, 1 to {MAX_EPISODES} episodes and a seed from 0 to 2^32 - 1, got "
            f"{noise}, {episodes} and {seed}"
        )
    if label < 0 or execute < 1:
        raise ValueError(f"expected label >= 0 and execute >= 1 steps, got {label} and {execute}")
    is_world = kind != "demonstrations"
    if kind == "grasps" and policy:
        raise ValueError("kind grasps has no policy: leave it out, or collect kind world")
    if is_world and label:
        raise ValueError(f"world data are no policy's targets, got label {label}: leave it out")
    if make is sim.make:
        sim.check_drawing(suite, views)
    arguments = {"suite": suite, "episodes": episodes, "seed": seed, "views": views, "label": label}
    arguments |= {"policy": policy_name, "execute": execute if policy else 0}
    arguments |= {"noise": 0.0 if policy or is_world else noise}  # what is applied
    arguments |= {"kind": kind} if is_world else {}
    arguments |= {"mix": WORLD_MIX} if kind == "world" else {}
    with guard(out_dir / "collect.json", arguments):
        paths = {task: out_dir / f"{task.name}_demo.hdf5" for task in chosen}
        most = episodes if is_world else 2 * episodes + MAX_FAILED
        jobs = []
        for task in chosen:
            attempt = _Attempt(kind, task, views, seed, noise, label, policy, execute, make, expert)
            jobs.append(Job(paths[task], attempt, episodes, most, out_dir / f".{task.name}.parts"))
        for job in work_off(jobs, workers, f"collect {suite}", cluster):
            _finish(job, next(task for task in chosen if paths[task] == job.path), arguments)
        return {task.name: _counts(path) for task, path in paths.items()}


def _finish(job: Job, task: Task, arguments: dict[str, Any]) -> None:
    """Merge a task's parts; too few of them raise ValueError."""
    good, bad = job.done()
    if len(good) < job.wanted:
        job.forget_failures()
        raise ValueError(
            f"{task.suite} task {task.index} ({task.instruction}): the expert failed {len(bad)} times for "
            f"{job.wanted} wanted episodes; mend it, or ask for less noise"
        )
    versions = {name: version(name) for name in ("mujoco", "numpy")}
    source = "a policy, the scripted expert at last" if arguments["policy"] else "scripted expert"
    source = {
        "world": "perturbed experts, policies and play; failures kept",
        "grasps": "grasps tried on things and beside them; failures kept",
    }.get(arguments.get("kind", ""), source)
    told = {"env_name": task.suite, "source": source, "failed": len(bad), "versions": versions}
    job.merge(told | arguments)


def _counts(path: Path) -> dict[str, Any]:
    told = facts(path)
    shares = {"shares": told["shares"]} if "shares" in told else {}
    return {"episodes": told["num_demos"], "steps": told["total"], "failed": told.get("failed", 0), **shares}
