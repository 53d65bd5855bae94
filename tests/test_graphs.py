"""Passes of fixed shape over caches that are used again, recorded, joined or compiled, give the tokens of
plain ones; the model itself is not touched.

Run: pytest tests/test_graphs.py
"""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from test_decode import INSTRUCTIONS, LAYOUT, build, frame

from paper.compiled import JoinedAttention, compiled
from worldvla.batch import Sample
from worldvla.config import LayoutConfig
from worldvla.data.sample import SampleBuilder
from worldvla.infer.decode import decode_chunk, decode_frame
from worldvla.infer.graphs import KEPT, FixedRoom, Runner


def queries(rng: np.random.Generator, builder: SampleBuilder) -> list[list[Sample]]:
    views = [frame(rng), frame(rng)]
    prompts = [builder.policy_prompt(text, rng.uniform(-1, 1, 8), views) for text in INSTRUCTIONS]
    return [prompts[:1], prompts, prompts[1:2], prompts[::-1]]


def chunks(builder: SampleBuilder, runner: Runner, asked: list[list[Sample]]) -> list[np.ndarray]:
    tail, blocks_UA = builder.policy_tail(), builder.action_block_positions(0)
    return [
        decode_chunk(runner, builder.vocab, prompts, tail, blocks_UA, parallel=parallel).codes_BUA
        for prompts in asked
        for parallel in (True, False)
    ]


def images(builder: SampleBuilder, runner: Runner) -> tuple[list[np.ndarray], list[int]]:
    """Return frames decoded without a guess, from noise, and from the right one; and their passes."""
    rng, codes, passes, tail = np.random.default_rng(1), [], [], builder.world_tail()
    for batch in (1, 3, 1):
        prompts = [builder.world_prompt([frame(rng)], rng.uniform(-1, 1, 7)) for _ in range(batch)]
        plain, _ = decode_frame(runner, builder.vocab, prompts, tail)
        noise = rng.integers(0, builder.vocab.num_image_codes, plain.shape)
        for guess in (noise, plain):
            guessed, stats = decode_frame(runner, builder.vocab, prompts, tail, guess)
            np.testing.assert_array_equal(guessed, plain)
            codes.append(guessed)
            passes.append(stats.passes)
    return codes, passes


def assert_equal(left: list[np.ndarray], right: list[np.ndarray]) -> None:
    for mine, theirs in zip(left, right, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("selective", [True, False])
def test_fixed_shapes_change_no_action_and_no_frame(selective: bool) -> None:
    rng = np.random.default_rng(0)
    builder, model = build(rng, LayoutConfig(**{**vars(LAYOUT), "selective_mask": selective}))
    asked, plain, fixed = queries(rng, builder), Runner(model), Runner(model, fixed=True)
    assert_equal(chunks(builder, fixed, asked), chunks(builder, plain, asked))
    (frames, passes), (expected, _) = images(builder, fixed), images(builder, plain)
    assert_equal(frames, expected)
    assert min(passes) == 1, "a right guess is verified in one pass"
    assert {batch for batch, _ in fixed.rooms} == {1, 3}
    assert not plain.rooms, "a model on the CPU keeps nothing between queries"


def test_rooms_are_shared_by_like_lengths_emptied_and_bounded() -> None:
    runner = Runner(build(np.random.default_rng(0))[1], fixed=True)
    room = runner.open(1, 60)
    assert isinstance(room, FixedRoom)
    layer = room.cache.layers[0]
    layer.keys_BGSK.fill_(torch.nan)
    assert room is runner.open(1, 61), "lengths are rounded up"
    assert not layer.keys_BGSK.any(), "of an earlier query something is left"
    for length in range(100, 100 + 64 * (KEPT + 1), 64):
        runner.open(1, length)
    assert len(runner.rooms) == KEPT
    assert runner.open(1, 60) is not room


@pytest.mark.parametrize("prepare", [None, partial(compiled, backend="eager")])
def test_a_model_that_was_converted_is_wrapped_anew(prepare: Any) -> None:
    rng = np.random.default_rng(0)
    builder, model = build(rng)
    runner = Runner(model, prepare, fixed=True)
    asked = queries(rng, builder)[:1]
    first = chunks(builder, runner, asked)
    room = runner.open(1, 60)
    assert room is runner.open(1, 60)
    with torch.no_grad():
        model.double().float()
        model.head.weight.neg_()
    assert runner.open(1, 60) is not room
    again = chunks(builder, runner, asked)
    torch._dynamo.reset()
    assert_equal(again, chunks(builder, Runner(model), asked))
    assert (first[0] != again[0]).any()


def test_joined_and_compiled_blocks_change_no_action_and_no_model() -> None:
    rng = np.random.default_rng(0)
    builder, model = build(rng)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: type(module) for name, module in model.named_modules()}
    asked, graphs = queries(rng, builder), []
    backend = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
    runner = Runner(model, partial(compiled, backend=backend))
    joined = chunks(builder, runner, asked)
    torch._dynamo.reset()
    assert graphs, "nothing was compiled"
    assert_equal(joined, chunks(builder, Runner(model), asked))
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert model.state_dict().keys() == weights.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    block = model.layers[0]
    block.mlp(torch.ones(1, 1, model.config.width)).sum().backward()  # pyright: ignore[reportCallIssue]
    assert block.mlp.gate.weight.grad is not None  # pyright: ignore
    query = block.attention.q  # pyright: ignore[reportAttributeAccessIssue]
    query.weight.data.zero_()  # pyright: ignore
    attention = runner._steps.layers[0].attention  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(attention, JoinedAttention)
    assert not attention.joined_FD[: query.out_features].any(), "weights that are loaded afterwards count"  # pyright: ignore


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
@pytest.mark.parametrize("prepare", [None, compiled])
def test_recorded_passes_give_the_tokens_of_launched_ones(prepare: Any) -> None:
    rng = np.random.default_rng(0)
    builder, model = build(rng)
    torch.use_deterministic_algorithms(False)  # they need a variable of the environment
    model, asked = model.cuda(), queries(rng, builder)
    recorded, launched = Runner(model, prepare), Runner(model, prepare, recorded=False)
    assert_equal(chunks(builder, recorded, asked) * 2, chunks(builder, launched, asked) * 2)
    assert_equal(chunks(builder, recorded, asked), chunks(builder, Runner(model), asked))
    assert_equal(images(builder, recorded)[0], images(builder, launched)[0])
    assert all(room.recorded for room in recorded.rooms.values()), "a pass was not recorded"
    assert not any(room.recorded for room in launched.rooms.values())
