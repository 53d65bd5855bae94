"""Demonstration files (LIBERO/robomimic HDF5) -> TokenStore: every frame once through the image tokenizer.

`worldvla tokenize data/tabletop_object --tokenizer out/tokenizer --out out/store`
"""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from worldvla.data.episode import Episode, fingerprint, read_demos
from worldvla.data.sources.hdf5 import ACTION_NAMES, open_files
from worldvla.data.sources.source import Source
from worldvla.data.store import FrameTokenizer, TokenStore, read_manifest, write_store
from worldvla.files import Damaged, only_writer
from worldvla.progress import progress_bar

MOST = 20
"""Faults that an error lists."""
SEVERAL = 10
"""Steps with a moving gripper from which on its sign can be told."""


def tokenize(
    files: Iterable[Path], tokenizer: FrameTokenizer, out_dir: Path, skip_bad: bool = False, fps: float = 0.0
) -> TokenStore:
    """Write the store of all episodes in `files` and return it. `fps`: steps a second, if they do not say.

    All are read and checked first: faults raise ValueError, which names them; with `skip_bad` the rest is
    tokenized, and the manifest tells what is left out. Idempotent: a store of the same files by the same
    tokenizer is opened as it is.
    """
    files = sorted(set(files), key=lambda file: (file.name, str(file)))
    good: dict[Path, list[str]] = {}

    def checked() -> Iterator[tuple[int, list[str]]]:
        for path in files:
            good[path], faults = check(path)
            yield len(good[path]), faults

    episodes = (episode for path in files for episode in _chosen(path, good[path]))
    source = open_files(files[0].parent, files) if files else None  # None: nothing is sound, as `check` says
    facts = source.at(fps).facts() if source else {}
    facts |= {"files": [fingerprint(path) for path in files]}
    return _write(out_dir, tokenizer, facts, skip_bad, len(files), checked(), episodes)


def tokenize_source(
    source: Source, tokenizer: FrameTokenizer, out_dir: Path, skip_bad: bool = False
) -> TokenStore:
    """Write the store of a data set of another format, as `tokenize`; its facts go into the manifest."""
    root = source.path
    prints = [fingerprint(file) | {"name": file.relative_to(root).as_posix()} for file in source.present()]
    attempts = (episode for _, episode in source.attempts(True))
    checked = ((1, []) if isinstance(e, Episode) else (0, [str(e)]) for e in attempts)
    episodes = (e for _, e in source.attempts(True) if isinstance(e, Episode))
    facts = source.facts() | {"files": prints}
    return _write(out_dir, tokenizer, facts, skip_bad, source.num_episodes, checked, episodes)


def _write(
    out_dir: Path,
    tokenizer: FrameTokenizer,
    facts: dict[str, Any],
    skip_bad: bool,
    total: int,
    checked: Iterable[tuple[int, list[str]]],
    episodes: Iterable[Episode],
) -> TokenStore:
    """Write the store of `episodes`, which are read once all `total` of `checked`, (sound episodes, faults),
    have been; a store of the same `facts` by the same tokenizer is opened as it is."""
    with only_writer(out_dir):
        if not _is_made(out_dir, tokenizer, facts, skip_bad):
            with progress_bar(transient=True) as progress:
                bar, count, faults = progress.add_task("check episodes", total=total), 0, list[str]()
                for number, wrong in checked:
                    count, faults = count + number, faults + wrong
                    progress.advance(bar)
                facts = facts | _skipped(faults, skip_bad and count > 0, skip_bad)
                bar = progress.add_task("tokenize episodes", total=count)
                step = lambda _: progress.advance(bar)  # noqa: E731
                write_store(out_dir, episodes, tokenizer, source=facts, on_episode=step)
    return TokenStore.open(out_dir, tokenizer.digest())


