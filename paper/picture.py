"""Draw docs/layout.svg: what the two kinds of sequence hold, and who may attend to whom; or docs/speed.svg,
from records of `paper.bench`.

Run: python -m paper.picture [--out docs/layout.svg]
     python -m paper.picture --speed RECORD.json... --out docs/speed.svg
The mask is computed by worldvla.model.mask, not drawn.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from worldvla.model.mask import visible

INK, QUIET = "#22262b", "#767d87"
COLORS = {"text": "#c9ced6", "state": "#bfa8d9", "image": "#8fbbe8", "action": "#f2a65a", "sep": "#8b929c"}


@dataclass(frozen=True)
class Block:
    """A run of tokens of one kind; `size` is its number of tokens in the small picture of the mask."""

    kind: str
    label: str
    size: int
    width: float
    chunk: int = 0
    is_target: bool = False


def policy() -> list[Block]:
    actions = [
        Block("action", f"action t{f'+{k}' if k else ''}", 3, 1.5, chunk=k + 1, is_target=True)
        for k in range(4)
    ]
    return [
        Block("text", "instruction", 3, 1.8),
        Block("state", "state t", 2, 1.2),
        Block("image", "agentview t", 4, 2.6),
        Block("image", "wrist t", 3, 1.7),
        Block("sep", "", 1, 0.28),
        *actions,
        Block("sep", "", 1, 0.28, is_target=True),
    ]


def world() -> list[Block]:
    return [
        Block("text", "prompt", 2, 1.3),
        Block("image", "agentview t", 4, 2.6),
        Block("image", "wrist t", 3, 1.7),
        Block("action", "action t", 3, 1.5),
        Block("sep", "", 1, 0.28),
        Block("image", "agentview t+1", 4, 2.6, is_target=True),
        Block("image", "wrist t+1", 3, 1.7, is_target=True),
        Block("sep", "", 1, 0.28, is_target=True),
    ]


def draw_strip(axes: Axes, blocks: Sequence[Block], title: str, y: float) -> None:
    """Draw a sequence from left to right at height `y`; targets are framed and underlined."""
    axes.text(0, y + 0.82, title, fontsize=9.5, color=INK, va="bottom")
    x, target_start = 0.0, None
    for block in blocks:
        if block.is_target and target_start is None:
            target_start = x
        box = FancyBboxPatch(
            (x + 0.03, y),
            block.width - 0.06,
            0.62,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=COLORS[block.kind],
            edgecolor=INK if block.is_target else "none",
            linewidth=1.1,
        )
        axes.add_patch(box)
        axes.text(
            x + block.width / 2, y + 0.31, block.label, fontsize=7.6, ha="center", va="center", color=INK
        )
        x += block.width
    assert target_start is not None
    axes.plot([target_start + 0.03, x - 0.03], [y - 0.14, y - 0.14], color=INK, linewidth=1)
    axes.text((target_start + x) / 2, y - 0.22, "learnt", fontsize=7, ha="center", va="top", color=QUIET)


def mask_of(blocks: Sequence[Block]) -> np.ndarray:
    """Return the mask, bool (T, T), of a sequence with the blocks' small sizes."""
    chunk_T = np.repeat([b.chunk for b in blocks], [b.size for b in blocks])
    pos_T = np.arange(len(chunk_T))
    return visible(pos_T[:, None], pos_T[None, :], chunk_T[:, None], chunk_T[None, :])


