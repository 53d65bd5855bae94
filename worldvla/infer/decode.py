"""Prompts -> action codes or image codes: structure forced, scores taken over one modality only.

Dims: B batch, T positions fed at once, S slots of the cache, F fields of a slot, G actions decoded in
parallel, U actions of a chunk, A action dims, N open codes of a frame (those of its state, if it has one,
before those of its views), V scores of one code.

The mask makes the U actions of a chunk independent given the prompt, and structure is never sampled, so their
positions are known before any is decoded: block u token j stands at P + (A + 2)(u - 1) + j. All U are decoded
in parallel, A passes a chunk, with the tokens of sequential decoding (WorldVLA: (A + 2) U + 1 passes). Under
the plain causal mask they follow one another.

The codes of a frame depend on each other, so they are guessed and verified (speculative decoding), unless the
model predicts them at once (layout.frame_at_once): see `decode_frame`, and docs/DECODING.md for why all give
the tokens of sequential decoding. Scores are float32 whatever the model's type: rounded to bfloat16, the best
two would often be one number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldvla.batch import KIND_IMAGE, KIND_STATE, Batch, Sample
from worldvla.infer.draft import FrameStats, Window
from worldvla.infer.graphs import Room, Runner
from worldvla.model.mask import dense_mask, read_ids
from worldvla.model.transformer import Transformer, previous_ids
from worldvla.vocab import NUM_BIN_CODES, Vocab

HIDDEN_POSITION = 2**30
"""Position of padding: after every query, so nothing attends to it."""
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""Scores that lie nearer than this, relative to their spread, may change places by rounding alone."""
PARALLEL = "parallel"
Seeds = int | Sequence[int]
"""Of all rows, or one a row: a row draws what it would draw alone with its seed."""


@dataclass(frozen=True)
class Chunk:
    """Actions of a batch of prompts and how sure the model is of them."""

    codes_BUA: np.ndarray
    """int64 in 0..254."""
    entropy_BUA: np.ndarray
    """Nats, of each dim given those before it as decoded; at most ln 255. An action's is the sum."""
    margin_BUA: np.ndarray
    """Probability of the likeliest code minus that of the second; at temperature 1, whatever was drawn."""


@torch.inference_mode()
def decode_chunk(
    runner: Runner,
    vocab: Vocab,
    prompts: Sequence[Sample],
    tail: Sample,
    blocks_UA: np.ndarray,
    temperature: float = 0.0,
    seed: Seeds = 0,
    parallel: bool = True,
) -> Chunk:
    """Decode the chunk of every prompt: greedy, or drawn at `temperature`.

    `tail`: what follows every prompt (`SampleBuilder.policy_tail`). `blocks_UA`: (U, A + 2), where in the
    tail each action's begin, dims and end stand. Whether the chunk's actions see each other is read from
    `tail.chunk`. `parallel` off: in sequence even where the mask does not ask for it, to compare with.
    """
    if not len(blocks_UA):
        raise ValueError("a chunk needs at least one action, got U = 0: raise layout.chunk")
    stream = _Stream(runner, prompts, tail, vocab.pad)
    # From here to the end nothing goes to or from the device: it never waits for the processor.
    blocks, num_dims = torch.from_numpy(blocks_UA).to(stream.tail_BT.device), blocks_UA.shape[1] - 2
    groups = [blocks] if parallel and chunk_path(tail, blocks_UA) == PARALLEL else blocks.split(1)
    head_VD = _head(runner.model, vocab.action)
    shape = (len(blocks_UA), num_dims, NUM_BIN_CODES - 1)
    noise_BUAV = _noise(shape, len(prompts), temperature, seed, head_VD.device)
    waiting, scores_BGAV, start = blocks.new_empty(0), [], 0
    for group in groups:
        scores = []
        for dim in range(num_dims):
            x_BGD = stream.feed(torch.cat((waiting, group[:, dim])), len(group))
            scores.append(bin_scores(_scores(x_BGD, head_VD)))
            noise = None if noise_BUAV is None else noise_BUAV[:, start : start + len(group), dim]
            codes_BG = _disturbed(scores[-1], temperature, noise).argmax(-1)
            stream.tail_BT[:, group[:, dim + 1]] = codes_BG + vocab.action.start
            waiting = waiting[:0]
        # The last dim and the end: only later blocks of a causal chain see them.
        waiting = group[:, num_dims:].reshape(-1)
        scores_BGAV.append(torch.stack(scores, 2))
        start += len(group)
    log_p_BUAV = torch.cat(scores_BGAV, 1).log_softmax(-1)
    best_BUA2 = log_p_BUAV.topk(2).values.exp()
    entropy_BUA = -(log_p_BUAV.exp() * log_p_BUAV).sum(-1)
    _check_finite(bool(entropy_BUA.isfinite().all()))
    return Chunk(
        codes_BUA=stream.tail_BT[:, blocks[:, 1:-1]].cpu().numpy() - vocab.action.start,
        entropy_BUA=entropy_BUA.cpu().numpy(),
        margin_BUA=(best_BUA2[..., 0] - best_BUA2[..., 1]).cpu().numpy(),
    )


