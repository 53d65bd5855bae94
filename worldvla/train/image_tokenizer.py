"""Train an image tokenizer on the frames of episode files, every view with one codebook; CPU, minutes.

    train_tokenizer(files, TABLETOP, "out/tabletop/image_tokenizer", TokenizerTraining(minutes=12))

The quantizer is FSQ, which has nothing to learn; a published VQGAN is loaded, not trained. The loss is L1 +
L2 in pixels, weighted towards small things. There is no perceptual and no adversarial term: at 64 pixels they
cost a network as large as the tokenizer and buy texture, while codes are judged by positions
(paper/probe.py).

A run saves its state every minute, in `training/` of its directory; the same call goes on from there.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from worldvla.config import ImageTokenizerConfig, TokenizerTraining, to_json
from worldvla.data.sources import open_source
from worldvla.data.sources.source import Source
from worldvla.files import (
    MANIFEST,
    differing,
    load_network,
    read_json,
    reading,
    refuse_others,
    save_network,
    whole_folder,
    write_json,
    write_text,
)
from worldvla.machine import free_memory
from worldvla.progress import progress_bar
from worldvla.tokenizers.image import ImageTokenizer, to_images, to_pixels
from worldvla.video import write_png

TABLETOP = ImageTokenizerConfig(
    channels=48,
    channel_mult=(1, 2),
    patch=4,
    num_res_blocks=1,
    z_channels=64,
    embed_dim=4,
    quantizer="fsq",
    num_codes=4096,
    fsq_levels=(8, 8, 8, 8),
)
"""64x64 and 32x32 pixels to 8x8 and 4x4 codes. At equal steps FSQ beat VQ of as many codes by about 1 dB."""
LEVELS = ImageTokenizerConfig(
    channels=128,
    channel_mult=(1, 2),
    encoder="cell",
    patch=4,
    num_res_blocks=2,
    z_channels=8,
    embed_dim=8,
    quantizer="fsq",
    num_codes=8**8,
    fsq_levels=(8,) * 8,
    context_widths=(48, 80, 128),
)
"""The same grids for a model that predicts codes level by level (ModelConfig.code_levels): what stands still
keeps its codes, and is copied from a frame of the clip."""
LEVELS_16 = replace(LEVELS, patch=8, context_widths=(32, 48, 80, 128))
"""`LEVELS` for frames of twice the side, 128x128 and 64x64 pixels as in LIBERO."""
CONTRAST = 0.3
"""Difference to the background, of a range of 2, from which a pixel counts fully as foreground."""
VIVID = 0.45, 0.5
"""Difference between a pixel's channels, of a range of 2, from which its colour counts, and over which it
comes to count fully. Without, a purple ball in the hand becomes teal: few pixels of a frame are coloured."""
METRIC_STEPS = 50
"""Steps between rows of metrics.jsonl, after each of which the run may be saved."""
SAVE_SECONDS = 60.0
STATE = "state.safetensors"
"""In `training/`, beside a JSON file with digests: a run that is not finished."""
REPORTED = 512
"""Held-out frames of a view that a report is of, at most."""


@dataclass(frozen=True)
class Frames:
    """One camera's frames of all episodes, held in memory."""

    view: str
    train: UInt8[Tensor, "N Y X 3"]
    val: UInt8[Tensor, "M Y X 3"]
    """Frames of the last episode of each file, never trained on."""
    background: Float[Tensor, "3 Y X"] | None
    """The median frame in [-1, 1]; None for a camera that moves."""
    first_train: Int[Tensor, " N"] | None = None
    """Of each frame the first one of its episode: a context comes from between the two. None: of no use."""
    first_val: Int[Tensor, " M"] | None = None


