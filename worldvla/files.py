"""Files and folders that appear whole or not at all, and JSON.

What is written stands under a scratch name of its own, so that two processes that write the same file never
meet; a failure leaves nothing behind.
"""

import json
import secrets
import shutil
from collections.abc import Iterator
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
    for left_over in path.parent.glob(f".{path.name}.*.tmp"):
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
