"""Demonstrations: run the scripted expert in parallel, keep successes, write LIBERO's HDF5; and replay what was written.

`worldvla collect tabletop_object --episodes 50`. The same command again goes on where it stopped: each episode is a file of its
own in `.<task>.parts/` until its task is complete. Workers never import torch.
"""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from worldvla.data.episode import Episode, read_episodes, write_episodes
from worldvla.sim import env as sim

FIRST_INIT = sim.NUM_INITS
"""Initial states below are for evaluation alone."""
INITS_PER_SEED = 100_000
BURST = (2, 5)
"""Steps of a perturbation: at least, less than."""
BURST_STD = 0.8
"""Standard deviation of a perturbation's direction, in units of an action."""
FLIP = 0.1
"""Chance that a perturbed step also flips the gripper."""


@dataclass(frozen=True)
class Perturbation:
    """Bursts of strong noise over the expert's actions, from which it then recovers. Only clean steps are labels."""

    rng: np.random.Generator
    fraction: float
    """Expected share of perturbed steps."""
    state: dict[str, Any]

    def apply(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Return the action to execute and whether it is the expert's own."""
        mean = (BURST[0] + BURST[1] - 1) / 2
        start = self.fraction / (mean * max(1e-6, 1 - self.fraction))
        if self.state.get("left", 0) == 0 and self.rng.random() < start:
            self.state["left"] = int(self.rng.integers(*BURST))
            self.state["drift"] = self.rng.normal(0.0, BURST_STD, 4)
        if self.state.get("left", 0) == 0:
            return action, True
        self.state["left"] -= 1
        noisy = action.copy()
        noisy[:3] += self.state["drift"][:3]
        noisy[5] += 0.5 * self.state["drift"][3]
        if self.rng.random() < FLIP:
            noisy[6] = -noisy[6]
        return np.clip(noisy, -1, 1).astype(np.float32), False


def collect(
    suite: str,
    out_dir: Path,
    *,
    episodes: int = 50,
    views: dict[str, tuple[int, int]] | None = None,
    seed: int = 0,
    workers: int = 2,
    noise: float = 0.15,
    tasks: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Write `episodes` successful demonstrations of every task (or of `tasks`) and return counts a task."""
    table = sim.tasks(suite)
    if bad := [i for i in tasks if not 0 <= i < len(table)]:
        raise ValueError(f"{suite} has tasks 0 to {len(table) - 1}, got {bad}")
    if not 0 <= noise < 0.9 or episodes < 1:
        raise ValueError(f"noise must be in [0, 0.9) and episodes >= 1, got {noise} and {episodes}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    arguments = {"suite": suite, "episodes": episodes, "seed": seed, "noise": noise, "views": views}
    _guard(out_dir / "collect.json", arguments)
    wanted = [t for t in table if (not tasks or t.index in tasks) and not _path(out_dir, t).exists()]
    report: dict[str, Any] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("episodes"), TimeRemainingColumn())
    context = multiprocessing.get_context("spawn")
    with Progress(*columns, console=Console(stderr=True)) as progress, ProcessPoolExecutor(workers, context) as pool:
        bar = progress.add_task(f"collect {suite}", total=len(wanted) * episodes)
        attempts = {t.index: 0 for t in wanted}
        failed = {t.index: 0 for t in wanted}
        pending: dict[Any, tuple[sim.Task, int]] = {}
        for task in wanted:
            parts = _parts(out_dir, task)
            parts.mkdir(exist_ok=True)
            have = len(list(parts.glob("*.hdf5")))
            attempts[task.index] = max((int(p.stem) + 1 for p in parts.glob("*.hdf5")), default=0)
            progress.advance(bar, have)
            for _ in range(episodes - have):
                _submit(pool, pending, task, attempts, out_dir, views, seed, noise)
            if have >= episodes:
                _merge(out_dir, task, arguments)
        while pending:
            future = next(as_completed(pending))
            task, attempt = pending.pop(future)
            if future.result():
                progress.advance(bar)
                if len(list(_parts(out_dir, task).glob("*.hdf5"))) >= episodes:
                    _merge(out_dir, task, arguments)
            else:
                failed[task.index] += 1
                if failed[task.index] > episodes + 10:
                    raise RuntimeError(f"{task.suite} task {task.index} ({task.instruction}): the expert failed {failed[task.index]} times")
                _submit(pool, pending, task, attempts, out_dir, views, seed, noise)
    for task in wanted:
        report[task.name] = {"episodes": episodes, "failed": failed[task.index]}
    return report


def _submit(pool: Any, pending: dict[Any, Any], task: sim.Task, attempts: dict[int, int], out_dir: Path, views: Any, seed: int, noise: float) -> None:
    attempt = attempts[task.index]
    attempts[task.index] += 1
    pending[pool.submit(_record, task, attempt, _parts(out_dir, task), views, seed, noise)] = (task, attempt)


def _guard(path: Path, arguments: dict[str, Any]) -> None:
    """Refuse to mix demonstrations made with different arguments in one directory."""
    text = json.dumps(arguments, sort_keys=True)
    if path.exists():
        if path.read_text() != text:
            raise ValueError(f"{path.parent} holds demonstrations made with {path.read_text()}, asked for {text}: choose another directory")
        return
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text)
    os.replace(scratch, path)


def _path(out_dir: Path, task: sim.Task) -> Path:
    return out_dir / f"{task.name}_demo.hdf5"


def _parts(out_dir: Path, task: sim.Task) -> Path:
    return out_dir / f".{task.name}.parts"


def _merge(out_dir: Path, task: sim.Task, arguments: dict[str, Any]) -> None:
    parts = _parts(out_dir, task)
    files = sorted(parts.glob("*.hdf5"), key=lambda p: int(p.stem))
    found = [episode for file in files for episode in read_episodes(file)]
    write_episodes(_path(out_dir, task), found, {"env_name": task.suite, "source": "scripted expert", **arguments})
    shutil.rmtree(parts)


_ENVIRONMENTS: dict[Any, Any] = {}


def _environment(task: sim.Task, views: Any) -> Any:
    """Return this process's environment of `task`; the last one is kept, LIBERO's cost seconds to make."""
    key = (task.suite, task.index, json.dumps(views))
    if key not in _ENVIRONMENTS:
        for old in _ENVIRONMENTS.values():
            old.close()
        _ENVIRONMENTS.clear()
        _ENVIRONMENTS[key] = sim.make(task, views)
    return _ENVIRONMENTS[key]


def _record(task: sim.Task, attempt: int, parts: Path, views: Any, seed: int, noise: float) -> bool:
    """Run one attempt; write it if it succeeds."""
    env = _environment(task, views)
    init = FIRST_INIT + seed * INITS_PER_SEED + attempt
    episode = record_episode(env, sim.expert(env), task, init, seed, noise)
    if episode is None:
        return False
    write_episodes(parts / f"{attempt}.hdf5", [episode], {"env_name": task.suite})
    return True


def record_episode(env: Any, expert: sim.Expert, task: sim.Task, init: int, seed: int, noise: float) -> Episode | None:
    """Return the expert's episode from initial state `init`, or None when it did not succeed in time."""
    observation, _ = env.reset(seed=seed, options={"init": init})
    rng = np.random.default_rng([seed, task.index, init])
    perturbation = Perturbation(rng, noise, {})
    steps: dict[str, list[Any]] = {"actions": [], "states": [], "sim_states": [], "is_expert": []}
    images: dict[str, list[np.ndarray]] = {name: [] for name in observation if name != "state"}
    success = False
    for _ in range(env.horizon):
        action, is_expert = perturbation.apply(np.clip(expert.act(), -1, 1).astype(np.float32))
        steps["actions"].append(action)
        steps["states"].append(observation["state"])
        steps["sim_states"].append(env.get_state())
        steps["is_expert"].append(is_expert)
        for name, frames in images.items():
            frames.append(observation[name])
        observation, _, success, _, _ = env.step(action)
        if success:
            break
    if not success:
        return None
    return Episode(
        instruction=task.instruction,
        suite=task.suite,
        task=task.name,
        actions=np.array(steps["actions"], dtype=np.float32),
        states=np.array(steps["states"], dtype=np.float32),
        images={name: np.array(frames) for name, frames in images.items()},
        sim_states=np.array(steps["sim_states"], dtype=np.float64),
        is_expert=np.array(steps["is_expert"], dtype=np.bool_),
        init=init,
        seed=seed,
    )


def replay(path: Path, transform: Callable[[np.ndarray], np.ndarray] = lambda actions: actions) -> list[tuple[int, bool]]:
    """Re-execute each stored episode from its initial state; return (episode, success). No camera is rendered.

    `transform` changes the actions (T, 7) before they are executed, for example through the bins of the policy.
    """
    results = []
    env, made_for = None, None
    for i, episode in enumerate(read_episodes(Path(path), images=False)):
        task = next((t for t in sim.tasks(episode.suite) if t.name == episode.task), None)
        if task is None:
            raise ValueError(f"{path}: {episode.suite} has no task {episode.task!r}; was it collected by another version?")
        if env is None or made_for != task:
            env, made_for = sim.make(task, {}), task
        env.reset(options={"init": max(episode.init, 0)})
        simulator: Any = env
        simulator.set_state(episode.sim_states[0])
        success = False
        for action in transform(episode.actions):
            success = bool(env.step(action)[2])
        results.append((i, success))
    return results
