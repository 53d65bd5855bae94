"""Result directories -> one HTML page that needs nothing else: numbers with intervals, videos, imagination,
tokens.

Everything (style, videos, pictures, plots) is inside the file, so it can be mailed or kept beside its record.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldvla.eval.page import LEGEND, STYLE, data_url, png, world_plot
from worldvla.eval.tokens import read_example

MAX_VIDEOS = 12
"""Rollout videos of one suite on a page; failures and successes in their share, tasks in turn."""
ACTION_DIMS = ("x", "y", "z", "turn x", "turn y", "turn z", "grip")


def write_page(
    path: Path,
    title: str,
    *,
    evaluations: Sequence[Path] = (),
    worlds: Sequence[Path] = (),
    baselines: Sequence[Mapping[str, Any]] = (),
    lead: str = "",
    max_videos: int = MAX_VIDEOS,
) -> Path:
    """Write the page of the result directories of `eval` and `eval-world` atomically.

    `baselines`: records of other actors on the same suites, drawn as ticks. `lead`: one sentence under the
    title.
    """
    records = [_read(Path(directory)) for directory in evaluations]
    imagined = [_read(Path(directory)) for directory in worlds]
    sections = []
    if records:
        sections.append(_successes(records, baselines))
    for directory, record in zip(evaluations, records, strict=True):
        sections.append(_rollouts(Path(directory), record, max_videos))
    for directory, record in zip(worlds, imagined, strict=True):
        sections.append(_imagination(Path(directory), record))
    examples = (read_example(Path(directory)) for directory in [*evaluations, *worlds])
    if (example := next((e for e in examples if e is not None), None)) is not None:
        sections.append(_tokens(example))
    sections.append(_about([*records, *imagined]))
    lead = lead or _lead([*records, *imagined])
    body = f"<header><h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p></header>" + "".join(sections)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(page, encoding="utf-8")
    scratch.replace(path)
    return path


def _read(directory: Path) -> dict[str, Any]:
    path = directory / "record.json"
    if not path.exists():
        raise FileNotFoundError(
            f"no {path}: expected a result directory of `worldvla eval` or `worldvla eval-world`"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _lead(records: Sequence[Mapping[str, Any]]) -> str:
    who = {}
    if records:
        who = records[0].get("checkpoint") or next(iter(records[0]["models"].values()))
    parts = [str(who.get("name", ""))]
    if "parameters" in who:
        parts.append(f"{who['parameters'] / 1e6:.1f} million parameters")
    if who.get("step") is not None:
        parts.append(f"after {who['step']:,} training steps")
    return ", ".join(p for p in parts if p)


def _section(title: str, text: str, content: str) -> str:
    note = f"<p class=note>{text}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{note}{content}</section>"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"


def _successes(records: Sequence[Mapping[str, Any]], baselines: Sequence[Mapping[str, Any]]) -> str:
    cards = "".join(
        _suite_card(record, [b for b in baselines if b["suite"] == record["suite"]]) for record in records
    )
    tables = "".join(_task_table(record, is_open=len(records) == 1) for record in records)
    note = (
        "Share of episodes that succeed, from fixed initial states never used in training. "
        "The band is the 95&nbsp;% Wilson interval; episodes that a simulator error ended are counted apart."
    )
    return _section("Success", note, f"<div class=cards>{cards}</div>{tables}")


def _bar(counts: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]] = ()) -> str:
    low, high = counts["wilson_95"]
    ticks = "".join(
        f'<i class=base style="left:{100 * _rate(b):.1f}%" '
        f'title="{html.escape(_name(b))} {_percent(_rate(b))} %"></i>'
        for b in baselines
    )
    return (
        f"<div class=bar><i class=fill style='width:{100 * _rate(counts):.1f}%'></i>"
        f"<i class=band style='left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%'></i>{ticks}</div>"
    )


def _rate(counts: Mapping[str, Any]) -> float:
    return counts["successes"] / max(1, counts["episodes"] - counts["errors"])


def _name(record: Mapping[str, Any]) -> str:
    return str(record["checkpoint"].get("name", "?"))


def _suite_card(record: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]]) -> str:
    low, high = record["wilson_95"]
    trials = record["episodes"] - record["errors"]
    facts = [f"held the target in {record['grasped']}"]
    facts += [f"{html.escape(_name(b))} {_percent(_rate(b))}&nbsp;%" for b in baselines]
    errors = f"<span class='badge error'>{record['errors']} errors</span>" if record["errors"] else ""
    return (
        f"<div class=card><div class=label>{html.escape(record['suite'])}{errors}</div>"
        f"<div class=big>{_percent(_rate(record))}<small>%</small></div>"
        f"<div class=quiet>{record['successes']} of {trials} &middot; "
        f"95&nbsp;%: {_percent(low)}&ndash;{_percent(high)}&nbsp;%</div>"
        f"{_bar(record, baselines)}<div class=quiet>{' &middot; '.join(facts)}</div></div>"
    )


def _task_table(record: Mapping[str, Any], is_open: bool) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(t['instruction'])}</td><td class=wide>{_bar(t)}</td>"
        f"<td class=num>{t['successes']}/{t['episodes'] - t['errors']}</td><td class=num>{t['grasped']}</td>"
        f"<td class=num>{t['errors'] or ''}</td></tr>"
        for t in record["tasks"]
    )
    names = "".join(f"<th class=num>{name}</th>" for name in ("success", "held", "errors"))
    head = f"<tr><th>task</th><th></th>{names}</tr>"
    opened = " open" if is_open else ""
    return (
        f"<details{opened}><summary>{html.escape(record['suite'])}, task by task</summary>"
        f"<div class=card><table>{head}{rows}</table></div></details>"
    )


def _rollouts(directory: Path, record: Mapping[str, Any], max_videos: int) -> str:
    instructions = {t["index"]: t["instruction"] for t in record["tasks"]}
    filmed = [o for o in record["outcomes"] if o.get("video") and (directory / o["video"]).exists()]
    filmed.sort(key=lambda o: (o["init"], o["task"]))
    cards = "".join(
        f"<figure class=card>{_video(directory / o['video'])}<figcaption>{_badge(o)}"
        f"{html.escape(instructions[o['task']])}</figcaption></figure>"
        for o in filmed[:max_videos]
    )
    if not cards:
        return ""
    views = " and ".join(record["protocol"]["views"]) or "agentview"
    note = f"Not picked by outcome: the first initial states of each task. Cameras: {html.escape(views)}."
    return _section(f"Rollouts: {record['suite']}", note, f"<div class='cards videos'>{cards}</div>")


def _badge(outcome: Mapping[str, Any]) -> str:
    title = html.escape(outcome.get("reason", "") or f"{outcome['steps']} steps", quote=True)
    return f"<span class='badge {outcome['status']}' title=\"{title}\">{outcome['status']}</span>"


def _video(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<video autoplay loop muted playsinline src="data:video/mp4;base64,{data}"></video>'


def _imagination(directory: Path, record: Mapping[str, Any]) -> str:
    names = [html.escape(name) for name in record["models"]]
    shown = names if len(names) > 1 else ["imagined"]
    heads = ["real", *shown, *(f"difference {name}" if len(names) > 1 else "difference" for name in shown)]
    heads_row = f"<div class=pair>{''.join(f'<span>{head}</span>' for head in heads)}</div>"
    note = (
        "From a real frame alone, each model imagines what the episode's actions do, feeding its own tokens "
        "back. Ceiling: real frames through the image tokenizer and back. Floor: the first frame, copied. "
        "Where a model listens, the actions of another clip, or none, make its picture worse."
    )
    parts = []
    for section in record["horizons"]:
        cards = "".join(
            f"<figure class=card>{heads_row}{_video(directory / c['video'])}<figcaption>"
            f"{html.escape(c['instruction'])} <span class=quiet>{c['steps']} steps</span>"
            "</figcaption></figure>"
            for c in section["clips"]
            if c.get("video") and (directory / c["video"]).exists()
        )
        source = data_url(world_plot(section), "image/svg+xml")
        plot = f'<div class=card><img class=plot alt="scores a step" src="{source}"></div>'
        about = f"<div class=label>{len(section['clips'])} clips, {section['steps'][-1]} steps</div>"
        parts.append(f"<div class='cards pairs'>{cards}</div>{about}{plot}{_distances(section)}")
    remarks = "".join(f"<p class=note><b>{html.escape(line)}.</b></p>" for line in record["remarks"])
    return _section("Imagination", note, remarks + "".join(parts))


def _distances(section: Mapping[str, Any]) -> str:
    """Return the tables of distances between sets of clips and of the inverse-dynamics probe."""
    rows = ""
    for view, models in section["distances"].items():
        for model, kinds in models.items():
            for kind, values in kinds.items():
                for name, v in values.items():
                    low, high = v["interval_95"]
                    fewer = ", ".join(f"{n}: {x:.4g}" for n, x in v["at_clips"].items())
                    cells = (f"{v['value']:.4g}", f"{low:.4g} to {high:.4g}", fewer)
                    rows += f"<tr><td>{html.escape(f'{name}, {view}, {model}, {LEGEND[kind]}')}</td>"
                    rows += "".join(f"<td class=num>{cell}</td>" for cell in cells) + "</tr>"
    head = "".join(f"<th class=num>{h}</th>" for h in ("value", "95 %, bootstrap", "by number of clips"))
    text = f"<div class=card><table><tr><th>distance to the real clips</th>{head}</tr>{rows}</table></div>"
    text, rows = text if rows else "", ""
    for model, kinds in section["probe"].items():
        for kind, v in kinds.items():
            cells = [f"{v['error']:.3f}", "" if v["r2"] is None else f"{v['r2']:.2f}", f"{v['size']:.3f}"]
            rows += f"<tr><td>{html.escape(model)}, {LEGEND.get(kind, 'real frames')}</td>"
            rows += "".join(f"<td class=num>{cell}</td>" for cell in cells) + "</tr>"
    head = "".join(f"<th class=num>{h}</th>" for h in ("error", "R2", "motion read"))
    table = f"<table><tr><th>motion a probe reads off the frames, units of an action</th>{head}</tr>{rows}"
    return text + (f"<div class=card>{table}</table></div>" if rows else "")


def _tokens(example: Mapping[str, np.ndarray]) -> str:
    rows = "".join(_token_row(example, str(view)) for view in example["views"])
    note = (
        "A camera picture becomes a small grid of codes; alike colours are alike codes. "
        "The right picture is all that the codes keep. "
        f"Instruction: <b>{html.escape(str(example['instruction']))}</b>."
    )
    total = int(example["sizes"].sum())
    strip = "".join(
        f"<span class='seg {_segment_kind(str(name))}' style='flex-grow:{int(size)}' "
        f"title='{html.escape(str(name))}: {int(size)} tokens'>"
        f"<b>{html.escape(str(name)) if size > 1 else ''}</b>{int(size) if size > 1 else ''}</span>"
        for name, size in zip(example["segments"], example["sizes"], strict=True)
    )
    label = f"<div class=label>The whole sequence: {total} tokens</div>"
    sequence = f"<div class=card>{label}<div class=strip>{strip}</div>"
    return _section("What the tokens look like", note, f"{rows}{sequence}{_actions(example)}</div>")


def _token_row(example: Mapping[str, np.ndarray], view: str) -> str:
    codes, colors = example[f"{view}_codes"], example[f"{view}_colors"]
    cells = "".join(
        f"<i style='background:rgb({r},{g},{b})'>{code if codes.shape[1] <= 10 else ''}</i>"
        for code, (r, g, b) in zip(codes.reshape(-1), colors.reshape(-1, 3), strict=True)
    )
    grid = f"<div class=codes style='grid-template-columns:repeat({codes.shape[1]},1fr)'>{cells}</div>"
    frame, again = (
        f'<img class=pixels alt="" src="{data_url(png(example[f"{view}_{k}"]), "image/png")}">'
        for k in ("frame", "reconstruction")
    )
    size = "&times;".join(map(str, example[f"{view}_frame"].shape[:2]))
    parts = (
        (frame, f"{view}, {size} pixels"),
        (grid, f"{codes.size} codes"),
        (again, "decoded from the codes"),
    )
    figures = "<b class=arrow>&rarr;</b>".join(
        f"<figure>{p}<figcaption class=quiet>{text}</figcaption></figure>" for p, text in parts
    )
    return f"<div class='card tokens'>{figures}</div>"


def _segment_kind(name: str) -> str:
    return name if name in ("text", "state", "sep") else "action" if name.startswith("action ") else "image"


def _actions(example: Mapping[str, np.ndarray]) -> str:
    low, high = example["action_low"], example["action_high"]
    largest = np.maximum(np.abs(low), np.abs(high))
    rows = ""
    for k, action in enumerate(example["actions"]):
        cells = ""
        for value, scale in zip(action, largest, strict=True):
            share = min(1.0, abs(float(value)) / float(scale))
            hue = "242,150,60" if value > 0 else "70,130,210"
            cells += f"<td class=num style='background:rgba({hue},{0.75 * share:.2f})'>{value:+.2f}</td>"
        rows += f"<tr><th>action {k + 1}</th>{cells}</tr>"
    names = ACTION_DIMS if len(low) == len(ACTION_DIMS) else tuple(str(i) for i in range(len(low)))
    head = "<tr><th></th>" + "".join(f"<th class=num>{name}</th>" for name in names) + "</tr>"
    return f"<div class=label>What it answers here</div><table class=actions>{head}{rows}</table>"


def _about(records: Sequence[Mapping[str, Any]]) -> str:
    rows = ""
    for record in records:
        facts = {
            key: record.get(key)
            for key in (
                "checkpoint",
                "models",
                "seed",
                "protocol",
                "versions",
                "hardware",
                "seconds",
                "commit",
            )
        }
        lines = "".join(
            f"<tr><th>{key}</th><td>{html.escape(_plain(value))}</td></tr>"
            for key, value in facts.items()
            if value is not None
        )
        label = f"<div class=label>{html.escape(record.get('suite', 'imagination'))}</div>"
        rows += f"<div class=card>{label}<table>{lines}</table></div>"
    return f"<section><details><summary>How these numbers were made</summary>{rows}</details></section>"


def _plain(value: Any) -> str:
    return (
        ", ".join(f"{k} {_plain(v)}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
    )
