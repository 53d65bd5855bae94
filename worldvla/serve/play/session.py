"""One person's play: who drives, what the world model imagines, and the simulator that runs along.

    session = Session(open_playable(worldvla.load("tabletop")), "tabletop_object", 0, init=10)
    session.driver = "policy"
    session.step()
    session.frame["agentview"], session.status()

Every action goes to both worlds. The simulator steps without its cameras until somebody wants to see it, and
gives the policy its proprioception: a robot knows its own joints, whatever it imagines to see.
"""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from worldvla.data.episode import Episode, write_episodes
from worldvla.infer.model import Model
from worldvla.sim import suites as sim
from worldvla.sim.protocol import CLOSE, FPS, NUM_INITS, OPEN, RULES, Task
from worldvla.video import views_side_by_side, write_mp4

if TYPE_CHECKING:
    from worldvla import WorldVLA
    from worldvla.infer.policy import Policy
    from worldvla.infer.world import World

REPLAN = 3
"""Actions of each of the policy's chunks that are executed."""
GRIPPER_STEPS = 6
"""Steps that a person's world goes on after the gripper's key, so that the fingers arrive."""
MAX_RECORDED = 3000
"""Steps of one recording: four minutes of tabletop, 300 MB of LIBERO's frames."""
PSNR_OF_EQUALS = 99.0
SCREEN = {"tabletop": ((0, 1), (1, 1)), "libero": ((1, 1), (0, -1))}
"""Simulator -> (dim of the action, its sign) of `right` and of `away` in the front view."""
Driver = Literal["person", "policy"]
Frame = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Playable:
    """A model, and the tasks in which it can be played."""

    loaded: "WorldVLA"
    """A checkpoint, and what acts and imagines by it."""
    simulator: str
    tasks: Mapping[str, tuple[Task, ...]]
    """Suite -> its tasks."""
    temperature: float = 0.0
    """Of the imagined codes; 0: the likeliest ones."""

    @property
    def rate(self) -> float:
        """Steps a second, at most: the simulator's control rate."""
        return FPS[self.simulator]

    @property
    def model(self) -> Model:
        return self.loaded.model

    @cached_property
    def policy(self) -> "Policy":
        return self.loaded.policy()

    def world(self, seed: int = 0) -> "World":
        return self.loaded.world(temperature=self.temperature, seed=seed)

    def task(self, suite: str, index: int) -> Task:
        """Return a task; an unknown one raises ValueError."""
        if suite not in self.tasks:
            sim.suite(suite)  # names near ones
            raise ValueError(
                f"{suite} is not a suite of {self.simulator}: choose one of {', '.join(self.tasks)}"
            )
        tasks = self.tasks[suite]
        if not 0 <= index < len(tasks):
            raise ValueError(f"{suite} has no task {index}: expected 0..{len(tasks) - 1}")
        return tasks[index]


def open_playable(loaded: "WorldVLA", *, suite: str = "", temperature: float = 0.0) -> Playable:
    """Open a loaded checkpoint to play with; one that cannot be played raises ValueError.

    `suite`: any of the simulator that the checkpoint belongs to; by default its name decides.
    """
    if temperature < 0:
        raise ValueError(f"the temperature must be 0 or more, got {temperature}")
    model, checkpoint = loaded.model, loaded.model.path
    _ = model.builder.statistics  # of one dataset, or an error that says how to choose
    config = model.config
    model.check_world()
    if not config.layout.action_conditioning:
        raise ValueError(
            f"{checkpoint} imagines without reading actions (layout.action_conditioning false): nobody can "
            "steer it; train one with it"
        )
    simulator = sim.suite(suite).simulator if suite else "libero" if "libero" in config.name else "tabletop"
    known = RULES[simulator].views
    if unknown := [view for view in model.view_sizes if view not in known]:
        raise ValueError(
            f"no simulator for the views {unknown} of {checkpoint}: {simulator} has {list(known)}; give "
            "--task of another simulator"
        )
    names = [name for name, row in sim.SUITES.items() if row.simulator == simulator and not row.base]
    names += [suite] if suite and suite not in names else []
    return Playable(loaded, simulator, {name: sim.tasks(name) for name in names}, temperature)


