"""Result directories -> one HTML page that needs nothing else: numbers with intervals, videos, imagination.

Everything (style, videos, pictures, plots) is inside the file, so it can be mailed or kept beside its record.
The words and the markup are in worldvla/assets/report.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from worldvla.data.episode import Episode, read_episodes
from worldvla.eval.tokens import read_example
from worldvla.files import read_json, write_text
from worldvla.sim.protocol import FPS
from worldvla.sim.suites import suite
from worldvla.video import encode_mp4, film_strip, views_side_by_side

TEMPLATES = Path(__file__).parents[1] / "assets/report"
INK, QUIET, LINE, BLUE, ORANGE = "#1f2328", "#6b7280", "#e5e7eb", "#2f6fde", "#e8833a"
MAX_VIDEOS = 12
"""Rollout videos of one suite on a page: the first initial states, tasks in turn."""
STRIP, STRIP_ROWS = 8, 128
"""Frames of a film strip, and their pixel rows at most."""
Strip = tuple[str, str, str]
"""Name of an episode, caption, URL of its picture."""
ACTION_DIMS = ("x", "y", "z", "turn x", "turn y", "turn z", "grip")
WORLDS = {
    "tabletop": "The world here is a small tabletop simulated by MuJoCo: a gripper above coloured objects.",
    "libero": "The world here is LIBERO: a simulated Franka arm in a household scene.",
}
"""Simulator -> what it is, in a sentence."""
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("imagined", {"color": BLUE, "linewidth": 2.4}),
    "copy": ("first frame, copied", {"color": ORANGE, "linestyle": (0, (1, 2)), "linewidth": 1.8}),
    "ceiling": ("ceiling: tokenizer", {"color": QUIET, "linestyle": (0, (4, 3)), "linewidth": 1.4}),
}
"""Of frames in a record of `eval-world` -> name and style of their line."""


def write_page(
    path: Path,
    title: str,
    *,
    evaluations: Sequence[Path] = (),
    worlds: Sequence[Path] = (),
    baselines: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the page of the result directories of `eval` and `eval-world` atomically; return its path.

    `baselines`: records of other actors on the same suites, drawn as ticks.
    """
    rolled, imagined = ([_read(directory) for directory in group] for group in (evaluations, worlds))
    examples = (read_example(directory) for directory in [*evaluations, *worlds])
    example = next((e for e in examples if e is not None), None)
    num_dims = 0 if example is None else len(example["action_low"])
    text = render(
        "report.html",
        title=title,
        lead=_lead([*rolled, *imagined]),
        world=next((WORLDS[suite(r["suite"]).simulator] for r in rolled), ""),
        has_videos=any(o.get("video") for r in rolled for o in r["outcomes"]) or bool(worlds),
        evaluations=[
            (r, list(_filmed(directory, r))) for directory, r in zip(evaluations, rolled, strict=True)
        ],
        worlds=list(zip(imagined, worlds, strict=True)),
        records=[*rolled, *imagined],
        baselines=baselines,
        example=example,
        action_dims=ACTION_DIMS if num_dims == len(ACTION_DIMS) else range(num_dims),
        rate=lambda counts: counts["successes"] / max(1, counts["episodes"] - counts["errors"]),
        plot=world_plot,
        table=world_table,
        kinds=KINDS,
        facts=_facts,
        zip=zip,
    )
    write_text(path, text)
    return path


def write_inspection(path: Path, title: str, lines: Sequence[str], strips: Sequence[Strip]) -> Path:
    """Write the page of a data set: what `worldvla inspect` prints, and a film strip of each episode."""
    write_text(path, render("inspect.html", title=title, lines=lines, strips=strips))
    return path


