"""What training a recipe holds on each of N GPUs, summed tensor by tensor over models without memory: which
settings fit, and how many rows at a time.

    worldvla plan libero_256_goal --gpus 8 --memory 80GB

weights, gradients, moments: a rank's share, with the types of the real ones. copies: of float32 weights,
which autocast makes and the backward pass needs, where layers are not computed again. gathered: of a sharded
model, the tables that stay together during a step, with their gradients, and two blocks, one computing and
one on its way. row: what the backward pass keeps of one world sample, counted as autograd keeps it. loss: one
stretch of logits and the gradient of the head (train/loss.py). CUDA itself and the allocator's gaps take
RESERVE of the memory.
"""

import functools
import re
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from worldvla.batch import Batch
from worldvla.config import Config, LoraConfig
from worldvla.data.show import fake
from worldvla.model.mask import additive_mask, dense_mask
from worldvla.model.transformer import Transformer
from worldvla.model.weights import empty_model
from worldvla.train import parallel
from worldvla.train.build import held, trainable
from worldvla.train.loss import CHUNK_ELEMENTS, Targets
from worldvla.vocab import Vocab

RESERVE = 0.06


@dataclass(frozen=True)
class Need:
    """Bytes on one device."""

    weights: int
    gradients: int
    moments: int
    copies: int
    gathered: int
    loss: int
    row: int

    @property
    def fixed(self) -> int:
        return self.weights + self.gradients + self.moments + self.copies + self.gathered + self.loss

    def rows(self, memory: int) -> int:
        """Return how many samples fit at a time."""
        return max(0, int((1 - RESERVE) * memory) - self.fixed) // max(1, self.row)


