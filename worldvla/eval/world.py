"""Held-out episodes -> what a checkpoint imagines of them, beside the truth.

From a real frame and the real actions the model imagines the rest, feeding its own codes back (`model`).
Beside it stand the first frame repeated (`copy`: what is worth nothing) and the real frames through the image
tokenizer and back (`ceiling`: no imagination can beat it by design). Pixels are compared, and what a reader
(eval/reader.py) sees: where the hand is, and whether a thing is held. Dims: N clips, B frames, T steps, Y X
pixels.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldvla.data.episode import Episode, demonstration_files, read_episodes
from worldvla.data.sources import is_hdf5, open_source
from worldvla.data.sources.source import Names, Source
from worldvla.eval.reader import NAME, Reader, holding
from worldvla.eval.tokens import write_example
from worldvla.files import check_digests, read_json, reading, write_json
from worldvla.infer.draft import FrameStats, summary
from worldvla.infer.model import READER_FILES, Model, load
from worldvla.infer.world import World
from worldvla.machine import provenance
from worldvla.progress import progress_bar
from worldvla.sim.protocol import FPS
from worldvla.sim.suites import SUITES
from worldvla.video import film_strip, side_by_side, write_mp4, write_png

MAX_PSNR = 60.0
"""dB, of frames that differ by less: a single perfect frame must not decide a mean."""

Frames = dict[str, np.ndarray]
"""view -> uint8 (T + 1, Y, X, 3); frame 0 is given, T are imagined."""
CHANGE = 10
"""Grey levels of 255 by which a pixel differs from the clip's first frame, in any colour, to have changed."""


