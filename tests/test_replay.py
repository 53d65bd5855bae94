"""Passes of fixed shape, over a cache that is used again and again, give the tokens of passes that grow; and,
on a CUDA device, recorded passes give those of launched ones.

Run: pytest tests/test_replay.py
"""

from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch
from test_decode import INSTRUCTIONS, LAYOUT, build, frame

from worldvla.batch import Sample
from worldvla.config import LayoutConfig
from worldvla.data.sample import SampleBuilder
from worldvla.infer.decode import decode_chunk, decode_frame
from worldvla.infer.replay import _REPLAYS, KEPT, Replay
from worldvla.model.transformer import Block, Transformer


@pytest.fixture
def replays() -> Iterator[dict[int, Replay]]:
    """One replay for each number of rows, launched kernel by kernel, in use wherever one is asked for."""
    made: dict[int, Replay] = {}

    def of(model: Transformer, batch: int, longest: int) -> Replay:
        assert longest <= 160
        replay = made.setdefault(batch, Replay(model, 160, batch, is_recorded=False))
        replay.cache.clear()
        return replay

    with patch.object(Replay, "of", of):
        yield made


def queries(rng: np.random.Generator, builder: SampleBuilder) -> list[list[Sample]]:
    views = [frame(rng), frame(rng)]
    prompts = [builder.policy_prompt(text, rng.uniform(-1, 1, 8), views) for text in INSTRUCTIONS]
    return [prompts[:1], prompts, prompts[1:2], prompts[::-1]]


def chunks(builder: SampleBuilder, model: Transformer, asked: list[list[Sample]]) -> list[np.ndarray]:
    tail, blocks_KA = builder.policy_tail(), builder.action_block_positions(0)
    found = [
        decode_chunk(model, builder.vocab, p, tail, blocks_KA, together=t)
        for p in asked
        for t in (True, False)
    ]
    return [chunk.codes_BKA for chunk in found]


def images(
    rng: np.random.Generator, builder: SampleBuilder, model: Transformer
) -> tuple[list[np.ndarray], list[int]]:
    """Return frames decoded without a guess, from noise, and from the right one; and their passes."""
    codes, passes, tail = [], [], builder.world_tail()
    for batch in (1, 3, 1):
        prompts = [builder.world_prompt([frame(rng)], rng.uniform(-1, 1, 7)) for _ in range(batch)]
        plain, stats = decode_frame(model, builder.vocab, prompts, tail)
        noise = rng.integers(0, builder.vocab.num_image_codes, plain.shape)
        for draft in (noise, plain):
            drafted, stats = decode_frame(model, builder.vocab, prompts, tail, draft)
            np.testing.assert_array_equal(drafted, plain)
            codes.append(drafted)
            passes.append(stats.passes)
    return codes, passes


@pytest.mark.parametrize("selective", [True, False])
def test_fixed_shapes_change_no_action(selective: bool, replays: dict[int, Replay]) -> None:
    rng = np.random.default_rng(0)
    layout = LayoutConfig(**{**vars(LAYOUT), "selective_mask": selective})
    builder, model = build(rng, layout)
    asked = queries(rng, builder)
    found = chunks(builder, model, asked)
    assert set(replays) == {1, 3}
    for replay in replays.values():
        buffers = [*replay.cache._keys, *replay.cache._values]
        assert replay.num_bytes == sum(b.nbytes for b in buffers if b is not None)
    with patch.object(Replay, "of", return_value=None):
        expected = chunks(builder, model, asked)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_fixed_shapes_change_no_frame(replays: dict[int, Replay]) -> None:
    builder, model = build(np.random.default_rng(0))
    found, passes = images(np.random.default_rng(1), builder, model)
    assert set(replays) == {1, 3}
    assert min(passes) == 1, "a right guess is checked in one pass"
    with patch.object(Replay, "of", return_value=None):
        expected, _ = images(np.random.default_rng(1), builder, model)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_model_on_the_cpu_has_no_graphs() -> None:
    assert Replay.of(build(np.random.default_rng(0))[1], 1, 40) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
@pytest.mark.parametrize("compiled", [False, True])
def test_recorded_passes_give_the_tokens_of_launched_ones(compiled: bool) -> None:
    rng = np.random.default_rng(0)
    builder, model = build(rng)
    torch.use_deterministic_algorithms(False)  # they need a variable of the environment
    model = model.cuda()
    if compiled:
        model.compile_blocks()
    asked = queries(rng, builder)
    with torch.inference_mode():
        found, (frames, _) = chunks(builder, model, asked), images(np.random.default_rng(1), builder, model)
        again = chunks(builder, model, asked)
        with patch.object(Replay, "of", return_value=None):
            expected = chunks(builder, model, asked)
            launched, _ = images(np.random.default_rng(1), builder, model)
    for mine, theirs in zip(found + again + frames, expected * 2 + launched, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert all(kept._recorded for kept in _REPLAYS[model].values()), "a pass was not recorded"
    replay = Replay.of(model, 1, 60)
    assert replay is Replay.of(model, 1, 61), "lengths are rounded up"
    for length in range(100, 100 + 64 * (KEPT + 1), 64):
        Replay.of(model, 1, length)
    assert Replay.of(model, 1, 60) is not replay, "the caches a model keeps are bounded"


@pytest.mark.usefixtures("replays")
def test_blocks_in_one_piece_and_weights_side_by_side_change_no_action() -> None:
    rng = np.random.default_rng(0)
    builder, model = build(rng)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asked = queries(rng, builder)
    expected = chunks(builder, model, asked)
    steps: list[object] = []
    model.compile_blocks(lambda graph, _: steps.append(graph) or graph.forward)
    found = chunks(builder, model, asked)
    torch._dynamo.reset()
    assert steps, "nothing was compiled"
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert model.state_dict().keys() == weights.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    block = model.layers[0]
    assert isinstance(block, Block)
    block.mlp(torch.ones(1, 1, model.config.width)).sum().backward()
    assert block.mlp.gate.weight.grad is not None, "joined weights would not learn"
    block.attention.q.weight.data.zero_()  # views: weights that are loaded afterwards count
    assert block.attention.joined is not None
    assert not block.attention.joined[: block.attention.q.out_features].any()
