"""Held-out episodes -> what a checkpoint imagines of them, beside the truth.

From a real frame and the real actions the model imagines the rest, feeding its own codes back (`model`).
Beside it stand the first frame repeated (`copy`: what is worth nothing) and the real frames through the image
tokenizer and back (`ceiling`: no imagination can beat it by design). Dims: N clips, B frames, T steps, Y X
pixels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from worldvla.data.episode import Episode, read_episodes
from worldvla.eval.tokens import write_example
from worldvla.eval.video import side_by_side, write_mp4
from worldvla.files import write_json
from worldvla.infer.draft import FrameStats, summary
from worldvla.infer.model import Model, load
from worldvla.infer.world import World
from worldvla.machine import provenance
from worldvla.sim.suites import FPS, SUITES

MAX_PSNR = 60.0
"""dB, of frames that differ by less: a single perfect frame must not decide a mean."""

Frames = dict[str, np.ndarray]
"""view -> uint8 (T + 1, Y, X, 3); frame 0 is given, T are imagined."""
Metric = Callable[[Tensor, Tensor], Tensor]
"""uint8 (B, Y, X, 3) twice -> (B,)."""


@dataclass(frozen=True)
class Clip:
    """Steps start .. start + steps of an episode."""

    episode: Episode
    start: int
    steps: int

    @property
    def real(self) -> Frames:
        return {v: f[self.start : self.start + self.steps + 1] for v, f in self.episode.images.items()}

    @property
    def actions(self) -> np.ndarray:
        """(T, A), as executed."""
        return self.episode.actions[self.start : self.start + self.steps]

    @property
    def fps(self) -> float:
        """Control rate of its simulator, Hz."""
        suite = self.episode.suite
        return FPS[SUITES[suite].simulator] if suite in SUITES else FPS["libero"]

    def describe(self) -> dict[str, Any]:
        e = self.episode
        row = {"suite": e.suite, "task": e.task, "instruction": e.instruction, "init": e.init, "seed": e.seed}
        return row | {"start": self.start, "steps": self.steps}


def evaluate_world(
    checkpoint: Path | str,
    demos: Sequence[Path],
    out: Path,
    *,
    clips: int = 8,
    horizons: Sequence[int] = (10,),
    shorter: bool = False,
    seed: int = 0,
    videos: int = 4,
    temperature: float = 0.0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Imagine `clips` clips of each horizon of the files `demos`; write record.json, videos/ and tokens.npz
    to `out`; return the record.

    `shorter`: one clip an episode, from its first frame, of at most that many steps. `videos`: filmed clips
    of each horizon. `temperature`: of the codes, as `World` has it.
    """
    model, sections = load(checkpoint, device), []
    sets = {horizon: choose(demos, clips, horizon, seed, shorter) for horizon in horizons}
    for chosen in sets.values():
        check(model, chosen)
    for horizon, chosen in sets.items():
        imagined, stats = imagine(model, chosen, title=f"imagine {horizon} steps", temperature=temperature)
        section = {"horizon": horizon, **score(chosen, {"model": imagined, **references(model, chosen)})}
        section["decoding"] = summary(stats, sum(model.config.layout.codes_per_view))
        section["clips"] = [clip.describe() for clip in chosen]
        for i, (clip, frames) in enumerate(list(zip(chosen, imagined, strict=True))[:videos]):
            section["clips"][i]["video"] = f"videos/clip_{horizon}_{i:02d}.mp4"
            write_mp4(out / section["clips"][i]["video"], film(clip, frames), clip.fps)
        sections.append(section)
    record: dict[str, Any] = {
        "checkpoint": model.identity(),
        "seed": seed,
        "protocol": {
            "start": "first frames of stored episodes" if shorter else "every horizon-th frame of an episode",
            "actions": "those of the episode",
            "temperature": temperature,
            "views": {view: list(size) for view, size in model.view_sizes.items()},
            "metrics": "torchmetrics, per frame, RGB 0..255, mean over clips; PSNR at most 60 dB",
        },
        "horizons": sections,
        **provenance(),
    }
    first = sets[horizons[0]][0].episode
    observation = {**{view: images[0] for view, images in first.images.items()}, "state": first.states[0]}
    write_example(out, model, {**observation, "instruction": first.instruction})
    write_json(out / "record.json", record)
    return record


