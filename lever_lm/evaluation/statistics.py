"""Interval and test for accuracies of the same queries under different choices of demonstrations. Pure, seeded."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
# Rows of resampled indices held at once: 2,000 × 5,046 would be 80 MB.
_BLOCK = 200


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    blocks = [
        values[rng.integers(0, len(values), (min(_BLOCK, RESAMPLES - start), len(values)))].mean(1)
        for start in range(0, RESAMPLES, _BLOCK)
    ]
    return np.concatenate(blocks)


def bootstrap_interval(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean over 2,000 resamples of the queries.

    values: one score per query. Returns (low, high). Raises ValueError when there is none.
    Source: Efron & Tibshirani, An Introduction to the Bootstrap, §13.3.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.size == 0:
        raise ValueError("no scores to take an interval of")
    tail = (1 - level) / 2
    low, high = np.quantile(_resampled_means(scores, seed), [tail, 1 - tail])
    return float(low), float(high)


def paired_test(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> dict[str, float]:
    """Return the mean difference ours − theirs over the same queries, its 95 % interval, and a two-sided p-value.

    The p-value is that of a sign-flip test (2,000 flips, +1 correction), which assumes nothing about the scores but
    that under the null the two methods are exchangeable query by query. Raises ValueError on unequal lengths.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"paired test of {len(ours)} against {len(theirs)} queries: they must be the same queries")
    gap = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    low, high = bootstrap_interval(gap, seed=seed)
    rng = np.random.default_rng(seed)
    observed = abs(gap.mean())
    extreme = 0
    for start in range(0, RESAMPLES, _BLOCK):
        signs = rng.integers(0, 2, (min(_BLOCK, RESAMPLES - start), gap.size), dtype=np.int8) * 2 - 1
        extreme += int((np.abs((signs * gap).mean(1)) >= observed - 1e-12).sum())
    return {"difference": float(gap.mean()), "low": low, "high": high, "p": (extreme + 1) / (RESAMPLES + 1)}
