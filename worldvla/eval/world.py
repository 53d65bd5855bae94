"""Held-out episodes -> what checkpoints imagine of them, beside the truth, with the lines that give it
meaning.

From a real frame and real actions each model imagines the rest, feeding its own codes back (`imagined`).
Beside it stand the real frames through the image tokenizer and back (`ceiling`: no imagination can beat it by
design), the first frame copied (`floor`), and, to see whether the model listens, the same with the actions of
another clip (`swapped`) and without motion (`still`). Dims: N clips, B frames, T steps, Y X pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from worldvla.data.episode import Episode, read_episodes
from worldvla.eval import distance, features
from worldvla.eval.inverse import NUM_DIMS, read_motion, train_inverse
from worldvla.eval.tokens import write_example
from worldvla.eval.video import FPS, side_by_side, write_mp4
from worldvla.files import write_json
from worldvla.infer.draft import FrameStats, summary
from worldvla.infer.model import Model, load, weights_digest
from worldvla.infer.world import World
from worldvla.machine import provenance
from worldvla.sim.libero.doctor import verdict
from worldvla.sim.suites import SUITES

MAX_PSNR = 60.0
"""dB, of frames that differ by less: a single perfect frame must not decide a mean."""
ENOUGH = {"kvd_efflite0": 50, "fvd": 401}
"""Clips below which a distance is not to be trusted. FVD: its 400 features need more clips than that for a
covariance of full rank; the kernel distance is unbiased at any number, 50 keep its interval narrow."""

Frames = dict[str, np.ndarray]
"""view -> uint8 (T + 1, Y, X, 3); frame 0 is given, T are imagined."""


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


@dataclass(frozen=True)
class Extras:
    """What is measured beside PSNR and SSIM."""

    features: bool = False
    """Distances of EfficientNet-Lite0's features (the `features` extra)."""
    lpips: tuple[Path, Path] | None = None
    """Weight files of the backbone and of its linear heads."""
    i3d: Path | None = None
    """Weight file of FVD's network."""
    probe: Sequence[Path] = field(default=())
    """Demonstrations to train the inverse-dynamics probe on; none: it is left out."""


def evaluate_world(
    checkpoints: Sequence[Path | str],
    paths: Sequence[Path],
    out_dir: Path,
    clips: int = 8,
    horizons: Sequence[int] = (10,),
    seed: int = 0,
    *,
    shorter: bool = False,
    extras: Extras | None = None,
    batch_size: int = 32,
    videos: int = 4,
    device: str = "cpu",
    page: bool = True,
    drafts: bool = True,
    swaps: bool = True,
) -> dict[str, Any]:
    """Imagine `clips` clips of each horizon; write record.json, videos/ and index.html; return the record.

    `shorter`: one clip an episode, from its first frame, of at most that many steps. `swaps` off: no clips
    with other actions, in a third of the time.
    """
    models = label([load(checkpoint, device) for checkpoint in checkpoints])
    sets, extras = {h: choose(paths, clips, h, seed, shorter) for h in horizons}, extras or Extras()
    for chosen in sets.values():
        check(models, chosen, bool(extras.features or extras.i3d), 10 if extras.i3d else 1)
    measure = Measure(extras, paths, [m.config.layout.views for m in models.values()])
    out_dir, sections, chosen = Path(out_dir), [], []
    for horizon, chosen in sets.items():
        guesses, decoding = {}, {}
        for name, model in models.items():
            guesses[name], stats = imagine(
                model, chosen, batch_size, f"{name}, {horizon} steps", drafts, swaps
            )
            decoding[name] = summary(stats, sum(model.config.layout.codes_per_view))
        section = {"horizon": horizon, **score(chosen, guesses, measure.frame_metrics)}
        section |= measure.distances(chosen, guesses) | {"decoding": decoding, "clips": []}
        if swaps and not other_episodes(chosen):
            measure.say("all clips are of one episode: no other one's actions to swap in")
        for i, clip in enumerate(chosen):
            e, video = clip.episode, f"videos/clip_{horizon}_{i:02d}.mp4"
            row = {"suite": e.suite, "task": e.task, "instruction": e.instruction, "init": e.init}
            row |= {"seed": e.seed, "start": clip.start, "steps": clip.steps}
            if i < videos:
                write_mp4(
                    out_dir / video, film(clip, [g["imagined"][i] for g in guesses.values()]), fps(clip)
                )
                row["video"] = video
            section["clips"].append(row)
        sections.append(section)
    record: dict[str, Any] = {
        "models": {name: model.identity() for name, model in models.items()},
        "seed": seed,
        "protocol": {
            "start": "first frames of stored episodes" if shorter else "every horizon-th frame of an episode",
            "actions": "those of the episode; swapped: of the next other one; still: zeros, gripper kept",
            "views": {n: {v: list(s) for v, s in m.view_sizes.items()} for n, m in models.items()},
            "metrics": "per frame, RGB 0..255, mean over clips; SSIM window 11, sigma 1.5, borders reflected",
            "drafts": drafts,
        },
        "horizons": sections,
        "remarks": measure.remarks,
        **provenance(),
        "doctor": verdict(),
    }
    first, model = chosen[0].episode, next(iter(models.values()))
    observation = {**{view: images[0] for view, images in first.images.items()}, "state": first.states[0]}
    write_example(out_dir, model, {**observation, "instruction": first.instruction})
    write_json(out_dir / "record.json", record)
    if page:
        from worldvla.eval.report import write_page

        write_page(out_dir / "index.html", f"What {', '.join(models)} imagines", worlds=[out_dir])
    return record


