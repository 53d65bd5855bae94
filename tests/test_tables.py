"""The tables say what the records say, and `--check` finds what they do not.

Run: pytest tests/test_tables.py
"""

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from worldvla.config import Config
from worldvla.eval.stats import Pairs
from worldvla.eval.tables import Records, _imagined, check, markdown, paired, sentence, write_tables
from worldvla.recipes import ABLATIONS, RECIPES, recipe
from worldvla.sim.suites import TABLETOP

ROOT = Path(__file__).parent.parent


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    (tmp_path / "docs").mkdir()
    shutil.rmtree(tmp_path / "results/tables", ignore_errors=True)  # the rows of these tests are made up
    paragraphs = (ROOT / "README.md").read_text().split("\n\n")
    (tmp_path / "README.md").write_text("\n\n".join(p for p in paragraphs if "runs/tables.sh" not in p))
    write_tables(tmp_path, tmp_path / "out/tables/index.html")
    return tmp_path


def write_row(root: Path, row: str, won: int, seed: int = 0) -> None:
    for suite in TABLETOP:
        outcomes = [
            {"task": 0, "init": i, "status": "success" if i < won else "fail", "grasped": True, "steps": 12}
            for i in range(10)
        ]
        record = {"suite": suite, "checkpoint": {"name": row}, "seed": 0, "seconds": 1, "hardware": {}}
        record |= {
            "commit": "c",
            "protocol": {"executed": 5},
            "policy_seconds": 3.0,
            "episodes": 10,
            "successes": won,
            "errors": 0,
            "grasped": 10,
        }
        record |= {"outcomes": outcomes, "tasks": [{"index": 0, "name": "t"}]}
        path = root / f"results/tables/{row}_{seed}/{suite}/record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record))


def test_the_repository_keeps_its_word() -> None:
    assert check(ROOT) == []


def test_rows_without_a_record_are_not_run_and_those_with_one_are_counted(root: Path) -> None:
    before = markdown(Records(root))
    assert "| single actions | 77.8 / 82.9 / 67.3 / 23.0 / 62.8" + 6 * " | not run" in before
    assert "nothing can be compared yet" in before
    for seed in (0, 1):
        write_row(root, "chunk", 9, seed)
        write_row(root, "chunk_causal", 2, seed)
    records = Records(root)
    assert paired(records, "chunk", "chunk_causal") == Pairs(16, 56, 0, 8)
    text = markdown(records)
    seeds = ", ".join(f"[9](../results/tables/chunk_{seed}/tabletop_long/record.json)" for seed in (0, 1))
    cells = f"| 18/20 (90 %, 2 of 3 records: {seeds}) | 72/80 (90 %, 81 to 95, 8 of 12 records) |"
    # three queries an episode, ten episodes, three seconds
    assert f"{cells} 10 (100 ms, 40 actions) |" in text
    assert "The selective mask, against the plain one, raises success: +70.0 points" in text
    assert "80 pairs; shows no clear difference in grasping: +0.0 points" in text


def test_experts_are_told_task_by_task(root: Path) -> None:
    def row() -> str:
        return next(
            line for line in markdown(Records(root)).splitlines() if line.startswith("| libero_goal |")
        )

    path = root / "results/libero/libero_goal_expert/record.json"
    record = json.loads(path.read_text())
    for index, task in enumerate(record["tasks"]):
        task |= {"successes": 40 + index}
    record["tasks"][9]["successes"] = 50
    path.write_text(json.dumps(record))
    assert "_goal_expert/record.json) | 40/50 | 41/50 | 42/50 | 43/50 | " in row()
    assert "| 48/50 | 50/50 | 0: open the middle drawer of the cabinet; 1: " in row()
    assert "9: " not in row()
    assert any("RESULTS.md is not what the records say" in fault for fault in check(root))
    path.unlink()
    assert row().startswith("| libero_goal | not run |")
    assert row().endswith("| `runs/libero_experts.sh` |")


def test_plain_words_follow_the_p_value() -> None:
    assert "shows no clear difference in success: +2.0 points" in sentence("It", Pairs(50, 3, 1, 46))
    assert "It lowers success" in sentence("It", Pairs(50, 1, 20, 29), Pairs(50, 20, 1, 29))
    assert "100 pairs; raises grasping: +19.0" in sentence("It", Pairs(50, 1, 20, 29), Pairs(50, 20, 1, 29))
    # The exact test and the interval disagree: neither is hidden.
    assert "It may lower success (the interval leaves 0 out" in sentence("It", Pairs(60, 10, 22, 8))


def test_grasping_is_paired_as_success_is_and_errors_are_left_out(root: Path) -> None:
    for row, held in (("action_world", 8), ("action", 3)):
        write_row(root, row, 2)
        path = root / f"results/tables/{row}_0/tabletop_long/record.json"
        record = json.loads(path.read_text())
        for outcome in record["outcomes"]:
            outcome["grasped"] = outcome["init"] < held
        record["outcomes"][0]["status"] = "error"
        path.write_text(json.dumps(record))
    found = paired(Records(root), "action_world", "action", ("tabletop_long",), grasped=True)
    assert found == Pairs(2, 5, 0, 2)


