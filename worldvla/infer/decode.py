"""Prompts -> action codes or image codes: structure forced, scores taken over one modality only.

Dims: B batch, T positions fed at once, S cached positions, G actions decoded side by side, K actions of a
chunk, A action dims, N open codes of a frame, V scores of one code.

The mask makes the K actions of a chunk independent given the prompt, and structure is never sampled, so their
positions are known before any is decoded: block k token j stands at P + (A + 2)(k - 1) + j. All K are decoded
side by side, A passes a chunk, with the tokens of one-by-one decoding (WorldVLA: (A + 2) K + 1 passes). Under
the plain causal mask they follow one another.

The codes of a frame do depend on each other, so they are guessed and checked: see `decode_frame`, and
docs/DECODING.md for why both give the tokens of one-by-one decoding. Scores are float32 whatever the model's
type: rounded to bfloat16, the best two would often be one number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldvla.batch import KIND_IMAGE, Batch, Sample
from worldvla.infer.cache import Cache
from worldvla.infer.draft import FrameStats, Window
from worldvla.infer.replay import Replay
from worldvla.model.mask import dense_mask
from worldvla.model.transformer import Transformer
from worldvla.vocab import NUM_BIN_CODES, Vocab

HIDDEN_POSITION = 2**30
"""Mask position of padding: after every query, so nothing attends to it."""
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""Scores that lie nearer than this, relative to their spread, may change places by rounding alone."""
SIDE_BY_SIDE = "side by side"


@dataclass(frozen=True)
class Chunk:
    """Actions of a batch of prompts and how sure the model is of them."""

    codes_BKA: np.ndarray
    """int64 in 0..254."""
    entropy_BKA: np.ndarray
    """Nats, of each dim given those before it as decoded; at most ln 255. An action's is the sum."""
    margin_BKA: np.ndarray
    """Probability of the likeliest code minus that of the second; at temperature 1, whatever was drawn."""
    path: str
    """`side by side`, or why the actions were decoded one by one."""