def label(models: Sequence[Model]) -> dict[str, Model]:
    """Return the models by name: that of the recipe, with step or digest where it repeats."""
    out: dict[str, Model] = {}
    for model in models:
        names = [model.config.name, f"{model.config.name} step {model.manifest.get('step')}"]
        names.append(f"{model.config.name} {weights_digest(model.path)[:6]}")
        free = [name for name in names if name not in out]
        if not free:
            raise ValueError(f"{model.path} was given twice: give every checkpoint once")
        out[free[0]] = model
    return out


def check(models: dict[str, Model], clips: Sequence[Clip], as_sets: bool = False, least: int = 1) -> None:
    """Raise ValueError where numbers would not compare: other picture sizes, other frame rates, no view;
    `as_sets`: other lengths, one clip alone, or fewer than `least` frames (I3D sees no shorter ones)."""
    sizes: dict[str, dict[str, tuple[int, int]]] = {}
    for name, model in models.items():
        for view, size in model.view_sizes.items():
            sizes.setdefault(view, {})[name] = size
    for view, of in sizes.items():
        if len(set(of.values())) > 1:
            raise ValueError(f"view {view} has other sizes in other models, {of}: evaluate them apart")
        for clip in clips:
            if view not in clip.episode.images:
                raise ValueError(f"episode of {clip.episode.task!r} lacks the view {view}: collect with it")
            size, seen = clip.episode.images[view].shape[1:3], next(iter(of.values()))
            if size != seen:
                raise ValueError(f"view {view} of the clips is {size}, the models see {seen}: collect it so")
    if as_sets and len({clip.steps for clip in clips}) > 1:
        raise ValueError("distances between sets of clips need clips of one length: leave out --shorter")
    if as_sets and len(clips) < 2:
        stable = ", ".join(f"{number} for a stable {name}" for name, number in ENOUGH.items())
        raise ValueError(f"distances between sets need 2 clips ({stable}), got {len(clips)}: raise --clips")
    if as_sets and (short := min(clip.steps for clip in clips) + 1) < least:
        raise ValueError(f"FVD needs clips of at least {least} frames, got {short}: raise --horizons")
    if len(rates := {fps(clip) for clip in clips}) > 1:
        raise ValueError(f"the clips have frame rates of {sorted(rates)} Hz: evaluate each simulator apart")


def choose(paths: Sequence[Path], clips: int, horizon: int, seed: int, shorter: bool = False) -> list[Clip]:
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
    turns, found = [windows(paths[i]) for i in order], []
    while turns and len(found) < clips:
        drawn = [(turn, next(turn, None)) for turn in turns[: clips - len(found)]]
        found += [clip for _, clip in drawn if clip is not None]
        turns = turns[len(drawn) :] + [turn for turn, clip in drawn if clip is not None]
    if len(found) < clips:
        raise ValueError(
            f"asked for {clips} clips of {horizon} steps, the {len(paths)} files hold {len(found)}: "
            "ask for fewer or shorter ones, or collect more or longer episodes"
        )
    return found