def choose(
    paths: Sequence[Path], clips: int, horizon: int, seed: int = 0, shorter: bool = False
) -> list[Clip]:
    """Return `clips` clips, the files in turn, in an order drawn by `seed`; a function of both."""
    if clips < 1 or horizon < 1 or not paths:
        raise ValueError(f"got {clips} clips of {horizon} steps of {len(paths)} files: at least one of each")

    def windows(path: Path) -> Iterator[Clip]:
        for episode in read_episodes(Path(path)):
            if shorter and len(episode) > 1:
                yield Clip(episode, 0, min(horizon, len(episode) - 1))
            elif not shorter:
                for start in range(0, len(episode) - horizon, horizon):
                    yield Clip(episode, start, horizon)

    order = np.random.default_rng(seed).permutation(len(paths))
    turns, chosen = [windows(paths[i]) for i in order], []
    while turns and len(chosen) < clips:
        drawn = [(turn, next(turn, None)) for turn in turns[: clips - len(chosen)]]
        chosen += [clip for _, clip in drawn if clip is not None]
        turns = turns[len(drawn) :] + [turn for turn, clip in drawn if clip is not None]
    if len(chosen) < clips:
        raise ValueError(
            f"asked for {clips} clips of {horizon} steps, the {len(paths)} files hold {len(chosen)}: "
            "ask for fewer or shorter ones, or collect more or longer episodes"
        )
    return chosen


def check(model: Model, clips: Sequence[Clip]) -> None:
    """Raise ValueError where the clips lack a view of the model, are of another size or of several rates."""
    for clip in clips:
        for view, size in model.view_sizes.items():
            images = clip.episode.images.get(view)
            if images is None:
                raise ValueError(f"episode of {clip.episode.task!r} lacks the view {view}: collect with it")
            if images.shape[1:3] != tuple(size):
                raise ValueError(
                    f"view {view} of the clips is {images.shape[1:3]}, the model sees {size}: collect it so"
                )
    if len(rates := {clip.fps for clip in clips}) > 1:
        raise ValueError(f"the clips have frame rates of {sorted(rates)} Hz: evaluate each simulator apart")


def imagine(
    model: Model,
    clips: Sequence[Clip],
    actions: Sequence[np.ndarray] = (),
    batch_size: int = 32,
    title: str = "imagine",
    temperature: float = 0.0,
) -> tuple[list[Frames], list[list[FrameStats]]]:
    """Return the frames of every clip as the model imagines them, and what each step of a batch took.

    `actions`: (T, A) for every clip in place of its own.
    """
    steps, views = max(clip.steps for clip in clips), model.config.layout.views
    plans = [actions[i] if len(actions) else clip.actions for i, clip in enumerate(clips)]
    actions_NTA = np.stack([np.pad(plan, ((0, steps - len(plan)), (0, 0)), "edge") for plan in plans])
    frames: list[Frames] = []
    stats, world = [], World(model, temperature=temperature)
    batches = [slice(i, i + batch_size) for i in range(0, len(clips), batch_size)]
    jobs = [(rows, t) for rows in batches for t in range(steps + 1)]
    film: list[Mapping[str, np.ndarray]] = []
    for rows, t in track(jobs, title, console=Console(stderr=True)):
        if t == 0:
            film = [world.reset({v: np.stack([c.real[v][0] for c in clips[rows]]) for v in views})]  # pyright: ignore
        else:
            film.append(world.step(actions_NTA[rows, t - 1]))  # pyright: ignore[reportArgumentType]
        if t == steps:
            for n, clip in enumerate(clips[rows]):
                frames.append({v: np.stack([f[v][n] for f in film[: clip.steps + 1]]) for v in views})
            stats.append(world.stats)
    return frames, stats


