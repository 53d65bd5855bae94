"""Train an image tokenizer on the frames of episode files, every view with one codebook; CPU, minutes.

    train_tokenizer(files, TABLETOP, "out/tabletop/image_tokenizer", minutes=12)

The loss is L1 + L2 in pixels, weighted towards small things, + commitment. No perceptual and no adversarial
term: at 64 pixels they cost a network of the tokenizer's own size and buy texture, while the codes are gated
on positions (paper/probe.py).
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from worldvla.config import ImageTokenizerConfig, to_json
from worldvla.data.episode import read_episodes
from worldvla.files import read_json, whole_file, write_json, write_text
from worldvla.progress import progress_bar
from worldvla.tokenizers.image import ImageTokenizer, VectorQuantizer, to_images, to_pixels

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
COMMITMENT = 0.25
"""Weight of |z - code|^2 (published value)."""
PLAIN_SHARE = 0.1
"""Share of the budget in which a VQ tokenizer trains without quantising; k-means then makes its codebook."""
REVIVE_SHARE = 0.8
"""Share of the budget after which dead codes are left alone."""
CONTRAST = 0.3
"""Difference to the background, of a range of 2, from which a pixel counts fully as foreground."""
_METRIC_STEPS = 50


@dataclass(frozen=True)
class Frames:
    """One camera's frames of all episodes, held in memory."""

    view: str
    train: UInt8[Tensor, "N Y X 3"]
    val: UInt8[Tensor, "M Y X 3"]
    """Frames of the last episode of each file, never trained on."""
    background: Float[Tensor, "3 Y X"] | None
    """The median frame in [-1, 1]; None for a camera that moves."""


def load_frames(
    episode_files: Sequence[Path | str], *, max_frames: int = 60_000, seed: int = 0
) -> list[Frames]:
    """Read the frames of demonstrations; about `max_frames` frames a view at the most."""
    paths = [Path(path) for path in episode_files]
    lengths = [[len(episode) for episode in read_episodes(path, images=False)] for path in paths]
    share = min(1.0, max_frames / max(1, sum(map(sum, lengths))))
    rng = np.random.default_rng(seed)
    train: dict[str, list[np.ndarray]] = {}
    val: dict[str, list[np.ndarray]] = {}
    with progress_bar() as progress:
        bar = progress.add_task("reading frames", total=sum(map(len, lengths)))
        for path, of_file in zip(paths, lengths, strict=True):
            for number, episode in enumerate(read_episodes(path), start=1):
                keep = np.flatnonzero(rng.random(len(episode)) < share)
                into = val if number == len(of_file) > 1 else train
                for view, images in episode.images.items():
                    into.setdefault(view, []).append(images[keep])
                progress.advance(bar)
    if not train:
        raise ValueError("no episode files: give the HDF5 files that `worldvla collect` writes")
    frames = []
    for view in sorted(train):
        if len({a.shape[1:] for a in train[view] + val.get(view, [])}) > 1:
            raise ValueError(f"view {view} has frames of several sizes; collect with one size a view")
        images = torch.from_numpy(np.concatenate(train[view]))
        held_out = torch.from_numpy(np.concatenate(val[view])) if view in val else images[:64]
        frames.append(Frames(view, images, held_out, _background(images, rng)))
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


class CodebookTrainer:
    """Codebook of a VectorQuantizer as running k-means: averages, not gradients; dead codes revived."""

    def __init__(self, quantizer: VectorQuantizer, seed: int, decay: float = 0.99) -> None:
        self.book = quantizer.embedding.weight.requires_grad_(False)
        self.quantizer = quantizer
        self.decay = decay
        self.generator = torch.Generator().manual_seed(seed)
        self.count = torch.ones(len(self.book))
        self.total = self.book.clone()
        self.unused = torch.zeros(len(self.book))

    def _draw(self, z_NE: Tensor, number: int) -> Tensor:
        return z_NE[torch.randint(len(z_NE), (number,), generator=self.generator)]

    @torch.no_grad()
    def start(self, z_NE: Float[Tensor, "N E"], rounds: int = 8) -> None:
        """Set the codebook by k-means over `z_NE`; empty clusters are drawn anew."""
        count = torch.ones(len(self.book))
        self.book.copy_(self._draw(z_NE, len(self.book)))
        for _ in range(rounds):
            count, total = self._sums(z_NE, self.quantizer.codes(z_NE))
            self.book.copy_(total / count.clamp(min=1.0)[:, None])
            empty = count == 0
            self.book[empty] = self._draw(z_NE, int(empty.sum()))
        self.count = count.clamp(min=1.0) * (
            4096 / len(z_NE)
        )  # as if from a few batches: the average moves on quickly
        self.total = self.book * self.count[:, None]

    def _sums(self, z_NE: Tensor, codes_N: Tensor) -> tuple[Tensor, Tensor]:
        count = torch.bincount(codes_N, minlength=len(self.book)).float()
        return count, torch.zeros_like(self.book).index_add_(0, codes_N, z_NE.float())

    @torch.no_grad()
    def update(self, z_NE: Float[Tensor, "N E"], codes_N: Int[Tensor, " N"], revive: bool) -> None:
        """Move every code towards the mean of its vectors; `revive` replaces codes unused for 100 steps."""
        count, total = self._sums(z_NE, codes_N)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        self.book.copy_(self.total / self.count.clamp(min=1e-5)[:, None])
        self.unused = torch.where(count > 0, 0.0, self.unused + 1)
        dead = self.unused > 100
        if revive and bool(dead.any()):
            self.book[dead] = self._draw(z_NE.float(), int(dead.sum()))
            self.count[dead] = 1.0
            self.total[dead] = self.book[dead]
            self.unused[dead] = 0.0


