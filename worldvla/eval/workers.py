"""Processes that each step one environment; none of them imports torch.

A worker is given a Job, then again and again actions, and reports where its episode stands. One that raises,
dies or falls silent costs its episode, which ends as an error, and nothing else.
"""

import multiprocessing
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from worldvla.data.episode import Episode, write_episodes
from worldvla.machine import end_with_parent
from worldvla.sim import suites as sim
from worldvla.sim.protocol import Expert, Task

PATIENCE_S = 600.0
"""A worker that gives no answer for so long is stopped. Making a LIBERO scene takes half a minute."""
MakeEnv = Callable[..., Any]
"""(task, views) -> environment."""


@dataclass(frozen=True)
class Job:
    task: Task
    init: int
    film: bool


@dataclass(frozen=True)
class Settings:
    """What every worker needs to know; travels to it once."""

    make: MakeEnv
    views: dict[str, tuple[int, int]]
    needs_images: bool
    """False: images are rendered for films alone."""
    history: int
    lockstep: bool
    """Simulation is cheap: the actor answers once all environments wait, which makes the largest batches, and
    films hold every step. Else it answers whoever waits, nobody waits for another one's reset, and films hold
    only the frames that are rendered anyway."""
    seed: int
    save: Path | None = None
    """Folder for the episodes; every step is then rendered."""


@dataclass
class Report:
    """A worker's answer: where its episode stands."""

    status: str
    """running | success | fail | error"""
    observation: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    trace: str = ""
    """Of the exception that made it an error."""
    grasped: bool = False
    steps: int = 0
    simulation_s: float = 0.0
    """Seconds that its worker has simulated and rendered so far, making and resetting included."""
    policy_s: float = 0.0
    """Seconds in which its queries were answered; those of a batch in equal parts."""
    frames: list[dict[str, np.ndarray]] = field(default_factory=list)
    """Rendered since the last report, for the film."""


class Running:
    """One episode inside a worker."""

    def __init__(self, env: Any, job: Job, settings: Settings) -> None:
        self.env, self.job, self.settings = env, job, settings
        self.report = Report("running")
        self.recent: deque[dict[str, np.ndarray]] = deque(maxlen=max(1, settings.history))
        self.expert: Expert | None = None
        self.now: dict[str, Any] = {}
        self.steps: list[tuple[dict[str, Any], np.ndarray, np.ndarray, bool]] = []
        """With `settings.save`: observation, simulator's state, action, whether it is the expert's."""

    def start(self) -> Report:
        settings = self.settings
        self.env.rendering = settings.needs_images or self.job.film or settings.save is not None
        self.now, _ = self.env.reset(seed=settings.seed, options={"init": self.job.init})
        self._see(self.now, True)
        return self._tell(self.now)

    def execute(self, actions: np.ndarray | int) -> Report:
        """Execute actions (n, 7), or n actions of the expert, until they or the episode end."""
        report, settings = self.report, self.settings
        num_steps = actions if isinstance(actions, int) else len(actions)
        observation: dict[str, Any] = {}
        for i in range(num_steps):
            left = num_steps - 1 - i
            self.env.rendering = (
                (settings.needs_images and left < settings.history)
                or (self.job.film and (settings.lockstep or left == 0))
                or settings.save is not None
            )
            action = self._expert_action() if isinstance(actions, int) else actions[i]
            if settings.save is not None:
                self.steps.append((self.now, self.env.get_state(), action, isinstance(actions, int)))
            observation, _, terminated, truncated, info = self.env.step(action)
            self.now = observation
            report.steps += 1
            report.grasped = report.grasped or bool(info["grasped"])
            if terminated or truncated or report.steps >= self.env.horizon:
                report.status = "success" if terminated else "fail"
                if self.job.film and not self.env.rendering:
                    observation = self.env.observe()
                self._see(observation, True)
                if settings.save is not None:
                    self._save(settings.save)
                return self._tell({})
            self._see(observation, settings.lockstep or settings.save is not None or left == 0)
        return self._tell(observation)

    def _expert_action(self) -> np.ndarray:
        self.expert = self.expert or sim.expert(self.env)
        return self.expert.act()

    def _see(self, observation: dict[str, Any], is_filmed: bool) -> None:
        images = {view: observation[view] for view in self.settings.views if view in observation}
        if images:
            self.recent.append(images)
            if self.job.film and is_filmed:
                self.report.frames.append(images)

    def _save(self, folder: Path) -> None:
        """Write the episode; steps of a policy are no policy's targets."""
        task, init = self.job.task, self.job.init
        seen, states, actions, is_expert = zip(*self.steps, strict=True)
        episode = Episode(
            instruction=task.instruction,
            suite=task.suite,
            task=task.name,
            actions=np.array(actions, dtype=np.float32),
            states=np.array([o["state"] for o in seen], dtype=np.float32),
            images={view: np.array([o[view] for o in seen]) for view in self.settings.views},
            sim_states=np.array(states, dtype=np.float64),
            is_expert=np.array(is_expert, dtype=np.bool_),
            init=init,
            seed=self.settings.seed,
            success=self.report.status == "success",
        )
        write_episodes(saved(folder, self.job), [episode], {"made_by": "worldvla eval", "suite": task.suite})

    def _tell(self, observation: dict[str, Any]) -> Report:
        previous = list(self.recent)[:-1]
        self.report.observation = {
            **observation,
            "instruction": self.job.task.instruction,
            "previous": previous,
        }
        return self.report


