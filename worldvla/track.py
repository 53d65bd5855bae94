"""Tracking beside TensorBoard: trackio or wandb, on this machine unless their own settings say otherwise.

Of both, only what they share is used: init, log, finish, Table and Video.
"""

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

Tracker = Literal["", "trackio", "wandb"]


def find_tracker(tracker: Tracker) -> Any:
    """Return the tracker's module, None without one; one that is not installed raises ValueError."""
    try:
        return importlib.import_module(tracker) if tracker else None
    except ModuleNotFoundError:
        raise ValueError(f"--track {tracker}: it is not installed; pip install {tracker}") from None


@contextmanager
def tracked(tracker: Tracker, folder: Path, config: Mapping[str, Any]) -> Iterator[Any]:
    """Begin a run that is called like its folder, and give the tracker's module; without a tracker, None."""
    module = find_tracker(tracker)
    if module is None:
        yield None
        return
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_DIR", str(folder))
    module.init(project="worldvla", name=folder.name, config=dict(config), resume="allow")
    try:
        yield module
    finally:
        module.finish()


def track_evaluations(
    tracker: Tracker, folder: Path, records: Sequence[Mapping[str, Any]], folders: Sequence[Path]
) -> None:
    """Log what evaluations found: success, a table of the tasks, and the videos that lie in `folders`."""
    if not tracker:
        return
    with tracked(tracker, folder, {"checkpoint": records[0]["checkpoint"]}) as module:
        for record, place in zip(records, folders, strict=True):
            rows = [[task["instruction"], task["successes"], task["episodes"]] for task in record["tasks"]]
            values = {"success": record["successes"] / max(1, record["episodes"])}
            values["tasks"] = module.Table(columns=["instruction", "successes", "episodes"], data=rows)
            for outcome in record["outcomes"]:
                if outcome["video"]:
                    path = place / outcome["video"]
                    values[path.stem] = module.Video(str(path), caption=outcome["status"], format="mp4")
            module.log({f"{record['suite']}/{name}": value for name, value in values.items()})
