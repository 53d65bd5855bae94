"""World samples of several frames, image codes by levels: training and imagination read the same sequence,
guessing changes nothing, wrong inputs never become targets.

python -m pytest tests/test_clips.py
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_run import tiny_config, write_tiny
from worldvla.batch import KIND_IMAGE, KIND_STATE, Batch
from worldvla.config import Config, ImageTokenizerConfig
from worldvla.data.loader import ANCHOR
from worldvla.data.store import TokenStore, code_type
from worldvla.imagine import imagine_store
from worldvla.infer.graphs import Runner
from worldvla.infer.model import load
from worldvla.infer.world import World
from worldvla.model.mask import dense_mask, read_ids
from worldvla.model.transformer import previous_ids
from worldvla.tokenizers.image import ImageTokenizer
from worldvla.train.build import build, build_model
from worldvla.train.corruption import corrupted
from worldvla.train.loop import Trainer, train

CELLS = ImageTokenizerConfig(
    channels=4,
    channel_mult=(1, 1),
    encoder="cell",
    num_res_blocks=1,
    z_channels=4,
    embed_dim=2,
    quantizer="fsq",
    num_codes=16,
    fsq_levels=(4, 4),
)


def clip_config(
    root: Path, world_state: bool = False, anchor: bool = False, frame_at_once: bool = False
) -> Config:
    base = tiny_config(root, steps=4)
    return replace(
        base,
        layout=replace(
            base.layout,
            clip=2,
            history=1,
            world_state=world_state,
            anchor=anchor,
            frame_at_once=frame_at_once,
        ),
        model=replace(base.model, code_levels=(4, 4), previous_code=True),
        loss=replace(base.loss, supervise="decoded"),
        data=replace(base.data, sequence_length=140, corrupt=0.2, world_fraction=0.5),
        train=replace(base.train, scheduled_sampling=0.5 * anchor),
    )


KINDS = {
    "frames": (False, False),
    "states": (True, False),
    "anchor": (True, True),
    "at_once": (True, True, True),
}


@pytest.fixture(scope="module", params=list(KINDS.values()), ids=list(KINDS))
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("clips")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        write_tiny(root, CELLS)
        yield train(clip_config(root, *request.param), root / "run").checkpoint


def world_batch(config: Config) -> Batch:
    return build(config).loader.val_batch(0, "world")


def test_a_clip_is_a_frame_then_actions_and_frames_by_turns(trained: Path) -> None:
    config = load(trained).config
    pieces = build(config)
    template = pieces.builder.world_template(2)
    given = 1 + config.layout.anchor
    assert len(template.images) == 2 + given
    assert template.actions.shape == (2, 7)
    kinds = template.table[2]
    targets = np.concatenate([np.concatenate(views) for views in template.images[given:]])
    np.testing.assert_array_equal(np.flatnonzero(kinds == KIND_IMAGE), targets)
    one = pieces.builder.world_template(1)
    np.testing.assert_array_equal(one.table[:, :-1], template.table[:, : len(one) - 1])
    num_states = config.layout.num_state_dims if config.layout.world_state else 0
    assert template.states.size == 3 * num_states
    np.testing.assert_array_equal(np.flatnonzero(kinds == KIND_STATE), template.states[1:].flatten())
    for places, views in zip(template.states, template.images[config.layout.anchor :], strict=False):
        assert places.max() < views[0].min()


def test_the_state_of_each_frame_stands_before_it(trained: Path) -> None:
    pieces = build(load(trained).config)
    batch, template = world_batch(pieces.config), pieces.builder.world_template(2)
    store, ids = pieces.loader.stores[0], pieces.vocab.state
    known = pieces.builder.statistics.encode_states(store.states) + ids.start
    for row in batch.ids_BT.numpy():
        said = row[template.states]
        assert not said.size or any((known[i : i + 3] == said).all() for i in range(len(known) - 2))


def test_the_previous_code_stands_before_each_target(trained: Path) -> None:
    config = load(trained).config
    batch, template = world_batch(config), build(config).builder.world_template(2)
    previous = previous_ids(batch.ids_BT, batch.row_BT, batch.col_BT)
    frames = [np.concatenate(views) for views in template.images[config.layout.anchor :]]
    expected = torch.zeros_like(previous)
    for old, new in pairwise(frames):
        expected[:, new - 1] = batch.ids_BT[:, old]
    assert torch.equal(previous, expected)


def test_wrong_codes_are_read_and_right_ones_predicted(trained: Path) -> None:
    pieces = build(load(trained).config)
    batch = world_batch(pieces.config)
    read = corrupted(batch, pieces.vocab, (4, 4), 0.4, torch.Generator().manual_seed(0))
    is_wrong = read != batch.ids_BT
    assert 0.05 < is_wrong[batch.row_BT > 0].float().mean() < 0.6
    assert not is_wrong[batch.row_BT == 0].any()
    assert ((read >= pieces.vocab.image.start) == (batch.row_BT > 0)).all()
    again = corrupted(batch, pieces.vocab, (4, 4), 0.4, torch.Generator().manual_seed(0))
    assert torch.equal(read, again)
    clean = corrupted(batch, pieces.vocab, (4, 4), 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(clean, batch.ids_BT)


def test_some_codes_are_read_as_the_model_chooses_them(trained: Path, tmp_path: Path) -> None:
    trainer = Trainer(build(load(trained).config), tmp_path / "run")
    batch, image = world_batch(trainer.config), trainer.pieces.vocab.image
    target = trainer.loss.targets(batch)
    torch.manual_seed(1)
    own = trainer._with_own_codes(batch, target)
    is_own = own.read_BT != batch.read_BT
    if not trainer.config.train.scheduled_sampling:
        assert own is batch
        return
    assert torch.equal(own.ids_BT, batch.ids_BT)
    assert not is_own[batch.kind_BT != KIND_IMAGE].any()
    assert 0.2 < is_own[batch.kind_BT == KIND_IMAGE].float().mean() < 0.6
    assert ((own.read_BT >= image.start) == (batch.row_BT > 0)).all()
    torch.manual_seed(1)
    assert torch.equal(trainer._with_own_codes(batch, target).read_BT, own.read_BT)
    policy = build(trainer.config).loader.val_batch(0, "policy")
    assert trainer._with_own_codes(policy, trainer.loss.targets(policy)) is policy


def test_at_once_no_code_of_a_frame_reads_another_one_of_it(trained: Path, tmp_path: Path) -> None:
    """Change what is read of the first frame asked for: its own predictions stay, those of the next change;
    code by code, its own change too. Every position of a frame sees all of the frame before."""
    trainer = Trainer(build(load(trained).config), tmp_path / "run")
    batch, layout = world_batch(trainer.config), trainer.config.layout
    template = trainer.pieces.builder.world_template(2)
    first, second = (np.concatenate(views) for views in template.images[-2:])
    given = np.concatenate(template.images[-3])

    def hidden(ids_BT: torch.Tensor) -> dict[int, torch.Tensor]:
        other = replace(batch, wrong_BT=ids_BT)
        target = trainer.loss.targets(batch)
        with torch.no_grad():
            x_PD, _ = trainer.forward(other, target)
        length = batch.ids_BT.shape[1]
        return {int(p): x for p, x in zip(target.positions_P, x_PD, strict=True) if p < length}

    def changed(place: int) -> tuple[int, int]:
        ids_BT = batch.ids_BT.clone()
        ids_BT[0, place] = batch.ids_BT[0, given[ids_BT[0, given] != ids_BT[0, place]][0]]
        before, after = hidden(batch.ids_BT), hidden(ids_BT)
        first_N, second_N = (
            [not torch.equal(before[p - 1], after[p - 1]) for p in of] for of in (first, second)
        )
        return sum(first_N), sum(second_N)

    if layout.frame_at_once:
        assert trainer.model.ahead == len(range(first[0] - 1, first[-1]))
        assert changed(first[3]) == (0, len(second))
        assert changed(given[-1])[0] == len(first)
    else:
        assert trainer.model.ahead == 0
        assert changed(first[3]) == (len(first) - 4, len(second))


def test_with_an_anchor_blocks_vanish_from_a_frame_on(trained: Path) -> None:
    pieces = build(load(trained).config)
    batch, has_anchor = world_batch(pieces.config), pieces.config.layout.anchor
    batch = batch.map(lambda t: t[:1].repeat(200, 1))
    read = corrupted(batch, pieces.vocab, (4, 4), 0.0, torch.Generator().manual_seed(0), has_anchor)
    is_lost = read != batch.ids_BT
    if not has_anchor:
        assert not is_lost.any()
        return
    frames = [np.concatenate(views) for views in pieces.builder.world_template(2).images]
    assert 20 < is_lost.any(1).sum() < 100  # a cell may be lost to a code like its own
    assert not is_lost[:, frames[0]].any()
    for row in read[is_lost.any(1)]:
        changed = row != batch.ids_BT[0]
        assert len(row[changed].unique()) == 1
    assert is_lost[:, frames[-1]].any(1).sum() > 0.5 * is_lost.any(1).sum()


def test_the_anchor_is_an_earlier_frame_of_the_episode(trained: Path) -> None:
    pieces = build(load(trained).config)
    table = pieces.loader.frames
    steps = [table.anchor(i) - i for i in range(len(table.starts_F))]
    assert min(steps) >= -ANCHOR
    assert len(set(steps)) > 5
    assert all(table.anchor(i) >= start for i, start in enumerate(table.starts_F))
    if not pieces.config.layout.anchor:
        return
    template = pieces.builder.world_template(2)
    start = next(i for i, step in enumerate(steps) if step < 0 and i + 2 < table.starts_F.max())
    ids = pieces.loader.sample(start, "world").ids
    for frame, views in zip((table.anchor(start), start, start + 1, start + 2), template.images, strict=True):
        for codes, places in zip(table.codes[0], views, strict=True):
            np.testing.assert_array_equal(codes[frame] + pieces.vocab.image.start, ids[places])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guessing_changes_no_code_and_history_is_that_of_training(trained: Path, temperature: float) -> None:
    """Imagine with a guess and without; then feed what was imagined through the uncached model as a training
    sample: its greedy choices are the imagined codes."""
    model = load(trained)
    rng = np.random.default_rng(0)
    frame = {v: rng.integers(0, 256, (*s, 3), dtype=np.uint8) for v, s in model.view_sizes.items()}
    frame["state"] = build(model.config).loader.stores[0].states[0]
    actions = rng.uniform(-1, 1, (3, 7)).astype(np.float32)
    runs = []
    for speculative in (True, False):
        world = World(model, speculative, temperature)
        world.reset(frame)
        codes = [world.current()[0]]
        for action in actions:
            world.step(action)
            codes.append(world.current()[0])
        runs.append(np.array(codes))
    np.testing.assert_array_equal(*runs)
    if temperature:
        return
    builder, transformer = model.builder, model.transformer
    num_states = model.config.layout.num_state_dims if model.config.layout.world_state else 0
    states, images = np.split(runs[0], [num_states], axis=1)
    split = [builder.split_views(codes) for codes in images]
    for first, stop in ((0, 2), (2, 3)):  # the second frame of a clip, and the first of the next one
        clip = slice(first, stop)
        number = stop - first
        sample = builder.world(split[clip], actions[clip], split[stop], states[first : stop + 1], split[0])
        batch = Batch.stack([sample], model.vocab.pad)
        ids_BT = read_ids(batch.ids_BT, batch.chunk_BT, batch.row_BT, model.vocab.pad)
        places = ids_BT, dense_mask(batch.chunk_BT), batch.row_BT, batch.col_BT
        previous = previous_ids(batch.ids_BT, batch.row_BT, batch.col_BT)
        with torch.no_grad():
            x_BTD = transformer(*places, None, previous)
        last = np.concatenate(builder.world_template(number).images[-1])
        assert transformer.code_head is not None
        chosen, _ = transformer.code_head.choose(x_BTD[0, last - 1])
        np.testing.assert_array_equal(chosen, images[stop])
        places_S = builder.world_template(number).states[number:].reshape(-1)
        scores = transformer.logits(x_BTD[0, places_S - 1], model.vocab.state)
        np.testing.assert_array_equal(scores.argmax(-1), states[stop])


@pytest.mark.parametrize("fixed", [False, True])
def test_a_rollout_is_the_same_beside_others_and_when_rows_leave(trained: Path, fixed: bool) -> None:
    """Other queries of the same model in between, rows that leave and come twice, and rows alone."""
    model = load(trained)
    model.__dict__["runner"] = Runner(model.transformer, fixed=fixed)
    rng, stores = np.random.default_rng(0), build(model.config).loader.stores
    frames = {v: rng.integers(0, 256, (3, *s, 3), dtype=np.uint8) for v, s in model.view_sizes.items()}
    frames["state"] = stores[0].states[:3]
    actions = rng.uniform(-1, 1, (5, 3, 7)).astype(np.float32)
    expected = []
    for row in range(3):
        world = World(model)
        world.reset({name: values[row] for name, values in frames.items()})
        for action in actions[:, row]:
            world.advance(action)
            expected.append(world.current()[0])
    expected = np.array(expected).reshape(3, 5, -1)
    world, other, rows = World(model), World(model), np.arange(3)
    world.reset(frames)
    for t, chosen in enumerate((None, None, [2, 0], [True, True], [1, 1, 0])):
        if chosen is not None:
            world.keep(np.array(chosen))
            rows = rows[chosen]
        world.advance(actions[t, rows])
        other.reset({name: values[rows] for name, values in frames.items()})
        other.advance(actions[t, rows])
        np.testing.assert_array_equal(world.current(), expected[rows, t])


def test_what_stands_still_becomes_part_of_the_anchor(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first clip's end on, a world goes on as one whose anchor has these codes from the start."""
    monkeypatch.setattr("worldvla.infer.world.STILL", 2)
    model = load(trained)
    if not model.config.layout.anchor:
        return
    rng, stores = np.random.default_rng(0), build(model.config).loader.stores
    frames = {v: rng.integers(0, 256, (3, *s, 3), dtype=np.uint8) for v, s in model.view_sizes.items()}
    world, num_states = World(model), model.config.layout.num_state_dims
    world.reset({**frames, "state": stores[0].states[:3]})
    seen, actions = [world.current()], rng.uniform(-1, 1, (3, 3, 7)).astype(np.float32)
    for action in actions[:2]:
        world.advance(action)
        seen.append(world.current())
    is_still = (seen[0] == seen[1]) & (seen[1] == seen[2])
    assert 0 < is_still[:, num_states:].mean() < 1
    stays = World(model)
    stays.begin(np.where(is_still, seen[2], seen[0])[:, num_states:], seen[0][:, :num_states])
    stays._codes = seen[2]
    for one in (world, stays):
        one.keep(np.array([0, 2]))
        one.advance(actions[2, [0, 2]])
    np.testing.assert_array_equal(world.current(), stays.current())


