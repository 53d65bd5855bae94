"""LIBERO's HDF5 files (data/episode.py) -> Source."""

from collections.abc import Iterator
from pathlib import Path

from worldvla.data.episode import (
    Episode,
    count_episodes,
    demonstration_files,
    read_demos,
    read_episodes,
    unused_pictures,
    view_key,
)
from worldvla.data.sources.source import Camera, Names, Source, Vector
from worldvla.sim.protocol import FPS
from worldvla.sim.suites import SUITES

ACTION_NAMES = ("x", "y", "z", "x rotation", "y rotation", "z rotation", "gripper")
FIXED = "names are fixed in LIBERO's HDF5 files: leave --camera, --action, --state and --delta out"
STATE_NAMES = (*ACTION_NAMES[:6], "finger 1", "finger 2")


def open_hdf5(path: Path, names: Names) -> Source:
    """Open a file or the files of a folder; the first demonstration tells suite and cameras."""
    if names != Names():
        raise ValueError(f"{path}: {FIXED}")
    files = demonstration_files([path])
    sound = (e for _, e in _attempts(files, True) if isinstance(e, Episode))
    first = next(sound, None) or next(read_episodes(files[0]))  # which says what is wrong
    return Source(
        path=path,
        kind="LIBERO HDF5",
        num_episodes=sum(map(count_episodes, files)),
        fps=FPS[SUITES[first.suite].simulator] if first.suite in SUITES else None,
        cameras={v: Camera(view_key(v), *a.shape[1:3]) for v, a in first.images.items()},
        action=Vector(("actions",), ACTION_NAMES),
        state=Vector(("robot_states",), STATE_NAMES),
        guesses=(),
        files=tuple(files),
        unused=tuple(unused_pictures(files)),
        attempts=lambda images: _attempts(files, images),
    )


def _attempts(files: list[Path], images: bool) -> Iterator[tuple[str, Episode | ValueError]]:
    for path in files:
        for name, episode in read_demos(path, images):
            yield f"{path.name} {name}", episode
