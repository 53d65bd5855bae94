"""What lies on disk: files and folders that appear whole or not at all, JSON, tensors that fit, digests.

What is written stands under a scratch name of its own, so that two processes that write the same file never
meet; a failure leaves nothing behind. What is read is what was written, or an error of one line.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ASSETS = Path(__file__).parent / "assets"
"""The shipped models, one folder each."""
LONGEST = 400
"""Letters of an error's message that are shown, about: more is no line."""
MANIFEST = "manifest.json"
PROTECTED = (".json", ".npy", ".safetensors")
"""Endings of the files of a folder that its manifest has digests of."""
_SCRATCH = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}(?P<old>\.old)?\.tmp")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_held: set[Path] = set()
"""The folders that this process writes."""


def one_line(error: object, longest: int = LONGEST) -> str:
    """Return what an error says, or a text, on one line of about `longest` letters at most."""
    text = " ".join((str(error) or type(error).__name__)[: 10 * longest].split())
    return text if len(text) <= longest else f"{text[: 3 * longest // 4]} ... {text[-longest // 4 :]}"


class DamagedFileError(ValueError):
    """A file does not hold what it should; the message is one line with its path."""


@contextmanager
def reading(path: Path | str, what: str, fix: str = "restore it or make it again") -> Iterator[None]:
    """Turn whatever a library raises on a damaged file in the block into `DamagedFileError`, one line."""
    try:
        yield
    except (
        DamagedFileError,
        FileNotFoundError,
        PermissionError,
        KeyboardInterrupt,
        SystemExit,
        GeneratorExit,
    ):
        raise
    except BaseException as error:  # Rust's panics are no Exception
        reason = one_line(error.args[0] if isinstance(error, KeyError) and error.args else error)
        raise DamagedFileError(f"{path} is damaged or no {what} ({reason}): {fix}") from None