def saved(folder: Path, job: Job) -> Path:
    """Return the file of an episode that is saved in `folder`."""
    return folder / f"{job.task.name}_{job.init:02d}_demo.hdf5"


def _work(connection: Connection, settings: Settings) -> None:
    """Run episodes until told to stop: a Job begins one, an array of actions or a number of expert steps goes
    on with it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides
    end_with_parent()
    connection.send("ready")
    env: Any = None
    episode: Running | None = None
    while True:
        try:
            order = connection.recv()
        except EOFError:
            return
        if order is None:
            return
        started, earlier = time.monotonic(), 0.0
        try:
            if isinstance(order, Job):
                episode = None
                if env is None or env.task != order.task:
                    if env is not None:
                        env, old = None, env
                        old.close()
                    env = settings.make(order.task, settings.views)
                episode = Running(env, order, settings)
                report = episode.start()
            else:
                assert episode is not None
                earlier = episode.report.simulation_s
                report = episode.execute(order)
        except Exception as error:  # the process boundary: what an environment raises is not the end
            report = episode.report if episode is not None else Report("error")
            report.status, report.reason, report.trace = "error", _reason(error), traceback.format_exc()
            report.trace += _close(env)
            env = None
        report.simulation_s = earlier + time.monotonic() - started
        connection.send(report)
        report.frames.clear()


def _close(env: Any) -> str:
    """Close an environment that raised, which may hold gigabytes; return the traceback if that fails."""
    try:
        if env is not None:
            env.close()
    except Exception:  # the process boundary
        return traceback.format_exc()
    return ""


def _reason(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


class Worker:
    """A process with one environment; replaced when it dies or does not answer."""

    def __init__(self, settings: Settings, patience_s: float) -> None:
        self.settings, self.patience_s = settings, patience_s
        self.job: Job | None = None
        self.task: Task | None = None
        """Whose environment it holds."""
        self.started = 0.0
        self.policy_s = 0.0
        self.film: list[dict[str, np.ndarray]] = []
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self.settings), daemon=True)
        self._process.start()
        theirs.close()
        self._is_ready = False
        self.deadline = time.monotonic() + PATIENCE_S

    def begin(self, job: Job) -> None:
        self.job, self.task, self.film, self.started = job, job.task, [], time.monotonic()
        self.policy_s = 0.0
        self.send(job)

    def send(self, order: Any) -> None:
        if self._is_ready:
            self.deadline = time.monotonic() + self.patience_s
        with suppress(OSError):  # it has died; `poll` says so
            self.connection.send(order)

    def poll(self) -> Report | None:
        """Return its answer, None while there is none.

        One that died or is overdue is replaced, its episode an error.
        """
        try:
            while self.connection.poll(0):
                message = self.connection.recv()
                if isinstance(message, Report):
                    message.policy_s = self.policy_s
                    self.film += message.frames
                    return message
                self._is_ready = True
                self.deadline = time.monotonic() + self.patience_s
            if time.monotonic() < self.deadline:
                return None
            reason = f"the worker gave no answer for {self.patience_s:.0f} s"
        except (EOFError, OSError):
            self._process.join(5.0)
            reason = f"the worker process died (exit code {self._process.exitcode})"
        self.stop()
        self._start()
        self.task = None
        return Report("error", reason=reason)

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


@contextmanager
def open_workers(count: int, settings: Settings, patience_s: float) -> Iterator[list[Worker]]:
    pool: list[Worker] = []
    try:
        pool += [Worker(settings, patience_s) for _ in range(count)]
        yield pool
    finally:
        for worker in pool:
            worker.stop()
