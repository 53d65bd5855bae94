"""Make the pictures of the documentation from the code and the shipped model.

    python docs/pictures.py             # all of them: docs/*.svg, docs/demo.gif, docs/filmstrip.png; a minute
    python docs/pictures.py demo        # the moving one and its filmstrip alone
    python docs/pictures.py play        # docs/play.gif: a minute in which the policy plays the world model
    python docs/pictures.py demo --model out/train/tabletop

The masks are computed by worldvla.model.mask; the episodes are rolled out and imagined when the script runs.
"""

import argparse
import itertools
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image, ImageDraw, ImageFont

import worldvla
from worldvla.model.mask import visible
from worldvla.serve.play.session import Session, open_playable

DOCS = Path(__file__).parent
INK, QUIET, PAPER = "#22262b", "#767d87", "#ffffff"
COLORS = {"text": "#c9ced6", "state": "#bfa8d9", "image": "#8fbbe8", "action": "#f2a65a", "sep": "#8b929c"}


# -- sequences and masks


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
    x = start = 0.0
    for block in blocks:
        start = start or (x if block.is_target else 0.0)
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
        middle = (x + block.width / 2, y + 0.31)
        axes.text(*middle, block.label, fontsize=7.6, ha="center", va="center", color=INK)
        x += block.width
    axes.plot([start + 0.03, x - 0.03], [y - 0.14, y - 0.14], color=INK, linewidth=1)
    axes.text((start + x) / 2, y - 0.22, "predicted", fontsize=7, ha="center", va="top", color=QUIET)


def draw_tokens() -> Figure:
    figure = plt.figure(figsize=(8.4, 2.8))
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    draw_strip(axes, policy(), "policy: which actions carry out the instruction?", 2.0)
    draw_strip(axes, world(), "world model: what will the cameras see after this action?", 0.2)
    axes.set_xlim(-0.05, 13.92)
    axes.set_ylim(-0.45, 3.25)
    axes.axis("off")
    return figure


def mask_of(blocks: Sequence[Block]) -> np.ndarray:
    """Return the mask, bool (T, T), of a sequence with the blocks' small sizes."""
    chunk_T = np.repeat([b.chunk for b in blocks], [b.size for b in blocks])
    pos_T = np.arange(len(chunk_T))
    return visible(pos_T[:, None], pos_T[None, :], chunk_T[:, None], chunk_T[None, :])


def draw_mask(axes: Axes, blocks: Sequence[Block], title: str) -> None:
    """Draw the mask with a coloured cell wherever the token of a row attends to the token of a column."""
    mask_TT, kinds = mask_of(blocks), list(COLORS)
    length = len(mask_TT)
    kind_T = np.repeat([kinds.index(b.kind) + 1 for b in blocks], [b.size for b in blocks])
    cmap = ListedColormap(["#f1f2f4", *COLORS.values()])
    axes.imshow(mask_TT * kind_T, cmap=cmap, interpolation="none", vmin=0, vmax=len(kinds))
    axes.set_xticks(np.arange(-0.5, length), labels=[])
    axes.set_yticks(np.arange(-0.5, length), labels=[])
    axes.grid(color="white", linewidth=0.6)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    start = -0.5
    for block in blocks:
        for corner, width, height in (((start, -2.0), block.size, 1.1), ((-2.0, start), 1.1, block.size)):
            color = COLORS[block.kind]
            patch = Rectangle(corner, width, height, facecolor=color, edgecolor="white", linewidth=0.8)
            patch.set_clip_on(False)
            axes.add_patch(patch)
        middle = start + block.size / 2
        axes.text(-2.4, middle, block.label, fontsize=6.6, ha="right", va="center", color=INK)
        start += block.size
    axes.set_xlim(-0.5, length - 0.5)
    axes.set_ylim(length - 0.5, -0.5)
    axes.set_title(title, fontsize=8.5, color=INK, pad=19)


def draw_masks() -> Figure:
    figure = plt.figure(figsize=(8.4, 4.4))
    draw_mask(
        figure.add_axes((0.11, 0.03, 0.40, 0.80)),
        policy(),
        "policy: no action attends to another one",
    )
    draw_mask(figure.add_axes((0.65, 0.12, 0.33, 0.68)), world(), "world model: causal")
    note = "a row attends to the coloured columns"
    figure.text(0.815, 0.05, note, fontsize=7, color=QUIET, ha="center")
    return figure