@dataclass(frozen=True)
class Clip:
    """Steps start .. start + steps of an episode."""

    episode: Episode
    start: int
    steps: int
    rate: float = 0.0
    """Steps a second, where the episode is of no simulator."""

    @property
    def real(self) -> Frames:
        return {v: f[self.start : self.start + self.steps + 1] for v, f in self.episode.images.items()}

    @property
    def actions(self) -> np.ndarray:
        """(T, A), as executed."""
        return self.episode.actions[self.start : self.start + self.steps]

    @property
    def later(self) -> slice:
        """The steps that are imagined, in arrays of the episode."""
        return slice(self.start + 1, self.start + self.steps + 1)

    @property
    def has_contact(self) -> bool | None:
        """Whether the hand touches a thing; None where the episode does not note it."""
        contact = self.episode.contact
        return None if contact is None else bool(contact[self.start : self.start + self.steps].any())

    @property
    def fps(self) -> float:
        """Control rate, Hz."""
        suite = self.episode.suite
        if self.rate:
            return self.rate
        return FPS[SUITES[suite].simulator] if suite in SUITES else FPS["libero"]

    def describe(self) -> dict[str, Any]:
        e = self.episode
        row = {"suite": e.suite, "task": e.task, "instruction": e.instruction, "init": e.init, "seed": e.seed}
        return row | {
            "start": self.start,
            "steps": self.steps,
            "success": e.success,
            "contact": self.has_contact,
        }


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
    reader: Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Imagine `clips` clips of each horizon of `demos`, HDF5 files, folders of them or one data set of
    another format; write record.json, videos/ and tokens.npz to `out`; return the record.

    `shorter`: one clip an episode, from its first frame, of at most that many steps. `videos`: filmed clips
    of each horizon. `temperature`: of the codes, as `World` has it. `reader`: weights of the reader of
    frames; by default those beside the checkpoint, if there are any.
    """
    if not horizons:
        raise ValueError("expected at least one horizon, got none: --horizons 10")
    model, sections = load(checkpoint, device), []
    source = _other_format(model, demos)
    if source and reader:
        raise ValueError(f"--reader is for HDF5 files, whose states say where the hand is, got {source.kind}")
    eye, identity = (None, None) if source else find_reader(model, reader)
    pick = partial(choose_of, source) if source else partial(choose, demonstration_files(demos))
    sets = {horizon: pick(clips, horizon, seed, shorter) for horizon in horizons}
    for chosen in sets.values():
        check(model, chosen)
    for horizon, chosen in sets.items():
        title = f"imagine {horizon} steps"
        imagined, said, stats = imagine(model, chosen, title=title, temperature=temperature, seed=seed)
        kinds = {"model": imagined, **references(model, chosen)}
        section = {"horizon": horizon, **score(chosen, kinds, eye)}
        section |= {"said": of_states(chosen, said)} if said and not source else {}
        section["decoding"] = summary(stats, sum(model.config.layout.codes_per_view))
        section["clips"] = list(_filmed(chosen, imagined, videos, out, f"videos/clip_{horizon}"))
        sections.append(section)
    protocol = _describe(model, temperature, shorter) | ({"guesses": source.guesses} if source else {})
    record = {"checkpoint": model.identity(), "seed": seed, "protocol": protocol}
    record |= {"reader": identity, "horizons": sections, **provenance()}
    first = sets[horizons[0]][0].episode
    observation = {**{view: images[0] for view, images in first.images.items()}, "state": first.states[0]}
    write_example(out, model, {**observation, "instruction": first.instruction})
    write_json(out / "record.json", record)
    return record


def _describe(model: Model, temperature: float, shorter: bool) -> dict[str, Any]:
    """Return what a record says of how its clips were chosen, imagined and measured."""
    return {
        "start": "first frames of stored episodes" if shorter else "every horizon-th frame of an episode",
        "actions": "those of the episode",
        "temperature": temperature,
        "views": {view: list(size) for view, size in model.view_sizes.items()},
        "metrics": "torchmetrics, per frame, RGB 0..255, mean over clips; PSNR at most 60 dB",
        "psnr_changed": f"of the pixels that are {CHANGE} levels away from the clip's first frame",
    }


def _filmed(
    clips: Sequence[Clip], imagined: Sequence[Frames], videos: int, out: Path, prefix: str
) -> Iterator[dict[str, Any]]:
    """Yield what each clip is; of the first `videos`, write a film and a strip below `out` and name them."""
    for i, (clip, frames) in enumerate(zip(clips, imagined, strict=True)):
        row = clip.describe()
        if i < videos:
            row |= {"video": f"{prefix}_{i:02d}.mp4", "strip": f"{prefix}_{i:02d}.png"}
            write_mp4(out / row["video"], film(clip, frames), clip.fps)
            write_png(out / row["strip"], film_strip([clip.real, frames]))
        yield row


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


def _other_format(model: Model, demos: Sequence[Path]) -> Source | None:
    """Open demonstrations that are no HDF5 files, with the features that the model was trained on."""
    if is_hdf5(demos):
        return None
    known = model.manifest.get("features", {})
    names = Names(
        cameras={view: camera["feature"] for view, camera in known.get("cameras", {}).items()},
        sizes=model.view_sizes,
        action=known.get("action", ""),
        state=known.get("state", ""),
        delta=bool(known.get("delta")),
    )
    return open_source(demos[0], names)


def choose_of(source: Source, clips: int, horizon: int, seed: int = 0, shorter: bool = False) -> list[Clip]:
    """Return `clips` clips of a data set of another format, spread over its episodes: as `choose`."""
    if clips < 1 or horizon < 1:
        raise ValueError(f"got {clips} clips of {horizon} steps: at least one of each")
    rng, rate = np.random.default_rng(seed), source.fps or FPS["libero"]
    turn = rng.permutation(source.num_episodes)  # who comes late stands in for who is too short
    chosen: list[tuple[int, int, Clip]] = []
    for number, episode in enumerate(source.episodes()):
        length = min(horizon, len(episode) - 1) if shorter else horizon
        starts = [0] if shorter else range(0, len(episode) - horizon, horizon)
        for nth, start in enumerate(rng.permutation(starts)[:clips].tolist() if length else []):
            if len(chosen) == clips and (nth, turn[number]) > chosen[-1][:2]:
                break
            clip = Clip(_cut(episode, start, length), 0, length, rate)
            chosen = sorted([*chosen, (nth, int(turn[number]), clip)], key=lambda one: one[:2])[:clips]
    if len(chosen) < clips:
        raise ValueError(
            f"asked for {clips} clips of {horizon} steps, the {source.num_episodes} episodes of "
            f"{source.path} hold {len(chosen)}: ask for fewer or shorter ones"
        )
    return [clip for _, _, clip in chosen]


def _cut(episode: Episode, start: int, steps: int) -> Episode:
    """Return the steps of an episode that a clip shows: a data set's need not stay in memory whole."""
    part = slice(start, start + steps + 1)
    return replace(
        episode,
        actions=episode.actions[part],
        states=episode.states[part],
        images={view: frames[part].copy() for view, frames in episode.images.items()},
        sim_states=episode.sim_states[part],
        is_expert=episode.is_expert[part],
    )


