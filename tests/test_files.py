"""Files and folders appear whole or not at all, whoever writes beside.

Run: pytest tests/test_files.py
"""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from worldvla.files import (
    check_digests,
    check_shapes,
    only_writer,
    read_json,
    reading,
    whole_file,
    whole_folder,
    write_digests,
    write_json,
)
from worldvla.machine import commit


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fail(writing: AbstractContextManager[Any]) -> None:
    with writing as scratch:
        (scratch / "half" if scratch.is_dir() else scratch).write_text("half")
        raise OSError("full")


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"n": 1})
    (tmp_path / "folder").mkdir()
    for writing in (whole_file(tmp_path / "a.json"), whole_folder(tmp_path / "folder", "a")):
        with pytest.raises(OSError, match="full"):
            fail(writing)
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
        with whole_folder(tmp_path / "store", "mark") as scratch:
            (scratch / "mark").touch()
            (scratch / name).touch()
    assert names(tmp_path / "store") == {"mark", "b"}
    assert names(tmp_path) == {"store", neighbour.name}


@pytest.mark.parametrize("mark", ["mark", ""])
def test_a_folder_of_something_else_is_not_replaced(mark: str, tmp_path: Path) -> None:
    (tmp_path / "demos").mkdir()
    (tmp_path / "demos/a_demo.hdf5").touch()
    (tmp_path / "a_file").touch()
    for name in ("demos", "a_file"):
        with pytest.raises(ValueError, match=rf"{name} exists and holds something else: choose another"):
            fail(whole_folder(tmp_path / name, mark))
    assert names(tmp_path) == {"demos", "a_file"}
    assert names(tmp_path / "demos") == {"a_demo.hdf5"}


def test_a_killed_replacement_brings_the_old_folder_back(tmp_path: Path) -> None:
    (tmp_path / ".store.0123abcd.old.tmp").mkdir()
    (tmp_path / ".store.0123abcd.old.tmp/a").touch()
    (tmp_path / ".store.0123abcd.tmp").mkdir()
    with pytest.raises(OSError, match="full"):
        fail(whole_folder(tmp_path / "store", "a"))
    assert names(tmp_path) == {"store"}
    assert names(tmp_path / "store") == {"a"}


HOLD = """
import sys, time
from pathlib import Path
from typing import Any
from worldvla.files import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_writer_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "ckpt").mkdir(parents=True)
    (folder / "ckpt/.step_4.0123abcd.tmp").touch()
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=rf"is being written by process {holder.pid} on .* since "):
            fail(whole_folder(folder, ""))
        holder.kill()
    with only_writer(folder), whole_folder(folder / "ckpt/step_4", ""):
        assert names(folder / "ckpt") >= {".step_4.lock"}
    assert names(tmp_path) == {"run"}
    assert names(folder / "ckpt") == {"step_4"}


def test_a_folder_is_one_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "disk/run").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "disk/run"], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=r"disk/run is being written by process"):
            fail(only_writer(tmp_path / "link"))
        holder.kill()
    with whole_folder(tmp_path / "link", "mark") as scratch:
        (scratch / "mark").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk/run") == {"mark"}
    assert names(tmp_path) == {"disk", "link"}
    assert names(tmp_path / "disk") == {"run"}


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "loop").symlink_to("loop")
    for at in ("a", "loop"):
        for writing in (whole_file, only_writer):
            path = tmp_path / at / "x/y"
            line = f"cannot write .*/{at}/x/y: .*/{at} is no folder: choose another one"
            with pytest.raises(OSError, match=f"^{line}$"):
                writing(path).__enter__()
    (tmp_path / "b").mkdir()
    with pytest.raises(OSError, match=r"^cannot write .*/b: it is a folder: give the name of a file$"):
        whole_file(tmp_path / "b").__enter__()


@contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Act as a user who may write only where anybody may, and can reach `folder`; root may write anywhere."""
    is_root = os.geteuid() == 0
    for parent in folder.parents if is_root else ():
        if not (mode := parent.stat().st_mode) & 0o001:  # pytest's own folders
            parent.chmod(mode | 0o011)
    try:
        if is_root:
            os.seteuid(65534)
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_a_folder_in_one_that_is_read_only_has_its_lock_inside(tmp_path: Path) -> None:
    """As one that is mounted into a container whose user may write nothing else."""
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o777)
    tmp_path.chmod(0o555)
    with as_nobody(folder):
        with only_writer(folder):
            assert names(folder) == {".lock"}
        assert not names(folder)
        with pytest.raises(OSError, match=r"cannot write .*: make it writable, or choose another folder$"):
            fail(only_writer(tmp_path / "other"))
    tmp_path.chmod(0o755)


