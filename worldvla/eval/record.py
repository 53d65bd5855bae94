"""Records of evaluations: the journal that makes one resumable, its counts, and one out of several shards."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from worldvla.eval.stats import count
from worldvla.files import DamagedFileError, differing, read_json, reading, write_json, write_text
from worldvla.sim.suites import SUITES

TIMES = ("simulation_seconds", "policy_seconds")
SEVERAL: Any = {"suite": str, "suites": [{"suite": str}]}
"""What the record of several suites has, and below, what that of one has: keys and types."""
RECORD: Any = {
    "suite": str,
    "protocol": dict,
    "checkpoint": dict,
    "tasks": [{"index": int, "name": str}],
    "outcomes": [{"task": int, "init": int, "status": str}],
}
SHARD: Any = RECORD | {
    "seed": int,
    "seconds": (int, float),
    "tasks": [{"index": int, "name": str, "instruction": str}],
}
log = logging.getLogger("worldvla")


class Journal:
    """One JSON line a finished episode, after a first line that says what run this is; each holds a digest.

    A line that is not as it was written, as a kill cuts one short, is dropped with a remark. Episodes that
    ended in an error are not kept: the same command tries them again. A journal of another run (other
    arguments, versions, commit), or whose first line is damaged, raises ValueError.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.outcomes: list[dict[str, Any]] = []
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        lines = [_parse(line) for line in dict.fromkeys(text.splitlines())]
        if lines:
            if lines[0] is None:
                raise DamagedFileError(
                    f"{path} is damaged in its first line: give another --out, or remove it"
                )
            if changed := differing(_plain(lines[0]), identity):
                raise ValueError(
                    f"{path.parent} holds another evaluation ({', '.join(changed.values())}): give another "
                    f"--out, or remove {path}"
                )
            sound = [x for x in lines[1:] if x and _sealed(_plain(x)) == x]
            whole = [_plain(line) for line in sound if line.keys() >= {"status", "elapsed"}]
            if lost := len(lines) - 1 - len(whole):
                log.warning("%s: dropped %d lines, which are cut short or damaged", path, lost)
            self.outcomes = [line for line in whole if line["status"] != "error"]
        write_text(path, "".join(map(_line, [identity, *self.outcomes])))
        self._file = path.open("a", encoding="utf-8")
        self._earlier, self._start = max((o["elapsed"] for o in self.outcomes), default=0.0), time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds that this run has taken, earlier parts of it included."""
        return self._earlier + time.monotonic() - self._start

    def add(self, outcome: Mapping[str, Any]) -> None:
        self.outcomes.append({**outcome, "elapsed": round(self.seconds, 1)})
        self._file.write(_line(self.outcomes[-1]))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(_sealed(values)) + "\n"


def _sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, "sha256": hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]}


def _plain(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "sha256"}


def _parse(line: str) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def read_record(path: Path, shape: Any = RECORD) -> dict[str, Any]:
    """Read record.json, or that of a result directory; what is no evaluation record, or has not the keys and
    types of `shape`, raises ValueError."""
    path = path / "record.json" if path.is_dir() else path
    with reading(path, "JSON", "expected a record of `worldvla eval`"):
        record = json.loads(path.read_text(encoding="utf-8"))
    if _fits(record, SEVERAL):
        names = ", ".join(part["suite"] for part in record["suites"])
        raise ValueError(f"{path} holds several suites: give the directory of one, beside it: {names}")
    if not _fits(record, shape):
        raise ValueError(f"{path} is not an evaluation record: expected the record.json of `worldvla eval`")
    return record


def _fits(value: Any, shape: Any) -> bool:
    """Return whether a JSON value has the keys and types of `shape`, a type or a list or object of such."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(part, shape[0]) for part in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(k in value and _fits(value[k], s) for k, s in shape.items())
    return isinstance(value, shape)