@torch.inference_mode()
def regress_chunk(model: Transformer, vocab: Vocab, prompts: Sequence[Sample]) -> np.ndarray:
    """Return the continuous head's normalised actions (B, U, A) float32: one pass over the prompts."""
    assert model.action_head is not None
    device = next(model.parameters()).device
    batch = Batch.stack(prompts, vocab.pad).to(device)
    x_BTD = model(batch.ids_BT, dense_mask(batch.chunk_BT), batch.row_BT, batch.col_BT)
    lengths_B = torch.tensor([len(p) for p in prompts], device=device)
    actions_BUA = model.action_head(x_BTD, lengths_B).cpu().numpy()
    _check_finite(bool(np.isfinite(actions_BUA).all()))
    return actions_BUA


def chunk_path(tail: Sample, blocks_UA: np.ndarray) -> str:
    """Return PARALLEL where the mask makes that exact: no action sees another; else the reason."""
    chunk_UA = tail.chunk[blocks_UA]
    is_apart = chunk_UA.min() > 0 and (chunk_UA == chunk_UA[:, :1]).all()
    if len(blocks_UA) == 1 or (is_apart and len(np.unique(chunk_UA[:, 0])) == len(blocks_UA)):
        return PARALLEL
    return "sequential: actions of a chunk see those before them (layout.selective_mask is off)"


@torch.inference_mode()
def decode_frame(
    runner: Runner,
    vocab: Vocab,
    prompts: Sequence[Sample],
    tail: Sample,
    guess_BN: np.ndarray | None = None,
    window: Window | None = None,
    temperature: float = 0.0,
    seed: Seeds = 0,
) -> tuple[np.ndarray, FrameStats]:
    """Return codes (B, N) int64 of the next frame, in order of generation, and their cost.

    `tail`: `SampleBuilder.world_tail`; its open positions are those of KIND_STATE and KIND_IMAGE. `guess_BN`:
    codes, of which a pass verifies a window; without, one code a pass. The codes do not depend on the guess:
    each is the model's choice given all before it. With a temperature that choice is the best of
    scores / temperature + Gumbel noise, drawn once for each row and position, which makes it a draw from the
    softmax and, given the noise, as certain as a greedy one.
    """
    clip = ClipDecoder(runner, vocab, tail)
    clip.begin(prompts)
    return clip.decode(guess_BN, window, temperature, seed)


