"""Losses of the policy. Pure functions of tensors; only `log_probs` carries gradient.

B queries (groups), G rollouts per query. mask (B, G) bool, True on real rollouts; a row without any is left out.
"""

import torch
from torch import Tensor


def _group_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean within each group over its real rollouts, then over the groups that have any. (B, G) → scalar."""
    count = mask.sum(-1)
    per_group = values.masked_fill(~mask, 0).sum(-1) / count.clamp(min=1)
    return per_group.sum() / (count > 0).sum().clamp(min=1)


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy gradient plus kl_beta · KL: −mean min(ρA, clip(ρ, 1 ± ε)A) + β·KL, ρ = exp(log π − log π_old).

    All tensors (B, G); advantages 0 on tied groups, so that these leave the policy term while their KL still counts.
    KL is the k3 estimate exp(d) − 1 − d: with d = log π_ref − log π where a reference is given, else the
    lineage's d = log π − log π_old. `clip=False` leaves the plain ratio. Returns (loss, metrics) with detached
    scalars ppo_loss, kl, kl_loss, mean_ratio, clip_frac (share of real rollouts outside 1 ± ε).
    Source: GRPO, arXiv:2402.03300 eq. 3–4; k3: Schulman, "Approximating KL Divergence".
    """
    mask = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else mask
    log_ratio = (log_probs - old_log_probs).masked_fill(~mask, 0)
    ratio = log_ratio.exp()
    objective = ratio * advantages
    if clip:
        objective = torch.minimum(objective, ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon) * advantages)
    ppo_loss = -_group_mean(objective, mask)
    gap = log_ratio if ref_log_probs is None else (ref_log_probs - log_probs).masked_fill(~mask, 0)
    kl = _group_mean(gap.exp() - 1 - gap, mask)
    kl_loss = kl_beta * kl
    outside = ((ratio - 1).abs() > clip_epsilon).to(ratio.dtype)
    metrics = {
        "ppo_loss": ppo_loss,
        "kl": kl,
        "kl_loss": kl_loss,
        "mean_ratio": _group_mean(ratio, mask),
        "clip_frac": _group_mean(outside, mask),
    }
    return ppo_loss + kl_loss, {name: value.detach() for name, value in metrics.items()}


def rce_temperature(step: int, total: int, start: float = 2.0, end: float = 0.5) -> float:
    """Temperature of step `step` of `total`: linear from start to end, which it keeps from the last step on."""
    if total <= 1:
        return end
    return start + (end - start) * min(step / (total - 1), 1.0)


def adapt_kl_beta(
    beta: float, kl: float, *, low: float = 0.01, high: float = 0.1, factor: float = 1.5, bounds=(0.001, 10.0)
) -> float:
    """β of the next step: × factor when KL > high, ÷ factor when KL < low, kept within bounds; unmoved by NaN."""
    if kl > high:
        beta = beta * factor
    elif kl < low:
        beta = beta / factor
    return min(max(beta, bounds[0]), bounds[1])