def load_frames(
    episode_files: Sequence[Path | str | Source], *, max_frames: int = 60_000, seed: int = 0
) -> list[Frames]:
    """Read the frames of files or opened data sets; about `max_frames` frames a view at the most."""
    sources = [f if isinstance(f, Source) else open_source(Path(f)) for f in episode_files]
    lengths = [[len(episode) for episode in source.episodes(images=False)] for source in sources]
    share = min(1.0, max_frames / max(1, sum(map(sum, lengths))))
    rng = np.random.default_rng(seed)
    train: dict[str, list[np.ndarray]] = {}
    val: dict[str, list[np.ndarray]] = {}
    starts: dict[tuple[str, bool], list[np.ndarray]] = {}
    """Of each view, held out or not: which of its frames begins the episode of each."""
    with progress_bar() as progress:
        bar = progress.add_task("reading frames", total=sum(map(len, lengths)))
        for source, of_file in zip(sources, lengths, strict=True):
            for number, episode in enumerate(source.episodes(), start=1):
                keep = np.flatnonzero(rng.random(len(episode)) < share)
                is_val = number == len(of_file) > 1
                into = val if is_val else train
                for view, images in episode.images.items():
                    own = starts.setdefault((view, is_val), [])
                    own.append(np.full(len(keep), sum(map(len, own))))
                    into.setdefault(view, []).append(images[keep])
                progress.advance(bar)
    if not train:
        raise ValueError("no episode files: give the HDF5 files that `worldvla collect` writes")
    if lost := sorted(set(val) - set(train)):
        raise ValueError(f"view {lost[0]} is in held-out episodes alone: give more episodes with it")
    frames = []
    for view in sorted(train):
        if len({a.shape[1:] for a in train[view] + val.get(view, [])}) > 1:
            raise ValueError(f"view {view} has frames of several sizes; collect with one size a view")
        images = torch.from_numpy(np.concatenate(train[view]))
        held_out = torch.from_numpy(np.concatenate(val[view])) if view in val else images[:64]
        first, held = (
            torch.from_numpy(np.concatenate(starts.get((view, part), [np.zeros(0, np.int64)])))
            for part in (False, True)
        )
        held = held if view in val else first[: len(held_out)]
        frames.append(Frames(view, images, held_out, _background(images, rng), first, held))
    return frames


def _background(images: UInt8[Tensor, "N Y X 3"], rng: np.random.Generator) -> Float[Tensor, "3 Y X"] | None:
    """Return the median picture, or None where it explains less than half of the pixels: the camera moves."""
    some = to_pixels(images[torch.from_numpy(rng.choice(len(images), min(len(images), 256), replace=False))])
    median = some.median(dim=0).values
    explained = ((some - median).abs().amax(dim=1) < CONTRAST).float().mean()
    return median if explained > 0.5 else None


def foreground(
    pixels_BCYX: Float[Tensor, "B 3 Y X"], background: Float[Tensor, "3 Y X"] | None
) -> Float[Tensor, "B 1 Y X"]:
    """Return 0 on table, 1 on things: the difference to background or surroundings, whichever is larger."""
    smooth = F.avg_pool2d(pixels_BCYX, 5, stride=1, padding=2, count_include_pad=False)
    contrast = F.max_pool2d((pixels_BCYX - smooth).abs().amax(dim=1, keepdim=True), 3, stride=1, padding=1)
    if background is not None:
        contrast = torch.maximum(contrast, (pixels_BCYX - background).abs().amax(dim=1, keepdim=True))
    return (contrast / CONTRAST).clamp(max=1.0)


def train_tokenizer(
    episode_files: Sequence[Path | str | Source] | Sequence[Frames],
    config: ImageTokenizerConfig,
    out_dir: Path | str,
    training: TokenizerTraining,
    init_from: Path | str | None = None,
) -> dict[str, Any]:
    """Train, save to `out_dir` (and metrics.jsonl, report/ there), return the report's numbers.

    `init_from`: the directory of a tokenizer of the same config to go on from, at a gentle learning rate: its
    codes then keep about what they mean, and a model of them may be trained on (train/build.py). A stopped
    run goes on, a finished one stays as it is; a run of other settings in `out_dir` raises ValueError.
    """
    if config.quantizer != "fsq":
        raise ValueError(
            "a quantizer of 'vq' is only loaded, not trained: set quantizer 'fsq' and fsq_levels"
        )
    out_dir = Path(out_dir)
    is_ours = any((out_dir / name).exists() for name in ("metrics.jsonl", "report"))
    refuse_others(out_dir, MANIFEST, "ckpt", *(() if is_ours else ("model.safetensors",)))
    _check_memory(config)
    torch.set_num_threads(training.num_threads)
    torch.manual_seed(training.seed)
    views = [f for f in episode_files if isinstance(f, Frames)] or load_frames(
        [f for f in episode_files if not isinstance(f, Frames)],
        max_frames=training.max_frames,
        seed=training.seed,
    )
    tokenizer = ImageTokenizer(config)
    if init_from is not None:
        parent = ImageTokenizer.load(init_from)
        if parent.config != config:
            raise ValueError(
                f"init_from: {init_from} has the config {parent.config}, asked for {config}: give its own"
            )
        tokenizer.load_state_dict(parent.state_dict())
        tokenizer.ancestors = (parent.digest(), *parent.ancestors)
    return TokenizerTrainer(tokenizer, views, out_dir, training).run()


