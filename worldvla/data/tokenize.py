"""Demonstration files (LIBERO/robomimic HDF5) -> TokenStore: every frame once through the image tokenizer.

`worldvla tokenize data/tabletop_object --tokenizer out/tokenizer --out out/store`
"""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from worldvla.data.augment import augmented
from worldvla.data.episode import Episode, fingerprint, read_demos
from worldvla.data.sources.hdf5 import ACTION_NAMES, open_files
from worldvla.data.sources.source import Source
from worldvla.data.store import AUGMENTED, FrameTokenizer, TokenStore, read_manifest, write_store
from worldvla.files import DamagedFileError, only_writer
from worldvla.progress import progress_bar

MOST = 20
"""Faults that an error lists."""
SEVERAL = 10
"""Steps with a moving gripper from which on its sign can be told."""


def tokenize(
    files: Iterable[Path],
    tokenizer: FrameTokenizer,
    out_dir: Path,
    skip_bad: bool = False,
    fps: float = 0.0,
    augment: int = 0,
) -> TokenStore:
    """Write the store of all episodes in `files` and return it. `fps`: steps a second, if they do not say.
    `augment`: the seed of changes to the pictures (data/augment.py); 0: none.

    All are read and checked first: faults raise ValueError, which names them; with `skip_bad` the rest is
    tokenized, and the manifest tells what is left out. Idempotent: a store of the same files by the same
    tokenizer is opened as it is.
    """
    files = sorted(set(files), key=lambda file: (file.name, str(file)))
    good: dict[Path, list[str]] = {}
    alike = _Alike(tokenizer.factor)

    def checked() -> Iterator[tuple[int, list[str]]]:
        few: dict[Path, np.ndarray] = {}
        for path in files:
            good[path], faults, hands = check(path, alike)
            if good[path] and _moves(hands).sum() < SEVERAL:
                few[path] = hands
            yield len(good[path]), faults
        if few and (wrong := _wrong_gripper(np.concatenate(list(few.values())))):
            for path in few:
                yield -len(good.pop(path)), [f"{path}: {wrong}"]

    episodes = (episode for path in files for episode in _chosen(path, good.get(path, ())))
    source = open_files(files[0].parent, files) if files else None  # None: nothing is sound, as `check` says
    facts = source.at(fps).facts() if source else {}
    facts |= {"files": [fingerprint(path) for path in files]}
    return _write(out_dir, tokenizer, facts, skip_bad, len(files), checked(), episodes, augment)


def tokenize_source(
    source: Source, tokenizer: FrameTokenizer, out_dir: Path, skip_bad: bool = False, augment: int = 0
) -> TokenStore:
    """Write the store of a data set of another format, as `tokenize`; its facts go into the manifest."""
    root = source.path
    prints = [fingerprint(file) | {"name": file.relative_to(root).as_posix()} for file in source.present()]
    alike, good = _Alike(tokenizer.factor), set[str]()

    def checked() -> Iterator[tuple[int, list[str]]]:
        for name, episode in source.attempts(True):
            if wrong := alike.fault(episode) if isinstance(episode, Episode) else str(episode):
                yield 0, [wrong if isinstance(episode, ValueError) else f"{root}: {name}: {wrong}"]
            else:
                good.add(name)
                yield 1, []

    episodes = (e for name, e in source.attempts(True) if name in good and isinstance(e, Episode))
    facts = source.facts() | {"files": prints}
    return _write(out_dir, tokenizer, facts, skip_bad, source.num_episodes, checked(), episodes, augment)


def _write(
    out_dir: Path,
    tokenizer: FrameTokenizer,
    facts: dict[str, Any],
    skip_bad: bool,
    total: int,
    checked: Iterable[tuple[int, list[str]]],
    episodes: Iterable[Episode],
    augment: int,
) -> TokenStore:
    """Write the store of `episodes`, which are read once all `total` of `checked`, (sound episodes, faults),
    have been; a store of the same `facts` by the same tokenizer is opened as it is."""
    if augment:
        rng, facts = np.random.default_rng(augment), facts | {AUGMENTED: augment}
        episodes = (augmented(episode, rng) for episode in episodes)
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


