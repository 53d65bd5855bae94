"""Several processes on one step: its rows are dealt out to the ranks in turn, and gradients are summed. The
losses are those of one process, up to rounding, however many ranks there are and whatever they share.

    torchrun --nproc-per-node 2 -m worldvla train tabletop

By default each process holds the whole model. With train.shard it holds its rows of every weight, gradient
and moment (PyTorch's FSDP2): a block is put together while it computes. train.replicate such groups are
copies of each other (HSDP), which suits several nodes. On a CPU two processes of one thread are faster than
one of two: most operations of a small model are too small to split.
"""

import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from worldvla.batch import KIND_PROMPT, Batch
from worldvla.config import TrainConfig
from worldvla.machine import differences, find_device, installation, num_processes
from worldvla.model.transformer import Transformer

HANDSHAKE = timedelta(minutes=2)
BUCKET = 2**25
"""Elements of gradients that are summed in one message."""


def start(config: TrainConfig) -> torch.device:
    """Join the other processes if torchrun (its environment variables) started this one among several; return
    the device of this one: of the GPUs of a machine each process takes its own, of a CPU its threads.

    Fewer rows in a step than processes, and settings that do not fit them, raise ValueError in all of them.
    """
    num = num_processes()
    _, shard = num_copies(config, num)
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "torchrun --max-restarts gives restarted processes the addresses of dead ones: start it with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        )
    for name in ("compile", "only_head"):
        if shard > 1 and getattr(config, name):
            raise ValueError(
                f"train.{name} does not work on a model that train.shard {shard} spreads: set it to 1"
            )
    device = _own_device(config.device)
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads)
    if num > 1 and not dist.is_initialized():
        if device.type == "cuda":
            dist.init_process_group("nccl")
        else:  # gloo may wait for a connection for good: a restart should not be half an hour away
            dist.init_process_group("gloo", timeout=HANDSHAKE)
            _set_pg_timeout(default_pg_timeout)
        _check_versions(device)
    return device


def _check_versions(device: torch.device) -> None:
    """Raise ValueError in all processes if a node has other versions than the first one."""
    here = installation() if os.environ.get("LOCAL_RANK", "0") == "0" else {}
    there = json.loads(from_first(json.dumps(here)))
    other = differences(there, here) if here else ""
    if any_rank(bool(other), device):
        what = f"node {socket.gethostname()} differs from that of the first process ({other})"
        raise ValueError(f"{what if other else 'a node has other versions'}: install the same on every node")


