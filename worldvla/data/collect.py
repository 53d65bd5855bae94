"""Demonstrations: run the scripted expert in parallel, keep successes, write LIBERO's HDF5; and replay them.

`worldvla collect tabletop_object --episodes 50`. The same command again goes on where it stopped: each
attempt leaves a file of its own in `.<task>.parts/` until its task is complete, and the result is the same as
without the stop, for any number of workers. Workers never import torch.
"""

import importlib.metadata
import itertools
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from worldvla.data.episode import Episode, facts, read_episodes, write_episodes
from worldvla.files import write_text
from worldvla.progress import progress_bar
from worldvla.sim import suites as sim
from worldvla.sim.protocol import Expert, NUM_INITS, Task
from worldvla.machine import cores

FIRST_INIT = NUM_INITS
"""Initial states below are for evaluation alone."""
INITS_PER_SEED = 100_000
BURST = (2, 5)
"""Steps of a perturbation: at least, less than."""
BURST_STD = 0.8
"""Standard deviation of a perturbation's direction, in units of an action."""
FLIP = 0.1
"""Chance that a perturbed step also flips the gripper."""
MAX_FAILED = 10
"""Failed attempts above one a wanted episode after which the expert is taken to be broken."""

Views = dict[str, tuple[int, int]]
Driver = Callable[[dict[str, Any]], tuple[np.ndarray, bool]]
"""Observation -> the action to execute and whether it may be imitated."""


@dataclass
class Driven:
    """Drive by a policy, by stretches and at last by the expert: the policy's own errors are visited (DAgger,
    Ross et al. 2011; the expert ends each episode, so that one that is stuck still succeeds)."""

    act: Callable[[dict[str, Any]], np.ndarray]
    """Observation, as `Policy.act` takes it -> actions (K, 7)."""
    expert: Expert
    instruction: str
    rng: np.random.Generator
    until: int
    """Steps after which the expert drives alone."""
    execute: int
    """Actions of each chunk that are executed."""
    share: float = 0.8
    """Chance that the next stretch is the policy's."""
    steps: int = 0
    ahead: list[np.ndarray] = field(default_factory=list)
    """Actions of the policy that are still to be executed."""
    expert_left: int = 0

    def __call__(self, observation: dict[str, Any]) -> tuple[np.ndarray, bool]:
        if not self.ahead and not self.expert_left:
            if self.steps < self.until and self.rng.random() < self.share:
                chunk = self.act({**observation, "instruction": self.instruction})
                self.ahead = list(chunk[: self.execute])
            else:
                self.expert_left = self.execute
        self.steps += 1
        if self.ahead:
            return np.clip(self.ahead.pop(0), -1, 1).astype(np.float32), False
        self.expert_left -= 1
        return np.clip(self.expert.act(), -1, 1).astype(np.float32), True


@dataclass
class Labeller:
    """Ask the expert what it does in the next `chunk` steps, in a second simulator set to that state."""

    scout: Any
    """An environment of the same task that renders nothing."""
    expert: Expert
    chunk: int

    def __call__(self, state: np.ndarray) -> np.ndarray:
        """Return its actions from simulator state `state` on, (K, 7)."""
        self.scout.set_state(state)
        actions = []
        for _ in range(self.chunk):
            actions.append(np.clip(self.expert.act(), -1, 1).astype(np.float32))
            self.scout.step(actions[-1])
        return np.array(actions)


@dataclass
class Perturbed:
    """Drive by the expert, with bursts of strong noise from which it then recovers.

    Only the steps without noise may be imitated: their action is exactly the expert's.
    """

    expert: Expert
    rng: np.random.Generator
    fraction: float
    """Share of perturbed steps, about: 0.15 gives 0.158."""
    left: int = 0
    """Steps left of the present burst."""
    drift: np.ndarray = field(default_factory=lambda: np.zeros(4))
    """x, y, z and rotation that the burst adds to each action."""

    def __call__(self, observation: dict[str, Any]) -> tuple[np.ndarray, bool]:  # noqa: ARG002 it looks at the state
        action = np.clip(self.expert.act(), -1, 1).astype(np.float32)
        mean = (BURST[0] + BURST[1] - 1) / 2
        if not self.left and self.rng.random() < self.fraction / (mean * (1 - self.fraction)):
            self.left = int(self.rng.integers(*BURST))
            self.drift = self.rng.normal(0.0, BURST_STD, 4)
        if not self.left:
            return action, True
        self.left -= 1
        action[:3] += self.drift[:3]
        action[5] += 0.5 * self.drift[3]
        if self.rng.random() < FLIP:
            action[6] = -action[6]
        return np.clip(action, -1, 1), False


