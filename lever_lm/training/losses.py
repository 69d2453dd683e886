"""Losses of the policy. Pure functions of tensors; only `log_probs` carries gradient.

B queries (groups), G rollouts per query. mask (B, G) bool, True on real rollouts; a row without any is left out.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Estimates of KL(π ‖ π_ref) from d = log π_ref − log π on samples of π: Schulman, "Approximating KL Divergence". k1 is
# unbiased and noisy, and its gradient is zero in expectation; k2 is biased, with the right gradient; k3 is unbiased
# and never negative. On logged rollouts, which are no samples of π, k1 has no floor: it pushes all of them down.
KL_ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: -d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: d.exp() - 1 - d,
}
LossAndStats = tuple[Tensor, dict[str, Tensor]]
# Share of the full learning rate after a share of the steps, both in [0, 1].
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


def group_mean(values: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean within each group over its real rollouts, then over the groups that have any, weighted by
    `weights` (B,). (B, G) → scalar."""
    count = mask.sum(-1)
    per_group = values.masked_fill(~mask, 0).sum(-1) / count.clamp(min=1)
    if weights is None:
        return per_group.sum() / (count > 0).sum().clamp(min=1)
    weights = weights.masked_fill(count == 0, 0)
    return (per_group * weights).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def rce_loss(log_probs: Tensor, rewards: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    """Reward-weighted cross-entropy: mean over queries of Σ_i softmax(r / temperature)_i · (−log π(sequence_i)).

    log_probs (B, G) of the logged sequences, summed over steps; rewards (B, G); mask (B, G) or None for all real.
    Returns a scalar. Source: the warm-up stage of Lever-Plus; the weights are those of reward-weighted regression.
    """
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    # A row without a rollout would be softmax over nothing, that is NaN: it is scored by zeros and left out.
    scores = (rewards / temperature).masked_fill(~mask, -torch.inf).masked_fill(~mask.any(-1, keepdim=True), 0)
    per_group = (scores.softmax(-1) * -log_probs).masked_fill(~mask, 0).sum(-1)
    return per_group.sum() / mask.any(-1).sum().clamp(min=1)


def match_loss(log_probs: Tensor, rewards: Tensor, mask: Tensor | None, temperature: float = 1.0) -> Tensor:
    """Answer match: mean over queries of −log Σ_c p(c)·score(answer of c, references of the query).

    log_probs (B, K) of every candidate alone, whose shares p sum to 1; rewards (B, K): the scores in [0, 1]; mask
    (B, K) or None for all real; the temperature has no part in it. A query without a match is left out. Returns a
    scalar.
    Source: ours; distant supervision by answers, as in Lee et al., arXiv:1906.00300 §5.
    """
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    matches = mask & (rewards > 0)
    known = matches.any(-1)
    # In logarithms, as shares may be too small for float32. A query that is left out is scored by zeros.
    terms = (log_probs + rewards.clamp(min=1e-12).log()).masked_fill(~matches, -torch.inf)
    per_query = -terms.masked_fill(~known.unsqueeze(-1), 0).logsumexp(-1)
    return per_query.masked_fill(~known, 0).sum() / known.sum().clamp(min=1)


def epr_loss(
    scores: Tensor, rewards: Tensor, mask: Tensor, others: Tensor | None = None, *, top: int = 5, bottom: int = 5
) -> Tensor:
    """Contrastive loss of a pointwise retriever: mean over queries and their positives of
    −log e^{s⁺} / (e^{s⁺} + Σ e^{s⁻}).

    scores (B, G) of the candidates, rewards (B, G) of each shown alone, mask (B, G). Positives: the `top` of largest
    reward; negatives: the `bottom` of least reward and all of `others` (B, E), the scores of other queries' candidates,
    −inf for what does not count. A candidate with the least reward of its query is no positive, and none with the
    largest a negative; a query whose rewards are all equal is left out. Returns a scalar.
    Source: EPR, arXiv:2112.08633 §3.2. Deviation: the mean over the positives, where EPR draws one of them.
    """
    best = rewards.masked_fill(~mask, -torch.inf)
    worst = rewards.masked_fill(~mask, torch.inf)
    high, low = best.amax(-1, keepdim=True), worst.amin(-1, keepdim=True)
    positive = mask & (best.argsort(dim=-1, descending=True, stable=True).argsort(-1) < top) & (rewards > low)
    negative = mask & (worst.argsort(dim=-1, stable=True).argsort(-1) < bottom) & (rewards < high) & ~positive
    against = scores.masked_fill(~negative, -torch.inf)
    if others is not None:
        against = torch.cat([against, others], -1)
    total = torch.logaddexp(scores, against.logsumexp(-1, keepdim=True))
    per_query = (total - scores).masked_fill(~positive, 0).sum(-1) / positive.sum(-1).clamp(min=1)
    return per_query.sum() / positive.any(-1).sum().clamp(min=1)


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_epsilon: float = 0.2,
    kl_beta: float = 0.1,
    ref_log_probs: Tensor | None = None,
    clip: bool = True,
    clip_epsilon_high: float | None = None,
    kl_estimate: str = "k3",
    weights: Tensor | None = None,
) -> LossAndStats:
    """Clipped policy gradient plus kl_beta · KL: −mean min(ρA, clip(ρ, 1 − ε, 1 + ε_high)A) + β·KL,
    ρ = exp(log π − log π_old); ε_high is ε where it is not given.

    All tensors (B, G); advantages 0 on tied groups, so that these leave the policy term while their KL still counts.
    weights (B,): how much each group counts in every mean, all alike if None. kl_estimate is one of KL_ESTIMATES of
    d = log π_ref − log π where a reference is given, else of the lineage's d = log π − log π_old. `clip=False` leaves
    the plain ratio. Returns (loss, stats), stats detached scalars: ppo_loss, kl, kl_loss, mean_ratio, clip_frac (share
    of real rollouts outside the range). Raises ValueError on an unknown estimate.
    Source: GRPO, arXiv:2402.03300 eq. 3–4; ε_high: DAPO, arXiv:2503.14476 §3.1.
    """
    if kl_estimate not in KL_ESTIMATES:
        raise ValueError(f"unknown KL estimate {kl_estimate!r}; choose one of {', '.join(KL_ESTIMATES)} (grpo.kl)")
    mask = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else mask
    low, high = _clip_range(clip_epsilon, clip_epsilon_high)
    log_ratio = (log_probs - old_log_probs).masked_fill(~mask, 0)
    ratio = log_ratio.exp()
    objective = ratio * advantages
    if clip:
        objective = torch.minimum(objective, ratio.clamp(low, high) * advantages)
    ppo_loss = -group_mean(objective, mask, weights)
    kl = _kl(log_probs, old_log_probs, ref_log_probs, kl_estimate, mask, weights)
    outside = ((ratio > high) | (ratio < low)).to(ratio.dtype)
    stats = {
        "ppo_loss": ppo_loss,
        "kl": kl,
        "kl_loss": kl_beta * kl,
        "mean_ratio": group_mean(ratio, mask, weights),
        "clip_frac": group_mean(outside, mask, weights),
    }
    return ppo_loss + kl_beta * kl, {name: value.detach() for name, value in stats.items()}


