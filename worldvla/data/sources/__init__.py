"""Data sets that others made: what a path holds decides how it is read."""

from collections.abc import Sequence
from pathlib import Path

from worldvla.data.sources.source import Names, Source
from worldvla.files import DamagedFileError, one_line
from worldvla.published.hub import fetch_data


def kind_of(path: Path) -> str:
    """Return lerobot, rlds or hdf5, by what a folder, or a download of ORG/NAME@REVISION, holds."""
    path = fetch_data(path)
    return "lerobot" if (path / "meta/info.json").is_file() else "rlds" if _versions(path) else "hdf5"


def is_hdf5(paths: Sequence[Path]) -> bool:
    """Return whether the paths are LIBERO's HDF5 files; one data set of another format has to be alone."""
    if all(kind_of(path) == "hdf5" for path in paths):
        return True
    if len(paths) > 1:
        raise ValueError(
            f"got {len(paths)} paths, one of them a LeRobot or RLDS data set: give that one alone"
        )
    return False


def open_source(path: Path, names: Names | None = None) -> Source:
    """Open a data set, a download of it where `path` is ORG/NAME@REVISION on the hub; `names` maps its
    features to views, actions and states."""
    path, names = fetch_data(path), names or Names()
    kind = kind_of(path)
    if kind == "hdf5":
        from worldvla.data.sources.hdf5 import open_hdf5

        return open_hdf5(path, names)
    try:
        if kind == "lerobot":
            from worldvla.data.sources.lerobot import open_lerobot

            return open_lerobot(path, names)
        from worldvla.data.sources.rlds import open_rlds

        versions = _versions(path)
        if len(versions) > 1:
            raise ValueError(
                f"{path} holds {len(versions)} data sets, name one: {', '.join(map(str, versions))}"
            )
        return open_rlds(versions[0], names)
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError, StopIteration, MemoryError) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        what = (
            f"{path}/meta is not a valid LeRobotDataset"
            if kind == "lerobot"
            else f"{path} is not a valid RLDS data set"
        )
        raise DamagedFileError(f"{what} ({reason}): download it again") from None


def _versions(path: Path) -> list[Path]:
    """Return the RLDS data sets in a folder: itself, or what its name and version lead to."""
    patterns = ("features.json", "*/features.json", "*/*/features.json")
    return sorted(file.parent for pattern in patterns for file in path.glob(pattern))