def second_group() -> dist.ProcessGroup:
    """Return another group of all ranks, on their CPUs: two threads that send in one group would mix up."""
    group = dist.new_group(timeout=HANDSHAKE, backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    _set_pg_timeout(default_pg_timeout, group)
    return group


def num_copies(config: TrainConfig, num: int) -> tuple[int, int]:
    """Return (copies of the model, processes that share one) of `num` processes; settings that do not fit
    them raise ValueError."""
    rows = config.batch_size * config.accumulation
    if num > rows:
        raise ValueError(
            f"{num} processes share the {rows} samples of a step (train.batch_size {config.batch_size} x "
            f"train.accumulation {config.accumulation}), expected one each: raise it, or start fewer"
        )
    shard = config.shard or num // max(1, config.replicate)
    copies = config.replicate or num // shard
    if copies * shard != num:
        raise ValueError(
            f"train.shard {config.shard} and train.replicate {config.replicate} do not fit {num} processes: "
            f"expected a product of {num} (0 means the rest), or start torchrun with as many"
        )
    return copies, shard


def _own_device(name: str) -> torch.device:
    device = find_device(name)
    if device.type != "cuda":
        return device
    local, num = (int(os.environ.get(f"LOCAL_{key}", d)) for key, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    found = torch.cuda.device_count()
    if num > 1 and device.index is not None:
        raise ValueError(
            f"train.device {name} is one GPU for {num} processes: say cuda, and each process gets its own"
        )
    if num > found:
        raise ValueError(
            f"{num} processes on a machine with {found} GPUs, expected one each: --nproc-per-node {found}"
        )
    index = local if device.index is None else device.index
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def spread(model: Transformer, config: TrainConfig, device: torch.device) -> None:
    """Leave each rank its rows of `model`'s parameters, as DTensors on `device`, where train.shard asks so.

    The matrices of blocks are gathered in the type that they compute in; what makes the residual stream stays
    float32, and gradients are summed in it.
    """
    copies, shard = num_copies(config, num_ranks())
    if shard == 1:
        return
    shape, names = ((copies, shard), ("replicate", "shard")) if copies > 1 else ((shard,), ("shard",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    outside, whole = MixedPrecisionPolicy(cast_forward_inputs=False), held_whole(model)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=whole)
    fully_shard(model, mesh=mesh, mp_policy=outside, ignored_params=whole)
    for module in _sharded(model):  # sums, not means: a loss is a share of the step's
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def held_whole(model: Transformer) -> set[nn.Parameter]:
    """Return what every rank of a sharded model holds: norms, which are small and stay float32, and an action
    head, which a rank without a policy sample does not run."""
    norms = [m for m in model.modules() if isinstance(m, nn.RMSNorm | nn.LayerNorm)]
    heads = [] if model.action_head is None else [model.action_head]
    return {p for module in (*norms, *heads) for p in module.parameters()}


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a sharded tensor, any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_spread(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def _sharded(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def gather(model: nn.Module, is_last: bool) -> None:
    """Sum the gradients of the next backward pass over copies only if it is the last of its step."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(is_last)


def release(model: nn.Module) -> None:
    """Give back what a pass without a backward pass has gathered: parameters are each rank's rows again."""
    if isinstance(model, FSDPModule):
        model.reshard()


def own_rows(batches: Sequence[Batch], together: bool = False) -> list[Batch]:
    """Return this rank's rows of a step's batches, as views; a batch without any is left out.

    `together`: every rank gets as many batches, as a sharded model needs it; one that has fewer gets rows
    without a target.
    """
    own = _dealt(batches, rank())
    most = max(len(_dealt(batches, r)) for r in range(num_ranks())) if together else len(own)
    return own + [_without_targets(batches[0])] * (most - len(own))


def _dealt(batches: Sequence[Batch], to: int) -> list[Batch]:
    own, num_dealt = [], 0
    for batch in batches:
        rows = slice((to - num_dealt) % num_ranks(), None, num_ranks())
        part = batch.map(lambda tensor, rows=rows: tensor[rows])
        own += [part] if len(part.ids_BT) else []
        num_dealt += len(batch.ids_BT)
    return own


def _without_targets(batch: Batch) -> Batch:
    row = batch.map(lambda tensor: tensor[:1])
    kind_BT = torch.full_like(row.kind_BT, KIND_PROMPT)
    return replace(row, kind_BT=kind_BT, value_BT=torch.full_like(row.value_BT, float("nan")))


def sum_gradients(model: nn.Module, *values: float) -> list[float]:
    """Replace every gradient that is held whole by its sum over all ranks; return those of `values` too.

    What is sharded is summed during the backward pass.
    """
    if num_ranks() == 1:
        return list(values)
    whole = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    for parameter in whole:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    device = next(model.parameters()).device
    extra = torch.tensor(values, dtype=torch.float32, device=device)
    grads = [extra, *(p.grad for p in whole if p.grad is not None)]
    for bucket in _buckets(grads):
        flat = torch.cat([grad.flatten() for grad in bucket])
        dist.all_reduce(flat)
        for grad, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            grad.copy_(total.view_as(grad))
    return extra.tolist()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield runs of tensors with about BUCKET elements."""
    bucket, size = [], 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel()
        if size >= BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def clip_gradients(model: nn.Module, largest: float) -> float:
    """Scale all gradients so that their norm, over all shards, is `largest` at most; return what it was."""
    trained = [p for p in model.parameters() if p.grad is not None]
    parts = [[p for p in trained if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
    parts = [part for part in parts if part]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) for part in parts]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for part in parts:
        torch.nn.utils.clip_grads_with_norm_(part, largest, norm)
    return float(norm)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is set on any rank, the same answer on all."""
    if num_ranks() == 1:
        return flag
    answer = torch.tensor(float(flag), device=device)
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer)


def from_first(text: str, group: dist.ProcessGroup | None = None) -> str:
    """Return the text that the first rank has; its bytes are sent, not a pickle."""
    if num_ranks() == 1:
        return text
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = torch.tensor(len(data), device=device)
    dist.broadcast(size, 0, group)
    if rank() > 0:
        data = data.new_empty(int(size))
    dist.broadcast(data, 0, group)
    return bytes(data.tolist()).decode()
