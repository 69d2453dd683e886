"""Rewards of single rollouts and advantages within a group. Pure: numbers and tensors in, numbers and tensors out.

B queries (groups), G rollouts per query. Masks: True is a real rollout.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

REWARD_CLIP = 5.0
RAW_STD_FLOOR = 1e-12
ADVANTAGE_SCALES = ("group", "batch", "none")


@dataclass(frozen=True)
class _Scores:
    correct: float
    accuracy: float
    gt_prob: float
    relevance: float
    infoscore: float
    hard_weight: float
    soft_weight: float
    rel_weight: float


@dataclass(frozen=True)
class RewardMode:
    """A formula of a rollout's scores. needs: the names of the scores that it is made of."""

    needs: tuple[str, ...]
    value: Callable[[_Scores], float]


# 0/1 correctness, graded VQA accuracy, probability of the references, similarity of wrong answers to them; the gain in
# the reference's log-probability.
_HARD_SOFT, _HARD_GT = ("correct", "accuracy"), ("correct", "gt_prob")
REWARD_MODES: dict[str, RewardMode] = {
    "hard_plus_soft": RewardMode(_HARD_SOFT, lambda s: s.hard_weight * s.correct + s.soft_weight * s.accuracy),
    "hard_plus_soft_v2": RewardMode(_HARD_SOFT, lambda s: 2 * s.hard_weight * s.correct + s.soft_weight * s.accuracy),
    "separated": RewardMode(_HARD_SOFT, lambda s: 2 * s.hard_weight * (s.correct == 1) + s.soft_weight * s.accuracy),
    "hard_only": RewardMode(("correct",), lambda s: s.hard_weight * s.correct),
    "soft_only": RewardMode(("accuracy",), lambda s: s.soft_weight * s.accuracy),
    "hard01_plus_gtprob": RewardMode(_HARD_GT, lambda s: s.hard_weight * s.correct + s.soft_weight * s.gt_prob),
    "hard01_plus_gtprob_separated": RewardMode(
        _HARD_GT, lambda s: 2 * s.hard_weight * (s.correct == 1) + s.soft_weight * s.gt_prob
    ),
    "hard_plus_gtprob_plus_rel": RewardMode(
        (*_HARD_GT, "relevance"),
        lambda s: s.hard_weight * s.correct + s.soft_weight * s.gt_prob + s.rel_weight * (1 - s.correct) * s.relevance,
    ),
    "infoscore": RewardMode(("infoscore",), lambda s: s.infoscore),
    "task": RewardMode(("accuracy",), lambda s: s.soft_weight * s.accuracy),  # `accuracy` is the task's score
}


def needed_scores(mode: str) -> tuple[str, ...]:
    """Return the scores that a mode is made of; `legacy` makes do with `correct` or `accuracy`, whichever is there."""
    return REWARD_MODES[mode].needs if mode in REWARD_MODES else ()


def reward(
    mode: str,
    *,
    correct: float | None = None,
    accuracy: float | None = None,
    gt_prob: float | None = None,
    relevance: float | None = None,
    infoscore: float | None = None,
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
    rel_weight: float = 0.1,
    alpha: float = 0.0,
    beta: float = 1.0,
    correctness_mode: str = "01",
    use_logprob: bool = False,
    beam_score: float | None = None,
    logprob_score: float | None = None,
) -> float:
    """Reward of one rollout, clipped to [-5, 5].

    correct 0 or 1; accuracy official VQA accuracy in [0, 1]; gt_prob >= 0; relevance in [0, 1]; infoscore in nats. None
    counts as 0, as in the lineage's formulas; the reader of the rollout file leaves out rollouts that lack a needed
    score. `mode` is one of REWARD_MODES or `legacy` (alpha · quality + beta · correctness; the
    remaining arguments are its own). Raises ValueError on an unknown mode, and where a score makes the reward NaN.
    """
    if mode == "legacy":
        value = _legacy_reward(
            correct, accuracy, alpha, beta, correctness_mode, logprob_score if use_logprob else None, beam_score
        )
    elif mode in REWARD_MODES:
        scores = (correct or 0.0, accuracy or 0.0, gt_prob or 0.0, relevance or 0.0, infoscore or 0.0)
        value = REWARD_MODES[mode].value(_Scores(*scores, hard_weight, soft_weight, rel_weight))
    else:
        raise ValueError(f"unknown reward mode {mode!r}; choose one of {', '.join([*REWARD_MODES, 'legacy'])}")
    if math.isnan(value):  # clipping would make it the best of all
        raise ValueError(f"the reward is NaN: mode {mode!r}, accuracy {accuracy}, gt_prob {gt_prob}")
    return max(-REWARD_CLIP, min(REWARD_CLIP, float(value)))


