"""Prompts -> action codes or image codes: greedy, structure forced, scores taken over one modality only.

Dims: B batch, T positions fed at once, S cached positions, G actions decoded side by side, K actions of a
chunk, A action dims, N open codes of a frame.

The mask makes the K actions of a chunk independent given the prompt, and structure is never sampled, so their
positions are known before any is decoded: block k token j stands at P + (A + 2)(k - 1) + j. All K are decoded
side by side, A passes a chunk, with the tokens of one-by-one decoding (WorldVLA: (A + 2) K + 1 passes). Under
the plain causal mask they follow one another.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from worldvla.batch import KIND_IMAGE, Batch, Sample
from worldvla.infer.cache import Cache
from worldvla.model.mask import dense_mask
from worldvla.model.transformer import Transformer
from worldvla.vocab import NUM_BIN_CODES, Vocab

HIDDEN_POSITION = 2**30
"""Mask position of padding: after every query, so nothing attends to it."""


@torch.inference_mode()
def decode_actions(
    model: Transformer, vocab: Vocab, prompts: Sequence[Sample], tail: Sample, blocks_KA: np.ndarray
) -> np.ndarray:
    """Return action codes (B, K, A), int64 in 0..254.

    `tail`: what follows every prompt (`SampleBuilder.policy_tail`). `blocks_KA`: (K, A + 2), where in the
    tail each action's begin, dims and end stand. Whether the chunk's actions see each other is read from
    `tail.chunk`.
    """
    stream = _Stream(model, prompts, tail, vocab.pad)
    num_dims = blocks_KA.shape[1] - 2
    side_by_side = bool((tail.chunk[blocks_KA[:, 0]] > 0).all())
    groups = [blocks_KA] if side_by_side else [blocks_KA[k : k + 1] for k in range(len(blocks_KA))]
    waiting = np.zeros(0, dtype=np.int64)
    for group in groups:
        for dim in range(num_dims):
            x_BGD = stream.feed(np.concatenate([waiting, group[:, dim]]), len(group))
            codes_BG = best_bin(model.logits(x_BGD, vocab.action))
            stream.write(group[:, dim + 1], codes_BG + vocab.action.start)
            waiting = waiting[:0]
        waiting = group[:, num_dims:].reshape(
            -1
        )  # the last dim and the end: only later blocks of a causal chain see them
    return stream.read(blocks_KA[:, 1:-1]).cpu().numpy() - vocab.action.start


@torch.inference_mode()
def decode_images(model: Transformer, vocab: Vocab, prompts: Sequence[Sample], tail: Sample) -> np.ndarray:
    """Return image codes (B, N) int64 of the next frame, all views in order of generation.

    `tail`: `SampleBuilder.world_tail`; its open positions have kind KIND_IMAGE.
    """
    stream = _Stream(model, prompts, tail, vocab.pad)
    open_N = np.flatnonzero(tail.kind == KIND_IMAGE)
    for start, stop in zip([0, *open_N[:-1]], open_N, strict=True):
        x_B1D = stream.feed(np.arange(start, stop), 1)  # the code before, and structure since
        codes_B1 = model.logits(x_B1D, vocab.image).argmax(-1)
        stream.write(np.array([stop]), codes_B1 + vocab.image.start)
    return stream.read(open_N).cpu().numpy() - vocab.image.start


def best_bin(logits: Tensor) -> Tensor:
    """Return the likeliest code, 0..254, of scores over all 256: code 255 decodes like 254, so their
    probabilities add.
    """
    last = torch.logaddexp(logits[..., NUM_BIN_CODES - 2], logits[..., NUM_BIN_CODES - 1])
    return torch.cat((logits[..., : NUM_BIN_CODES - 2], last[..., None]), -1).argmax(-1)


class _Stream:
    """Sequences being written: prompts of any lengths, then one common tail, fed in any order that the mask
    allows.
    """

    def __init__(self, model: Transformer, prompts: Sequence[Sample], tail: Sample, pad: int) -> None:
        self.model = model
        device = next(model.parameters()).device
        self.prompt = Batch.stack(prompts, pad).to(device)
        self.tail = Batch.stack([tail] * len(prompts), pad).to(device)
        self.lengths_B = torch.tensor([len(p) for p in prompts], device=device)
        longest = self.prompt.ids_BT.shape[1]
        self.is_causal = not tail.chunk.any() and min(len(p) for p in prompts) == longest
        """A single new token then sees all that is cached."""
        self.cache = Cache(len(model.layers), longest + len(tail))
        self.chunk_BS = torch.zeros(len(prompts), 0, dtype=torch.int64, device=device)
        self.positions_BS = self.chunk_BS
        """Mask positions of what is in the cache."""

    def feed(self, offsets: np.ndarray, keep: int) -> Tensor:
        """Feed the tokens at `offsets` of the tail (the first time: after the prompts); return hidden states
        (B, keep, D) of the last.
        """
        where = torch.from_numpy(np.asarray(offsets, dtype=np.int64)).to(self.lengths_B.device)
        fields = [getattr(self.tail, name)[:, where] for name in ("ids_BT", "chunk_BT", "row_BT", "col_BT")]
        positions_BT = self.lengths_B[:, None] + where
        visible_BT = positions_BT
        if self.cache.length == 0:
            prompt = self.prompt
            parts = (prompt.ids_BT, prompt.chunk_BT, prompt.row_BT, prompt.col_BT)
            fields = [torch.cat(pair, 1) for pair in zip(parts, fields, strict=True)]
            counting_BT = torch.arange(prompt.ids_BT.shape[1], device=where.device).expand_as(prompt.ids_BT)
            hidden_BT = counting_BT.masked_fill(counting_BT >= self.lengths_B[:, None], HIDDEN_POSITION)
            visible_BT = torch.cat((hidden_BT, positions_BT), 1)
            positions_BT = torch.cat((counting_BT, positions_BT), 1)
        ids_BT, chunk_BT, row_BT, col_BT = fields
        self.positions_BS = torch.cat((self.positions_BS, visible_BT), 1)
        self.chunk_BS = torch.cat((self.chunk_BS, chunk_BT), 1)
        batch, length = ids_BT.shape
        sees_all = self.is_causal and length == 1
        mask = None if sees_all else dense_mask(chunk_BT, self.chunk_BS, visible_BT, self.positions_BS)
        rows_B1 = torch.arange(batch, device=where.device)[:, None] * length
        keep_P = (rows_B1 + torch.arange(length - keep, length, device=where.device)).reshape(-1)
        x_PD = self.model(ids_BT, mask, row_BT, col_BT, positions_BT, self.cache, keep_P)
        return x_PD.view(batch, keep, -1)

    def write(self, offsets: np.ndarray, ids: Tensor) -> None:
        self.tail.ids_BT[:, torch.from_numpy(offsets).to(ids.device)] = ids

    def read(self, offsets: np.ndarray) -> Tensor:
        """Return ids of the tail, (B, *offsets.shape)."""
        return self.tail.ids_BT[:, torch.from_numpy(np.asarray(offsets)).to(self.tail.ids_BT.device)]