def test_a_full_disk_is_one_path_one_reason_and_what_to_do(tmp_path: Path) -> None:
    def fill(file: Path) -> None:
        with whole_folder(tmp_path / "run", "") as scratch, whole_file(scratch / file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch / file))

    with pytest.raises(
        OSError, match=r"^cannot write .*/run/a\.json: No space left on device: free some space, "
    ):
        fill(Path("a.json"))
    assert not names(tmp_path)


def test_a_folder_that_is_read_only_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    line = f"cannot write {tmp_path}: Read-only file system: make it writable, or choose another folder"
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "touch", refuse)
    for writing in (whole_file(tmp_path / "a.json"), only_writer(tmp_path / "run")):
        with pytest.raises(OSError, match=f"^{line}$"):
            writing.__enter__()
    unreadable = "/elsewhere/demos.hdf5"
    monkeypatch.undo()
    with pytest.raises(PermissionError, match=unreadable), whole_folder(tmp_path / "store", ""):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), unreadable)


WRITE = """
import sys, time
from pathlib import Path
from typing import Any
from worldvla.files import whole_file, whole_folder
with whole_folder(Path(sys.argv[1]), "") as scratch, whole_file(scratch / "a.json"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_what_another_process_writes_is_not_swept(tmp_path: Path) -> None:
    nest = tmp_path / "nest"
    (nest / "run").mkdir(parents=True)
    dead = nest / ".demos.0123abcd.tmp", nest / "run/.config.json.0123abcd.tmp"
    for path in dead:
        path.touch()
    command, pipe = [sys.executable, "-c", WRITE, nest / "store"], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "held\n"
        with only_writer(nest):
            assert not any(path.exists() for path in dead)
        writer.communicate("\n")
    assert writer.returncode == 0
    assert names(nest / "store") == {"a.json"}
    assert names(nest) == {"store", "run"}


def test_digests_name_what_changed(tmp_path: Path) -> None:
    for name in ("manifest.json", "a.json", "image/b.json"):
        write_json(tmp_path / name, {"n": 1})
    with pytest.raises(ValueError, match=r"manifest\.json has no SHA-256 .*: write the folder again"):
        check_digests(tmp_path)
    write_digests(tmp_path)
    write_digests(tmp_path)
    check_digests(tmp_path)
    manifest = read_json(tmp_path / "manifest.json")
    write_json(tmp_path / "image/b.json", {"n": 2})
    check_digests(tmp_path, ["a.json"])
    with pytest.raises(ValueError, match=r"image/b\.json is not as it was written"):
        check_digests(tmp_path)
    write_json(tmp_path / "manifest.json", manifest | {"n": 2})
    with pytest.raises(ValueError, match=r"manifest\.json is not as it was written"):
        check_digests(tmp_path, [])


def test_errors_are_one_readable_line(tmp_path: Path) -> None:
    def read() -> None:
        with reading(tmp_path / "a", "list"):
            raise RuntimeError("first\n" + "x" * 1_000_000)

    with pytest.raises(ValueError, match=r"a is damaged or no list .first x+ ... x+.: restore") as caught:
        read()
    assert len(str(caught.value)) < 700


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