def _is_made(out_dir: Path, tokenizer: FrameTokenizer, facts: dict[str, Any], skip_bad: bool) -> bool:
    if (manifest := read_manifest(out_dir)) is None:
        return False
    source = dict(manifest.get("source", {}))
    is_whole = source.pop("skipped", None) is None
    rules = (manifest["tokenizer"], manifest["grey_levels"])
    return rules == (tokenizer.digest(), tokenizer.grey_levels) and source == facts and (is_whole or skip_bad)


def _skipped(faults: list[str], may_go_on: bool, skip_bad: bool) -> dict[str, Any]:
    """Return what a manifest says of faults that are left out; raise ValueError if they may not be."""
    if faults and not may_go_on:
        more = f"; and {len(faults) - MOST} more" if len(faults) > MOST else ""
        fix = "mend or remove them" + ("" if skip_bad else ", or go on without them by --skip-bad")
        raise ValueError(f"{len(faults)} faults: {'; '.join(faults[:MOST])}{more}: {fix}")
    return {"skipped": {"count": len(faults), "faults": faults}} if faults else {}


def _chosen(path: Path, names: Collection[str]) -> Iterator[Episode]:
    for name, episode in read_demos(path) if names else ():
        if name in names and isinstance(episode, Episode):
            yield episode


def check(path: Path) -> tuple[list[str], list[str]]:
    """Read a file of demonstrations whole; return the names of those that are sound, and a line a fault.

    A gripper that runs from 0 to 1 or the other way round is a fault of all of them.
    """
    good: list[str] = []
    faults: list[str] = []
    hands: list[np.ndarray] = []
    try:
        for name, episode in read_demos(path):
            if isinstance(episode, Damaged):
                faults.append(str(episode))
            elif wrong := _wrong_actions(episode):
                faults.append(f"{path}: data/{name}: {wrong}")
            else:
                good.append(name)
                width = np.abs(episode.states[:, 6:]).sum(1)
                hands.append(np.stack([episode.actions[:-1, 6], np.diff(width)], 1))
    except ValueError as error:
        return [], [str(error)]
    if good and (wrong := _wrong_gripper(np.concatenate(hands))):
        return [], [*faults, f"{path}: {wrong}"]
    return good, faults


def _wrong_actions(episode: Episode) -> str:
    """Return what is wrong with actions that are no motions of LIBERO's controller, empty if nothing."""
    low, high = episode.actions.min(0), episode.actions.max(0)
    for dim in np.flatnonzero(np.maximum(-low, high) > 1 + 1e-6):
        return (
            f"actions[:, {dim}] ({ACTION_NAMES[dim]}) range from {low[dim]:.3g} to {high[dim]:.3g}, expected "
            "[-1, 1] of the controller: are they scaled, or absolute poses?"
        )
    places = episode.states[:, :3]
    moves = len(places) > 1 and np.ptp(places, 0).max() > 0.05
    if moves and np.abs(episode.actions[:-1, :3] - places[1:]).max() < 0.05:
        return (
            f"actions[:, 0:3] (x, y, z) from {low[:3].min():.3g} to {high[:3].max():.3g} are where the hand "
            "is, expected how it moves: absolute poses are no actions of the controller"
        )
    return ""


def _wrong_gripper(hands: np.ndarray) -> str:
    """Return what is wrong with the gripper's commands; `hands` (M, 2): command, change of the width after it
    (m). A command of +1 closes: the width shrinks."""
    command, change = hands.T
    if len(hands) and 0 <= command.min() < 0.5:  # it may stay closed in a whole file
        return (
            f"actions[:, 6] (gripper) range from {command.min():.3g} to {command.max():.3g}, expected -1 "
            "(open) to 1 (closed)"
        )
    moves = np.abs(change) > 1e-3
    if moves.sum() >= SEVERAL and (command * change)[moves].sum() > 0.6 * np.abs(change[moves]).sum():
        return (
            "actions[:, 6] (gripper) range from 1 (open) to -1 (closed), expected -1 (open) to 1 (closed): "
            "change its sign"
        )
    return ""
