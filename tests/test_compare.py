"""Two records are compared over the episodes that both ran without an error, counted by hand here; records
that differ in more than the policy are refused.

Run: pytest tests/test_compare.py
"""

import json
from pathlib import Path
from typing import Any

import pytest

from worldvla.cli import main
from worldvla.eval.compare import compare
from worldvla.eval.record import read_record, suites_of


def record(name: str, ends: dict[tuple[int, int], str], **other: Any) -> dict[str, Any]:
    protocol = {
        "horizon": 80,
        "executed": 5,
        "history": 1,
        "views": {},
        "initial_states": "0..2 of each task",
    }
    return {
        "suite": "tabletop_object",
        "seed": 0,
        "checkpoint": {"name": name},
        "protocol": protocol,
        "tasks": [{"index": i, "name": f"task_{i}"} for i in range(2)],
        "outcomes": [{"task": t, "init": i, "status": end} for (t, i), end in ends.items()],
        **other,
    }


WON, LOST, BROKE = "success", "fail", "error"
A = record(
    "a", {(0, 0): WON, (0, 1): WON, (0, 2): LOST, (1, 0): WON, (1, 1): WON, (1, 2): BROKE, (1, 3): WON}
)
B = record("b", {(0, 0): WON, (0, 1): LOST, (0, 2): LOST, (1, 0): LOST, (1, 1): LOST, (1, 2): WON})


def test_pairs_are_counted_by_task_and_initial_state() -> None:
    result = compare(A, B)
    counts = {"pairs": 5, "both": 1, "only_a": 3, "only_b": 0, "neither": 1}
    assert {key: result[key] for key in counts} == counts
    assert result["difference"] == 0.6
    assert result["p"] == 0.25  # 2 / 2^3
    assert result["left_out_errors"] == 1
    assert result["unpaired"] == [1, 0]
    assert [(t["name"], t["both"], t["only_a"], t["neither"]) for t in result["tasks"]] == [
        ("task_0", 1, 1, 1),
        ("task_1", 0, 2, 0),
    ]
    low, high = result["interval_95"]
    assert low < 0.6 < high
    mirrored = compare(B, A)
    assert mirrored["interval_95"] == [-high, -low]
    assert (mirrored["only_a"], mirrored["only_b"]) == (0, 3)


def test_order_of_outcomes_does_not_matter() -> None:
    shuffled = {**A, "outcomes": A["outcomes"][::-1]}
    assert compare(shuffled, B) == compare(A, B)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"suite": "tabletop_goal"}, "suite 'tabletop_object' and 'tabletop_goal'"),
        ({"seed": 1}, "seed 0 and 1"),
        ({"protocol": {**A["protocol"], "horizon": 40}}, "horizon 80 and 40"),
        ({"protocol": {**A["protocol"], "executed": 3}}, "executed 5 and 3"),
    ],
)
def test_other_suites_and_protocols_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        compare(A, {**B, **change})
    forced = compare(A, {**B, **change}, force=True)
    assert len(forced["differing"]) == 1
    assert forced["pairs"] == 5


def test_what_a_policy_looks_at_is_its_own_affair() -> None:
    views = {**A["protocol"], "views": {"agentview": [256, 256]}, "history": 2, "initial_states": "0..9"}
    older = {**views, "settling": 10}  # a key that the other record does not have
    assert compare(A, {**B, "protocol": older})["differing"] == {}


def test_nothing_in_common_is_one_line() -> None:
    with pytest.raises(ValueError, match="no pairs: 7 and 1 episodes share 1 initial states"):
        compare(A, record("b", {(1, 2): WON}))
    with pytest.raises(ValueError, match="share 0 initial states"):
        compare(A, record("b", {(0, 9): WON}))


@pytest.mark.parametrize(
    "change",
    [{"outcomes": [{"task": 0}]}, {"outcomes": 3}, {"tasks": [{"index": 0}]}, {"protocol": 0}, {"suites": 3}],
)
def test_a_record_without_its_parts_is_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**A, **change} if "suites" not in change else change))
    with pytest.raises(ValueError, match=rf"^{path} is not an evaluation record: expected the record.json"):
        read_record(path)


def test_suites_of_a_record_lead_nowhere_else(tmp_path: Path) -> None:
    for name in ("../../x", "/x"):
        (tmp_path / "record.json").write_text(json.dumps({"suite": "tabletop", "suites": [{"suite": name}]}))
        with pytest.raises(ValueError, match=f"holds records of unknown suites: {name}"):
            suites_of(tmp_path)


def test_the_verb_prints_a_table_and_ends_with_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, data in (("a", A), ("b", B)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps(data))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b" / "record.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == compare(A, B)
    assert "5 pairs (1 left out for errors, 1 unpaired); A - B +0.600" in lines[-2]
    assert any(line.split()[:7] == ["1", "task", "1", "0", "2", "0", "0"] for line in lines)
    other = {**B, "suite": "tabletop_goal"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "other.json")]
    assert main(words) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0


@pytest.mark.parametrize("text", ["{", "[]", '{"suite": "x"}'])
def test_what_is_no_record_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(ValueError, match=r"expected (a|the) record.* of `worldvla eval`"):
        read_record(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "none.json")