@dataclass
class Recording:
    """What was played, step by step: the observation before each action, in imagination and in fact."""

    task: Task
    init: int
    rate: float
    imagined: list[Frame] = field(default_factory=list)
    real: list[Frame] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    sim_states: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    by_person: list[bool] = field(default_factory=list)
    success_steps: int = 0
    """Steps up to the first success; 0: none."""

    def write(self, folder: Path) -> Path:
        """Write play.mp4 (imagined, then real views, side by side) and one HDF5 file of each world; return
        the folder. No step is a policy's target (is_expert false)."""
        both = [
            {f"{name} {view}": image for name, frame in worlds.items() for view, image in frame.items()}
            for worlds in ({"i": i, "r": r} for i, r in zip(self.imagined, self.real, strict=True))
        ]
        write_mp4(folder / "play.mp4", views_side_by_side(both), self.rate)
        for name, frames in {"imagined": self.imagined, "simulator": self.real}.items():
            self._write(folder / f"{name}_demo.hdf5", name, self._episode(frames))
        return folder

    def write_demonstration(self, path: Path) -> Path:
        """Write the simulator's frames up to the first success as one HDF5 file and return its path. What a
        person did is a policy's target (is_expert) if it succeeded."""
        end = self.success_steps or len(self.actions)
        is_expert = np.array(self.by_person, dtype=np.bool_) & bool(self.success_steps)
        self._write(path, "simulator", self._episode(self.real, end, is_expert[:end]))
        return path

    def _write(self, path: Path, images: str, episode: Episode) -> None:
        write_episodes(
            path, [episode], {"made_by": "worldvla play", "images": images, "suite": self.task.suite}
        )

    def _episode(
        self, frames: Sequence[Frame], end: int | None = None, is_expert: np.ndarray | None = None
    ) -> Episode:
        frames, actions = frames[:end], self.actions[:end]
        return Episode(
            instruction=self.task.instruction,
            suite=self.task.suite,
            task=self.task.name,
            actions=np.stack(actions),
            states=np.stack(self.states[:end]),
            images={view: np.stack([frame[view] for frame in frames]) for view in frames[0]},
            sim_states=np.stack(self.sim_states[:end]),
            is_expert=np.zeros(len(actions), dtype=np.bool_) if is_expert is None else is_expert,
            init=self.init,
            seed=-1,
            success=bool(self.success_steps),
        )


