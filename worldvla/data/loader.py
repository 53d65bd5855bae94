"""TokenStores -> Batches: a pure function of (seed, step), so resuming needs nothing but the step.

Policy and world samples are two streams, each a fresh permutation of its positions every epoch, without
replacement. Instructions, actions and states are encoded once at the start, and a batch is copied from
templates (`data/sample.py`): about 2 ms for 64 samples. With several ranks, rank r of W takes `batch(step * W
+ r)`.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np
import torch

from worldvla.batch import Batch, Sample
from worldvla.config import DataConfig, LayoutConfig
from worldvla.data.sample import DTYPES, ROWS, SampleBuilder, Template
from worldvla.data.store import EpisodeRow, TokenStore
from worldvla.sim.env import with_scene
from worldvla.tokenizers.action import Statistics, compute_statistics, normalize, quantize
from worldvla.vocab import Vocab

Mode = Literal["policy", "world"]
MODES: tuple[Mode, Mode] = ("policy", "world")
VAL_SEED = 0
"""Order of the validation samples: the same for every training seed, so that runs compare."""


class Loader:
    """`batch(step)` for training, `val_batch(i, mode)` for validation."""

    def __init__(
        self,
        stores: Sequence[TokenStore],
        builder: SampleBuilder,
        data: DataConfig,
        batch_size: int,
        seed: int,
    ) -> None:
        self.builder, self.data, self.batch_size, self.seed = builder, data, batch_size, seed
        layout = builder.layout
        check_stores(stores, layout, builder.vocab)
        self._stores = list(stores)
        self._starts, self._stops = frame_spans(stores)
        self._frame_store = np.repeat(np.arange(len(stores)), [len(s) for s in stores])
        self._frame_offset = np.cumsum([0] + [len(s) for s in stores])[self._frame_store]
        self._codes = [[store.codes[view] for view in layout.views] for store in stores]
        actions, states = (
            np.concatenate([getattr(s, name) for s in stores]) for name in ("actions", "states")
        )
        vocab, statistics = builder.vocab, builder.statistics
        self._action_ids = statistics.encode_world_actions(actions) + vocab.action.start
        targets = [policy_targets(store, layout.chunk, data.pad_chunks) for store in stores]
        low, high = statistics.action_low, statistics.action_high
        values = [normalize(chunks, low, high) for chunks, _ in targets]
        self._chunk_ids = np.concatenate([(quantize(v) + vocab.action.start).astype(np.int32) for v in values])
        """(F, K, A): the chunk that each frame asks for."""
        self._chunk_values = np.concatenate([v.astype(np.float32) for v in values])
        """(F, K, A): the same in [-1, 1], not quantised."""
        self._state_ids = statistics.encode_states(states) + vocab.state.start if layout.state else None

        texts = [prompted(e, data.scene_prefix) for store in stores for e in store.episodes]
        lengths = [e.length for store in stores for e in store.episodes]
        rows = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        self._frame_text = np.repeat([rows[text] for text in texts], lengths)
        self._policy_templates = [
            [builder.policy_template(t, m + 1) for m in range(layout.history)] for t in rows
        ]
        self._world_template = builder.world_template()

        held_out = np.repeat(np.concatenate([*split(stores, data.val_fraction)]), lengths)
        is_start = {
            "policy": np.concatenate([is_start for _, is_start in targets]),
            "world": np.arange(len(actions)) + 1 < self._stops,
        }
        self._train = {mode: np.flatnonzero(is_start[mode] & ~held_out) for mode in MODES}
        self._val = {mode: np.flatnonzero(is_start[mode] & held_out) for mode in MODES}
        self._val = {m: np.random.default_rng(VAL_SEED).permutation(self._val[m]) for m in MODES}
        self._share = Fraction(str(data.world_fraction))
        self._orders: dict[tuple[Mode, int], np.ndarray] = {}
        self._check()

    def batch(self, step: int) -> Batch:
        """Return the training batch of `step`; policy samples first.

        Of all samples before any step, world_fraction (rounded down) are world samples.
        """
        first, last = (int(self._share * self.batch_size * s) for s in (step, step + 1))
        world = self._take("world", first, last)
        policy = self._take("policy", self.batch_size * step - first, self.batch_size * (step + 1) - last)
        return self._assemble(policy, world)

    def val_batch(self, i: int, mode: Mode) -> Batch:
        """Return the i-th validation batch of one kind; past the last sample it wraps around."""
        positions = self._val[mode]
        if not len(positions):
            raise ValueError(f"data.val_fraction {self.data.val_fraction} holds out no {mode} sample: raise it")
        chosen = positions[np.arange(i * self.batch_size, (i + 1) * self.batch_size) % len(positions)]
        return self._assemble(chosen, chosen[:0]) if mode == "policy" else self._assemble(chosen[:0], chosen)

    def num_train(self, mode: Mode) -> int:
        """Return the number of training samples of one kind."""
        return len(self._train[mode])

    def num_val(self, mode: Mode) -> int:
        """Return the number of held-out samples of one kind."""
        return len(self._val[mode])

    def sample(self, frame: int, mode: Mode) -> Sample:
        """Return the sample that starts at a frame (counted over all stores), unpadded."""
        frames = np.array([frame])
        none = frames[:0]
        table = self._tables(frames, none)[:, 0] if mode == "policy" else self._tables(none, frames)[:, 0]
        length = len(self._policy_template(frame)[0]) if mode == "policy" else len(self._world_template)
        return Sample(**{name: table[k, :length].astype(DTYPES[name]) for k, name in enumerate(ROWS)})

    def _take(self, mode: Mode, first: int, last: int) -> np.ndarray:
        """Return the frames of samples first .. last - 1 of a stream."""
        count, parts = self.num_train(mode), []
        while first < last:
            epoch, inside = divmod(first, count)
            stop = min(count, inside + last - first)
            parts.append(self._order(mode, epoch)[inside:stop])
            first += stop - inside
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _order(self, mode: Mode, epoch: int) -> np.ndarray:
        if (mode, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[0] != mode}
            rng = np.random.default_rng((self.seed, MODES.index(mode), epoch))
            self._orders[mode, epoch] = rng.permutation(self._train[mode])
        return self._orders[mode, epoch]

    def _assemble(self, policy: np.ndarray, world: np.ndarray) -> Batch:
        tables = self._tables(policy, world)
        values_BT = np.full(tables.shape[1:], np.nan, dtype=np.float32)
        for i, frame in enumerate(policy.tolist()):
            values_BT[i, self._policy_template(frame)[0].actions] = self._chunk_values[frame]
        tables, values_BT = (a[..., : self.data.sequence_length] for a in (tables, values_BT))
        ints = {f"{name}_BT": torch.from_numpy(tables[k]) for k, name in enumerate(ROWS)}
        return Batch(**ints, value_BT=torch.from_numpy(values_BT))

    def _tables(self, policy: np.ndarray, world: np.ndarray) -> np.ndarray:
        """Return (5, B, T) int64: policy samples first, then world samples, padded to the sequence length or
        the longest sample."""
        tables = np.zeros((len(ROWS), len(policy) + len(world), self._width), dtype=np.int64)
        tables[0] = self.builder.vocab.pad
        for i, frame in enumerate(policy.tolist()):
            self._fill_policy(tables[:, i], frame)
        for i, frame in enumerate(world.tolist(), start=len(policy)):
            self._fill_world(tables[:, i], frame)
        return tables

    def _policy_template(self, frame: int) -> tuple[Template, int]:
        """Return the template of the chunk at `frame` and its oldest frame (fewer at an episode's start)."""
        oldest = max(int(self._starts[frame]), frame - self.builder.layout.history + 1)
        return self._policy_templates[self._frame_text[frame]][frame - oldest], oldest

    def _fill_policy(self, table: np.ndarray, frame: int) -> None:
        template, oldest = self._policy_template(frame)
        table[:, : len(template)] = template.table
        ids = table[0]
        if self._state_ids is not None:
            ids[template.state] = self._state_ids[frame]
        self._fill_images(ids, template, oldest)
        ids[template.actions] = self._chunk_ids[frame]

    def _fill_world(self, table: np.ndarray, frame: int) -> None:
        template = self._world_template
        table[:, : len(template)] = template.table
        self._fill_images(table[0], template, frame)
        if len(template.actions):
            table[0][template.actions[0]] = self._action_ids[frame]

    def _fill_images(self, ids: np.ndarray, template: Template, oldest: int) -> None:
        codes, start = self._codes[self._frame_store[oldest]], self.builder.vocab.image.start
        local = oldest - int(self._frame_offset[oldest])
        for k, views in enumerate(template.images):
            for view, positions in enumerate(views):
                ids[positions] = codes[view][local + k]
                ids[positions] += start

    def _check(self) -> None:
        longest = max(
            len(t) for t in [self._world_template, *(t for ts in self._policy_templates for t in ts)]
        )
        if longest > self.data.sequence_length and not self.data.truncate:
            raise ValueError(
                f"a sample has {longest} tokens, sequence_length is {self.data.sequence_length}: raise it "
                "(data.truncate cuts, as published)"
            )
        self._width = max(longest, self.data.sequence_length)
        if not 0 <= self._share <= 1:
            raise ValueError(f"data.world_fraction must be in [0, 1], got {self.data.world_fraction}")
        for mode in MODES:
            share = self._share if mode == "world" else 1 - self._share
            if share and not self.num_train(mode):
                raise ValueError(
                    f"the stores hold no {mode} sample (episodes too short?): collect more or set pad_chunks"
                )


def prompted(episode: EpisodeRow, scene_prefix: bool) -> str:
    """Return the instruction that a policy sample of the episode holds."""
    return with_scene(episode.instruction, episode.task) if scene_prefix else episode.instruction


def check_stores(stores: Sequence[TokenStore], layout: LayoutConfig, vocab: Vocab) -> None:
    """Raise ValueError where a store does not fit the layout, the vocabulary or the other stores."""
    if not stores:
        raise ValueError("a loader needs at least one token store: set data.stores")
    for store in stores:
        for view, grid in zip(layout.views, layout.grids, strict=True):
            if store.grids.get(view) != tuple(grid):
                raise ValueError(
                    f"{store.path} has grids {store.grids}, the layout wants {view} {tuple(grid)}"
                )
        if store.manifest["num_codes"] > len(vocab.image):
            raise ValueError(
                f"{store.path} has {store.manifest['num_codes']} image codes, "
                f"vocabulary {vocab.name} {len(vocab.image)}: build it for this tokenizer"
            )
        if store.manifest["tokenizer"] != stores[0].manifest["tokenizer"]:
            raise ValueError(
                f"{store.path} and {stores[0].path} come from different image tokenizers: tokenize them again"
            )


def frame_spans(stores: Sequence[TokenStore]) -> tuple[np.ndarray, np.ndarray]:
    """Return start and stop of every frame's episode, (F,) each, counted over all stores."""
    offsets = np.cumsum([0] + [len(store) for store in stores])
    spans = [
        (o + e.start, e.length) for store, o in zip(stores, offsets, strict=False) for e in store.episodes
    ]
    starts, lengths = (np.array(column, dtype=np.int64) for column in zip(*spans, strict=True))
    return np.repeat(starts, lengths), np.repeat(starts + lengths, lengths)


def policy_targets(store: TokenStore, chunk: int, pad: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the chunk (F, K, A) of every frame, and which frames (F,) a policy may learn from.

    With the expert's answers in the store, those, for every frame. Without, the actions that were executed: a
    chunk counts if all of it was the expert's and, unless `pad` repeats the last one, inside the episode.
    """
    if store.expert_actions is not None:
        if (known := store.expert_actions.shape[1]) < chunk:
            raise ValueError(
                f"{store.path} holds chunks of {known} expert actions, layout.chunk is {chunk}: "
                f"collect again with --label {chunk}"
            )
        return store.expert_actions[:, :chunk], np.ones(len(store), dtype=np.bool_)
    _, stops = frame_spans([store])
    frames = np.arange(len(store))
    last = np.minimum(frames + chunk, stops)
    expert_before = np.concatenate([[0], np.cumsum(store.is_expert)])
    is_start = expert_before[last] - expert_before[frames] == last - frames
    if not pad:
        is_start &= frames + chunk <= stops
    return store.actions[np.minimum(frames[:, None] + np.arange(chunk), stops[:, None] - 1)], is_start


def split(stores: Sequence[TokenStore], val_fraction: float) -> list[np.ndarray]:
    """Return, for each store, which episodes are held out (bool), by a hash of what the episode is.

    With a fraction above 0 and more than one episode, at least the one of the smallest hash is held out.
    """
    hashes = [np.array([_hash(i, e) for i, e in enumerate(store.episodes)]) for store in stores]
    every = np.sort(np.concatenate(hashes))
    threshold = (
        val_fraction
        if len(every) < 2 or not 0 < val_fraction < 1
        else max(val_fraction, np.nextafter(every[0], 1))
    )
    return [h < threshold for h in hashes]


def _hash(index: int, episode: EpisodeRow) -> float:
    """Return a number in [0, 1) that depends on the episode's identity alone."""
    key = f"{episode.suite}/{episode.task}/{episode.init}/{episode.seed}/{index}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 256**6


def store_statistics(stores: Sequence[TokenStore], data: DataConfig) -> Statistics:
    """Return the normalisation statistics of all training episodes (held-out ones are not looked at)."""
    kept = [
        ~np.repeat(h, [e.length for e in s.episodes])
        for s, h in zip(stores, split(stores, data.val_fraction), strict=True)
    ]
    actions = np.concatenate([s.actions[k] for s, k in zip(stores, kept, strict=True)])
    states = np.concatenate([s.states[k] for s, k in zip(stores, kept, strict=True)])
    return compute_statistics(actions, states, data.statistics)
