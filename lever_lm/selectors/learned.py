"""The picks of a learned policy, and how sure it was of them. B queries, K candidates, S shots, D feature size."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.selectors.problem import Problem
from lever_lm.utils.errors import LeverError

_CHUNK = 256
_CONSIDERED = 8  # candidates for the first place that are kept with a sample


def choose(
    policy: PointerSelector, problem: Problem, shots: int, checkpoint: Path | str = "the policy"
) -> list[list[int]]:
    """Return the greedy picks of a policy from each query's pool, fewer than `shots` where it stopped.

    Raises LeverError for features of another size, for more shots than a pool holds, and, naming checkpoint and query,
    where the logits of a pick are not finite: the largest of them would be the first.
    """
    width = problem.features[1].shape[1]
    if policy.d_model != width:
        raise LeverError(
            f"the policy expects features of {policy.d_model} dimensions, these have {width}: set "
            "features.encoder to the encoder it was trained with"
        )
    picks: list[list[int]] = []
    for pools, chunk, mask in _chunks(problem):
        try:
            places = policy.select(*chunk, shots, mask)
        except ValueError as error:
            raise LeverError(f"{error}: lower --shots or raise rollout.pool_size") from error
        with torch.no_grad():
            finite = torch.isfinite(policy.logits(*chunk, places, mask)).all(-1)  # (B, S)
        if not finite.all():
            row, step = (~finite).nonzero()[0].tolist()
            question = problem.queries[len(picks) + row].question_id
            raise LeverError(
                f"{checkpoint}, question {question}: the logits of pick {step + 1} are NaN or infinite, and choose "
                "nothing: take another checkpoint (--ckpt), or train again"
            )
        picks += [
            [pool[place] for place in chosen if place >= 0] for pool, chosen in zip(pools, places.tolist(), strict=True)
        ]
    return picks


@torch.no_grad()
def explain(policy: PointerSelector, problem: Problem, picks: list[list[int]]) -> list[dict]:
    """Return how sure a policy was of its own picks. For each query `probabilities`, of each pick when it was made, and
    `considered`, the likeliest candidates for the first place as [question_id, probability]."""
    reasons = []
    for pools, chunk, mask in _chunks(problem):
        chosen = picks[len(reasons) : len(reasons) + len(pools)]
        places = [[pool.index(row) for row in rows] for pool, rows in zip(pools, chosen, strict=True)]
        shots = max(map(len, places))
        padded = torch.tensor([row + [-1] * (shots - len(row)) for row in places])
        shares = policy.logits(*chunk, padded, mask).softmax(-1)  # (B, S, K), and one more with a stop
        real = shares[:, 0, : mask.shape[1]].masked_fill(~mask, -1.0)
        firsts = real.topk(min(_CONSIDERED, min(map(len, pools))))
        of_picks = shares.gather(-1, padded.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        for pool, row, sure, values, best in zip(
            pools, places, of_picks.tolist(), firsts.values.tolist(), firsts.indices.tolist(), strict=True
        ):
            ids = [problem.train[pool[place]].question_id for place in best]
            considered = [[icd, round(value, 6)] for icd, value in zip(ids, values, strict=True)]
            reasons.append({"probabilities": [round(p, 6) for p in sure[: len(row)]], "considered": considered})
    return reasons


def _chunks(problem: Problem) -> Iterator[tuple[list[list[int]], tuple[Tensor, Tensor], Tensor]]:
    """Yield the queries some at a time: their pools, the features (B, D) and (B, K, D), and the mask (B, K) of the
    candidates that are real."""
    (queries, icds), size = problem.features, max(map(len, problem.pools))
    for start in range(0, len(queries), _CHUNK):
        pools = problem.pools[start : start + _CHUNK]
        rows = torch.tensor([pool + [0] * (size - len(pool)) for pool in pools])
        mask = torch.tensor([[True] * len(pool) + [False] * (size - len(pool)) for pool in pools])
        yield pools, (queries[start : start + _CHUNK], icds[rows]), mask