def _legacy_reward(correct, accuracy, alpha, beta, correctness_mode, logprob_score, beam_score) -> float:
    known = next((float(score) for score in (correct, accuracy) if score is not None), None)
    if known is None:  # a rollout without a score is neutral, also where wrong counts −1
        correctness = 0.0
    else:
        correctness = 2 * known - 1 if correctness_mode == "pm1" else known
    quality = -logprob_score if logprob_score is not None else (beam_score or 0.0)
    return alpha * quality + beta * correctness


def group_mean_std(rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (over n − 1) of the real rollouts of each group, both (B, 1); std of one is
    0."""
    count = mask.sum(-1, keepdim=True)
    mean = rewards.masked_fill(~mask, 0).sum(-1, keepdim=True) / count.clamp(min=1)
    square = ((rewards - mean) ** 2).masked_fill(~mask, 0).sum(-1, keepdim=True)
    return mean, (square / (count - 1).clamp(min=1)).sqrt()


def _rank(rewards: Tensor, mask: Tensor) -> Tensor:
    """1 − 2·rank/(n − 1), the best first; equal rewards share the mean of their ranks, so a tied group is all 0."""
    pair = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    above = ((rewards.unsqueeze(-2) > rewards.unsqueeze(-1)) & pair).sum(-1)
    equal = ((rewards.unsqueeze(-2) == rewards.unsqueeze(-1)) & pair).sum(-1)
    rank = above + (equal - 1) / 2
    others = mask.sum(-1, keepdim=True) - 1
    return torch.where(others > 0, 1 - 2 * rank / others.clamp(min=1), 0.0)


def group_advantage(
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    method: str = "zscore",
    min_std: float = 0.1,
    clip: float = 5.0,
    scale: str = "group",
) -> Tensor:
    """Return the advantage of each rollout over its own group.

    rewards (B, G) float; mask (B, G) bool, all real if None. `zscore`: (reward − group's mean) / max(std, min_std),
    where scale says of what the std (over n − 1) is: of the `group`, of all real rewards of the `batch`, or `none` for
    no division (Dr. GRPO); `rank`: 1 − 2·rank/(n − 1), best 1, worst −1. Returns (B, G) within ±clip, 0 on padding,
    on a group of one and on a tied group. Source: GRPO, arXiv:2402.03300 §4.1.2; the floor keeps groups of near-equal
    rewards from exploding; Dr. GRPO, arXiv:2503.20783 §3.1. Raises ValueError on an unknown method or scale.
    """
    if scale not in ADVANTAGE_SCALES:
        names = ", ".join(ADVANTAGE_SCALES)
        raise ValueError(f"unknown advantage scale {scale!r}; choose one of {names} (grpo.advantage_scale)")
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    rewards = rewards.masked_fill(~mask, 0)
    if method == "zscore":
        mean, std = group_mean_std(rewards, mask)
        if scale == "batch":
            std = group_mean_std(rewards.flatten()[None], mask.flatten()[None])[1]
        advantage = rewards - mean if scale == "none" else (rewards - mean) / std.clamp(min=min_std)
    elif method == "rank":
        advantage = _rank(rewards, mask)
    else:
        raise ValueError(f"unknown advantage method {method!r}; choose zscore or rank (grpo.advantage)")
    real = mask & (mask.sum(-1, keepdim=True) > 1) & ~tied_groups(rewards, mask).unsqueeze(-1)
    return advantage.clamp(-clip, clip).masked_fill(~real, 0)


def normalize_group(rewards: Tensor, mask: Tensor, *, method: str = "none", clip: float = 3.0) -> Tensor:
    """Return the rewards for RCE's weights: `none` as they are, `zscore` standardised and cut to ±clip, `rank` as in
    group_advantage. A tied group and a group of one keep their raw rewards under `zscore`. Shapes as there."""
    if method == "none":
        return rewards
    if method == "zscore":
        mean, std = group_mean_std(rewards, mask)
        scaled = ((rewards - mean) / std.clamp(min=RAW_STD_FLOOR)).clamp(-clip, clip)
        return torch.where(std > RAW_STD_FLOOR, scaled, rewards)
    if method == "rank":
        return _rank(rewards, mask)
    raise ValueError(f"unknown normalisation {method!r}; choose none, zscore or rank (rce.normalize)")


def tied_groups(rewards: Tensor, mask: Tensor) -> Tensor:
    """Return (B,) bool: True where all real rollouts of a group have the same reward, so that nothing can be learnt."""
    top = rewards.masked_fill(~mask, -torch.inf).amax(-1)
    bottom = rewards.masked_fill(~mask, torch.inf).amin(-1)
    return top <= bottom
