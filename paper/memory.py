"""Bytes of weights, gradients and AdamW's moments in every mode, counted on models without memory; ends with
one JSON line.

Run: python -m paper.memory   (or: python -m paper.memory tabletop --lora-rank 8)

Counted are tensors with the shapes and types of the real ones (train/build.py, infer/model.py). `copies`:
bfloat16 copies of float32 matrices that autocast keeps for the backward pass, where layers are not computed
again. `inputs`: what that keeps of one sample, the input of each layer. Not counted: everything else that the
backward pass needs, CUDA's own memory, keys and values. `measured` (--measure, on a CUDA device): the most
that was allocated over two steps on one sample or one pass, weights drawn; empty where it did not fit.
"""

import gc
import json
import sys
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from worldvla.config import Config, LoraConfig
from worldvla.machine import provenance
from worldvla.model.mask import dense_mask
from worldvla.model.quantize import Form
from worldvla.model.transformer import Transformer
from worldvla.model.weights import assign, empty_model
from worldvla.recipes import recipe
from worldvla.train.build import held, trainable
from worldvla.train.optim import build_optimizers
from worldvla.vocab import chameleon, compact

COLUMNS = ("weights", "copies", "gradients", "moments", "inputs", "total", "measured")
NUM_PREDICTED = 90
INFERENCE: dict[str, tuple[torch.dtype, Form | None]] = {
    "infer float32": (torch.float32, None),
    "infer bfloat16": (torch.bfloat16, "bfloat16"),
    "infer int8": (torch.bfloat16, "int8"),
    "infer int4": (torch.bfloat16, "int4"),
}
"""Name -> type of the small tensors, form of the large matrices."""


def training(config: Config, vocab_size: int) -> dict[str, int]:
    """Return the bytes that `worldvla train` needs with these settings, by COLUMNS."""
    model = _trained(config, vocab_size)
    matrices = [p for p in model.parameters() if p.ndim == 2 and p.dtype == torch.float32]
    embeddings = {id(model.embed.weight)}
    copied = sum(2 * p.numel() for p in matrices if id(p) not in embeddings)
    has_copies = config.train.dtype == "bfloat16" and not config.train.checkpoint_layers
    inputs = 4 * config.data.sequence_length * config.model.width * config.model.num_layers
    return _summed(
        **held(model),
        copies=copied if has_copies else 0,
        inputs=inputs if config.train.checkpoint_layers else 0,
    )


def inference(config: Config, vocab_size: int, dtype: torch.dtype, form: Form | None) -> dict[str, int]:
    """Return the bytes of a model that acts or imagines in `dtype`, its large matrices held in `form`."""
    model = _loaded(config, vocab_size, dtype, form)
    return _summed(weights=held(model)["weights"])


def measured(model: Transformer, config: Config, dtype: torch.dtype | None) -> int | None:
    """Return the most bytes that a CUDA device holds of `model` (on the meta device; its weights are drawn)
    over two training steps of one sample of config.data.sequence_length tokens, 90 of them predicted, or,
    with a `dtype`, one pass over them; None where they do not fit.
    """
    try:
        model = model.to_empty(device="cuda")
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.detach().normal_(0, 0.02) if tensor.is_floating_point() else tensor.random_(0, 100)
        torch.cuda.reset_peak_memory_stats()
        ids_BT = torch.randint(model.vocab_size, (1, config.data.sequence_length), device="cuda")
        mask, places = dense_mask(torch.zeros_like(ids_BT)), [torch.zeros_like(ids_BT)] * 2
        if dtype is not None:
            with torch.inference_mode():
                model.logits(model(ids_BT, mask, *places)[:, -NUM_PREDICTED:])
            return torch.cuda.max_memory_allocated()
        optimizers = build_optimizers(model, config.optim)
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                logits_BPV = model.logits(model(ids_BT, mask, *places)[:, -NUM_PREDICTED - 1 : -1])
            F.cross_entropy(logits_BPV.float().flatten(0, 1), ids_BT[0, -NUM_PREDICTED:]).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        return None


def modes(config: Config, vocab_size: int, rank: int, measure: bool = False) -> dict[str, dict[str, Any]]:
    """Return the bytes of every mode of docs/MODELS.md, with `measure` beside what a CUDA device held."""
    table: dict[str, dict[str, Any]] = {}
    for name, (again, lora) in training_modes(rank).items():
        settings = replace(config.train, checkpoint_layers=again, dtype="bfloat16")
        changed = replace(config, train=settings, lora=lora)
        table[name] = training(changed, vocab_size)
        if measure:
            table[name]["measured"] = measured(_trained(changed, vocab_size), changed, None)
            _release()
    for name, (dtype, form) in INFERENCE.items():
        table[name] = inference(config, vocab_size, dtype, form)
        if measure:
            table[name]["measured"] = measured(_loaded(config, vocab_size, dtype, form), config, dtype)
            _release()
    return table


def training_modes(rank: int) -> dict[str, tuple[bool, LoraConfig]]:
    """Return name -> whether layers are computed again, and what is trained."""
    return {
        "train all": (False, LoraConfig()),
        "train all, layers again": (True, LoraConfig()),
        "LoRA, bfloat16 base": (True, LoraConfig(rank=rank)),
        "LoRA, int4 base": (True, LoraConfig(rank=rank, base="int4")),
        "LoRA, int4, embed and head": (True, LoraConfig(rank=rank, base="int4", full=("embed", "head"))),
    }


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _trained(config: Config, vocab_size: int) -> Transformer:
    return trainable(_empty(config, vocab_size), config, None)


def _loaded(config: Config, vocab_size: int, dtype: torch.dtype, form: Form | None) -> Transformer:
    model = _empty(config, vocab_size)
    return assign(model, list(model.state_dict().items()), "meta", dtype, form)


def _empty(config: Config, vocab_size: int) -> Transformer:
    return empty_model(config.model, vocab_size, *config.layout.sizes)


def _summed(**parts: int) -> dict[str, int]:
    return parts | {"total": sum(parts.values())}


def main(name: Positional[str] = "libero_256_goal", lora_rank: int = 16, measure: bool = False) -> None:
    """Count the bytes of the recipe `name`; `measure`: on a CUDA device too."""
    config = recipe(name)
    vocab = chameleon() if config.vocab == "chameleon" else compact(8192, config.num_text)
    table, rows = Table("GB = 10^9 bytes", *COLUMNS), modes(config, vocab.size, lora_rank, measure)
    for mode, row in rows.items():
        table.add_row(mode, *(f"{row[c] / 1e9:.2f}" if row.get(c) else "" for c in COLUMNS))
    Console(file=sys.stderr, width=110).print(table)
    where = provenance() if measure else {}
    print(json.dumps({"memory": rows, "recipe": name, "lora_rank": lora_rank, **where}))


if __name__ == "__main__":
    tyro.cli(main)
