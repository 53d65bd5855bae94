"""Published demonstrations -> ours: their actions executed again, rendered at any size, successes kept.

`worldvla regenerate FOLDER --out DIR --views agentview=256x256 wrist=256x256`. What the published recipe does
before training (regenerate_libero_dataset_filter_no_op.py): no-ops are dropped, so is what no longer
succeeds, and both are counted. Stopped, the same command goes on. Workers never import torch.
"""

import itertools
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldvla.data.collect import Views, kept, record, start, task_of
from worldvla.data.episode import Episode, count_episodes, facts, read_episodes, write_episodes
from worldvla.progress import progress_bar
from worldvla.sim import suites as sim
from worldvla.machine import cores

NO_OP = 1e-4
"""Norm of the first six dims below which an action that leaves the gripper alone is a no-op."""
TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "upright": lambda picture: picture,
    "upside down (turned by 180 degrees)": lambda picture: picture[::-1, ::-1],
    "upside down (mirrored)": lambda picture: picture[::-1],
    "mirrored left to right": lambda picture: picture[:, ::-1],
}


@dataclass
class Counts:
    """What became of the demonstrations of one file."""

    kept: int = 0
    lost: int = 0
    """Whose actions do not succeed again."""
    steps: int = 0
    no_ops: int = 0
    """Steps that were dropped."""


def is_no_op(actions_TA: np.ndarray) -> np.ndarray:
    """Return which of the actions (T, 7) neither move nor change the gripper, bool (T,).

    The published filter compares with the action before, the first one with none
    (regenerate_libero_dataset_filter_no_op.py:38).
    """
    still = np.linalg.norm(actions_TA[:, :-1], axis=1) < NO_OP
    gripper = actions_TA[:, -1]
    return still & np.concatenate([[True], gripper[1:] == gripper[:-1]])


def play(env: Any, episode: Episode, actions_TA: np.ndarray) -> Episode | None:
    """Execute actions (T, 7) from the episode's first state; return what was seen up to success, or None."""
    todo = iter(actions_TA)

    def begin() -> dict[str, Any]:
        start(env, episode)
        return env.observe()

    return record(
        env, lambda _: (next(todo), True), episode.init, episode.seed, begin=begin, limit=len(actions_TA)
    )


def regenerate(
    files: Sequence[Path],
    out_dir: Path,
    views: Views,
    *,
    drop_no_ops: bool = True,
    workers: int = 0,
    make: Callable[..., Any] = sim.make,
) -> dict[str, Counts]:
    """Write one file in `out_dir` for each of `files`; return what became of their demonstrations, by name.

    `workers`: processes that simulate; 0: one a core that this process may use.
    A file of which nothing succeeds raises ValueError, which says why if it can be found.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    todo = [path for path in files if not (out_dir / path.name).exists()]
    parts = {path: out_dir / f".{path.stem}.parts" for path in todo}
    jobs = [(path, i) for path in todo for i in range(count_episodes(path))]
    pool = ProcessPoolExecutor(workers or cores(), multiprocessing.get_context("spawn"))
    try:
        with progress_bar() as progress:
            bar = progress.add_task("regenerate", total=len(jobs))
            futures = {}
            for path, i in jobs:
                parts[path].mkdir(exist_ok=True)
                future = pool.submit(_one, path, i, parts[path], views, drop_no_ops, make)
                futures[future] = path
            left = {path: sum(p == path for p, _ in jobs) for path in todo}
            for future in as_completed(futures):
                future.result()
                path = futures[future]
                left[path] -= 1
                if not left[path]:
                    _merge(path, parts[path], out_dir / path.name, make)
                progress.advance(bar)
    finally:
        pool.shutdown(cancel_futures=True)
    return {path.name: _counts(out_dir / path.name) for path in files}


def _environment(episode: Episode, views: Views, make: Callable[..., Any]) -> Any:
    task = task_of(episode)
    return kept((make, task, views), lambda: (make(task, views),))[0]


def _one(
    path: Path, index: int, parts: Path, views: Views, drop_no_ops: bool, make: Callable[..., Any]
) -> None:
    """Regenerate one demonstration; leave it, or an empty `.failed`, in the parts."""
    done = parts / f"{index}.hdf5"
    if done.exists() or done.with_suffix(".failed").exists():
        return
    episode = next(itertools.islice(read_episodes(path, images=False), index, None))
    dropped = is_no_op(episode.actions) if drop_no_ops else np.zeros(len(episode), dtype=bool)
    found = play(_environment(episode, views, make), episode, episode.actions[~dropped])
    if found is None:
        done.with_suffix(".failed").touch()
    else:
        write_episodes(done, [found], {"no_ops": int(dropped.sum())})


def _merge(path: Path, parts: Path, out: Path, make: Callable[..., Any]) -> None:
    good = sorted(parts.glob("*.hdf5"), key=lambda part: int(part.stem))
    lost = len(list(parts.glob("*.failed")))
    if not good:
        wrong = [*wrong_pictures(path, make), *inverted_gripper(path, make)]
        why = "; ".join(wrong) or "were they made with another version of the simulator?"
        raise ValueError(f"{path}: none of {lost} demonstrations succeeds again; {why}")
    counts = {"lost": lost, "no_ops": sum(facts(part)["no_ops"] for part in good)}
    found = (episode for part in good for episode in read_episodes(part))
    told = {"source": f"the actions of {path.name}, executed again", **counts}
    write_episodes(out, found, told)
    shutil.rmtree(parts)


def wrong_pictures(path: Path, make: Callable[..., Any] = sim.make) -> list[str]:
    """Return one line for each view whose pictures are not upright: the first one of the file's first
    demonstration beside the simulator's in the same state."""
    episode = next(read_episodes(path))
    sizes = {view: (images.shape[1], images.shape[2]) for view, images in episode.images.items()}
    env = _environment(episode, sizes, make)
    env.reset(options={"init": max(episode.init, 0)})
    env.set_state(episode.sim_states[0])
    seen, found = env.observe(), []
    for view, images in episode.images.items():
        stored, true = images[0].astype(float), seen[view].astype(float)
        differences = {name: float(np.abs(turn(stored) - true).mean()) for name, turn in TURNS.items()}
        best = min(differences, key=lambda name: differences[name])
        if best != "upright" and differences[best] < 0.7 * differences["upright"]:
            found.append(
                f"{path.name}: pictures of {view} are {best}: mean difference to the simulator's "
                f"{differences[best]:.1f} of 255 turned back, {differences['upright']:.1f} as they are; "
                "`worldvla regenerate` draws them again"
            )
    return found


def inverted_gripper(path: Path, make: Callable[..., Any] = sim.make) -> list[str]:
    """Return a line if the file's first demonstration succeeds with the gripper's sign changed alone."""
    episode = next(read_episodes(path, images=False))
    env = _environment(episode, {}, make)
    flipped = episode.actions * np.array([1, 1, 1, 1, 1, 1, -1], dtype=np.float32)
    if play(env, episode, episode.actions) is not None or play(env, episode, flipped) is None:
        return []
    return [f"{path.name}: the gripper is inverted, expected -1 open and +1 closed: change its sign"]


def _counts(path: Path) -> Counts:
    told = facts(path)
    return Counts(told["num_demos"], told["lost"], told["total"], told["no_ops"])