def imagine(
    model: Model,
    clips: Sequence[Clip],
    batch_size: int = 32,
    title: str = "imagine",
    drafts: bool = True,
    swaps: bool = True,
) -> tuple[dict[str, list[Frames]], list[list[FrameStats]]]:
    """Return kind -> the frames of every clip, and what decoding them took."""
    views, longest = model.config.layout.views, max(clip.steps for clip in clips)
    actions_NTA = np.stack([np.pad(c.actions, ((0, longest - c.steps), (0, 0)), "edge") for c in clips])
    still_NTA = actions_NTA * (np.arange(actions_NTA.shape[2]) == actions_NTA.shape[2] - 1)
    plans = {"imagined": actions_NTA}
    if swaps and (others := other_episodes(clips)):
        plans["swapped"] = actions_NTA[others]
    plans |= {"still": still_NTA} if swaps else {}
    out: dict[str, list[Frames]] = {kind: [] for kind in ("ceiling", "floor", *plans)}
    for clip in clips:
        out["floor"].append({v: np.repeat(clip.real[v][:1], clip.steps + 1, axis=0) for v in views})
        out["ceiling"].append({v: reconstruct(model, clip.real[v]) for v in views})
    stats, batches = [], range(0, len(clips), batch_size)
    jobs = [(kind, i, t) for kind in plans for i in batches for t in range(longest + 1)]
    world, films = World(model, drafts), {}
    for kind, i, t in track(jobs, title, console=Console(stderr=True)):
        batch = clips[i : i + batch_size]
        if t == 0:
            frame = world.reset({v: np.stack([c.real[v][0] for c in batch]) for v in views})
            films = {v: [] for v in views}
        else:
            frame = world.step(plans[kind][i : i + batch_size, t - 1])
        for v in views:
            films[v].append(frame[v])
        if t == longest:
            stacked = {v: np.stack(f, 1) for v, f in films.items()}
            out[kind] += [{v: f[n, : c.steps + 1] for v, f in stacked.items()} for n, c in enumerate(batch)]
            stats += [world.stats] if kind == "imagined" else []
    return out, stats


def other_episodes(clips: Sequence[Clip]) -> list[int]:
    """Return for every clip which is the next one of another episode; nothing where all are of one."""
    turns = [[*range(i + 1, len(clips)), *range(i)] for i in range(len(clips))]
    found = [[j for j in t if clips[j].episode is not clips[i].episode] for i, t in enumerate(turns)]
    return [js[0] for js in found] if all(found) else []


def reconstruct(model: Model, images: np.ndarray) -> np.ndarray:
    """Return frames (T, Y, X, 3) after encoding and decoding."""
    codes = model.image.encode(torch.from_numpy(np.ascontiguousarray(images)).to(model.device))
    return model.image.decode(codes).cpu().numpy()


Guesses = dict[str, dict[str, list[Frames]]]
"""model -> kind -> frames of every clip."""


def score(
    clips: Sequence[Clip], guesses: Guesses, metrics: dict[str, features.FrameMetric] | None = None
) -> dict[str, Any]:
    """Return `steps` (1..T), `num_clips` a step, and views -> model -> kind -> metric -> mean a step over the
    clips that reach it.
    """
    longest = max(clip.steps for clip in clips)
    alive = [sum(clip.steps >= t for clip in clips) for t in range(1, longest + 1)]
    views: dict[str, Any] = {}
    for name, kinds in guesses.items():
        for view in kinds["imagined"][0]:
            rows = views.setdefault(view, {}).setdefault(name, {})
            for kind, frames in kinds.items():
                sums = {metric: np.zeros(longest) for metric in metrics or METRICS}
                for clip, guess in zip(clips, frames, strict=True):
                    pair = [torch.from_numpy(np.ascontiguousarray(f[view][1:])) for f in (guess, clip.real)]
                    for metric, measure in (metrics or METRICS).items():
                        sums[metric][: clip.steps] += measure(*pair).numpy()
                rows[kind] = {m: [round(float(v), 4) for v in s / alive] for m, s in sums.items()}
    return {"steps": list(range(1, longest + 1)), "num_clips": alive, "views": views}


