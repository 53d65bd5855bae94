"""Keys and values of positions that were fed before, one buffer a layer.

Dims: B batch, G kv heads, S key positions, T new positions, K head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Cache:
    """Room for `capacity` positions; the first update makes the buffers, in its shape, type and device."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self._used = [0] * num_layers
        self._starts: list[int] | None = None
        self.slots: tuple[Tensor, Tensor] | None = None
        """Rows (B, 1) and slots (B, T). Set, passes write there and return all of the room: fixed shapes."""

    def clear(self) -> None:
        """Hold nothing, in the same buffers; zeros, for NaNs of a query before would come through a mask."""
        self._used, self._starts = [0] * len(self._used), None
        with torch.inference_mode():
            for buffer in (*self._keys, *self._values):
                if buffer is not None:
                    buffer.zero_()

    def seek(self, starts: Sequence[int]) -> None:
        """From the next pass on row b writes its T positions to starts[b] .. starts[b] + T - 1, over what is
        there; a pass then returns everything up to the last of them. The mask must hide what is stale.
        """
        self._starts = list(starts)

    def room(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Return all of one layer's keys and values, and the rows and slots that a pass writes; None without
        `slots`."""
        if self.slots is None:
            return None
        keys, values = self._keys[layer], self._values[layer]
        assert keys is not None, "the prompt is fed first"
        assert values is not None
        return keys, values, *self.slots

    def update(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Write new positions of one layer, by default after the last; return views of all that it holds."""
        batch, heads, length, head_dim = k_BGTK.shape
        starts = [self._used[layer]] if self._starts is None else self._starts
        stop = max(starts) + length
        if stop > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, got {stop}: make it larger")
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            # Zeros: a slot that is not written yet may lie between two that are; hidden NaNs are still NaNs.
            keys = k_BGTK.new_zeros(batch, heads, self.capacity, head_dim)
            values = v_BGTK.new_zeros(batch, heads, self.capacity, head_dim)
            self._keys[layer], self._values[layer] = keys, values
        if min(starts) == max(starts):
            keys[:, :, starts[0] : stop] = k_BGTK
            values[:, :, starts[0] : stop] = v_BGTK
        else:
            rows_B1 = torch.arange(batch, device=keys.device)[:, None]
            slots_BT = torch.tensor(starts, device=keys.device)[:, None] + torch.arange(
                length, device=keys.device
            )
            keys[rows_B1, :, slots_BT] = k_BGTK.transpose(1, 2)
            values[rows_B1, :, slots_BT] = v_BGTK.transpose(1, 2)
        self._used[layer] = stop
        return keys[:, :, :stop], values[:, :, :stop]
