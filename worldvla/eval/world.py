"""Stored episodes -> imagined videos beside the truth, PSNR and SSIM per horizon step, with ceiling and
floor.

From an episode's first frame and its real actions the model imagines the rest, feeding its own codes back.
Beside it stand the ceiling (each real frame through the image tokenizer and back: no imagination can beat it
by design) and the floor (the first frame copied). Dims: B clips, Y X pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from worldvla.data.episode import Episode, read_episodes
from worldvla.eval.record import provenance, write_json
from worldvla.eval.tokens import write_example
from worldvla.eval.video import FPS, side_by_side, write_mp4
from worldvla.infer.draft import FrameStats, summary
from worldvla.infer.imagine import World
from worldvla.infer.load import Model, load, weights_digest
from worldvla.sim.env import SUITES

KINDS = ("imagined", "ceiling", "floor")
METRICS = ("psnr", "ssim")
MAX_PSNR = 60.0
"""dB, of frames that differ by less: a single perfect frame must not decide a mean."""


@dataclass(frozen=True)
class Clip:
    """Frames 0..T of one episode, uint8 (T + 1, Y, X, 3) a view; frame 0 is given, T are imagined."""

    episode: Episode
    real: dict[str, np.ndarray]
    imagined: dict[str, np.ndarray]
    ceiling: dict[str, np.ndarray]

    @property
    def floor(self) -> dict[str, np.ndarray]:
        return {view: np.repeat(frames[:1], len(frames), axis=0) for view, frames in self.real.items()}


def evaluate_world(
    checkpoint: Path | str,
    paths: Sequence[Path],
    out_dir: Path,
    episodes: int = 4,
    horizon: int = 30,
    seed: int = 0,
    *,
    batch_size: int = 8,
    videos: int = 8,
    device: str = "cpu",
    page: bool = True,
    drafts: bool = True,
) -> dict[str, Any]:
    """Imagine `episodes` clips of at most `horizon` steps; write record.json, videos/ and index.html; return
    the record.
    """
    model = load(checkpoint, device)
    chosen = choose(paths, episodes, seed)
    clips: list[Clip] = []
    spent: list[list[FrameStats]] = []
    batches = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    for i, batch in enumerate(batches):
        label = f"imagine {len(batch)} clips" + (f" ({i + 1} of {len(batches)})" if len(batches) > 1 else "")
        world = model.world(drafts)
        clips += imagine(model, batch, horizon, label, world)
        spent.append(world.stats)
    record: dict[str, Any] = {
        "checkpoint": {
            "name": model.config.name,
            "path": str(model.path),
            "step": model.manifest.get("step"),
            "digest": weights_digest(model.path),
        },
        "seed": seed,
        "protocol": {
            "start": "first frame of a stored episode",
            "actions": "those of the episode",
            "horizon": horizon,
            "views": {view: list(size) for view, size in model.view_sizes.items()},
            "metrics": "per frame, RGB 0..255, mean over clips; SSIM window 11, sigma 1.5, borders reflected",
        },
        **score(clips),
        "decoding": {"drafts": drafts, **summary(spent, sum(model.config.layout.codes_per_view))},
        **provenance(),
    }
    record["clips"] = []
    for i, clip in enumerate(clips):
        episode, name = clip.episode, f"videos/clip_{i:02d}.mp4"
        row = {"suite": episode.suite, "task": episode.task, "instruction": episode.instruction}
        row |= {"init": episode.init, "seed": episode.seed, "steps": len(next(iter(clip.real.values()))) - 1}
        if i < videos:
            write_mp4(Path(out_dir) / name, film(clip), fps(episode.suite))
            row["video"] = name
        record["clips"].append(row)
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    first = clips[0].episode
    observation = {view: images[0] for view, images in first.images.items()}
    write_example(
        Path(out_dir), model, {**observation, "state": first.states[0], "instruction": first.instruction}
    )
    write_json(Path(out_dir) / "record.json", record)
    if page:
        from worldvla.eval.report import write_page

        write_page(Path(out_dir) / "index.html", f"What {model.config.name} imagines", worlds=[Path(out_dir)])
    return record


def choose(paths: Sequence[Path], episodes: int, seed: int) -> list[Episode]:
    """Return `episodes` stored episodes, spread evenly over the files in an order drawn by `seed`."""
    if episodes < 1 or not paths:
        raise ValueError(
            f"imagining needs at least one episode and one file, got {episodes} and {len(paths)}"
        )
    order = np.random.default_rng(seed).permutation(len(paths))
    found: list[Episode] = []
    for turn, index in enumerate(order):
        share = len(range(turn, episodes, len(order)))
        reader = read_episodes(Path(paths[index]))
        found += [episode for _, episode in zip(range(share), reader, strict=False)]
    if len(found) < episodes:
        raise ValueError(
            f"asked for {episodes} episodes, the {len(paths)} files gave {len(found)}: "
            "ask for fewer or give more files"
        )
    return found


def imagine(
    model: Model,
    episodes: Sequence[Episode],
    horizon: int,
    label: str = "imagine",
    world: World | None = None,
) -> list[Clip]:
    """Imagine all episodes side by side, each for `horizon` steps or to its last observation."""
    views = model.config.layout.views
    for episode in episodes:
        if missing := [view for view in views if view not in episode.images]:
            raise ValueError(
                f"episode of {episode.task!r} lacks the views {missing} of the model: collect it with them"
            )
    steps = [min(horizon, len(episode) - 1) for episode in episodes]
    world = world or model.world()
    frame = world.reset({view: np.stack([e.images[view][0] for e in episodes]) for view in views})
    imagined = {view: [images] for view, images in _views(frame, views).items()}
    for t in track(range(max(steps)), label, console=Console(stderr=True)):
        actions = np.stack([e.actions[min(t, len(e) - 1)] for e in episodes])
        for view, images in _views(world.step(actions), views).items():
            imagined[view].append(images)
    clips = []
    for i, (episode, num_steps) in enumerate(zip(episodes, steps, strict=True)):
        real = {view: episode.images[view][: num_steps + 1] for view in views}
        clips.append(
            Clip(
                episode=episode,
                real=real,
                imagined={view: np.stack([f[i] for f in imagined[view][: num_steps + 1]]) for view in views},
                ceiling={view: reconstruct(model, frames) for view, frames in real.items()},
            )
        )
    return clips


def reconstruct(model: Model, images: np.ndarray) -> np.ndarray:
    """Return frames (T, Y, X, 3) after encoding and decoding."""
    codes = model.image.encode(torch.from_numpy(np.ascontiguousarray(images)).to(model.device))
    return model.image.decode(codes).cpu().numpy()


def score(clips: Sequence[Clip]) -> dict[str, Any]:
    """Return `steps` (1..T), `num_clips` a step, and views -> kind -> metric -> mean a step over the clips
    that reach it.
    """
    longest = max(len(next(iter(clip.real.values()))) - 1 for clip in clips)
    alive = [sum(len(next(iter(c.real.values()))) - 1 >= t for c in clips) for t in range(1, longest + 1)]
    table: dict[str, Any] = {}
    for view in clips[0].real:
        table[view] = {}
        for kind in KINDS:
            sums = {metric: np.zeros(longest) for metric in METRICS}
            for clip in clips:
                truth, guess = (
                    torch.from_numpy(np.ascontiguousarray(c[view][1:]))
                    for c in (clip.real, getattr(clip, kind))
                )
                for metric, values in (("psnr", psnr(guess, truth)), ("ssim", ssim(guess, truth))):
                    sums[metric][: len(values)] += values.numpy()
            table[view][kind] = {m: [round(float(v), 4) for v in total / alive] for m, total in sums.items()}
    return {"steps": list(range(1, longest + 1)), "num_clips": alive, "views": table}


def psnr(a_BYXC: Tensor, b_BYXC: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio (B,) in dB of uint8 frames, at most MAX_PSNR."""
    error_B = (a_BYXC.double() - b_BYXC.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(255.0**2 / error_B.clamp_min(1e-12))).clamp_max(MAX_PSNR)