def test_the_summary_says_what_the_records_say() -> None:
    """Words of the template that no condition chooses."""
    records = Records(ROOT)

    def verdict(a: str, b: str) -> str:
        pairs = paired(records, a, b)
        assert pairs is not None
        return sentence("", pairs).split(":")[0].strip()

    assert verdict("chunk", "chunk_causal") == verdict("chunk_execute1", "action") == "raises success"
    assert verdict("chunk", "action") == "lowers success"
    nothing = "shows no clear difference in success"
    assert verdict("action_world", "action") == verdict("full", "chunk") == nothing
    assert verdict("full_even", "full") == verdict("history2", "full") == nothing
    assert (
        verdict("chunk2_causal", "action") == verdict("action_history2", "action_world") == "lowers success"
    )
    assert verdict("chunk2", "action") == verdict("full2", "chunk2") == "raises success"
    models = {row: _imagined(records, "tables/world10", f"pilot_{row}")[0] for row in ("world", "full")}
    over = {row: found["imagined"][0] - found["floor"][0] for row, found in models.items()}
    assert over["full"] < 1.5 < 3 < over["world"]
    text = markdown(records)
    for words in ("+1.5: possible), nor", "+4.4: excluded) (image", "+10.4: excluded) beside"):
        assert f"; the paper's {words}" in text
    assert "**Not met**: all together, against the best other row, `action_world`, lowers success" in text
    assert "**Met**: all together, against the best other row, `chunk2`, raises success" in text


def test_imagination_is_told_by_view_with_other_actions_none_and_the_probe(root: Path) -> None:
    views = {"v": {"pilot_world": {}}}
    for kind, level in (("imagined", 21), ("ceiling", 25), ("floor", 17), ("swapped", 18), ("still", 19)):
        views["v"]["pilot_world"][kind] = {"psnr": [level, level + 3], "ssim": [0.5, 0.8], "pd": [0.2, 0.2]}
    probe = {"real": {"r2": 0.9, "size": 0.3}, "imagined": {"r2": 0.7}, "swapped": {"r2": -0.1}}
    section = {"horizon": 2, "clips": [{}, {}], "num_clips": [2, 1], "views": views}
    section["probe"] = {"pilot_world": {**probe, "still": {"size": 0.04}}}
    ceiling = {"kvd": {"value": 0.5}}
    own = {"kvd": {"value": 1.5, "interval_95": [1, 2], "at_clips": {"1": 3, "2": 1.5}}}
    section["distances"] = {"v": {"pilot_world": {"imagined": own, "ceiling": ceiling}}}
    path = root / "results/tables/world10/record.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"horizons": [section]}))
    text = markdown(Records(root))
    own = "[22.0, 0.60, 0.200](../results/tables/world10/record.json)"
    others = " | ".join(f"{level}.0, 0.60, 0.200" for level in (26, 18, 19, 20))
    assert f"| v, 2 clips of at most 2 frames; then pd | {own} | {others} | `runs/tables.sh` |" in text
    assert "| v, pilot_world | 1.5 (1 to 2) | 3, 1.5 | 0.5 | not measured | not measured | not m" in text
    assert (
        "v: 4.00 dB over the copied frame, 4.00 under the ceiling: not met; another clip's actions cost 3.00."
        in text
    )
    assert "| 0.90 | 0.70 | -0.10 | 0.040 (0.300) | `runs/tables.sh` |" in text


def test_conclusions_follow_the_records_of_chunk_errors_and_of_ranks(root: Path) -> None:
    (root / "results/tables").mkdir()
    for name in ("chunk_error.json", "rank"):
        copy = shutil.copytree if name == "rank" else shutil.copy
        copy(ROOT / "results/tables" / name, root / "results/tables" / name)
    text = markdown(Records(root))
    assert "errs less than one that sees none (0.017 against 0.036)" in text
    assert "errs more (0.095 against 0.063)" in text
    assert "**Not across policies that look differently often**" in text
    assert "Spearman 0.598 (95 %: -0.111 to 0.96) among the 8 that execute 1, 0.493" in text
    for name, key in (("chunk_error.json", "chunks"), ("rank/record.json", "imagined")):
        path = root / "results/tables" / name
        record = json.loads(path.read_text())
        if key == "chunks":
            record[key][1]["free"] = record[key][2]["free"]
        else:
            record[key]["spearman"]["interval_95"] = [0.2, 0.9]
        path.write_text(json.dumps(record))
    text = markdown(Records(root))
    assert "errors pile up" not in text
    assert "**Yes**: policies that succeed more" in text