class ClipDecoder:
    """Frames of a batch of rollouts, one after the other, in one cache: each is decoded as `decode_frame` has
    it, and the next goes on from there.

    `tail`, `actions`, `lead`: as `SampleBuilder.world_clip` returns them; by default the clip is one frame.
    The first `lead` tokens of a rollout's clips are mostly alike, and the next clip finds them in the cache.
    """

    def __init__(
        self, runner: Runner, vocab: Vocab, tail: Sample, actions: np.ndarray | None = None, lead: int = 0
    ) -> None:
        if (tail.chunk > 0).any() or KIND_IMAGE not in tail.kind:
            raise ValueError(
                "a frame needs the tail of a world sample, got another: SampleBuilder.world_tail()"
            )
        self.runner, self.vocab, self.tail, self.actions, self.lead = runner, vocab, tail, actions, lead
        is_state_T = tail.kind == KIND_STATE
        open_N = np.flatnonzero(np.isin(tail.kind, (KIND_IMAGE, KIND_STATE)))
        self.num_frames = 1 if actions is None else 1 + len(actions)
        self.open_CN = open_N.reshape(self.num_frames, -1)
        self.num_states = int(is_state_T.sum()) // self.num_frames
        self.start_T = np.where(is_state_T, vocab.state.start, vocab.image.start)
        """Id of code 0 at each position."""
        self.is_at_once = bool((tail.chunk < 0).any())
        self.num_done = self.num_frames
        """Frames of the clip that are decoded; all of them: the next begins a clip."""
        self._stream: _Stream | None = None

    def begin(self, prompts: Sequence[Sample]) -> None:
        """Begin a clip after these prompts."""
        if self._stream is None or not self._stream.rewrite(prompts, self.lead):
            self._stream = _Stream(self.runner, prompts, self.tail, self.vocab.pad)
        self.num_done = 0

    def act(self, actions_BA: np.ndarray) -> None:
        """Say the actions after the last decoded frame, ids of the vocabulary (B, A)."""
        assert self._stream is not None
        if self.actions is not None and self.actions.size:
            device = self._stream.tail_BT.device
            places_A = torch.from_numpy(self.actions[self.num_done - 1]).to(device)
            self._stream.tail_BT[:, places_A] = torch.from_numpy(actions_BA).to(device)

    def keep(self, rows: np.ndarray) -> None:
        """Go on with these rows alone: bool (B,), or indices, any of them several times."""
        if self._stream is not None:
            self._stream.keep(torch.from_numpy(np.arange(len(self._stream.rows_B1))[rows]))

    @torch.inference_mode()
    def decode(
        self,
        guess_BN: np.ndarray | None = None,
        window: Window | None = None,
        temperature: float = 0.0,
        seed: Seeds = 0,
    ) -> tuple[np.ndarray, FrameStats]:
        """Return codes (B, N) of the next frame and their cost, as `decode_frame`."""
        stream, open_N = self._stream, self.open_CN[self.num_done]
        assert stream is not None
        begin = 0 if self.num_done == 0 else int(self.open_CN[self.num_done - 1, -1])
        stream.go_on(begin)
        num_codes, batch, device = len(open_N), len(stream.rows_B1), stream.tail_BT.device
        places_N, start_T = (torch.from_numpy(array).to(device) for array in (open_N, self.start_T))
        nth_T = torch.full((len(self.tail),), -1, device=device)  # which code stands there; structure: none
        nth_T[places_N] = torch.arange(num_codes, device=device)
        if guess_BN is not None:
            if guess_BN.shape != (batch, num_codes):
                raise ValueError(
                    f"a guess of {batch} frames needs codes {(batch, num_codes)}, got {guess_BN.shape}"
                )
            stream.tail_BT[:, places_N] = torch.from_numpy(guess_BN).to(device) + start_T[places_N]
        window = Window(fixed=1) if guess_BN is None else window or Window(device)
        choose = _Chooser(self.runner.model, self.vocab, self.num_states, num_codes, batch, temperature, seed)
        stats = FrameStats(codes=batch * num_codes)
        done_B = np.zeros(batch, dtype=np.int64)
        while (done_B < num_codes).any():
            # At once: the states code by code; when all rows have said theirs, all codes of the frame.
            has_states = bool((done_B < self.num_states).any())
            is_frame = self.is_at_once and not has_states
            stop = self.num_states if self.is_at_once and has_states else num_codes
            width = num_codes if is_frame else window.width(stop, batch)
            first_B, length = _next_window(open_N[:stop], done_B, begin, width, stream.room)
            first_B1, done_B1 = torch.from_numpy(np.stack((first_B, done_B))).to(device)[..., None]
            where_BT = first_B1 + torch.arange(length, device=device)
            x_BTD, after_BT = stream.feed(where_BT, length), where_BT + 1
            nth_BT = nth_T[after_BT]
            codes_BT, is_close_BT, is_finite_BT = choose(x_BTD, nth_BT, has_states)
            choice_BT, is_new_BT = codes_BT + start_T[after_BT], nth_BT >= done_B1
            ids_BT = stream.tail_BT.gather(1, after_BT)
            is_kept_BT, is_right_BT = verify(ids_BT, choice_BT, is_new_BT)
            is_kept_BT |= is_new_BT & is_frame
            stream.tail_BT.scatter_(1, after_BT, torch.where(is_new_BT, choice_BT, ids_BT))
            counts = (is_kept_BT, is_right_BT, is_kept_BT & is_close_BT, is_kept_BT & ~is_finite_BT)
            kept_B, right_B, close_B, broken_B = torch.stack(counts).sum(2).cpu().numpy()
            _check_finite(not broken_B.any())
            is_open_B, done_B = done_B < num_codes, done_B + kept_B
            stats.passes += 1
            stats.close += int(close_B.sum())
            if guess_BN is not None and not is_frame:
                stats.judged += int(kept_B.sum())
                stats.accepted += int(right_B.sum())
                window.update(float(kept_B[is_open_B].mean()))
        self.num_done += 1
        return (stream.tail_BT[:, places_N] - start_T[places_N]).cpu().numpy(), stats


