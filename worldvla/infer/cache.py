"""Keys and values of positions that were fed before, one slot a position.

Dims: B batch, G kv heads, S slots that are attended over, T new positions, K head dim.
"""

import torch
from torch import Tensor

from worldvla.config import ModelConfig


class LayerCache:
    """Keys and values of one layer; `Cache.place` says where a pass writes and how far it reads."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        # Zeros: a slot that is not written yet may lie between two that are; hidden NaNs are still NaNs.
        self.keys_BGSK, self.values_BGSK = like.new_zeros(shape), like.new_zeros(shape)
        self.rows_B1 = torch.arange(shape[0], device=like.device)[:, None]
        self.slots: slice | Tensor = slice(0, 0)
        self.reach = 0

    def update(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new positions to their slots, over what is there; return views of the slots in reach."""
        keys, values = self.keys_BGSK, self.values_BGSK
        if isinstance(self.slots, slice):
            keys[:, :, self.slots], values[:, :, self.slots] = k_BGTK, v_BGTK
        elif self.slots.ndim == 1:
            keys.index_copy_(2, self.slots, k_BGTK)
            values.index_copy_(2, self.slots, v_BGTK)
        else:
            keys[self.rows_B1, :, self.slots] = k_BGTK.transpose(1, 2)
            values[self.rows_B1, :, self.slots] = v_BGTK.transpose(1, 2)
        return keys[:, :, : self.reach], values[:, :, : self.reach]


class Cache:
    """One `LayerCache` a layer, of `capacity` slots a row, in the type and on the device of `like`."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, like: Tensor) -> None:
        shape = batch, config.num_kv_heads, capacity, config.width // config.num_heads
        self.layers = [LayerCache(shape, like) for _ in range(config.num_layers)]
        self.capacity = capacity

    def place(self, slots: slice | Tensor, reach: int) -> None:
        """Let the next pass write to `slots`, (T,) of all rows or (B, T), and read the first `reach`.

        What is written stays until it is written over: the mask must hide what is stale.
        """
        if reach > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, got {reach}: make it larger")
        for layer in self.layers:
            layer.slots, layer.reach = slots, reach

    def clear(self) -> None:
        """Hold nothing, in the same buffers: NaNs of an earlier query would come through a mask."""
        with torch.inference_mode():
            for layer in self.layers:
                layer.keys_BGSK.zero_()
                layer.values_BGSK.zero_()

    @property
    def num_bytes(self) -> int:
        return sum(layer.keys_BGSK.nbytes + layer.values_BGSK.nbytes for layer in self.layers)
