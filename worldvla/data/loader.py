"""TokenStores -> Batches: a pure function of (seed, step), so resuming needs nothing but the step.

Policy and world samples are two streams, each a fresh permutation of its frames every epoch, without
replacement. With `data.weights` each store is permuted by itself, and the stores are mixed by weight.
Codes, actions and states stay on the disk (`FrameTable`), and a batch is copied from templates
(`data/sample.py`): a few milliseconds for 64 samples. Ranks assemble the same batches and take their rows.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch

from worldvla.batch import Batch, Sample
from worldvla.config import DataConfig, LayoutConfig
from worldvla.data.sample import ROWS, SampleBuilder, Template, as_sample
from worldvla.data.store import EpisodeRow, TokenStore
from worldvla.sim.suites import with_scene
from worldvla.tokenizers.action import DatasetStatistics, Statistics, choose, compute_statistics, quantize
from worldvla.vocab import Vocab

Mode = Literal["policy", "world"]
MODES: tuple[Mode, Mode] = ("policy", "world")
ANCHOR = 40
"""Steps at most from the frame that a world sample begins with to the first that it goes on from."""
VAL_SEED = 0
"""Order of the validation samples: the same for every training seed, so that runs compare."""
BLOCK = 2**16
"""Samples among which stores have exactly the shares of their weights, rounded to one sample."""


@dataclass(frozen=True)
class FrameTable:
    """What the sample of each frame is filled with: F frames of all stores, one after another. Numbers and
    codes are read when they are asked for: a frame costs 40 bytes of memory."""

    builder: SampleBuilder
    sources: Sequence[TokenStore]
    statistics: Sequence[Statistics]
    """Of each store."""
    starts_F: np.ndarray
    """First frame of the frame's episode."""
    stops_F: np.ndarray
    """One past its last frame."""
    stores_F: np.ndarray
    """The frame's store."""
    offsets: np.ndarray
    """First frame of each store."""
    codes: list[list[np.ndarray]]
    """Of each store and view the image codes, (frames of the store, N)."""
    instructions: np.ndarray
    """(F,) of str."""
    imagined: list[list[np.ndarray] | None]
    """As `codes`, but imagined; None of a store without."""
    imagined_start_F: np.ndarray
    """The frame from which each was imagined; -1 in stores without."""

    @classmethod
    def of(cls, stores: Sequence[TokenStore], builder: SampleBuilder, data: DataConfig) -> "FrameTable":
        layout = builder.layout
        episodes = [e for store in stores for e in store.episodes]
        texts = np.array([prompted(e, data.scene_prefix) for e in episodes], dtype=object)
        lengths = [len(store) for store in stores]
        offsets = np.cumsum([0, *lengths])[:-1]
        starts, stops = frame_spans(stores)
        imagined = [store.imagined for store in stores]
        begins = [
            np.full(length, -1) if own is None else offset + own.start
            for own, length, offset in zip(imagined, lengths, offsets, strict=True)
        ]
        return cls(
            builder=builder,
            sources=stores,
            statistics=[choose(builder.all_statistics, key) for key in data.datasets or ("",) * len(stores)],
            starts_F=starts,
            stops_F=stops,
            stores_F=np.repeat(np.arange(len(stores)), lengths),
            offsets=offsets,
            codes=[[store.codes[view] for view in layout.views] for store in stores],
            instructions=np.repeat(texts, [e.length for e in episodes]),
            imagined=[own and [own.codes[view] for view in layout.views] for own in imagined],
            imagined_start_F=np.concatenate(begins),
        )

    def template(self, frame: int, mode: Mode) -> Template:
        """Return the template of the frame's sample: at an episode's start a policy's holds fewer frames."""
        if mode == "world":
            return self.builder.world_template(self.builder.layout.clip)
        before = frame - int(self.starts_F[frame])
        count = min(before + 1, self.builder.layout.history)
        return self.builder.policy_template(self.instructions[frame], count)

    def numbers(
        self, frames_B: np.ndarray, mode: Mode
    ) -> tuple[np.ndarray | None, np.ndarray, Sequence[np.ndarray | None]]:
        """Return, of the frames' samples, the chunks (B, U, A) in [-1, 1] that a policy should execute (None
        of world samples), the ids of their actions, (B, U, A) or (B, C, A), and of each one's states (N, S).
        """
        layout, vocab = self.builder.layout, self.builder.vocab

        def chunk(own: Statistics, store: TokenStore, rows_B: np.ndarray, stops_B: np.ndarray) -> np.ndarray:
            return own.normalize_actions(policy_chunks(store, rows_B, stops_B, layout.chunk))

        def conditions(own: Statistics, store: TokenStore, rows_B: np.ndarray, _: np.ndarray) -> np.ndarray:
            return own.encode_world_actions(store.actions[rows_B[:, None] + np.arange(layout.clip)])

        def states(own: Statistics, store: TokenStore, rows_B: np.ndarray, _: np.ndarray) -> np.ndarray:
            return own.encode_states(store.states[rows_B[:, None] + np.arange(number)]) + vocab.state.start

        values_BUA = self._gather(frames_B, chunk) if mode == "policy" else None
        codes = self._gather(frames_B, conditions) if values_BUA is None else quantize(values_BUA)
        number = len(self.template(int(frames_B[0]), mode).states)
        states_B = [*self._gather(frames_B, states)] if number else [None] * len(frames_B)
        return values_BUA, codes + vocab.action.start, states_B

    def _gather(self, frames_B: np.ndarray, take: Callable[..., np.ndarray]) -> np.ndarray:
        """Return what `take` gives for the frames, (B, ..): of each store it gets the statistics, the store,
        its rows (b,) and where their episodes end (b,)."""
        stores_B, parts, places = self.stores_F[frames_B], [], []
        for index in np.unique(stores_B).tolist():
            places.append(np.flatnonzero(stores_B == index))
            own_B, offset = frames_B[places[-1]], self.offsets[index]
            rows = own_B - offset, self.stops_F[own_B] - offset
            parts.append(take(self.statistics[index], self.sources[index], *rows))
        return np.concatenate(parts)[np.argsort(np.concatenate(places))]

    def fill(
        self,
        table: np.ndarray,
        frame: int,
        mode: Mode,
        actions: np.ndarray,
        states: np.ndarray | None,
        read: np.ndarray | None = None,
    ) -> None:
        """Write the frame's sample, with its ids of `numbers`, into the first columns of `table` (5, T). With
        `read` (T,), a world sample of imagined frames: there the ids as a model reads them, in `table` the
        real ones."""
        template = self.template(frame, mode)
        table[:, : len(template)] = template.table
        number, has_anchor = len(template.images), mode == "world" and self.builder.layout.anchor
        rows = (
            np.arange(frame, frame + number) if mode == "world" else np.arange(frame - number + 1, frame + 1)
        )
        if has_anchor:
            first = self.anchor(frame) if read is None else int(self.imagined_start_F[frame])
            rows = np.concatenate(([first], rows[:-1]))
        store, start = self.stores_F[frame], self.builder.vocab.image.start
        rows = rows - self.offsets[store]
        images = ([codes[i].astype(np.int64) + start for codes in self.codes[store]] for i in rows)
        template.fill(table[0], images, actions, states)
        if read is not None:
            imagined = self.imagined[store]
            assert imagined is not None
            read[: len(template)] = table[0, : len(template)]
            template.fill(read, ([c[i].astype(np.int64) + start for c in imagined] for i in rows), None)

    def is_imagined(self, frame: int) -> bool:
        """Return whether the world sample that starts at `frame` lies in one imagined piece."""
        last, start = frame + self.builder.layout.clip - 1, self.imagined_start_F
        return bool(start[frame] >= 0) and int(start[last]) == int(start[frame])

    def anchor(self, frame: int) -> int:
        """Return the earlier frame of its episode that a world sample begins with: always the same one, 0 to
        ANCHOR steps before."""
        before = (frame * 2_654_435_761 % 2**32) % (ANCHOR + 1)
        return max(int(self.starts_F[frame]), frame - before)

    def longest(self) -> dict[Mode, int]:
        """Return the number of tokens of the longest sample of each kind."""
        texts, builder = dict.fromkeys(self.instructions.tolist()), self.builder
        policy = [
            len(builder.policy_template(t, m + 1)) for t in texts for m in range(builder.layout.history)
        ]
        return {"world": len(builder.world_template(builder.layout.clip)), "policy": max(policy)}


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
        self.stores = stores
        check_stores(stores, builder.layout, builder.vocab)
        self.frames = FrameTable.of(stores, builder, data)
        lengths = [e.length for store in stores for e in store.episodes]
        held_out = np.repeat(np.concatenate(split(stores, data.val_fraction)), lengths)
        is_real = np.repeat([not store.is_augmented for store in stores], [len(store) for store in stores])
        _, stops = frame_spans(stores)
        is_start = {
            "policy": np.concatenate(
                [policy_starts(store, builder.layout.chunk, data.pad_chunks) for store in stores]
            ),
            "world": is_real & (np.arange(len(stops)) + builder.layout.clip < stops),
        }
        self._train = {mode: np.flatnonzero(is_start[mode] & ~held_out) for mode in MODES}
        rng = {mode: np.random.default_rng(VAL_SEED) for mode in MODES}
        of_val = is_real & held_out
        self._val = {mode: rng[mode].permutation(np.flatnonzero(is_start[mode] & of_val)) for mode in MODES}
        self._share = Fraction(str(data.world_fraction))
        self._sources = {mode: self._split_sources(own) for mode, own in self._train.items()}
        self._orders: dict[tuple[Mode, int], tuple[int, np.ndarray]] = {}
        self._blocks: dict[Mode, tuple[int, np.ndarray, np.ndarray]] = {}
        self._check()

    def batch(self, step: int) -> list[Batch]:
        """Return the training batch of `step`: its policy samples, its world samples, each if there are any.

        Of all samples before any step, world_fraction (rounded down) are world samples. They are longer:
        apart, a step costs a sixth less, and the loss is the same.
        """
        first, last = (int(self._share * self.batch_size * s) for s in (step, step + 1))
        policy = self._take("policy", self.batch_size * step - first, self.batch_size * (step + 1) - last)
        frames: dict[Mode, np.ndarray] = {"policy": policy, "world": self._take("world", first, last)}
        is_imagined = self.data.imagined > 0
        return [self._assemble(chosen, mode, is_imagined) for mode, chosen in frames.items() if len(chosen)]

    def val_batch(self, i: int, mode: Mode) -> Batch:
        """Return the i-th validation batch of one kind; past the last sample it wraps around."""
        frames = self._val[mode]
        if not len(frames):
            raise ValueError(
                f"data.val_fraction {self.data.val_fraction} holds out no {mode} sample: raise it"
            )
        chosen = np.arange(i * self.batch_size, (i + 1) * self.batch_size) % len(frames)
        return self._assemble(frames[chosen], mode)

    def num_train(self, mode: Mode) -> int:
        """Return the number of training samples of one kind."""
        return len(self._train[mode])

    def num_val(self, mode: Mode) -> int:
        """Return the number of held-out samples of one kind."""
        return len(self._val[mode])

    def sample(self, frame: int, mode: Mode) -> Sample:
        """Return the sample that starts at a frame (counted over all stores), unpadded and never cut."""
        left = int(frame_spans(self.stores)[1][frame]) - frame
        if mode == "world" and left <= (clip := self.builder.layout.clip):
            raise ValueError(f"frame {frame}: its episode goes on for {left - 1} steps, a clip has {clip}")
        table = np.zeros((len(ROWS), len(self.frames.template(frame, mode))), dtype=np.int64)
        _, (actions,), (states,) = self.frames.numbers(np.array([frame]), mode)
        self.frames.fill(table, frame, mode, actions, states)
        return as_sample(table)

    def _split_sources(self, frames: np.ndarray) -> list[np.ndarray]:
        """Return what a stream is mixed from: the samples of each store, or without weights of all."""
        if not self.data.weights:
            return [frames]
        return [frames[self.frames.stores_F[frames] == store] for store in range(len(self.stores))]

    def _take(self, mode: Mode, first: int, last: int) -> np.ndarray:
        """Return the frames of samples first .. last - 1 of a stream."""
        parts = [np.zeros(0, dtype=np.int64)]
        while first < last:
            block, inside = divmod(first, BLOCK)
            stop = min(BLOCK, inside + last - first)
            sources_M, numbers_M = (column[inside:stop] for column in self._mixed(mode, block))
            frames_M = np.empty(stop - inside, dtype=np.int64)
            for source in np.unique(sources_M).tolist():
                is_own = sources_M == source
                frames_M[is_own] = self._frames_of(mode, source, numbers_M[is_own])
            parts.append(frames_M)
            first += stop - inside
        return np.concatenate(parts)

    def _mixed(self, mode: Mode, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, of the samples of a block, the source of each and its number in that source, (BLOCK,)."""
        if (kept := self._blocks.get(mode)) is None or kept[0] != block:
            counts = self._counts(mode)
            sources_M = np.repeat(np.arange(len(counts)), counts)
            if self.data.weights:
                rng = np.random.default_rng((self.seed, MODES.index(mode), block, BLOCK))
                sources_M = rng.permutation(sources_M)
            numbers_M = np.empty(BLOCK, dtype=np.int64)
            for source, count in enumerate(counts.tolist()):
                numbers_M[sources_M == source] = block * count + np.arange(count)
            self._blocks[mode] = kept = block, sources_M, numbers_M
        return kept[1:]

    def _counts(self, mode: Mode) -> np.ndarray:
        """Return how many samples of a block each source gives: by its weight, if it has such samples."""
        weights = np.array(self.data.weights or (1.0,)) * [len(own) > 0 for own in self._sources[mode]]
        counts = np.diff(np.rint(np.cumsum(weights / weights.sum()) * BLOCK).astype(np.int64), prepend=0)
        if (bad := (weights > 0) & (counts == 0)).any():
            raise ValueError(
                f"data.weights {self.data.weights}: store {int(bad.argmax())} gets less than one of {BLOCK} "
                "samples; give it more weight, or leave it out"
            )
        return counts

    def _frames_of(self, mode: Mode, source: int, numbers: np.ndarray) -> np.ndarray:
        """Return the frames of the samples of these numbers, which ascend, of one source."""
        own = self._sources[mode][source]
        epochs, inside = np.divmod(numbers, len(own))
        parts = []
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            if (kept := self._orders.get((mode, source))) is None or kept[0] != epoch:
                seed = (self.seed, MODES.index(mode), epoch) + ((1 + source,) if self.data.weights else ())
                self._orders[mode, source] = kept = epoch, np.random.default_rng(seed).permutation(own)
            parts.append(kept[1][inside[epochs == epoch]])
        return np.concatenate(parts)

    def _assemble(self, frames: np.ndarray, mode: Mode, imagined: bool = False) -> Batch:
        """Return the samples of the frames (B,), padded to the longest, at most the sequence length; with
        `imagined`, some of them as they are read."""
        templates = [self.frames.template(frame, mode) for frame in frames.tolist()]
        tables = np.zeros((len(ROWS), len(frames), max(map(len, templates))), dtype=np.int64)
        tables[0] = self.builder.vocab.pad
        values_BT = np.full(tables.shape[1:], np.nan, dtype=np.float32)
        read_BT = tables[0].copy() if imagined and mode == "world" else None
        values_BUA, actions_B, states_B = self.frames.numbers(frames, mode)
        for i, (frame, template) in enumerate(zip(frames.tolist(), templates, strict=True)):
            read = read_BT[i] if read_BT is not None and self._reads_imagined(frame) else None
            self.frames.fill(tables[:, i], frame, mode, actions_B[i], states_B[i], read)
            if read_BT is not None and read is None:
                read_BT[i] = tables[0, i]
            if values_BUA is not None:
                values_BT[i, template.actions] = values_BUA[i]
        tables, values_BT = (a[..., : self.data.sequence_length] for a in (tables, values_BT))
        ints = {f"{name}_BT": torch.from_numpy(tables[k]) for k, name in enumerate(ROWS)}
        if read_BT is not None:
            ints["wrong_BT"] = torch.from_numpy(read_BT[:, : self.data.sequence_length])
        return Batch(**ints, value_BT=torch.from_numpy(values_BT))

    def _reads_imagined(self, frame: int) -> bool:
        """Return whether the world sample of `frame` reads imagined frames: always the same, of data.imagined
        of those that can."""
        draw = (frame * 2_246_822_519 % 2**32) / 2**32
        return draw < self.data.imagined and self.frames.is_imagined(frame)

    def _check(self) -> None:
        longest = self.frames.longest()
        bound = longest["policy"] if self.data.truncate else max(longest.values())
        if bound > self.data.sequence_length:
            raise ValueError(
                f"a sample has {bound} tokens, sequence_length is {self.data.sequence_length}: raise it "
                "(data.truncate cuts world samples, as published)"
            )
        for mode in MODES:
            share = self._share if mode == "world" else 1 - self._share
            if share and not self.num_train(mode):
                raise ValueError(
                    f"the stores hold no {mode} sample (episodes too short?): collect more or set pad_chunks"
                )
            if share:
                self._counts(mode)
            if share and self.data.val_fraction and not len(self._val[mode]):
                raise ValueError(
                    f"data.val_fraction {self.data.val_fraction} holds out no {mode} sample: set it to 0, or "
                    "collect more episodes"
                )
        if self._share and self.data.imagined and not any(store.imagined for store in self.stores):
            raise ValueError(
                f"data.imagined is {self.data.imagined}, but no store holds imagined frames: add them with "
                "`worldvla imagine STORE --world CHECKPOINT --out STORE_2`"
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
                sides = " ".join(str(side) for own in store.grids.values() for side in own)
                raise ValueError(
                    f"{store.path} has grids {store.grids}, the layout wants {view} {tuple(grid)}: a new "
                    f"model takes --layout.views {' '.join(store.grids)} --layout.grids {sides}; a trained "
                    "one needs images of its own size (`worldvla regenerate` renders LIBERO's again)"
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


def policy_chunks(store: TokenStore, rows_B: np.ndarray, stops_B: np.ndarray, chunk: int) -> np.ndarray:
    """Return the chunk (B, U, A) of each row of a store: the expert's answers, if it has them; else the
    actions that were executed, the last one repeated where the episode stops, before `stops_B`."""
    if store.expert_actions is not None:
        return store.expert_actions[rows_B, :chunk]
    return store.actions[np.minimum(rows_B[:, None] + np.arange(chunk), stops_B[:, None] - 1)]


def policy_starts(store: TokenStore, chunk: int, pad: bool) -> np.ndarray:
    """Return which frames (F,) of a store a policy may learn from: all, with the expert's answers in it.
    Without, a chunk counts if all of it was the expert's and, unless `pad` repeats the last action, inside
    the episode."""
    if store.expert_actions is not None:
        if (known := store.expert_actions.shape[1]) < chunk:
            raise ValueError(
                f"{store.path} holds chunks of {known} expert actions, layout.chunk is {chunk}: "
                f"collect again with --label {chunk}"
            )
        return np.ones(len(store), dtype=np.bool_)
    _, stops = frame_spans([store])
    frames = np.arange(len(store))
    last = np.minimum(frames + chunk, stops)
    expert_before = np.concatenate([[0], np.cumsum(store.is_expert)])
    is_start = expert_before[last] - expert_before[frames] == last - frames
    if not pad:
        is_start &= frames + chunk <= stops
    return is_start


def split(stores: Sequence[TokenStore], val_fraction: float) -> list[np.ndarray]:
    """Return, for each store, which episodes are held out (bool), by a hash of what the episode is.

    With a fraction above 0 and more than one episode, at least the one of the smallest hash is held out.
    """
    hashes = [np.array([_hash(episode.key) for episode in store.episodes]) for store in stores]
    every = np.sort(np.concatenate(hashes))
    threshold = (
        val_fraction
        if len(every) < 2 or not 0 < val_fraction < 1
        else max(val_fraction, np.nextafter(every[0], 1))
    )
    return [h < threshold for h in hashes]


def _hash(key: str) -> float:
    """Return a number in [0, 1) that depends on the episode's key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 256**6


def store_statistics(stores: Sequence[TokenStore], data: DataConfig, dataset: str = "") -> Statistics:
    """Return the normalisation statistics of all training episodes (held-out ones are not looked at), or of
    those of one dataset of `data.datasets`."""
    kept = [
        ~np.repeat(h, [e.length for e in s.episodes])
        for s, h in zip(stores, split(stores, data.val_fraction), strict=True)
    ]
    rows = [i for i in range(len(stores)) if not dataset or data.datasets[i] == dataset]
    actions = np.concatenate([stores[i].actions[kept[i]] for i in rows])
    states = np.concatenate([stores[i].states[kept[i]] for i in rows])
    return compute_statistics(actions, states, data.statistics)


def dataset_statistics(
    stores: Sequence[TokenStore], data: DataConfig, known: Mapping[str, Statistics]
) -> Statistics | DatasetStatistics:
    """Return the statistics of all stores or, where `data.datasets` names them, of each dataset; those of a
    name in `known` are taken from there."""
    if not data.datasets:
        return store_statistics(stores, data)
    names = dict.fromkeys(data.datasets)
    return DatasetStatistics({n: known.get(n) or store_statistics(stores, data, n) for n in names})
