"""A transformer whose blocks are compiled, for decoding: `Runner(model, compiled)`.

In few kernels, the products of one input in one; the same numbers up to rounding, after some seconds of
compiling. `python -m paper.bench --compile` measures it. Dims: B batch, T positions, D width, F features of
joined products.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldvla.model.transformer import MLP, Attention, Block, Transformer


class _JoinedLinear(nn.Module):
    """A part of a block whose `layers` read the same input: one product in place of several."""

    def __init__(self, part: nn.Module, *layers: nn.Linear) -> None:
        nn.Module.__init__(self)  # not the part's own, whose weights are there already
        self.__dict__.update(part.__dict__)
        self.sizes = [layer.out_features for layer in layers]
        with torch.inference_mode(False):  # a model that decoded may be trained on
            self.joined_FD = torch.cat([layer.weight.detach() for layer in layers])
            for layer, view_FD in zip(layers, self.joined_FD.split(self.sizes), strict=True):
                layer.weight.data = view_FD

    def project(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x_BTD, self.joined_FD).split(self.sizes, -1)


class JoinedAttention(_JoinedLinear, Attention):
    pass


class JoinedMLP(_JoinedLinear, MLP):
    pass


def compiled(model: Transformer, backend: str | Callable[..., Any] = "inductor") -> Transformer:
    """Return a twin of the model for inference, whose blocks are joined and compiled, once for all of them.

    It shares all memory with the model, whose parameters become views of the joined weights.
    """
    shared = [*model.parameters(), *model.buffers(), *(m for m in model.children() if m is not model.layers)]
    twin = copy.deepcopy(model, {id(part): part for part in shared})
    for block in twin.layers:
        assert isinstance(block, Block)
        attention, mlp = block.attention, block.mlp
        if type(attention.q) is type(mlp.gate) is nn.Linear:
            block.attention = JoinedAttention(attention, attention.q, attention.k, attention.v)
            block.mlp = JoinedMLP(mlp, mlp.gate, mlp.up)
        block.compile(backend=backend, dynamic=True)
    return twin