def record(
    env: Any,
    driver: Driver,
    init: int,
    seed: int,
    label: Labeller | None = None,
    begin: Callable[[], dict[str, Any]] | None = None,
    limit: int | None = None,
) -> Episode | None:
    """Return `driver`'s episode from initial state `init` up to its success; None if it has none.

    `label`: simulator state -> the expert's chunk (K, 7) from there on; it is asked only where the K actions
    that were executed are not the expert's own. `begin`, in place of a reset, returns the first observation;
    `limit`: steps, default the horizon.
    """
    observation = begin() if begin else env.reset(seed=seed, options={"init": init})[0]
    actions, states, sim_states, is_expert = [], [], [], []
    images: dict[str, list[np.ndarray]] = {name: [] for name in observation if name != "state"}
    for _ in range(env.horizon if limit is None else limit):
        action, expert = driver(observation)
        actions.append(action)
        states.append(observation["state"])
        sim_states.append(env.get_state())
        is_expert.append(expert)
        for name, frames in images.items():
            frames.append(observation[name])
        observation, _, success, _, _ = env.step(action)
        if success:
            return Episode(
                instruction=env.task.instruction,
                suite=env.task.suite,
                task=env.task.name,
                actions=np.array(actions, dtype=np.float32),
                states=np.array(states, dtype=np.float32),
                images={name: np.array(frames) for name, frames in images.items()},
                sim_states=np.array(sim_states, dtype=np.float64),
                is_expert=np.array(is_expert, dtype=np.bool_),
                init=init,
                seed=seed,
                expert_actions=_labels(label, actions, is_expert, sim_states) if label else None,
            )
    return None


def _labels(
    label: Labeller, actions: list[np.ndarray], is_expert: list[bool], sim_states: list[np.ndarray]
) -> np.ndarray:
    """Return the expert's next K actions from every visited state, (T, K, 7)."""
    labels = []
    for t, state in enumerate(sim_states):
        ahead = slice(t, t + label.chunk)
        own = all(is_expert[ahead]) and len(actions[ahead]) == label.chunk
        labels.append(np.array(actions[ahead]) if own else label(state))
    return np.array(labels)


# -- one attempt, in a worker ------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What an attempt depends on besides its number."""

    task: Task
    parts: Path
    views: Views | None
    seed: int
    noise: float
    make: Callable[..., Any]
    expert: Callable[[Any], Expert]
    label: int
    policy: "LoadPolicy | None"
    execute: int


LoadPolicy = Callable[[], Callable[[dict[str, Any]], np.ndarray]]
"""Importable by a worker; returns what `Driven.act` is, loaded once a process."""
_kept: dict[str, tuple[Any, ...]] = {}
"""This process's last environments; LIBERO's cost seconds to make."""


