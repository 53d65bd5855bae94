"""Bytes of weights, gradients and AdamW's moments in every mode, counted on models without memory; ends with
one JSON line.

Run: python tools/memory.py   (or: python tools/memory.py tabletop --lora-rank 8)

Counted are tensors with the shapes and types of the real ones (train/build.py, infer/load.py). `copies`:
bfloat16 copies of float32 matrices that autocast keeps for the backward pass, where layers are not computed
again. `inputs`: what that keeps of one sample, the input of each layer. Not counted: everything else that the
backward pass needs, CUDA's own memory, keys and values.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from worldvla.config import Config, LoraConfig
from worldvla.model.pretrained import assign, empty_model
from worldvla.model.quantize import Form
from worldvla.model.transformer import Transformer
from worldvla.recipes import recipe
from worldvla.train.build import trainable
from worldvla.vocab import chameleon, compact

COLUMNS = ("weights", "copies", "gradients", "moments", "inputs", "total")


def training(config: Config, vocab_size: int) -> dict[str, int]:
    """Return the bytes that `worldvla train` needs with these settings, by COLUMNS."""
    model = trainable(_empty(config, vocab_size), config, None)
    matrices = [p for p in model.parameters() if p.ndim == 2 and p.dtype == torch.float32]
    embeddings = {id(model.embed.weight)}
    copied = sum(2 * p.numel() for p in matrices if id(p) not in embeddings)
    has_copies = config.train.dtype == "bfloat16" and not config.train.checkpoint_layers
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    inputs = 4 * config.data.sequence_length * config.model.width * config.model.num_layers
    return _summed(
        weights=_bytes([*model.parameters(), *model.buffers()]),
        copies=copied if has_copies else 0,
        gradients=trained,
        moments=2 * trained,
        inputs=inputs if config.train.checkpoint_layers else 0,
    )


def inference(config: Config, vocab_size: int, dtype: torch.dtype, form: Form | None) -> dict[str, int]:
    """Return the bytes of a model that acts or imagines in `dtype`, its large matrices held in `form`."""
    model = _empty(config, vocab_size)
    model = assign(model, list(model.state_dict().items()), "meta", dtype, form)
    return _summed(weights=_bytes([*model.parameters(), *model.buffers()]))


def modes(config: Config, vocab_size: int, rank: int) -> dict[str, dict[str, int]]:
    """Return the bytes of every mode of docs/MODELS.md."""

    def train(again: bool, lora: LoraConfig) -> dict[str, int]:
        settings = replace(config.train, checkpoint_layers=again, dtype="bfloat16")
        return training(replace(config, train=settings, lora=lora), vocab_size)

    table = {
        "train all": train(False, LoraConfig()),
        "train all, layers again": train(True, LoraConfig()),
        "LoRA, bfloat16 base": train(True, LoraConfig(rank=rank)),
        "LoRA, int4 base": train(True, LoraConfig(rank=rank, base="int4")),
        "LoRA, int4, embed and head": train(True, LoraConfig(rank=rank, base="int4", full=("embed", "head"))),
        "infer float32": inference(config, vocab_size, torch.float32, None),
    }
    forms: tuple[Form, ...] = ("bfloat16", "int8", "int4")
    return table | {f"infer {f}": inference(config, vocab_size, torch.bfloat16, f) for f in forms}


def _empty(config: Config, vocab_size: int) -> Transformer:
    layout = config.layout
    sizes = vocab_size, layout.num_rows, layout.num_cols, layout.action_shape
    return empty_model(config.model, *sizes)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)


def _summed(**parts: int) -> dict[str, int]:
    return parts | {"total": sum(parts.values())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="libero_256_goal")
    parser.add_argument("--lora-rank", type=int, default=16)
    args = parser.parse_args()
    config = recipe(args.recipe)
    vocab = chameleon() if config.vocab == "chameleon" else compact(8192, config.num_text)
    table, rows = Table("GB = 10^9 bytes", *COLUMNS), modes(config, vocab.size, args.lora_rank)
    for name, row in rows.items():
        table.add_row(name, *(f"{row[c] / 1e9:.2f}" if row.get(c) else "" for c in COLUMNS))
    Console(file=sys.stderr, width=110).print(table)
    print(json.dumps({"memory": rows, "recipe": args.recipe, "lora_rank": args.lora_rank}))


if __name__ == "__main__":
    main()