class _Alike:
    """What the episodes of a store share, as the first has it: views, sizes of pictures, length of labels."""

    def __init__(self, factor: int) -> None:
        self.factor, self.sizes, self.label = factor, dict[str, tuple[int, ...]](), 0

    def fault(self, episode: Episode) -> str:
        """Return why an episode does not fit into the store, empty if it does."""
        sizes = {view: images.shape[1:3] for view, images in episode.images.items()}
        label = 0 if episode.expert_actions is None else episode.expert_actions.shape[1]
        for view, (rows, cols) in sizes.items():
            if rows % self.factor or cols % self.factor:
                return (
                    f"{view} has pictures of {rows}x{cols} pixels, the image tokenizer needs multiples of "
                    f"{self.factor}: render or resize them"
                )
        if not self.sizes:
            self.sizes, self.label = sizes, label
        if sizes.keys() != self.sizes.keys():
            return f"has views {sorted(sizes)}, those before it {sorted(self.sizes)}: use stores of their own"
        for view, (rows, cols) in self.sizes.items():
            if sizes[view] != (rows, cols):
                got = "x".join(map(str, sizes[view]))
                return f"{view} has pictures of {got} pixels, those before it {rows}x{cols}: use one size"
        if label != self.label:
            return f"has {label} expert actions a step, those before it {self.label}: use stores of their own"
        return ""


def check(path: Path, alike: _Alike) -> tuple[list[str], list[str], np.ndarray]:
    """Read a file of demonstrations whole; return the names of those that are sound, a line a fault, and what
    the hands of the sound ones did (`_wrong_gripper`).

    A gripper that runs from 0 to 1 or the other way round is a fault of all of them.
    """
    good: list[str] = []
    faults: list[str] = []
    hands = [np.zeros((0, 2))]
    try:
        for name, episode in read_demos(path):
            if isinstance(episode, DamagedFileError):
                faults.append(str(episode))
            elif wrong := _wrong_actions(episode) or alike.fault(episode):
                faults.append(f"{path}: data/{name}: {wrong}")
            else:
                good.append(name)
                width = np.abs(episode.states[:, 6:]).sum(1)
                hands.append(np.stack([episode.actions[:-1, 6], np.diff(width)], 1))
    except ValueError as error:
        return [], [str(error)], hands[0]
    if good and (wrong := _wrong_gripper(np.concatenate(hands))):
        return [], [*faults, f"{path}: {wrong}"], hands[0]
    return good, faults, np.concatenate(hands)


def _wrong_actions(episode: Episode) -> str:
    """Return what is wrong with actions that are no motions of LIBERO's controller, empty if nothing."""
    labels = np.zeros((0, 1, 7)) if episode.expert_actions is None else episode.expert_actions
    for name, array in {"expert_actions[:, :": labels.reshape(-1, 7), "actions[:": episode.actions}.items():
        low, high = array.min(0, initial=0), array.max(0, initial=0)
        for dim in np.flatnonzero(np.maximum(-low, high) > 1 + 1e-6):
            return (
                f"{name}, {dim}] ({ACTION_NAMES[dim]}) range from {low[dim]:.3g} to {high[dim]:.3g}, "
                "expected [-1, 1] of the controller: are they scaled, or absolute poses?"
            )
    low, high = episode.actions.min(0), episode.actions.max(0)
    places = episode.states[:, :3]
    moves = len(places) > 1 and np.ptp(places, 0).max() > 0.05
    if moves and np.abs(episode.actions[:-1, :3] - places[1:]).max() < 0.05:
        return (
            f"actions[:, 0:3] (x, y, z) from {low[:3].min():.3g} to {high[:3].max():.3g} are where the hand "
            "is, expected how it moves: absolute poses are no actions of the controller"
        )
    return ""


def _moves(hands: np.ndarray) -> np.ndarray:
    """Return at which steps the gripper moves, (M,) bool."""
    return np.abs(hands[:, 1]) > 1e-3


def _wrong_gripper(hands: np.ndarray) -> str:
    """Return what is wrong with the gripper's commands; `hands` (M, 2): command, change of the width after it
    (m). A command of +1 closes: the width shrinks."""
    command, change = hands.T
    if len(hands) and 0 <= command.min() < 0.5:  # it may stay closed in a whole file
        return (
            f"actions[:, 6] (gripper) range from {command.min():.3g} to {command.max():.3g}, expected -1 "
            "(open) to 1 (closed)"
        )
    moves = _moves(hands)
    if moves.sum() >= SEVERAL and (command * change)[moves].sum() > 0.6 * np.abs(change[moves]).sum():
        return (
            "actions[:, 6] (gripper) range from 1 (open) to -1 (closed), expected -1 (open) to 1 (closed): "
            "change its sign"
        )
    return ""