def _kl(log_probs, old_log_probs, ref_log_probs, estimate: str, mask: Tensor, weights: Tensor | None) -> Tensor:
    """The KL to the reference, or the lineage's to the old policy where there is no reference; a scalar."""
    gap = log_probs - old_log_probs if ref_log_probs is None else ref_log_probs - log_probs
    return group_mean(KL_ESTIMATES[estimate](gap.masked_fill(~mask, 0)), mask, weights)


def clip_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    weights: Tensor | None = None,
    clip_epsilon: float = 0.2,
    clip_epsilon_high: float | None = None,
    **kl,
) -> LossAndStats:
    """grpo_loss, arguments as there, with two statistics more: kl_share, and zero_grad_frac, the share of real rollouts
    that get no policy gradient, since their advantage is 0 or the clip cuts them off."""
    clip = {"clip_epsilon": clip_epsilon, "clip_epsilon_high": clip_epsilon_high}
    loss, stats = grpo_loss(log_probs, old_log_probs, advantages, mask, weights=weights, **clip, **kl)
    low, high = _clip_range(**clip)
    ratio = (log_probs - old_log_probs).detach().exp()
    cut = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
    stats["zero_grad_frac"] = group_mean((cut | (advantages == 0)).to(ratio.dtype), mask, weights)
    stats["kl_share"] = kl_share(stats["kl_loss"], advantages, mask, weights)
    return loss, stats


