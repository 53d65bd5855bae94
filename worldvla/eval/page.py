"""What the HTML pages are made of: templates (worldvla/assets/report), plots, and bytes as URLs."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

INK, QUIET, LINE, BLUE, ORANGE = "#1f2328", "#6b7280", "#e5e7eb", "#2f6fde", "#e8833a"

TEMPLATES = Path(__file__).parents[1] / "assets/report"


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
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png", optimize=True)
    return data_url(buffer.getvalue(), "image/png")


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
        where: dict[str, Any] = {"loc": "outside upper right", "ncols": 3, "frameon": False}
        figure.legend(list(legend.values()), list(legend), **where, labelcolor=QUIET, fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()