def test_a_world_of_states_needs_one_to_begin(trained: Path) -> None:
    model = load(trained)
    frame = {v: np.zeros((*s, 3), np.uint8) for v, s in model.view_sizes.items()}
    if not model.config.layout.world_state:
        World(model).reset(frame)
        return
    with pytest.raises(ValueError, match="add 'state'"):
        World(model).reset(frame)
    with pytest.raises(ValueError, match="finite and have shape"):
        World(model).reset({**frame, "state": np.full(model.config.layout.num_state_dims, np.nan)})
    with pytest.raises(ValueError, match="hold states here"):
        model.builder.world_prompt(
            [[np.zeros(n, int) for n in model.config.layout.codes_per_view]], np.zeros(7)
        )


def test_training_learns_a_batch_of_clips(tmp_path: Path) -> None:
    write_tiny(tmp_path, CELLS)
    config = clip_config(tmp_path)
    config = replace(
        config,
        train=replace(config.train, steps=120, overfit=True),
        optim=replace(config.optim, learning_rate=1e-2, min_learning_rate=1e-3),
        data=replace(config.data, corrupt=0.0, world_fraction=1.0),
    )
    train(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["image_loss"] for row in rows if row["event"] == "train"]
    assert losses[-1] < 0.2 * losses[0], losses
    last = next(row for row in reversed(rows) if row["event"] == "val")
    low, high = sorted((last["changed_loss"], last["kept_loss"]))
    assert low <= last["image_loss"] <= high


