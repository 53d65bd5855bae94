"""Files and folders appear whole or not at all, whoever writes beside.

Run: pytest tests/test_files.py
"""

import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from worldvla.files import check_shapes, read_json, whole_file, whole_folder, write_json
from worldvla.machine import commit


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fail(writing: AbstractContextManager[Path]) -> None:
    with writing as scratch:
        (scratch / "half" if scratch.is_dir() else scratch).write_text("half")
        raise OSError("full")


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"n": 1})
    (tmp_path / "folder").mkdir()
    for whole, name in ((whole_file, "a.json"), (whole_folder, "folder")):
        with pytest.raises(OSError, match="full"):
            fail(whole(tmp_path / name))
    assert read_json(tmp_path / "a.json") == {"n": 1}
    assert names(tmp_path) == {"a.json", "folder"}
    assert not names(tmp_path / "folder")


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    with whole_file(path) as first, whole_file(path) as second:
        first.write_text("1")
        second.write_text("2")
    assert path.read_text() == "1"
    assert names(path.parent) == {"a.json"}


def test_a_folder_replaces_the_old_one_and_what_a_kill_left(tmp_path: Path) -> None:
    left_over, neighbour = tmp_path / ".store.0123abcd.tmp", tmp_path / ".store.demos.0123abcd.tmp"
    left_over.mkdir()
    neighbour.mkdir()
    for name in ("a", "b"):
        with whole_folder(tmp_path / "store") as scratch:
            (scratch / name).touch()
    assert names(tmp_path / "store") == {"b"}
    assert names(tmp_path) == {"store", neighbour.name}


@pytest.mark.parametrize("text", ["{", "[]"])
def test_json_that_is_no_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is damaged"):
        read_json(tmp_path / "a.json")


def test_the_first_tensor_that_does_not_fit_is_named() -> None:
    check_shapes("here", {"a": [2, 3]}, {"a": (2, 3)}, "fix")
    with pytest.raises(ValueError, match=r"1 tensors differ, first b with shape None, expected \(1,\); fix"):
        check_shapes("here", {"a": [2]}, {"a": (2,), "b": (1,)}, "fix")
    with pytest.raises(ValueError, match=r"first a with shape \(3,\), expected \(2,\)"):
        check_shapes("here", {"a": [3]}, {"a": (2,)}, "fix")


def test_a_copy_without_a_repository_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLDVLA_COMMIT", "abc123")
    assert commit() != "abc123", "a repository knows better"
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert commit() == "abc123"
    monkeypatch.delenv("WORLDVLA_COMMIT")
    assert commit() is None
