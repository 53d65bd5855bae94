"""Low-rank updates of a frozen model: added for training, stored alone, merged when read (LoRA, 2106.09685).

    adapted = add_updates(model, config.lora, seed)           W stays, B A is trained
    shapes, tensors = merged(adapters, base, config.lora)     W + alpha / rank * B A, plain names

The base is rounded to `lora.base` before the update is added, as in training: merged is what was trained.
"""

from collections.abc import Container, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldvla.config import LoraConfig
from worldvla.files import read_json
from worldvla.model.quantize import QuantizedLinear, rounded
from worldvla.model.transformer import Transformer
from worldvla.model.weights import header, is_block_matrix, read_tensor


class LoraLinear(nn.Module):
    """A frozen linear layer and its update: x -> base(x) + scale * (x A^T) B^T. B starts at zero."""

    def __init__(self, base: nn.Module, num_in: int, num_out: int, config: LoraConfig) -> None:
        super().__init__()
        self.base, self.scale = base, config.alpha / config.rank
        self.a = nn.Parameter(torch.empty(config.rank, num_in))
        self.b = nn.Parameter(torch.zeros(num_out, config.rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(x, self.a), self.b)


def add_updates(model: Transformer, config: LoraConfig, seed: int) -> Transformer:
    """Freeze `model`, wrap its target layers and unfreeze what is trained whole, an action head always.

    A is uniform in +-fan_in ** -0.5, as an untrained linear layer; the same for the same seed.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    device = model.embed.weight.device
    for name, layer in list(model.layers.named_modules()):
        if name.rpartition(".")[2] not in config.targets or not isinstance(
            layer, nn.Linear | QuantizedLinear
        ):
            continue
        with torch.device(device):
            updated = LoraLinear(layer, layer.in_features, layer.out_features, config)
        with torch.no_grad():
            noise = torch.rand(updated.a.shape, generator=generator)
            updated.a.copy_((2 * noise - 1) * layer.in_features**-0.5)
        model.layers.set_submodule(name, updated)
    whole = [model.get_submodule(name) for name in config.full]
    for module in (*whole, model.action_head):
        if module is not None:
            module.requires_grad_(True)
    return model


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that a checkpoint holds, by name: all, or with updates what is trained alone."""
    has_updates = any(isinstance(module, LoraLinear) for module in model.modules())
    named = model.named_parameters()
    return {name: p.detach() for name, p in named if p.requires_grad or not has_updates}


def refuse_updates(path: Path) -> None:
    """Raise ValueError if a checkpoint holds updates alone: what needs whole weights says so."""
    if "base" in read_json(path / "manifest.json"):
        raise ValueError(f"{path} holds updates alone: `worldvla export {path} --out DIR` merges them")


def merged(
    adapters: Path, base: Path, config: LoraConfig
) -> tuple[dict[str, tuple[int, ...]], Iterator[tuple[str, Tensor]]]:
    """Return what `read_tensors` does, of the plain model; matrices of blocks in float32."""
    updates = header(adapters)[0]
    shapes = header(base)[0] | {n: s for n, s in updates.items() if not n.endswith((".a", ".b"))}
    return shapes, _merge(shapes, updates, adapters, base, config)


def _merge(
    names: Iterable[str], stored: Container[str], adapters: Path, base: Path, config: LoraConfig
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        layer = name.removesuffix(".weight")
        if name in stored:
            yield name, read_tensor(adapters, name)
            continue
        tensor = read_tensor(base, name)
        if is_block_matrix(name, tensor.shape):
            tensor = rounded(tensor, config.base)
        if f"{layer}.a" in stored:
            a_RI, b_OR = (read_tensor(adapters, f"{layer}.{part}") for part in "ab")
            tensor = tensor + config.alpha / config.rank * (b_OR @ a_RI)
        yield name, tensor