def decode_actions(
    model: Transformer,
    vocab: Vocab,
    prompts: Sequence[Sample],
    tail: Sample,
    blocks_KA: np.ndarray,
    temperature: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """Return action codes (B, K, A), int64 in 0..254: `decode_chunk` without the confidence."""
    return decode_chunk(model, vocab, prompts, tail, blocks_KA, temperature, seed).codes_BKA


@torch.inference_mode()
def decode_chunk(
    model: Transformer,
    vocab: Vocab,
    prompts: Sequence[Sample],
    tail: Sample,
    blocks_KA: np.ndarray,
    temperature: float = 0.0,
    seed: int = 0,
    together: bool = True,
) -> Chunk:
    """Decode the chunk of every prompt: greedy, or drawn at `temperature` by a generator seeded with `seed`.

    `tail`: what follows every prompt (`SampleBuilder.policy_tail`). `blocks_KA`: (K, A + 2), where in the
    tail each action's begin, dims and end stand. Whether the chunk's actions see each other is read from
    `tail.chunk`. `together` off: one by one even where the mask does not ask for it, to compare with.
    """
    if not len(blocks_KA):
        raise ValueError("a chunk needs at least one action, got K = 0: raise layout.chunk")
    path = chunk_path(tail, blocks_KA)
    stream = _Stream(model, prompts, tail, vocab.pad)
    # From here to the end nothing goes to or from the device: it never waits for the processor.
    blocks, num_dims = torch.from_numpy(blocks_KA).to(stream.lengths_B.device), blocks_KA.shape[1] - 2
    groups = [blocks] if path == SIDE_BY_SIDE and together else blocks.split(1)
    head_VD = _head(model, vocab.action)
    shape = (len(prompts), len(blocks_KA), num_dims, NUM_BIN_CODES - 1)
    noise_BKAV = _noise(shape, temperature, seed, head_VD.device)
    waiting, found, start = blocks.new_empty(0), [], 0
    for group in groups:
        scores = []
        for dim in range(num_dims):
            x_BGD = stream.feed(torch.cat((waiting, group[:, dim])), len(group))
            scores.append(bin_scores(F.linear(x_BGD.float(), head_VD)))
            noise = None if noise_BKAV is None else noise_BKAV[:, start : start + len(group), dim]
            codes_BG = _disturbed(scores[-1], temperature, noise).argmax(-1)
            stream.write(group[:, dim + 1], codes_BG + vocab.action.start)
            waiting = waiting[:0]
        # The last dim and the end: only later blocks of a causal chain see them.
        waiting = group[:, num_dims:].reshape(-1)
        found.append(torch.stack(scores, 2))
        start += len(group)
    log_p_BKAV = torch.cat(found, 1).log_softmax(-1)
    best_BKA2 = log_p_BKAV.topk(2).values.exp()
    return Chunk(
        codes_BKA=stream.read(blocks[:, 1:-1]).cpu().numpy() - vocab.action.start,
        entropy_BKA=-(log_p_BKAV.exp() * log_p_BKAV).sum(-1).cpu().numpy(),
        margin_BKA=(best_BKA2[..., 0] - best_BKA2[..., 1]).cpu().numpy(),
        path=path,
    )


@torch.inference_mode()
def regress_chunk(model: Transformer, vocab: Vocab, prompts: Sequence[Sample]) -> np.ndarray:
    """Return the continuous head's normalised actions (B, K, A) float32: one pass over the prompts."""
    assert model.action_head is not None
    device = next(model.parameters()).device
    batch = Batch.stack(prompts, vocab.pad).to(device)
    x_BTD = model(batch.ids_BT, dense_mask(batch.chunk_BT), batch.row_BT, batch.col_BT)
    lengths_B = torch.tensor([len(p) for p in prompts], device=device)
    return model.action_head(x_BTD, lengths_B).cpu().numpy()


def chunk_path(tail: Sample, blocks_KA: np.ndarray) -> str:
    """Return SIDE_BY_SIDE where the mask makes that exact: no action sees another; else the reason."""
    chunk_KA = tail.chunk[blocks_KA]
    is_apart = chunk_KA.min() > 0 and (chunk_KA == chunk_KA[:, :1]).all()
    if len(blocks_KA) == 1 or (is_apart and len(np.unique(chunk_KA[:, 0])) == len(blocks_KA)):
        return SIDE_BY_SIDE
    return "one by one: actions of a chunk see those before them (layout.selective_mask is off)"


@torch.inference_mode()
def decode_frame(
    model: Transformer,
    vocab: Vocab,
    prompts: Sequence[Sample],
    tail: Sample,
    draft_BN: np.ndarray | None = None,
    window: Window | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> tuple[np.ndarray, FrameStats]:
    """Return image codes (B, N) int64 of the next frame, all views in order of generation, and their cost.

    `tail`: `SampleBuilder.world_tail`; its open positions have kind KIND_IMAGE. `draft_BN`: a guess of the
    codes, of which a pass checks a window: all up to the first that is not the model's own choice are kept,
    that one is corrected, and the model's choices after it replace the guess. Without, one code a pass. The
    codes do not depend on the guess: each is the model's choice given all before it. With a temperature that
    choice is the best of scores / temperature + Gumbel noise, drawn once for each row and position, which
    makes it a draw from the softmax and, given the noise, as certain as a greedy one.
    """
    if tail.chunk.any() or KIND_IMAGE not in tail.kind:
        raise ValueError("a frame needs the tail of a world sample, got another: SampleBuilder.world_tail()")
    stream = _Stream(model, prompts, tail, vocab.pad)
    device, span, batch = stream.lengths_B.device, vocab.image, len(prompts)
    open_N, is_open_T = np.flatnonzero(tail.kind == KIND_IMAGE), torch.from_numpy(tail.kind == KIND_IMAGE)
    num_codes, end, is_open_T = len(open_N), int(open_N[-1]), is_open_T.to(device)
    places_N = torch.from_numpy(open_N).to(device)
    is_drafted = draft_BN is not None
    if draft_BN is not None:
        if draft_BN.shape != (batch, num_codes):
            raise ValueError(
                f"a draft of {batch} frames needs codes {(batch, num_codes)}, got {draft_BN.shape}"
            )
        stream.write(places_N, torch.from_numpy(draft_BN).to(device) + span.start)
    window = window or Window(device)
    head_VD, stats = _head(model, span), FrameStats(codes=batch * num_codes)
    noise_BNV = _noise((batch, num_codes, len(span)), temperature, seed, device)
    nth_T = is_open_T.cumsum(0) - 1
    rows_B1 = torch.arange(batch, device=device)[:, None]
    done_B, done_B1 = np.zeros(batch, dtype=np.int64), rows_B1.new_zeros(batch, 1)  # here, and on the device
    while (done_B < num_codes).any():
        # Each row goes on from its last decided code; all feed the same number of tokens.
        width = window.width(num_codes) if is_drafted else 1
        first_B = np.where(done_B == 0, 0, open_N[done_B - 1])
        length = int((open_N[np.minimum(done_B + width, num_codes) - 1] - first_B).max())
        if is_drafted and stream.filled and stream.replay is not None:  # few lengths, each recorded once
            length = min(end, 1 << (length - 1).bit_length() if length <= 64 else -(-length // 64) * 64)
        first_B = np.minimum(first_B, end - length)  # near the end some codes are fed again
        first_B1 = places_N[done_B1 - 1].masked_fill(done_B1 == 0, 0).clamp_max(end - length)
        x_BTD = stream.feed_rows(first_B, first_B1, length)
        where_BT = first_B1 + torch.arange(1, length + 1, device=device)
        noise = None if noise_BNV is None else noise_BNV[rows_B1, nth_T[where_BT].clamp_min(0)]
        scores_BTV = _disturbed(F.linear(x_BTD.float(), head_VD), temperature, noise)
        choice_BT = scores_BTV.argmax(-1) + span.start

        is_new_BT = is_open_T[where_BT] & (nth_T[where_BT] >= done_B1)
        ids_BT = stream.tail.ids_BT.gather(1, where_BT)
        is_wrong_BT = is_new_BT & (ids_BT != choice_BT)
        num_wrong_BT = is_wrong_BT.cumsum(1)
        is_right_BT = is_new_BT & (num_wrong_BT == 0)
        is_kept_BT = is_right_BT | (is_wrong_BT & (num_wrong_BT == 1))
        stream.tail.ids_BT.scatter_(1, where_BT, torch.where(is_new_BT, choice_BT, ids_BT))
        is_close_BT = is_kept_BT & _is_close(scores_BTV, stream.dtype)
        done_B1 += is_kept_BT.sum(1, keepdim=True)
        kept_B, right_B, close_B = torch.stack((is_kept_BT, is_right_BT, is_close_BT)).sum(2).cpu().numpy()
        done_B = done_B + kept_B
        stats.passes += 1
        stats.close += int(close_B.sum())
        if is_drafted:
            stats.judged += int(kept_B.sum())
            stats.accepted += int(right_B.sum())
            window.update(int(kept_B.max()))
    return stream.read(places_N).cpu().numpy() - span.start, stats


def best_bin(logits: Tensor) -> Tensor:
    """Return the likeliest code, 0..254, of scores over all 256."""
    return bin_scores(logits).argmax(-1)


def bin_scores(logits: Tensor) -> Tensor:
    """Return float32 scores of codes 0..254 from those of all 256: code 255 decodes like 254, so their
    probabilities add.
    """
    logits = logits.float()
    last = torch.logaddexp(logits[..., NUM_BIN_CODES - 2], logits[..., NUM_BIN_CODES - 1])
    return torch.cat((logits[..., : NUM_BIN_CODES - 2], last[..., None]), -1)


def _head(model: Transformer, span: range) -> Tensor:
    return model.head.weight[span.start : span.stop].float()


def _noise(shape: tuple[int, ...], temperature: float, seed: int, device: torch.device) -> Tensor | None:
    """Return standard Gumbel noise, the same on every device: the argmax of log p + noise is a draw from p.
    None at temperature 0."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or above and finite, got {temperature}")
    if temperature == 0:
        return None
    return -torch.empty(shape).exponential_(generator=torch.Generator().manual_seed(seed)).log().to(device)


def _disturbed(scores: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """Return the scores whose best is the choice."""
    return scores if noise is None else scores / temperature + noise


def _is_close(scores: Tensor, dtype: torch.dtype) -> Tensor:
    best = scores.topk(2).values
    return best[..., 0] - best[..., 1] < CLOSE.get(dtype, CLOSE[torch.bfloat16]) * scores.std(-1)


class _Stream:
    """Sequences being written: prompts of any lengths, then one common tail, fed in any order that the mask
    allows.
    """

    def __init__(self, model: Transformer, prompts: Sequence[Sample], tail: Sample, pad: int) -> None:
        if not prompts:
            raise ValueError("nothing to decode: got no prompts, expected at least one")
        self.model, self.dtype = model, model.head.weight.dtype
        device = next(model.parameters()).device
        self.prompt = Batch.stack(prompts, pad).to(device)
        self.tail = Batch.stack([tail] * len(prompts), pad).to(device)
        self.lengths_B = torch.tensor([len(p) for p in prompts], device=device)
        longest = self.prompt.ids_BT.shape[1]
        self.is_causal = not tail.chunk.any() and min(len(p) for p in prompts) == longest
        """A single new token then sees all that is cached."""
        capacity = longest + len(tail)
        self.replay = Replay.of(model, len(prompts), capacity)
        self.cache = Cache(len(model.layers), capacity) if self.replay is None else self.replay.cache
        shape = (len(prompts), self.cache.capacity)
        self.filled = 0
        """Slots of the cache that hold something."""
        self.chunk_BS = torch.zeros(shape, dtype=torch.int64, device=device)
        self.positions_BS = torch.full_like(self.chunk_BS, HIDDEN_POSITION)
        """Mask positions of the cache's slots."""

    def feed(self, where: Tensor, keep: int) -> Tensor:
        """Feed the tokens at `where` in the tail (the first time: after the prompts); return hidden states
        (B, keep, D) of the last.
        """
        fields = [getattr(self.tail, name)[:, where] for name in ("ids_BT", "chunk_BT", "row_BT", "col_BT")]
        positions_BT = self.lengths_B[:, None] + where
        visible_BT = positions_BT
        if self.filled == 0:
            prompt = self.prompt
            parts = (prompt.ids_BT, prompt.chunk_BT, prompt.row_BT, prompt.col_BT)
            fields = [torch.cat(pair, 1) for pair in zip(parts, fields, strict=True)]
            counting_BT = torch.arange(prompt.ids_BT.shape[1], device=where.device).expand_as(prompt.ids_BT)
            hidden_BT = counting_BT.masked_fill(counting_BT >= self.lengths_B[:, None], HIDDEN_POSITION)
            visible_BT = torch.cat((hidden_BT, positions_BT), 1)
            positions_BT = torch.cat((counting_BT, positions_BT), 1)
        ids_BT, chunk_BT, row_BT, col_BT = fields
        batch, length = ids_BT.shape
        start, self.filled = self.filled, self.filled + length
        self.positions_BS[:, start : self.filled] = visible_BT
        self.chunk_BS[:, start : self.filled] = chunk_BT
        if start and self.replay is not None:
            slots_BT = torch.arange(start, self.filled, device=where.device).expand_as(ids_BT)
            mask = dense_mask(chunk_BT, self.chunk_BS, visible_BT, self.positions_BS)
            return self.replay(self.model, ids_BT, mask, row_BT, col_BT, positions_BT, slots_BT)[:, -keep:]
        keys = (self.chunk_BS[:, : self.filled], self.positions_BS[:, : self.filled])
        sees_all = self.is_causal and length == 1
        mask = None if sees_all else dense_mask(chunk_BT, keys[0], visible_BT, keys[1])
        rows_B1 = torch.arange(batch, device=where.device)[:, None] * length
        keep_P = (rows_B1 + torch.arange(length - keep, length, device=where.device)).reshape(-1)
        x_PD = self.model(ids_BT, mask, row_BT, col_BT, positions_BT, self.cache, keep_P)
        return x_PD.view(batch, keep, -1)

    def feed_rows(self, first_B: np.ndarray, first_B1: Tensor, length: int) -> Tensor:
        """Feed each row's tail tokens first_B[b] .. first_B[b] + length - 1 (the first time: all
        from 0, after the prompts), over whatever was fed there; return their hidden states (B, length, D).

        `first_B1`: the same numbers, on the device. For tails without chunks, which keep one cache slot a
        token: what comes later is hidden by causality.
        """
        longest, missing = self.prompt.ids_BT.shape[1], self.tail.ids_BT.shape[1]
        if self.filled == 0:
            assert not first_B.any()
            hidden = self.feed(torch.arange(length, device=first_B1.device), length)
            rest_BT = self.lengths_B[:, None] + torch.arange(length, missing, device=self.lengths_B.device)
            self.positions_BS[:, longest + length : longest + missing] = rest_BT
            return hidden
        where_BT = first_B1 + torch.arange(length, device=first_B1.device)
        ids_BT, row_BT, col_BT = (
            getattr(self.tail, n).gather(1, where_BT) for n in ("ids_BT", "row_BT", "col_BT")
        )
        positions_BT, chunk_BT = self.lengths_B[:, None] + where_BT, torch.zeros_like(where_BT)
        if self.replay is not None:
            mask = dense_mask(chunk_BT, self.chunk_BS, positions_BT, self.positions_BS)
            fields = (row_BT, col_BT, positions_BT, where_BT + longest)
            return self.replay(self.model, ids_BT, mask, *fields)
        self.cache.seek((first_B + longest).tolist())
        stop = longest + int(first_B.max()) + length
        mask = None
        if length > 1 or not self.is_causal or first_B.min() != first_B.max():
            mask = dense_mask(chunk_BT, self.chunk_BS[:, :stop], positions_BT, self.positions_BS[:, :stop])
        return self.model(ids_BT, mask, row_BT, col_BT, positions_BT, self.cache)

    def write(self, where: Tensor, ids: Tensor) -> None:
        self.tail.ids_BT[:, where] = ids

    def read(self, where: Tensor) -> Tensor:
        """Return ids of the tail, (B, *where.shape)."""
        return self.tail.ids_BT[:, where]