def test_check_finds_what_no_record_holds(root: Path) -> None:
    assert check(root) == []
    readme = root / "README.md"
    text = readme.read_text()
    readme.write_text(
        re.sub(r"[\d.]+ times(\s+)as fast", r"500.0 times\1as fast", text.replace("388 of 400", "111 of 400"))
    )
    faults = check(root)
    assert any("111 of 400: no record" in fault for fault in faults)
    assert any("500.0 times as fast" in fault for fault in faults)
    readme.write_text(text)
    shutil.rmtree(root / "results/tabletop/tabletop_goal")
    write_row(root, "chunk", 5)
    faults = check(root)
    assert "results/tables/chunk_0 has no train.json (config, hours): run runs/tables.sh" in faults
    assert any("RESULTS.md is not what the records say" in fault for fault in faults)
    assert any("98 of 100" in fault or "388 of 400" in fault for fault in faults)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "| 98/100 (93 to 99 %) | 93/100 |",
            "| 97/100 (93 to 99 %) | 93/100 |",
            "97/100 of tabletop_object, ours",
        ),
        ("| 74/100 |", "| 92/100 |", "92/100 of tabletop_long, all five executed"),
        ("| **181/200**", "| **199/200**", "199/200 of libero_spatial, spatial"),
        ("(85 to 96 %)", "(88 to 96 %)", "92/100 88 to 96 %: it is 85 to 96 %"),
        (
            "times as many episodes",
            "times the episodes",
            "README.md has no '([\\\\d.]+) times as many episodes'",
        ),
    ],
)
def test_numbers_of_the_readme_are_those_of_their_own_record(
    root: Path, old: str, new: str, words: str
) -> None:
    """Each of these counts is in some record, of something else."""
    readme = root / "README.md"
    assert readme.read_text().count(old) == 1
    readme.write_text(readme.read_text().replace(old, new))
    assert any(words in fault for fault in check(root))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("libero/object_spatial/train.json", "hours"),
        ("libero/object_spatial/train.json", "config"),
        ("bench/cuda.json", "hardware"),
        ("tabletop/imagine/record.json", "commit"),
        ("tabletop/tabletop_goal/record.json", "checkpoint"),
    ],
)
def test_records_say_how_they_were_made(root: Path, name: str, key: str) -> None:
    path = root / "results" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), key: None}))
    said = name.removesuffix("/record.json")
    assert f"results/{said} does not say its {key}" in check(root)


def test_links_of_the_page_and_of_the_document_lead_to_records(root: Path, tmp_path: Path) -> None:
    page = tmp_path / "out/tables/index.html"
    document = write_tables(root, page)
    for base, pattern in ((document, r"\]\(([^)]+)\)"), (page, r'href="([^"]+)"')):
        links = re.findall(pattern, base.read_text())
        assert len(links) > 20
        assert all((base.parent / link).resolve().is_file() for link in links)


STUB = """#!/usr/bin/env bash
echo "$@" >> calls
for last; do :; done
case "$*" in
    *train-tokenizer*) at=out/tables/image_tokenizer/report; mkdir -p $at; echo {} > $at/report.json ;;
    *train_record*) mkdir -p "$last"; echo {} > "$last/train.json" ;;
    *" tokenize "*) mkdir -p "$last"; echo {} > "$last/manifest.json" ;;
    *efficientnet*) exit 1 ;;
esac
"""


def test_the_runs_say_what_is_left_skip_what_is_done_and_ask_the_probe(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    shutil.copy(ROOT / "runs/tables.sh", tmp_path / "runs/tables.sh")
    (tmp_path / "stub").write_text(STUB)
    (tmp_path / "stub").chmod(0o755)
    settings = {"PYTHON": "./stub", "ROWS": "action world", "SEEDS": "0"}

    def call() -> list[str]:
        done = subprocess.run(
            ["bash", "runs/tables.sh"],
            cwd=tmp_path,
            env=os.environ | settings,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    rows = ["== row 1 of 2: action, seed 0 ==", "== row 2 of 2: world, seed 0, about 1 min left =="]
    assert call() == rows
    assert call() == []
    asked = [line for line in (tmp_path / "calls").read_text().splitlines() if "eval-world" in line]
    assert len(asked) == 4
    assert all("out/tables/world_0" in line and "--probe out/tables/demos" in line for line in asked)


@pytest.mark.parametrize("row", ABLATIONS)
def test_rows_differ_from_full_in_what_they_say(row: str) -> None:
    config, full = recipe(f"pilot_{row}"), recipe("pilot_full")
    assert isinstance(config, Config)
    assert RECIPES[f"pilot_{row}"]().name == f"pilot_{row}"
    batch, share = config.train.batch_size, config.data.world_fraction
    assert batch * share in (0, 64)
    assert batch * (1 - share) in (0, 96)
    assert config.optim == full.optim
    assert replace(config.loss, image_weight=full.loss.image_weight) == full.loss
    assert (config.loss != full.loss) == row.endswith("_even")
    assert replace(config.model, head=full.model.head) == full.model
    assert (config.model.head != full.model.head) == row.startswith("head")
    assert config.train.only_head == bool(config.train.init_from) == (row == "head_after")
    assert config.train.steps == (5_000 if row == "world_long" else full.train.steps)
