"""One frame of every view -> where the hand is, how far the gripper is open, whether it holds a thing.

    train_reader(files, ImageTokenizer.load(DIR), Path("reader.safetensors"))

PSNR forgives a hand that has vanished; this does not. The network is small and learns from real frames and
from the same frames through the image tokenizer, so that what it misses on imagined frames is not the
tokenizer's blur. Letters: B frames, Y X pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from worldvla.data.episode import Episode, read_episodes
from worldvla.files import (
    MANIFEST,
    check_digests,
    check_shapes,
    load_network,
    read_json,
    reading,
    save_network,
    write_digests,
)
from worldvla.machine import provenance
from worldvla.progress import progress_bar
from worldvla.tokenizers.image import ImageTokenizer, to_pixels

NAME = "reader.safetensors"
"""Where it stands beside a checkpoint, and what it is beside it in reader.json."""
CLIP, SHOWN_EVERY = 30, 4
"""Frames in a row, the first of which is the context of the tokenizer's decoder; it shows one of so many."""
HELD_OUT = 8
"""The first of so many episodes of a file, and so on, are not trained on."""
OPEN, SLOW = 4e-3, 5e-3
"""Metres: a gripper that is told to close holds a thing where it stays open by more than OPEN and closes by
less than SLOW in the step. It agrees with the contacts of both fingers in 97 % of tabletop's frames; the
others are the first of a grasp."""
BATCH, RATE = 64, 3e-3
WIDTHS = (24, 40, 32)
"""Channels of the convolutions of a view, the second of stride 2."""
NUM_READ = 5
"""x, y, z, opening, and the logit of holding."""

Frames = Mapping[str, np.ndarray]
"""view -> uint8 (B, Y, X, 3)."""


def opening(episode: Episode) -> np.ndarray:
    """Return the distance of the fingers, (T,) metres."""
    return episode.states[:, 6] - episode.states[:, 7]


def holding(episode: Episode) -> np.ndarray:
    """Return whether the hand holds a thing, (T,) bool, by its fingers and what they were told."""
    wide, closes = opening(episode), np.r_[False, episode.actions[:-1, 6] > 0]
    return closes & (wide > OPEN) & (np.diff(wide, prepend=wide[0]) > -SLOW)


