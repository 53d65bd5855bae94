"""Draw docs/speed.svg from records of `paper.bench`: milliseconds by each way of decoding.

Run: python -m paper.picture --speed bench/decoding bench/decoding_bfloat16 --out docs/speed.svg
"""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import tyro
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper.records import Records

INK, QUIET = "#22262b", "#767d87"
COLORS = {"text": "#c9ced6", "state": "#bfa8d9", "image": "#8fbbe8", "action": "#f2a65a", "sep": "#8b929c"}


def draw_speed(names: Sequence[str]) -> Figure:
    """One panel a size that a record of paper.bench holds (of several the last): milliseconds of a whole
    query, and of a frame, by each way of decoding.
    """
    records = Records()
    sources = [records.get(name) or json.loads(Path(name).read_text()) for name in names]
    benches = [source.get("bench", {}) for source in sources]
    sizes = {size: value for b in benches for size, value in b.items() if "actions" in value}
    if not sizes:
        raise SystemExit(f"no record of paper.bench among {names}: run it first")
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


def main(speed: tuple[str, ...], out: Path = Path(__file__).parent.parent / "docs/speed.svg") -> None:
    """Draw the records `speed` of paper.bench."""
    mpl.rcParams.update({"svg.hashsalt": "worldvla", "font.family": "DejaVu Sans"})
    metadata = {"Date": None} if out.suffix == ".svg" else None
    draw_speed(speed).savefig(out, metadata=metadata, dpi=130, facecolor="white")
    print(f"picture: {out}")


if __name__ == "__main__":
    tyro.cli(main)
