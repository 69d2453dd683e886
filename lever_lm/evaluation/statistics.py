"""Interval and test for accuracies of the same queries under different choices of demonstrations. Pure, seeded."""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000
# Rows of resampled indices held at once: 2,000 × 5,046 would be 80 MB.
_BLOCK = 200
_FEW = 20  # resamples of several seeds that stay in a processor's cache


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    blocks = [
        values[rng.integers(0, len(values), (min(_BLOCK, RESAMPLES - start), len(values)))].mean(1)
        for start in range(0, RESAMPLES, _BLOCK)
    ]
    return np.concatenate(blocks)


def _middle(means: Sequence[float], level: float) -> tuple[float, float]:
    """Return the ends of the share `level` of means that lies in their middle."""
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_interval(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean over 2,000 resamples of the queries.

    values: one score per query. Returns (low, high). Raises ValueError when there is none.
    Source: Efron & Tibshirani, An Introduction to the Bootstrap, §13.3.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.size == 0:
        raise ValueError("no scores to take an interval of")
    return _middle(_resampled_means(scores, seed), level)


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


Summarize = Callable[[np.ndarray], dict[str, np.ndarray]]  # (…, Q, k) → (…) of each metric
_MEANS = ("accuracy", "normalized_accuracy", "exact_match", "score")  # of scores, which have a test of their own


def _resampled(measured: np.ndarray, summarize: Summarize, seed: int) -> dict[str, np.ndarray]:
    """Return each metric of 2,000 resamples of the queries, those of `bootstrap_interval`."""
    rng, count, blocks = np.random.default_rng(seed), len(measured), []
    for start in range(0, RESAMPLES, _BLOCK):
        rows = rng.integers(0, count, (min(_BLOCK, RESAMPLES - start), count))
        blocks.append(summarize(measured[rows]))
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _spread(values: np.ndarray) -> tuple[float | None, float | None]:
    """Return the ends of the middle 95 % of a metric's resamples; None where nothing can be said of any."""
    sound = values[np.isfinite(values)]
    return _middle(sound, 0.95) if len(sound) else (None, None)


def corpus_metrics(measured: np.ndarray, summarize: Summarize, *, seed: int = 0) -> dict[str, dict]:
    """Return what a task reports of all queries together, {name: {value, low, high}}, with 95 % percentile bootstrap
    intervals over the queries. measured (Q, k): of each query; None stands where nothing can be said, as of R² where
    all right numbers are equal."""
    resampled = _resampled(measured, summarize, seed)
    whole = {name: float(value) for name, value in summarize(measured).items()}
    ends = {name: _spread(resampled[name]) for name in whole}
    return {
        name: {"value": value if np.isfinite(value) else None, "low": ends[name][0], "high": ends[name][1]}
        for name, value in whole.items()
    }


def corpus_differences(
    ours: np.ndarray | None, theirs: np.ndarray | None, summarize: Summarize | None, *, seed: int = 0
) -> dict[str, dict]:
    """Return {"metrics": {name: {difference, low, high}}} of two methods over the same queries: metrics that are no
    means of scores have no sign-flip test, but a bootstrap in which both are made of the same resampled queries."""
    if ours is None or theirs is None or summarize is None:
        return {}
    names = [name for name in summarize(ours) if name not in (*_MEANS, "unparsed")]
    if not names:
        return {}
    one, other = (_resampled(measured, summarize, seed) for measured in (ours, theirs))
    whole = {name: float(summarize(ours)[name] - summarize(theirs)[name]) for name in names}
    ends = {name: _spread(one[name] - other[name]) for name in names}
    told = {
        name: {"difference": gap if np.isfinite(gap) else None, "low": ends[name][0], "high": ends[name][1]}
        for name, gap in whole.items()
    }
    return {"metrics": told}


def roc_auc(margins: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Return P(a positive's margin exceeds a negative's) + P(they are equal) / 2: (…, n) → (…). NaN where one class is
    missing. Source: Hanley & McNeil, Radiology 143 (1982)."""
    shape = margins.shape[:-1]
    rows = zip(margins.reshape(-1, margins.shape[-1]), positive.reshape(-1, positive.shape[-1]) > 0.5, strict=True)
    found = []
    for values, is_positive in rows:
        ours, theirs = values[is_positive], np.sort(values[~is_positive])
        below, up_to = (np.searchsorted(theirs, ours, side=side) for side in ("left", "right"))
        pairs = len(ours) * len(theirs)
        found.append((below + up_to).sum() / (2 * pairs) if pairs else np.nan)
    return np.array(found).reshape(shape)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for as many tests as there are, by Holm's step-down: where all below α are taken for
    differences, at most a share α of such tables holds one that is none.

    The k-th smallest of m becomes max over i ≤ k of min(1, (m − i + 1)·p_(i)). Source: Holm, Scandinavian Journal of
    Statistics 6 (1979).
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def interval_over_seeds(scores: Sequence[Sequence[float]], *, level: float = 0.95, seed: int = 0) -> dict[str, float]:
    """Return the mean of several runs over the same queries, its interval over seeds and queries, `low` and `high`, and
    `seed_std`, the standard deviation of the runs' means.

    scores: (seeds, Q). Each of 2,000 resamples draws seeds with replacement, and for all of them the same queries with
    replacement. Where seeds differ more than queries do, few of them make the interval too narrow: of three it reaches
    from the least mean to the greatest, which holds the truth three times in four. Raises ValueError where the runs
    have other numbers of queries, or none. Source: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1
    (2007).
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError("scores of several seeds must be of the same queries, at least one")
    rng, (seeds, queries) = np.random.default_rng(seed), table.shape
    shares = (rng.integers(0, seeds, (RESAMPLES, seeds, 1)) == np.arange(seeds)).mean(1)  # of each seed in a resample
    means = []
    for start in range(0, RESAMPLES, _FEW):
        some = shares[start : start + _FEW]
        means.append(np.take_along_axis(some @ table, rng.integers(0, queries, (len(some), queries)), 1).mean(1))
    low, high = _middle(np.concatenate(means), level)
    with np.errstate(over="ignore"):
        spread = float(table.mean(1).std(ddof=1)) if seeds > 1 else 0.0
    return {"mean": float(table.mean()), "low": low, "high": high, "seed_std": spread}