def write_ranking(directory: Path) -> Path:
    """Write the page of what `worldvla rank` left in `directory`; return its path."""
    record = _read(directory)
    rates = [[100 * sum(o) / len(o) for o in policy["outcomes"]] for policy in record["policies"]]
    real, there, imagined = zip(*rates, strict=True)
    points: dict[str, Any] = {"linestyle": "", "marker": "o", "alpha": 0.8}
    lines = [
        ((0, 100), (0, 100), {"label": "equal", "color": LINE, "linewidth": 1.5}),
        (real, there, {"label": "judge on the simulator's frames", "color": QUIET, **points}),
        (real, imagined, {"label": "imagined", "color": BLUE, **points}),
    ]
    groups = record["by_execute"].items() if len(record["by_execute"]) > 1 else ()
    agreements = [("the judge, on the simulator's frames", record["judge_on_real_frames"])]
    agreements += [("the judge, on imagined frames", record["imagined"])]
    agreements += [(f"the same, replan interval {n}", group["imagined"]) for n, group in groups]
    path, title = directory / "index.html", f"Policies ranked by {record['world']['name']}"
    plot = line_plots([("Success seen, %", "success in the simulator, %", lines)], 1)
    policies = sorted(record["policies"], key=lambda policy: -sum(policy["outcomes"][0]))
    values = {"record": record, "plot": plot, "agreements": agreements, "directory": directory}
    values["policies"] = policies
    write_text(path, render("ranking.html", title=title, **values))
    return path


def write_improvement(directory: Path) -> Path:
    """Write the page of what `worldvla improve` left in `directory`; return its path."""
    record, films = _read(directory), []
    files = sorted((directory / f"round_{len(record['rounds']) - 1}/demos").rglob("*.hdf5"))
    for episode in islice((e for file in files for e in islice(read_episodes(file), 1)), MAX_VIDEOS):
        frames = [
            dict(zip(episode.images, views, strict=True))
            for views in zip(*episode.images.values(), strict=True)
        ]
        film = encode_mp4(views_side_by_side(frames), FPS[suite(episode.suite).simulator])
        films.append((film, "success" if episode.success else "fail", episode.instruction))
    path, title = directory / "index.html", f"What {record['policy']['name']} learnt"
    write_text(path, render("improvement.html", title=title, record=record, films=films))
    return path


def strip(name: str, episode: Episode) -> Strip:
    """Return name, caption and film strip of an episode: some frames from first to last, a row a view."""
    chosen = np.linspace(0, len(episode) - 1, min(STRIP, len(episode))).round().astype(int)
    film = {view: np.stack([_small(image) for image in a[chosen]]) for view, a in episode.images.items()}
    frames = ", ".join(map(str, chosen))
    picture = film_strip([film], every=1)
    return name, f"{episode.instruction} ({len(episode)} steps; frames {frames})", _picture(picture, "jpeg")


def _small(image: np.ndarray) -> np.ndarray:
    """Return an image of at most STRIP_ROWS rows."""
    from PIL import Image

    rows, cols = image.shape[:2]
    if rows <= STRIP_ROWS:
        return image
    size = (max(1, round(cols * STRIP_ROWS / rows)), STRIP_ROWS)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def render(template: str, **values: Any) -> str:
    """Return a template of TEMPLATES, filled in; in HTML texts are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"url": data_url, "png": png}
    return environment.get_template(template).render(**values)


def data_url(data: bytes | Path, kind: str) -> str:
    """Return bytes, or those of a file, as a URL that holds them."""
    content = data.read_bytes() if isinstance(data, Path) else data
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(image: np.ndarray) -> str:
    """Return uint8 (Y, X, 3) as the URL of a PNG of the same size; the page enlarges it without smoothing."""
    return _picture(image, "png")


def _picture(image: np.ndarray, form: str) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=form, optimize=True)
    return data_url(buffer.getvalue(), f"image/{form}")


def _read(directory: Path) -> dict[str, Any]:
    path = directory / "record.json"
    if not path.exists():
        raise FileNotFoundError(f"no {path}: expected a result of `worldvla eval` or `worldvla eval-world`")
    return read_json(path)


def _lead(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the model's name, size and training in words."""
    actor = records[0]["checkpoint"] if records else {}
    parts = [str(actor.get("name", ""))]
    if "parameters" in actor:
        parts.append(f"{actor['parameters'] / 1e6:.1f} million parameters")
    if actor.get("step") is not None:
        parts.append(f"step {actor['step']:,} of its last training run")
    return ", ".join(p for p in parts if p)


def _filmed(directory: Path, record: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Path, str]]:
    """Yield the filmed outcomes that a page shows, with their video and instruction."""
    instructions = {t["index"]: t["instruction"] for t in record["tasks"]}
    filmed = [o for o in record["outcomes"] if o.get("video") and (directory / o["video"]).exists()]
    for outcome in sorted(filmed, key=lambda o: (o["init"], o["task"]))[:MAX_VIDEOS]:
        yield outcome, directory / outcome["video"], instructions[outcome["task"]]