def _clip_range(clip_epsilon: float, clip_epsilon_high: float | None) -> tuple[float, float]:
    return 1 - clip_epsilon, 1 + (clip_epsilon if clip_epsilon_high is None else clip_epsilon_high)


@torch.no_grad()
def kl_share(kl_loss: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return how much of the loss is KL, in [0, 1]: β·KL against the mean size of the advantages. (The mean of the
    advantages is 0 by construction, so that the value of the policy term says nothing of its weight.)"""
    size = group_mean(advantages.abs(), mask, weights)
    return kl_loss.abs() / (kl_loss.abs() + size).clamp(min=1e-12)


def rce_temperature(step: int, total: int, start: float = 2.0, end: float = 0.5) -> float:
    """Return the temperature of step `step` of `total`: linear from start to end, which it keeps after the last
    step."""
    if total <= 1:
        return end
    return start + (end - start) * min(step / (total - 1), 1.0)


def scheduled_lr(lr: float, step: int, total: int, *, schedule: str = "constant", warmup_steps: int = 0) -> float:
    """Return the learning rate of step `step` (from 0) of `total`: linear up to `lr` in the warm-up, then by
    SCHEDULES."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return lr * SCHEDULES[schedule]((step - warmup_steps) / max(total - warmup_steps, 1))


def adapt_kl_beta(
    beta: float, kl: float, *, low: float = 0.01, high: float = 0.1, factor: float = 1.5, bounds=(0.001, 10.0)
) -> float:
    """Return β of the next step: × factor when KL > high, ÷ factor when KL < low, within bounds; unmoved by NaN."""
    if kl > high:
        beta = beta * factor
    elif kl < low:
        beta = beta / factor
    return min(max(beta, bounds[0]), bounds[1])


def reinforce_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    weights: Tensor | None = None,
    kl_beta: float = 0.1,
    kl_estimate: str = "k3",
    ref_log_probs: Tensor | None = None,
    **_,
) -> LossAndStats:
    """REINFORCE with the group's mean as baseline: −mean A·log π + β·KL, without ratio and clip. Arguments as in
    grpo_loss; the old policy matters only where it is the KL's reference. Returns (loss, stats).
    Source: Williams 1992; for policies that are language models, Ahmadian et al., arXiv:2402.14740.
    """
    policy_loss = -group_mean(advantages * log_probs, mask, weights)
    kl = _kl(log_probs, old_log_probs, ref_log_probs, kl_estimate, mask, weights)
    stats = {
        "ppo_loss": policy_loss,
        "kl": kl,
        "kl_loss": kl_beta * kl,
        "zero_grad_frac": group_mean((advantages == 0).to(log_probs.dtype), mask, weights),
        "kl_share": kl_share(kl_beta * kl, advantages, mask, weights),
    }
    return policy_loss + kl_beta * kl, {name: value.detach() for name, value in stats.items()}


# grpo.loss → (loss, stats) of (log_probs, old_log_probs, advantages, mask) and, by keyword, weights, kl_beta,
# kl_estimate, ref_log_probs, clip_epsilon and clip_epsilon_high, all as in grpo_loss. stats are detached scalars. Their
# means over an epoch are in metrics.jsonl: `ppo_loss`, the policy's term, and `kl` have columns in the log.
LOSSES: dict[str, Callable[..., LossAndStats]] = {"clip": clip_loss, "reinforce": reinforce_loss}