class Tower(nn.Module):
    """Pixels of one view -> where each of the last features is (a mean of places under its softmax), and
    means of them over quarters of the picture."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.factor = max(2, rows // 32)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise([3 * self.factor**2, *WIDTHS])):
            layers += [nn.Conv2d(before, after, 3, 2 if i == 1 else 1, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])  # a softmax needs both signs
        self.sharpness = nn.Parameter(torch.ones(WIDTHS[-1]))

    def forward(self, pixels_BCYX: Tensor) -> Tensor:
        x = self.layers(F.pixel_unshuffle(pixels_BCYX, self.factor))
        rows, cols = (torch.linspace(-1, 1, side, device=x.device) for side in x.shape[2:])
        share = (x * self.sharpness[:, None, None]).flatten(2).softmax(-1).view_as(x)
        places = (share.sum(3) @ rows, share.sum(2) @ cols)
        return torch.cat((*places, F.adaptive_avg_pool2d(x.relu(), 2).flatten(1)), 1)


@dataclass(frozen=True)
class Reading:
    """What B frames show."""

    position: np.ndarray
    """Of the hand, (B, 3) metres."""
    opening: np.ndarray
    """Of the gripper, (B,) metres."""
    holds: np.ndarray
    """(B,) bool."""


class Reader(nn.Module):
    """`sizes`: view -> rows and columns of its frames in pixels."""

    def __init__(self, sizes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.sizes = {view: tuple(size) for view, size in sizes.items()}
        self.towers = nn.ModuleList(Tower(rows) for rows, _ in self.sizes.values())
        self.head = nn.Sequential(
            nn.Linear(6 * WIDTHS[-1] * len(self.sizes), 64), nn.ReLU(), nn.Linear(64, NUM_READ)
        )
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(NUM_READ - 1))
        self.register_buffer("std", torch.ones(NUM_READ - 1))

    def forward(self, pixels: Mapping[str, Tensor]) -> Float[Tensor, "B 5"]:
        """Return position and opening, standardised, and the logit of holding; `pixels`: in [-1, 1]."""
        seen = [tower(pixels[v]) for v, tower in zip(self.sizes, self.towers, strict=True)]
        return self.head(torch.cat(seen, 1))

    @torch.inference_mode()
    def read(self, frames: Frames) -> Reading:
        parts = []
        for start in range(0, len(next(iter(frames.values()))), 256):
            some = {v: torch.from_numpy(frames[v][start : start + 256]) for v in self.sizes}
            parts.append(self({v: to_pixels(images) for v, images in some.items()}))
        out = torch.cat(parts)
        metres = (out[:, :-1] * self.std + self.mean).numpy()
        return Reading(metres[:, :3], metres[:, 3], out[:, -1].numpy() > 0)

    def save(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Write the weights in half precision, and `facts` beside them as JSON."""
        tensors = {n: t.half() if t.is_floating_point() else t for n, t in self.state_dict().items()}
        save_network(path, tensors, {"views": self.sizes, **facts})

    @classmethod
    def load(cls, path: Path) -> "Reader":
        """Read what `save` wrote; in evaluation mode, without gradients."""
        facts, state = load_network(path, "`worldvla train-reader` makes a reader of frames")
        with reading(path.with_suffix(".json"), "facts of a reader", "train it again"):
            reader = cls(facts["views"])
        there, own = ({n: t.shape for n, t in table.items()} for table in (state, reader.state_dict()))
        check_shapes(path, there, own, "train it again")
        reader.load_state_dict(state)
        return reader.eval().requires_grad_(False)


@dataclass(frozen=True)
class Sights:
    """M frames and what they show."""

    images: dict[str, np.ndarray]
    """view -> uint8 (M, Y, X, 3)."""
    truth: np.ndarray
    """(M, 5) float32: position, opening, 1 where a thing is held."""
    is_shown: np.ndarray
    """(M,) bool: by the image tokenizer, else real."""
    is_held_out: np.ndarray
    """(M,) bool."""