@dataclass(frozen=True)
class _Pass:
    """One batch of one view through the tokenizer."""

    reconstruction: Tensor
    commitment: Tensor
    latents_NE: Tensor
    codes_N: Tensor
    """Empty while not quantising."""


def _forward(
    tokenizer: ImageTokenizer,
    pixels: Float[Tensor, "B 3 Y X"],
    weight: Float[Tensor, "B 1 Y X"],
    *,
    plain: bool,
    dtype: str,
) -> _Pass:
    """Encode, quantise (unless `plain`), decode and compare."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        z = tokenizer.latents(pixels)
        flat = rearrange(z, "b e r q -> (b r q) e").float()
        vectors, codes = (flat, flat.new_zeros(0, dtype=torch.long)) if plain else tokenizer.quantize(flat)
        guess = tokenizer.pixels(rearrange(vectors, "(b r q) e -> b e r q", r=z.shape[2], q=z.shape[3]))
    error = (guess.float() - pixels).abs()
    reconstruction = ((error + error.square()) * weight).mean() / weight.mean()
    commitment = torch.zeros(())
    if not plain and isinstance(tokenizer.quantize, VectorQuantizer):
        commitment = (flat - vectors.detach()).square().sum(dim=1).mean()
    return _Pass(reconstruction, commitment, flat.detach(), codes)


def train_tokenizer(
    episode_files: Sequence[Path | str] | Sequence[Frames],
    config: ImageTokenizerConfig,
    out_dir: Path | str,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    foreground_weight: float = 4.0,
    seed: int = 0,
    num_threads: int = 2,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    max_frames: int = 60_000,
    init_from: Path | str | None = None,
) -> dict[str, Any]:
    """Train, save to `out_dir` (and metrics.jsonl, report/ there), return the report's numbers.

    A step takes `batch_size` frames of every view. Give the budget as `minutes`, or as `steps` for a
    result that repeats. `foreground_weight`: how much more a foreground pixel counts than the table.
    `init_from`: the directory of a tokenizer of the same config to go on from, at a gentle `learning_rate`:
    its codes then keep about what they mean, and a model of them may be trained on (train/build.py).
    """
    if (minutes is None) == (steps is None):
        raise ValueError(f"give either minutes or steps, got minutes={minutes} and steps={steps}")
    torch.set_num_threads(num_threads)
    torch.manual_seed(seed)
    views = [f for f in episode_files if isinstance(f, Frames)] or load_frames(
        [f for f in episode_files if not isinstance(f, Frames)], max_frames=max_frames, seed=seed
    )
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer, ancestors = ImageTokenizer(config), list[str]()
    if init_from is not None:
        parent = ImageTokenizer.load(init_from)
        if parent.config != config:
            raise ValueError(
                f"init_from: {init_from} has the config {parent.config}, asked for {config}: give its own"
            )
        tokenizer.load_state_dict(parent.state_dict())
        ancestors = [parent.digest(), *lineage(init_from)]
    quantizer = tokenizer.quantize
    book = CodebookTrainer(quantizer, seed) if isinstance(quantizer, VectorQuantizer) else None
    weights = [p for p in tokenizer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    generator = torch.Generator().manual_seed(seed)
    plain = book is not None and init_from is None
    recent: list[Tensor] = []  # latents of the plain phase's last batches, for k-means
    window: list[Tensor] = []
    start, step, done = time.monotonic(), 0, 0.0
    with (out_dir / "metrics.jsonl").open("w") as log, progress_bar() as progress:
        bar = progress.add_task("image tokenizer", total=1.0)
        while done < 1.0:
            if plain and book is not None and done >= PLAIN_SHARE and recent:
                book.start(torch.cat(recent))
                plain = False
            rate = learning_rate * min(1.0, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            passes = []
            for frames in views:
                rows = torch.randint(len(frames.train), (batch_size,), generator=generator)
                pixels = to_pixels(frames.train[rows])
                weight = 1.0 + foreground_weight * foreground(pixels, frames.background)
                passed = _forward(tokenizer, pixels, weight, plain=plain, dtype=dtype)
                (passed.reconstruction + COMMITMENT * passed.commitment).backward()
                passes.append(passed)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            latents = torch.cat([p.latents_NE for p in passes])
            codes = torch.cat([p.codes_N for p in passes])
            if plain:
                recent = [*recent, latents][-16:]
            elif book is not None:
                book.update(latents, codes, revive=done < REVIVE_SHARE)
            window = [*window, codes][-_METRIC_STEPS:]
            step += 1
            elapsed = time.monotonic() - start
            done = step / steps if steps is not None else elapsed / (60 * (minutes or 1.0))
            if step % 10 == 0 or done >= 1.0:
                losses = {
                    name: sum(getattr(p, name).item() for p in passes) / len(passes)
                    for name in ("reconstruction", "commitment")
                }
                told = f"image tokenizer  step {step}  loss {losses['reconstruction']:.4f}"
                progress.update(bar, completed=min(done, 1.0), description=told)
                if step % _METRIC_STEPS == 0 or done >= 1.0:
                    speed = round(step * batch_size * len(views) / elapsed, 1)
                    row = {"step": step, "seconds": round(elapsed, 1), "lr": rate, "frames_per_second": speed}
                    log.write(json.dumps(row | losses | code_use(torch.cat(window), config)) + "\n")
                    log.flush()
    tokenizer.eval().requires_grad_(False).save(out_dir)
    settings = {"minutes": minutes, "batch_size": batch_size, "learning_rate": learning_rate, "dtype": dtype}
    settings |= {"foreground_weight": foreground_weight, "seed": seed, "steps": step}
    settings |= {"init_from": ancestors}
    record = {"train": settings, "config": to_json(config), **report(tokenizer, views, out_dir / "report")}
    write_json(out_dir / "report" / "report.json", record, indent=2)
    return record


def lineage(directory: Path | str) -> list[str]:
    """Return the digests of the image tokenizers that the one in `directory` was trained on from."""
    path = Path(directory) / "report" / "report.json"
    return read_json(path).get("train", {}).get("init_from", []) if path.is_file() else []


def code_use(codes: Int[Tensor, "..."], config: ImageTokenizerConfig) -> dict[str, float]:
    """Return the share of codes that occur, and the perplexity (exp of the entropy: equally likely codes)."""
    if not codes.numel():
        return {"used": 0.0, "perplexity": 0.0}
    share = torch.bincount(codes.flatten(), minlength=config.num_codes).float() / codes.numel()
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return {"used": (share > 0).float().mean().item(), "perplexity": entropy.exp().item()}


def _psnr(error: Tensor, weight: Tensor) -> float:
    """Return dB for squared errors on the scale of [0, 1], averaged under `weight`."""
    return -10 * math.log10(max(1e-10, ((error * weight).sum() / weight.sum().clamp(min=1e-6)).item()))


def report(
    tokenizer: ImageTokenizer, views: list[Frames], out_dir: Path, max_frames: int = 512
) -> dict[str, Any]:
    """Measure held-out frames; write index.html and a picture a view (originals above reconstructions)."""
    result: dict[str, Any] = {"views": {}, "digest": tokenizer.digest()}
    body = ""
    for frames in views:
        images = frames.val[torch.linspace(0, len(frames.val) - 1, min(max_frames, len(frames.val))).long()]
        codes = torch.cat([tokenizer.encode(part) for part in images.split(64)])
        guesses = torch.cat([tokenizer.decode(part) for part in codes.split(64)])
        pixels = to_pixels(images)
        error = ((to_pixels(guesses) - pixels) / 2).square().mean(dim=1, keepdim=True)
        numbers = {"psnr": _psnr(error, torch.ones_like(error))}
        numbers["psnr_foreground"] = _psnr(error, (foreground(pixels, frames.background) >= 1.0).float())
        numbers |= code_use(codes, tokenizer.config) | {"frames": float(len(images))}
        result["views"][frames.view] = numbers
        chosen = torch.linspace(0, len(images) - 1, min(12, len(images))).long()
        sheet = rearrange(torch.stack([images[chosen], guesses[chosen]]), "two n y x c -> (two y) (n x) c")
        scale = max(1, 192 // images.shape[1])
        _write_png(
            out_dir / f"{frames.view}.png", sheet.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        )
        if frames.background is not None:
            background = to_images(frames.background[None])[0]
            _write_png(out_dir / f"{frames.view}_background.png", background)
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


def _write_png(path: Path, image: Tensor) -> None:
    with whole_file(path) as scratch:
        Image.fromarray(image.numpy()).save(scratch, format="png")
