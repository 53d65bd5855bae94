"""results/ -> docs/RESULTS.md and one HTML page: what the paper claims, what was measured here, what it
means.

The words and the paper's numbers (percent of 500 episodes a suite) are in worldvla/assets/report/results.md.
Every number of ours links to its record; a row without one says `not run`, with its command. `check` fails
where the page is not what the records say, a record does not say how it was made, or the README states a
count that no record holds.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markdown_it import MarkdownIt

from worldvla.eval.compare import compare
from worldvla.eval.page import BLUE, ORANGE, QUIET, data_url, line_plots, render
from worldvla.eval.stats import Pairs, mcnemar, paired_interval, rank_agreement, wilson
from worldvla.files import read_json, write_json, write_text
from worldvla.machine import provenance

NAMES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "pd_efflite0": "PD-EffLite0",
    "lpips_alex": "LPIPS (AlexNet)",
    "lpips_vgg": "LPIPS (VGG)",
}
COLORS = (BLUE, "#1f9d55", "#8e44ad", "#d64545", "#0e9aa7")
"""Of the models, in turn."""
KINDS = {
    "ceiling": {"linestyle": (0, (4, 3)), "linewidth": 1.4},
    "floor": {"linestyle": (0, (1, 2)), "linewidth": 1.8},
    "imagined": {"linewidth": 2.4},
    "swapped": {"linestyle": (0, (5, 1, 1, 1)), "linewidth": 1.3},
    "still": {"linestyle": (0, (1, 1)), "linewidth": 1.3},
}
LEGEND = {
    "ceiling": "ceiling: tokenizer",
    "floor": "floor: first frame",
    "imagined": "imagined",
    "swapped": "actions of another clip",
    "still": "no motion",
}


def world_plot(section: Mapping[str, Any]) -> bytes:
    """Return an SVG of one horizon of an imagination record: a row a view, a column a metric."""
    first = next(iter(next(iter(section["views"].values())).values()))
    panels = []
    for view, models in section["views"].items():
        for metric in first["imagined"]:
            lines = []
            for (name, kinds), color in zip(models.items(), COLORS * len(models), strict=False):
                for kind, scores in kinds.items():
                    is_own = kind not in ("ceiling", "floor")
                    shown = {**KINDS[kind], "color": color if is_own else {"floor": ORANGE}.get(kind, QUIET)}
                    text = f"{name}: {LEGEND[kind]}" if is_own and len(models) > 1 else LEGEND[kind]
                    lines.append((section["steps"], scores[metric], {**shown, "label": text}))
            panels.append((f"{view}: {NAMES.get(metric, metric)}", "imagined steps", lines))
    return line_plots(panels, len(first["imagined"]))


TABLETOP = tuple(f"tabletop_{name}" for name in ("spatial", "object", "goal", "long"))
LIBERO = ("libero_object", "libero_spatial")
"""Suites of the rows under results/libero/tables."""
SEEDS = (0, 1, 2)
LARGE = "92m actions"
SPEED = (  # words, how the README says it, the record, the way to the number in it
    (
        "physics and one 64 x 64 picture, steps a second",
        r"(\d+) steps a second",
        "decoding",
        "simulation steps_s_camera",
    ),
    (
        "chunk of five actions after the prefill, ms",
        r"in (\d+) ms after",
        "decoding",
        "3m actions side_by_side chunk_ms",
    ),
    (
        "side by side: times as fast as one by one",
        r"([\d.]+) times as fast",
        "decoding",
        "3m actions one_by_one slower_chunk",
    ),
    (
        "side by side: times as fast as one by one without a cache",
        r"([\d.]+) times as one by one",
        "decoding",
        "3m actions without_cache slower_chunk",
    ),
    (
        "92 million parameters, bfloat16: chunk of ten actions after the prefill, ms",
        r"takes (\d+) ms after",
        "decoding_bfloat16",
        f"{LARGE} side_by_side chunk_ms",
    ),
    (
        "the same: times as fast as one by one",
        r"([\d.]+) times as our own",
        "decoding_bfloat16",
        f"{LARGE} one_by_one slower_chunk",
    ),
    (
        "the same: times as fast as transformers' Chameleon",
        r"([\d.]+) times as transformers",
        "decoding_bfloat16",
        f"{LARGE} transformers slower_chunk",
    ),
    (
        "the same, prefill and all",
        r"whole query ([\d.]+) times",
        "decoding_bfloat16",
        f"{LARGE} transformers slower_query",
    ),
    (
        "7 billion parameters, bfloat16, one H200: query of ten actions, prefill and all, ms",
        r"one H200 takes (\d+) ms",
        "cuda",
        "7b actions side_by_side query_ms",
    ),
    (
        "the same: times as fast as with its passes launched kernel by kernel",
        r"([\d.]+) times as launched",
        "cuda",
        "7b actions side_by_side,_no_graphs slower_query",
    ),
    (
        "the same: times as fast as transformers' Chameleon",
        r"([\d.]+) times as transformers there",
        "cuda",
        "7b actions transformers slower_query",
    ),
    (
        "the same query with blocks compiled, ms",
        r"blocks compiled (\d+) ms",
        "cuda_compiled",
        "7b actions side_by_side query_ms",
    ),
    (
        "its passes after the first: part of the bandwidth of a large copy",
        r"at (0\.\d+) of the bandwidth",
        "cuda_compiled",
        "7b actions side_by_side chunk_of_bandwidth",
    ),
    (
        "the shipped tabletop model, one H200: a frame by verified drafts, ms",
        r"a frame there in (\d+) ms",
        "cuda_3m",
        "3m frames ms_frame",
    ),
    (
        "the same frame, one code a pass, ms",
        r"ms instead of (\d+) \(",
        "cuda_3m",
        "3m frames ms_frame_plain",
    ),
    (
        "LIBERO evaluation: times the episodes an hour of the plain loop",
        r"([\d.]+) times as many episodes",
        "libero_eval",
        "ratio",
    ),
    (
        "the same with the shipped model as the policy, both ways",
        r"with the shipped model ([\d.]+) times",
        "libero_eval_model",
        "ratio",
    ),
    (
        "its wall time, times the simulation that its episodes need on the same cores",
        r"wall time ([\d.]+) times",
        "libero_eval_model",
        "wall_over_simulation",
    ),
)


ENDS = {"ours": "", "all five executed": "_execute5", "random policy": "_random", "blind replay": "_blind"}
"""Columns of the README's table -> the end of their records' names."""


class Records:
    """The records under root/results, read once."""

    def __init__(self, root: Path) -> None:
        self.root, self.all = root, dict[str, dict[str, Any]]()
        for path in sorted((root / "results").rglob("*.json")):
            name = path.relative_to(root / "results").as_posix().removesuffix("/record.json")
            self.all[name] = read_json(path)

    def link(self, name: str, text: object) -> str:
        tail = "" if name.endswith(".json") else "/record.json"
        return f"[{text}](../results/{name}{tail})"

    def rate(
        self, names: Sequence[str], key: str = "successes", interval: bool = False, each: bool = False
    ) -> str:
        """Return k/n over those of the records that exist, linked; `not run` if none does. `interval`: with
        Wilson's, in percent; `each`: with the k of every record, linked."""
        found = [self.all[name] for name in names if name in self.all]
        if not found:
            return "not run"
        hits, trials = sum(r[key] for r in found), sum(r["episodes"] - r["errors"] for r in found)
        part = f", {len(found)} of {len(names)} records" if len(found) < len(names) else ""
        low, high = wilson(hits, trials)
        between = f", {100 * low:.0f} to {100 * high:.0f}" if interval else ""
        of_each = ", ".join(self.link(n, self.all[n][key]) for n in names if n in self.all)
        parts = f": {of_each}" if each and len(names) > 1 else ""
        text = f"{hits}/{trials} ({100 * hits / max(1, trials):.3g} %{between}{part}{parts})"
        return self.link(names[0], text) if len(names) == 1 else text


