"""The picks of a learned policy, and how sure it was of them. B queries, K candidates, S shots, D feature size."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lever_lm.selectors.fixed_set import FixedSet
from lever_lm.selectors.lever_lm import LeverLM
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.selectors.problem import Problem
from lever_lm.utils.errors import LeverError

_CHUNK, _CANDIDATES = 256, 16_384  # queries and candidates at a time: at most 48 MiB of features of D = 768
_CONSIDERED = 8  # candidates for the first place that are kept with a sample


@torch.no_grad()
def choose(
    policy: PointerSelector | FixedSet | LeverLM, problem: Problem, shots: int, checkpoint: Path | str = "the policy"
) -> tuple[list[list[int]], list[dict]]:
    """Return the greedy picks of a policy from each query's pool, fewer than `shots` where it stopped, and how sure it
    was of them: for each query `probabilities`, of each pick when it was made, and `considered`, the likeliest
    candidates for the first place as [question_id, probability]; nothing of a selector that is no policy.

    Raises LeverError for features of another size, for more shots than a pool holds, and, naming checkpoint and query,
    where the logits of a pick are not finite: the largest of them would be the first.
    """
    if isinstance(policy, FixedSet | LeverLM):
        return list(policy.choose(problem, shots)), [{} for _ in problem.queries]
    width = problem.policy_features[1].shape[1]
    if policy.d_model != width:
        raise LeverError(
            f"the policy expects features of {policy.d_model} dimensions, these have {width}: set "
            "features.encoder to the encoder it was trained with"
        )
    picks: list[list[int]] = []
    reasons: list[dict] = []
    for pools, chunk, mask in _chunks(problem):
        try:
            places = policy.select(*chunk, shots, mask)
        except ValueError as error:
            raise LeverError(f"{error}: lower --shots or raise infer.pool_size") from error
        logits = policy.logits(*chunk, places, mask)  # (B, S, K), and one more with a stop
        finite = torch.isfinite(logits).all(-1)
        if not finite.all():
            row, step = (~finite).nonzero()[0].tolist()
            question = problem.queries[len(picks) + row].question_id
            raise LeverError(
                f"{checkpoint}, question {question}: the logits of pick {step + 1} are NaN or infinite, and choose "
                "nothing: take another checkpoint (--ckpt), or train again"
            )
        shares = logits.softmax(-1)
        of_picks = shares.gather(-1, places.clamp(min=0).unsqueeze(-1)).squeeze(-1).tolist()
        first = shares[:, 0, : mask.shape[1]].masked_fill(~mask, -1.0).topk(min(_CONSIDERED, min(map(len, pools))))
        firsts = zip(first.indices.tolist(), first.values.tolist(), strict=True)
        for pool, row, sure, (best, values) in zip(pools, places.tolist(), of_picks, firsts, strict=True):
            chosen = [pool[place] for place in row if place >= 0]
            considered = [
                [problem.train[pool[place]].question_id, round(value, 6)]
                for place, value in zip(best, values, strict=True)
            ]
            picks.append(chosen)
            reasons.append(
                {"probabilities": [round(p, 6) for p in sure[: len(chosen)]], "considered": considered},
            )
    return picks, reasons


def _chunks(problem: Problem) -> Iterator[tuple[list[list[int]], tuple[Tensor, Tensor], Tensor]]:
    """Yield the queries some at a time: their pools, the features (B, D) and (B, K, D), and the mask (B, K) of the
    candidates that are real."""
    (queries, icds), size = problem.policy_features, max(map(len, problem.pools))
    step = max(1, min(_CHUNK, _CANDIDATES // size))
    for start in range(0, len(queries), step):
        pools = problem.pools[start : start + step]
        rows = torch.tensor([pool + [0] * (size - len(pool)) for pool in pools])
        mask = torch.tensor([[True] * len(pool) + [False] * (size - len(pool)) for pool in pools])
        yield pools, (queries[start : start + step], icds[rows]), mask
