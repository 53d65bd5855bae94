"""results/ -> docs/RESULTS.md and one HTML page: what the paper claims, what was measured here, what it
means.

Every number of ours links to its record; a row without one says `not run`, with its command. `check` fails
where the page is not what the records say, a record does not say how it was made, or the README states a
count that no record holds. The paper's numbers are percent of 500 episodes a suite.
"""

import html
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldvla.eval.compare import compare
from worldvla.eval.page import COLORS, ORANGE, STYLE, data_url, line_plots, world_plot
from worldvla.eval.record import provenance, write_json
from worldvla.eval.stats import Pairs, mcnemar, paired_interval

SUITES = ("spatial", "object", "goal", "long")
PILOT_SUITES = ("tabletop_object", "tabletop_goal")
SEEDS = (0, 1)
RUN = "runs/tables.sh"
PAPER_TABLE_1 = {  # spatial, object, goal, long, average
    "OpenVLA, 7B": (84.7, 88.4, 79.2, 53.7, 76.5),
    "WorldVLA, 7B, 256 px": (85.6, 89.0, 82.6, 59.0, 79.1),
    "WorldVLA, 7B, 512 px": (87.6, 96.2, 83.4, 60.0, 81.8),
}
OURS_TABLE_1 = {  # words -> directory of SUITE's record, its script
    "tabletop, 3.7 M parameters, 3 of 5 actions executed": ("tabletop/tabletop_{}", "runs/tabletop.sh"),
    "the same, all 5 executed, as the paper does": ("tabletop/tabletop_{}_execute5", "runs/tabletop.sh"),
    "its first version, before learning on its own states": (
        "tabletop/first/tabletop_{}",
        "runs/tabletop.sh",
    ),
    "random policy": ("tabletop/tabletop_{}_random", "runs/tabletop.sh"),
    "blind replay of the mean demonstration": ("tabletop/tabletop_{}_blind", "runs/tabletop.sh"),
    "scripted expert (reads the simulator)": ("tabletop/tabletop_{}_expert", "runs/tabletop.sh"),
    "real LIBERO: scripted expert, not a policy": ("libero/libero_{}_expert", "runs/libero_experts.sh"),
    "real LIBERO: ours, 8.8 M parameters, scripted demonstrations, wrist view and state, 3 of 5 executed": (
        "libero/libero_{}",
        "runs/libero_object.sh",
    ),
    "the same, all 5 executed": ("libero/libero_{}_execute5", "runs/libero_object.sh"),
    "the same data, half the steps, front view alone and no state, as the paper sees": (
        "libero/libero_{}_front",
        "runs/libero_object.sh",
    ),
}
PAPER_TABLE_3 = {  # goal, object, spatial, long, average
    "action": ("action model", (67.3, 82.9, 77.8, 23.0, 62.8)),
    "action_world": ("+ world model", (73.1, 88.0, 80.2, 27.3, 67.2)),
    "chunk_causal": ("+ chunk, plain causal mask", (79.6, 82.9, 36.7, 16.9, 54.0)),
    "chunk": ("+ chunk, selective mask", (84.4, 90.9, 81.8, 49.3, 76.6)),
    "full": ("+ chunk, selective mask, + world model", (85.1, 90.9, 84.0, 52.4, 78.1)),
}
COMPARISONS = (
    ("action_world", "action", "The world model beside single actions"),
    ("chunk_causal", "action", "Chunks under the plain mask"),
    ("chunk", "chunk_causal", "The selective mask"),
    ("chunk", "action", "Chunks with the selective mask"),
    ("full", "chunk", "The world model beside chunks"),
)
PAPER_TABLE_2 = {  # FVD, PSNR, SSIM x 100, LPIPS x 100, at 10 and at 50 frames
    "world": ("world data only", "250.0 / 29.62 / 90.73 / 11.97", "718.6 / 23.98 / 83.41 / 15.60"),
    "full": ("both", "255.1 / 29.77 / 90.40 / 11.94", "674.1 / 24.30 / 83.55 / 15.44"),
    "world_no_action": ("without action conditioning", "", ""),
}
OTHER_ROWS = {
    "History and resolution": {  # the paper: LIBERO-Goal, with chunks
        "full": ("M = 1, 64 px", "74.0"),
        "history2": ("M = 2", "84.4"),
        "history4": ("M = 4", "84.7"),
        "low": ("M = 1, 32 px", ""),
    },
    "Action head (RynnVLA-002's, beside the bins)": {  # no such comparison in either paper
        "chunk": ("bins alone", ""),
        "head": ("trained with the head, answered by the bins", ""),
        "head_continuous": ("the same model, answered by the head", ""),
    },
    "Chunk length": {  # the paper gives a figure, no numbers
        "action": ("K = 1", ""),
        "chunk2": ("K = 2, selective mask", ""),
        "chunk2_causal": ("K = 2, plain causal", ""),
        "chunk": ("K = 5, selective mask", ""),
        "chunk_causal": ("K = 5, plain causal", ""),
        "chunk10": ("K = 10, selective mask", ""),
        "chunk10_causal": ("K = 10, plain causal", ""),
    },
}
SPEED = (  # words, how the README says it, the record, the way to the number in it
    (
        "physics and one 64 x 64 picture, steps a second",
        r"(\d+) steps a second",
        "tabletop",
        "simulation steps_s_camera",
    ),
    (
        "chunk of five actions after the prefill, ms",
        r"in (\d+) ms after",
        "tabletop",
        "3m actions side_by_side chunk_ms",
    ),
    (
        "side by side: times as fast as one by one",
        r"([\d.]+) times as fast",
        "tabletop",
        "3m actions one_by_one slower_chunk",
    ),
    (
        "side by side: times as fast as one by one without a cache",
        r"([\d.]+) times as one by one",
        "tabletop",
        "3m actions without_cache slower_chunk",
    ),
    (
        "LIBERO evaluation: times the episodes an hour of the plain loop",
        r"([\d.]+) times as many episodes",
        "libero_eval",
        "ratio",
    ),
)