def train_record(run: str, out: str) -> None:
    """Write out/train.json: the config of a run, its hours, its last validation, where it was made."""
    import torch  # noqa: F401  `provenance` names the GPUs only where it is loaded

    run_dir, out_dir = Path(run), Path(out)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = {line["event"]: line for line in lines}
    record = {"config": read_json(run_dir / "config.json"), "validation": last["val"]}
    record["hours"] = round(last["train"]["train_seconds"] / 3600, 3)
    write_json(out_dir / "train.json", {**record, **provenance()})


def of_row(row: str, suites: Sequence[str] = TABLETOP) -> list[str]:
    """Return the names of a row's records, over the seeds (LIBERO: seed 0 alone)."""
    if set(suites) <= set(LIBERO):
        return [f"libero/tables/{row}_0/{suite}" for suite in suites]
    return [f"tables/{row}_{seed}/{suite}" for suite in suites for seed in SEEDS]


def of_suites(pattern: str) -> list[str]:
    """Return the names of the records of the four suites, for which `pattern` has a place."""
    return [pattern.format(s) for s in ("spatial", "object", "goal", "10" if "libero" in pattern else "long")]


def paired(
    records: Records, a: str, b: str, suites: Sequence[str] = TABLETOP, grasped: bool = False
) -> Pairs | None:
    """Return how rows A and B fare from the same initial states, over suites and seeds that both have.
    `grasped`: in holding the target, not in success."""
    rows = zip(of_row(a, suites), of_row(b, suites), strict=True)
    sides = [[records.all[name] for name in pair] for pair in rows if set(pair) <= records.all.keys()]
    if grasped:
        sides = [[_of_grasping(record) for record in side] for side in sides]
    found = [compare(*side, force=True) for side in sides]
    keys = ("both", "only_a", "only_b", "neither")
    return Pairs(*(sum(c[key] for c in found) for key in keys)) if found else None


