"""The records behind every number of the paper's tables: one JSON line a record, one file a table or suite.

    python -m paper.records pack out/paper             record folders -> paper/records/*.jsonl
    python -m paper.records unpack NAME... --out DIR   back to record.json, for `worldvla compare`

A name is the folder of the record, such as tables/chunk_0/tabletop_goal; its first part names the file.
A packed evaluation keeps how it was made. Of every episode it keeps how it ended, whether the target was
held, and the number of steps: enough to count anew and to pair two policies episode by episode.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from worldvla.eval.stats import Pairs, count
from worldvla.files import read_json, write_text

TABLETOP = ("tabletop_spatial", "tabletop_object", "tabletop_goal", "tabletop_long")
LIBERO = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
PAIR = ("libero_object", "libero_spatial")
"""The LIBERO suites of the ablation, one model for both."""
SEEDS = (0, 1, 2)
FOLDER = Path(__file__).parent / "records"
ENDS = {("success", True): "S", ("success", False): "s", ("fail", True): "F", ("fail", False): "f"}
ENDS |= {("error", True): "E", ("error", False): "e"}
"""(status, was the target held) -> the letter that stands for an episode; capital: it was held."""
COUNTED = ("episodes", "successes", "failures", "errors", "grasped", "wilson_95")
"""What a record says of its outcomes, and of those of each task; counted again when it is read."""


class Records(Mapping[str, dict[str, Any]]):
    """Name -> record, of all files of a folder; one is unpacked when it is first asked for."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._packed: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                self._packed[record.pop("name")] = record

    def __getitem__(self, name: str) -> dict[str, Any]:
        record = self._packed[name]
        if "results" in record:
            record = self._packed[name] = unpack(record, self._packed[f"tasks/{record['suite']}"])
        return record

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


def pack(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation's record with `results` in place of outcomes, counts and tasks.

    `results`: [task, first initial state, a letter an episode, steps of each], the states without a gap.
    """
    dropped = {*COUNTED, "outcomes", "tasks"}
    out = {key: value for key, value in record.items() if key not in dropped}
    rows = sorted(record["outcomes"], key=lambda o: (o["task"], o["init"]))
    out["results"] = []
    for _, run in groupby(enumerate(rows), lambda item: (item[1]["task"], item[1]["init"] - item[0])):
        episodes = [episode for _, episode in run]
        letters = "".join(ENDS[o["status"], bool(o["grasped"])] for o in episodes)
        out["results"].append(
            [episodes[0]["task"], episodes[0]["init"], letters, [o["steps"] for o in episodes]]
        )
    if reasons := sorted({o["reason"] for o in rows if o["reason"]}):
        out["reasons"] = reasons
    return out


def unpack(packed: Mapping[str, Any], tasks: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the record again, without the seconds and videos of single episodes; `tasks`: index
    of each task of the suite -> its name and instruction."""
    ends = {letter: end for end, letter in ENDS.items()}
    outcomes = [
        {"task": task, "init": first + i, "status": ends[letter][0], "grasped": ends[letter][1], "steps": n}
        for task, first, letters, steps in packed["results"]
        for i, (letter, n) in enumerate(zip(letters, steps, strict=True))
    ]
    rows = []
    for index in sorted({o["task"] for o in outcomes}):
        name, instruction = tasks[str(index)]
        of_task = [o for o in outcomes if o["task"] == index]
        rows.append({"index": index, "name": name, "instruction": instruction, **count(of_task)})
    rest = {key: value for key, value in packed.items() if key not in ("results", "reasons")}
    return {**rest, **count(outcomes), "tasks": rows, "outcomes": outcomes}


def read_folder(root: Path) -> dict[str, dict[str, Any]]:
    """Return the packed records of a folder by name: record.json, other JSON files, metrics as JSON lines.

    Journals (episodes.jsonl) repeat their record and are left out.
    """
    out: dict[str, dict[str, Any]] = {}
    for path in sorted((*root.rglob("*.json"), *root.rglob("*.jsonl"))):
        name = path.relative_to(root).as_posix().removesuffix("/record.json").rsplit(".json", 1)[0]
        if path.name == "episodes.jsonl":
            continue
        if path.suffix == ".jsonl":
            out[name] = {"lines": [json.loads(line) for line in path.read_text().splitlines()]}
            continue
        record = read_json(path)
        if "outcomes" in record:
            known = out.setdefault(f"tasks/{record['suite']}", {})
            known |= {str(t["index"]): [t["name"], t["instruction"]] for t in record["tasks"]}
            record = pack(record)
        out[name] = record
    return out


def write(records: Mapping[str, Mapping[str, Any]], folder: Path = FOLDER) -> None:
    """Write the packed records into the files that their names say; others stay in them."""
    lines: dict[str, dict[str, str]] = {}
    for path in folder.glob("*.jsonl"):
        old = [(json.loads(line)["name"], line) for line in path.read_text(encoding="utf-8").splitlines()]
        lines[path.stem] = dict(old)
    for name, record in records.items():
        parts = name.split("/")
        stem = "libero_tables" if parts[:2] == ["libero", "tables"] else parts[0]
        line = json.dumps({"name": name, **record}, separators=(",", ":"))
        lines.setdefault(stem, {})[name] = line
    for stem, of in lines.items():
        write_text(folder / f"{stem}.jsonl", "".join(f"{of[name]}\n" for name in sorted(of)))


def of_row(row: str, suites: Sequence[str] = TABLETOP) -> list[str]:
    """Return the names of a row's records, over the seeds (LIBERO: seed 0 alone)."""
    if set(suites) <= set(PAIR):
        return [f"libero/tables/{row}_0/{suite}" for suite in suites]
    return [f"tables/{row}_{seed}/{suite}" for suite in suites for seed in SEEDS]


def counts(records: Records, names: Sequence[str], key: str = "successes") -> tuple[int, int]:
    """Return successes (or another count) and episodes without an error, of the records that exist."""
    existing = [records[name] for name in names if name in records]
    return sum(r[key] for r in existing), sum(r["episodes"] - r["errors"] for r in existing)


def paired(
    records: Mapping[str, dict[str, Any]],
    a: str,
    b: str,
    suites: Sequence[str] = TABLETOP,
    grasped: bool = False,
) -> Pairs | None:
    """Return how rows A and B fare from the same initial states, over suites and seeds that both have.

    `grasped`: in holding the target, not in success. Episodes that ended in an error are left out.
    """
    won = []
    for names in zip(of_row(a, suites), of_row(b, suites), strict=True):
        if set(names) <= records.keys():
            ends = [ended(records, [name], grasped) for name in names]
            won += [(ends[0][key], ends[1][key]) for key in ends[0].keys() & ends[1].keys()]
    return pairs_of(won) if won else None


def ended(
    records: Mapping[str, dict[str, Any]], names: Sequence[str], grasped: bool = False
) -> dict[tuple[str, int, int], bool]:
    """Return suite, task and initial state of each episode of records -> whether it succeeded, or held the
    target; without those that ended in an error."""
    return {
        (records[name]["suite"], o["task"], o["init"]): o["grasped"] if grasped else o["status"] == "success"
        for name in names
        for o in records[name]["outcomes"]
        if o["status"] != "error"
    }


def pairs_of(won: Sequence[tuple[bool, bool]]) -> Pairs:
    """Return how often A and B succeed, of the same episodes."""
    return Pairs(*(won.count(case) for case in ((True, True), (True, False), (False, True), (False, False))))
