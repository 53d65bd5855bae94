"""Stored actions executed again: replayed and counted, or regenerated, which is rendered at any size.

`worldvla replay FILES`; `worldvla regenerate FOLDER --out DIR --views agentview=256x256 wrist=256x256`. The
latter is what the published recipe does before training (regenerate_libero_dataset_filter_no_op.py): no-ops
are dropped, so is what no longer succeeds, and both are counted. Stopped, the same command goes on.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from worldvla.data.collect import Job, Views, check_sizes, guard, kept, record, work_off
from worldvla.data.episode import Episode, count_episodes, facts, fingerprint, read_episodes
from worldvla.sim import suites as sim
from worldvla.sim.protocol import SETTLE_ACTION, VIEWS, Task
from worldvla.tokenizers.action import compute_statistics

NO_OP = 1e-4
"""Norm of the first six dims below which an action that leaves the gripper alone is a no-op."""
TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "upright": lambda picture: picture,
    "upside down (turned by 180 degrees)": lambda picture: picture[::-1, ::-1],
    "upside down (mirrored)": lambda picture: picture[::-1],
    "mirrored left to right": lambda picture: picture[:, ::-1],
}


def task_of(episode: Episode) -> Task:
    """Return the task that an episode is a demonstration of; an unknown one raises ValueError."""
    known = {task.name: task for task in sim.tasks(episode.suite)}
    if episode.task not in known:
        raise ValueError(
            f"{episode.suite} has no task {episode.task!r}, of which there are demonstrations; it has "
            f"{', '.join(known)}: name file and folder as LIBERO does, or collect again"
        )
    return known[episode.task]


def start(env: Any, episode: Episode) -> None:
    """Put the environment where the episode begins. Ours begin after settling, with all that the next step
    depends on; published ones with a bare state, after which things settle (rules.settling)."""
    is_ours = episode.init >= 0
    env.reset(options={"init": max(episode.init, 0)} | ({} if is_ours else {"settle": 0}))
    # Setting a state costs the solver's warm start, hence the last bits; reset does not.
    if not np.array_equal(env.get_state(), episode.sim_states[0]):
        env.set_state(episode.sim_states[0])
    for _ in range(0 if is_ours else sim.suite(episode.suite).rules.settling):
        env.step(np.array(SETTLE_ACTION))


def play(env: Any, episode: Episode, actions_TA: np.ndarray) -> Episode | None:
    """Execute actions (T, 7) from the episode's first state; return what was seen up to success, or None."""
    todo = iter(actions_TA)

    def begin() -> dict[str, Any]:
        start(env, episode)
        return env.observe()

    return record(
        env, lambda _: (next(todo), True), episode.init, episode.seed, begin=begin, limit=len(actions_TA)
    )


def _environment(episode: Episode, views: Views) -> Any:
    task = task_of(episode)
    return kept((sim.make, task, views), lambda: (sim.make(task, views),))[0]


# -- replay --------------------------------------------------------------------------------------------------


def rerun(
    path: Path, transform: Callable[[np.ndarray], np.ndarray] = lambda actions: actions
) -> Iterator[bool]:
    """Yield whether each stored episode succeeds when its actions are executed again; nothing is rendered.

    `transform` changes the actions (T, 7) before they are executed, such as `through_bins`.
    """
    for episode in read_episodes(path, images=False):
        env = _environment(episode, {})
        start(env, episode)
        yield any(env.step(action)[2] for action in transform(episode.actions))


def through_bins(files: Sequence[Path]) -> Callable[[np.ndarray], np.ndarray]:
    """Return actions (T, 7) -> those that a policy trained on `files` would execute, were it perfect."""
    episodes = [episode for path in files for episode in read_episodes(path, images=False)]
    actions, states = (np.concatenate([getattr(e, name) for e in episodes]) for name in ("actions", "states"))
    statistics = compute_statistics(actions, states, "minmax")
    return lambda actions: statistics.decode_actions(statistics.encode_actions(actions))


# -- regenerate ----------------------------------------------------------------------------------------------


def is_no_op(actions_TA: np.ndarray) -> np.ndarray:
    """Return which of the actions (T, 7) neither move nor change the gripper, bool (T,).

    The published filter compares with the action before, the first one with none
    (regenerate_libero_dataset_filter_no_op.py:38).
    """
    still = np.linalg.norm(actions_TA[:, :-1], axis=1) < NO_OP
    gripper = actions_TA[:, -1]
    return still & np.concatenate([[True], gripper[1:] == gripper[:-1]])