def _of_grasping(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record in which to have held the target is the success."""
    sound = [o for o in record["outcomes"] if o["status"] != "error"]
    ends = ("fail", "success")
    return {**record, "outcomes": [{**o, "status": ends[bool(o["grasped"])]} for o in sound]}


def sentence(what: str, pairs: Pairs, grasped: Pairs | None = None) -> str:
    """Return plain words: the differences, their intervals, and whether they are more than chance."""
    grasps = f"; {_effect('grasping', grasped)}" if grasped else ""
    return f"{what} {_effect('success', pairs)}, {pairs.total} pairs{grasps}."


def _effect(of: str, pairs: Pairs) -> str:
    (low, high), p = paired_interval(pairs), mcnemar(pairs.only_a, pairs.only_b)
    way = "raise" if pairs.difference > 0 else "lower"
    verdict = f"{way}s {of}" if p < 0.05 else f"shows no clear difference in {of}"
    if p >= 0.05 and not low <= 0 <= high:
        verdict = f"may {way} {of} (the interval leaves 0 out, the exact test does not)"
    numbers = f"{100 * pairs.difference:+.1f} points, 95 %: {100 * low:+.1f} to {100 * high:+.1f}"
    return f"{verdict}: {numbers}, p = {p:.2g}"


def markdown(records: Records) -> str:
    """Return docs/RESULTS.md."""
    return render(
        "results.md",
        records=records,
        tabletop=TABLETOP,
        libero=LIBERO,
        speed=SPEED,
        link=records.link,
        rate=records.rate,
        of=of_row,
        named=of_suites,
        paired=partial(paired, records),
        interval=paired_interval,
        sentence=sentence,
        queries=partial(_queries, records),
        imagined=partial(_imagined, records),
        bench=partial(_bench, records),
        best=partial(_best, records),
        rank_agreement=rank_agreement,
    )


def _queries(records: Records, names: Sequence[str]) -> str:
    """Return queries a second, milliseconds a query and executed actions a second of the policy while it was
    evaluated, image to actions; queries that arrive together share their time."""
    found = [records.all[name] for name in names if name in records.all]
    if not found:
        return "not run"
    steps = [(o["steps"], r["protocol"]["executed"]) for r in found for o in r["outcomes"]]
    actions, queries = sum(n for n, _ in steps), sum(-(-n // executed) for n, executed in steps)
    seconds = sum(r["policy_seconds"] for r in found)
    return f"{queries / seconds:.0f} ({1000 * seconds / queries:.0f} ms, {actions / seconds:.0f} actions)"


def _imagined(records: Records, name: str, model: str) -> list[dict[str, Any]]:
    """Return, a view of a model in an imagination record: `view`, `clips` in words, `more` (metrics beside
    PSNR and SSIM), and kind -> its means over all frames, PSNR and SSIM first."""
    rows = []
    for section in records.all.get(name, {}).get("horizons", ()):
        weights = np.array(section["num_clips"]) / sum(section["num_clips"])
        most = "at most " if min(section["num_clips"]) < len(section["clips"]) else ""
        clips = f"{len(section['clips'])} clips of {most}{section['horizon']} frames"
        for view, models in section["views"].items():
            kinds = {
                kind: [float(weights @ values) for values in scores.values()]
                for kind, scores in models.get(model, {}).items()
            }
            more = list(models[model]["imagined"])[2:] if kinds else []
            rows += [{"view": view, "clips": clips, "more": more, **kinds}] if kinds else []
    return rows


def _best(records: Records, rows: Sequence[str]) -> str:
    """Return the row with the highest share of successes, over all of its records."""

    def share(row: str) -> float:
        found = [records.all[name] for name in of_row(row) if name in records.all]
        return sum(r["successes"] for r in found) / max(1, sum(r["episodes"] - r["errors"] for r in found))

    return max(rows, key=share)


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
    """Write docs/RESULTS.md and the HTML page, whose links hold from where it lies; return the former."""
    records = Records(root)
    text = markdown(records)
    out = root / "docs/RESULTS.md"
    write_text(out, text)
    docs = os.path.relpath(out.parent, page.parent)
    body = MarkdownIt().enable("table").render(text.replace("](../", f"]({docs}/../"))
    for name, svg in _plots(records):
        image = f"<img class=plot alt='' src='{data_url(svg, 'image/svg+xml')}'>"
        body += f"<section><h2>{name}</h2><div class=card>{image}</div></section>"
    write_text(page, render("page.html", title="WorldVLA: results", body=body))
    return out


def _plots(records: Records) -> Iterator[tuple[str, bytes]]:
    lengths = {
        "selective mask": ("action", "chunk2", "chunk", "chunk10"),
        "plain causal": ("action", "chunk2_causal", "chunk_causal", "chunk10_causal"),
    }
    lines: list[tuple[Any, Any, dict[str, Any]]] = []
    for (words, rows), color in zip(lengths.items(), (COLORS[0], ORANGE), strict=True):
        points = []
        for length, row in zip((1, 2, 5, 10), rows, strict=True):
            found = [records.all[name] for name in of_row(row) if name in records.all]
            if trials := sum(r["episodes"] - r["errors"] for r in found):
                points.append((length, 100 * sum(r["successes"] for r in found) / trials))
        if points:
            x, y = zip(*points, strict=True)
            lines.append((x, y, {"color": color, "marker": "o", "label": words}))
    if lines:
        yield "Success against chunk length", line_plots([("success, %", "K", lines)], 1)
    of_errors = [records.all.get(f"tables/chunk_error{part}.json", {}) for part in ("", "_lengths")]
    if rows := [row for record in of_errors for row in record.get("chunks", ())]:
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
    path, text = root / "docs/RESULTS.md", markdown(records)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        faults.append("docs/RESULTS.md is not what the records say: run `worldvla tables`")
    counts = {(int(hits), int(trials)) for hits, trials in re.findall(r"\b(\d+)/(\d+) \(", text)}
    linked = set(re.findall(r"\]\(\.\./results/(.*?)(?:/record\.json)?\)", text))
    for name, record in records.all.items():
        is_rollout, is_training = "outcomes" in record, name.endswith("train.json")
        needed = ["hardware", "commit"] if is_rollout or is_training or name in linked else []
        needed += is_rollout * ["checkpoint", "seed", "seconds"] + is_training * ["config", "hours"]
        faults += [f"results/{name} does not say its {key}" for key in needed if record.get(key) is None]
        if is_rollout:
            trials = record["episodes"] - record["errors"]
            counts |= {(record["successes"], trials), (record["grasped"], trials)}
            row = name.rpartition("/")[0].replace("head_continuous", "head").replace("_execute1", "")
            if "tables/" in name and f"{row}/train.json" not in records.all:
                faults.append(f"results/{row} has no train.json (config, hours): run runs/tables.sh")
    for script in sorted(set(re.findall(r"runs/\w+\.sh", text))):
        if not (root / script).exists():
            faults.append(f"docs/RESULTS.md names {script}, which is gone")
    readme = (root / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Numbers", 1)[-1].split("\n## ", 1)[0]
    faults += _faults_of_cells(records, section)
    numbers = " ".join(section.split())  # lines break anywhere
    for hits, trials in re.findall(r"\b(\d+)(?:/| of )(\d+)\b", numbers):
        if (int(hits), int(trials)) not in counts:
            faults.append(f"README.md says {hits} of {trials}: no record holds that")
    for _, pattern, name, way in SPEED:
        said, value = re.search(pattern, numbers), _bench(records, name, way)
        if said is None:
            faults.append(
                f"README.md has no {pattern!r}, which is how results/bench/{name}.json is held to it"
            )
            continue
        half = 0.5 * 10.0 ** -len(said[1].partition(".")[2])
        if value is None or abs(float(said[1]) - value) > half:
            faults.append(f"README.md says {said[0]!r}, results/bench/{name}.json {value}")
    for link in re.findall(r"`((?:results|runs)/[^`]*)`", readme):
        if "SUITE" not in link and not (root / link).exists():
            faults.append(f"README.md names {link}, which does not exist")
    return faults


def _faults_of_cells(records: Records, section: str) -> Iterator[str]:
    """Yield the counts in the README's tables that are not those of their own record (tabletop) or of no
    record of their suite (LIBERO), and the intervals that are not Wilson's."""
    head: list[str] = []
    for line in section.splitlines():
        row = [cell.strip(" *") for cell in line.strip("|").split("|")]
        head = row if row[0] in ("suite", "LIBERO") else head
        for column, cell in zip(head[1:], row[1:], strict=False):
            if head[0] == "suite":
                suite, name = row[0], f"tabletop/{row[0]}{ENDS.get(column, column)}"
                found = [records.all.get(name, {})]
            else:
                suite = f"libero_{column.replace('long', '10')}"
                found = [record for record in records.all.values() if record.get("suite") == suite]
            known = {(r["successes"], r["episodes"] - r["errors"]) for r in found if "outcomes" in r}
            for hits, trials in re.findall(r"(\d+)/(\d+)", cell):
                if (int(hits), int(trials)) not in known:
                    yield f"README.md says {hits}/{trials} of {suite}, {column}: its record does not"
    for hits, trials, *said in re.findall(r"(\d+)/(\d+)\W*\((\d+) to (\d+) %\)", section):
        interval = [f"{100 * x:.0f}" for x in wilson(int(hits), int(trials))]
        if said != interval:
            yield f"README.md gives {hits}/{trials} {' to '.join(said)} %: it is {' to '.join(interval)} %"