def gather(files: Sequence[Path], tokenizer: ImageTokenizer, frames: int, seed: int) -> Sights:
    """Return a clip of every episode, from a step drawn by `seed`, of as many episodes as make about `frames`
    real frames, the files alike."""
    rng, parts = np.random.default_rng(seed), list[Sights]()
    num_episodes = max(2, -(-frames // (CLIP * len(files))))
    with progress_bar() as progress:
        for path in progress.track(files, description="frames to read"):
            for number, episode in enumerate(islice(read_episodes(path), num_episodes)):
                start = int(rng.integers(max(1, len(episode) - CLIP + 1)))
                truth = np.c_[episode.states[:, :3], opening(episode), holding(episode)].astype(np.float32)
                for is_shown, rows in enumerate(slice(start, start + CLIP, n) for n in (1, SHOWN_EVERY)):
                    images = {view: images[rows] for view, images in episode.images.items()}
                    if is_shown:
                        images = {view: tokenizer.reconstruct(real) for view, real in images.items()}
                    flags = (
                        np.full(len(truth[rows]), flag) for flag in (is_shown > 0, number % HELD_OUT == 0)
                    )
                    parts.append(Sights(images, truth[rows], *flags))
    if all(part.is_held_out.all() for part in parts):
        raise ValueError("the reader needs at least two episodes in a file, one to be held out: collect more")
    images = {view: np.concatenate([part.images[view] for part in parts]) for view in parts[0].images}
    names = ("truth", "is_shown", "is_held_out")
    return Sights(images, *(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def train_reader(
    files: Sequence[Path],
    tokenizer: ImageTokenizer,
    out: Path,
    *,
    frames: int = 15_000,
    steps: int = 2_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a reader, write it and its errors on held-out episodes to `out` and the JSON beside it; return
    the errors. Minutes on one core. Anything but a reader in their place raises ValueError."""
    about = out.with_suffix(".json")
    if out.suffix != ".safetensors" or out.is_dir():
        raise ValueError(f"{out} is no file for a reader: expected one such as {out / NAME}")
    if (out.exists() or about.exists()) and not (about.is_file() and "held_out" in read_json(about)):
        raise ValueError(
            f"{out} or {about.name} exists and is no reader: choose another name, such as {NAME}"
        )
    if min(frames, steps) < 1 or seed < 0:
        raise ValueError(f"expected frames and steps >= 1 and a seed >= 0, got {frames}, {steps} and {seed}")
    digests = read_json(out.parent / MANIFEST).get("sha256") if (out.parent / MANIFEST).is_file() else None
    if digests:  # a checkpoint, whose seal is renewed: what it has must be sound
        check_digests(out.parent, digests.keys() - {out.name, about.name})
    sights = gather(files, tokenizer, frames, seed)
    reader = fit(sights, steps, seed)
    reader.load_state_dict({n: t.half().to(t.dtype) for n, t in reader.state_dict().items()})  # as stored
    errors = {"real": measure(reader, sights, False), "shown": measure(reader, sights, True)}
    facts = {"errors": errors, "tokenizer": tokenizer.digest(), "steps": steps, "seed": seed}
    facts |= {"frames": len(sights.truth), "held_out": int(sights.is_held_out.sum())}
    reader.save(out, facts | provenance())
    if digests:
        write_digests(out.parent)
    return errors


def fit(sights: Sights, steps: int, seed: int = 0) -> Reader:
    """Return a reader after `steps` batches, half of them real frames."""
    rng, truth = np.random.default_rng(seed), torch.from_numpy(sights.truth)
    rows = np.flatnonzero(~sights.is_held_out)
    kinds = [rows[sights.is_shown[rows] == is_shown] for is_shown in (False, True)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reader = Reader({view: images.shape[1:3] for view, images in sights.images.items()})
        reader.mean.copy_(truth[rows, :-1].mean(0))
        reader.std.copy_(truth[rows, :-1].std(0).clamp_min(1e-3))
        optimizer = torch.optim.AdamW(reader.parameters(), RATE, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
        with progress_bar() as progress:
            for _ in progress.track(range(steps), description="train the reader"):
                drawn = np.concatenate([rng.choice(kind, BATCH // 2) for kind in kinds])
                images = {v: torch.from_numpy(sights.images[v][drawn]) for v in reader.sizes}
                wanted = truth[drawn]
                guess = reader({v: to_pixels(some) for v, some in images.items()})
                metres = (wanted[:, :-1] - reader.mean) / reader.std
                loss = F.smooth_l1_loss(guess[:, :-1], metres, beta=0.1)
                loss = loss + 0.1 * F.binary_cross_entropy_with_logits(guess[:, -1], wanted[:, -1])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return reader.eval()


def measure(reader: Reader, sights: Sights, is_shown: bool) -> dict[str, float]:
    """Return errors on held-out frames, real or shown by the tokenizer: of the hand (cm: median and 90th
    percentile), the opening (mm, median), and the share of frames read rightly as holding or not."""
    rows = sights.is_held_out & (sights.is_shown == is_shown)
    seen, truth = reader.read({v: sights.images[v][rows] for v in reader.sizes}), sights.truth[rows]
    hand = 100 * np.linalg.norm(seen.position - truth[:, :3], axis=1)
    numbers = {
        "hand_median_cm": np.median(hand),
        "hand_p90_cm": np.quantile(hand, 0.9),
        "opening_median_mm": 1000 * np.median(np.abs(seen.opening - truth[:, 3])),
        "holds_right": np.mean(seen.holds == truth[:, 4].astype(bool)),
    }
    return {name: round(float(value), 4) for name, value in numbers.items()}
