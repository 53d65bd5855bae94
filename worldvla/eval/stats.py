"""Counts -> intervals. No torch here: simulator processes import it too."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""
STATUSES = {"success": "successes", "fail": "failures", "error": "errors"}
"""How an episode ended -> the key under which a record counts it."""


def wilson(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson score interval of a success rate; (0, 1) without trials, sensible at 0/n and n/n."""
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be in 0..{trials}, got {successes}")
    if trials == 0:
        return 0.0, 1.0
    rate, spread = successes / trials, z * z / trials
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt((rate * (1 - rate) + spread / 4) / trials) / (1 + spread)
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)


def count(outcomes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return episodes, successes, failures, errors, grasped and wilson_95 of outcomes with `status` and
    `grasped`.

    An error says nothing about the policy: the interval is that of successes among episodes without one.
    """
    listed = list(outcomes)
    counts = {key: sum(o["status"] == status for o in listed) for status, key in STATUSES.items()}
    assert sum(counts.values()) == len(listed), listed
    interval = wilson(counts["successes"], len(listed) - counts["errors"])
    grasped = sum(bool(o["grasped"]) for o in listed)
    return {
        "episodes": len(listed),
        **counts,
        "grasped": grasped,
        "wilson_95": [round(x, 4) for x in interval],
    }


@dataclass(frozen=True)
class Pairs:
    """How often two policies succeed from the same initial states."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def total(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def difference(self) -> float:
        """Success rate of A minus that of B; 0 without pairs."""
        return (self.only_a - self.only_b) / self.total if self.total else 0.0


def paired_interval(pairs: Pairs, z: float = Z_95) -> tuple[float, float]:
    """Return the interval of A's success rate minus B's; (-1, 1) without pairs.

    Newcombe 1998, Statistics in Medicine 17:2635, method 10: the two Wilson intervals, squared and added,
    less what their correlation phi takes away (its numerator with his continuity correction).
    """
    n = pairs.total
    if n == 0:
        return -1.0, 1.0
    won_a, won_b = pairs.both + pairs.only_a, pairs.both + pairs.only_b
    margins = won_a * (n - won_a) * won_b * (n - won_b)
    excess = pairs.both * pairs.neither - pairs.only_a * pairs.only_b
    excess = max(excess - n / 2, 0.0) if excess > 0 else excess
    phi = excess / math.sqrt(margins) if margins else 0.0
    (low_a, high_a), (low_b, high_b) = wilson(won_a, n, z), wilson(won_b, n, z)
    down_a, up_a, down_b, up_b = won_a / n - low_a, high_a - won_a / n, won_b / n - low_b, high_b - won_b / n

    def add(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    return pairs.difference - add(down_a, up_b), pairs.difference + add(up_a, down_b)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p value of McNemar's test: are the discordant pairs a fair coin's?"""
    n, least = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)