# -- whole files and folders ---------------------------------------------------------------------------------


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say in a line why `path` cannot be written in the block: one path, one reason, what to do."""
    try:
        yield
    except OSError as error:
        at = Path(error.filename) if isinstance(error.filename, str | os.PathLike) else None
        if error.errno in _FULL:
            where, fix = path, "free some space, then repeat the command"
        elif error.errno in _CLOSED and at and at.absolute().is_relative_to(path.absolute().parent):
            where, fix = at if at.exists() else at.parent, "make it writable, or choose another folder"
        else:
            raise
        raise OSError(f"cannot write {_shown(where)}: {error.strerror}: {fix}") from error


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTDIR, errno.ELOOP):
            raise
        at = next(folder for folder in path.parents if folder.exists() or folder.is_symlink())
        raise NotADirectoryError(f"cannot write {path}: {at} is no folder: choose another one") from None


def _shown(path: Path) -> Path:
    """Return a path under the names that its scratch folders and files stand for."""
    return Path(*(m["name"] if (m := _SCRATCH.fullmatch(part)) else part for part in path.parts))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the name of a scratch file, which replaces `path` after the block; on an error it is gone."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with _writing(path):
        _make_parent(path)
        if path.is_dir():
            raise IsADirectoryError(f"cannot write {path}: it is a folder: give the name of a file")
        try:
            scratch.touch()
            mode = scratch.stat().st_mode  # what the umask gives; safetensors makes it 0600
            yield scratch
            scratch.chmod(mode)
            scratch.replace(path)
        finally:
            with suppress(OSError):  # of a folder that is read-only: the reason is another one
                scratch.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, mark: str) -> Iterator[Path]:
    """Give an empty scratch folder, which replaces `path` after the block; on an error it is gone.

    Only an empty folder or one with the file `mark` is replaced (an empty mark: no other), else ValueError.

    It has one writer at a time (`only_writer`). A kill between the two renames leaves the old folder and the
    new one under scratch names; the next writer brings the old one back.
    """
    path = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    with only_writer(path):
        is_ours = path.is_dir() and (not any(path.iterdir()) or bool(mark and (path / mark).is_file()))
        if path.exists() and not is_ours:
            raise ValueError(f"{path} exists and holds something else: choose another folder, or remove it")
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        old = scratch.with_suffix(".old.tmp")
        try:
            scratch.mkdir(parents=True)
            yield scratch
            if path.exists():
                path.rename(old)
            scratch.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def refuse_others(folder: Path, *names: str) -> None:
    """Raise ValueError if `folder` holds one of `names`: it is of something else, which what is written there
    would spoil."""
    if there := [name for name in names if (folder / name).exists()]:
        raise ValueError(f"{folder} holds something else ({there[0]}): choose another folder")


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Write `folder` alone: another process that does raises BlockingIOError, which says who it is.

    The lock is flock's on `.NAME.lock` beside the folder, so that a dead holder holds nothing; on `.lock`
    inside where only the folder itself can be written (mounted into a container, say). A file system without
    flock has none. What killed writers left is removed first, but nothing that another process writes.
    """
    folder = Path(os.path.realpath(folder))  # by whatever name it is called
    if folder in _held:
        yield
        return
    with _writing(folder):
        _make_parent(folder)
        with _locked(folder):
            sweep(folder.parent, folder.name)
            sweep(folder)
            for inside in folder.glob("*/"):
                if not _SCRATCH.fullmatch(inside.name):
                    with suppress(BlockingIOError), _locked(inside):
                        sweep(inside)
            yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = folder.with_name(f".{folder.name}.lock")
    try:
        descriptor = _lock(lock, folder)
    except OSError as error:
        if error.errno not in _CLOSED or not os.access(folder, os.W_OK):
            raise
        lock = folder / ".lock"
        descriptor = _lock(lock, folder)
    _held.add(folder)
    try:
        yield
    finally:
        _held.discard(folder)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(lock: Path, folder: Path) -> int:
    """Return an open descriptor of the file `lock`, held by this process."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = one_line(os.read(descriptor, LONGEST).decode(errors="replace") or "another process")
            os.close(descriptor)
            raise BlockingIOError(
                f"{folder} is being written by {holder}: wait until it ends, or choose another folder"
            ) from None
        except OSError:  # a network's file system may have no locks
            return descriptor
        try:
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                break
        except FileNotFoundError:  # its last holder removed it in between
            pass
        os.close(descriptor)
    words = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename} since {since} ({words})".encode())
    return descriptor


def sweep(folder: Path, name: str = "") -> None:
    """Remove what killed writers left of the entry `name` of `folder`, whose lock is held; of all whose lock
    nobody holds, where none is given.

    Of a folder that was being replaced and is not there, the old one comes back.
    """
    paths = folder.glob(f".{glob.escape(name) if name else '*'}.*.tmp")
    found = [(path, match) for path in paths if (match := _SCRATCH.fullmatch(path.name))]
    if not name:
        for other in {match["name"] for _, match in found}:
            with suppress(BlockingIOError), _locked(folder / other):
                sweep(folder, other)
        return
    for left_over, match in found:
        target = folder / match["name"]
        if target.name != name:
            continue
        if match["old"] and not target.exists():
            left_over.rename(target)
        elif left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any, indent: int = 1) -> None:
    write_text(path, json.dumps(data, indent=indent) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds; anything else raises ValueError."""
    with reading(path, "JSON", "restore it or download it again"):
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("no JSON object")
    return data


