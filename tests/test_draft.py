"""Frames by speculative decoding are those of one code a pass, whatever is guessed; draws keep the model's
distribution; the window follows what was accepted.

Run: pytest tests/test_draft.py
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_decode import LAYOUT, build, decode_frame, frame, g_test
from tiny_run import MODEL

from worldvla.batch import Batch, Sample
from worldvla.config import LayoutConfig
from worldvla.data.sample import SampleBuilder
from worldvla.data.show import CountedWords
from worldvla.infer.decode import CLOSE
from worldvla.infer.draft import CHEAP, CHEAP_EACH, WIDE, FrameStats, Window, summary
from worldvla.model.mask import dense_mask
from worldvla.model.transformer import Transformer
from worldvla.tokenizers.action import WORLDVLA
from worldvla.vocab import Vocab, chameleon, compact

N = sum(LAYOUT.codes_per_view)
World = tuple[Transformer, Vocab, list[Sample], Sample]


def world(seed: int, batch: int, ragged: bool = False) -> World:
    """Return a random model and `batch` world prompts; `ragged`: of one or two frames."""
    rng = np.random.default_rng(seed)
    builder, model = build(rng, replace(LAYOUT, clip=2))
    model.init_weights(seed)
    with torch.no_grad():
        model.head.weight.mul_(50.0)
    counts = [1 + (ragged and i % 2) for i in range(batch)]
    prompts = [
        builder.world_prompt(
            [frame(rng) for _ in range(n)], rng.uniform(-1, 1, (n, builder.layout.num_action_dims))
        )
        for n in counts
    ]
    return model, builder.vocab, prompts, builder.world_tail()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_any_guess_gives_the_plain_frame(seed: int, batch: int) -> None:
    model, vocab, prompts, tail = world(seed, batch, ragged=True)
    plain, stats = decode_frame(model, vocab, prompts, tail)
    assert (stats.passes, stats.judged, stats.accepted) == (N, 0, 0)
    assert len(np.unique(plain)) > 3
    rng = np.random.default_rng(seed)
    half = np.where(rng.random(plain.shape) < 0.5, plain, rng.integers(0, 16, plain.shape))
    for guess in (rng.integers(0, 16, plain.shape), half, plain):
        for window in (None, Window(fixed=2), Window(fixed=5), Window("meta")):
            codes, stats = decode_frame(model, vocab, prompts, tail, guess, window)
            np.testing.assert_array_equal(codes, plain)
            assert stats.passes <= N
            assert 0 <= stats.accepted <= stats.judged <= batch * N


def test_row_ends_and_grid_sizes_between_the_codes() -> None:
    """The published layout: structure between the codes, so that windows are longer than they look."""
    layout = LayoutConfig(views=("agentview", "wrist"), grids=((4, 4), (2, 4)))
    vocab = replace(chameleon(), size=16_384, num_text=16_384)
    rng, builder = np.random.default_rng(0), SampleBuilder(layout, vocab, CountedWords(16_100), WORLDVLA)
    model = Transformer(replace(MODEL, place_embedding=False), vocab.size).eval()
    model.init_weights(0)
    prompts = [
        builder.world_prompt(
            [[rng.integers(0, 8192, n) for n in layout.codes_per_view]], rng.uniform(-1, 1, 7)
        )
        for _ in range(2)
    ]
    tail = builder.world_tail()
    plain = decode_frame(model, vocab, prompts, tail)[0]
    guess = np.where(np.arange(24) % 7 == 3, 0, plain)
    for fixed in (1, 3, 24):
        codes, stats = decode_frame(model, vocab, prompts, tail, guess, Window(fixed=fixed))
        np.testing.assert_array_equal(codes, plain)
        assert stats.passes >= 24 / fixed


@pytest.mark.parametrize(("fixed", "passes"), [(13, 1), (5, 3), (1, 13)])
def test_a_right_guess_is_accepted_whole(fixed: int, passes: int) -> None:
    model, vocab, prompts, tail = world(0, 3)
    plain = decode_frame(model, vocab, prompts, tail)[0]
    codes, stats = decode_frame(model, vocab, prompts, tail, plain, Window(fixed=fixed))
    np.testing.assert_array_equal(codes, plain)
    assert stats == FrameStats(codes=3 * N, passes=passes, judged=3 * N, accepted=3 * N, close=0)


def test_a_wrong_code_costs_a_pass_and_rows_go_on_alone() -> None:
    """Row 0 is guessed right, row 1 wrong at its last code, row 2 at codes 2 and 9: the worst row decides."""
    model, vocab, prompts, tail = world(1, 3)
    plain = decode_frame(model, vocab, prompts, tail)[0]
    guess = plain.copy()
    for row, code in ((1, N - 1), (2, 2), (2, 9)):
        guess[row, code] = (guess[row, code] + 1) % 16
    codes, stats = decode_frame(model, vocab, prompts, tail, guess, Window(fixed=N))
    np.testing.assert_array_equal(codes, plain)
    assert 2 <= stats.passes <= 1 + N - 3  # row 2 gets three codes at once, then at least one a pass
    assert stats.judged == 3 * N
    assert stats.accepted <= 3 * N - 2  # what was wrong at first and nothing made right


def test_a_model_that_looks_at_no_code_before_takes_two_passes() -> None:
    """Its choices after a wrong code are right: the second pass confirms the first one's whole frame."""
    model, vocab, prompts, tail = world(2, 1)
    with torch.no_grad():
        model.embed.weight[vocab.image.start : vocab.image.stop] = 0
    plain = decode_frame(model, vocab, prompts, tail)[0]
    codes, stats = decode_frame(model, vocab, prompts, tail, (plain + 1) % 16, Window(fixed=N))
    np.testing.assert_array_equal(codes, plain)
    assert (stats.passes, stats.judged, stats.accepted) == (2, N, N - 1)