def check(model: Model, clips: Sequence[Clip]) -> None:
    """Raise ValueError where the clips lack a view of the model, are of another size or of several rates."""
    for clip in clips:
        sizes = {view: images.shape[1:3] for view, images in clip.episode.images.items()}
        model.check_views(sizes, f"an episode of {clip.episode.task!r}")
    if len(rates := {clip.fps for clip in clips}) > 1:
        raise ValueError(f"the clips have frame rates of {sorted(rates)} Hz: evaluate each simulator apart")


def imagine(
    model: Model,
    clips: Sequence[Clip],
    actions: Sequence[np.ndarray] = (),
    batch_size: int = 32,
    title: str = "imagine",
    temperature: float = 0.0,
    seed: int = 0,
) -> tuple[list[Frames], list[np.ndarray], list[list[FrameStats]]]:
    """Return the frames of every clip as the model imagines them; their states (T + 1, S), of a model that
    says them (else no list); and what each step of a batch took.

    `actions`: (T, A) for every clip in place of its own.
    """
    steps, views = max(clip.steps for clip in clips), model.config.layout.views
    plans = [actions[i] if len(actions) else clip.actions for i, clip in enumerate(clips)]
    actions_NTA = np.stack([np.pad(plan, ((0, steps - len(plan)), (0, 0)), "edge") for plan in plans])
    frames: list[Frames] = []
    said: list[np.ndarray] = []
    stats, world = [], World(model, temperature=temperature, seed=seed)
    with progress_bar() as progress:
        bar = progress.add_task(title, total=steps * math.ceil(len(clips) / batch_size))
        for i in range(0, len(clips), batch_size):
            batch = clips[i : i + batch_size]
            first = {v: np.stack([c.real[v][0] for c in batch]) for v in views}
            first["state"] = np.stack([c.episode.states[c.start] for c in batch])
            film, states = [world.reset(first)], [world.state]
            for t in range(steps):
                film.append(world.step(actions_NTA[i : i + batch_size, t]))
                states.append(world.state)
                progress.advance(bar)
            for n, clip in enumerate(batch):
                frames.append({v: np.stack([f[v][n] for f in film[: clip.steps + 1]]) for v in views})
                if world.state is not None:
                    said.append(np.stack([s[n] for s in states[: clip.steps + 1] if s is not None]))
            stats.append(world.stats)
    return frames, said, stats