def draw_decoding() -> Figure:
    """When each of the 3 x 7 dims of a chunk is decoded: one by one, and one dim of all actions a pass."""
    actions, dims = 3, 7
    orders = {
        f"sequential: {actions * (dims + 2) + 1} passes": np.arange(actions * dims).reshape(actions, dims)
        + 2 * np.arange(actions)[:, None],
        f"parallel: {dims} passes": np.tile(np.arange(dims), (actions, 1)),
    }
    figure, row = plt.subplots(1, 2, figsize=(8.4, 2.0))
    for axes, (title, order) in zip(row, orders.items(), strict=True):
        axes.imshow(order, cmap=mpl.colormaps["Oranges"], vmin=-6, vmax=34)
        for (k, dim), number in np.ndenumerate(order):
            axes.text(dim, k, str(number + 1), ha="center", va="center", fontsize=8, color=INK)
        axes.set_xticks(range(dims), ["x", "y", "z", "rx", "ry", "rz", "grip"], fontsize=7, color=INK)
        axes.set_yticks(range(actions), [f"action {k + 1}" for k in range(actions)], fontsize=7, color=INK)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=8.5, color=INK)
    figure.tight_layout()
    return figure


# -- an episode beside the same episode imagined

EPISODES = (("tabletop_spatial", 0), ("tabletop_object", 0), ("tabletop_goal", 3))
INIT, REPLAN, SIDE, FPS = 10, 3, 264, 8
"""Initial state (no training data starts from it), replan interval, pixels, frames a second."""


@dataclass(frozen=True)
class Clip:
    """One episode: agentview frames uint8 (Y, X, 3) of the simulator and of the world model, equally many."""

    instruction: str
    frames: tuple[list[np.ndarray], list[np.ndarray]]


def record(model: "worldvla.WorldVLA", suite: str, task: int) -> Clip:
    """Roll the policy out; the world model sees the first frame and the actions, and nothing else."""
    env, policy, dream = worldvla.make(suite, task), model.policy(), model.world()
    observation, _ = env.reset(options={"init": INIT})
    real, imagined, done = [observation["agentview"]], [dream.reset(observation)["agentview"]], False
    while not done:
        for action in policy.act(observation)[:REPLAN]:
            observation, _, terminated, truncated, _ = env.step(action)
            real.append(observation["agentview"])
            imagined.append(dream.step(action)["agentview"])
            if done := terminated or truncated:
                break
    return Clip(observation["instruction"], (real, imagined))


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f"{mpl.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def enlarge(frame: np.ndarray, side: int) -> Image.Image:
    return Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC)


def compose(clips: Sequence[Clip], step: int) -> Image.Image:
    """Return one picture of all clips at `step` (the last frame of those that have ended)."""
    gap, top = 8, 38
    size = (len(clips) * (SIDE + gap) + gap, 2 * (SIDE + top) + gap)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    for column, clip in enumerate(clips):
        x = gap + column * (SIDE + gap)
        for row, frames in enumerate(clip.frames):
            y = row * (SIDE + top)
            text = textwrap.fill(clip.instruction, 36) if row == 0 else "the same, imagined"
            where = (x + SIDE / 2, y + top / 2)
            draw.multiline_text(where, text, INK, font(13), anchor="mm", align="center", spacing=2)
            picture.paste(enlarge(frames[min(step, len(frames) - 1)], SIDE), (x, y + top))
    return picture


def write_gif(
    path: Path,
    pictures: Sequence[Image.Image],
    fps: float = FPS,
    colors: int = 96,
    method: Image.Quantize = Image.Quantize.MEDIANCUT,
) -> None:
    """Write an endless GIF with one palette for all pictures; the last one stays for two seconds. MAXCOVERAGE
    keeps rare colours, such as that of a small lamp."""
    tall = Image.new("RGB", (pictures[0].width, pictures[0].height * len(pictures[::4])))
    for i, picture in enumerate(pictures[::4]):
        tall.paste(picture, (0, i * picture.height))
    palette = tall.quantize(colors, method, dither=Image.Dither.NONE)
    first, *rest = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]
    durations = [round(1000 / fps)] * len(rest) + [2000]
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)


def filmstrip(clip: Clip, columns: int = 7, side: int = 150) -> Image.Image:
    """Return the simulator's frames above the imagined ones, at `columns` steps of the episode."""
    steps = np.linspace(0, len(clip.frames[0]) - 1, columns).round().astype(int)
    left, top = 96, 22
    picture = Image.new("RGB", (left + columns * (side + 4), top + 2 * (side + 4)), PAPER)
    draw = ImageDraw.Draw(picture)
    for row, (name, frames) in enumerate(zip(("simulator", "imagined"), clip.frames, strict=True)):
        draw.text((4, top + row * (side + 4) + side / 2), name, INK, font(14), anchor="lm")
        for column, step in enumerate(steps):
            x = left + column * (side + 4)
            picture.paste(enlarge(frames[step], side), (x, top + row * (side + 4)))
            draw.text((x + side / 2, top / 2), f"step {step}", QUIET, font(12), anchor="mm")
    return picture


