"""Selectors that weigh nearness to the query against likeness of the demonstrations to one another.

Q queries, N training examples, D feature size, S shots. f: the unit features of queries and ICDs, as a policy sees them.
"""

from collections.abc import Iterator

import numpy as np
import torch

from lever_lm.selectors.problem import Problem

MMR_WEIGHT = 0.5  # λ: 1 is similarity alone
DPP_SCALE = 0.1  # λ of CEIL: the smaller, the more relevance counts against diversity
DPP_NEAR = 100  # candidates of the determinantal point process
_CHUNK = 256
_NOTHING_NEW = 1e-10  # of the variance: what is left of a candidate that the picks span


def mmr(problem: Problem, shots: int) -> Iterator[list[int]]:
    """Maximal marginal relevance: again and again argmax_d λ·f_q·f_d − (1 − λ)·max_{s picked} f_s·f_d, with λ = .5; the
    first pick is the most similar. Over the whole training split; of equals the earlier row.

    Source: Carbonell and Goldstein, SIGIR 1998.
    """
    queries, icds = problem.features
    for start in range(0, len(queries), _CHUNK):
        relevance = queries[start : start + _CHUNK] @ icds.T  # (B, N)
        for scores, query in zip(relevance, problem.queries[start : start + _CHUNK], strict=True):
            scores[list(problem.candidates.withheld(query))] = -torch.inf
        closest = torch.zeros_like(relevance)  # likeness to the nearest pick
        picks: list[torch.Tensor] = []
        for step in range(min(shots, int(relevance.isfinite().sum(-1).min()))):
            picks.append((MMR_WEIGHT * relevance - (1 - MMR_WEIGHT) * closest).argmax(-1))
            likeness = icds[picks[-1]] @ icds.T
            closest = torch.maximum(closest, likeness) if step else likeness
            relevance.scatter_(1, picks[-1][:, None], -torch.inf)
        yield from torch.stack(picks, 1).tolist()


def dpp(problem: Problem, shots: int) -> Iterator[list[int]]:
    """Determinantal point process of CEIL: the greedy MAP of det L_S over the 100 training examples most similar to the
    query, L_ij = r_i k_ij r_j with k_ij = (1 + f_i·f_j) / 2 and r_i = exp((ρ_i − max ρ) / 2λ), ρ_i = (1 + f_q·f_i) / 2,
    λ = .1. First pick first; of equals the more similar.

    Source: CEIL, arXiv:2302.05698 §3.3; the greedy MAP, Chen et al., arXiv:1709.05135, algorithm 1.
    """
    features, icds = problem.features
    for query, feature in zip(problem, features, strict=True):
        rows = torch.from_numpy(query.allowed)
        relevance = (1 + icds[rows] @ feature) / 2
        near = relevance.topk(min(DPP_NEAR, len(rows))).indices
        candidates, relevance = icds[rows[near]].double(), relevance[near].double()
        quality = ((relevance - relevance.max()) / (2 * DPP_SCALE)).exp()
        kernel = quality[:, None] * (1 + candidates @ candidates.T) / 2 * quality
        yield rows[near][greedy_map(kernel.numpy(), shots)].tolist()


def greedy_map(kernel: np.ndarray, count: int) -> list[int]:
    """Return the places of `count` items, fewer where there are fewer, each of which makes the determinant of the
    kernel (N, N) of those before it largest. Items that add nothing to the determinant come last, in their order."""
    left = np.diag(kernel).copy()  # the factor by which an item would multiply the determinant
    floor = _NOTHING_NEW * left.max()
    factors = np.zeros((0, len(kernel)))  # rows of the Cholesky factor, one for each pick
    picks: list[int] = []
    while len(picks) < min(count, len(kernel)):
        best = int(left.argmax())
        if left[best] <= floor:
            rest = [i for i in range(len(kernel)) if i not in picks]
            return picks + rest[: count - len(picks)]
        row = (kernel[best] - factors[:, best] @ factors) / np.sqrt(left[best])
        factors = np.vstack([factors, row])
        left = left - row**2
        left[best] = -np.inf
        picks.append(best)
    return picks
