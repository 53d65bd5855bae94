"""Data sets that others made: what a path holds decides how it is read."""

from pathlib import Path
from typing import Literal

from worldvla.data.sources.source import Names, Source
from worldvla.files import Damaged, one_line


def kind_of(path: Path) -> Literal["lerobot", "hdf5"]:
    """Return what a path holds: a folder with meta/info.json is LeRobot's, anything else HDF5 files."""
    return "lerobot" if (path / "meta/info.json").is_file() else "hdf5"


def open_source(path: Path, names: Names | None = None) -> Source:
    """Open a data set; `names` maps its features to views, actions and states."""
    path, names = Path(path), names or Names()
    if kind_of(path) == "lerobot":
        from worldvla.data.sources.lerobot import open_lerobot

        try:
            return open_lerobot(path, names)
        except (LookupError, TypeError, AttributeError, ArithmeticError, StopIteration) as error:
            reason = one_line(f"{type(error).__name__}: {error}")
            raise Damaged(f"{path}/meta is no LeRobotDataset ({reason}): download it again") from None
    from worldvla.data.sources.hdf5 import open_hdf5

    return open_hdf5(path, names)
