"""Weights of the blocks' linear layers in 8 or 4 bits, for cards that the 7B would not fit; the rest stays.

int8: one scale a row. int4: one a group of 32 inputs, two weights a byte: 4.5 bits a weight. Both symmetric,
the largest value of a group at the low end of the codes. A product first widens the matrix, so this saves
memory, not time. (torchao 0.18 has the same int8; its 4 bits need CUDA, and take a byte a weight on a CPU.)
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Form = Literal["float32", "bfloat16", "int8", "int4"]
GROUP = 32


class QuantizedLinear(nn.Module):
    """A frozen linear layer without bias whose weight (out, in) is held in `form`, "int8" or "int4"."""

    def __init__(self, weight_OI: Tensor, form: Form) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        size = self.in_features if form == "int8" else math.gcd(GROUP, self.in_features)
        if form == "int4" and size % 2:
            raise ValueError(f"int4 holds two weights a byte, here are {self.in_features} inputs: use int8")
        lowest, scale_dtype = (-8, torch.bfloat16) if form == "int4" else (-127, torch.float32)
        groups = weight_OI.detach().float().unflatten(1, (-1, size))
        scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / lowest
        scale = scale.to(scale_dtype)
        codes = (groups / torch.where(scale == 0, 1.0, scale.float())).round()
        codes = codes.clamp(lowest, 7 if form == "int4" else 127).flatten(1)
        if form == "int4":
            nibbles = (codes + 8).to(torch.uint8)
            codes = nibbles[:, ::2] | nibbles[:, 1::2] << 4
        self.codes = nn.Buffer(codes.to(torch.int8 if form == "int8" else torch.uint8))
        self.scale = nn.Buffer(scale)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in)."""
        codes = self.codes
        if codes.dtype == torch.uint8:
            codes = torch.stack((codes & 15, codes >> 4), -1).to(torch.int8) - 8
        groups = codes.view(self.out_features, self.scale.shape[1], -1)
        return (groups.float() * self.scale.float()).to(dtype).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    """x W^T; the wide W is made again for the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        dtype = compute_dtype(x)
        return F.linear(x.to(dtype), layer.dense(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return (grads[0] @ ctx.layer.dense(grads[0].dtype)).to(ctx.dtype), None


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which matrix products of `x` run: that of autocast where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def rounded(weight_OI: Tensor, form: Form) -> Tensor:
    """Return the weight as it is after being held in `form`, float32."""
    if form in ("int8", "int4"):
        return QuantizedLinear(weight_OI, form).dense(torch.float32)
    return weight_OI.to(getattr(torch, form)).float()


def num_bytes(shape: tuple[int, ...], form: Form) -> int:
    """Return the bytes of a matrix (out, in) held in `form`."""
    if form in ("int8", "int4"):
        with torch.device("meta"):
            return sum(b.nbytes for b in QuantizedLinear(torch.empty(shape), form).buffers())
    return math.prod(shape) * getattr(torch, form).itemsize
