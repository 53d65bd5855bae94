"""The paper's tables are what its records say; records keep every episode; a row is what it says.

Run: pytest tests/test_paper.py
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from paper import run
from paper.ablations import ROWS, config_of
from paper.records import Records, paired, read_folder, write
from paper.tables import ROOT, TABLES, effect, fill
from worldvla.config import Config, from_json
from worldvla.eval.compare import compare
from worldvla.eval.stats import Pairs, count
from worldvla.recipes import recipe


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


@pytest.mark.parametrize(
    ("recipe_name", "shipped"),
    [("tabletop_world3", "tabletop"), ("libero_object_spatial_drawer", "libero")],
)
def test_recipes_of_the_shipped_models_give_their_configs(recipe_name: str, shipped: str) -> None:
    made = from_json(Config, json.loads((ROOT / f"worldvla/assets/{shipped}/config.json").read_text()))
    config = recipe(recipe_name)
    machine = {name: getattr(made.train, name) for name in ("device", "num_threads", "compile")}
    assert replace(config, train=replace(config.train, **machine)) == made


@pytest.mark.parametrize("row", ROWS)
def test_rows_differ_from_full_in_what_they_say(row: str) -> None:
    config, full = config_of(row), config_of("full")
    batch, share = config.train.batch_size, config.data.world_fraction
    assert batch * share in (0, 64)
    assert batch * (1 - share) in (0, 96)
    assert config.optim == full.optim
    assert replace(config.loss, image_weight=full.loss.image_weight) == full.loss
    assert replace(config.model, head=full.model.head) == full.model
    assert (config.model.head != full.model.head) == row.startswith("head")
    assert config.train.only_head == bool(config.train.init_from) == (row == "head_after")
    assert config.train.steps == (5_000 if row == "world_long" else full.train.steps)


def test_configs_of_records_are_those_of_their_rows() -> None:
    """A record of a row was trained with what the row says now (fields that were added later aside)."""
    records = Records()
    for row in ROWS:
        if made := records.get(f"tables/{row}_0/train"):
            config = from_json(Config, made["config"])
            expected = config_of(row)
            machine = {name: getattr(config.train, name) for name in ("device", "num_threads", "compile")}
            assert replace(expected, train=replace(expected.train, **machine)) == config, row


def test_a_run_skips_what_is_done_and_trains_before_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    calls: list[str] = []

    def fake(command: Sequence[str], threads: int | None = None) -> None:
        assert threads in (None, 1)
        words = " ".join(command)
        calls.append(words.split(" -m ", 1)[1])
        if "paper.ablations" in words:
            out = Path(command[command.index("--out") + 1])
            out.mkdir(parents=True)
            lines = ({"event": "train", "train_seconds": 36.0}, {"event": "val", "loss": 1.0})
            (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (out / "config.json").write_text("{}")

    monkeypatch.setattr(run, "call", fake)
    run.main(("head_after", "world"))
    trained = [words.split("paper.ablations ")[1].split()[0] for words in calls if "paper.ablations" in words]
    assert trained == ["world", "chunk", "head_after"]
    evaluated = [words for words in calls if words.startswith("worldvla eval ")]
    assert len(evaluated) == 4
    assert all("out/tables/head_after_0" in words and "--head continuous" in words for words in evaluated)
    assert json.loads((tmp_path / "out/paper/tables/world_0/train.json").read_text())["hours"] == 0.01
    calls.clear()
    run.main(("head_after", "world"))
    assert not [words for words in calls if " eval " in words or "ablations" in words]
    with pytest.raises(SystemExit, match="unknown nothing: expected action"):
        run.main(("nothing",))