def draw_mask(axes: Axes, blocks: Sequence[Block], title: str) -> None:
    """Draw the mask with a coloured cell wherever the token of a row sees the token of a column."""
    mask_TT = mask_of(blocks)
    length = len(mask_TT)
    kinds = list(COLORS)
    kind_T = np.repeat([kinds.index(b.kind) + 1 for b in blocks], [b.size for b in blocks])
    axes.imshow(
        mask_TT * kind_T,
        cmap=ListedColormap(["#f1f2f4", *COLORS.values()]),
        interpolation="none",
        vmin=0,
        vmax=len(kinds),
    )
    axes.set_xticks(np.arange(-0.5, length), labels=[])
    axes.set_yticks(np.arange(-0.5, length), labels=[])
    axes.grid(color="white", linewidth=0.6)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    start = -0.5
    for block in blocks:
        for corner, width, height in (((start, -2.0), block.size, 1.1), ((-2.0, start), 1.1, block.size)):
            patch = Rectangle(
                corner, width, height, facecolor=COLORS[block.kind], edgecolor="white", linewidth=0.8
            )
            patch.set_clip_on(False)
            axes.add_patch(patch)
        if block.label:
            middle = start + block.size / 2
            axes.text(-2.4, middle, block.label, fontsize=6.6, ha="right", va="center", color=INK)
        start += block.size
    axes.set_xlim(-0.5, length - 0.5)
    axes.set_ylim(length - 0.5, -0.5)
    axes.set_title(title, fontsize=8.5, color=INK, pad=19)


def draw() -> Figure:
    figure = plt.figure(figsize=(8.4, 7.2))
    strips = figure.add_axes((0.03, 0.61, 0.94, 0.38))
    draw_strip(strips, policy(), "policy: what to do", 2.0)
    draw_strip(strips, world(), "world model: what will be seen", 0.2)
    strips.set_xlim(-0.05, 13.92)
    strips.set_ylim(-0.45, 3.25)
    strips.axis("off")
    draw_mask(
        figure.add_axes((0.13, 0.05, 0.38, 0.456)),
        policy(),
        "policy: no action sees another action of its chunk",
    )
    draw_mask(figure.add_axes((0.655, 0.13, 0.31, 0.372)), world(), "world model: causal")
    figure.text(
        0.578, 0.055, "a row is a token that looks, a column a token that is seen", fontsize=7, color=QUIET
    )
    return figure


def draw_speed(records: Sequence[Path]) -> Figure:
    """One panel a size that a record of paper.bench holds (of several the last): milliseconds of a whole
    query, and of a frame, by each way of decoding.
    """
    benches = [json.loads(path.read_text()).get("bench", {}) for path in records]
    sizes = {size: value for b in benches for size, value in b.items() if "actions" in value}
    if not sizes:
        raise SystemExit(f"no record of paper.bench among {[str(path) for path in records]}: run it first")
    sizes = dict(sorted(sizes.items(), key=lambda item: item[1]["parameters"]))
    figure, row = plt.subplots(1, len(sizes), figsize=(3.4 * len(sizes) + 1, 2.1), squeeze=False)
    for axes, (size, value) in zip(row[0], sizes.items(), strict=True):
        bars = {way: v["query_ms"] for way, v in value["actions"].items() if "query_ms" in v}
        frame = value["frames"]
        bars |= {"frame by drafts": frame["ms_frame"], "frame, a code a pass": frame["ms_frame_plain"]}
        colors = [COLORS["image" if way.startswith("frame") else "action"] for way in bars]
        drawn = axes.barh(list(bars), list(bars.values()), color=colors)
        axes.bar_label(drawn, [f"{v:,.0f} ms" for v in bars.values()], padding=3, fontsize=7, color=INK)
        axes.set_title(f"{size}: {value['parameters'] / 1e6:.1f} M parameters", fontsize=8.5, color=INK)
        axes.set(xscale="log", xlim=(min(bars.values()) / 2, max(bars.values()) * 8))
        axes.invert_yaxis()
        axes.tick_params(labelsize=7, colors=INK, length=0)
        axes.set_xticks([], minor=False)
        axes.minorticks_off()
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.tight_layout()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs/layout.svg")
    parser.add_argument("--speed", type=Path, nargs="+", help="records of paper.bench: draw these")
    args = parser.parse_args()
    out: Path = args.out
    mpl.rcParams.update({"svg.hashsalt": "worldvla", "font.family": "DejaVu Sans"})
    metadata = {"Date": None} if out.suffix == ".svg" else None
    (draw_speed(args.speed) if args.speed else draw()).savefig(
        out, metadata=metadata, dpi=130, facecolor="white"
    )
    print(f"picture: {out}")


if __name__ == "__main__":
    main()
