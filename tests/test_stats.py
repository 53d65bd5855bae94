"""Wilson and Newcombe's paired intervals against published and closed-form values; McNemar's test by hand;
counting never loses an episode.

Run: pytest tests/test_stats.py
"""

import pytest

from worldvla.eval.stats import Pairs, count, mcnemar, paired_interval, wilson


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


@pytest.mark.parametrize(
    ("pairs", "difference", "low", "high"),
    [
        (Pairs(14, 5, 0, 22), 0.1220, 0.0115, 0.2265),  # Altman 2000, Statistics with confidence, p. 52
        (Pairs(59, 6, 16, 80), -0.0621, -0.1186, -0.0046),  # Fagerland 2017, chapter 8, Cavo 2012
        (Pairs(0, 10, 0, 0), 1.0, 0.6075, 1.0),  # 1 - sqrt(2) z^2 / (n + z^2)
        (Pairs(4, 0, 0, 0), 0.0, -0.4899, 0.4899),  # z^2 / (n + z^2)
    ],
)
def test_known_paired_intervals(pairs, difference, low, high):
    assert pairs.difference == pytest.approx(difference, abs=6e-5)
    assert paired_interval(pairs) == pytest.approx((low, high), abs=6e-5)


def test_paired_intervals_mirror_and_tighten_with_agreement():
    low, high = paired_interval(Pairs(20, 7, 3, 10))
    assert paired_interval(Pairs(20, 3, 7, 10)) == pytest.approx((-high, -low))
    agreeing, crossing = Pairs(16, 4, 4, 16), Pairs(10, 10, 10, 10)  # the same rates, 20/40 each
    assert paired_interval(agreeing)[1] < paired_interval(crossing)[1]
    assert paired_interval(Pairs(0, 0, 0, 0)) == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1.0), (1, 5, 14 / 64), (5, 1, 14 / 64), (3, 3, 1.0), (0, 10, 2 / 1024), (2, 12, 212 / 16384)],
)
def test_mcnemar_counts_the_tails_of_a_fair_coin(only_a, only_b, p):
    assert mcnemar(only_a, only_b) == pytest.approx(p, rel=1e-12)
    assert 0 < mcnemar(0, 1000) < 1e-300