class Records:
    """The records under root/results, read once."""

    def __init__(self, root: Path) -> None:
        self.root, self.all = root, dict[str, dict[str, Any]]()
        for path in sorted((root / "results").rglob("*.json")):
            name = path.relative_to(root / "results").as_posix().removesuffix("/record.json")
            self.all[name] = json.loads(path.read_text(encoding="utf-8"))

    def link(self, name: str, text: str) -> str:
        tail = "" if name.endswith(".json") else "/record.json"
        return f"[{text}](../results/{name}{tail})"

    def rate(self, names: Sequence[str], key: str = "successes") -> str:
        """Return k/n over those of the records that exist, linked; `not run` if none does."""
        found = [self.all[name] for name in names if name in self.all]
        if not found:
            return "not run"
        hits, trials = sum(r[key] for r in found), sum(r["episodes"] - r["errors"] for r in found)
        part = f", {len(found)} of {len(names)} records" if len(found) < len(names) else ""
        text = f"{hits}/{trials} ({100 * hits / max(1, trials):.3g} %{part})"
        return self.link(names[0], text) if len(names) == 1 else text


def train_record(run: str, out: str) -> None:
    """Write out/train.json: the config of a run, its hours, its last validation, where it was made."""
    run_dir, out_dir = Path(run), Path(out)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = {line["event"]: line for line in lines}
    record = {"config": json.loads((run_dir / "config.json").read_text()), "validation": last["val"]}
    record["hours"] = round(last["train"]["train_seconds"] / 3600, 3)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(out_dir / "train.json", {**record, **provenance()})


