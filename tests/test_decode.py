"""Decoding with a cache, in parallel and over ragged batches gives the ids of the slow way: one id at a
time, everything recomputed. Drawn actions follow the model's distribution.

Run: pytest tests/test_decode.py
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from tiny_run import LAYOUT, MODEL

import worldvla
import worldvla.infer.decode as decode
import worldvla.vocab
from paper.compiled import compiled
from worldvla.batch import KIND_IMAGE, Batch, Sample
from worldvla.config import LayoutConfig, ModelConfig
from worldvla.data.sample import SampleBuilder
from worldvla.infer.decode import CLOSE, PARALLEL, Chunk, bin_scores, chunk_path, verify
from worldvla.infer.draft import FrameStats
from worldvla.infer.graphs import Runner
from worldvla.infer.model import Model, load
from worldvla.infer.policy import Policy
from worldvla.model.mask import dense_mask
from worldvla.model.transformer import Transformer
from worldvla.tokenizers.action import compute_statistics
from worldvla.tokenizers.text import TextTokenizer
from worldvla.vocab import compact

ASSETS = Path(worldvla.__file__).parent / "assets"
INSTRUCTIONS = ("go", "lift the lid and go home", "open it")


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def decode_chunk(model: Transformer, *args: Any, **options: Any) -> Chunk:
    return decode.decode_chunk(Runner(model), *args, **options)


def decode_actions(model: Transformer, *args: Any, **options: Any) -> np.ndarray:
    return decode_chunk(model, *args, **options).codes_BUA


def decode_frame(model: Transformer, *args: Any, **options: Any) -> tuple[np.ndarray, FrameStats]:
    return decode.decode_frame(Runner(model), *args, **options)


def build(
    rng: np.random.Generator, layout: LayoutConfig = LAYOUT, shape: ModelConfig = MODEL, seed: int = 0
) -> tuple[SampleBuilder, Transformer]:
    statistics = compute_statistics(rng.uniform(-1, 1, (9, 7)), rng.uniform(-1, 1, (9, 8)), "minmax")
    text = TextTokenizer.train(INSTRUCTIONS, 300)
    vocab = compact(16, text.size)
    model = Transformer(shape, vocab.size, layout.num_rows, layout.num_cols)
    model.init_weights(seed)
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


def query(builder: SampleBuilder, rng: np.random.Generator) -> tuple[list[Sample], Sample, np.ndarray]:
    """Return the prompts, the tail and the positions of its action blocks."""
    return policy_prompts(builder, rng), builder.policy_tail(), builder.action_block_positions(0)


def slow(
    model: Transformer, prompt: Sample, tail: Sample, span: range, opens: list[int], bins: bool
) -> np.ndarray:
    return slow_with_margins(model, prompt, tail, span, opens, bins)[0]


@torch.no_grad()
def slow_with_margins(
    model: Transformer, prompt: Sample, tail: Sample, span: range, opens: list[int], bins: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Fill the open positions of prompt + tail from left to right; the whole sequence is computed anew for
    each. Also return by how many standard deviations the best score leads.
    """
    margins = []
    whole = Sample(**{f: np.concatenate([getattr(prompt, f), getattr(tail, f)]) for f in vars(tail)})
    batch = Batch.stack([whole], pad=1)
    for position in opens:
        stop = len(prompt) + position
        chunk = batch.chunk_BT[:, :stop]
        x = model(batch.ids_BT[:, :stop], dense_mask(chunk), batch.row_BT[:, :stop], batch.col_BT[:, :stop])
        logits = F.linear(x[0, -1].float(), model.head.weight[span.start : span.stop].float())
        code = bin_scores(logits).argmax(-1) if bins else logits.argmax(-1)
        best = (bin_scores(logits) if bins else logits).topk(2).values
        margins.append(float((best[0] - best[1]) / logits.std()))
        batch.ids_BT[0, stop] = code + span.start
    ids = batch.ids_BT[0, [len(prompt) + p for p in opens]].numpy()
    return ids - span.start, np.array(margins)


@pytest.mark.parametrize("is_selective", [True, False])
def test_actions_equal_the_slow_way_over_ragged_prompts(rng: np.random.Generator, is_selective: bool) -> None:
    builder, model = build(rng, replace(LAYOUT, selective_mask=is_selective))
    prompts, tail, blocks = query(builder, rng)
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


