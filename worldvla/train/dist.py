"""Several processes on one batch: rank r of W computes rows r, r + W, ... and gradients are summed. Same
numbers, up to rounding.

    torchrun --nproc-per-node 2 -m worldvla train tabletop

On a CPU two processes of one thread are faster than one of two: most operations of a small model are too
small to split.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from worldvla.batch import Batch


def start(device: torch.device) -> None:
    """Join the other processes if torchrun (or its environment variables) started this one among several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def own_rows(batch: Batch) -> Batch:
    """Return this rank's rows, as views."""
    return Batch(**{name: tensor[rank() :: num_ranks()] for name, tensor in vars(batch).items()})


def sum_gradients(model: nn.Module, *values: float) -> list[float]:
    """Replace every gradient by its sum over all ranks; return those of `values` too, in the same message."""
    if num_ranks() == 1:
        return list(values)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    extra = torch.tensor(values, dtype=grads[0].dtype, device=grads[0].device)
    flat: Tensor = torch.cat([*(g.reshape(-1) for g in grads), extra])
    dist.all_reduce(flat)
    start_at = 0
    for parameter in parameters:
        stop = start_at + parameter.numel()
        parameter.grad = flat[start_at:stop].view_as(parameter)
        start_at = stop
    return flat[start_at:].tolist()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is set on any rank, the same answer on all."""
    if num_ranks() == 1:
        return flag
    answer = torch.tensor(float(flag), device=device)
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer)
