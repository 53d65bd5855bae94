"""The paper's tables are what its records say; records keep every episode; a row is what it says.

Run: pytest tests/test_paper.py
"""

import json
from pathlib import Path

import pytest

from paper.records import Records, paired, read_folder, write
from paper.tables import ROOT, TABLES, effect, fill
from worldvla.eval.compare import compare
from worldvla.eval.stats import Pairs, count


def record(won: str) -> dict:
    """An evaluation of two tasks; a letter an episode: s success, f fail, e error."""
    status = {"s": "success", "f": "fail", "e": "error"}
    outcomes = [
        {"task": t, "init": 10 + i, "status": status[x], "grasped": i > 0, "steps": 9 + i, "reason": ""}
        for t in (0, 1)
        for i, x in enumerate(won)
    ]
    rows = [
        {
            "index": t,
            "name": f"n{t}",
            "instruction": f"do {t}",
            **count(o for o in outcomes if o["task"] == t),
        }
        for t in (0, 1)
    ]
    made = {"suite": "tabletop_goal", "seed": 0, "checkpoint": {"name": "m"}, "protocol": {"executed": 5}}
    return {**made, **count(outcomes), "tasks": rows, "outcomes": outcomes}


def test_records_keep_every_episode_and_pairs(tmp_path: Path) -> None:
    rows = {f"tables/{row}_0/tabletop_goal": record(won) for row, won in (("a", "ssfe"), ("b", "sfse"))}
    for name, row in rows.items():
        path = tmp_path / "run" / name
        path.mkdir(parents=True)
        (path / "record.json").write_text(json.dumps(row))
        (path / "episodes.jsonl").write_text("{}\n")
    (tmp_path / "run/tables/metrics.jsonl").write_text('{"step": 1}\n')
    for _ in range(2):  # again: nothing is added twice
        write(read_folder(tmp_path / "run"), tmp_path)
    read = Records(tmp_path)
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {"tables.jsonl", "tasks.jsonl"}
    assert read["tables/metrics"] == {"lines": [{"step": 1}]}
    for name, row in rows.items():
        row["outcomes"] = [{k: v for k, v in o.items() if k != "reason"} for o in row["outcomes"]]
        assert read[name] == row
    a, b = rows
    assert compare(read[a], read[b]) == compare(rows[a], rows[b])
    assert paired(read, "a", "b", ("tabletop_goal",)) == Pairs(2, 2, 2, 0)
    assert paired(read, "a", "b", ("tabletop_goal",), grasped=True) == Pairs(4, 0, 0, 2)


def test_committed_tables_are_what_the_records_say() -> None:
    records = Records()
    for path in (ROOT / "paper/RESULTS.md", ROOT / "README.md"):
        text = path.read_text(encoding="utf-8")
        assert fill(text, records) == text, f"{path}: run python -m paper.tables"
    assert "| libero_spatial | 181/200 (86 to 94 %) |" in (ROOT / "README.md").read_text()
    used = (ROOT / "paper/RESULTS.md").read_text().count("<!-- table ")
    assert used == len(TABLES)
    with pytest.raises(ValueError, match="no table 'nothing': expected one of suites"):
        fill("<!-- table nothing --><!-- /table -->", records)


def test_a_difference_says_whether_it_is_significant() -> None:
    assert effect(Pairs(50, 20, 1, 29)) == ("+19.0 (+10.5 to +27.0)", "2.1e-05")
    assert effect(Pairs(50, 3, 1, 46))[1] == "0.62, not significant"


def test_records_are_small() -> None:
    files = list((ROOT / "paper/records").iterdir())
    assert len(files) < 60
    assert sum(path.stat().st_size for path in files) < 3e6
