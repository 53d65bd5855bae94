"""LIBERO's HDF5 files (data/episode.py) -> Source."""

from collections.abc import Iterator
from pathlib import Path

from worldvla.data.episode import (
    Episode,
    control_rate,
    count_episodes,
    demonstration_files,
    read_demos,
    read_episodes,
    unused_pictures,
    view_key,
)
from worldvla.data.sources.source import Camera, Names, Source, Vector
from worldvla.files import DamagedFileError
from worldvla.published.hub import origin
from worldvla.sim.protocol import POSITION_SCALE, ROTATION_SCALE
from worldvla.sim.suites import SUITES

ACTION_NAMES = ("x", "y", "z", "x rotation", "y rotation", "z rotation", "gripper")
FIXED = "names are fixed in LIBERO's HDF5 files: leave --camera, --action, --state and --delta out"
ACTION_UNITS = f"1 is {POSITION_SCALE} m or {ROTATION_SCALE} rad in a step"
STATE_NAMES = (*ACTION_NAMES[:6], "finger 1", "finger 2")


def open_hdf5(path: Path, names: Names) -> Source:
    """Open a file or the files of a folder; the first demonstration tells suite and cameras."""
    if names != Names():
        raise ValueError(f"{path}: {FIXED}")
    files = demonstration_files([path])
    if (source := open_files(path, files)) is None:
        list(read_episodes(files[0]))  # says what is wrong
        raise ValueError(f"{path} holds no sound demonstration")
    return source


def open_files(path: Path, files: list[Path]) -> Source | None:
    """Open `files`, of the folder `path`; None: no demonstration in them is sound."""
    sound = (e for _, e in _attempts(files, True) if isinstance(e, Episode))
    if (first := next(sound, None)) is None:
        return None
    rates = {rate: file for file in files if (rate := control_rate(file)) is not None}
    if len(rates) > 1:
        each = ", ".join(f"{file} {rate:g}" for rate, file in rates.items())
        raise ValueError(f"files of different steps per second: {each}: take those of one rate")
    repo, revision = origin(path)
    return Source(
        path=path,
        kind="LIBERO HDF5",
        num_episodes=sum(map(_count, files)),
        fps=next(iter(rates), None),
        cameras={v: Camera(view_key(v), *a.shape[1:3]) for v, a in first.images.items()},
        action=Vector(("actions",), ACTION_NAMES, ACTION_UNITS if first.suite in SUITES else ""),
        state=Vector(("robot_states",), STATE_NAMES, "m, rad (axis-angle), m"),
        guesses=(),
        files=tuple(files),
        unused=tuple(unused_pictures(files)),
        repo=repo,
        revision=revision,
        attempts=lambda images: _attempts(files, images),
    )


def _attempts(files: list[Path], images: bool) -> Iterator[tuple[str, Episode | ValueError]]:
    for path in files:
        try:
            for name, episode in read_demos(path, images):
                yield f"{path.name} {name}", episode
        except DamagedFileError as damaged:  # the file as a whole
            yield path.name, damaged


def _count(path: Path) -> int:
    try:
        return count_episodes(path)
    except DamagedFileError:
        return 1  # its fault