def test_what_later_passes_do_not_need_costs_nothing_to_the_first_codes() -> None:
    """Stale keys: after a rejected window the cache holds keys of wrong codes; they must not be seen."""
    model, vocab, prompts, tail = world(3, 2)
    plain = decode_frame(model, vocab, prompts, tail)[0]
    guess = (plain + 5) % 16
    guess[0] = plain[0]  # row 0 runs ahead, row 1 writes behind it
    codes, _ = decode_frame(model, vocab, prompts, tail, guess, Window(fixed=4))
    np.testing.assert_array_equal(codes, plain)


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_differs_only_at_near_ties(seed: int) -> None:
    """The first code of a row that leaves the plain frame was decided by less than rounding moves; without
    such codes both are identical. Scores are float32: none of them are equal.
    """
    model, vocab, prompts, tail = world(seed, 3)
    model = model.to(torch.bfloat16)
    plain, stats = decode_frame(model, vocab, prompts, tail)
    guess = np.random.default_rng(seed).integers(0, 16, plain.shape)
    codes, drafted = decode_frame(model, vocab, prompts, tail, guess)
    assert stats.close + drafted.close > 0 or (codes == plain).all()
    assert stats.close <= 0.3 * plain.size
    for row, prompt in enumerate(prompts):
        if (wrong := codes[row] != plain[row]).any():
            first = int(wrong.argmax())
            lead = _lead(model, vocab, prompt, tail, plain[row], first)
            assert lead < CLOSE[torch.bfloat16], lead


def test_codes_that_rounding_may_have_decided_are_counted() -> None:
    """None of them by default; all where every code has a twin that scores alike to a millionth."""
    model, vocab, prompts, tail = world(0, 3)
    guess = decode_frame(model, vocab, prompts, tail)[0] ^ 1
    assert decode_frame(model, vocab, prompts, tail, guess)[1].close == 0
    with torch.no_grad():
        rows = model.head.weight[vocab.image.start : vocab.image.stop]
        rows[1::2] = rows[::2] * (1 + 1e-6)
    for draft in (None, guess):
        assert decode_frame(model, vocab, prompts, tail, draft)[1].close == 3 * N


@torch.no_grad()
def _scores(
    model: Transformer, vocab: Vocab, prompt: Sample, tail: Sample, codes: np.ndarray
) -> torch.Tensor:
    """Return scores (N, V) of every code of a frame from one pass over all of it."""
    whole = Sample(**{f: np.concatenate([getattr(prompt, f), getattr(tail, f)]) for f in vars(tail)})
    opens = len(prompt) + np.flatnonzero(tail.kind == 2)
    batch = Batch.stack([whole], pad=1)
    batch.ids_BT[0, opens] = torch.from_numpy(codes) + vocab.image.start
    hidden = model(batch.ids_BT, dense_mask(batch.chunk_BT), batch.row_BT, batch.col_BT)
    weight = model.head.weight[vocab.image.start : vocab.image.stop]
    return hidden[0, opens - 1].float() @ weight.float().T


