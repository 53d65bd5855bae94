"""The journal of finished episodes that makes an evaluation resumable."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from worldvla.files import write_text


class Journal:
    """One JSON line a finished episode, after a first line that says what run this is.

    A line that is no outcome, as a kill cuts one short, is dropped. Episodes that ended in an error are not
    kept: the same command tries them again. A journal of another run (other arguments, versions, commit)
    raises ValueError.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.outcomes: list[dict[str, Any]] = []
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [_parse(line) for line in text.splitlines()]
        if lines and lines[0] is not None:
            there, now = dict(_flat(lines[0])), dict(_flat(json.loads(json.dumps(identity))))
            names = sorted(name for name in there | now if there.get(name) != now.get(name))
            if names:
                text = ", ".join(
                    f"{name}: {there.get(name)!r} there, {now.get(name)!r} now" for name in names
                )
                raise ValueError(
                    f"{path.parent} holds another evaluation ({text}): give another --out, or remove {path}"
                )
            whole = [line for line in lines[1:] if line is not None and line.keys() >= {"status", "elapsed"}]
            self.outcomes = [line for line in whole if line["status"] != "error"]
        write_text(path, "".join(json.dumps(line) + "\n" for line in [dict(identity), *self.outcomes]))
        self._file = path.open("a", encoding="utf-8")
        self._earlier, self._start = max((o["elapsed"] for o in self.outcomes), default=0.0), time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds that this run has taken, earlier parts of it included."""
        return self._earlier + time.monotonic() - self._start

    def add(self, outcome: Mapping[str, Any]) -> None:
        self.outcomes.append({**outcome, "elapsed": round(self.seconds, 1)})
        self._file.write(json.dumps(self.outcomes[-1]) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _parse(line: str) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