def kept_actions(episode: Episode) -> np.ndarray:
    return episode.actions[~is_no_op(episode.actions)]


def _attempt(path: Path, views: Views, number: int) -> Episode | None:
    """Return what the demonstration of this number becomes, None if it fails now."""
    episode = next(itertools.islice(read_episodes(path, images=False), number, None))
    if played := play(_environment(episode, views), episode, kept_actions(episode)):
        rows = np.flatnonzero(~is_no_op(episode.actions))[: len(played)]
        labels = episode.expert_actions
        labels = labels if labels is None else labels[rows]
        return replace(played, is_expert=episode.is_expert[rows], expert_actions=labels)
    return None


def regenerate(
    files: Sequence[Path], out_dir: Path, views: Views, *, workers: int = 0
) -> dict[str, dict[str, Any]]:
    """Write one file in `out_dir` for each of `files`; return the `facts` of each by name: `lost` are the
    demonstrations whose actions do not succeed again, `no_ops` the steps that were dropped.

    `workers`: processes that simulate; 0: one a core that this process may use.
    A file of which nothing succeeds raises ValueError, which says why if that can be known; so do two files
    of one name, and files in `out_dir` that were made of others or with other options.
    """
    out_dir, names = Path(out_dir), [path.name for path in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{len(twice)} names occur twice, {twice[0]} first: regenerate each folder into its own"
        )
    check_sizes(views, workers)
    with guard(out_dir / "regenerate.json", {"views": views, "drop_no_ops": True}):
        jobs, digests = [], {path.name: str(fingerprint(path)["sha256"]) for path in files}
        for path in files:
            out, digest = out_dir / path.name, digests[path.name]
            number, parts = count_episodes(path), out_dir / f".{path.stem}.{digest}.parts"
            jobs.append(Job(out, partial(_attempt, path, views), number, number, parts))
            if out.exists() and (other := facts(out).get("sha256")) != digest:
                raise ValueError(
                    f"{out} was made of a file {other}, not of {path} ({digest}): choose another directory"
                )
        for job in work_off(jobs, workers, "regenerate"):
            _finish(job, next(path for path in files if path.name == job.path.name), digests[job.path.name])
        return {name: facts(out_dir / name) for name in names}


def _finish(job: Job, path: Path, digest: str) -> None:
    """Merge the parts of what was made of `path`; none at all raise ValueError."""
    good, bad = job.done()
    if not good:
        job.forget_failures()
        wrong = [*wrong_pictures(path), *inverted_gripper(path)]
        why = "; ".join(wrong) or "were they made with another version of the simulator?"
        raise ValueError(f"{path}: none of {len(bad)} demonstrations succeeds again; {why}")
    episodes = list(read_episodes(path, images=False))
    no_ops = sum(len(episodes[i]) - len(kept_actions(episodes[i])) for i in good)
    source = f"the actions of {path.name}, executed again"
    job.merge({"source": source, "sha256": digest, "lost": len(bad), "no_ops": no_ops})


# -- what can be wrong with files that others made -----------------------------------------------------------


def wrong_pictures(path: Path) -> list[str]:
    """Return one line for each view whose pictures are not upright: the first one of the file's first
    demonstration beside the simulator's in the same state. Other cameras than VIEWS are not compared: the
    simulator need not have them."""
    episode = next(read_episodes(path))
    pictures = {view: images for view, images in episode.images.items() if view in VIEWS}
    sizes = {view: (images.shape[1], images.shape[2]) for view, images in pictures.items()}
    env = _environment(episode, sizes)
    env.reset(options={"init": max(episode.init, 0)})
    env.set_state(episode.sim_states[0])
    seen, found = env.observe(), []
    for view, images in pictures.items():
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


def inverted_gripper(path: Path) -> list[str]:
    """Return a line if the file's first demonstration succeeds with the gripper's sign changed alone."""
    episode = next(read_episodes(path, images=False))
    env = _environment(episode, {})
    flipped = episode.actions * np.array([1, 1, 1, 1, 1, 1, -1], dtype=np.float32)
    if play(env, episode, episode.actions) is not None or play(env, episode, flipped) is None:
        return []
    return [f"{path.name}: the gripper is inverted, expected -1 open and +1 closed: change its sign"]