class Session:
    """Used by one thread at a time, but for `move`, which the next step reads: the latest one wins."""

    def __init__(self, playable: Playable, suite: str, index: int, init: int = 0) -> None:
        self.playable = playable
        self.world = playable.world()
        self.driver: Driver = "person"
        self.move = (0.0, 0.0, 0.0, 0.0)
        """Right, away, up, and the turn to the left, each in [-1, 1] of an action's range."""
        self.gripper = OPEN
        self.is_shown = False
        """Whether the simulator is looked at."""
        self.recording: Recording | None = None
        self._env: Any = None
        self._times: deque[float] = deque(maxlen=25)
        self.start(suite, index, init)

    # -- where it starts, and starts again

    def start(self, suite: str, index: int, init: int) -> None:
        """Begin at an initial state of a task; an unknown one raises ValueError and changes nothing."""
        task = self.playable.task(suite, index)
        if not 0 <= init < NUM_INITS:
            raise ValueError(f"no initial state {init}: expected 0..{NUM_INITS - 1}")
        if self._env is None or self._env.task != task:
            env = sim.make(task, self.playable.model.view_sizes)
            self.close()
            self._env = env
        self.task, self.init = task, init
        self._env.rendering = True
        observation, self._info = self._env.reset(options={"init": init})
        self.steps, self.gripper, self._settling = 0, OPEN, 0
        self.success_step: int | None = None
        self._anchor(observation)

    def back_to_reality(self) -> None:
        """Go on imagining from what the simulator's cameras see now."""
        self._anchor(self._env.observe())

    def _anchor(self, observation: dict[str, Any]) -> None:
        self.frame: Frame = self._views(self.world.reset(observation))
        self.real: Frame | None = self._views(observation)
        self.state: np.ndarray = observation["state"]
        self.action = np.zeros(self.playable.model.config.layout.num_action_dims, dtype=np.float32)
        self.imagined = 0
        self._chunk: list[np.ndarray] = []
        self._previous: deque[Frame] = deque(maxlen=max(0, self.playable.model.config.layout.history - 1))
        self._times.clear()

    def _views(self, frame: Any) -> Frame:
        return {view: frame[view] for view in self.playable.model.view_sizes}

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None

    # -- driving

    @property
    def is_moving(self) -> bool:
        """Whether there is anything to do: the world of a person who holds no key stands still."""
        return self.driver == "policy" or any(self.move) or self._settling > 0

    def drive(self, driver: Driver) -> None:
        """Hand over; the gripper stays as the last action left it."""
        if driver != self.driver:
            self.driver, self._chunk = driver, []
            self.gripper = CLOSE if self.action[6] > 0 else OPEN

    def toggle_gripper(self) -> None:
        self.gripper, self._settling = -self.gripper, GRIPPER_STEPS

    def show(self, is_shown: bool) -> None:
        """Look at the simulator, or no longer."""
        self.is_shown = is_shown
        self.real = self._views(self._env.observe()) if is_shown else None

    def step(self) -> None:
        """Take one action, the driver's, in both worlds."""
        began = time.perf_counter()
        action = self._policy_action() if self.driver == "policy" else self._person_action()
        self._settling = max(0, self._settling - 1)
        if (recording := self.recording) is not None:
            recording.imagined.append(self.frame)
            recording.real.append(self.real or self._views(self._env.observe()))
            recording.states.append(self.state)
            recording.sim_states.append(self._env.get_state())
            recording.actions.append(action)
            recording.by_person.append(self.driver == "person")
        self._previous.append(self.frame)
        self.frame = self._views(self.world.step(action))
        self._env.rendering = self.is_shown or recording is not None
        observation, _, success, _, self._info = self._env.step(action)
        self.real = self._views(observation) if self._env.rendering else None
        self.state, self.action = observation["state"], action
        self.steps, self.imagined = self.steps + 1, self.imagined + 1
        if success and self.success_step is None:
            self.success_step = self.steps
        if recording is not None and success and not recording.success_steps:
            recording.success_steps = len(recording.actions)
        if self._times and began - self._times[-1] > 1:  # it stood still
            self._times.clear()
        self._times.append(time.perf_counter())

    def _person_action(self) -> np.ndarray:
        right, away, up, turn = self.move
        action = np.zeros(7, dtype=np.float32)
        for value, (dim, sign) in zip((right, away), SCREEN[self.playable.simulator], strict=True):
            action[dim] = sign * value
        action[2], action[5], action[6] = up, turn, self.gripper
        statistics = self.playable.model.builder.statistics  # both worlds get what the model can read
        low, high = np.asarray(statistics.action_low), np.asarray(statistics.action_high)
        return np.clip(action, low, high).astype(np.float32)

    def _policy_action(self) -> np.ndarray:
        if not self._chunk:
            state = self.state if self.world.state is None else self.world.state
            seen = {**self.frame, "state": state, "instruction": self.task.instruction}
            actions = self.playable.policy.act({**seen, "previous": list(self._previous)})
            self._chunk = list(actions[:REPLAN])
        return self._chunk.pop(0)

    # -- recording

    def record(self) -> None:
        """Begin to record, from the next step on."""
        if self.recording is None:
            self.recording = Recording(self.task, self.init, self.playable.rate)

    def stop_recording(self) -> Recording | None:
        """Return what was recorded; None: nothing."""
        recording, self.recording = self.recording, None
        return recording if recording and recording.actions else None

    # -- what is on screen

    def status(self) -> dict[str, Any]:
        """Return what the page shows beside the frames."""
        stats = self.world.stats
        drift = None
        if self.is_shown and self.real is not None:
            drift = {v: round(psnr(self.frame[v], self.real[v]), 1) for v in self.frame}
        return {
            "suite": self.task.suite,
            "task": self.task.index,
            "init": self.init,
            "steps": self.steps,
            "imagined": self.imagined,
            "driver": self.driver,
            "action": [round(float(value), 3) for value in self.action],
            "gripper": "closed" if self.gripper > 0 else "open",
            "passes": stats[-1].passes if stats else None,
            "fps": round(frames_a_second(self._times), 1),
            "psnr": drift,
            "success": self.success_step,
            "grasped": bool(self._info["grasped"]),
            "recorded": len(self.recording.actions) if self.recording else None,
        }


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 pictures in dB, at most PSNR_OF_EQUALS."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return min(PSNR_OF_EQUALS, 10 * math.log10(255**2 / error)) if error else PSNR_OF_EQUALS


def frames_a_second(times: Sequence[float]) -> float:
    """Return the rate of `times` in seconds, 0 of fewer than two."""
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0


def bench(playable: Playable, suite: str, index: int, init: int, frames: int) -> dict[str, Any]:
    """Return how fast `frames` steps go, a person driving and then the policy, with the simulator shown."""
    session = Session(playable, suite, index)
    session.show(True)
    result: dict[str, Any] = {"model": playable.model.identity(), "frames": frames}
    drivers: tuple[Driver, ...] = ("person", "policy")
    for driver in drivers:
        session.start(suite, index, init)
        session.drive(driver)
        session.move = (0.5 if driver == "person" else 0.0, 0.0, 0.0, 0.0)
        session.step()  # the first one starts from a draft a whole frame old
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(frames):
            session.step()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        passes = [stats.passes for stats in session.world.stats[1:]]
        result[driver] = {
            "frames_a_second": round(frames / wall, 2),
            "cpu_ms_a_frame": round(1000 * cpu / frames, 1),
            "passes_a_frame": round(sum(passes) / len(passes), 1),
        }
    session.close()
    return result