def paired(records: Records, a: str, b: str) -> Pairs | None:
    """Return how rows A and B fare from the same initial states, over suites and seeds that both have."""
    found = []
    for seed in SEEDS:
        for suite in PILOT_SUITES:
            names = [f"tables/{row}_{seed}/{suite}" for row in (a, b)]
            if all(name in records.all for name in names):
                found.append(compare(*(records.all[name] for name in names), force=True))
    keys = ("both", "only_a", "only_b", "neither")
    return Pairs(*(sum(c[key] for c in found) for key in keys)) if found else None


def sentence(what: str, pairs: Pairs) -> str:
    """Return plain words: the difference, its interval, and whether it is more than chance."""
    (low, high), p = paired_interval(pairs), mcnemar(pairs.only_a, pairs.only_b)
    verdict = (
        ("raises success" if pairs.difference > 0 else "lowers success")
        if p < 0.05
        else ("makes no difference that these episodes show")
    )
    numbers = f"{100 * pairs.difference:+.1f} points, 95 %: {100 * low:+.1f} to {100 * high:+.1f}"
    return f"{what} {verdict}: {numbers}, p = {p:.2g}, {pairs.total} pairs."


def markdown(records: Records) -> str:
    """Return docs/RESULTS.md."""
    parts = [_summary(records), _success(records), _ablation(records)]
    parts += [_rows(records, title, rows) for title, rows in OTHER_ROWS.items()]
    return "\n".join([*parts, _chunk_error(records), _world(records), _speed(records)])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _summary(records: Records) -> str:
    kinds = ("", "_execute5", "_random")
    ours = {kind: records.rate([f"tabletop/tabletop_{s}{kind}" for s in SUITES]) for kind in kinds}
    libero = [s for s in ("spatial", "object", "goal", "10") if f"libero/libero_{s}" in records.all]
    real = ", ".join(f"libero_{s} {records.rate([f'libero/libero_{s}'])}" for s in libero)
    real = f"On real LIBERO: {real}." if real else "On real LIBERO no policy of ours has been evaluated."
    num = len([row for row in PAPER_TABLE_3 if _row(records, row)[-1] != "not run"])
    done = f"{num or 'none'} of its five rows has been run here"
    return f"""# Results

Written by `worldvla tables` from the records in `results/`; do not edit. `worldvla tables --check` holds it.

**What was claimed.** WorldVLA (arXiv 2506.21539): one 7B transformer that is policy and world model reaches
79.1 % on LIBERO at 256 pixels; learning the world model helps the policy (62.8 to 67.2 %), and chunks of
actions help only where no action sees the others (plain mask 54.0 %, selective mask 76.6 %).

**What was measured here.** Another setting: a model of 3.7 million parameters, the built-in tabletop world,
scripted demonstrations and two rounds on states that the policy visited. Unseen episodes that succeed, with
three actions of each chunk of five executed: {ours[""]}; with all five: {ours["_execute5"]}; a random policy:
{ours["_random"]}. {real} The ablation that the claims rest on: {done}.

**What it means.** The line from demonstrations to success carries at small size. The tabletop numbers neither
confirm nor refute the paper's: other tasks, other data, one model. Only the ablation, in which the rows
differ in one thing alone, can speak to its claims.
"""


def _success(records: Records) -> str:
    rows = [[who, *(f"{x:.1f}" for x in values), "paper, LIBERO"] for who, values in PAPER_TABLE_1.items()]
    for who, (pattern, script) in OURS_TABLE_1.items():
        long = "10" if pattern.startswith("libero") else "long"
        names = [pattern.format(s if s != "long" else long) for s in SUITES]
        rows.append([who, *(records.rate([name]) for name in names), records.rate(names), f"`{script}`"])
    baseline = _row(records, "action")
    who = "OpenVLA-style at pilot size: one frame, one action, no world model"
    rows.append([who, "", *baseline[:2], "", baseline[-1], _command("action")])
    return f"""
## Success by suite (the paper's Table 1)

The paper: percent of 500 episodes a suite. Ours: successes/episodes, records behind the links.

{_table(["", *SUITES, "all", "from"], rows)}"""


