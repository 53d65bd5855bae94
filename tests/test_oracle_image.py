"""Hugging Face's ChameleonVQVAE and our image tokenizer give the same codes; decoder as restated.

pytest tests/test_oracle_image.py   (codes: skipped where `transformers` is not installed)
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from worldvla.config import ImageTokenizerConfig
from worldvla.tokenizers.image import ImageTokenizer, VectorQuantizer, to_images

SMALL = ImageTokenizerConfig(
    channel_mult=(1, 2, 1), num_res_blocks=1, z_channels=32, embed_dim=16, num_codes=500
)
CONFIGS = pytest.mark.parametrize("config", [SMALL, ImageTokenizerConfig()], ids=["small", "published"])


def build(config: ImageTokenizerConfig) -> ImageTokenizer:
    """Return a tokenizer with random weights, norms included, whose latents reach many codes."""
    tokenizer = ImageTokenizer(config).eval().requires_grad_(False)
    for name, parameter in tokenizer.named_parameters():
        if "norm" in name:
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    assert isinstance(tokenizer.quantize, VectorQuantizer)
    tokenizer.quantize.embedding.weight.normal_(std=0.3)
    return tokenizer


def photos(side: int, count: int = 2) -> Tensor:
    """Return uint8 frames (B, Y, X, 3) of smooth random colours with noise on them."""
    coarse = torch.rand(count, 3, 4, 4)
    smooth = F.interpolate(coarse, (side, side), mode="bilinear")
    noisy = (smooth + 0.1 * torch.randn(smooth.shape)).clamp(0, 1)
    return (noisy * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@CONFIGS
def test_codes_are_those_of_transformers(config: ImageTokenizerConfig) -> None:
    pytest.importorskip("transformers")
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

    ours = build(config)
    shape = {
        "base_channels": config.channels,
        "channel_multiplier": list(config.channel_mult),
        "num_res_blocks": config.num_res_blocks,
        "latent_channels": config.z_channels,
        "embed_dim": config.embed_dim,
        "num_embeddings": config.num_codes,
    }
    theirs = ChameleonVQVAE._from_config(ChameleonVQVAEConfig(**shape)).eval()
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith("decoder.")}
    theirs.load_state_dict(state)  # strict: the same names and shapes
    images = photos(48)
    with torch.no_grad():
        # In float64, as the published code computes them from numpy's grey levels.
        pixels = (images.permute(0, 3, 1, 2).double() / 255 * 2 - 1).float()
        expected = theirs.encode(pixels).image_tokens  # pyright: ignore[reportArgumentType]
    assert expected is not None
    codes = ours.encode(images)
    assert codes.flatten().tolist() == expected.tolist()
    assert len(codes.unique()) > 4


def plain_decoder(state: dict[str, Tensor], config: ImageTokenizerConfig, codes: Tensor) -> Tensor:
    """Return the published decoder's picture, from the state dict by name (chameleon_vae_ori/vqgan.py)."""

    def conv(x: Tensor, name: str, padding: int = 1) -> Tensor:
        return F.conv2d(x, state[name + ".weight"], state[name + ".bias"], padding=padding)

    def norm(x: Tensor, name: str) -> Tensor:
        batch, channels, rows, cols = x.shape
        grouped = x.reshape(batch, 32, -1)
        mean, variance = grouped.mean(-1, keepdim=True), grouped.var(-1, unbiased=False, keepdim=True)
        flat = ((grouped - mean) / (variance + 1e-6).sqrt()).reshape(batch, channels, rows, cols)
        return flat * state[name + ".weight"][:, None, None] + state[name + ".bias"][:, None, None]

    def swish(x: Tensor) -> Tensor:
        return x * x.sigmoid()

    def block(x: Tensor, name: str) -> Tensor:
        h = conv(swish(norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = conv(swish(norm(h, f"{name}.norm2")), f"{name}.conv2")
        return h + (conv(x, f"{name}.nin_shortcut", 0) if f"{name}.nin_shortcut.weight" in state else x)

    def attention(x: Tensor, name: str) -> Tensor:
        h = norm(x, f"{name}.norm")
        q, k, v = (conv(h, f"{name}.{part}", 0).flatten(2) for part in "qkv")
        weights = torch.einsum("bci,bcj->bij", q, k).div(x.shape[1] ** 0.5).softmax(-1)
        return x + conv(torch.einsum("bcj,bij->bci", v, weights).reshape(x.shape), f"{name}.proj_out", 0)

    x = state["quantize.embedding.weight"][codes].permute(0, 3, 1, 2)
    x = conv(conv(x, "post_quant_conv", 0), "decoder.conv_in")
    x = block(attention(block(x, "decoder.mid.block_1"), "decoder.mid.attn_1"), "decoder.mid.block_2")
    for level in reversed(range(len(config.channel_mult))):
        for index in range(config.num_res_blocks + 1):
            x = block(x, f"decoder.up.{level}.block.{index}")
        if level:
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"decoder.up.{level}.upsample.conv")
    return conv(swish(norm(x, "decoder.norm_out")), "decoder.conv_out")


@CONFIGS
def test_the_decoder_is_the_published_one(config: ImageTokenizerConfig) -> None:
    ours = build(config)
    codes = torch.randint(0, config.num_codes, (1, 2, 3))
    with torch.no_grad():
        expected = plain_decoder(ours.state_dict(), config, codes)
        got = ours.pixels(ours.codebook()[codes].permute(0, 3, 1, 2))
    assert got.std() > 0.05
    assert float((got - expected).abs().max()) < 1e-4
    frames = ours.decode(codes)
    assert frames.shape == (1, 2 * config.factor, 3 * config.factor, 3)
    assert (frames.int() - to_images(expected).int()).abs().max() <= 1
