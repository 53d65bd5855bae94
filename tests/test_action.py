"""Statistics and bins: the published numbers, centres are fixed points, half a bin of error, guarded ranges.

pytest tests/test_action.py
"""

import json

import numpy as np
import pytest

from worldvla.tokenizers.action import (
    CENTRES,
    EDGES,
    RYNNVLA,
    WORLDVLA,
    Statistics,
    compute_statistics,
    denormalize,
    dequantize,
    normalize,
    quantize,
)
from worldvla.vocab import chameleon, to_ids

LOW, HIGH = np.array(WORLDVLA.action_low), np.array(WORLDVLA.action_high)


def published_ids(actions: np.ndarray) -> list[int]:
    return to_ids(WORLDVLA.encode_actions(actions), chameleon().action).tolist()


def test_zero_has_the_published_ids():
    assert published_ids(np.zeros(7)) == [10133, 10133, 10133, 10124, 10133, 10133, 10133]
    decoded = WORLDVLA.decode_actions(WORLDVLA.encode_actions(np.zeros(7)))
    np.testing.assert_allclose(decoded[[0, 1, 2, 4, 5, 6]], 0, atol=1e-8)
    assert decoded[3] == pytest.approx(-9e-5, abs=1e-5)


def test_extremes_have_the_published_ids():
    assert published_ids(LOW) == [10006] * 7
    assert published_ids(HIGH) == [10260] * 7  # the 1e-8 keeps the maximum under 1
    assert published_ids(HIGH * 2) == [10261] * 7  # clipped to exactly 1
    assert published_ids(LOW * 2) == [10006] * 7
    gripper = WORLDVLA.decode_actions(WORLDVLA.encode_actions(np.stack([LOW, HIGH])))[:, 6]
    np.testing.assert_allclose(gripper, [-0.99608, 0.99608], atol=1e-5)


def test_an_action_on_the_edge_of_a_bin_has_the_published_code_in_float32_too():
    """Multiples of 1/40 of a range of 3/8 are where decimal numbers meet the edges of bins."""
    action = np.zeros(7)
    action[4] = -0.225
    for dtype in (np.float64, np.float32):
        assert WORLDVLA.encode_actions(action.astype(dtype))[4] == 50
    grid = np.round(np.linspace(-1, 1, 80_001), 6)[:, None] * np.ones(7)
    for statistics in (WORLDVLA, RYNNVLA):
        low, high = np.array(statistics.action_low), np.array(statistics.action_high)
        published = np.digitize(np.clip(2 * (grid - low) / (high - low + 1e-8) - 1, -1, 1), EDGES) - 1
        for dtype in (np.float64, np.float32):
            assert (statistics.encode_actions(grid.astype(dtype)) == published).all()


def test_our_own_ranges_bin_float32_as_it_is():
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (4000, 7)).astype(np.float32)
    statistics = compute_statistics(actions, actions[:, :1], "minmax")
    codes = quantize(normalize(actions, statistics.action_low, statistics.action_high))
    assert (statistics.encode_actions(actions) == codes).all()
    assert codes.max() == 254  # a maximum that left its own range would have code 255


def test_every_centre_is_a_fixed_point():
    codes = np.arange(255)
    assert (quantize(CENTRES) == codes).all()
    assert (dequantize(codes) == CENTRES).all()
    assert dequantize(np.array(255)) == dequantize(np.array(254))
    assert len(EDGES) == 256
    assert len(CENTRES) == 255


def test_error_is_at_most_half_a_bin():
    values = np.linspace(-1, 1, 100_001)
    assert np.abs(dequantize(quantize(values)) - values).max() <= 1 / 255 + 1e-12


def test_an_independent_digitize_agrees():
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1.2, 1.2, (500, 7)).astype(np.float32)
    unit = np.clip(2 * (actions - LOW) / (HIGH - LOW + 1e-8) - 1, -1, 1)
    digits = [[max(1, sum(edge <= value for edge in EDGES)) for value in row] for row in unit[:20]]
    assert published_ids(actions[:20]) == (np.array(digits) + 10005).tolist()


@pytest.mark.parametrize("kind", ["minmax", "quantile"])
def test_statistics_cover_the_data(kind):
    rng = np.random.default_rng(0)
    actions, states = (
        rng.normal(size=(2000, 7)).astype(np.float32),
        rng.normal(size=(2000, 8)).astype(np.float32),
    )
    statistics = compute_statistics(actions, states, kind)
    inside = (actions >= statistics.action_low) & (actions <= statistics.action_high)
    assert inside.mean() == (1.0 if kind == "minmax" else pytest.approx(0.98, abs=2e-3))
    assert len(statistics.state_low) == 8
    decoded = statistics.decode_states(statistics.encode_states(states))
    half_bin = (np.array(statistics.state_high) - statistics.state_low) / 2 / 255
    clipped = np.clip(states, statistics.state_low, statistics.state_high)
    assert (np.abs(decoded - clipped) <= half_bin + 1e-6).all()


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.0, 1e-5], [-1e-9, 1.5e-3]])
def test_a_dimension_that_hardly_moves_decodes_zero_to_zero(values: list[float]):
    column = np.array(values, dtype=np.float32)[:, None]
    statistics = compute_statistics(column, column, "minmax")
    assert statistics.action_low[0] == -statistics.action_high[0] <= -1e-3
    assert abs(statistics.decode_actions(statistics.encode_actions(np.zeros(1)))[0]) < 1e-8
    assert statistics.action_high[0] >= column.max()


def test_a_constant_decodes_to_itself():
    column = np.full((3, 1), 0.25, dtype=np.float32)
    statistics = compute_statistics(column, column, "quantile")
    assert statistics.decode_actions(statistics.encode_actions(column)) == pytest.approx(0.25, abs=1e-7)


def test_normalize_and_denormalize_are_inverse():
    values, span = (
        np.random.default_rng(0).uniform(LOW, HIGH, (100, 7)),
        (WORLDVLA.action_low, WORLDVLA.action_high),
    )
    np.testing.assert_allclose(denormalize(normalize(values, *span), *span), values, atol=1e-12)


def test_json_and_digest_round_trip():
    data = json.loads(json.dumps(RYNNVLA.to_json()))
    assert Statistics.from_json(data) == RYNNVLA
    assert Statistics.from_json(data).digest() == RYNNVLA.digest() != WORLDVLA.digest()
    assert "world_low" not in WORLDVLA.to_json()  # digests of checkpoints without one stay
    assert (RYNNVLA.encode_world_actions(HIGH) == WORLDVLA.encode_actions(HIGH)).all()
    assert (RYNNVLA.encode_actions(0.5 * HIGH) != WORLDVLA.encode_actions(0.5 * HIGH)).any()
    with pytest.raises(ValueError, match="exactly the keys"):
        Statistics.from_json({"kind": "minmax"})


def test_bad_values_raise():
    with pytest.raises(ValueError, match="finite, got nan"):
        WORLDVLA.encode_actions(np.full(7, np.nan))
    with pytest.raises(ValueError, match="7 dims"):
        WORLDVLA.encode_actions(np.zeros(6))
    with pytest.raises(ValueError, match=r"\[0, 256\), got 0..256"):
        dequantize(np.array([0, 256]))
    with pytest.raises(ValueError, match="low < high"):
        Statistics((0.0,), (0.0,), (), (), "minmax")
    with pytest.raises(ValueError, match="at least one frame"):
        compute_statistics(np.zeros((0, 7)), np.zeros((0, 8)), "minmax")
