"""How decoding runs a transformer: over a cache, and on a CUDA device as recorded graphs.

The transformer stays as it is: what is cached or recorded is held here. A pass over ten tokens is bound by
reading the weights once, if the processor does not have to launch each of its kernels. For that, all shapes
and addresses stay: the cache returns all of its slots, the mask hides those that are not written, and one
cache serves query after query.
Dims: B batch, T new positions, S slots of the cache, D width.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldvla.infer.cache import Cache
from worldvla.model.transformer import Transformer

ROUND = 64
"""Fixed rooms have a multiple of this many slots: prompts of nearly the same length share their graphs."""
KEPT, KEPT_BYTES = 32, 2**31
"""Fixed rooms that a runner keeps, the last used ones: one for each number of rows and slots."""


class Room:
    """A query's cache, and the passes over it: of any shape, over the slots that are in use."""

    def __init__(self, model: Transformer, batch: int, capacity: int) -> None:
        self.model, self.cache = model, Cache(model.config, batch, capacity, model.embed.weight)
        self.is_empty = True
        """Whether the next pass is a query's first one, of any length."""
        self.turn = 0
        """Queries that it was opened for."""
        self.in_turn = False
        """Whether the next pass writes to the last slots that it reads, the same of all rows."""

    def seek(self, slots_BT: Tensor) -> int:
        """Let the next pass write to these slots; return how many slots it reads."""
        slots, length = slots_BT.cpu().numpy(), slots_BT.shape[1]
        first, reach = int(slots[0, 0]), int(slots.max()) + 1
        self.in_turn = bool((slots == np.arange(first, first + length)).all())
        alike = slots_BT[0] if bool((slots == slots[0]).all()) else slots_BT  # which is written faster
        self.cache.place(slice(first, reach) if self.in_turn else alike, reach)
        return reach

    def length(self, num_tokens: int) -> int:
        """Return how many tokens a pass should have that needs `num_tokens`."""
        return num_tokens

    def run(self, fields: list[Tensor], mask: Tensor | None, slots_BT: Tensor, keep: int) -> Tensor:  # noqa: ARG002
        """Return hidden states (B, `keep`, D) of the last of T new positions; they last until the next pass.

        `fields`: ids, rows, columns, positions and, of models that read them, previous ids, (B, T) each;
        `mask`: bool (B, 1, T, S) over the slots that are read, None where each position sees them all.
        """
        self.is_empty = False
        return self._launch(self.model, fields, mask, keep)

    def _launch(self, model: Transformer, fields: list[Tensor], mask: Tensor | None, keep: int) -> Tensor:
        batch, length = fields[0].shape
        keep_P = None
        if keep < length:
            starts_B1 = torch.arange(batch, device=fields[0].device)[:, None] * length
            keep_P = (starts_B1 + torch.arange(length - keep, length, device=starts_B1.device)).reshape(-1)
        x = model(fields[0], mask, *fields[1:], cache=self.cache.layers, keep_P=keep_P)
        return x.view(batch, keep, -1)


class FixedRoom(Room):
    """A cache that is used again and again, and passes that read all of it, one recording for each T."""

    def __init__(
        self, model: Transformer, batch: int, capacity: int, steps: Transformer, pool: Any = None
    ) -> None:
        """`steps`: what runs all passes but the first; `pool`: memory of what is computed inside recordings,
        None to launch every pass."""
        super().__init__(model, batch, capacity)
        self.steps, self.pool = steps, pool
        self.recorded: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def seek(self, slots_BT: Tensor) -> int:
        self.cache.place(slots_BT, self.cache.capacity)
        return self.cache.capacity

    def length(self, num_tokens: int) -> int:
        """Return one of few lengths, each of which is recorded once."""
        if self.is_empty:
            return num_tokens
        return 1 << (num_tokens - 1).bit_length() if num_tokens <= 64 else -(-num_tokens // 64) * 64

    def run(self, fields: list[Tensor], mask: Tensor | None, slots_BT: Tensor, keep: int) -> Tensor:
        assert mask is not None, "what is not written must be hidden"
        if self.is_empty:  # prompts have too many lengths
            self.is_empty = False
            return self._launch(self.model, fields, mask, keep)
        length, inputs = slots_BT.shape[1], [*fields, mask, slots_BT]
        if self.pool is None:
            return self._step(inputs)[:, -keep:]
        with torch.cuda.device(mask.device):
            if length not in self.recorded:
                self.recorded[length] = self._record(inputs)
            graph, fixed, x_BTD = self.recorded[length]
            for target, source in zip(fixed, inputs, strict=True):
                target.copy_(source)
            graph.replay()
        return x_BTD[:, -keep:]

    def _step(self, inputs: list[Tensor]) -> Tensor:
        *fields, mask, slots_BT = inputs
        self.seek(slots_BT)
        return self._launch(self.steps, fields, mask, slots_BT.shape[1])

    def _record(self, inputs: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        fixed = [t.clone() for t in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up outside a recording
            for _ in range(2):
                self._step(fixed)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
            x_BTD = self._step(fixed)
        return graph, fixed, x_BTD


class Runner:
    """A transformer as decoding runs it, one query at a time. It may be moved or converted between queries:
    what depends on where its weights lie is then made anew.

    `prepare`: makes of the model what runs all passes but the first, as paper/compiled.py does. `fixed`:
    passes of fixed shape (default: prepared, or on CUDA). `recorded`: off, passes of fixed shape are launched
    kernel by kernel.
    """

    def __init__(
        self,
        model: Transformer,
        prepare: Callable[[Transformer], Transformer] | None = None,
        fixed: bool | None = None,
        recorded: bool = True,
    ) -> None:
        self.model, self.prepare, self.fixed, self.recorded = model, prepare, fixed, recorded
        self.rooms: OrderedDict[tuple[int, int], FixedRoom] = OrderedDict()
        self._steps, self._addresses, self._pool = model, None, None

    def open(self, batch: int, longest: int) -> Room:
        """Return an empty room for `batch` rows of at most `longest` positions."""
        is_cuda = self.model.head.weight.is_cuda
        if not (self.prepare or is_cuda if self.fixed is None else self.fixed):
            return Room(self.model, batch, longest)
        if self._addresses != _addresses(self.model):
            self.rooms.clear()
            self._steps = self.prepare(self.model) if self.prepare else self.model
            self._pool = torch.cuda.graph_pool_handle() if is_cuda and self.recorded else None
            self._addresses = _addresses(self.model)
        capacity = -(-longest // ROUND) * ROUND
        room = self.rooms.pop((batch, capacity), None)
        room = room or FixedRoom(self.model, batch, capacity, self._steps, self._pool)
        self.rooms[batch, capacity] = room
        while len(self.rooms) > 1 and (len(self.rooms) > KEPT or self._num_bytes() > KEPT_BYTES):
            self.rooms.popitem(last=False)
        room.cache.clear()
        room.is_empty, room.turn = True, room.turn + 1
        return room

    def _num_bytes(self) -> int:
        return sum(room.cache.num_bytes for room in self.rooms.values())


def _addresses(model: Transformer) -> list[tuple[int, torch.dtype]]:
    """Return where the weights lie: recordings hold it."""
    return [(tensor.data_ptr(), tensor.dtype) for tensor in (*model.parameters(), *model.buffers())]