def kept(key: Any, make: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return the environments that `make` made for this key the last time; others are closed."""
    if str(key) not in _kept:
        _close_kept()
        _kept[str(key)] = make()
    return _kept[str(key)]


def _close_kept() -> None:
    for env in filter(None, itertools.chain(*_kept.values())):
        env.close()
    _kept.clear()


def task_of(episode: Episode) -> Task:
    """Return the task that an episode is a demonstration of; an unknown one raises ValueError."""
    known = {task.name: task for task in sim.tasks(episode.suite)}
    if episode.task not in known:
        raise ValueError(
            f"{episode.suite} has no task {episode.task!r}, of which there are demonstrations; it has "
            f"{', '.join(known)}: name file and folder as LIBERO does, or collect again"
        )
    return known[episode.task]


def _attempt(job: _Job, attempt: int) -> bool:
    """Run one attempt; leave its episode, or an empty `.failed` file, in the parts. Return its success."""

    def make() -> tuple[Any, ...]:
        scout = job.make(job.task, {}) if job.label else None
        if scout is not None:
            scout.reset(options={"init": 0})
        return job.make(job.task, job.views), scout

    env, scout = kept((job.make, job.task, job.views, bool(job.label)), make)
    init = FIRST_INIT + job.seed * INITS_PER_SEED + attempt
    rng = np.random.default_rng([job.seed, job.task.index, init])
    label = Labeller(scout, job.expert(scout), job.label) if scout is not None else None
    if job.policy is None:
        driver: Driver = Perturbed(job.expert(env), rng, job.noise)
    else:
        until = int(rng.uniform(0.2, 0.7) * env.horizon)
        driver = Driven(job.policy(), job.expert(env), job.task.instruction, rng, until, job.execute)
    episode = record(env, driver, init, job.seed, label)
    if episode is None:
        (job.parts / f"{attempt}.failed").touch()
        return False
    write_episodes(job.parts / f"{attempt}.hdf5", [episode], {"env_name": job.task.suite})
    return True


# -- all attempts ------------------------------------------------------------------------


def collect(
    suite: str,
    out_dir: Path,
    *,
    episodes: int = 50,
    views: Views | None = None,
    seed: int = 0,
    workers: int = 0,
    noise: float = 0.15,
    label: int = 0,
    policy: LoadPolicy | None = None,
    policy_name: str = "",
    execute: int = 3,
    fast_render: bool = False,
    tasks: tuple[int, ...] = (),
    make: Callable[..., Any] = sim.make,
    expert: Callable[[Any], Expert] = sim.expert,
) -> dict[str, dict[str, int]]:
    """Write `episodes` successful demonstrations of every task of `suite` (or of those in `tasks`).

    `workers`: processes that simulate; 0: one a core that this process may use.
    `noise`, `label`, `policy` and `execute` as of `worldvla collect`; `policy_name` says in the files which
    one it was. Return {task name: {episodes, steps, failed}}: how many were written, how many attempts
    failed. `make`, `expert` and `policy` must be importable by the workers.
    """
    chosen = choose(suite, sim.tasks(suite), tasks)
    if not 0 <= noise < 0.9 or episodes < 1 or workers < 0 or seed < 0:
        raise ValueError(
            "expected 0 <= noise < 0.9, episodes >= 1, workers >= 0 and seed >= 0, "
            f"got {noise}, {episodes}, {workers} and {seed}"
        )
    if label < 0 or execute < 1:
        raise ValueError(f"expected label >= 0 and execute >= 1 steps, got {label} and {execute}")
    if make is sim.make:
        sim.check_drawing(suite, views)
    arguments = {"suite": suite, "episodes": episodes, "seed": seed, "noise": noise, "views": views}
    arguments |= {"label": label, "policy": policy_name, "execute": execute if policy else 0}
    if fast_render:
        arguments["fast_render"] = True
        make = partial(make, fast_render=True)
    _guard(out_dir / "collect.json", arguments)
    jobs = [
        _Job(t, out_dir / f".{t.name}.parts", views, seed, noise, make, expert, label, policy, execute)
        for t in chosen
        if not _path(out_dir, t).exists()
    ]
    pool = ProcessPoolExecutor(workers or cores(), multiprocessing.get_context("spawn"))
    try:
        with progress_bar() as progress:
            bar = progress.add_task(f"collect {suite}", total=len(jobs) * episodes)
            for job, success in _run(pool, jobs, episodes):
                progress.advance(bar, success)
                if success and len(_done(job)[0]) >= episodes:
                    _merge(out_dir, job, arguments)
    finally:
        pool.shutdown(cancel_futures=True)
    return {task.name: _counts(_path(out_dir, task)) for task in chosen}


def choose(suite: str, table: Sequence[Task], indices: Sequence[int]) -> list[Task]:
    """Return the tasks with these indices, all where there are none; an unknown one raises ValueError."""
    if bad := [i for i in indices if not 0 <= i < len(table)]:
        raise ValueError(f"{suite} has tasks 0 to {len(table) - 1}, got {bad}")
    return [task for task in table if not indices or task.index in indices]


def _run(pool: ProcessPoolExecutor, jobs: list[_Job], episodes: int) -> Iterator[tuple[_Job, bool]]:
    """Yield (job, success) of every attempt that the jobs need, those of an earlier run first.

    As many attempts are on their way as episodes are missing, always the lowest numbers not tried yet: which
    attempts are made does not depend on which ends first.
    """
    pending: dict[Future[bool], _Job] = {}
    failed: dict[str, int] = {}
    untried: dict[str, Iterator[int]] = {}
    for job in jobs:
        job.parts.mkdir(exist_ok=True)
        good, bad = _done(job)
        tried = good | bad
        failed[job.task.name] = len(bad)
        untried[job.task.name] = iter(i for i in range(episodes * 3 + MAX_FAILED + 1) if i not in tried)
        for _ in range(episodes - len(good)):
            pending[pool.submit(_attempt, job, next(untried[job.task.name]))] = job
        yield from ((job, True) for _ in good)
    while pending:
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            job = pending.pop(future)
            success, name = future.result(), job.task.name
            if not success:
                failed[name] += 1
                if failed[name] > episodes + MAX_FAILED:
                    raise RuntimeError(
                        f"{job.task.suite} task {job.task.index} ({job.task.instruction}): the expert failed "
                        f"{failed[name]} times for {episodes} wanted episodes; mend it, or ask for less noise"
                    )
                pending[pool.submit(_attempt, job, next(untried[name]))] = job
            yield job, success


def _done(job: _Job) -> tuple[set[int], set[int]]:
    """Return the numbers of the attempts that succeeded and of those that failed."""
    good, bad = ({int(p.stem) for p in job.parts.glob(f"*.{kind}")} for kind in ("hdf5", "failed"))
    return good, bad


def _guard(path: Path, arguments: dict[str, Any]) -> None:
    """Refuse to mix demonstrations made with different arguments in one directory."""
    text = json.dumps(arguments, sort_keys=True)
    if path.exists():
        if path.read_text() != text:
            raise ValueError(
                f"{path.parent} holds demonstrations made with {path.read_text()}, asked for {text}: "
                "choose another directory"
            )
        return
    write_text(path, text)


def _path(out_dir: Path, task: Task) -> Path:
    return out_dir / f"{task.name}_demo.hdf5"


def _merge(out_dir: Path, job: _Job, arguments: dict[str, Any]) -> None:
    """Write the task's file from its parts and remove them."""
    good, bad = _done(job)
    found = (episode for attempt in sorted(good) for episode in read_episodes(job.parts / f"{attempt}.hdf5"))
    versions = {name: importlib.metadata.version(name) for name in ("mujoco", "numpy")}
    source = "scripted expert" if job.policy is None else "a policy, the scripted expert at last"
    told = {"env_name": job.task.suite, "source": source, "failed": len(bad), "versions": versions}
    write_episodes(_path(out_dir, job.task), found, told | arguments)
    shutil.rmtree(job.parts)


def _counts(path: Path) -> dict[str, int]:
    told = facts(path)
    return {"episodes": told["num_demos"], "steps": told["total"], "failed": told.get("failed", 0)}


# -- replay ------------------------------------------------------------------------------


class Replayed(NamedTuple):
    """What became of one stored episode when its actions were executed again."""

    episode: int
    """Place in the file."""
    success: bool
    drift: float
    """Largest difference between the simulator's states, stored and reached; 0.0: the same bits."""


def start(env: Any, episode: Episode) -> None:
    """Put the environment where the episode begins. Ours begin after settling, with all that the next step
    depends on; published ones with a bare state, after which things settle (rules.settling)."""
    is_ours = episode.init >= 0
    env.reset(options={"init": max(episode.init, 0)} | ({} if is_ours else {"settle": 0}))
    # Setting a state costs the solver's warm start, hence the last bits; reset does not.
    if not np.array_equal(env.get_state(), episode.sim_states[0]):
        env.set_state(episode.sim_states[0])
    for _ in range(0 if is_ours else sim.suite(episode.suite).rules.settling):
        env.step(np.array([0.0] * 6 + [-1.0]))


def rerun(
    path: Path,
    transform: Callable[[np.ndarray], np.ndarray] = lambda actions: actions,
    make: Callable[..., Any] = sim.make,
) -> Iterator[Replayed]:
    """Re-execute each stored episode from its first state to success or its end; nothing is rendered.

    `transform` changes the actions (T, 7) before they are executed, such as through the policy's bins.
    """
    env: Any = None
    try:
        for i, episode in enumerate(read_episodes(Path(path), images=False)):
            task = task_of(episode)
            if env is None or env.task != task:
                env = make(task, {})
            start(env, episode)
            success, drift = False, 0.0
            for action, state in zip(transform(episode.actions), episode.sim_states, strict=True):
                drift = max(drift, float(np.abs(env.get_state()[: len(state)] - state).max()))
                success = bool(env.step(action)[2])
                if success:
                    break
            yield Replayed(i, success, drift)
    finally:
        if env is not None:
            env.close()