def _check_memory(config: ImageTokenizerConfig) -> None:
    """Raise ValueError if weights, gradients and AdamW's moments do not fit."""
    with torch.device("meta"):
        needed, free = 4 * sum(p.nbytes for p in ImageTokenizer(config).parameters()), free_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"training this image tokenizer needs {needed / 1e9:.3g} GB (activations on top), "
            f"{free / 1e9:.3g} GB are free: make config.channels or config.channel_mult smaller"
        )


class TokenizerTrainer:
    """One run: the tokenizer, its optimiser, the frames that it draws, and the step."""

    def __init__(
        self, tokenizer: ImageTokenizer, views: Sequence[Frames], out_dir: Path, training: TokenizerTraining
    ) -> None:
        self.tokenizer, self.views, self.out_dir, self.training = tokenizer, views, out_dir, training
        self.weights = dict(tokenizer.to(memory_format=torch.channels_last).named_parameters())  # pyright: ignore
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
        )
        self.generator = torch.Generator().manual_seed(training.seed)
        self.num_steps, self.seconds = 0, 0.0
        self.identity = {
            "train": asdict(training) | {"init_from": list(tokenizer.ancestors)},
            "config": to_json(tokenizer.config),
            "frames": {f.view: [*f.train.shape, int(f.train.sum(dtype=torch.int64))] for f in views},
        }

    def run(self) -> dict[str, Any]:
        report_path, log_path = self.out_dir / "report/report.json", self.out_dir / "metrics.jsonl"
        if not self._resume() and report_path.is_file():
            record = read_json(report_path)
            self._refuse_other(record)
            return record
        with reading(log_path, "record of a training", "mend or remove the file"):
            lines = log_path.read_text().splitlines(keepends=True) if self.num_steps else []
        write_text(log_path, "".join(lines[: self.num_steps // METRIC_STEPS]))
        with log_path.open("a") as log, progress_bar() as progress:
            bar = progress.add_task("image tokenizer", total=1.0)
            self._loop(log, lambda done, text: progress.update(bar, completed=done, description=text))
        self.tokenizer.eval().requires_grad_(False).save(self.out_dir)
        measured = report(self.tokenizer, self.views, self.out_dir / "report")
        record = {**self.identity, "num_steps": self.num_steps, **measured}
        write_json(report_path, record, indent=2)
        shutil.rmtree(self.out_dir / "training", ignore_errors=True)
        return record

    def _loop(self, log: TextIO, show: Callable[[float, str], None]) -> None:
        training, before, started = self.training, self.seconds, time.monotonic()
        saved, window, done = started, list[Tensor](), self._done()
        while done < 1.0:
            warm_up = min(1.0, (self.num_steps + 1) / 100)
            rate = training.learning_rate * warm_up * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
            losses, codes = self.step(rate)
            window.append(codes)
            self.num_steps += 1
            self.seconds = before + time.monotonic() - started
            done = self._done()
            is_row = self.num_steps % METRIC_STEPS == 0 or done >= 1.0
            loss = 0.0
            if is_row or self.num_steps % 10 == 0:
                loss = sum(loss.item() for loss in losses) / len(losses)
                if not math.isfinite(loss):
                    raise ValueError(f"loss {loss} at step {self.num_steps}: lower --learning-rate")
                show(min(done, 1.0), f"image tokenizer  step {self.num_steps}  loss {loss:.4f}")
            if is_row:
                speed = self.num_steps * training.batch_size * len(self.views) / self.seconds
                row = {"step": self.num_steps, "seconds": round(self.seconds, 1), "lr": rate}
                row |= {"frames_per_second": round(speed, 1), "reconstruction": loss}
                log.write(json.dumps(row | code_use(torch.cat(window), self.tokenizer.config)) + "\n")
                log.flush()
                window = []
                if time.monotonic() - saved >= SAVE_SECONDS and done < 1.0:
                    self._save()
                    saved = time.monotonic()

    def step(self, rate: float) -> tuple[list[Tensor], Tensor]:
        """Take one step on a batch of every view; return the losses of the views, and all codes."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        losses, codes = [], []
        for frames in self.views:
            rows = torch.randint(len(frames.train), (self.training.batch_size,), generator=self.generator)
            pixels, context, weight = self._cut(*self._draw(frames, rows))
            loss, codes_N = self._reconstruct(pixels, context, weight)
            loss.backward()
            losses.append(loss.detach())
            codes.append(codes_N)
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        return losses, torch.cat(codes)

    def _draw(self, frames: Frames, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return pixels, context and weight of frames; the context is an earlier frame of its episode."""
        pixels = to_pixels(frames.train[rows])
        is_weighty = foreground(pixels, frames.background)
        if not self.tokenizer.config.context_widths or frames.first_train is None:
            return pixels, None, 1.0 + self.training.foreground_weight * is_weighty
        first = frames.first_train[rows]
        share = torch.rand(len(rows), generator=self.generator)
        context = to_pixels(frames.train[first + (share * (rows - first + 1)).long()])
        is_new = (pixels - context).abs().amax(1, keepdim=True) / CONTRAST
        is_vivid = (pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True) - VIVID[0]) / VIVID[1]
        is_weighty = torch.maximum(is_weighty, is_new.clamp(max=1)) + 2 * is_vivid.clamp(0, 1)
        return pixels, context, 1.0 + self.training.foreground_weight * is_weighty

    def _cut(
        self, pixels: Tensor, context: Tensor | None, weight: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return squares of `crop` pixels of every frame, drawn by the weight inside them."""
        crop, cell, rows, cols = self.training.crop, self.tokenizer.config.factor, *pixels.shape[2:]
        if not crop or max(rows, cols) <= crop:
            return pixels, context, weight
        heat = F.avg_pool2d(weight, crop, cell)
        noise = torch.rand(heat.shape, generator=self.generator) * heat.amax((1, 2, 3), keepdim=True)
        places = (heat + noise).flatten(1).argmax(1).tolist()
        corners = [(cell * (p // heat.shape[3]), cell * (p % heat.shape[3])) for p in places]

        def cut(images: Tensor) -> Tensor:
            squares = [
                image[:, y : y + crop, x : x + crop] for image, (y, x) in zip(images, corners, strict=True)
            ]
            return torch.stack(squares)

        return cut(pixels), None if context is None else cut(context), cut(weight)

    def _reconstruct(
        self,
        pixels: Float[Tensor, "B 3 Y X"],
        context: Float[Tensor, "B 3 Y X"] | None,
        weight: Float[Tensor, "B 1 Y X"],
    ) -> tuple[Tensor, Int[Tensor, " N"]]:
        """Encode, quantise, decode and compare; return the loss and the codes."""
        tokenizer, num_dims = self.tokenizer, len(self.tokenizer.config.fsq_levels)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        if context is not None:  # without one in a tenth, so that codes can be shown alone too
            context = context * (torch.rand(len(context), 1, 1, 1, generator=self.generator) > 0.1)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.training.dtype == "bfloat16"):
            z = tokenizer.latents(pixels)
            vectors, codes = tokenizer.quantize(rearrange(z, "b e r q -> (b r q) e").float())
            vectors = rearrange(vectors, "(b r q) e -> b e r q", r=z.shape[2], q=z.shape[3])
            if self.training.nested:
                draws = torch.rand(2, len(pixels), generator=self.generator)
                num_kept = torch.where(
                    draws[0] < self.training.nested, (draws[1] * num_dims).ceil(), num_dims
                )
                vectors = vectors * (torch.arange(num_dims) < num_kept[:, None])[..., None, None]
            guess = tokenizer.pixels(vectors, context)
        error = (guess.float() - pixels).abs()
        return ((error + error.square()) * weight).mean() / weight.mean(), codes

    def _done(self) -> float:
        """Return the share of the budget that is used up."""
        steps = self.training.steps
        return self.num_steps / steps if steps else self.seconds / (60 * self.training.minutes)

    def _save(self) -> None:
        tensors = {f"model.{name}": p.detach() for name, p in self.weights.items()}
        for name, parameter in self.weights.items():
            tensors |= {f"{key}.{name}": v for key, v in self.optimizer.state[parameter].items()}
        progress = {**self.identity, "step": self.num_steps, "seconds": self.seconds}
        with whole_folder(self.out_dir / "training", "state.json") as scratch:
            packed = tensors | {"generator": self.generator.get_state()}
            save_network(scratch / STATE, packed, progress)

    def _resume(self) -> bool:
        """Go on from the state in `training/`; return whether there is one."""
        path = self.out_dir / "training"
        if not (path / "state.json").is_file():
            return False
        state, tensors = load_network(path / STATE, f"or begin anew: remove {path}")
        self._refuse_other(state)
        self.num_steps, self.seconds = state["step"], state["seconds"]
        self.generator.set_state(tensors["generator"])
        self.tokenizer.load_state_dict({name: tensors[f"model.{name}"] for name in self.weights})
        for name, parameter in self.weights.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[parameter] = {key: tensors[f"{key}.{name}"] for key in keys}
        return True

    def _refuse_other(self, run: Mapping[str, Any]) -> None:
        if changed := differing({key: run.get(key) for key in self.identity}, self.identity):
            raise ValueError(
                f"{self.out_dir} holds an image tokenizer of another run ({', '.join(changed.values())}), "
                "and stores and models may be made of its codes: choose another directory, or remove it"
            )


def code_use(codes: Int[Tensor, "..."], config: ImageTokenizerConfig) -> dict[str, float]:
    """Return the share of codes that occur, and the perplexity (exp of the entropy: equally likely codes)."""
    counts = codes.flatten().unique(return_counts=True)[1]
    share = counts / codes.numel()
    entropy = -(share * share.log()).sum()
    return {"used": len(counts) / config.num_codes, "perplexity": entropy.exp().item()}


def _psnr(error: Tensor, weight: Tensor) -> float:
    """Return dB for squared errors on the scale of [0, 1], averaged under `weight`."""
    return -10 * math.log10(max(1e-10, ((error * weight).sum() / weight.sum().clamp(min=1e-6)).item()))


def report(tokenizer: ImageTokenizer, views: Sequence[Frames], out_dir: Path) -> dict[str, Any]:
    """Measure held-out frames; write index.html and a picture a view (originals above reconstructions)."""
    result: dict[str, Any] = {"views": {}, "digest": tokenizer.digest()}
    body = ""
    for frames in views:
        rows = torch.linspace(0, len(frames.val) - 1, min(REPORTED, len(frames.val))).long()
        images = frames.val[rows]
        codes = torch.cat([tokenizer.encode(part) for part in images.split(64)])
        context = None if frames.first_val is None else frames.val[frames.first_val[rows]]
        seen = [None] * len(codes.split(64)) if context is None else context.split(64)
        parts = zip(codes.split(64), seen, strict=True)
        guesses = torch.cat([tokenizer.decode(part, frame) for part, frame in parts])
        pixels = to_pixels(images)
        error = ((to_pixels(guesses) - pixels) / 2).square().mean(dim=1, keepdim=True)
        numbers = {"psnr": _psnr(error, torch.ones_like(error))}
        numbers["psnr_foreground"] = _psnr(error, (foreground(pixels, frames.background) >= 1.0).float())
        numbers |= code_use(codes, tokenizer.config) | {"frames": float(len(images))}
        result["views"][frames.view] = numbers
        chosen = torch.linspace(0, len(images) - 1, min(12, len(images))).long()
        sheet = rearrange(torch.stack([images[chosen], guesses[chosen]]), "two n y x c -> (two y) (n x) c")
        scale = max(1, 192 // images.shape[1])
        write_png(out_dir / f"{frames.view}.png", sheet.numpy().repeat(scale, 0).repeat(scale, 1))
        if frames.background is not None:
            background = to_images(frames.background[None])[0]
            write_png(out_dir / f"{frames.view}_background.png", background.numpy())
        cells = "".join(f"<tr><td>{name}</td><td>{value:.3f}</td></tr>" for name, value in numbers.items())
        body += f'<h2>{frames.view}</h2><img src="{frames.view}.png"><table>{cells}</table>\n'
    write_text(
        out_dir / "index.html",
        "<!doctype html><meta charset=utf-8><title>Image tokenizer</title>"
        "<style>body{font:15px sans-serif;margin:2em}img{max-width:100%}td{padding:0 1em 0 0}</style>"
        "<h1>Image tokenizer</h1><p>Held-out frames above, what their codes hold below. "
        f"Digest {result['digest']}.</p>\n{body}",
    )
    return result