def _facts(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what a reader needs to repeat a record: the whole of it is in its record.json."""
    protocol, hardware = record["protocol"], record.get("hardware", {})
    if "initial_states" in protocol:
        yield "initial states", protocol["initial_states"]
        yield "replan interval", f"{protocol['executed']} actions"
    for name in ("horizon", "head", "decoding", "start"):
        if name in protocol:
            yield name, str(protocol[name])
    yield "seed", str(record["seed"])
    yield "versions", ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items())
    yield "machine", ", ".join([str(hardware.get("cpu", "")), *hardware.get("gpus", [])])
    if "seconds" in record:
        yield "time", f"{record['seconds'] / 60:.1f} minutes"
    yield "commit", str(record.get("commit") or "")


def world_plot(section: Mapping[str, Any]) -> bytes:
    """Return an SVG of one horizon of an imagination record: PSNR of each view and, where a reader looked,
    the error of the hand."""
    scores = {f"{view}: PSNR, dB": (kinds, "psnr") for view, kinds in section["views"].items()}
    if "hand" in section:
        scores["hand: median error, cm"] = (section["hand"], "median_cm")
    panels = [
        (title, "imagined steps", [_line(section["steps"], kinds[kind][metric], kind) for kind in kinds])
        for title, (kinds, metric) in scores.items()
    ]
    return line_plots(panels, len(panels))


def _line(steps: Sequence[int], values: Sequence[float | None], kind: str) -> tuple[Any, Any, dict[str, Any]]:
    heights = [np.nan if value is None else value for value in values]
    return steps, heights, {**KINDS[kind][1], "label": KINDS[kind][0]}


def world_table(section: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """Return name -> kind -> number of the last step, as text, of all clips and of those with contact."""
    rows = []
    for title, part in (("", section), ("with contact: ", section.get("contact"))):
        if part is None:
            continue
        for view, kinds in part["views"].items():
            for metric, name in (("psnr", "PSNR, dB"), ("psnr_changed", "PSNR of what changed, dB")):
                cells = {kind: _number(scores[metric]) for kind, scores in kinds.items() if metric in scores}
                rows.append((f"{title}{view}: {name}", cells))
        for metric, name in (("median_cm", "median"), ("p90_cm", "90th percentile")):
            cells = {kind: _number(errors[metric]) for kind, errors in part.get("hand", {}).items()}
            rows.append((f"{title}error of the hand, cm, {name}", cells))
        for key, name in (("held", "held things seen held"), ("held_wrongly", "empty hands seen holding")):
            held = part.get(key, {})
            cells = {kind: _number([v and 100 * v for v in held[kind]], 0) for kind in KINDS if kind in held}
            rows.append((f"{title}{name}, % of {held.get('num_clips', [0])[-1]} clips", cells))
    return [(name, cells) for name, cells in rows if cells]


def _number(values: Sequence[float | None], digits: int = 1) -> str:
    return "-" if values[-1] is None else f"{values[-1]:.{digits}f}"


def line_plots(
    panels: Sequence[tuple[str, str, Sequence[tuple[Any, Any, dict[str, Any]]]]], cols: int
) -> bytes:
    """Return an SVG of panels (title, name of x, lines (x, y, options)), `cols` a row, one legend for all."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    rows = -(-len(panels) // cols)
    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "worldvla", "font.family": "sans-serif", "font.size": 10}
    ):
        engine = ConstrainedLayoutEngine(hspace=0.08, wspace=0.05)
        figure = Figure(figsize=(10.4, 2.7 * rows + 0.3), layout=engine)
        axes = figure.subplots(rows, cols, squeeze=False).ravel()
        legend: dict[str, Any] = {}
        for ax, (title, x_name, lines) in zip(axes, panels, strict=False):
            for x, y, style in lines:
                (line,) = ax.plot(x, y, **style)
                legend.setdefault(style["label"], line)
            ax.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
            ax.set_xlabel(x_name, color=QUIET)
            ax.spines[["top", "right"]].set_visible(False)
            ax.spines[["left", "bottom"]].set_color(LINE)
            ax.tick_params(colors=QUIET, length=0)
            ax.grid(axis="y", color=LINE, linewidth=0.8)
            ax.set_axisbelow(True)
            ax.margins(x=0.01)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        place: dict[str, Any] = {"loc": "outside upper right", "ncols": 3, "frameon": False}
        figure.legend(list(legend.values()), list(legend), **place, labelcolor=QUIET, fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()