def test_more_codes_than_two_bytes_hold_are_stored_in_four() -> None:
    assert code_type(65_536) is np.uint16
    assert code_type(65_537) is np.uint32
    assert code_type(2**32) is np.uint32
    assert code_type(2**32 + 1) is np.int64


def test_a_cell_that_stands_still_is_encoded_once_and_the_same() -> None:
    rng, tokenizer = np.random.default_rng(1), ImageTokenizer(CELLS).eval()
    frames = np.repeat(rng.integers(0, 256, (1, 6, 6, 3), dtype=np.uint8), 5, axis=0)
    frames[2:, :2, :2] = 7
    frames[4, 4:, 4:] = 200
    images = torch.from_numpy(frames)
    assert torch.equal(tokenizer.encode(images), torch.cat([tokenizer.encode(one[None]) for one in images]))


@pytest.mark.parametrize("halvings", [3, 4])
def test_a_context_decoder_copies_what_it_may(halvings: int) -> None:
    rng = np.random.default_rng(2)
    shape = replace(CELLS, patch=2 ** (halvings - 1), channel_mult=(1, 2), context_widths=(4,) * halvings)
    tokenizer = ImageTokenizer(shape).eval()
    images = torch.from_numpy(rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8))
    codes = tokenizer.encode(images)
    tokenizer.decoder.conv_out.bias.data[12:] = 50.0  # pyright: ignore
    assert torch.equal(tokenizer.decode(codes, images), images)
    assert tokenizer.decode(codes).unique().tolist() == [128]
    with pytest.raises(ValueError, match="4 pixels a side"):
        replace(shape, context_widths=(4, 4))


