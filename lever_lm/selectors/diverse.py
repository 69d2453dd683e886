"""Selectors that weigh nearness to the query against likeness of the demonstrations to one another.

Q queries, N training examples, D feature size, S shots. f: unit features of queries and ICDs, as a policy sees them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

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
    icds = problem.features[1]
    for relevance in _relevance(problem):
        closest = torch.zeros_like(relevance)  # likeness to the nearest pick
        picks: list[Tensor] = []
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
    icds = problem.features[1]
    for chunk in _relevance(problem):
        relevance, rows = ((1 + chunk) / 2).topk(min(DPP_NEAR, int(chunk.isfinite().sum(-1).min())))
        near, relevance = icds[rows].double(), relevance.double()
        quality = ((relevance - relevance[:, :1]) / (2 * DPP_SCALE)).exp()
        kernel = quality[:, :, None] * (1 + near @ near.transpose(1, 2)) / 2 * quality[:, None]
        yield from rows.gather(1, greedy_map(kernel, shots)).tolist()


def _relevance(problem: Problem) -> Iterator[Tensor]:
    """Yield f_q·f_d, some queries at a time, (B, N); −inf for what may not be shown to a query."""
    queries, icds = problem.features
    for start in range(0, len(queries), _CHUNK):
        relevance = queries[start : start + _CHUNK] @ icds.T
        for scores, query in zip(relevance, problem.queries[start : start + _CHUNK], strict=True):
            scores[list(problem.candidates.withheld(query))] = -torch.inf
        yield relevance


def greedy_map(kernel: Tensor, count: int) -> Tensor:
    """Return the places of `count` items, fewer where there are fewer, each of which makes the determinant of the
    kernel of those before it largest: kernel (B, N, N) → (B, count) long. Items that add nothing to a determinant come
    last, in their order."""
    batch, size = kernel.shape[:2]
    left = kernel.diagonal(dim1=1, dim2=2).clone()  # (B, N): the factor by which an item would multiply the determinant
    floor = _NOTHING_NEW * left.amax(-1, keepdim=True)
    in_order = -1 - torch.arange(size, dtype=left.dtype)
    factors = kernel.new_zeros(batch, size, 0)  # columns of the Cholesky factor, one for each pick
    picks: list[Tensor] = []
    for _ in range(min(count, size)):
        key = torch.where(left > floor, left, in_order)
        for before in picks:
            key.scatter_(1, before, -torch.inf)
        best = key.argmax(-1, keepdim=True)
        of_best = best.unsqueeze(-1).expand(-1, -1, size)
        row = kernel.gather(1, of_best).squeeze(1)
        row = row - (factors @ factors.gather(1, of_best[..., : len(picks)]).transpose(1, 2)).squeeze(-1)
        row = torch.where(left.gather(1, best) > floor, row / left.gather(1, best).clamp(min=1e-300).sqrt(), 0.0)
        factors = torch.cat([factors, row.unsqueeze(-1)], -1)
        left = left - row.square()
        picks.append(best)
    return torch.cat(picks, 1)
