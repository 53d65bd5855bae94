"""Speed of a training step, beside transformers' Chameleon on the same batch in the same run; ends with one
JSON line.

Run: python -m paper.bench_train --sizes 25m
(several GPUs: torchrun --nproc-per-node 8 -m paper.bench_train --sizes 7b --device cuda --shard 8)

Both train random weights, the same ones, on the same policy samples, with the same additive mask, the same
targets, autocast type and fused AdamW, and their first losses must agree. A sample has the published layout
at 256 pixels, two frames, K = 10; of size 3m the layout of the tabletop recipe, without its place embeddings,
which Chameleon has not. `tokens_s`: tokens of the batch a second. `mfu`: operations of the model (3 x
Transformer.flops, logits where a target is) a second, as a part of what one large product of the same type
reaches in the same run. `peak_mb`: held at most during a step, weights and moments included.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from paper.bench import ON_GPU, SIZES, peak_mb, synchronize, timed
from worldvla.batch import KIND_PROMPT, Batch
from worldvla.config import Config, LayoutConfig, LossConfig, OptimConfig, TrainConfig
from worldvla.data.show import fake
from worldvla.machine import find_device, matmul_rate, provenance
from worldvla.model.mask import additive_mask, dense_mask
from worldvla.model.transformer import Transformer
from worldvla.recipes import recipe
from worldvla.train import parallel
from worldvla.train.loop import make_forward
from worldvla.train.loss import Loss
from worldvla.train.optim import build_optimizers
from worldvla.vocab import Vocab

OPTIM = OptimConfig(learning_rate=1e-4, clip=1.0)
COLUMNS = ("step_ms", "tokens_s", "mfu", "peak_mb", "first_loss")


def case(size: str, rows: int, train: TrainConfig) -> tuple[Config, Vocab, Batch]:
    """Return the config of a size, its vocabulary and a batch of `rows` policy samples, all as long."""
    config = recipe("tabletop" if size == "3m" else "libero_256_goal")
    layout = config.layout if size == "3m" else LayoutConfig(chunk=10)
    shape = config.model if size == "3m" else SIZES[size]
    shape = replace(shape, place_embedding=False, dropout=0.0)
    config = replace(config, layout=layout, model=shape, train=train, loss=LossConfig(z_weight=0.0))
    samples = [fake(config, "policy", seed) for seed in range(rows)]
    vocab = samples[0][0].vocab
    return config, vocab, Batch.stack([sample for _, sample in samples], vocab.pad)


def our_step(config: Config, vocab: Vocab, batch: Batch, model: Transformer) -> Callable[[], float]:
    """Return a call that trains `model` a step on this rank's rows of `batch` and returns the loss of all."""
    loss, dtype = Loss(config.loss, vocab), config.train.dtype
    forward, optimizers = make_forward(model, dtype, None), build_optimizers(model, OPTIM)
    totals = loss.totals([loss.targets(batch)])
    (own,) = parallel.own_rows([batch], together=True)
    targets = loss.targets(own)
    autocast = partial(torch.autocast, batch.ids_BT.device.type, torch.bfloat16, dtype == "bfloat16")

    def step() -> float:
        with autocast():
            x_PD, _ = forward(own, targets)
            value, _ = loss(x_PD, model.head.weight, targets, totals)
        value.backward()
        (total,) = parallel.sum_gradients(model, float(value.detach()))
        parallel.clip_gradients(model, OPTIM.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total

    return step


def their_step(config: Config, batch: Batch, ours: Transformer) -> Callable[[], float]:
    """Return the same of transformers' Chameleon, with the weights of `ours`."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from oracle import hub_config, published_state  # pyright: ignore[reportMissingImports]
    from transformers import ChameleonForConditionalGeneration

    device, dtype = batch.ids_BT.device, config.train.dtype
    more = {"vocab_size": ours.vocab_size, "attn_implementation": "sdpa", "vocabulary_map": {"<image>": 0}}
    settings = hub_config(ours.config, **more)
    with torch.device(device):
        theirs: Any = ChameleonForConditionalGeneration(settings)
    theirs.load_state_dict(published_state(ours), strict=False)
    theirs.model.vqmodel.requires_grad_(False)
    theirs.train()
    mask_type = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    mask = additive_mask(dense_mask(batch.chunk_BT), mask_type)
    labels = batch.ids_BT.masked_fill(batch.kind_BT == KIND_PROMPT, -100)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": OPTIM.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.learning_rate, betas=OPTIM.betas, fused=True)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, dtype == "bfloat16"):
            inputs = {"input_ids": batch.ids_BT, "attention_mask": mask, "labels": labels}
            value = theirs(**inputs, use_cache=False).loss
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.detach())

    return step


def row(step: Callable[[], float], seconds: float, batch: Batch, flops: int, rate: float) -> dict[str, float]:
    """Return what COLUMNS name; the first step is not counted."""
    first = step()
    synchronize()
    ms = statistics.median(timed(step, seconds))
    return {
        "step_ms": ms,
        "tokens_s": 1e3 * batch.ids_BT.numel() / ms,
        "mfu": 1e3 * flops / ms / rate,
        "peak_mb": peak_mb(step),
        "first_loss": first,
    }


def measured(
    size: str, rows: int, train: TrainConfig, seconds: float, rate: float, device: torch.device
) -> dict[str, Any]:
    """Return way -> numbers of one size."""
    config, vocab, batch = case(size, rows, train)
    batch = batch.to(device)

    def drawn() -> Transformer:
        model = Transformer(config.model, vocab.size)
        model.init_weights(0)
        model.checkpoint_layers = train.checkpoint_layers
        return model

    model = drawn()
    num_logits = int((batch.kind_BT != KIND_PROMPT).sum()) // rows
    flops = 3 * rows * model.flops(batch.ids_BT.shape[1], num_logits) // parallel.num_ranks()
    found: dict[str, Any] = {"parameters": model.num_parameters(), "shape": list(batch.ids_BT.shape)}
    parallel.spread(model, train, device)
    found["ours"] = row(our_step(config, vocab, batch, model.to(device)), seconds, batch, flops, rate)
    del model
    if importlib.util.find_spec("transformers") is None:
        return found | {"left_out": "transformers is not installed"}
    if parallel.num_ranks() > 1 or size == "7b":
        return found | {"left_out": "transformers is measured on one device, which its 7b does not fit"}
    theirs = row(their_step(config, batch, drawn().to(device)), seconds, batch, flops, rate)
    found |= {"transformers": theirs, "faster": theirs["step_ms"] / found["ours"]["step_ms"]}
    difference = abs(theirs["first_loss"] - found["ours"]["first_loss"])
    assert difference < (1e-3 if train.dtype == "float32" else 0.1), f"the losses differ by {difference}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=["3m", *SIZES], default=["3m", "25m", "92m"])
    parser.add_argument("--rows", type=int, default=4, help="samples of a step")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement, at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shard", type=int, default=1, help="ranks that share the model; 0: all")
    parser.add_argument("--checkpoint-layers", action="store_true")
    args = parser.parse_args()
    try:
        find_device(args.device)
        if args.device == "cpu" and (big := sorted(set(args.sizes) & set(ON_GPU))):
            raise ValueError(f"{', '.join(big)}: too large for a CPU, pass --device cuda")
        train = TrainConfig(
            steps=1,
            batch_size=args.rows,
            dtype=args.dtype,
            device=args.device,
            num_threads=args.threads,
            shard=args.shard,
            checkpoint_layers=args.checkpoint_layers,
        )
        device = parallel.start(train)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    torch.set_num_threads(args.threads)
    rate = matmul_rate(device, args.dtype, args.seconds / 4, 8192 if args.device == "cuda" else 2048)
    table, sizes = Table("size", "parameters", "way", *COLUMNS), {}
    for size in args.sizes:
        sizes[size] = measured(size, args.rows, train, args.seconds, rate, device)
        for way in ("ours", "transformers"):
            if way in sizes[size]:
                cells = (f"{sizes[size][way][name]:.4g}" for name in COLUMNS)
                table.add_row(size, f"{sizes[size]['parameters']:,}", way, *cells)
    if parallel.rank() == 0:
        Console(stderr=True, width=120).print(table)
        settings = {name: value for name, value in vars(args).items() if name not in ("sizes", "seconds")}
        settings |= {"ranks": parallel.num_ranks(), "matmul_flops_s": rate}
        print(json.dumps({"bench_train": sizes, **settings, **provenance()}))


if __name__ == "__main__":
    main()