def draw_demo(model_path: str) -> None:
    torch.set_num_threads(1)  # so small a model is faster so, and the same whatever else runs
    model = worldvla.load(model_path)
    clips = [record(model, suite, task) for suite, task in EPISODES]
    steps = max(len(clip.frames[0]) for clip in clips)
    write_gif(DOCS / "demo.gif", [compose(clips, step) for step in range(steps)])
    filmstrip(clips[0]).quantize(128).save(DOCS / "filmstrip.png", optimize=True)


# -- a minute of play: the policy drives through imagination, the simulator follows

PLAYED = [(f"tabletop_{suite}", task) for task in (3, 0, 6) for suite in ("goal", "object", "spatial")]
PLAY_STEPS, PLAY_PAUSE, PLAY_SCALE, PLAY_EVERY = 60, 6, 4, 2
"""Steps of a task at most, steps after a success, pixels a pixel, steps a picture."""


def play_picture(session: Session) -> Image.Image:
    """Return both worlds' views side by side, with what the page says of them."""
    gap, top, (front, wrist) = 8, 54, (64 * PLAY_SCALE, 32 * PLAY_SCALE)
    width = front + wrist + 3 * gap
    picture = Image.new("RGB", (2 * width, top + front + gap), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((gap, 6), session.task.instruction, INK, font(16))
    done = f", success at step {session.success_step}" if session.success_step else ""
    worlds = {
        f"imagined for {session.imagined} steps": session.frame,
        f"simulator, same actions{done}": session.real or {},
    }
    for column, (title, frame) in enumerate(worlds.items()):
        x = column * width + gap
        draw.text((x, 32), title, QUIET, font(13))
        for view, left, side in (("agentview", x, front), ("wrist", x + front + gap, wrist)):
            image = Image.fromarray(frame[view]).resize((side, side), Image.Resampling.NEAREST)
            picture.paste(image, (left, top))
    return picture


def draw_play(model_path: str, seconds: float) -> None:
    torch.set_num_threads(1)
    playable = open_playable(worldvla.load(model_path), suite=PLAYED[0][0])
    session, pictures = Session(playable, *PLAYED[0], INIT), []
    session.show(True)
    session.drive("policy")
    left = round(seconds * playable.rate)
    for suite, task in itertools.cycle(PLAYED):
        session.start(suite, task, INIT)
        while left and session.steps < min(PLAY_STEPS, (session.success_step or PLAY_STEPS) + PLAY_PAUSE):
            if session.steps % PLAY_EVERY == 0:
                pictures.append(play_picture(session))
            session.step()
            left -= 1
        if not left:
            break
    session.close()
    write_gif(DOCS / "play.gif", pictures, playable.rate / PLAY_EVERY)


def draw_wrong(films: Sequence[Path], width: int = 560) -> None:
    """Write films of a `worldvla rank` above each other: the real views, the imagined ones; without how far
    they are apart, the third of their columns."""
    rows = []
    for path in films:
        with av.open(str(path)) as container:
            rows.append([frame.to_image() for frame in container.decode(video=0)])
    pictures = []
    for step in range(0, max(map(len, rows)), 2):
        shown = [frames[min(step, len(frames) - 1)] for frames in rows]
        shown = [frame.crop((0, 0, 2 * frame.width // 3, frame.height)) for frame in shown]
        shown = [
            frame.resize((width, width * frame.height // frame.width), Image.Resampling.NEAREST)
            for frame in shown
        ]
        picture = Image.new("RGB", (width, sum(frame.height + 6 for frame in shown)), PAPER)
        for row, frame in enumerate(shown):
            picture.paste(frame, (0, row * (frame.height + 6)))
        pictures.append(picture)
    write_gif(DOCS / "wrong.gif", pictures, FPS / 2, 255, Image.Quantize.MAXCOVERAGE)


def save(name: str, draw: Callable[[], Figure]) -> None:
    draw().savefig(DOCS / name, metadata={"Date": None}, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", choices=("all", "diagrams", "demo", "play", "wrong"), default="all"
    )
    parser.add_argument(
        "--model", default="tabletop", help="checkpoint of the demo (default: the shipped one)"
    )
    parser.add_argument("--seconds", type=float, default=60, help="length of play.gif (default: %(default)s)")
    parser.add_argument("--films", type=Path, nargs="+", default=[], help="for wrong.gif: films of a rank")
    args = parser.parse_args()
    mpl.rcParams.update({"svg.hashsalt": "worldvla", "font.family": "DejaVu Sans"})
    if args.what == "play":
        draw_play(args.model, args.seconds)
    if args.what == "wrong":
        draw_wrong(args.films)
    if args.what in ("all", "diagrams"):
        save("tokens.svg", draw_tokens)
        save("mask.svg", draw_masks)
        save("decoding.svg", draw_decoding)
    if args.what in ("all", "demo"):
        draw_demo(args.model)
    print(f"pictures: {DOCS}")


if __name__ == "__main__":
    main()