def suites_of(directory: Path) -> tuple[str, list[str]]:
    """Return what an evaluation was asked for, and the folders of its records, one a suite."""
    if not (directory / "record.json").is_file():
        raise ValueError(f"{directory} holds no record.json: give a directory that `worldvla eval` wrote")
    record = read_json(directory / "record.json")
    if not _fits(record, SEVERAL):
        return read_record(directory)["suite"], ["."]
    names = [part["suite"] for part in record["suites"]]
    if not set(names) <= set(SUITES):  # a name that leads elsewhere, say
        raise ValueError(f"{directory} holds records of unknown suites: {', '.join(names)}")
    return record["suite"], names


def counted(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with its outcomes in order and counted: all of them, and those of each task."""
    outcomes = sorted(record["outcomes"], key=lambda o: (o["task"], o["init"]))
    tasks = [task | count(o for o in outcomes if o["task"] == task["index"]) for task in record["tasks"]]
    times = {name: round(sum(o.get(name, 0.0) for o in outcomes), 1) for name in TIMES}
    first = {"suite": record["suite"], "checkpoint": record["checkpoint"], **count(outcomes)}
    first |= {name: record[name] for name in ("seed", "protocol", "seconds")} | times
    last = {"tasks": tasks, "outcomes": outcomes}
    return {**first, **{k: v for k, v in record.items() if k not in first | last}, **last}


def of_suites(name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one record of several suites: the counts of all their episodes, then the records themselves."""
    parts = ("seconds", *TIMES)
    return {
        "suite": name,
        "checkpoint": records[0]["checkpoint"],
        **count(outcome for record in records for outcome in record["outcomes"]),
        **{part: round(sum(record[part] for record in records), 1) for part in parts},
        "suites": list(records),
    }


def merge(directories: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write to `out` what one evaluation would have left that its shards in `directories` share: record.json,
    videos, errors and tokens.npz; return the record. Seconds are summed.

    Shards of other checkpoints, protocols, versions or commits raise ValueError, and so do missing ones.
    """
    if not directories:
        raise ValueError("give the directories of the shards, got none")
    records = [read_record(directory, SHARD) for directory in directories]
    named = [record["protocol"].get("shard", [0, 1]) for record in records]
    if not _fits(named, [[int]]) or {2} != {*map(len, named)}:
        raise ValueError(f"shards {named}: expected two whole numbers in protocol.shard of each record")
    shards = [tuple(shard) for shard in named]
    number = shards[0][1]
    if sorted(shards) != [(i, number) for i in range(number)]:
        listed = ", ".join(f"{i}/{n}" for i, n in shards)
        raise ValueError(f"shards {listed}: expected each of 0/{number} to {number - 1}/{number} once")
    for path, record in zip(directories, records, strict=True):
        if changed := differing(_origin(record), _origin(records[0])):
            raise ValueError(
                f"{path} holds another evaluation than {directories[0]} ({', '.join(changed.values())}): "
                "evaluate alike"
            )
    whole = dict(min(zip(shards, records, strict=True))[1])
    whole["protocol"] = {k: v for k, v in whole["protocol"].items() if k != "shard"}
    whole["outcomes"] = [outcome for record in records for outcome in record["outcomes"]]
    whole.pop("ms_a_decision", None)  # of one shard alone
    whole["seconds"] = round(sum(record["seconds"] for record in records), 1)
    out.mkdir(parents=True, exist_ok=True)
    for directory in directories:
        for name in ("videos", "errors"):
            if (directory / name).is_dir():
                shutil.copytree(directory / name, out / name, dirs_exist_ok=True)
        if (directory / "tokens.npz").exists():
            shutil.copy(directory / "tokens.npz", out / "tokens.npz")
    whole = counted(whole)
    write_json(out / "record.json", whole)
    return whole


def placeless(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return `facts` without the paths of checkpoints, which may be moved."""
    kept = {name: value for name, value in facts.items() if name != "path"}
    return {name: placeless(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _origin(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the shards of one evaluation share; workers, paths and machines change no episode."""
    protocol = {k: v for k, v in record["protocol"].items() if k not in ("shard", "workers")}
    same = {k: record.get(k) for k in ("suite", "seed", "commit", "versions")}
    tasks = [[task["index"], task["instruction"]] for task in record["tasks"]]
    return {**same, "protocol": protocol, "checkpoint": placeless(record["checkpoint"]), "tasks": tasks}