def test_levels_that_are_not_the_tokenizers_are_refused(trained: Path) -> None:
    config = load(trained).config
    with pytest.raises(ValueError, match="fsq_levels"):
        build(replace(config, model=replace(config.model, code_levels=(2, 8))))
    with pytest.raises(ValueError, match="supervise"):
        replace(config, loss=replace(config.loss, supervise="all"))
    assert build_model(build(config)).num_parameters() > 0


def test_codes_without_end_need_levels(tmp_path: Path) -> None:
    """Of 2^48 codes: a store keeps them, a model of levels learns them, one with a table is refused."""
    shape = replace(CELLS, embed_dim=16, z_channels=16, num_codes=8**16, fsq_levels=(8,) * 16)
    write_tiny(tmp_path, shape)
    config = clip_config(tmp_path)
    store = TokenStore.open(tmp_path / "store")
    assert store.codes["agentview"].dtype == np.int64
    assert store.codes["agentview"].max() > 2**32
    with pytest.raises(ValueError, match=r"281,474,976,710,656 codes.*recipe finetune_world"):
        build(replace(config, model=replace(config.model, code_levels=(), previous_code=False)))
    config = replace(config, model=replace(config.model, code_levels=(8,) * 16))
    world = World(load(train(config, tmp_path / "run").checkpoint))
    sized = zip(config.layout.views, config.layout.grids, strict=True)
    frames = {view: np.full((*(2 * n for n in grid), 3), 90, np.uint8) for view, grid in sized}
    world.reset({**frames, "state": store.states[0]})
    imagined = world.step(store.actions[0])
    assert {view: imagined[view].shape for view in frames} == {v: f.shape for v, f in frames.items()}


