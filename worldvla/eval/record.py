"""What a record says of its origin, and the journal of finished episodes that makes a run resumable."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from worldvla.files import write_text


class Journal:
    """One JSON line a finished episode, after a first line that says what run this is.

    A line that a kill cut short is dropped. Episodes that ended in an error are not kept: the same command
    tries them again.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.outcomes: list[dict[str, Any]] = []
        lines = (
            [_parse(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        )
        if lines and lines[0] is not None:
            wanted = json.loads(json.dumps(identity))
            if differing := sorted(
                k for k in wanted.keys() | lines[0].keys() if wanted.get(k) != lines[0].get(k)
            ):
                there, now = ({k: line.get(k) for k in differing} for line in (lines[0], wanted))
                raise ValueError(
                    f"{path.parent} holds another evaluation ({there}, asked for {now}): "
                    "choose another directory or remove it"
                )
            self.outcomes = [line for line in lines[1:] if line and line["status"] != "error"]
        write_text(path, "".join(json.dumps(line) + "\n" for line in [dict(identity), *self.outcomes]))
        self._file = path.open("a", encoding="utf-8")

    @property
    def seconds(self) -> float:
        """Seconds that earlier parts of this run took."""
        return max((o["elapsed"] for o in self.outcomes), default=0.0)

    def add(self, outcome: Mapping[str, Any]) -> None:
        self.outcomes.append(dict(outcome))
        self._file.write(json.dumps(outcome) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
