"""What lies on disk: files and folders that appear whole or not at all, JSON, tensors that fit.

What is written stands under a scratch name of its own, so that two processes that write the same file never
meet; a failure leaves nothing behind.
"""

import glob
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the name of a scratch file, which replaces `path` after the block; on an error it is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give an empty scratch folder, which replaces `path` after the block; on an error it is gone.

    A folder has one writer at a time: what a killed one left behind is removed.
    """
    for left_over in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)
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


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any, indent: int = 1) -> None:
    write_text(path, json.dumps(data, indent=indent) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds; anything else raises ValueError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it or download it again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} is damaged (no JSON object): restore it or download it again")
    return data


def check_shapes(
    where: Path | str, found: Mapping[str, Sequence[int]], own: Mapping[str, Sequence[int]], fix: str
) -> None:
    """Raise ValueError, naming the first, unless `found` has the names and shapes of `own`."""
    wrong = sorted(found.keys() ^ own.keys()) or sorted(n for n in own if tuple(found[n]) != tuple(own[n]))
    if wrong:
        there, here = (None if wrong[0] not in t else tuple(t[wrong[0]]) for t in (found, own))
        raise ValueError(
            f"{where} does not fit: {len(wrong)} tensors differ, first {wrong[0]} with shape {there}, "
            f"expected {here}; {fix}"
        )
