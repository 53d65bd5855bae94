"""Keys and values of positions that were fed before, one buffer a layer.

Dims: B batch, G kv heads, S key positions, K head dim.
"""

from torch import Tensor


class Cache:
    """Room for `capacity` positions; the first update makes the buffers, in its shape, type and device."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self._used = [0] * num_layers

    @property
    def length(self) -> int:
        """Positions held by the last layer; between two passes by all."""
        return self._used[-1]

    def update(self, layer: int, k_BGSK: Tensor, v_BGSK: Tensor) -> tuple[Tensor, Tensor]:
        """Append new positions of one layer; return views of all that it holds now."""
        start, stop = self._used[layer], self._used[layer] + k_BGSK.shape[2]
        if stop > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, got {stop}: make it larger")
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            batch, heads, _, head_dim = k_BGSK.shape
            keys = k_BGSK.new_empty(batch, heads, self.capacity, head_dim)
            values = v_BGSK.new_empty(batch, heads, self.capacity, head_dim)
            self._keys[layer], self._values[layer] = keys, values
        keys[:, :, start:stop] = k_BGSK
        values[:, :, start:stop] = v_BGSK
        self._used[layer] = stop
        return keys[:, :, :stop], values[:, :, :stop]