def _row(records: Records, row: str) -> list[str]:
    """Return object, goal and both, over the seeds."""
    names = [[f"tables/{row}_{seed}/{suite}" for seed in SEEDS] for suite in PILOT_SUITES]
    return [records.rate(n) for n in names] + [records.rate([x for n in names for x in n])]


def _speed_of(records: Records, row: str) -> str:
    """Return how many queries a second the policy answered while it was evaluated, image to actions."""
    found = [records.all.get(f"tables/{row}_{seed}/{suite}") for suite in PILOT_SUITES for seed in SEEDS]
    found = [record for record in found if record]
    queries = sum(-(-o["steps"] // r["protocol"]["executed"]) for r in found for o in r["outcomes"])
    return f"{queries / sum(r['policy_seconds'] for r in found):.0f}" if found else "not run"


def _command(row: str) -> str:
    return f'`ROWS="{row}" {RUN}`'


def _ablation(records: Records) -> str:
    rows = []
    for row, (words, paper) in PAPER_TABLE_3.items():
        names = [f"tables/{row}_{seed}/{suite}" for suite in PILOT_SUITES for seed in SEEDS]
        held = records.rate(names, "grasped")
        rows.append([words, " / ".join(map(str, paper)), *_row(records, row), held, _command(row)])
    head = ["", "paper: goal / object / spatial / long / all", "object", "goal", "both", "grasped", "command"]
    lines = [(paired(records, a, b), words) for a, b, words in COMPARISONS]
    said = "".join(f"- {sentence(words, pairs)}\n" for pairs, words in lines if pairs)
    said = said or "No two rows have been run, so nothing can be compared yet.\n"
    return f"""
## Ablation (the paper's Table 3)

Ours: two tabletop suites, seeds 0 and 1, initial states 10 to 19 of each task, every action of a chunk
executed; `worldvla config pilot_ROW` prints a row. Differences are paired by suite, seed and initial state;
two seeds say little of how seeds vary, which the intervals do not hold.

{_table(head, rows)}
{said}"""


def _rows(records: Records, title: str, rows: Mapping[str, tuple[str, str]]) -> str:
    paper = "paper: LIBERO-Goal, with chunks" if any(p for _, p in rows.values()) else "paper"
    head = ["", paper, "object", "goal", "both", "queries a second", "command"]
    body = [
        [w, p or "no number", *_row(records, row), _speed_of(records, row), _command(row.split("_cont")[0])]
        for row, (w, p) in rows.items()
    ]
    return f"\n## {title}\n\n{_table(head, body)}"


def _chunk_error(records: Records) -> str:
    name = "tables/chunk_error.json"
    text = "\n## Error of the k-th action of a chunk\n\n"
    text += "Mean error of x, y, z in units of an action (5 cm), held-out episodes.\n\n"
    if name not in records.all:
        return f"{text}not run: `{RUN}`, or `worldvla chunk-error CHECKPOINT... --out results/{name}`\n"
    rows = []
    for row in records.all[name]["chunks"]:
        mask = "selective" if row["selective_mask"] else "plain causal"
        for kind, words in (("forced", "teacher forcing"), ("free", "as decoded"), ("still", "no motion")):
            values = ", ".join(f"{x:.3f}" for x in row[kind])
            rows.append([records.link(name, row["name"]), mask, words, values])
    return text + _table(["model", "mask", "", "error at k = 1, 2, ..."], rows)


def _world(records: Records) -> str:
    rows = []
    for row, (words, ten, fifty) in PAPER_TABLE_2.items():
        for frames, paper in ((10, ten), (50, fifty)):
            found = _world_row(records, f"tables/world{frames}", f"pilot_{row}")
            rows.append([f"{words}, {frames} frames", paper or "no number", found or "not run", f"`{RUN}`"])
    shipped = _world_row(records, "tabletop/imagine", "tabletop_dagger2")
    rows.append(["the shipped tabletop model", "", shipped or "not run", "`runs/tabletop.sh`"])
    head = ["", "paper: FVD / PSNR / SSIM / LPIPS", "ours, mean over frames: PSNR, SSIM", "command"]
    return f"""
## World model (the paper's Table 2)

FVD and LPIPS need weight files that are not shipped: `worldvla eval-world --i3d FILE --lpips FILE FILE`.
Read ours against two lines: the ceiling (real frames through the image tokenizer) and the floor (the first
frame, copied). Swapped: imagined with the actions of another clip.

{_table(head, rows)}"""


def _world_row(records: Records, name: str, model: str) -> str:
    lines = []
    for section in records.all.get(name, {}).get("horizons", ()):
        for view, models in section["views"].items():
            scores = models.get(model)
            if scores is None:
                continue
            kinds = [k for k in ("imagined", "ceiling", "floor", "swapped") if k in scores]
            weights = np.array(section["num_clips"]) / sum(section["num_clips"])
            mean = {k: [float(weights @ scores[k][m]) for m in ("psnr", "ssim")] for k in kinds}
            text = ", ".join(f"{k} {m[0]:.1f} dB {m[1]:.2f}" for k, m in mean.items())
            most = "at most " if min(section["num_clips"]) < len(section["clips"]) else ""
            lines.append(f"{view}, {len(section['clips'])} clips of {most}{section['horizon']} steps: {text}")
    return records.link(name, "; ".join(lines)) if lines else ""


def _speed(records: Records) -> str:
    rows = []
    for words, _, name, way in SPEED:
        if (value := _bench(records, name, way)) is not None:
            rows.append([words, records.link(f"bench/{name}.json", f"{value:.1f}"), "`runs/bench.sh`"])
    return f"\n## Speed\n\n{_table(['', 'measured', 'command'], rows)}"


def _bench(records: Records, name: str, way: str) -> float | None:
    """Return a number of results/bench/NAME.json; None without that record."""
    record: Any = records.all.get(f"bench/{name}.json")
    if record is None:
        return None
    record = record.get("bench") or record["bench_eval"]
    for key in way.split():
        record = record[key] if key in record else record[key.replace("_", " ")]
    return float(record)


def write_tables(root: Path, page: Path) -> Path:
    """Write docs/RESULTS.md and the HTML page; return the former."""
    records = Records(root)
    text = markdown(records)
    out = root / "docs/RESULTS.md"
    out.write_text(text, encoding="utf-8")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(_page(records, text, os.path.relpath(root / "docs", page.parent)), encoding="utf-8")
    return out


def _page(records: Records, text: str, docs: str) -> str:
    """Return `text` as HTML with plots; its links, written from docs/, are made to hold from the page."""
    body, table = "", False
    for line in [*text.splitlines(), ""]:
        cells = [c.strip() for c in line.strip("|").split("|")] if line.startswith("|") else []
        if table and not cells:
            body += "</table></div>"
        if cells and set(cells) != {"---"}:
            tag = "td" if table else "th"
            row = "".join(f"<{tag}>{_inline(c, docs)}</{tag}>" for c in cells)
            body += ("" if table else "<div class=card style='overflow-x:auto'><table>") + f"<tr>{row}</tr>"
        elif line.startswith("#"):
            level = 1 + line.startswith("##")
            body += f"<section><h{level}>{_inline(line.lstrip('# '), docs)}</h{level}></section>"
        elif not cells:
            body += f"<span class=note>{_inline(line, docs)}</span> " if line else "<p></p>"
        table = bool(cells)
    for name, svg in _plots(records):
        source = data_url(svg, "image/svg+xml")
        body += (
            f"<section><h2>{name}</h2><div class=card><img class=plot alt='' src='{source}'></div></section>"
        )
    head = f"<meta charset=utf-8><title>WorldVLA: results</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body><main>{body}</main></body></html>\n"


def _inline(text: str, docs: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", rf'<a href="{docs}/\2">\1</a>', text)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text))


def _plots(records: Records) -> Iterator[tuple[str, bytes]]:
    lengths = {
        "selective mask": ("action", "chunk2", "chunk", "chunk10"),
        "plain causal": ("action", "chunk2_causal", "chunk_causal", "chunk10_causal"),
    }
    lines: list[tuple[Any, Any, dict[str, Any]]] = []
    for (words, rows), color in zip(lengths.items(), (COLORS[0], ORANGE), strict=True):
        points = []
        for length, row in zip((1, 2, 5, 10), rows, strict=True):
            names = [f"tables/{row}_{seed}/{suite}" for suite in PILOT_SUITES for seed in SEEDS]
            found = [records.all[name] for name in names if name in records.all]
            if trials := sum(r["episodes"] - r["errors"] for r in found):
                points.append((length, 100 * sum(r["successes"] for r in found) / trials))
        if points:
            x, y = zip(*points, strict=True)
            lines.append((x, y, {"color": color, "marker": "o", "label": words}))
    if lines:
        yield "Success against chunk length", line_plots([("success, %", "K", lines)], 1)
    if rows := records.all.get("tables/chunk_error.json", {}).get("chunks"):
        lines = []
        for row, color in zip(rows, COLORS * len(rows), strict=False):
            for kind, style in (("forced", (0, (2, 1))), ("free", "-")):
                shown = {"color": color, "linestyle": style, "label": f"{row['name']}, {kind}"}
                lines.append((range(1, len(row[kind]) + 1), row[kind], shown))
        yield "Error of the k-th action", line_plots([("error, units of an action", "k", lines)], 1)
    for name in ("tables/world10", "tables/world50", "tabletop/imagine"):
        for section in records.all.get(name, {}).get("horizons", ()):
            yield f"Imagination: {name}", world_plot(section)


def check(root: Path) -> list[str]:
    """Return one line a fault."""
    records, faults = Records(root), []
    path = root / "docs/RESULTS.md"
    if not path.exists() or path.read_text(encoding="utf-8") != markdown(records):
        faults.append("docs/RESULTS.md is not what the records say: run `worldvla tables`")
    counts = set()
    for name, record in records.all.items():
        if "outcomes" in record:
            lacking = [k for k in ("checkpoint", "seed", "seconds", "hardware", "commit") if k not in record]
            faults += [f"results/{name} does not say its {key}" for key in lacking]
            trials = record["episodes"] - record["errors"]
            counts |= {(record["successes"], trials), (record["grasped"], trials)}
            row = name.split("/")[1]
            if name.startswith("tables/") and f"tables/{row}/train.json" not in records.all:
                faults.append(f"results/tables/{row} has no train.json (config, hours): run {RUN}")
    for pattern, script in OURS_TABLE_1.values():
        found = [records.all[n] for n in (pattern.format(s) for s in SUITES) if n in records.all]
        counts.add((sum(r["successes"] for r in found), sum(r["episodes"] - r["errors"] for r in found)))
        if not (root / script).exists():
            faults.append(f"{script} is gone: it is the command of results/{pattern.format('SUITE')}")
    readme = (root / "README.md").read_text(encoding="utf-8")
    numbers = readme.split("## Numbers", 1)[-1].split("\n## ", 1)[0]
    for hits, trials in re.findall(r"\b(\d+)(?:/| of )(\d+)\b", numbers):
        if (int(hits), int(trials)) not in counts:
            faults.append(f"README.md says {hits} of {trials}: no record holds that")
    for _, pattern, name, way in SPEED:
        said, value = re.search(pattern, numbers), _bench(records, name, way)
        if said is None:
            continue
        half = 0.5 * 10.0 ** -len(said[1].partition(".")[2])
        if value is None or abs(float(said[1]) - value) > half:
            faults.append(f"README.md says {said[0]!r}, results/bench/{name}.json {value}")
    for link in re.findall(r"`((?:results|runs)/[^`]*)`", readme):
        if "SUITE" not in link and not (root / link).exists():
            faults.append(f"README.md names {link}, which does not exist")
    return faults
