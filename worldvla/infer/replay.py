"""Model passes over a few new tokens, recorded as CUDA graphs: one launch in place of some thousand.

A pass of a decoder over ten tokens is bound by reading the weights once, if the processor does not have to
launch every kernel of it. For that, all shapes and addresses stay: the cache returns all of its room, what is
not written is hidden by the mask, and one cache serves query after query (`Replay.of`).
Dims: B batch, T new positions, S cache positions, D width.
"""

from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from worldvla.infer.cache import Cache
from worldvla.model.transformer import Transformer

ROUND = 64
"""Room is a multiple of this: prompts of nearly the same length share their graphs."""
KEPT, KEPT_BYTES = 32, 2**31
"""Caches (with their graphs) that a model keeps, the last used ones: one for each number of rows and room."""


class Replay:
    """A cache and the recorded passes over it, one for each T. Its results last until the next pass, and a
    model answers one query at a time.
    """

    def __init__(
        self, model: Transformer, capacity: int, batch: int, is_recorded: bool = True, pool: Any = None
    ) -> None:
        config = model.config
        self.cache = Cache(config.num_layers, capacity)
        width = config.width // config.num_heads * config.num_kv_heads * model.head.weight.element_size()
        self.num_bytes = 2 * config.num_layers * batch * capacity * width
        self.is_recorded = is_recorded
        """Off: the same passes, launched one by one (a machine without CUDA)."""
        self.pool = pool
        """Memory of what is computed inside recordings, shared by all of a model."""
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    @classmethod
    def of(cls, model: Transformer, batch: int, longest: int) -> "Replay | None":
        """Return the model's replay for `batch` rows of at most `longest` positions, its cache empty; None
        where the model is not on a CUDA device.
        """
        weight = model.head.weight
        if not weight.is_cuda:
            return None
        capacity = -(-longest // ROUND) * ROUND
        weights = (*model.parameters(), *model.buffers())  # recordings hold where they lie
        key = (batch, capacity, weight.dtype, *(tensor.data_ptr() for tensor in weights))
        kept = _REPLAYS.setdefault(model, OrderedDict())
        pool = next(iter(kept.values())).pool if kept else torch.cuda.graph_pool_handle()
        replay = kept.pop(key, None) or cls(model, capacity, batch, pool=pool)
        kept[key] = replay
        while len(kept) > 1 and (len(kept) > KEPT or sum(r.num_bytes for r in kept.values()) > KEPT_BYTES):
            kept.popitem(last=False)
        replay.cache.clear()
        return replay

    def __call__(
        self,
        model: Transformer,
        ids_BT: Tensor,
        mask: Tensor,
        row_BT: Tensor,
        col_BT: Tensor,
        positions_BT: Tensor,
        slots_BT: Tensor,
    ) -> Tensor:
        """Return hidden states (B, T, D); `mask` bool (B, 1, T, S); row b's keys go to slots_BT[b]."""
        inputs = [ids_BT, mask, row_BT, col_BT, positions_BT, slots_BT]
        if not self.is_recorded:
            return self._pass(model, inputs)
        length = ids_BT.shape[1]
        with torch.cuda.device(ids_BT.device):
            if length not in self._recorded:
                self._recorded[length] = self._record(model, inputs)
            graph, fixed, x_BTD = self._recorded[length]
            for target, source in zip(fixed, inputs, strict=True):
                target.copy_(source)
            graph.replay()
        return x_BTD

    def _pass(self, model: Transformer, inputs: list[Tensor]) -> Tensor:
        *fields, slots_BT = inputs
        self.cache.slots = (torch.arange(len(slots_BT), device=slots_BT.device)[:, None], slots_BT)
        try:
            return model(*fields, self.cache)
        finally:
            self.cache.slots = None

    def _record(
        self, model: Transformer, inputs: list[Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        fixed = [t.clone() for t in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up outside a recording
            for _ in range(2):
                self._pass(model, fixed)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
            x_BTD = self._pass(model, fixed)
        return graph, fixed, x_BTD


_REPLAYS: WeakKeyDictionary[Transformer, OrderedDict[tuple, Replay]] = WeakKeyDictionary()