def of_states(clips: Sequence[Clip], said: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return how far the hand is from where the model says that it is: `median_cm` and `p90_cm` a step."""
    pairs = zip(clips, said, strict=True)
    errors = [
        100 * np.linalg.norm(own[1:, :3] - clip.episode.states[clip.later, :3], axis=1) for clip, own in pairs
    ]
    return hand_errors(errors)


def hand_errors(errors_cm: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return `median_cm` and `p90_cm` a step of the hand's errors in clips, (T,) each."""
    return {
        "median_cm": by_step(errors_cm, np.median),
        "p90_cm": by_step(errors_cm, lambda x: np.quantile(x, 0.9)),
    }


def references(model: Model, clips: Sequence[Clip]) -> dict[str, list[Frames]]:
    """Return `copy` and `ceiling` -> the frames of every clip."""
    views = model.config.layout.views
    return {
        "copy": [{v: np.repeat(clip.real[v][:1], clip.steps + 1, axis=0) for v in views} for clip in clips],
        "ceiling": [{v: model.image.reconstruct(clip.real[v]) for v in views} for clip in clips],
    }


def psnr(a_BYXC: Tensor, b_BYXC: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio (B,) in dB of uint8 frames, at most MAX_PSNR."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # takes seconds to import

    a, b = a_BYXC.double(), b_BYXC.double()
    ratio = peak_signal_noise_ratio(a, b, data_range=255.0, reduction="none", dim=(1, 2, 3))
    return ratio.clamp_max(MAX_PSNR)


def psnr_changed(a_BYXC: Tensor, b_BYXC: Tensor, first_YXC: Tensor) -> Tensor:
    """Return the PSNR (B,) of the pixels in which `b_BYXC` differs from `first_YXC`; NaN where none does."""
    is_changed = (b_BYXC.int() - first_YXC.int()).abs().amax(-1) >= CHANGE
    error = (a_BYXC.double() - b_BYXC.double()).square().mean(-1) * is_changed
    ratio = 10 * torch.log10(255.0**2 * is_changed.sum((1, 2)) / error.sum((1, 2)))
    return ratio.clamp_max(MAX_PSNR)


def ssim(a_BYXC: Tensor, b_BYXC: Tensor) -> Tensor:
    """Return the structural similarity (B,) of uint8 frames: Wang et al. 2004, Gaussian window 11, sigma 1.5;
    a narrower one where the frame has fewer than 6 rows or columns. Borders are reflected.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = (x.permute(0, 3, 1, 2).float() for x in (a_BYXC, b_BYXC))  # in double nine times slower
    sigma = min(1.5, (min(a.shape[2:]) - 1) / 3.5)  # the window's half, 3.5 sigma, is what is reflected
    similarity = structural_similarity_index_measure(a, b, sigma=sigma, reduction="none", data_range=255.0)
    assert isinstance(similarity, Tensor)
    return similarity


def find_reader(model: Model, path: Path | None = None) -> tuple[Reader | None, dict[str, Any] | None]:
    """Return the reader at `path`, or the one beside the checkpoint, and what a record says of it; None where
    there is none. One of other views raises ValueError."""
    beside = model.path / NAME
    path = path or (beside if beside.is_file() else None)
    if path is None:
        return None, None
    if path == beside:
        check_digests(model.path, READER_FILES)
    reader = Reader.load(path)
    if reader.sizes != {view: tuple(size) for view, size in model.view_sizes.items()}:
        raise ValueError(
            f"{path} reads {reader.sizes}, the model shows {model.view_sizes}: train a reader of its views"
        )
    facts = path.with_suffix(".json")
    with reading(facts, "facts of a reader", "train it again"):
        told = read_json(facts)
        same = told["tokenizer"] == model.image.digest()
        return reader, {"path": str(path), "errors": told["errors"], "trained_with_this_tokenizer": same}


def score(
    clips: Sequence[Clip], kinds: Mapping[str, Sequence[Frames]], reader: Reader | None = None
) -> dict[str, Any]:
    """Return `steps` (1..T), and over the clips that reach a step, one number each: see `summarize`. The same
    of the clips with contact alone is under `contact`, where episodes note it. `kinds`: kind -> the frames
    of every clip.
    """
    measured = [
        measure(clip, {kind: frames[n] for kind, frames in kinds.items()}, reader)
        for n, clip in enumerate(clips)
    ]
    section = {"steps": list(range(1, max(clip.steps for clip in clips) + 1)), **summarize(measured)}
    if touching := [m for clip, m in zip(clips, measured, strict=True) if clip.has_contact]:
        section["contact"] = summarize(touching)
    return section


def measure(clip: Clip, kinds: Mapping[str, Frames], reader: Reader | None) -> dict[str, Any]:
    """Return `steps`, T; `views`: view -> kind -> metric -> (T,); and with a reader the error of the `hand`:
    kind -> cm (T,), and `held`: truth or kind -> bool (T,)."""
    views: dict[str, Any] = {}
    for view in next(iter(kinds.values())):
        real = torch.from_numpy(np.ascontiguousarray(clip.real[view]))
        for kind, frames in kinds.items():
            guess = torch.from_numpy(np.ascontiguousarray(frames[view][1:]))
            views.setdefault(view, {})[kind] = {
                "psnr": psnr(guess, real[1:]).numpy(),
                "psnr_changed": psnr_changed(guess, real[1:], real[0]).numpy(),
                "ssim": ssim(guess, real[1:]).numpy(),
            }
    if reader is None:
        return {"steps": clip.steps, "views": views}
    read = {kind: reader.read({v: f[1:] for v, f in frames.items()}) for kind, frames in kinds.items()}
    hand = clip.episode.states[clip.later, :3]
    return {
        "steps": clip.steps,
        "views": views,
        "hand": {k: 100 * np.linalg.norm(seen.position - hand, axis=1) for k, seen in read.items()},
        "held": {"truth": holding(clip.episode)[clip.later], **{k: seen.holds for k, seen in read.items()}},
    }


def summarize(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return `num_clips` a step, `views`: view -> kind -> metric -> mean a step, and with a reader

    - `hand`: kind -> `median_cm` and `p90_cm` a step of its error;
    - `held`: `num_clips` a step in which a thing is truly held, and kind -> the share of them that show it;
    - `held_wrongly`: the same of clips in which nothing is held.

    None where no clip says anything.
    """
    first, lengths = measured[0], [m["steps"] for m in measured]
    section: dict[str, Any] = {
        "num_clips": [sum(n >= t for n in lengths) for t in range(1, max(lengths) + 1)]
    }
    section["views"] = {
        view: {
            kind: {
                name: by_step([m["views"][view][kind][name] for m in measured], np.mean) for name in metrics
            }
            for kind, metrics in kinds.items()
        }
        for view, kinds in first["views"].items()
    }
    if "hand" in first:
        section["hand"] = {k: hand_errors([m["hand"][k] for m in measured]) for k in first["hand"]}
        for name, truth in (("held", True), ("held_wrongly", False)):
            counts = [np.where(m["held"]["truth"] == truth, 1.0, np.nan) for m in measured]
            held: dict[str, list[Any]] = {"num_clips": [int(n or 0) for n in by_step(counts, np.sum)]}
            for kind in first["hand"]:
                shown = [m["held"][kind] * counted for m, counted in zip(measured, counts, strict=True)]
                held[kind] = by_step(shown, np.mean)
            section[name] = held
    return section


def by_step(rows: Sequence[np.ndarray], reduce: Callable[[np.ndarray], Any]) -> list[float | None]:
    """Return what `reduce` makes of each step of clips (T,) of several lengths; NaN counts as absent, and
    None stands where nothing is left."""
    longest = max(map(len, rows))
    table = np.stack(
        [np.pad(row.astype(float), (0, longest - len(row)), constant_values=np.nan) for row in rows]
    )
    columns = (column[~np.isnan(column)] for column in table.T)
    return [round(float(reduce(column)), 4) if len(column) else None for column in columns]


def film(clip: Clip, imagined: Frames) -> list[np.ndarray]:
    """Return one picture a step: the real views, the imagined ones, and how far they are apart."""
    real = {view: clip.real[view] for view in imagined}
    apart = {v: np.abs(f.astype(np.int16) - real[v]).astype(np.uint8) for v, f in imagined.items()}
    rows = [images for side in (real, imagined, apart) for images in side.values()]
    return [side_by_side([images[t] for images in rows]) for t in range(clip.steps + 1)]
