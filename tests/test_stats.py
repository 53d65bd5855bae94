"""Wilson intervals against published and closed-form values; counting never loses an episode.

Run: pytest tests/test_stats.py
"""

import pytest

from worldvla.eval.stats import Z_95, count, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # z^2 / (n + z^2)
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
        (0, 20, 0.0, 0.1611),
    ],
)
def test_known_intervals(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=6e-5)


def test_interval_is_where_the_score_test_turns():
    """Each end p solves |k/n - p| = z sqrt(p (1 - p) / n)."""
    for successes, trials in ((3, 7), (48, 50), (200, 400)):
        for end in wilson(successes, trials):
            assert abs(successes / trials - end) == pytest.approx(Z_95 * (end * (1 - end) / trials) ** 0.5)


def test_no_trials_say_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="must be in"):
        wilson(4, 3)


def test_errors_are_no_failures():
    outcomes = [
        {"status": s, "grasped": g} for s, g in (("success", 1), ("fail", 1), ("fail", 0), ("error", 1))
    ]
    counts = count(outcomes)
    assert counts == {
        "episodes": 4,
        "successes": 1,
        "failures": 2,
        "errors": 1,
        "grasped": 3,
        "wilson_95": [round(x, 4) for x in wilson(1, 3)],
    }
    assert count([])["wilson_95"] == [0.0, 1.0]