def test_imagined_frames_are_those_of_a_world_and_only_read(trained: Path, tmp_path: Path) -> None:
    """A store's imagined frames continue its real ones; a sample reads them and learns the real ones."""
    model, pieces = load(trained), build(load(trained).config)
    store, layout, vocab = pieces.loader.stores[0], pieces.config.layout, pieces.vocab
    again = TokenStore.open(imagine_store(store, model, tmp_path / "both", batch=4), model.image.digest())
    imagined = again.imagined
    assert imagined is not None
    if not layout.world_state:  # then nobody asks what the states mean
        silent = replace(store, states=np.full_like(store.states, np.nan))
        imagine_store(silent, model, tmp_path / "silent", batch=4)
    with pytest.raises(ValueError, match="holds something else"):  # at once
        imagine_store(store, model, trained, on_frames=lambda _: pytest.fail("imagined first"))
    data = replace(model.config.data, world_fraction=0.0)
    with pytest.raises(ValueError, match="has no world model"):
        imagine_store(store, replace(model, config=replace(model.config, data=data)), tmp_path / "none")
    assert len(again) == len(store)
    starts = [e.start for e in store.episodes]  # 8 frames an episode: one piece each
    np.testing.assert_array_equal(imagined.start, np.repeat(starts, 8))
    builder, views = model.builder, layout.views
    for view in views:
        np.testing.assert_array_equal(imagined.codes[view][starts], store.codes[view][starts])
        np.testing.assert_array_equal(again.codes[view], store.codes[view])
    world, first = World(model), starts[1]
    said = builder.statistics.encode_states(store.states[[first]])[:, : 8 * layout.world_state]
    world.begin(np.concatenate([store.codes[view][[first]] for view in views], 1), said)
    for frame in range(first + 1, first + 8):
        world.advance(store.actions[[frame - 1]])
        for view in views:
            np.testing.assert_array_equal(world.codes[view].flatten(), imagined.codes[view][frame])

    config = replace(
        pieces.config, data=replace(pieces.config.data, imagined=1.0, stores=(str(tmp_path / "both"),))
    )
    both = build(config)
    parts = [batch for step in range(4) for batch in both.loader.batch(step) if batch.wrong_BT is not None]
    assert parts
    template, given = both.builder.world_template(2), int(layout.anchor)
    places = [np.concatenate(frame) for frame in template.images]
    real_FN = np.concatenate([store.codes[view] for view in views], 1) + vocab.image.start
    imagined_FN = np.concatenate([imagined.codes[view] for view in views], 1) + vocab.image.start
    num_other = 0
    ids = np.concatenate([batch.ids_BT.numpy() for batch in parts])
    for row, read in zip(ids, np.concatenate([batch.read_BT.numpy() for batch in parts]), strict=True):
        frames = [k for k in range(len(store)) if (real_FN[k] == row[places[given]]).all()]
        (frame,) = [k for k in frames if (real_FN[k + 1] == row[places[given + 1]]).all()]
        for k, place in enumerate(places[given:]):
            np.testing.assert_array_equal(row[place], real_FN[frame + k])
            np.testing.assert_array_equal(read[place], imagined_FN[frame + k])
        if given:
            np.testing.assert_array_equal(row[places[0]], real_FN[imagined.start[frame]])
            np.testing.assert_array_equal(read[places[0]], row[places[0]])
        num_other += int((row != read).any())
    assert num_other > len(parts)
    val = both.loader.val_batch(0, "world")
    assert val.wrong_BT is None  # validation reads what happened
    with pytest.raises(ValueError, match=r"no store holds imagined frames.*worldvla imagine"):
        build(replace(pieces.config, data=replace(pieces.config.data, imagined=0.5)))
    train(replace(config, train=replace(config.train, steps=2)), tmp_path / "run")