def need(config: Config, gpus: int = 1) -> Need:
    """Return what one of `gpus` devices holds with the config's settings and train.shard."""
    builder, sample = fake(config, "world" if config.data.world_fraction else "policy", 0)
    batch = Batch.stack([sample], builder.vocab.pad)
    model = trainable(_empty(config, builder.vocab), config, None)
    shard = config.train.shard or gpus
    parts = held(model, config.optim.ema)
    if config.optim.method == "muon":
        hidden = (p for p in model.layers.parameters() if p.requires_grad and p.ndim == 2)
        parts["moments"] -= sum(p.nbytes for p in hidden)
    if shard > 1:
        alone = parallel.held_whole(model)
        trained = sum(p.nbytes for p in alone if p.requires_grad)
        buffers = sum(b.nbytes for b in model.buffers())  # packed matrices
        whole = {
            "weights": sum(p.nbytes for p in alone) + buffers + (trained if config.optim.ema else 0),
            "gradients": trained,
            "moments": 2 * trained,
        }
        parts = {name: whole[name] + -(-(size - whole[name]) // shard) for name, size in parts.items()}
    copies, row = kept(config, batch, builder.vocab)
    return Need(
        **parts,
        copies=0 if shard > 1 or config.train.checkpoint_layers else copies,
        gathered=gathered(model, config) if shard > 1 else 0,
        loss=_loss(config, batch, *model.head.weight.shape),
        row=row,
    )


def _loss(config: Config, batch: Batch, vocab_size: int, width: int) -> int:
    """Return the bytes of a stretch of logits, and of the head's gradient before it is added up."""
    is_cuda = config.train.device.startswith("cuda")
    most = CHUNK_ELEMENTS["cuda" if is_cuda else "cpu"]
    logits = min(most, len(Targets.of(batch)) * vocab_size)
    return 8 * vocab_size * width + (8 if config.train.dtype == "bfloat16" else 4) * logits


def gathered(model: Transformer, config: Config) -> int:
    """Return the bytes of a sharded model that are put together while it computes."""
    own = [p for name, p in model.named_parameters() if not name.startswith(("layers.", "action_head."))]
    root = sum(p.nbytes * (2 if p.requires_grad else 1) for p in own)
    size = 2 if config.train.dtype == "bfloat16" else 4
    block = list(model.layers[0].parameters())
    trained = sum(p.numel() for p in block if p.requires_grad)
    # Two blocks, the gradient of one in the type that it computes in, and in float32 on its way.
    return root + 2 * sum(p.numel() * size for p in block) + trained * (size + 4)


def kept(config: Config, batch: Batch, vocab: Vocab) -> tuple[int, int]:
    """Return the bytes that the backward pass needs of a forward pass whatever its rows (copies of weights),
    and those of each row like the batch's first."""
    plain = replace(config.train, checkpoint_layers=False, shard=1, replicate=0)
    counted = (
        replace(config, train=plain),
        vocab,
        batch.ids_BT.shape[1],
        len(Targets.of(batch.map(lambda t: t[:1]))),
    )
    num, sums = config.model.num_layers, []
    for rows in (1, 2):
        outside, first, second = (_saved(*counted, rows, layers) for layers in (0, 1, 2))
        if config.train.checkpoint_layers:  # the inputs of all layers, and all of one
            inputs = 4 * rows * batch.ids_BT.shape[1] * config.model.width
            sums.append(outside + num * inputs + second - first)
        else:
            sums.append(first + (num - 1) * (second - first))
    row = sums[1] - sums[0]
    return sums[0] - row, row


@functools.cache
def _saved(config: Config, vocab: Vocab, length: int, num_targets: int, rows: int, num_layers: int) -> int:
    """Return the bytes of the storages that autograd saves in a forward pass of `num_layers` layers; those of
    parameters are not counted. Nothing is computed: tensors have shapes alone."""
    model = trainable(_empty(config, vocab), config, None)
    model.layers = nn.ModuleList(model.layers[:num_layers])
    is_half = config.train.dtype == "bfloat16"
    half = torch.autocast("cpu", torch.bfloat16, enabled=is_half)
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor  # held, so that no other takes its address
        return tensor

    with FakeTensorMode(), half, _AsOnCuda() if config.train.device.startswith("cuda") else nullcontext():
        _place(model)
        own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        ids_BT = torch.zeros(rows, length, dtype=torch.long)
        mask = additive_mask(dense_mask(ids_BT), torch.bfloat16 if is_half else torch.float32)
        inputs = [ids_BT, mask, ids_BT, ids_BT, None, ids_BT if config.model.previous_code else None]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(*inputs, keep_P=torch.zeros(rows * num_targets, dtype=torch.long))
        return sum(t.untyped_storage().nbytes() for key, t in found.items() if key not in own)


def _place(model: nn.Module) -> None:
    """Give every tensor of `model`, which is on the meta device, a fake one of the CPU."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(
                module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
            )
        for name, b in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(b.shape, dtype=b.dtype))


class _AsOnCuda(TorchFunctionMode):
    """A forward pass over fake tensors of the CPU keeps what one on a CUDA device does: attention's kernel,
    and norms in float32, as autocast has them there. So a machine without one can say what fits it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.is_cuda.__get__:  # pyright: ignore[reportAttributeAccessIssue]
            return True
        if func is F.layer_norm:
            return func(args[0].float(), *args[1:], **kwargs)
        if func is F.scaled_dot_product_attention:
            q, k, v = args
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
            mask = kwargs["attn_mask"].to(q.dtype).expand(*q.shape[:3], k.shape[2])
            return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)[0]
        return func(*args, **kwargs)


def _empty(config: Config, vocab: Vocab) -> Transformer:
    return empty_model(config.model, vocab.size, *config.layout.sizes)


def settings(config: Config, gpus: int) -> dict[str, Config]:
    """Return what to try, by its options, cheapest first: sharded or not, activations kept or computed again;
    then low-rank updates, where every weight of a checkpoint is trained."""
    found = {}
    train = config.train
    is_whole = train.compile or train.only_head or train.scheduled_sampling  # which need whole models
    _, own = parallel.num_copies(train, gpus)  # the recipe's
    for shard in dict.fromkeys((1,) if is_whole else (1, own, gpus)):
        for again in (False, True):
            words = f"--train.shard {shard}" + (" --train.checkpoint-layers" if again else "")
            changed = replace(config.train, shard=shard, replicate=0, checkpoint_layers=again)
            found[words] = replace(config, train=changed)
    if config.train.init_from and not config.lora.rank and not config.train.only_head:
        for words, whole in list(found.items()):
            for base in ("bfloat16", "int4") if whole.train.checkpoint_layers else ():
                half, adamw = replace(whole.train, dtype="bfloat16"), replace(whole.optim, method="adamw")
                changed = replace(whole, lora=LoraConfig(rank=16, base=base), train=half, optim=adamw)
                also = "" if whole.optim == adamw else " --optim.method adamw"
                found[f"{words} --lora.rank 16 --lora.base {base}{also}"] = changed
    return found


def plan(config: Config, gpus: int, memory: int) -> list[dict[str, Any]]:
    """Return a row for each of `settings`: its options, the bytes of Need, their fixed sum, and `max_rows`,
    the largest micro-batch of one GPU (0: it does not fit)."""
    rows = []
    for words, changed in settings(config, gpus).items():
        found = need(changed, gpus)
        rows.append({"options": words, **asdict(found), "fixed": found.fixed, "max_rows": found.rows(memory)})
    return rows


def parse_bytes(text: str) -> int:
    """Return the bytes of "80GB" (10^9) or "80GiB" (2^30); anything else raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(G|M|T)(i?)B", text.strip())
    if match is None or not float(match[1]):
        raise ValueError(f"bad memory {text!r}: expected a size such as 80GB or 24GiB")
    power = {"M": 2, "G": 3, "T": 4}[match[2]]
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
