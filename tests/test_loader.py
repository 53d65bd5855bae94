"""The loader: a pure function of (seed, step), epochs without replacement, valid chunks, no leaks.

pytest tests/test_loader.py
"""

import json
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import LAYOUT as TINY
from token_stubs import PixelSums, random_episode

from worldvla.batch import KIND_ACTION, Batch, Sample
from worldvla.config import DataConfig, LayoutConfig
from worldvla.data.episode import Episode
from worldvla.data.loader import MODES, Loader, Mode, dataset_statistics, prompted, split, store_statistics
from worldvla.data.sample import SampleBuilder
from worldvla.data.show import CountedWords
from worldvla.data.store import TokenStore, write_store
from worldvla.files import write_digests
from worldvla.tokenizers.action import DatasetStatistics
from worldvla.train.build import _check_features
from worldvla.vocab import compact

LAYOUT = replace(TINY, world_prompt="imagine")
DATA = DataConfig(stores=("a", "b"), world_fraction=0.3, val_fraction=0.25, sequence_length=100)
EPISODES = [random_episode(seed, length=6 + seed % 5) for seed in range(12)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[TokenStore]:
    root = tmp_path_factory.mktemp("stores")
    write_store(root / "a", EPISODES[:7], PixelSums())
    write_store(root / "b", EPISODES[7:], PixelSums())
    return [TokenStore.open(root / name) for name in "ab"]


def make(
    stores: list[TokenStore], data: DataConfig = DATA, layout: LayoutConfig = LAYOUT, **changes: int
) -> Loader:
    settings = {"batch_size": 10, "seed": 3, **changes}
    statistics = dataset_statistics(stores, data, {})
    builder = SampleBuilder(layout, compact(64, 20), CountedWords(size=20), statistics)
    return Loader(stores, builder, data, **settings)


def test_a_frame_costs_few_bytes_of_memory(stores: list[TokenStore], tmp_path: Path) -> None:
    """Codes, actions and states stay on the disk; however few frames there are, 4 MB are held."""
    source, path, times = stores[0], tmp_path / "large", 400
    path.mkdir()
    for file in source.path.glob("*.npy"):
        array = np.load(file)
        np.save(path / file.name, np.tile(array, (times, *(1,) * (array.ndim - 1))))
    size = len(source)
    rows = [vars(e) | {"start": e.start + i * size} for i in range(times) for e in source.episodes]
    (path / "episodes.json").write_text(json.dumps(rows))
    (path / "manifest.json").write_text(json.dumps(source.manifest | {"frames": times * size}))
    write_digests(path)
    store = TokenStore.open(path)
    tracemalloc.start()
    try:
        loader = make([store], replace(DATA, stores=("a",)))
        assert len(loader.batch(0)) == 2
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 2**22 + 100 * len(store)


def test_changed_pictures_are_for_policies_to_learn_from(stores: list[TokenStore]) -> None:
    """No world model sees them, and validation is on pictures as they are."""
    a, b = stores
    changed = replace(b, manifest=b.manifest | {"source": {"augmented": 1}})
    plain, mixed = make([a, b]), make([a, changed])
    assert mixed.num_train("policy") == plain.num_train("policy")
    assert mixed.num_train("world") == make([a], replace(DATA, stores=("a",))).num_train("world")
    held_out = {mode: set(mixed._val[mode].tolist()) for mode in MODES}
    assert all(held_out[mode] <= set(plain._val[mode].tolist()) for mode in MODES)
    assert max(held_out["policy"]) < len(a) <= max(plain._val["policy"])


def valid_chunks(pad_chunks: bool, chunk: int) -> set[int]:
    """Brute force: the frames that may start a chunk."""
    frames, start = set(), 0
    for episode in EPISODES:
        for t in range(len(episode)):
            fits = pad_chunks or t + chunk <= len(episode)
            if fits and episode.is_expert[t : t + chunk].all():
                frames.add(start + t)
        start += len(episode)
    return frames


def held_out_frames(stores: list[TokenStore], data: DataConfig = DATA) -> set[int]:
    flags = np.concatenate(split(stores, data.val_fraction))
    return set(np.flatnonzero(np.repeat(flags, [len(e) for e in EPISODES])).tolist())


def expected(builder: SampleBuilder, frame: int, mode: Mode) -> Sample:
    """Build a sample the slow way, from the episode."""
    starts = np.cumsum([0] + [len(e) for e in EPISODES])
    index = int(np.searchsorted(starts, frame, side="right")) - 1
    episode, t = EPISODES[index], frame - int(starts[index])
    tokenizer = PixelSums()
    codes = [[tokenizer.encode(torch.from_numpy(episode.images[v][i : i + 1])).numpy() for v in LAYOUT.views]
             for i in range(len(episode))]  # fmt: skip
    if mode == "world":
        return builder.world([codes[t]], episode.actions[t], codes[t + 1])
    steps = np.minimum(np.arange(t, t + builder.layout.chunk), len(episode) - 1)
    frames = codes[max(0, t - builder.layout.history + 1) : t + 1]
    return builder.policy(episode.instruction, episode.states[t], frames, episode.actions[steps])


def lengths_of(batch: Batch) -> torch.Tensor:
    """The samples' lengths (B,): the last token of each is a target."""
    return batch.kind_BT.shape[1] - (batch.kind_BT > 0).flip(1).int().argmax(1)


def rows(batch: Batch) -> list[bytes]:
    """The samples' ids, without their padding."""
    lengths = lengths_of(batch).tolist()
    return [row[:length].numpy().tobytes() for row, length in zip(batch.ids_BT, lengths, strict=True)]


def same(a: Sequence[Batch], b: Sequence[Batch]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(getattr(x, n), getattr(y, n), equal_nan=True)
        for x, y in zip(a, b, strict=True)
        for n in vars(x)
        if getattr(x, n) is not None
    )


@pytest.mark.parametrize("pad_chunks", [False, True])
def test_every_sample_equals_the_one_built_from_its_episode(stores: list[TokenStore], pad_chunks: bool):
    loader = make(stores, replace(DATA, pad_chunks=pad_chunks))
    for mode in MODES:
        for frame in [*loader._train[mode].tolist(), *loader._val[mode].tolist()]:
            got, want = loader.sample(frame, mode), expected(loader.builder, frame, mode)
            for name in vars(want):
                assert (getattr(got, name) == getattr(want, name)).all(), (frame, mode, name)
                assert getattr(got, name).dtype == getattr(want, name).dtype


def test_longer_world_samples_are_cut_where_that_is_asked_for(stores: list[TokenStore]):
    layout = replace(LAYOUT, history=1, chunk=1)
    whole = make(stores, layout=layout).batch(0)
    policy, longest = (part.ids_BT.shape[1] for part in whole)
    assert policy < longest
    short = (policy + longest) // 2
    data = replace(DATA, sequence_length=short)
    with pytest.raises(ValueError, match=f"a sample has {longest} tokens, sequence_length is {short}"):
        make(stores, data, layout=layout)
    cut = make(stores, replace(data, truncate=True), layout=layout).batch(0)
    for part, got in zip(whole, cut, strict=True):
        assert same([part.map(lambda tensor: tensor[:, :short])], [got])
    with pytest.raises(ValueError, match="a sample has 78 tokens"):  # of a policy
        make(stores, replace(data, truncate=True))


def test_instructions_can_begin_with_the_scene(tmp_path: Path):
    task = "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it"
    told = [replace(e, task=task if i % 2 else "turn_on_the_stove") for i, e in enumerate(EPISODES[:4])]
    write_store(tmp_path / "told", told, PixelSums())
    store = TokenStore.open(tmp_path / "told")
    asked = [prompted(e, scene_prefix=True) for e in store.episodes]
    assert asked == [("", "KITCHEN SCENE3 ")[i % 2] + e.instruction for i, e in enumerate(told)]
    plain, begun = (make([store], replace(DATA, stores=("told",), scene_prefix=x)) for x in (False, True))
    for k, e in enumerate(store.episodes):
        text = np.array(begun.builder.text.encode(asked[k])) + begun.builder.vocab.text.start
        ids = begun.sample(e.start, "policy").ids
        assert np.array_equal(ids[1 : 1 + len(text)], text)
        assert len(ids) - len(plain.sample(e.start, "policy").ids) == (2 if k % 2 else 0)


@pytest.mark.parametrize("pad_chunks", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_positions_are_the_valid_ones(stores: list[TokenStore], pad_chunks: bool, chunk: int):
    data = replace(DATA, pad_chunks=pad_chunks, world_fraction=1.0, sequence_length=300)
    loader = make(stores, data, replace(LAYOUT, chunk=chunk))
    train, val = (set(p["policy"].tolist()) for p in (loader._train, loader._val))
    assert train | val == valid_chunks(pad_chunks, chunk)
    ends = set((np.cumsum([len(e) for e in EPISODES]) - 1).tolist())
    assert (
        set(loader._train["world"]) | set(loader._val["world"]) == set(range(sum(map(len, EPISODES)))) - ends
    )


def test_every_frame_asks_for_the_experts_own_chunk(tmp_path: Path):
    rng = np.random.default_rng(0)
    labels = [rng.uniform(-1, 1, (len(e), 4, 7)).astype(np.float32) for e in EPISODES]
    told = [replace(e, expert_actions=label) for e, label in zip(EPISODES, labels, strict=True)]
    write_store(tmp_path / "told", told, PixelSums())
    loader = make([TokenStore.open(tmp_path / "told")])
    num_frames = sum(len(e) for e in EPISODES)
    assert loader.num_train("policy") + loader.num_val("policy") == num_frames  # perturbed and last ones too
    statistics, vocab = loader.builder.statistics, loader.builder.vocab
    for frame, label in enumerate(np.concatenate(labels)):
        sample = loader.sample(frame, "policy")
        codes = sample.ids[(sample.ids >= vocab.action.start) & (sample.ids < vocab.action.stop)]
        assert np.array_equal(
            codes - vocab.action.start, statistics.encode_actions(label[: LAYOUT.chunk]).ravel()
        )
    with pytest.raises(ValueError, match=r"chunks of 4 expert actions, layout\.chunk is 5"):
        make([TokenStore.open(tmp_path / "told")], layout=replace(LAYOUT, chunk=5))


def test_held_out_episodes_never_train(stores: list[TokenStore]):
    loader, held_out = make(stores), held_out_frames(stores)
    assert 0 < len(held_out) < sum(map(len, EPISODES))
    for mode in MODES:
        assert not set(loader._train[mode].tolist()) & held_out
        assert set(loader._val[mode].tolist()) <= held_out
    untouched = store_statistics(stores, DATA)
    seen = np.concatenate([e.actions for e in EPISODES])[
        [f not in held_out for f in range(sum(map(len, EPISODES)))]
    ]
    np.testing.assert_allclose(untouched.action_low, seen.min(axis=0))


def test_a_batch_is_a_function_of_seed_and_step(stores: list[TokenStore]):
    loader = make(stores)
    batches = [loader.batch(step) for step in range(40)]
    fresh = make(stores)
    for step in (39, 0, 17, 18, 16):  # any order, across epochs
        assert same(fresh.batch(step), batches[step])
    assert not same(make(stores, seed=4).batch(0), batches[0])


@pytest.mark.parametrize("mode", MODES)
def test_an_epoch_sees_every_sample_once(stores: list[TokenStore], mode: Mode):
    """And ranks that take batch(step * W + r) share an epoch without overlap, because steps do."""
    data = replace(DATA, world_fraction=0.0 if mode == "policy" else 1.0)
    loader = make(stores, data, batch_size=1)
    count = loader.num_train(mode)
    epochs = [[rows(loader.batch(epoch * count + i)[0])[0] for i in range(count)] for epoch in range(2)]
    whole = Counter(loader.sample(f, mode).ids.tobytes() for f in loader._train[mode].tolist())
    assert Counter(epochs[0]) == Counter(epochs[1]) == whole
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("fraction", [0.0, 0.04, 0.25, 0.5, 1.0])
def test_the_share_of_world_samples_is_exact(stores: list[TokenStore], fraction: float):
    loader = make(stores, replace(DATA, world_fraction=fraction))
    per_batch = []
    for step in range(25):
        counts = {"policy": 0, "world": 0}
        for part in loader.batch(step):
            is_policy_B = (part.kind_BT == KIND_ACTION).any(dim=1)
            assert bool(is_policy_B.all()) or not is_policy_B.any()  # each kind in a batch of its own
            counts["policy" if is_policy_B[0] else "world"] += len(is_policy_B)
        assert sum(counts.values()) == 10
        per_batch.append(counts["world"])
    assert sum(per_batch) == int(fraction * 250)
    assert max(per_batch) - min(per_batch) <= 1


def test_stores_are_drawn_by_weight(stores: list[TokenStore], monkeypatch: pytest.MonkeyPatch):
    """Exactly so in every block, each store without replacement, any step first; a store of perturbed steps
    alone has no policy samples and counts among the world samples only."""
    monkeypatch.setattr("worldvla.data.loader.BLOCK", 60)
    aimless = [replace(e, is_expert=np.zeros(len(e), dtype=np.bool_)) for e in EPISODES[:4]]
    path = write_store(stores[0].path.with_name("aimless"), aimless, PixelSums())
    mixed = [*stores, TokenStore.open(path)]
    data = replace(DATA, stores=("a", "b", "aimless"), weights=(4, 1, 1), val_fraction=0.0)
    loader = make(mixed, data)
    taken = {mode: loader._take(mode, 0, 600) for mode in MODES}
    shares: dict[Mode, tuple[int, ...]] = {"policy": (48, 12, 0), "world": (40, 10, 10)}
    for mode in MODES:
        store_M = loader.frames.stores_F[taken[mode]]
        assert [tuple(np.bincount(b, minlength=3)) for b in store_M.reshape(10, 60)] == [shares[mode]] * 10
        for store in np.unique(store_M):
            own, count = taken[mode][store_M == store], len(loader._sources[mode][store])
            for epoch in np.split(own, range(count, len(own), count)):
                assert len(set(epoch.tolist())) == len(epoch)
        other = make(mixed, data)
        assert (np.concatenate([other._take(mode, 333, 600), other._take(mode, 0, 333)])
                == np.roll(taken[mode], -333)).all()  # fmt: skip
    assert (make(mixed, data, seed=4)._take("policy", 0, 60) != taken["policy"][:60]).any()
    with pytest.raises(ValueError, match=r"store 1 gets less than one of 60 samples; give it more weight"):
        make(mixed, replace(data, weights=(4, 0.001, 1))).batch(0)
    with pytest.raises(ValueError, match=r"data\.weights has 2 values, data\.stores 3: give one a store"):
        replace(data, weights=(1, 2))


def test_each_dataset_is_read_by_its_own_ranges(tmp_path: Path, stores: list[TokenStore]):
    """Stores of one name share them; a sample's ids are those that its own dataset alone would give."""
    wide = [replace(e, actions=10 * e.actions, states=3 + e.states) for e in EPISODES]
    mixed = [*stores, TokenStore.open(write_store(tmp_path / "wide", wide, PixelSums()))]
    data = replace(DATA, stores=("a", "b", "wide"), datasets=("arm", "arm", "wide arm"))
    loader = make(mixed, data)
    alone = make(stores, DATA), make(mixed[2:], replace(DATA, stores=("wide",)))
    known = loader.builder.all_statistics
    assert isinstance(known, DatasetStatistics)
    assert list(known.sets.values()) == [one.builder.statistics for one in alone]
    assert known.sets["wide arm"].action_high[0] > 5 > known.sets["arm"].action_high[0]
    num_frames, ends = sum(map(len, EPISODES)), np.cumsum([len(e) for e in EPISODES]) - 1
    for frame in range(0, num_frames, 3):
        for first, one in zip((0, num_frames), alone, strict=True):
            for mode in MODES[:1] if frame in ends else MODES:
                got, want = loader.sample(first + frame, mode), one.sample(frame, mode)
                assert (got.ids == want.ids).all()
    with pytest.raises(ValueError, match=r"datasets 'arm', 'wide arm'; name one of them"):
        _ = loader.builder.statistics
    arm = known.sets["arm"]
    short = DatasetStatistics({"arm": arm, "short": replace(arm, action_low=(-1,) * 6, action_high=(1,) * 6)})
    with pytest.raises(ValueError, match=r"statistics have 6 action dims, the layout 7"):
        SampleBuilder(LAYOUT, loader.builder.vocab, CountedWords(size=20), short)
    with pytest.raises(ValueError, match="a name must not be empty"):
        replace(data, datasets=("arm", "", "x"))


def test_batches_are_as_long_as_their_longest_sample(stores: list[TokenStore]):
    loader = make(stores)
    for part in loader.batch(0):
        lengths_B = lengths_of(part)
        assert part.ids_BT.shape[1] == lengths_B.max()
        assert part.ids_BT.dtype == torch.int64
        is_pad_BT = torch.arange(part.ids_BT.shape[1]) >= lengths_B[:, None]
        assert ((part.ids_BT == loader.builder.vocab.pad) == is_pad_BT).all()


def test_validation_is_the_same_for_every_seed_and_wraps(stores: list[TokenStore]):
    loader, other = make(stores), make(stores, seed=99)
    for mode in MODES:
        assert same([loader.val_batch(0, mode)], [other.val_batch(0, mode)])
        count = loader.num_val(mode)
        assert count > 0
        seen = [row for i in range(count) for row in rows(loader.val_batch(i, mode))]
        assert seen[:count] == seen[count : 2 * count]


def test_the_split_is_stable_and_never_empty(stores: list[TokenStore]):
    flags = np.concatenate(split(stores, 0.25))
    assert 0 < flags.sum() < len(flags)
    assert (np.concatenate(split(stores, 0.5)) >= flags).all()  # a larger fraction only adds
    assert np.concatenate(split(stores, 1e-6)).sum() == 1
    assert np.concatenate(split(stores, 0.0)).sum() == 0
    assert (np.concatenate(split([stores[0]], 0.25)) == flags[: len(stores[0].episodes)]).all()


def test_a_new_file_moves_no_episode_between_training_and_validation(tmp_path: Path):
    foreign = [replace(random_episode(seed), init=-1, seed=-1) for seed in range(20, 26)]

    def held_out(episodes: list[Episode]) -> dict[bytes, bool]:
        store = TokenStore.open(write_store(tmp_path / "store", episodes, PixelSums()))
        return dict(zip([e.actions.tobytes() for e in episodes], *split([store], 0.4), strict=True))

    known = [*EPISODES, *foreign]
    before, after = held_out(known), held_out([random_episode(seed) for seed in (30, 31)] + known[::-1])
    assert 0 < sum(before.values()) < len(before)
    assert {key: after[key] for key in before} == before


def test_the_split_is_that_of_the_keys(root: Path):
    (flags,) = split([TokenStore.open(root / "store")], 0.2)
    assert flags.tolist() == [False, False, False, False, False, True]


def test_no_validation_raises(stores: list[TokenStore]):
    with pytest.raises(ValueError, match="holds out no policy sample"):
        make(stores, replace(DATA, val_fraction=0.0)).val_batch(0, "policy")


def test_a_store_that_holds_nothing_out_is_refused_before_training(tmp_path: Path):
    write_store(tmp_path / "one", EPISODES[:1], PixelSums())
    one = [TokenStore.open(tmp_path / "one")]
    with pytest.raises(ValueError, match="holds out no policy sample: set it to 0"):
        make(one, replace(DATA, stores=("one",), val_fraction=0.02))
    make(one, replace(DATA, stores=("one",), val_fraction=0.0))


def test_what_does_not_fit_raises(stores: list[TokenStore], tmp_path: Path):
    builder = make(stores).builder
    with pytest.raises(ValueError, match="at least one token store"):
        Loader([], builder, DATA, 1, 0)
    with pytest.raises(ValueError, match="sequence_length is 20"):
        make(stores, replace(DATA, sequence_length=20))
    with pytest.raises(ValueError, match=r"wants agentview \(4, 4\)"):
        make(stores, layout=replace(LAYOUT, grids=((4, 4), (2, 2))))
    with pytest.raises(ValueError, match="wants top"):
        make(stores, layout=replace(LAYOUT, views=("top", "wrist")))
    with pytest.raises(ValueError, match="no policy sample"):
        make(stores, replace(DATA, sequence_length=1000), layout=replace(LAYOUT, chunk=50))
    write_store(tmp_path / "other", EPISODES[:2], PixelSums(name="other"))
    with pytest.raises(ValueError, match="different image tokenizers"):
        make([stores[0], TokenStore.open(tmp_path / "other")])
    loader = make(stores)
    with pytest.raises(ValueError, match="its episode goes on for 0 steps, a clip has 1"):
        loader.sample(stores[0].episodes[0].length - 1, "world")
    write_store(tmp_path / "delta", EPISODES[:2], PixelSums(), source={"delta": ["x"]})
    pair = [stores[0], TokenStore.open(tmp_path / "delta")]
    with pytest.raises(ValueError, match=r"has delta \['x'\], .* None: tokenize them alike"):
        _check_features(pair, ())
    _check_features(pair, ("here", "there"))
    write_store(tmp_path / "large", EPISODES[:2], PixelSums(num_codes=128))
    with pytest.raises(ValueError, match="128 image codes"):
        make([TokenStore.open(tmp_path / "large")])
