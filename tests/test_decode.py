"""Decoding with a cache, side by side and over ragged batches gives the ids of the slow way: one id at a
time, everything recomputed.

Run: pytest tests/test_decode.py
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_run import MODEL

from worldvla.batch import KIND_IMAGE, Batch, Sample
from worldvla.config import LayoutConfig
from worldvla.data.sample import SampleBuilder
from worldvla.infer.decode import best_bin, decode_actions, decode_images
from worldvla.model.mask import dense_mask
from worldvla.model.transformer import Transformer
from worldvla.tokenizers.action import compute_statistics
from worldvla.tokenizers.text import TextTokenizer
from worldvla.vocab import compact

LAYOUT = LayoutConfig(
    views=("agentview", "wrist"),
    grids=((3, 3), (2, 2)),
    history=2,
    chunk=3,
    state=True,
    policy_prompt="{task}",
)
INSTRUCTIONS = ("go", "lift the lid and go home", "open it")


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def build(rng: np.random.Generator, layout: LayoutConfig = LAYOUT) -> tuple[SampleBuilder, Transformer]:
    statistics = compute_statistics(rng.uniform(-1, 1, (9, 7)), rng.uniform(-1, 1, (9, 8)), "minmax")
    text = TextTokenizer.train(INSTRUCTIONS, 300)
    vocab = compact(16, text.size)
    model = Transformer(MODEL, vocab.size, layout.num_rows, layout.num_cols)
    model.init_weights(0)
    with torch.no_grad():
        model.head.weight.mul_(50.0)  # scores far apart, so that rounding decides nothing
    return SampleBuilder(layout, vocab, text, statistics), model.eval()


def frame(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    return tuple(rng.integers(0, 16, rows * cols) for rows, cols in LAYOUT.grids)


def policy_prompts(builder: SampleBuilder, rng: np.random.Generator) -> list[Sample]:
    """Return three prompts of three lengths: other instructions, one or two frames."""
    return [
        builder.policy_prompt(text, rng.uniform(-1, 1, 8), [frame(rng) for _ in range(count)])
        for text, count in zip(INSTRUCTIONS, (1, 2, 2), strict=True)
    ]


@torch.no_grad()
def slow(
    model: Transformer, prompt: Sample, tail: Sample, span: range, opens: list[int], bins: bool
) -> np.ndarray:
    """Fill the open positions of prompt + tail from left to right; the whole sequence is computed anew for
    each.
    """
    whole = Sample(**{f: np.concatenate([getattr(prompt, f), getattr(tail, f)]) for f in vars(tail)})
    batch = Batch.stack([whole], pad=1)
    for position in opens:
        stop = len(prompt) + position
        chunk = batch.chunk_BT[:, :stop]
        x = model(batch.ids_BT[:, :stop], dense_mask(chunk), batch.row_BT[:, :stop], batch.col_BT[:, :stop])
        logits = model.logits(x[0, -1], span)
        code = best_bin(logits) if bins else logits.argmax(-1)
        batch.ids_BT[0, stop] = code + span.start
    return batch.ids_BT[0, [len(prompt) + p for p in opens]].numpy() - span.start


@pytest.mark.parametrize("is_selective", [True, False])
def test_actions_equal_the_slow_way_over_ragged_prompts(rng: np.random.Generator, is_selective: bool) -> None:
    builder, model = build(rng, replace(LAYOUT, selective_mask=is_selective))
    prompts, tail, blocks = (
        policy_prompts(builder, rng),
        builder.policy_tail(),
        builder.action_block_positions(0),
    )
    assert len({len(p) for p in prompts}) == 3
    codes = decode_actions(model, builder.vocab, prompts, tail, blocks)
    opens = blocks[:, 1:-1].reshape(-1).tolist()
    expected = [slow(model, p, tail, builder.vocab.action, opens, bins=True).reshape(3, 7) for p in prompts]
    np.testing.assert_array_equal(codes, expected)
    assert len(np.unique(codes)) > 9


def test_plain_mask_makes_actions_depend_on_those_before(rng: np.random.Generator) -> None:
    builder, model = build(rng)
    prompts, blocks = policy_prompts(builder, rng), builder.action_block_positions(0)
    plain = SampleBuilder(
        replace(LAYOUT, selective_mask=False), builder.vocab, builder.text, builder.statistics
    )
    selective = decode_actions(model, builder.vocab, prompts, builder.policy_tail(), blocks)
    causal = decode_actions(model, builder.vocab, prompts, plain.policy_tail(), blocks)
    np.testing.assert_array_equal(selective[:, 0], causal[:, 0])
    assert (selective[:, 1:] != causal[:, 1:]).any()


def test_a_chunk_takes_as_many_passes_as_an_action_has_dims(rng: np.random.Generator) -> None:
    builder, model = build(rng)
    passes = []
    model.norm.register_forward_hook(lambda *_: passes.append(1))
    prompts, tail = policy_prompts(builder, rng), builder.policy_tail()
    decode_actions(model, builder.vocab, prompts, tail, builder.action_block_positions(0))
    assert len(passes) == LAYOUT.num_action_dims


def test_images_equal_the_slow_way(rng: np.random.Generator) -> None:
    builder, model = build(rng)
    prompts = [builder.world_prompt([frame(rng)], rng.uniform(-1, 1, 7)) for _ in range(2)]
    prompts.append(builder.world_prompt([frame(rng), frame(rng)], rng.uniform(-1, 1, 7)))
    tail = builder.world_tail()
    opens = np.flatnonzero(tail.kind == KIND_IMAGE).tolist()
    codes = decode_images(model, builder.vocab, prompts, tail)
    expected = [slow(model, p, tail, builder.vocab.image, opens, bins=False) for p in prompts]
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(codes[:1], decode_images(model, builder.vocab, prompts[:1], tail))
    assert codes.shape == (3, 13)
    assert len(np.unique(codes)) > 3


def test_the_two_codes_of_the_last_bin_count_as_one() -> None:
    logits = torch.full((256,), -9.0)
    logits[10], logits[254], logits[255] = 1.0, 0.6, 0.6
    assert best_bin(logits).item() == 254
    logits[254:] = -9.0
    assert best_bin(logits).item() == 10