def _next_window(
    open_N: np.ndarray, done_B: np.ndarray, begin: int, width: int, room: Room
) -> tuple[np.ndarray, int]:
    """Return from which position of the tail each row goes on, that of its last decided code or `begin`, and
    how many tokens all rows feed for the next `width` codes.
    """
    num_codes, end = len(open_N), int(open_N[-1])
    first_B = np.where(done_B == 0, begin, open_N[done_B - 1])
    length = int((open_N[np.minimum(done_B + width, num_codes) - 1] - first_B).max())
    length = min(end, room.length(length))
    return np.minimum(first_B, end - length), length  # near the end some codes are fed again


def verify(guess_BT: Tensor, choice_BT: Tensor, is_new_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return which codes of a window are decided, and which of the guesses were right; bool (B, T) each.

    Among the new codes, all up to the first guess that is not the model's choice are right. That one is
    decided too, by the choice: nothing wrong precedes it. Choices after it are but the next guess.
    """
    is_wrong_BT = is_new_BT & (guess_BT != choice_BT)
    num_wrong_BT = is_wrong_BT.cumsum(1)
    is_right_BT = is_new_BT & (num_wrong_BT == 0)
    return is_right_BT | (is_wrong_BT & (num_wrong_BT == 1)), is_right_BT


def bin_scores(logits: Tensor) -> Tensor:
    """Return float32 scores of codes 0..254 from those of all 256: code 255 decodes like 254, so their
    probabilities add.
    """
    logits = logits.float()
    last = torch.logaddexp(logits[..., NUM_BIN_CODES - 2], logits[..., NUM_BIN_CODES - 1])
    return torch.cat((logits[..., : NUM_BIN_CODES - 2], last[..., None]), -1)


def _head(model: Transformer, span: range) -> Tensor:
    return model.head.weight[span.start : span.stop].float()


def _scores(x_BTD: Tensor, head_VD: Tensor) -> Tensor:
    """Return scores (B, T, V) of the codes that may follow each position."""
    return F.linear(x_BTD.float(), head_VD)


class _Chooser:
    """Hidden states -> codes of frames: those of the state, and those of images, by one softmax over all or
    level by level."""

    def __init__(
        self,
        model: Transformer,
        vocab: Vocab,
        num_states: int,
        num_codes: int,
        batch: int,
        temperature: float,
        seed: Seeds,
    ) -> None:
        self.code_head, self.temperature, self.dtype = model.code_head, temperature, model.head.weight.dtype
        self.head_VD = None if self.code_head is not None else _head(model, vocab.image)
        self.state_VD, self.num_states = _head(model, vocab.state), num_states
        levels = self.code_head.levels.sizes if self.code_head is not None else ()
        shape = (len(levels), max(levels)) if levels else (len(vocab.image),)
        device, apart = model.head.weight.device, 2**40
        others = seed + apart if isinstance(seed, int) else [s + apart for s in seed]
        self.noise_BN = _noise((num_codes - num_states, *shape), batch, temperature, seed, device)
        self.noise_BS = _noise((num_states, NUM_BIN_CODES), batch, temperature, others, device)
        self.rows_B1 = torch.arange(batch, device=device)[:, None]

    def __call__(self, x_BTD: Tensor, nth_BT: Tensor, has_states: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes (B, T), the nth of each frame, and where rounding may have decided, and where the
        scores are finite. `has_states`: whether a state is among them."""
        images = self._images(x_BTD, self._of(self.noise_BN, nth_BT - self.num_states))
        if not has_states:
            return images
        states = self._best(x_BTD, self.state_VD, self._of(self.noise_BS, nth_BT))
        is_state_BT = nth_BT < self.num_states
        code, is_close, is_finite = (
            torch.where(is_state_BT, a, b) for a, b in zip(states, images, strict=True)
        )
        return code, is_close, is_finite

    def _of(self, noise: Tensor | None, nth_BT: Tensor) -> Tensor | None:
        return None if noise is None else noise[self.rows_B1, nth_BT.clamp(0, noise.shape[1] - 1)]

    def _images(self, x_BTD: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if self.head_VD is not None:
            return self._best(x_BTD, self.head_VD, noise)
        assert self.code_head is not None
        noise_PEL = None if noise is None else noise.flatten(0, 1)
        codes_P, lead_P = self.code_head.choose(x_BTD.flatten(0, 1), self.temperature, noise_PEL)
        limit = CLOSE.get(self.dtype, CLOSE[torch.bfloat16])
        shape = x_BTD.shape[:2]
        return codes_P.view(shape), (lead_P < limit).view(shape), lead_P.isfinite().view(shape)

    def _best(self, x_BTD: Tensor, head_VD: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        scores_BTV = _disturbed(_scores(x_BTD, head_VD), self.temperature, noise)
        return scores_BTV.argmax(-1), *_near_ties(scores_BTV, self.dtype)


def _noise(
    shape: tuple[int, ...], batch: int, temperature: float, seed: Seeds, device: torch.device
) -> Tensor | None:
    """Return standard Gumbel noise (B, *shape), the same on every device: the argmax of log p + noise is a
    draw from p. None at temperature 0."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or above and finite, got {temperature}")
    if not isinstance(seed, int) and len(seed) != batch:
        raise ValueError(f"{batch} rows need one seed or {batch}, got {len(seed)}")
    if temperature == 0:
        return None
    seeds = [seed] if isinstance(seed, int) else seed
    generators = (torch.Generator().manual_seed(s) for s in seeds)
    noise = torch.stack([-torch.empty(shape).exponential_(generator=g).log() for g in generators])
    return noise.to(device).expand(batch, *shape)


def _disturbed(scores: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """Return the scores whose best is the choice."""
    return scores if noise is None else scores / temperature + noise


def _near_ties(scores: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return where rounding may have decided between the best two scores, and where the best is finite."""
    best = scores.topk(2).values
    limit = CLOSE.get(dtype, CLOSE[torch.bfloat16])
    return best[..., 0] - best[..., 1] < limit * scores.std(-1), best[..., 0].isfinite()


def _check_finite(is_finite: bool) -> None:
    if not is_finite:
        raise ValueError("the model's scores are not finite: its weights are damaged, or need dtype float32")


class _Stream:
    """Sequences being written: prompts of any lengths, then one common tail, fed in any order that the mask
    allows. Position t of the tail has slot `longest` + t, so what was fed there before is written over.
    """

    def __init__(self, runner: Runner, prompts: Sequence[Sample], tail: Sample, pad: int) -> None:
        if not prompts:
            raise ValueError("nothing to decode: got no prompts, expected at least one")
        device = runner.model.embed.weight.device
        self.runner, self.pad = runner, pad
        prompt = Batch.stack(prompts, pad).to(device)
        after = Batch.stack([tail] * len(prompts), pad).to(device)
        self.longest = prompt.ids_BT.shape[1]
        self.is_alike = min(len(p) for p in prompts) == self.longest
        self.is_causal = self.is_alike and not tail.chunk.any()
        self.room = runner.open(len(prompts), self.longest + len(tail))
        self._turn = self.room.turn
        self._pending = 0, self.longest
        """Slots to feed before the next tokens."""
        lengths_B1 = torch.tensor([[len(p)] for p in prompts], device=device)
        counting_T = torch.arange(self.room.cache.capacity, device=device)
        positions_BS = lengths_B1 + counting_T - self.longest  # of the tail
        of_prompt = counting_T[: self.longest].expand_as(prompt.ids_BT)
        positions_BS[:, : self.longest] = of_prompt.masked_fill(of_prompt >= lengths_B1, HIDDEN_POSITION)
        spare = self.room.cache.capacity - self.longest - len(tail)
        names = ("ids_BT", "row_BT", "col_BT", "chunk_BT")
        whole = [torch.cat((getattr(prompt, n), getattr(after, n)), 1) for n in names]
        ids, row, col, chunk = (F.pad(t, (0, spare)) for t in whole)
        previous = []
        if runner.model.previous_in is not None:
            if tail.row.any() and len({len(prompt) for prompt in prompts}) > 1:
                raise ValueError("prompts of several lengths: give all worlds of a batch as many frames")
            previous = [previous_ids(ids, row, col)]
        self.table_FBS = torch.stack((ids, row, col, positions_BS, *previous, chunk))
        """The fields of every slot."""
        self.tail_length = len(tail)

    @property
    def tail_BT(self) -> Tensor:
        """Ids of the tail: write decoded ones here."""
        return self.table_FBS[0, :, self.longest : self.longest + self.tail_length]

    @property
    def rows_B1(self) -> Tensor:
        return torch.arange(self.table_FBS.shape[1], device=self.table_FBS.device)[:, None]

    def rewrite(self, prompts: Sequence[Sample], lead: int) -> bool:
        """Begin again after other prompts, and feed them from token `lead` on where all before it are as they
        were; False where the number of rows or a length is another."""
        if len(prompts) != self.table_FBS.shape[1] or {len(prompt) for prompt in prompts} != {self.longest}:
            return False
        ids_BT = Batch.stack(prompts, self.pad).ids_BT.to(self.table_FBS.device)
        is_known = self.is_alike and torch.equal(ids_BT[:, :lead], self.table_FBS[0, :, :lead])
        self.table_FBS[0, :, : self.longest] = ids_BT
        self._pending, self.room.is_empty = (lead if is_known else 0, self.longest), True
        return True

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, indices; all is fed again, in a room of their own."""
        self.table_FBS, self._turn = self.table_FBS[:, rows.to(self.table_FBS.device)], -1

    def go_on(self, begin: int) -> None:
        """Be ready to feed the tail from `begin` on, also if the room has served another query since."""
        if self._turn != self.room.turn:
            self.room = self.runner.open(self.table_FBS.shape[1], self.longest + self.tail_length)
            self._turn, self._pending = self.room.turn, (0, self.longest + begin)
        if self.runner.model.previous_in is not None:  # a frame may have been decoded since
            self.table_FBS[4] = previous_ids(*self.table_FBS[:3])

    def feed(self, where: Tensor, keep: int) -> Tensor:
        """Feed the tail's tokens at `where`, (T,) or (B, T), after what is pending; return hidden states (B,
        keep, D) of the last.
        """
        slots_BT = (where + self.longest).expand(self.table_FBS.shape[1], -1)
        if self._pending[0] < self._pending[1]:
            before_T = torch.arange(*self._pending, device=where.device)
            slots_BT = torch.cat((before_T.expand(len(slots_BT), -1), slots_BT), 1)
            self._pending = 0, 0
        *fields, chunk_BT = self.table_FBS[:, self.rows_B1, slots_BT].unbind()
        fields[0] = read_ids(fields[0], chunk_BT, fields[1], self.pad)
        reach, mask = self.room.seek(slots_BT), None
        if not (self.is_causal and self.room.in_turn and slots_BT.shape[1] == 1):
            keys = self.table_FBS[:, :, :reach]
            mask = dense_mask(chunk_BT, keys[-1], fields[3], keys[3])
        return self.room.run(fields, mask, slots_BT, keep)
