"""Demonstration files (LIBERO/robomimic HDF5) -> TokenStore: every frame once through the image tokenizer.

`worldvla tokenize data/tabletop_object --tokenizer out/tokenizer --out out/store`
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldvla.data.episode import Episode, fingerprint, read_demos
from worldvla.data.sources.hdf5 import ACTION_NAMES
from worldvla.data.sources.source import Source
from worldvla.data.store import FrameTokenizer, TokenStore, read_manifest, write_store
from worldvla.files import Damaged, only_writer
from worldvla.progress import progress_bar

MOST = 20
"""Faults that an error lists."""
SEVERAL = 10
"""Steps with a moving gripper from which on its sign can be told."""


def tokenize(
    files: Iterable[Path],
    tokenizer: FrameTokenizer,
    out_dir: Path,
    device: torch.device | str = "cpu",
    skip_bad: bool = False,
) -> TokenStore:
    """Write the store of all episodes in `files` and return it.

    All are read and checked first: faults raise ValueError, which names them; with `skip_bad` the rest is
    tokenized, and the manifest tells what is left out. Idempotent: a store of the same files by the same
    tokenizer is opened as it is.
    """
    files = sorted(set(files), key=lambda file: (file.name, str(file)))
    with only_writer(out_dir):
        prints, manifest = [fingerprint(path) for path in files], read_manifest(out_dir)
        made_of, earlier = (tokenizer.digest(), tokenizer.grey_levels, prints), None
        if manifest is not None:  # before stores named the rule of grey levels, it was float32
            rule, source = manifest.get("grey_levels", "float32"), manifest.get("source", {})
            earlier = manifest["tokenizer"], rule, source.get("files")
            earlier = None if "skipped" in source and not skip_bad else earlier
        if earlier != made_of:
            _write(files, tokenizer, out_dir, device, skip_bad, {"files": prints})
    return TokenStore.open(out_dir, tokenizer.digest())


def _write(
    files: Sequence[Path],
    tokenizer: FrameTokenizer,
    out_dir: Path,
    device: torch.device | str,
    skip_bad: bool,
    source: dict[str, Any],
) -> None:
    with progress_bar(transient=True) as progress:
        bar = progress.add_task("check files", total=len(files))
        good: dict[Path, list[str]] = {}
        faults: list[str] = []
        for path in files:
            good[path], wrong = check(path)
            faults += wrong
            progress.advance(bar)
        source = source | _skipped(faults, skip_bad and any(good.values()), skip_bad)
        bar = progress.add_task("tokenize episodes", total=sum(map(len, good.values())))
        episodes = (episode for path in files for episode in _chosen(path, good[path]))
        step = lambda _: progress.advance(bar)  # noqa: E731
        write_store(out_dir, episodes, tokenizer, device=device, source=source, on_episode=step)


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
            f"actions[:, {dim}] ({ACTION_NAMES[dim]}) range from {low[dim]:.3g} to {high[dim]:.3g}, expected [-1, 1] "
            "of the controller: are they scaled, or absolute poses?"
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
    if len(hands) and 0 <= command.min() < 1:
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


def tokenize_source(
    source: Source,
    tokenizer: FrameTokenizer,
    out_dir: Path,
    device: torch.device | str = "cpu",
    skip_bad: bool = False,
) -> TokenStore:
    """Write the store of a data set of another format and return it; its facts go into the manifest.

    All episodes are read and checked first, and faults are treated as by `tokenize`. Idempotent as it is.
    """
    root, facts = source.path, source.facts()
    with only_writer(out_dir):
        prints = [fingerprint(file) | {"name": file.relative_to(root).as_posix()} for file in source.present()]
        facts, manifest = facts | {"files": prints}, read_manifest(out_dir)
        made_of, earlier = (tokenizer.digest(), tokenizer.grey_levels, facts), None
        if manifest is not None:
            origin = dict(manifest["source"])
            skipped = origin.pop("skipped", None)
            earlier = (manifest["tokenizer"], manifest.get("grey_levels"), origin)
            earlier = None if skipped and not skip_bad else earlier
        if earlier != made_of:
            with progress_bar(transient=True) as progress:
                bar = progress.add_task("check episodes", total=source.num_episodes)
                faults: list[str] = []
                for _, episode in source.attempts(True):
                    faults += [] if isinstance(episode, Episode) else [str(episode)]
                    progress.advance(bar)
                may_go_on = skip_bad and len(faults) < source.num_episodes
                facts |= _skipped(faults, may_go_on, skip_bad)
                bar = progress.add_task("tokenize episodes", total=source.num_episodes - len(faults))
                episodes = (e for _, e in source.attempts(True) if isinstance(e, Episode))
                step = lambda _: progress.advance(bar)  # noqa: E731
                write_store(out_dir, episodes, tokenizer, device=device, source=facts, on_episode=step)
    return TokenStore.open(out_dir, tokenizer.digest())