@pytest.mark.parametrize("chunk", [1, 5, 25])
def test_a_chunk_takes_seven_passes_and_holds_its_prompt_once(rng: np.random.Generator, chunk: int) -> None:
    """One pass an action dim, whatever K is; a cache of one row a prompt, as long as the sequence."""
    builder, model = build(rng, replace(LAYOUT, chunk=chunk))
    passes, runner = [], Runner(model)
    with patch.object(runner, "open", wraps=runner.open) as opened:
        model.norm.register_forward_hook(lambda *_: passes.append(1))
        prompts, tail = policy_prompts(builder, rng), builder.policy_tail()
        decode.decode_chunk(runner, builder.vocab, prompts, tail, builder.action_block_positions(0))
    assert len(passes) == 7
    opened.assert_called_once_with(3, max(map(len, prompts)) + len(tail))


def test_images_equal_the_slow_way(rng: np.random.Generator) -> None:
    builder, model = build(rng, replace(LAYOUT, clip=2))
    prompts = [builder.world_prompt([frame(rng)], rng.uniform(-1, 1, 7)) for _ in range(2)]
    prompts.append(builder.world_prompt([frame(rng), frame(rng)], rng.uniform(-1, 1, (2, 7))))
    tail = builder.world_tail()
    opens = np.flatnonzero(tail.kind == KIND_IMAGE).tolist()
    codes = decode_frame(model, builder.vocab, prompts, tail)[0]
    expected = [slow(model, p, tail, builder.vocab.image, opens, bins=False) for p in prompts]
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(codes[:1], decode_frame(model, builder.vocab, prompts[:1], tail)[0])
    assert codes.shape == (3, 13)
    assert len(np.unique(codes)) > 3


def test_the_two_codes_of_the_last_bin_count_as_one() -> None:
    logits = torch.full((256,), -9.0)
    logits[10], logits[254], logits[255] = 1.0, 0.6, 0.6
    assert bin_scores(logits).argmax(-1).item() == 254
    logits[254:] = -9.0
    assert bin_scores(logits).argmax(-1).item() == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [1, 2, 5, 10, 25])
def test_parallel_is_sequential(chunk: int, dtype: torch.dtype) -> None:
    """For any K, random models, ragged batches and both types. In bfloat16 an action may leave the slow way
    only where the slow way's own two best codes are nearly equal.
    """
    rng = np.random.default_rng(chunk)
    has_places, num_layers = bool(rng.integers(2)), int(rng.integers(1, 4))
    shape = replace(MODEL, place_embedding=has_places, num_layers=num_layers, num_heads=4)
    shape = replace(shape, num_kv_heads=int(rng.choice([1, 2, 4])))
    builder, model = build(rng, replace(LAYOUT, chunk=chunk), shape, seed=chunk)
    model = model.to(dtype)
    prompts, tail, blocks = query(builder, rng)
    assert chunk_path(tail, blocks) == PARALLEL
    together = decode_actions(model, builder.vocab, prompts, tail, blocks)
    alone = decode_actions(model, builder.vocab, prompts[2:], tail, blocks)
    in_turn = decode_chunk(model, builder.vocab, prompts, tail, blocks, parallel=False).codes_BUA
    assert dtype == torch.bfloat16 or (in_turn == together).all()
    opens, differing = blocks[:, 1:-1].reshape(-1).tolist(), 0
    for row, prompt in enumerate(prompts):
        span = builder.vocab.action
        codes, margins = slow_with_margins(model, prompt, tail, span, opens, bins=True)
        for got in [together[row]] + ([alone[0]] if row == 2 else []):
            is_wrong_UA = got != codes.reshape(chunk, -1)
            first = [int(dims.argmax()) for dims in is_wrong_UA if dims.any()]
            leads = margins.reshape(chunk, -1)[is_wrong_UA.any(1), first]
            assert (leads < CLOSE[dtype]).all(), leads
            differing += len(first)
    assert differing == 0 or (dtype == torch.bfloat16 and differing <= 0.2 * 4 * chunk + 1)


