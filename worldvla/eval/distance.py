"""Features of real and imagined clips, float64 (N, D) -> distances between the two sets. numpy alone.

Frechet: Heusel et al. 2017, of two Gaussians. Kernel: Binkowski et al. 2018, unbiased, polynomial kernel
(x y / D + 1)^3; features are first divided by one number, the root mean square of the real ones about their
mean, so that its size means the same for every network.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Distance = Callable[[np.ndarray, np.ndarray, np.ndarray | None], float]
DRAWS = 200
"""Bootstrap draws behind an interval."""


def clip_features(frames_NTD: np.ndarray) -> np.ndarray:
    """Return (N, 3 D): the mean over time, the mean absolute change from frame to frame, late minus early.

    What makes features of single frames say something of motion.
    """
    half = frames_NTD.shape[1] // 2
    change_ND = np.abs(np.diff(frames_NTD, axis=1)).mean(1)
    drift_ND = frames_NTD[:, -half:].mean(1) - frames_NTD[:, :half].mean(1)
    return np.concatenate([frames_NTD.mean(1), change_ND, drift_ND], 1)


def frechet(a_ND: np.ndarray, b_ND: np.ndarray, weight_N: np.ndarray | None = None) -> float:
    """Return |mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)) of means and covariances (divided by n - 1).

    `weight_N`: how often each pair of clips counts.
    """
    weight_N = np.ones(len(a_ND)) if weight_N is None else weight_N
    total = weight_N.sum()
    mean_a, mean_b = (weight_N @ x / total for x in (a_ND, b_ND))
    roots = [np.sqrt(weight_N / (total - 1))[:, None] * (x - m) for x, m in ((a_ND, mean_a), (b_ND, mean_b))]
    # A = X'X and B = Y'Y: the eigenvalues of (A B)^(1/2) are the singular values of X Y', exact at any rank.
    spectrum = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False)
    traces = sum(float((root**2).sum()) for root in roots)
    return float(((mean_a - mean_b) ** 2).sum()) + traces - 2 * float(spectrum.sum())


def kernel(a_ND: np.ndarray, b_ND: np.ndarray, weight_N: np.ndarray | None = None) -> float:
    """Return the squared maximum mean discrepancy, unbiased: below 0 as often as above for equal sets.

    A clip never meets itself, in a resample neither, which would bias it.
    """
    weight_N = np.ones(len(a_ND)) if weight_N is None else weight_N
    scale = np.sqrt(((a_ND - a_ND.mean(0)) ** 2).mean()) or 1.0
    a_ND, b_ND = a_ND / scale, b_ND / scale
    pair_NN = np.outer(weight_N, weight_N)
    np.fill_diagonal(pair_NN, 0)
    pair_NN /= pair_NN.sum()

    def mean(x_ND: np.ndarray, y_ND: np.ndarray) -> float:
        return float((pair_NN * (x_ND @ y_ND.T / x_ND.shape[1] + 1) ** 3).sum())

    return mean(a_ND, a_ND) + mean(b_ND, b_ND) - 2 * mean(a_ND, b_ND)


def report(distance: Distance, real_ND: np.ndarray, other_ND: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Return `value`, its `interval_95` (percentiles of bootstrap draws of clips) and `at_clips`: the value
    of the first quarter and half of the clips, which shows how much it still depends on their number.
    """
    num = len(real_ND)
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(DRAWS):
        weight_N = np.bincount(rng.integers(0, num, num), minlength=num).astype(float)
        if (weight_N > 0).sum() > 1:
            draws.append(distance(real_ND, other_ND, weight_N))
    sizes = sorted({n for n in (num // 4, num // 2, num) if n >= 2})
    return {
        "value": _round(distance(real_ND, other_ND, None)),
        "interval_95": [_round(x) for x in np.percentile(draws, [2.5, 97.5])],
        "at_clips": {str(n): _round(distance(real_ND[:n], other_ND[:n], None)) for n in sizes},
    }


def _round(value: float) -> float:
    return float(f"{value:.5g}")