def differing(there: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return what differs between two settings, as JSON: dotted name -> what to say of it."""
    old, new = (_leaves(json.loads(json.dumps(settings))) for settings in (there, now))
    return {
        name: f"{name}: {old.get(name)!r} there, {new.get(name)!r} now"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    }


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    pairs = ((f"{prefix}.{key}" if prefix else key, value) for key, value in tree.items())
    return {leaf: v for path, value in pairs for leaf, v in _leaves(value, path).items()}


# -- digests -------------------------------------------------------------------------------------------------


def write_digests(folder: Path) -> None:
    """Put the SHA-256 of every JSON file, array and safetensors file below `folder` into its manifest, and
    that of the manifest itself, without this entry. The last thing that is written into a folder."""
    manifest = {k: v for k, v in read_json(folder / MANIFEST).items() if k != "sha256"}
    paths = sorted(p for p in folder.rglob("*") if p.suffix in PROTECTED and p.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    digests = {n: sha256(p) for n, p in names.items() if n != MANIFEST and not re.search(r"(^|/)\.", n)}
    digests[MANIFEST] = _of_manifest(manifest | {"sha256": digests})
    write_json(folder / MANIFEST, manifest | {"sha256": digests})


def check_digests(folder: Path, names: Collection[str] | None = None) -> None:
    """Raise ValueError unless the manifest and the files `names` (default: all) are as they were written."""
    manifest = read_json(folder / MANIFEST)
    digests = manifest.get("sha256")
    if digests is None:
        raise DamagedFileError(
            f"{folder / MANIFEST} has no SHA-256 of its files, so that nothing shows whether they are whole: "
            "write the folder again with this version of worldvla"
        )
    if not isinstance(digests, dict) or digests.get(MANIFEST) != _of_manifest(manifest):
        raise DamagedFileError(
            f"{folder / MANIFEST} is not as it was written (SHA-256): copy the folder again"
        )
    for name, digest in digests.items():
        if name != MANIFEST and (names is None or name in names):
            try:
                got = sha256(folder / name)
            except FileNotFoundError:
                raise DamagedFileError(f"{folder / name} is missing: copy the folder again") from None
            if got != digest:
                raise DamagedFileError(
                    f"{folder / name} is not as it was written (SHA-256 {got[:16]}, in {MANIFEST} "
                    f"{digest[:16]}): copy the folder again"
                )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, 64 hex digits, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_manifest(manifest: Mapping[str, Any], own: str = MANIFEST) -> str:
    """Return the SHA-256 of a manifest named `own` without its own digest, whatever the order of its keys."""
    digests = {name: digest for name, digest in manifest["sha256"].items() if name != own}
    text = json.dumps({**manifest, "sha256": digests}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# -- tensors -------------------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Write a safetensors file, whole; a number that is not finite raises ValueError, a full disk OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    for name, tensor in tensors.items():
        check_finite(path, name, tensor)
    with whole_file(path) as scratch:
        try:
            save_file({name: t.contiguous() for name, t in tensors.items()}, scratch, {"format": "pt"})
        except SafetensorError as error:
            fix = "free some space, then repeat the command"
            raise OSError(f"cannot write {_shown(path)}: {one_line(error)}: {fix}") from None


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """Return all tensors of a safetensors file; a damaged one raises ValueError."""
    from safetensors.torch import load_file

    with reading(path, "safetensors file", "restore it or download it again"):
        tensors = load_file(path)
    for name, tensor in tensors.items():
        check_finite(path, name, tensor)
    return tensors


def save_network(path: Path, tensors: "Mapping[str, Tensor]", facts: Mapping[str, Any]) -> None:
    """Write a small network that is no checkpoint: tensors, and beside them as JSON `facts` and digests."""
    save_tensors(path, tensors)
    about = path.with_suffix(".json")
    told = json.loads(json.dumps({**facts, "sha256": {path.name: sha256(path)}}))
    told["sha256"][about.name] = _of_manifest(told, about.name)
    write_json(about, told)


def load_network(path: Path, fix: str) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    """Return the facts and tensors that `save_network` wrote; others raise ValueError, missing ones
    FileNotFoundError. `fix`: what makes such a network."""
    about = path.with_suffix(".json")
    for file in (path, about):
        if not file.is_file():
            raise FileNotFoundError(f"no {file}: {fix}")
    told = read_json(about)
    with reading(about, "facts of a network", fix):
        digests = told["sha256"][about.name], told["sha256"][path.name]
        if digests != (_of_manifest(told, about.name), sha256(path)):
            raise DamagedFileError(
                f"{path} or {about.name} is not as it was written (SHA-256): copy both again; {fix}"
            )
    return told, load_tensors(path)


def check_finite(path: Path, name: str, tensor: "Tensor") -> None:
    """Raise ValueError if a tensor holds NaN or an infinity: it is neither written nor read."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise DamagedFileError(
            f"{path}: {name} holds numbers that are not finite: take an earlier checkpoint"
        )


def check_shapes(
    where: Path | str,
    found: "Mapping[str, Tensor | Sequence[int]]",
    own: "Mapping[str, Tensor | Sequence[int]]",
    fix: str,
) -> None:
    """Raise ValueError, naming the first, unless `found` has the names and shapes of `own`; both hold tensors
    or the shapes of some."""
    there, here = ({name: tuple(getattr(x, "shape", x)) for name, x in t.items()} for t in (found, own))
    wrong = sorted(there.keys() ^ here.keys()) or sorted(n for n in here if there[n] != here[n])
    if wrong:
        raise ValueError(
            f"{where} does not fit: {len(wrong)} tensors differ, first {wrong[0]} with shape "
            f"{there.get(wrong[0])}, expected {here.get(wrong[0])}; {fix}"
        )
