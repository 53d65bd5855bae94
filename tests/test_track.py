"""Tracking beside TensorBoard: numbers, a table and a video arrive in trackio and wandb, on this machine.

Run: pytest tests/test_track.py   (skipped where they are not installed: the extra `track`)
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import tiny_config

from worldvla.track import Tracker, track_evaluations
from worldvla.train.loop import train
from worldvla.video import write_mp4


def is_recorded(data: bytes, folder: Path) -> bool:
    """Return whether a file below the folder holds `data`, at once or, as wandb writes it, soon."""
    for _ in range(60):
        if any(data in path.read_bytes() for path in folder.rglob("*") if path.is_file()):
            return True
        time.sleep(0.5)
    return False


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_a_run_and_an_evaluation_are_tracked(
    tracker: Tracker, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "tracked"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "tracked"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    pytest.importorskip(tracker)
    (tmp_path / "tracked").mkdir()
    train(tiny_config(root), tmp_path / "run", tracker=tracker)
    assert is_recorded(b"train/gradient_norm", tmp_path / "tracked")
    write_mp4(tmp_path / "eval/videos/00_00.mp4", [np.zeros((16, 16, 3), np.uint8)] * 3, 10)
    record: dict[str, Any] = {"suite": "tabletop_object", "checkpoint": {}, "successes": 1, "episodes": 2}
    record["tasks"] = [{"instruction": "lift the red cube", "successes": 1, "episodes": 2}]
    record["outcomes"] = [{"video": "videos/00_00.mp4", "status": "fail"}, {"video": ""}]
    track_evaluations(tracker, tmp_path / "eval", [record], [tmp_path / "eval"])
    video = (tmp_path / "eval/videos/00_00.mp4").read_bytes()
    for data in (b"tabletop_object/success", b"lift the red cube", video):
        assert is_recorded(data, tmp_path / "tracked")


def test_a_tracker_that_is_not_there_is_said(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match="--track trackio: it is not installed; pip install trackio"):
        train(tiny_config(root), tmp_path / "run", tracker="trackio")
