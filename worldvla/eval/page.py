"""The look of the HTML report: style sheet, plots, and bytes as URLs."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

INK, QUIET, LINE, BLUE, ORANGE = "#1f2328", "#6b7280", "#e5e7eb", "#2f6fde", "#e8833a"

STYLE = """
:root{--ink:#1f2328;--quiet:#6b7280;--line:#e5e7eb;--blue:#2f6fde;--green:#1f9d55;--red:#d64545;
  --amber:#b7791f}
*{box-sizing:border-box}
body{margin:0;background:#f6f7f9;color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1100px;margin:0 auto;padding:40px 24px 64px}
header h1{font-size:34px;line-height:1.15;letter-spacing:-.02em;margin:0 0 6px}
header p{margin:0;color:var(--quiet);font-size:17px}
section{margin-top:44px}
h2{font-size:21px;letter-spacing:-.01em;margin:0 0 4px}
.note{color:var(--quiet);margin:0 0 16px;max-width:76ch}
.quiet{color:var(--quiet);font-size:13px}
.label{font-weight:600;font-size:14px;display:flex;justify-content:space-between;gap:8px}
.card{background:#fff;border:1px solid var(--line);border-radius:12px;padding:16px;margin:0;
  box-shadow:0 1px 2px rgba(20,30,50,.04)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(230px,1fr));gap:16px}
.cards.videos{grid-template-columns:repeat(auto-fill,minmax(300px,1fr))}
.cards.pairs{grid-template-columns:repeat(auto-fill,minmax(500px,1fr));margin-bottom:16px}
.big{font-size:46px;font-weight:650;letter-spacing:-.03em;line-height:1.15;margin-top:4px}
.big small{font-size:22px;font-weight:500;color:var(--quiet);margin-left:3px}
.bar{position:relative;height:10px;border-radius:5px;background:#eef0f3;margin:10px 0}
.bar i{position:absolute;top:0;bottom:0;display:block}
.bar .fill{left:0;border-radius:5px;background:var(--blue);opacity:.9}
.bar .band{top:4px;bottom:4px;background:var(--ink);opacity:.65;border-radius:1px}
.bar .base{top:-3px;bottom:-3px;width:2px;margin-left:-1px;background:#e8833a}
details{margin-top:14px}
summary{cursor:pointer;font-weight:600;font-size:14px;padding:6px 0}
details .card{margin-top:8px;overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
td,th{padding:6px 8px;text-align:left;border-bottom:1px solid var(--line);vertical-align:middle;
  font-weight:400}
th{color:var(--quiet);font-size:13px}
tr:last-child>*{border-bottom:0}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.wide{width:34%}
video,.pixels{display:block;width:100%;border-radius:8px;image-rendering:pixelated;background:#fff}
figure{min-width:0}
.videos figure.card,.pairs figure.card{padding:10px}
figcaption{font-size:14px;margin-top:8px;padding:0 4px}
.badge{display:inline-block;font-size:12px;font-weight:600;padding:1px 9px;border-radius:99px;
  margin-right:8px;color:#fff;background:var(--quiet)}
.badge.success{background:var(--green)}.badge.fail{background:var(--red)}.badge.error{background:var(--amber)}
.pair{display:grid;grid-auto-flow:column;grid-auto-columns:1fr;font-size:13px;font-weight:600;
  padding:0 4px 6px}
.plot{width:100%;display:block}
.tokens{display:grid;grid-template-columns:1fr auto 1fr auto 1fr;gap:14px;align-items:center;
  margin-bottom:16px}
.tokens figure{margin:0}
.tokens figcaption{text-align:center}
.arrow{color:var(--quiet);font-size:22px;font-weight:400}
.codes{display:grid;aspect-ratio:1;border-radius:8px;overflow:hidden;gap:1px;background:#fff}
.codes i{display:flex;align-items:center;justify-content:center;
  font:500 clamp(7px,.85vw,11px)/1 ui-monospace,monospace;color:rgba(0,0,0,.62)}
.strip{display:flex;gap:2px;margin:10px 0 18px;height:46px}
.seg{flex:1 1 0;min-width:4px;overflow:hidden;border-radius:5px;font-size:12px;padding:5px 6px;
  line-height:1.25;white-space:nowrap}
.seg b{display:block;font-weight:600}

  .seg.text{background:#d9dde3}.seg.state{background:#d7c8ea}.seg.image{background:#b9d5f4}.seg.action{background:#f8cfa6}
.seg.sep{background:#8b929c;padding:0;flex:0 0 5px}
.actions td{border:2px solid #fff;border-radius:4px}

  @media(max-width:640px){.tokens{grid-template-columns:1fr}.arrow{display:none}.cards.pairs{grid-template-columns:1fr}}
"""


def data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(image: np.ndarray) -> bytes:
    """Return uint8 (Y, X, 3) as a PNG of the same size; the page enlarges it without smoothing."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


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
    """Return an SVG of panels (title, name of x, lines (x, y, matplotlib's options)), `cols` a row, one
    legend for all.
    """
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