@pytest.mark.parametrize("change", ["causal", "same chunk", "chunk 0 inside"])
def test_other_masks_are_decoded_in_sequence_and_say_so(rng: np.random.Generator, change: str) -> None:
    builder, model = build(rng, replace(LAYOUT, selective_mask=change != "causal"))
    tail, blocks = builder.policy_tail(), builder.action_block_positions(0)
    chunk = tail.chunk.copy()
    if change == "same chunk":
        chunk[blocks[1]] = chunk[blocks[0]]
    elif change == "chunk 0 inside":
        chunk[blocks[1, 3]] = 0
    tail = replace(tail, chunk=chunk)
    prompts = policy_prompts(builder, rng)
    found = decode_chunk(model, builder.vocab, prompts, tail, blocks)
    assert chunk_path(tail, blocks).startswith("sequential: actions of a chunk see those before them")
    opens = blocks[:, 1:-1].reshape(-1).tolist()
    expected = [slow(model, p, tail, builder.vocab.action, opens, bins=True).reshape(3, 7) for p in prompts]
    np.testing.assert_array_equal(found.codes_BUA, expected)


def test_nothing_to_decode_is_one_line(rng: np.random.Generator) -> None:
    builder, model = build(rng)
    tail, blocks = builder.policy_tail(), builder.action_block_positions(0)
    prompts = policy_prompts(builder, rng)
    with pytest.raises(ValueError, match="got no prompts, expected at least one"):
        decode_actions(model, builder.vocab, [], tail, blocks)
    with pytest.raises(ValueError, match=r"got U = 0: raise layout\.chunk"):
        decode_actions(model, builder.vocab, prompts, tail, blocks[:0])
    for temperature in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"must be 0 \(greedy\) or above and finite, got"):
            decode_actions(model, builder.vocab, prompts, tail, blocks, temperature)


def tiny_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bins, the last two of which mean the same: three codes."""
    monkeypatch.setattr(worldvla.vocab, "NUM_BIN_CODES", 4)
    monkeypatch.setattr(decode, "NUM_BIN_CODES", 4)


def g_test(counts: np.ndarray, p: np.ndarray) -> float:
    """Return the likelihood-ratio statistic of counts against probabilities: chi-square with len - 1 degrees
    of freedom."""
    seen = counts > 0
    return float(2 * (counts[seen] * np.log(counts[seen] / (counts.sum() * p[seen]))).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_drawn_actions_follow_the_models_distribution(
    monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Exact joint of two dims by enumeration; and two actions of a chunk are independent."""
    tiny_vocabulary(monkeypatch)
    rng, num = np.random.default_rng(3), 8_000
    layout = LayoutConfig(grids=((1, 2),), chunk=2, num_action_dims=2, policy_prompt="{task}")
    builder, model = _tiny(rng, layout)
    prompt = builder.policy_prompt("go", None, [(np.array([1, 0]),)])
    tail, blocks, span = builder.policy_tail(), builder.action_block_positions(0), builder.vocab.action
    seeds = range(num)
    codes = decode_actions(model, builder.vocab, [prompt] * num, tail, blocks, temperature, seeds)
    assert codes.shape == (num, 2, 2)
    assert codes.max() == 2

    whole = Sample(**{f: np.concatenate([getattr(prompt, f), getattr(tail, f)]) for f in vars(tail)})
    joint_UXY = np.ones((2, 3, 3))
    for k, (x, y) in itertools.product(range(2), itertools.product(range(3), repeat=2)):
        for dim in range(2):
            batch = Batch.stack([whole], pad=1)
            batch.ids_BT[0, len(prompt) + blocks[k, 1]] = span.start + x
            with torch.no_grad():
                hidden = model(batch.ids_BT, dense_mask(batch.chunk_BT), batch.row_BT, batch.col_BT)
            scores = bin_scores(model.logits(hidden[0, len(prompt) + blocks[k, dim]], span))
            joint_UXY[k, x, y] *= float((scores.detach() / temperature).softmax(-1)[(x, y)[dim]])
    np.testing.assert_allclose(joint_UXY.sum((1, 2)), 1, atol=1e-5)
    assert 0.5 < joint_UXY.max() / joint_UXY.mean() < 9
    pair = codes[..., 0] * 3 + codes[..., 1]
    for k in range(2):
        assert g_test(np.bincount(pair[:, k], minlength=9), joint_UXY[k].reshape(-1)) < 26.1  # p = 0.001
    product = np.outer(joint_UXY[0], joint_UXY[1]).reshape(-1)
    both = np.bincount(pair[:, 0] * 9 + pair[:, 1], minlength=81)
    assert g_test(both, product) < 124.8  # 80 degrees of freedom, p = 0.001
    again = decode_actions(model, builder.vocab, [prompt] * num, tail, blocks, temperature, seeds)
    np.testing.assert_array_equal(codes, again)
    other = decode_actions(model, builder.vocab, [prompt] * num, tail, blocks, temperature, range(1, num + 1))
    assert (codes != other).any()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_sequential_draws_and_knows_what_parallel_does(rng: np.random.Generator, temperature: float) -> None:
    builder, model = build(rng)
    with torch.no_grad():
        model.head.weight.mul_(0.1)
    prompts, tail, blocks = query(builder, rng)
    both = [
        decode_chunk(model, builder.vocab, prompts, tail, blocks, temperature, seed=2, parallel=parallel)
        for parallel in (True, False)
    ]
    np.testing.assert_array_equal(both[0].codes_BUA, both[1].codes_BUA)
    np.testing.assert_allclose(both[0].entropy_BUA, both[1].entropy_BUA, rtol=1e-4)
    np.testing.assert_allclose(both[0].margin_BUA, both[1].margin_BUA, rtol=1e-3, atol=1e-5)


