"""The tables say what the records say, and `--check` finds what they do not.

Run: pytest tests/test_tables.py
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from worldvla.config import Config
from worldvla.eval.stats import Pairs
from worldvla.eval.tables import Records, check, markdown, paired, sentence, write_tables
from worldvla.recipes import ABLATIONS, RECIPES, TABLETOP_SUITES, recipe

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
    for suite in TABLETOP_SUITES:
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
    assert "18/20 (90 %, 2 of 3 records) | 72/80 (90 %, 8 of 12 records)" in text
    assert (
        "| 72/80 (90 %, 8 of 12 records) | 10 (100 ms, 40 actions) |" in text
    )  # three queries an episode, ten episodes, three seconds
    assert "The selective mask raises success: +70.0 points" in text


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
    assert "shows no clear difference: +2.0 points" in sentence("It", Pairs(50, 3, 1, 46))
    assert "It lowers success" in sentence("It", Pairs(50, 1, 20, 29))


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


def test_links_of_the_page_and_of_the_document_lead_to_records(root: Path, tmp_path: Path) -> None:
    page = tmp_path / "out/tables/index.html"
    document = write_tables(root, page)
    for base, pattern in ((document, r"\]\(([^)]+)\)"), (page, r'href="([^"]+)"')):
        links = re.findall(pattern, base.read_text())
        assert len(links) > 20
        assert all((base.parent / link).resolve().is_file() for link in links)


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
    assert (config.loss != full.loss) == (row == "full_even")
    assert replace(config.model, head=full.model.head) == full.model
    assert (config.model.head != full.model.head) == row.startswith("head")
    assert config.train.only_head == bool(config.train.init_from) == (row == "head_after")
    assert config.train.steps == (5_000 if row == "world_long" else full.train.steps)
