"""Sequence layouts: golden files, an independent writer with the published numbers, places, bad input.

pytest tests/test_sample.py       python tests/golden_samples.py rewrites the golden files
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from golden_samples import (
    ACTIONS,
    FIRST_WORD,
    GOLDEN,
    RYNNVLA_256,
    STATE,
    TASK,
    TINY_STATISTICS,
    WORLDVLA_256,
    cases,
    describe,
    frames,
    published,
    tiny,
)

from worldvla.batch import KIND_ACTION, KIND_IMAGE, KIND_LAYOUT, KIND_PROMPT, Batch, Sample
from worldvla.config import LayoutConfig
from worldvla.data.sample import SampleBuilder, prompt_texts
from worldvla.data.show import CountedWords
from worldvla.tokenizers.action import RYNNVLA, WORLDVLA
from worldvla.vocab import chameleon, compact

CASES = {case[0]: case for case in cases()}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str):
    _, about, vocab, sample = CASES[name]
    assert describe(about, vocab, sample) == json.loads((GOLDEN / f"sample_{name}.json").read_text())


def test_every_golden_file_has_a_case():
    assert {path.stem for path in GOLDEN.glob("sample_*.json")} == {f"sample_{name}" for name in CASES}


# An independent writer: numbers straight from the published code, nothing of ours.


def join(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


def image_block(codes: np.ndarray, side: int = 16) -> list[int]:
    """`side` rows of codes, a patch of 32 pixels every two (item_processor.py:260-300)."""
    rows = [[*(codes[side * r : side * (r + 1)] + 4).tolist(), 8803] for r in range(side)]
    return [8197, *[{16: 8812, 32: 8820}[side]] * 2, *join(rows), 8196]


def bins(values: np.ndarray, low: tuple[float, ...], high: tuple[float, ...], base: int) -> list[int]:
    """The published normalisation and np.digitize (item_processor.py:303-334)."""
    lo, hi = np.array(low), np.array(high)
    unit = np.clip(2 * (values - lo) / (hi - lo + 1e-8) - 1, -1, 1)
    return (np.digitize(unit, np.linspace(-1, 1, 256)) + base).tolist()


def words(text: str) -> list[int]:
    return [FIRST_WORD + i for i in range(len(text.split()))]


QUESTION = f"What action should the robot take to {TASK}?"
WORLD = (
    "Generate the next image based on the provided sequence of historical images and corresponding actions."
)


@pytest.mark.parametrize(
    ("name", "side", "views", "count", "chunk", "ranges", "length"),
    [
        ("worldvla_policy", 16, 1, 2, 5, WORLDVLA, 1 + 14 + 2 * 276 + 1 + 45 + 1),
        ("worldvla_policy_first", 16, 1, 1, 5, WORLDVLA, 1 + 14 + 276 + 1 + 45 + 1),
        ("worldvla_10_policy", 16, 1, 2, 10, WORLDVLA, 1 + 14 + 2 * 276 + 1 + 90 + 1),
        ("worldvla_512_policy", 32, 1, 2, 5, WORLDVLA, 1 + 14 + 2 * 1060 + 1 + 45 + 1),
        ("worldvla_512_10_policy", 32, 1, 2, 10, WORLDVLA, 1 + 14 + 2 * 1060 + 1 + 90 + 1),
        ("rynnvla_policy", 16, 2, 2, 5, RYNNVLA, 1 + 14 + 10 + 4 * 276 + 1 + 45 + 1),
        ("rynnvla_spatial_policy", 16, 2, 2, 10, RYNNVLA, 1 + 14 + 10 + 4 * 276 + 1 + 90 + 1),
        ("rynnvla_512_policy", 32, 2, 2, 5, RYNNVLA, 1 + 14 + 10 + 4 * 1060 + 1 + 45 + 1),
    ],
)
def test_policy_is_byte_for_byte(name, side, views, count, chunk, ranges, length):
    """With two views: state after the text; front, wrist of t-1; front, wrist of t."""
    actions = np.concatenate([ACTIONS, -ACTIONS])[:chunk]
    blocks = [[10004, *bins(a, ranges.action_low, ranges.action_high, 10005), 15004] for a in actions]
    state = [15504, *bins(STATE, RYNNVLA.state_low, RYNNVLA.state_high, 15505), 16004]
    starts = [1000 * f + 500 * v for f in range(count) for v in range(views)]
    images = join(image_block(np.arange(start, start + side**2), side) for start in starts)
    context = [*words(QUESTION), *(state if views == 2 else []), *images]
    expected = [0, *context, 8710, *join(blocks), 8710]
    assert CASES[name][3].ids.tolist() == expected
    assert len(expected) == length


@pytest.mark.parametrize(("layout", "statistics"), [(WORLDVLA_256, WORLDVLA), (RYNNVLA_256, RYNNVLA)])
def test_world_is_byte_for_byte(layout, statistics):
    """RynnVLA-002's too in WorldVLA's range of actions, as they were pretokenised."""
    builder = published(layout, statistics)
    action = [10004, *bins(ACTIONS[2], WORLDVLA.action_low, WORLDVLA.action_high, 10005), 15004]
    now, after = frames(builder, 2)
    expected = [0, *words(WORLD), *join(map(image_block, now)), *action, 8710]
    expected += [*join(map(image_block, after)), 8710]
    assert builder.world([now], ACTIONS[2], after).ids.tolist() == expected


def test_512_pixels_make_1060_tokens_an_image():
    builder = published(replace(WORLDVLA_256, grids=((32, 32),)), WORLDVLA)
    sample = builder.world(frames(builder, 1), ACTIONS[0], frames(builder, 1)[0])
    start = int(np.flatnonzero(sample.kind == KIND_LAYOUT)[0])
    assert len(sample) - start == 1060 + 1
    assert sample.ids[start : start + 3].tolist() == [8197, 8820, 8820]


@pytest.mark.parametrize("builder", [published(WORLDVLA_256, WORLDVLA), tiny()], ids=["published", "tiny"])
def test_prompts_and_tails_are_cut_from_the_whole(builder: SampleBuilder):
    layout = builder.layout
    state = np.full(layout.num_state_dims, 0.5) if layout.state else None
    actions = np.full((layout.chunk, layout.num_action_dims), 0.1)
    policy = (builder.policy("press it", state, frames(builder, 2), actions),)
    policy += (builder.policy_prompt("press it", state, frames(builder, 2)), builder.policy_tail())
    now, after = frames(builder, 2)
    world = (
        builder.world([now], actions[0], after),
        builder.world_prompt([now], actions[0]),
        builder.world_tail(),
    )
    for whole, prompt, tail in (policy, world):
        assert len(prompt) + len(tail) == len(whole)
        assert prompt.ids[-1] == tail.ids[-1] == builder.vocab.sep
        for name in ("ids", "chunk", "kind", "row", "col"):
            joined = np.concatenate([getattr(prompt, name), getattr(tail, name)])
            if name == "ids":
                holes = np.isin(joined, [*builder.vocab.image, *builder.vocab.action]) & (
                    whole.kind > KIND_PROMPT
                )
                joined[holes] = whole.ids[holes]
            assert (joined == getattr(whole, name)).all(), name
        assert (prompt.kind == KIND_PROMPT).all()
        assert (tail.kind != KIND_PROMPT).all()


def test_action_blocks_are_where_the_decoder_looks():
    builder = published(WORLDVLA_256, WORLDVLA)
    whole = builder.policy(TASK, None, frames(builder, 1), ACTIONS)
    prompt = builder.policy_prompt(TASK, None, frames(builder, 1))
    positions = builder.action_block_positions(len(prompt))
    assert positions.shape == (5, 9)
    blocks = whole.ids[positions]
    assert (blocks[:, 0] == builder.vocab.boa).all()
    assert (blocks[:, -1] == builder.vocab.eoa).all()
    assert (blocks[:, 1:-1] - builder.vocab.action.start == WORLDVLA.encode_actions(ACTIONS)).all()
    assert (whole.chunk[positions] == np.arange(1, 6)[:, None]).all()
    assert np.count_nonzero(whole.chunk) == positions.size  # the closing separator has none


def test_split_views_undoes_the_order_of_generation():
    builder = tiny()
    frame = frames(builder, 1)[0]
    sample = builder.world([frame], np.zeros(2), frame)
    codes = sample.ids[sample.kind == KIND_IMAGE] - builder.vocab.image.start
    for got, expected in zip(builder.split_views(codes), frame, strict=True):
        assert (got == expected).all()


@pytest.mark.parametrize("name", CASES)
def test_kinds_places_and_chunks_are_where_they_belong(name: str):
    _, _, vocab, sample = CASES[name]
    is_image = np.isin(sample.ids, vocab.image)
    assert ((sample.row > 0) == is_image).all()
    assert ((sample.col > 0) == is_image).all()
    prompt = int(np.argmax(sample.ids == vocab.sep)) + 1
    assert (sample.kind[:prompt] == KIND_PROMPT).all()
    assert (sample.chunk[:prompt] == 0).all()
    after = sample.kind[prompt:]
    if "policy" in name:
        assert (after == KIND_ACTION).all()
    else:
        assert (after == np.where(is_image[prompt:], KIND_IMAGE, KIND_LAYOUT)).all()
        assert (sample.chunk == 0).all()


def test_places_of_a_frame_are_unique_and_within_the_table():
    for builder in (published(RYNNVLA_256, RYNNVLA), tiny()):
        template = builder.world_template()
        for frame in template.images:
            places = [template.table[3:, positions] for positions in frame]
            pairs = np.concatenate(places, axis=1).T
            assert len(np.unique(pairs, axis=0)) == len(pairs)
            assert pairs.min() == 1
            assert pairs[:, 0].max() == builder.layout.num_rows - 1
            assert pairs[:, 1].max() == builder.layout.num_cols - 1


def test_a_sample_does_not_leak_into_the_next():
    builder = tiny()
    state, actions = np.zeros(3), np.zeros((2, 2))
    first = builder.policy("press it", state, frames(builder, 1), actions)
    kept = first.ids.copy()
    builder.policy("press it", state + 1, frames(builder, 1, first=1), actions + 1)
    assert (first.ids == kept).all()
    assert (builder.policy("press it", state, frames(builder, 1), actions).ids == kept).all()


def test_stacking_pads():
    builder = tiny()
    short = builder.policy_prompt("press it", np.zeros(3), frames(builder, 1))
    long = builder.policy("press it", np.zeros(3), frames(builder, 2), np.zeros((2, 2)))
    batch = Batch.stack([short, long], pad=builder.vocab.pad)
    assert batch.ids_BT.shape == (2, len(long))
    assert (batch.ids_BT[0, len(short) :] == builder.vocab.pad).all()
    assert not batch.kind_BT[0, len(short) :].any()


def test_prompt_texts_are_all_that_a_model_reads():
    texts = prompt_texts(LayoutConfig(), ["b", "a", "b"])
    assert texts == [*(f"What action should the robot take to {t}?" for t in "ab"), WORLD]


def test_bad_input_raises():
    builder = tiny()
    state, one, actions = np.zeros(3), frames(builder, 1), np.zeros((2, 2))
    with pytest.raises(ValueError, match=r"1\.\.2 frames .* got 3"):
        builder.policy("x", state, frames(builder, 1) * 3, actions)
    with pytest.raises(ValueError, match=r"shape \(2, 2\), got \(3, 2\)"):
        builder.policy("x", state, one, np.zeros((3, 2)))
    with pytest.raises(ValueError, match="got no state"):
        builder.policy("x", None, one, actions)
    with pytest.raises(ValueError, match="3 dims"):
        builder.policy("x", np.zeros(4), one, actions)
    with pytest.raises(ValueError, match="2 views"):
        builder.policy("x", state, [one[0][:1]], actions)
    with pytest.raises(ValueError, match="agentview needs 6 codes, got 2"):
        builder.policy("x", state, [one[0][::-1]], actions)
    with pytest.raises(ValueError, match=r"codes must be in \[0, 40\)"):
        builder.policy("x", state, [[codes + 35 for codes in one[0]]], actions)
    with pytest.raises(ValueError, match="got none"):
        builder.world(one, None, one[0])
    with pytest.raises(ValueError, match="codes must be in"):
        builder.policy("six words are one too many", state, one, actions)


def test_pieces_that_do_not_fit_raise():
    text, layout = CountedWords(size=5), tiny().layout
    with pytest.raises(ValueError, match="has room for 4"):
        SampleBuilder(layout, compact(40, 4), text, TINY_STATISTICS)
    with pytest.raises(ValueError, match="2 action dims, the layout 7"):
        SampleBuilder(replace(layout, num_action_dims=7), compact(40, 5), text, TINY_STATISTICS)
    with pytest.raises(ValueError, match="3 state dims, the layout 8"):
        SampleBuilder(replace(layout, num_state_dims=8), compact(40, 5), text, TINY_STATISTICS)
    with pytest.raises(ValueError, match="even sides"):
        SampleBuilder(layout, chameleon(), text, TINY_STATISTICS)


def test_prompt_is_the_training_prompt():
    """What a policy is asked with is the beginning of what it was trained on."""
    builder = published(WORLDVLA_256, WORLDVLA)
    whole: Sample = builder.policy(TASK, None, frames(builder, 2), ACTIONS)
    prompt = builder.policy_prompt(TASK, None, frames(builder, 2))
    assert (whole.ids[: len(prompt)] == prompt.ids).all()
    assert whole.ids[len(prompt)] == builder.vocab.boa