def _lead(
    model: Transformer, vocab: Vocab, prompt: Sample, tail: Sample, codes: np.ndarray, position: int
) -> float:
    scores = _scores(model, vocab, prompt, tail, codes)[position]
    best = scores.topk(2).values
    return float((best[0] - best[1]) / scores.std())


@pytest.mark.parametrize("batch", [1, 3])
def test_draws_with_one_seed_are_the_same_with_and_without_a_guess(batch: int) -> None:
    model, vocab, prompts, tail = world(5, batch)
    with torch.no_grad():
        model.head.weight.mul_(0.2)
    plain, _ = decode_frame(model, vocab, prompts, tail, temperature=0.9, seed=3)
    other, _ = decode_frame(model, vocab, prompts, tail, temperature=0.9, seed=4)
    greedy, _ = decode_frame(model, vocab, prompts, tail)
    assert (plain != other).any()
    for guess in (greedy, plain, (plain + 1) % 16):
        codes, stats = decode_frame(model, vocab, prompts, tail, guess, temperature=0.9, seed=3)
        np.testing.assert_array_equal(codes, plain)
        assert stats.passes <= N


def test_draws_from_a_guess_follow_the_models_distribution() -> None:
    """Joint of the two codes of a tiny frame, three codes each, by enumeration."""
    num, temperature, vocab = 8_000, 0.7, compact(3, 300)
    layout = LayoutConfig(grids=((1, 2),), world_prompt="go")
    builder = SampleBuilder(layout, vocab, CountedWords(0), WORLDVLA)
    model = Transformer(MODEL, vocab.size, layout.num_rows, layout.num_cols).eval()
    model.init_weights(1)
    with torch.no_grad():
        model.head.weight.mul_(8.0)
    prompt, tail = builder.world_prompt([[np.array([2, 1])]], np.full(7, 0.1)), builder.world_tail()
    joint = np.ones((3, 3))
    for pair in itertools.product(range(3), repeat=2):
        p = (_scores(model, vocab, prompt, tail, np.array(pair)) / temperature).softmax(-1)
        joint[pair] = float(p[0, pair[0]] * p[1, pair[1]])
    assert joint.sum() == pytest.approx(1, abs=1e-5)
    guess = np.tile([[2, 1]], (num, 1))
    codes, stats = decode_frame(
        model, vocab, [prompt] * num, tail, guess, Window(fixed=2), temperature, range(num)
    )
    assert 0.2 < stats.accepted / stats.judged < 0.9
    assert (
        g_test(np.bincount(codes[:, 0] * 3 + codes[:, 1], minlength=9), joint.reshape(-1)) < 26.1
    )  # p 0.001


def test_the_window_follows_what_was_accepted_and_the_device() -> None:
    window = Window("cpu")
    assert [window.width(80, rows) for rows in (1, 4, 16, 60, 1000)] == [CHEAP, 17, 12, 9, CHEAP_EACH]
    assert window.width(10) == 10
    for _ in range(20):
        window.update(window.width(80))
    assert (window.width(80), window.width(80, 60)) == (80, 80)
    for _ in range(20):
        window.update(1)
    assert (window.width(80), window.width(80, 60)) == (CHEAP, 9)
    assert Window("cuda").width(80) == 80
    assert Window("cuda").width(2048) == WIDE
    with pytest.raises(ValueError, match="at least one code, got 0"):
        Window(fixed=0)


def test_a_guess_of_another_shape_is_refused() -> None:
    model, vocab, prompts, tail = world(0, 2)
    with pytest.raises(ValueError, match=r"a guess of 2 frames needs codes \(2, 13\), got \(1, 13\)"):
        decode_frame(model, vocab, prompts, tail, np.zeros((1, N), np.int64))
    apart = replace(tail, chunk=np.ones_like(tail.chunk))
    for other in (apart, replace(tail, kind=np.ones_like(tail.kind))):
        with pytest.raises(ValueError, match="needs the tail of a world sample"):
            decode_frame(model, vocab, prompts, other)
    with pytest.raises(ValueError, match="got no prompts"):
        decode_frame(model, vocab, [], tail)


def test_the_summary_is_over_batches_of_unequal_length() -> None:
    a = [FrameStats(8, 4, 6, 3, 1), FrameStats(8, 2, 8, 8)]
    b = [FrameStats(4, 2, 4, 2)]
    expected = {"codes": 4, "passes": [3.0, 2.0], "acceptance": [0.5, 1.0], "close": 1}
    assert summary([a, b], 4) == expected
    assert summary([[FrameStats(4, 4)]], 4)["acceptance"] == [None]
