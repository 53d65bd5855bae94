"""Counts -> intervals. No torch here: simulator processes import it too."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""
STATUSES = {"success": "successes", "fail": "failures", "error": "errors"}
"""How an episode ended -> the key under which a record counts it."""


def wilson(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson score interval of a success rate; (0, 1) without trials. It is sensible at 0/n and
    n/n too.
    """
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