def references(model: Model, clips: Sequence[Clip]) -> dict[str, list[Frames]]:
    """Return `copy` and `ceiling` -> the frames of every clip."""
    views = model.config.layout.views
    return {
        "copy": [{v: np.repeat(clip.real[v][:1], clip.steps + 1, axis=0) for v in views} for clip in clips],
        "ceiling": [{v: reconstruct(model, clip.real[v]) for v in views} for clip in clips],
    }


def reconstruct(model: Model, images: np.ndarray) -> np.ndarray:
    """Return frames (T, Y, X, 3) after encoding and decoding; the first is the context, as in a clip."""
    frames = torch.from_numpy(np.ascontiguousarray(images)).to(model.device)
    codes = model.image.encode(frames)
    return model.image.decode(codes, frames[:1].expand_as(frames)).cpu().numpy()


def psnr(a_BYXC: Tensor, b_BYXC: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio (B,) in dB of uint8 frames, at most MAX_PSNR."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # takes seconds to import

    a, b = a_BYXC.double(), b_BYXC.double()
    ratio = peak_signal_noise_ratio(a, b, data_range=255.0, reduction="none", dim=(1, 2, 3))
    return ratio.clamp_max(MAX_PSNR)


def ssim(a_BYXC: Tensor, b_BYXC: Tensor) -> Tensor:
    """Return the structural similarity (B,) of uint8 frames: Wang et al. 2004, Gaussian window 11, sigma 1.5;
    a narrower one where the frame has fewer than 6 rows or columns. Borders are reflected.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = (x.permute(0, 3, 1, 2).double() for x in (a_BYXC, b_BYXC))
    sigma = min(1.5, (min(a.shape[2:]) - 1) / 3.5)  # the window's half, 3.5 sigma, is what is reflected
    similarity = structural_similarity_index_measure(a, b, sigma=sigma, reduction="none", data_range=255.0)
    assert isinstance(similarity, Tensor)
    return similarity


METRICS: dict[str, Metric] = {"psnr": psnr, "ssim": ssim}


def score(
    clips: Sequence[Clip], kinds: Mapping[str, Sequence[Frames]], metrics: Mapping[str, Metric] = METRICS
) -> dict[str, Any]:
    """Return `steps` (1..T), `num_clips` a step, and `views`: view -> kind -> metric -> mean a step over the
    clips that reach it. `kinds`: kind -> the frames of every clip.
    """
    longest = max(clip.steps for clip in clips)
    alive = [sum(clip.steps >= t for clip in clips) for t in range(1, longest + 1)]

    def mean(frames: Sequence[Frames], view: str, metric: Metric) -> list[float]:
        total = np.zeros(longest)
        for clip, guess in zip(clips, frames, strict=True):
            pair = [torch.from_numpy(np.ascontiguousarray(f[view][1:])) for f in (guess, clip.real)]
            total[: clip.steps] += metric(*pair).numpy()
        return [round(float(value), 4) for value in total / alive]

    views = {
        view: {
            kind: {name: mean(frames, view, metric) for name, metric in metrics.items()}
            for kind, frames in kinds.items()
        }
        for view in next(iter(kinds.values()))[0]
    }
    return {"steps": list(range(1, longest + 1)), "num_clips": alive, "views": views}


def film(clip: Clip, imagined: Frames) -> list[np.ndarray]:
    """Return one picture a step: the real views, the imagined ones, and how far they are apart."""
    real = {view: clip.real[view] for view in imagined}
    apart = {v: np.abs(f.astype(np.int16) - real[v]).astype(np.uint8) for v, f in imagined.items()}
    rows = [images for side in (real, imagined, apart) for images in side.values()]
    return [side_by_side([images[t] for images in rows]) for t in range(clip.steps + 1)]
