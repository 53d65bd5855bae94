"""The image tokenizer: a VQGAN autoencoder, from uint8 frames to codes and back; fully convolutional.

Module names are those of the published checkpoint (WorldVLA model/chameleon_vae_ori/vqgan.py), so that its
keys load as they are.

Shape letters: B frames, Y X pixels, R Q rows and columns of codes, E dims of a codebook vector, N vectors.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from worldvla.config import ImageTokenizerConfig, from_json, to_json
from worldvla.files import (
    ASSETS,
    DamagedFileError,
    check_shapes,
    load_tensors,
    read_json,
    reading,
    save_tensors,
    write_json,
)

PUBLISHED_LEVELS = torch.from_numpy(np.arange(256) / 255.0 * 2 - 1).float()
"""Grey level -> what the published encoder reads, computed in float64 as in WorldVLA's
chameleon/image_tokenizer.py. Half of them differ from `to_pixels` in the last bit, which flips a few codes.
"""


def to_pixels(images_BYXC: UInt8[Tensor, "B Y X 3"]) -> Float[Tensor, "B 3 Y X"]:
    """Return float32 in [-1, 1]."""
    return rearrange(images_BYXC, "b y x c -> b c y x").float() / 127.5 - 1.0


def to_images(pixels_BCYX: Float[Tensor, "B 3 Y X"]) -> UInt8[Tensor, "B Y X 3"]:
    """Return uint8, rounded (the published code truncates, so that 0..255 does not survive a round trip)."""
    images = ((pixels_BCYX.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    return rearrange(images, "b c y x -> b y x c").contiguous()


def _norm(channels: int) -> nn.GroupNorm:
    """32 groups as published, fewer where a group would hold less than 4 channels."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4)), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); a 1x1 shortcut where the width changes."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = _norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = (
            nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "b c r q -> b (r q) c") for f in (self.q, self.k, self.v))
        weights = (q @ k.transpose(1, 2) * x.shape[1] ** -0.5).softmax(dim=-1)
        h = rearrange(weights @ v, "b (r q) c -> b c r q", r=x.shape[2])
        return x + self.proj_out(h)


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Halve the sides; padded right and below only, as published."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the sides: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution and, but for the last level, the change to the next."""

    def __init__(self, widths: list[int], *, downsample: bool = False, upsample: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(widths))
        self.downsample = Downsample(widths[-1]) if downsample else nn.Identity()
        self.upsample = Upsample(widths[-1]) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.patch = config.patch
        widths = [config.channels * m for m in config.channel_mult]
        self.conv_in = nn.Conv2d(3 * config.patch**2, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        before = config.channels
        for i, width in enumerate(widths):
            blocks = [before] + [width] * config.num_res_blocks
            self.down.append(Level(blocks, downsample=i < len(widths) - 1))
            before = width
        self.mid = Middle(before)
        self.norm_out = _norm(before)
        self.conv_out = nn.Conv2d(before, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(x, self.patch))
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class CellEncoder(nn.Module):
    """An MLP on the pixels of each cell; cells do not see one another."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.side, width = config.factor, 2 * config.channels * config.channel_mult[-1]
        self.linear_in = nn.Linear(3 * self.side**2, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
            )
            for _ in range(1 + config.num_res_blocks)
        )
        self.linear_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.z_channels))

    def forward(self, x: Tensor) -> Tensor:
        cells = rearrange(x, "b c (r y) (q x) -> b r q (c y x)", y=self.side, x=self.side)
        h = self.linear_in(cells)
        for block in self.blocks:
            h = h + block(h)
        return rearrange(self.linear_out(h), "b r q z -> b z r q")


class Decoder(nn.Module):
    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.patch = config.patch
        widths = [config.channels * m for m in config.channel_mult]
        before = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, before, 3, padding=1)
        self.mid = Middle(before)
        levels = []
        for i in reversed(range(len(widths))):
            levels.append(Level([before] + [widths[i]] * (config.num_res_blocks + 1), upsample=i > 0))
            before = widths[i]
        self.up = nn.ModuleList(reversed(levels))  # up.0 is the finest, as published
        self.norm_out = _norm(before)
        self.conv_out = nn.Conv2d(before, 3 * config.patch**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch)


class ContextDecoder(nn.Module):
    """Codes' vectors and a real frame of the same clip -> pixels: each is copied from that frame or painted.

    What stands still is crisp whatever the codes hold. `widths`: at 1/2, 1/4, ... of the side.
    """

    def __init__(self, embed_dim: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        finest, coarsest = widths[0], widths[-1]
        self.conv_in = nn.Conv2d(embed_dim, coarsest, 3, padding=1)
        self.context_in = nn.Conv2d(3 * 4, finest, 3, padding=1)
        self.context = nn.ModuleList(ResnetBlock(width, width) for width in widths)
        self.context_down = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)
        )
        rising = (coarsest, *reversed(widths))
        joined = [(below + width, width) for below, width in pairwise(rising)]
        self.up = nn.ModuleList(nn.ModuleList((ResnetBlock(a, b), ResnetBlock(b, b))) for a, b in joined)
        self.norm_out = _norm(finest)
        self.conv_out = nn.Conv2d(finest, 4 * 4, 3, padding=1)

    def forward(
        self, vectors: Float[Tensor, "B E R Q"], context: Float[Tensor, "B 3 Y X"]
    ) -> Float[Tensor, "B 3 Y X"]:
        features = [self.context[0](self.context_in(F.pixel_unshuffle(context, 2)))]
        for down, block in zip(self.context_down, list(self.context)[1:], strict=True):
            features.append(block(down(features[-1])))
        x = self.conv_in(vectors)
        for level, seen in zip(self.up, reversed(features), strict=True):
            if level is not self.up[0]:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = torch.cat((x, seen), 1)
            for block in level:  # pyright: ignore[reportGeneralTypeIssues]
                x = block(x)
        out = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), 2)
        copied = torch.sigmoid(out[:, 3:])
        return copied * context + (1 - copied) * out[:, :3]


class VectorQuantizer(nn.Module):
    """Nearest of `num_codes` vectors, searched in float32 (half precision flips codes); never trained."""

    def __init__(self, num_codes: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / num_codes, 1.0 / num_codes)

    def vectors(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape E"]:
        return self.embedding(codes)

    @torch.no_grad()
    def codes(self, z_NE: Float[Tensor, "N E"]) -> Int[Tensor, " N"]:
        with torch.autocast(z_NE.device.type, enabled=False):
            z, book = z_NE.float(), self.embedding.weight.float()
            # |z|^2 is the same for every code, so it is left out of |z - e|^2.
            return torch.addmm(book.square().sum(1), z, book.T, alpha=-2.0).argmin(dim=1)


class FiniteScalarQuantizer(nn.Module):
    """Every dim rounded to one of a few levels (Mentzer et al. 2023, arXiv 2309.15505); nothing to learn."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.levels = levels

    def _table(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return levels (E,) and the place value (E,) of each digit of a code."""
        levels = torch.tensor(self.levels, device=like.device)
        return levels, torch.cumprod(levels, 0) // levels

    def _digits(self, z_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Return `z_NE` squashed to the levels' range, and the level of each dim as an integer >= 0."""
        levels, _ = self._table(z_NE)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(z_NE.float() + torch.atanh(offset / half)) * half - offset
        return bounded, bounded.detach().round() + levels // 2

    def vectors(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape E"]:
        levels, place = self._table(codes)
        return codes[..., None] // place % levels / (levels // 2) - 1.0

    @torch.no_grad()
    def codes(self, z_NE: Float[Tensor, "N E"]) -> Int[Tensor, " N"]:
        return (self._digits(z_NE)[1].long() * self._table(z_NE)[1]).sum(dim=1)

    def forward(self, z_NE: Float[Tensor, "N E"]) -> tuple[Float[Tensor, "N E"], Int[Tensor, " N"]]:
        """Return the rounded vectors in [-1, 1], whose gradient passes straight through, and their codes."""
        levels, place = self._table(z_NE)
        bounded, digits = self._digits(z_NE)
        rounded = digits - levels // 2
        quantized = (bounded + (rounded - bounded).detach()) / (levels // 2)
        return quantized, (digits.long() * place).sum(dim=1)


def folder_of(name: Path | str) -> Path:
    """Return the folder of the image tokenizer `name`: its own, a checkpoint's or a shipped model's name."""
    path = Path(name)
    known = path if path.exists() else ASSETS / path
    return known / "image_tokenizer" if (known / "image_tokenizer").is_dir() else path


class ImageTokenizer(nn.Module):
    """Frames to codes and back. A code stands for `config.factor` pixels a side."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = CellEncoder(config) if config.encoder == "cell" else Encoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        if config.quantizer == "fsq":
            self.quantize = FiniteScalarQuantizer(config.fsq_levels)
        else:
            self.quantize = VectorQuantizer(config.num_codes, config.embed_dim)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.decoder: Decoder | ContextDecoder | None = (
            ContextDecoder(config.z_channels, config.context_widths)
            if config.context_widths
            else Decoder(config)
        )
        """None: published weights without one; frames become codes, codes no frames."""
        self.ancestors: tuple[str, ...] = ()
        """Digests of the tokenizers that this one goes on from: its codes mean about what theirs do."""

    @property
    def num_codes(self) -> int:
        return self.config.num_codes

    @property
    def factor(self) -> int:
        return self.config.factor

    @property
    def grey_levels(self) -> Literal["float64", "float32"]:
        """By which rule grey levels become pixels: float64 is the published one, float32 that of our own."""
        return "float64" if self.config.quantizer == "vq" else "float32"

    def latents(self, pixels_BCYX: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B E R Q"]:
        """Return the encoder's vectors before quantising."""
        rows, cols = pixels_BCYX.shape[2:]
        factor = self.config.factor
        if rows % factor or cols % factor:
            raise ValueError(
                f"image of {rows}x{cols} pixels; the tokenizer needs multiples of {factor}: resize or crop it"
            )
        return self.quant_conv(self.encoder(pixels_BCYX))

    def pixels(
        self, vectors_BERQ: Float[Tensor, "B E R Q"], context: Float[Tensor, "B 3 Y X"] | None = None
    ) -> Float[Tensor, "B 3 Y X"]:
        """Return the decoder's picture of quantised vectors, nominally in [-1, 1]. `context`: a frame of the
        same clip in [-1, 1], for a decoder that reads one; grey where there is none."""
        if self.decoder is None:
            raise ValueError(
                "this image tokenizer has no decoder, so codes cannot be shown: convert with the published "
                "vqgan.ckpt (--tokenizer)"
            )
        vectors = self.post_quant_conv(vectors_BERQ)
        if isinstance(self.decoder, Decoder):
            return self.decoder(vectors)
        if context is None:
            rows, cols = (side * self.config.factor for side in vectors.shape[2:])
            context = vectors.new_zeros(len(vectors), 3, rows, cols)
        return self.decoder(vectors, context)

    @torch.no_grad()
    def encode(self, images: UInt8[Tensor, "B Y X 3"]) -> Int[Tensor, "B R Q"]:
        """Return codes, int64 in [0, num_codes); always in float32."""
        if self.config.encoder == "cell":
            return self._encode_cells(images)
        return self._encode(images)

    def _encode(self, images: UInt8[Tensor, "B Y X 3"]) -> Int[Tensor, "B R Q"]:
        with torch.autocast(images.device.type, enabled=False):
            if self.grey_levels == "float64":
                levels = PUBLISHED_LEVELS.to(images.device)[images.int()]
                z = self.latents(rearrange(levels, "b y x c -> b c y x"))
            else:
                z = self.latents(to_pixels(images))
        codes = self.quantize.codes(rearrange(z, "b e r q -> (b r q) e"))
        return rearrange(codes, "(b r q) -> b r q", r=z.shape[2], q=z.shape[3])

    def _encode_cells(self, images: UInt8[Tensor, "B Y X 3"]) -> Int[Tensor, "B R Q"]:
        """Encode cells that differ from the same cell of the frame before; the others have its code."""
        side = self.config.factor
        if images.shape[1] % side or images.shape[2] % side:
            return self._encode(images)  # which says what is wrong
        cells = rearrange(images, "b (r y) (q x) c -> (r q) b y x c", y=side, x=side)
        is_new_NB = torch.ones(cells.shape[:2], dtype=torch.bool, device=images.device)
        is_new_NB[:, 1:] = (cells[:, 1:] != cells[:, :-1]).flatten(2).any(-1)
        codes = self._encode(cells[is_new_NB]).flatten()
        codes_NB = codes[is_new_NB.flatten().cumsum(0) - 1].view_as(is_new_NB)
        return rearrange(codes_NB, "(r q) b -> b r q", r=images.shape[1] // side)

    @torch.no_grad()
    def decode(
        self, codes: Int[Tensor, "B R Q"], context: UInt8[Tensor, "B Y X 3"] | None = None
    ) -> UInt8[Tensor, "B Y X 3"]:
        """Return the frames that codes stand for. `context`: see `pixels`."""
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < self.num_codes):
            raise ValueError(
                f"codes {int(codes.min())} to {int(codes.max())}; this tokenizer has 0..{self.num_codes - 1}"
            )
        vectors = self.quantize.vectors(codes.long())
        with torch.autocast(codes.device.type, enabled=False):
            pixels = None if context is None else to_pixels(context)
            return to_images(self.pixels(rearrange(vectors, "b r q e -> b e r q"), pixels))

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Return the frames of a clip, uint8 (B, Y, X, 3), after encoding and decoding; the context of all is
        the first."""
        frames = torch.from_numpy(np.ascontiguousarray(images)).to(self.quant_conv.weight.device)
        return self.decode(self.encode(frames), frames[:1].expand_as(frames)).cpu().numpy()

    def codebook(self) -> Float[Tensor, "num_codes E"]:
        """Return the vector of every code, detached."""
        device = self.quant_conv.weight.device
        return self.quantize.vectors(torch.arange(self.num_codes, device=device)).detach()

    def save(self, directory: Path | str) -> None:
        """Write config.json, model.safetensors and ancestors.json, which has a digest of all, each whole.

        Weights that half precision holds exactly are stored in it.
        """
        directory = Path(directory)
        tensors = {name: _narrow(value) for name, value in self.state_dict().items()}
        save_tensors(directory / "model.safetensors", tensors)
        write_json(directory / "config.json", to_json(self.config), indent=2)
        write_json(directory / "ancestors.json", {"ancestors": self.ancestors, "sha256": self._seal()})

    @classmethod
    def load(cls, directory: Path | str) -> "ImageTokenizer":
        """Read what `save` wrote, or the image tokenizer of a checkpoint, shipped ones by name (`tabletop`);
        in evaluation mode, without gradients."""
        directory = folder_of(directory)
        for name in ("config.json", "model.safetensors"):
            if not (directory / name).is_file():
                raise FileNotFoundError(
                    f"{directory} is no image tokenizer: {name} is missing; train one, or give the folder of "
                    "a checkpoint, or the name of a shipped model, such as tabletop"
                )
        path = directory / "config.json"
        config = from_json(ImageTokenizerConfig, read_json(path), str(path))
        weights = directory / "model.safetensors"
        tokenizer = cls.of(config, load_tensors(weights), weights, "restore the one of this config.json")
        tokenizer.ancestors, seal = _ancestors(directory)
        if seal not in (None, tokenizer._seal()):
            raise DamagedFileError(
                f"{directory} is not as it was written (SHA-256): copy the image tokenizer again"
            )
        return tokenizer

    @classmethod
    def of(
        cls, config: ImageTokenizerConfig, state: Mapping[str, Tensor], where: Path | str, fix: str
    ) -> "ImageTokenizer":
        """Return a tokenizer of these weights, in float32, without gradients; without a decoder where they
        have none. Others than the config's raise ValueError with `where` they are from and the `fix`."""
        tokenizer = cls(config)
        if not any(name.startswith("decoder.") for name in state):
            tokenizer.decoder = None
        check_shapes(where, state, tokenizer.state_dict(), fix)
        tokenizer.load_state_dict(state)  # copies: what was read may be a file that changes
        return tokenizer.eval().requires_grad_(False)

    def _seal(self) -> str:
        return hashlib.sha256(" ".join([self.digest(), *self.ancestors]).encode()).hexdigest()

    def digest(self) -> str:
        """Return 16 hex digits that change with any weight or setting."""
        settings = to_json(self.config)
        for name, first in (("encoder", "vqgan"), ("context_widths", ())):  # as when digests began
            if settings[name] == first:
                del settings[name]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def _narrow(value: Tensor) -> Tensor:
    half = value.half()
    return half if torch.equal(half.float(), value) else value


def _ancestors(directory: Path) -> tuple[tuple[str, ...], str | None]:
    """Return the ancestors of a tokenizer and the digest of it and them; None: there is no file of them."""
    path = directory / "ancestors.json"
    if not path.is_file():
        return (), None
    with reading(path, "list of ancestors", "copy the image tokenizer again"):
        told = read_json(path)
        if told.keys() != {"ancestors", "sha256"}:
            raise ValueError(f"keys {sorted(told)}, expected ancestors and sha256")
        return tuple(map(str, told["ancestors"])), str(told["sha256"])
