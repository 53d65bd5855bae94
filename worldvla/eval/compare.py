"""Two evaluation records -> the episodes they share, counted in pairs: `worldvla compare A.json B.json`.

An episode is paired by (task, initial state). One that ended in an error in either record says nothing about
a policy and is left out, counted apart.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from worldvla.eval.stats import Pairs, mcnemar, paired_interval

MAY_DIFFER = {"views", "history", "head", "decoding", "initial_states", "workers"}
"""Parts of a protocol that are the policy's own, bound the pairs, or change no episode."""


def compare(a: Mapping[str, Any], b: Mapping[str, Any], force: bool = False) -> dict[str, Any]:
    """Return the comparison (docs/FORMAT.md); records of other suites or protocols raise unless `force`."""
    rules = [{"suite": r["suite"], "seed": r.get("seed"), **r["protocol"]} for r in (a, b)]
    # A key that only one of them has is of another version of the record: nothing is known to differ.
    names = [name for name in rules[0] if name in rules[1] and name not in MAY_DIFFER]
    differing = {name: [r[name] for r in rules] for name in names if rules[0][name] != rules[1][name]}
    if differing and not force:
        text = ", ".join(f"{name} {x!r} and {y!r}" for name, (x, y) in differing.items())
        raise ValueError(f"the records differ in more than the policy ({text}): evaluate alike, or --force")
    ends = [{(o["task"], o["init"]): o["status"] for o in r["outcomes"]} for r in (a, b)]
    shared = sorted(ends[0].keys() & ends[1].keys())
    sound = [key for key in shared if "error" not in (ends[0][key], ends[1][key])]
    if not sound:
        raise ValueError(
            f"no pairs: {len(ends[0])} and {len(ends[1])} episodes share {len(shared)} initial states "
            "of a task, none of them without an error: evaluate the same tasks"
        )
    tasks = []
    for task in a["tasks"]:
        keys = [key for key in sound if key[0] == task["index"]]
        tasks.append({"index": task["index"], "name": task["name"], **_counts(keys, *ends)})
    return {
        "suite": a["suite"],
        "a": a["checkpoint"],
        "b": b["checkpoint"],
        "differing": differing,
        **_counts(sound, *ends),
        "left_out_errors": len(shared) - len(sound),
        "unpaired": [len(end) - len(shared) for end in ends],
        "tasks": tasks,
    }


def _counts(
    keys: list[tuple[int, int]], a: Mapping[tuple[int, int], str], b: Mapping[tuple[int, int], str]
) -> dict[str, Any]:
    won = [(a[key] == "success", b[key] == "success") for key in keys]
    pairs = Pairs(*(won.count(case) for case in ((True, True), (True, False), (False, True), (False, False))))
    return {
        "pairs": pairs.total,
        **asdict(pairs),
        "difference": round(pairs.difference, 4),
        "interval_95": [round(x, 4) for x in paired_interval(pairs)],
        "p": float(f"{mcnemar(pairs.only_a, pairs.only_b):.4g}"),
    }


def table(comparison: Mapping[str, Any]) -> Table:
    """Return one row a task and one of all."""
    a, b = comparison["a"].get("name"), comparison["b"].get("name")
    out = Table(title=f"{comparison['suite']}: A {a}, B {b}", box=SIMPLE, padding=(0, 0, 0, 1))
    out.add_column("task")  # the only one that gives way in a narrow terminal
    for heading in ("both", "only A", "only B", "neither", "A - B", "95 %", "p"):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in (*comparison["tasks"], comparison):
        counts = [str(row[key]) for key in ("both", "only_a", "only_b", "neither")]
        low, high = row["interval_95"]
        rates = [f"{row['difference']:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{row['p']:.2g}"]
        if row is comparison:
            out.add_section()
        task = f"{row['index']} {row['name'].replace('_', ' ')}" if "index" in row else "all"
        out.add_row(task, *counts, *rates)
    return out