def _tiny(rng: np.random.Generator, layout: LayoutConfig) -> tuple[SampleBuilder, Transformer]:
    statistics = compute_statistics(
        rng.uniform(-1, 1, (9, layout.num_action_dims)), np.ones((9, 8)), "minmax"
    )
    text = TextTokenizer.train(INSTRUCTIONS, 300)
    vocab = compact(3, text.size)
    model = Transformer(MODEL, vocab.size, layout.num_rows, layout.num_cols)
    model.init_weights(1)
    with torch.no_grad():
        model.head.weight.mul_(8.0)
    return SampleBuilder(layout, vocab, text, statistics), model.eval()


def test_confidence_is_the_entropy_and_the_lead(rng: np.random.Generator) -> None:
    """From the scores of one whole pass over the decoded sequence."""
    builder, model = build(rng)
    with torch.no_grad():
        model.head.weight.mul_(0.1)
    prompts, tail = policy_prompts(builder, rng)[:1], builder.policy_tail()
    blocks, span = builder.action_block_positions(0), builder.vocab.action
    found = decode_chunk(model, builder.vocab, prompts, tail, blocks)
    whole = Sample(**{f: np.concatenate([getattr(prompts[0], f), getattr(tail, f)]) for f in vars(tail)})
    batch = Batch.stack([whole], pad=1)
    batch.ids_BT[0, len(prompts[0]) + blocks[:, 1:-1]] = torch.from_numpy(found.codes_BUA[0]) + span.start
    with torch.no_grad():
        hidden = model(batch.ids_BT, dense_mask(batch.chunk_BT), batch.row_BT, batch.col_BT)
        p = bin_scores(model.logits(hidden[0, len(prompts[0]) + blocks[:, :-2]], span)).double().softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    best = p.sort(-1).values
    np.testing.assert_allclose(found.entropy_BUA[0], entropy, rtol=1e-4)
    np.testing.assert_allclose(found.margin_BUA[0], best[..., -1] - best[..., -2], rtol=1e-3, atol=1e-6)
    assert 0.1 < found.entropy_BUA.mean() < 5.5


def noisy_prompts(model: Model, rng: np.random.Generator, instructions: Sequence[str]) -> list[Sample]:
    """Return what the model reads of frames of noise, each with its instruction."""
    dims = model.config.layout.num_state_dims
    observations = [
        {view: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for view, size in model.view_sizes.items()}
        | {"state": rng.uniform(-0.1, 0.1, dims).astype(np.float32), "instruction": text}
        for text in instructions
    ]
    return Policy(model).prompts(observations)


@pytest.mark.parametrize("name", ["tabletop", "libero"])
def test_the_shipped_models_act_as_their_training_pass_says(name: str, rng: np.random.Generator) -> None:
    """One pass with gradients over the decoded sequence, no cache: each code is its best, near ties apart."""
    model = load(ASSETS / name)
    tail, blocks_UA = model.builder.policy_tail(), model.builder.action_block_positions(0)
    prompts = noisy_prompts(model, rng, ["pick up the milk", "pick up the milk and place it in the basket"])
    span = model.vocab.action
    codes_BUA = decode_actions(model.transformer, model.vocab, prompts, tail, blocks_UA)
    for prompt, codes_UA in zip(prompts, codes_BUA, strict=True):
        whole = Sample(**{f: np.concatenate([getattr(prompt, f), getattr(tail, f)]) for f in vars(tail)})
        dims_UA = len(prompt) + blocks_UA[:, 1:-1]
        whole.ids[dims_UA] = codes_UA + span.start
        batch = Batch.stack([whole], model.vocab.pad)
        with torch.enable_grad():
            x = model.transformer(batch.ids_BT, dense_mask(batch.chunk_BT), batch.row_BT, batch.col_BT)
        scores = bin_scores(model.transformer.logits(x[0, dims_UA - 1], span)).detach()
        chosen = scores.gather(-1, torch.from_numpy(codes_UA)[..., None])[..., 0]
        assert (scores.amax(-1) - chosen <= CLOSE[torch.float32] * scores.std(-1)).all()