class Measure:
    """The networks of `extras`, loaded once, and what they say of a set of clips."""

    def __init__(self, extras: Extras, paths: Sequence[Path], views: Sequence[Sequence[str]]) -> None:
        self.frame_metrics = dict(METRICS)
        self.remarks: list[str] = []
        self.clip_networks: dict[str, tuple[Callable[[np.ndarray], np.ndarray], distance.Distance]] = {}
        if extras.features:
            self.frame_metrics["pd_efflite0"], pooled = features.efflite0()

            def network(clips: np.ndarray) -> np.ndarray:
                return distance.clip_features(pooled(clips))

            self.clip_networks["kvd_efflite0"] = (network, distance.kernel)
        if extras.lpips:
            name, metric = features.lpips(*extras.lpips)
            self.frame_metrics[name] = metric
        if extras.i3d:
            self.clip_networks["fvd"] = (features.i3d(extras.i3d), distance.frechet)
        self.inverse = None
        if extras.probe:
            if shared := {p.resolve() for p in paths} & {p.resolve() for p in extras.probe}:
                raise ValueError(f"{shared.pop()} holds clips: train the probe on other demonstrations")
            common = [v for v in views[0] if all(v in other for other in views)]
            self.inverse = train_inverse([e for p in extras.probe for e in read_episodes(p)], common)

    def distances(self, clips: Sequence[Clip], guesses: Guesses) -> dict[str, Any]:
        """Return `distances`: view -> model -> kind -> name -> see distance.report; `probe`: model -> kind ->
        `error`, `r2` and `size` of the motion read off the frames, in units of an action.
        """
        out: dict[str, Any] = {"distances": {}, "probe": {}}
        for name, (network, between) in self.clip_networks.items():
            if len(clips) < ENOUGH[name]:
                self.say(f"{len(clips)} clips are too few for a stable {name}: it needs {ENOUGH[name]}")
            for model, kinds in guesses.items():
                for view in kinds["imagined"][0]:
                    rows = out["distances"].setdefault(view, {}).setdefault(model, {})
                    real = network(np.stack([clip.real[view] for clip in clips]))
                    for kind, frames in kinds.items():
                        other = network(np.stack([f[view] for f in frames]))
                        rows.setdefault(kind, {})[name] = distance.report(between, real, other)
        if self.inverse is not None:
            out["probe"] = {model: self._probe(clips, kinds) for model, kinds in guesses.items()}
        return out

    def _probe(self, clips: Sequence[Clip], kinds: dict[str, list[Frames]]) -> dict[str, Any]:
        assert self.inverse is not None
        asked = [clip.actions[:, :NUM_DIMS] for clip in clips]
        other = [asked[i] for i in other_episodes(clips)]
        wanted = {"swapped": other, "still": [0 * a for a in asked]}
        rows = {}
        for kind, frames in {"real": [clip.real for clip in clips], **kinds}.items():
            if kind == "floor":
                continue
            read, truth = [], []
            for clip_frames, motion in zip(frames, wanted.get(kind, asked), strict=True):
                seen = read_motion(self.inverse, clip_frames)[: len(motion)]
                read.append(seen)
                truth.append(motion[: len(seen)])
            read_PA, truth_PA = np.concatenate(read), np.concatenate(truth)
            error, spread = (read_PA - truth_PA) ** 2, (truth_PA - truth_PA.mean(0)) ** 2
            rows[kind] = {
                "error": float(np.abs(read_PA - truth_PA).mean()),
                "size": float(np.abs(read_PA).mean()),
            }
            rows[kind]["r2"] = float(1 - error.sum() / spread.sum()) if spread.sum() else None
        return {k: {n: v if v is None else round(v, 4) for n, v in row.items()} for k, row in rows.items()}

    def say(self, line: str) -> None:
        if line not in self.remarks:
            self.remarks.append(line)


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
    rows, columns = (taps.view(shape).repeat(3, 1, 1, 1) for shape in ((1, 1, side, 1), (1, 1, 1, side)))
    a, b = (F.pad(x.permute(0, 3, 1, 2).double(), [side // 2] * 4, "reflect") for x in (a_BYXC, b_BYXC))

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, rows, groups=3), columns, groups=3)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (
        (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return similarity.flatten(1).mean(1)


METRICS: dict[str, features.FrameMetric] = {"psnr": psnr, "ssim": ssim}


def film(clip: Clip, guesses: Sequence[Frames]) -> list[np.ndarray]:
    """Return one picture a step: the real views, those of each model, and how far each is from the truth."""
    sides = [{v: clip.real[v] for v in guesses[0]}, *guesses]
    for guess in guesses:
        sides.append({v: _apart(guess[v], clip.real[v]) for v in guess})
    return [side_by_side([f[t] for side in sides for f in side.values()]) for t in range(clip.steps + 1)]


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(np.int16) - b).astype(np.uint8)


def fps(clip: Clip) -> float:
    """Return the control rate of the clip's simulator, Hz."""
    suite = clip.episode.suite
    return FPS[SUITES[suite].simulator] if suite in SUITES else FPS["libero"]
