"""Counts -> rates with intervals, pairs of outcomes, agreement of rankings. No torch here."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, pearsonr, spearmanr

STATUSES = {"success": "successes", "fail": "failures", "error": "errors"}
"""How an episode ended -> the key under which a record counts it."""
DRAWS = 2_000
"""Of a bootstrap."""


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a success rate; (0, 1) without trials."""
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be in 0..{trials}, got {successes}")
    if trials == 0:
        return 0.0, 1.0
    low, high = binomtest(successes, trials).proportion_ci(0.95, "wilson")
    return float(low), float(high)


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


def paired_interval(pairs: Pairs) -> tuple[float, float]:
    """Return the 95 % interval of A's success rate minus B's; (-1, 1) without pairs.

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
    (low_a, high_a), (low_b, high_b) = wilson(won_a, n), wilson(won_b, n)
    down_a, up_a, down_b, up_b = won_a / n - low_a, high_a - won_a / n, won_b / n - low_b, high_b - won_b / n

    def add(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    return pairs.difference - add(down_a, up_b), pairs.difference + add(up_a, down_b)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p value of McNemar's test: are the discordant pairs a fair coin's?"""
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def agreement(a_MN: np.ndarray, b_MN: np.ndarray, of_M: Sequence[Any]) -> dict[str, Any]:
    """Return Spearman's and Pearson's correlation of the success rates of M policies, with intervals, their
    rank violation, and `bias_points`, by how many points B's rates are higher in the mean.

    Bootstrap over checkpoints, `of_M`: policies that share one are drawn together. (Over initial states it
    would add their noise to rates that hold it already, and pull the interval towards 0.) Draws in which no
    policy differs are left out, and `draws` says how many were not.
    """
    rates = np.stack([a_MN.mean(1), b_MN.mean(1)])
    groups = [np.flatnonzero([of == name for of in of_M]) for name in dict.fromkeys(of_M)]
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, len(groups), len(groups)) for _ in range(DRAWS)]
    drawn = [rates[:, np.concatenate([groups[i] for i in row])] for row in rows]
    drawn = [pair for pair in drawn if (np.ptp(pair, axis=1) > 1e-9).all()]
    out: dict[str, Any] = {"same_episodes": [int((a_MN == b_MN).sum()), int(a_MN.size)], "draws": len(drawn)}
    for name, measure in {"spearman": spearmanr, "pearson": pearsonr}.items():
        is_defined = bool((np.ptp(rates, axis=1) > 1e-9).all())
        value = round(float(measure(*rates)[0]), 3) if is_defined else None
        quantiles = np.quantile([measure(*pair)[0] for pair in drawn], (0.025, 0.975)) if drawn else None
        interval = None if quantiles is None else [round(float(q), 3) for q in quantiles]
        out[name] = {"value": value, "interval_95": interval}
    out["rank_violation"] = round(rank_violation(*rates), 4)
    out["bias_points"] = round(100 * float((rates[1] - rates[0]).mean()), 1)
    return out


def rank_violation(a_M: np.ndarray, b_M: np.ndarray) -> float:
    """Return the mean maximum rank violation of rates `b_M` against `a_M` (SIMPLER, arXiv 2405.05941): of
    each policy, how far the farthest one is that `b_M` puts on its wrong side; 0 is perfect."""
    apart = a_M[:, None] - a_M
    is_wrong = (a_M[:, None] < a_M) != (b_M[:, None] < b_M)
    return float((np.abs(apart) * is_wrong).max(1).mean())


def rank_agreement(policies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how success in imagination, and the judge's on real frames, agree with the simulator's, over
    rows of `rank.rank_policies`; `by_execute`: the same among those of equal replan interval.

    Only the latter compares like with like: each query feeds a policy one more imagined frame, and costs
    success that it does not cost in the simulator.
    """

    def of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        sim_MN, judge_MN, imagined_MN = np.array([row["outcomes"] for row in rows]).transpose(1, 0, 2)
        names = [str(row["checkpoint"]) for row in rows]
        both = {"imagined": imagined_MN, "judge_on_real_frames": judge_MN}
        return {name: agreement(sim_MN, found_MN, names) for name, found_MN in both.items()}

    intervals = sorted({row["execute"] for row in policies})
    groups = {n: [row for row in policies if row["execute"] == n] for n in intervals}
    return of(policies) | {"by_execute": {str(n): of(rows) for n, rows in groups.items()}}