@pytest.mark.parametrize(("part", "most"), [("whole", 4), ("blocks", 8)])
def test_new_queries_are_not_compiled_anew(rng: np.random.Generator, part: str, most: int) -> None:
    """Under torch.compile, with no graph break: lengths that were not seen before need no new graph."""
    builder, model = build(rng)
    tail, blocks_UA = builder.policy_tail(), builder.action_block_positions(0)
    counter = torch._dynamo.testing.CompileCounter()
    frames = [frame(rng), frame(rng)]
    state = rng.uniform(-1, 1, 8)
    pairs = itertools.product(INSTRUCTIONS, (1, 2))
    prompts = [builder.policy_prompt(text, state, frames[:n]) for text, n in pairs]
    assert len({len(p) for p in prompts}) == len(prompts)
    expected = [decode_actions(model, builder.vocab, [p], tail, blocks_UA) for p in prompts]
    runner = Runner(model, partial(compiled, backend=counter) if part == "blocks" else None)
    if part == "whole":
        model.forward = torch.compile(model.forward, backend=counter, fullgraph=True)
    graphs = []
    for prompt, codes in zip(prompts, expected, strict=True):
        chunk = decode.decode_chunk(runner, builder.vocab, [prompt], tail, blocks_UA)
        np.testing.assert_array_equal(chunk.codes_BUA, codes)
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    # The first query's are of fixed lengths, the second's are open.
    assert graphs[1] == graphs[-1] <= most, graphs


def test_a_window_is_kept_up_to_its_first_wrong_guess() -> None:
    guess, choice = torch.tensor([[7, 1, 2, 3, 4], [7, 1, 2, 3, 4]]), torch.tensor([[0, 1, 9, 3, 8]] * 2)
    is_new = torch.tensor([[False, True, True, True, True], [False, False, False, True, False]])
    is_kept, is_right = verify(guess, choice, is_new)
    assert is_kept.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]
    assert is_right.int().tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]


def test_a_row_draws_what_it_draws_alone(rng: np.random.Generator) -> None:
    """With its own seed or one for all; actions and frames."""
    builder, model = build(rng)
    with torch.no_grad():
        model.head.weight.mul_(0.02)
    world = [builder.world_prompt([frame(rng)], rng.uniform(-1, 1, 7)) for _ in range(3)]
    policy = (policy_prompts(builder, rng), builder.policy_tail(), builder.action_block_positions(0))
    draws = [
        (decode_actions, *policy),
        (lambda *args, **options: decode_frame(*args, **options)[0], world, builder.world_tail()),
    ]
    for draw, prompts, *rest in draws:
        for seeds in (3, [5, 3, 8]):
            together = draw(model, builder.vocab, prompts, *rest, temperature=1.0, seed=seeds)
            for i, prompt in enumerate(prompts):
                seed = seeds if isinstance(seeds, int) else seeds[i]
                alone = draw(model, builder.vocab, [prompt], *rest, temperature=1.0, seed=seed)
                np.testing.assert_array_equal(alone[0], together[i])
        with pytest.raises(ValueError, match="3 rows need one seed or 3, got 2"):
            draw(model, builder.vocab, prompts, *rest, temperature=1.0, seed=[1, 2])


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_refused(rng: np.random.Generator, broken: float) -> None:
    builder, model = build(rng)
    with torch.no_grad():
        model.norm.weight[0] = broken
    world = [builder.world_prompt([frame(rng)], rng.uniform(-1, 1, 7))]
    prompts, blocks_UA = policy_prompts(builder, rng), builder.action_block_positions(0)
    with pytest.raises(ValueError, match="scores are not finite"):
        decode_frame(model, builder.vocab, world, builder.world_tail())
    with pytest.raises(ValueError, match="scores are not finite"):
        decode_actions(model, builder.vocab, prompts, builder.policy_tail(), blocks_UA)
