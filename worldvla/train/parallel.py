"""Several processes on one step: its rows are dealt out to the ranks in turn, and gradients are summed. The
numbers are those of one process, up to rounding.

    torchrun --nproc-per-node 2 -m worldvla train tabletop

On a CPU two processes of one thread are faster than one of two: most operations of a small model are too
small to split.
"""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from worldvla.batch import Batch
from worldvla.config import TrainConfig


def start(device: torch.device, config: TrainConfig) -> None:
    """Join the other processes if torchrun (its environment variables) started this one among several.

    Fewer rows in a step than processes raise ValueError in all of them.
    """
    num, rows = int(os.environ.get("WORLD_SIZE", "1")), config.batch_size * config.accumulation
    if num > rows:
        raise ValueError(
            f"{num} processes share the {rows} samples of a step (train.batch_size {config.batch_size} x "
            f"train.accumulation {config.accumulation}), expected one each: raise it, or start fewer"
        )
    if num > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def own_rows(batches: Sequence[Batch]) -> list[Batch]:
    """Return this rank's rows of a step's batches, as views; a batch without any is left out."""
    own, num_dealt = [], 0
    for batch in batches:
        rows = slice((rank() - num_dealt) % num_ranks(), None, num_ranks())
        part = batch.map(lambda tensor, rows=rows: tensor[rows])
        own += [part] if len(part.ids_BT) else []
        num_dealt += len(batch.ids_BT)
    return own


def sum_gradients(model: nn.Module, *values: float) -> list[float]:
    """Replace every gradient by its sum over all ranks; return those of `values` too, in the same message."""
    if num_ranks() == 1:
        return list(values)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    extra = torch.tensor(values, dtype=grads[0].dtype, device=grads[0].device)
    flat = torch.cat([*(g.flatten() for g in grads), extra])
    dist.all_reduce(flat)
    *summed, extra = flat.split([*(p.numel() for p in parameters), len(values)])
    for parameter, grad in zip(parameters, summed, strict=True):
        parameter.grad = grad.view_as(parameter)
    return extra.tolist()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is set on any rank, the same answer on all."""
    if num_ranks() == 1:
        return flag
    answer = torch.tensor(float(flag), device=device)
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer)