def ssim(a_BYXC: Tensor, b_BYXC: Tensor) -> Tensor:
    """Return the structural similarity (B,) of uint8 frames: Wang et al. 2004, Gaussian window 11, sigma 1.5.

    Borders are reflected, so that every pixel counts; the numbers are those of torchmetrics 1.9.
    """
    side = min(11, 2 * min(a_BYXC.shape[1:3]) - 1)
    taps = torch.exp(-((torch.arange(side, dtype=torch.float64) - side // 2) ** 2) / (2 * 1.5**2))
    taps = (taps / taps.sum()).to(a_BYXC.device)
    window = (taps[:, None] * taps).expand(3, 1, side, side)
    a, b = (F.pad(x.permute(0, 3, 1, 2).double(), [side // 2] * 4, "reflect") for x in (a_BYXC, b_BYXC))

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=3)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (
        (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return similarity.flatten(1).mean(1)


def film(clip: Clip) -> list[np.ndarray]:
    """Return one picture a step: the real views, then the imagined ones."""
    length = len(next(iter(clip.real.values())))
    return [
        side_by_side([f[t] for side in (clip.real, clip.imagined) for f in side.values()])
        for t in range(length)
    ]


def fps(suite: str) -> float:
    return FPS[SUITES[suite].simulator] if suite in SUITES else FPS["libero"]


def _views(frame: Any, views: Sequence[str]) -> dict[str, np.ndarray]:
    return frame if isinstance(frame, dict) else {views[0]: frame}
