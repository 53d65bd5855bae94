"""Result directories -> one HTML page that needs nothing else: numbers with intervals, videos, imagination,
tokens.

Everything (style, videos, pictures, plots) is inside the file, so it can be mailed or kept beside its record.
The words and the markup are in worldvla/assets/report.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from worldvla.eval.page import LEGEND, render, world_plot
from worldvla.eval.tokens import read_example
from worldvla.files import read_json, write_text
from worldvla.infer.draft import in_words

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
) -> Path:
    """Write the page of the result directories of `eval` and `eval-world` atomically.

    `baselines`: records of other actors on the same suites, drawn as ticks.
    """
    rolled, imagined = ([_read(Path(directory)) for directory in group] for group in (evaluations, worlds))
    examples = (read_example(Path(directory)) for directory in [*evaluations, *worlds])
    example = next((e for e in examples if e is not None), None)
    num_dims = 0 if example is None else len(example["action_low"])
    text = render(
        "report.html",
        title=title,
        lead=_lead([*rolled, *imagined]),
        evaluations=[(r, list(_filmed(Path(d), r))) for d, r in zip(evaluations, rolled, strict=True)],
        worlds=[(record, Path(directory)) for directory, record in zip(worlds, imagined, strict=True)],
        records=[*rolled, *imagined],
        baselines=baselines,
        example=example,
        action_dims=ACTION_DIMS if num_dims == len(ACTION_DIMS) else range(num_dims),
        rate=lambda counts: counts["successes"] / max(1, counts["episodes"] - counts["errors"]),
        plot=world_plot,
        distances=_distances,
        in_words=in_words,
        motions=_motions,
        plain=_plain,
        zip=zip,
    )
    write_text(Path(path), text)
    return Path(path)


def _read(directory: Path) -> dict[str, Any]:
    path = directory / "record.json"
    if not path.exists():
        raise FileNotFoundError(f"no {path}: expected a result of `worldvla eval` or `worldvla eval-world`")
    return read_json(path)


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


def _filmed(directory: Path, record: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Path, str]]:
    """Yield the filmed outcomes that a page shows, with their video and instruction."""
    instructions = {t["index"]: t["instruction"] for t in record["tasks"]}
    filmed = [o for o in record["outcomes"] if o.get("video") and (directory / o["video"]).exists()]
    for outcome in sorted(filmed, key=lambda o: (o["init"], o["task"]))[:MAX_VIDEOS]:
        yield outcome, directory / outcome["video"], instructions[outcome["task"]]


def _distances(section: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for view, models in section["distances"].items():
        for model, kinds in models.items():
            for kind, values in kinds.items():
                for name, v in values.items():
                    low, high = v["interval_95"]
                    fewer = ", ".join(f"{n}: {x:.4g}" for n, x in v["at_clips"].items())
                    what = f"{name}, {view}, {model}, {LEGEND[kind]}"
                    yield what, f"{v['value']:.4g}", f"{low:.4g} to {high:.4g}", fewer


def _motions(section: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for model, kinds in section["probe"].items():
        for kind, v in kinds.items():
            r2 = "" if v["r2"] is None else f"{v['r2']:.2f}"
            yield f"{model}, {LEGEND.get(kind, 'real frames')}", f"{v['error']:.3f}", r2, f"{v['size']:.3f}"


def _plain(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
