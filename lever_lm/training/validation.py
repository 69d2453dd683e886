"""What an epoch is judged by: metrics of the validation groups, statistics of the training groups, and warnings.

n groups, G rollouts per group. Metrics are plain floats; their names are those of metrics.jsonl.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lever_lm.config.schema import GrpoConfig
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.batches import EVAL_BATCH, GroupTensors, projected
from lever_lm.training.finite_checks import At, pass_error
from lever_lm.training.losses import epr_loss, match_loss, rce_loss
from lever_lm.training.metrics import brief
from lever_lm.training.rewards import group_mean_std, tied_groups

# (policy, place in the run) → metrics
Validate = Callable[[PointerSelector, At], dict[str, float]]
# warmup → its loss of log-probs, rewards and mask (B, G), and the temperature
_LOSSES = {
    "rce": rce_loss,
    "match": match_loss,
    "epr": lambda log_probs, rewards, mask, temperature: epr_loss(log_probs, rewards, mask),
}


@torch.no_grad()
def validate(
    policy: PointerSelector, data: GroupTensors, temperature: float, at: At, warmup: str = "rce"
) -> dict[str, float]:
    """Return the metrics of the validation groups, dropout off: val_loss, the warm-up's loss; val_reward, the mean over
    groups of Σ_i softmax(log π)_i · r_i over the logged rollouts; val_top_reward, the reward of the rollout that the
    policy ranks first; entropy of the first pick, in nats. Raises NotFinite where a metric is not finite."""
    policy.eval()
    if data.pools.numel() > 2 * len(data.icds):
        policy, data = projected(policy, data)
    sums = {"val_loss": 0.0, "val_reward": 0.0, "val_top_reward": 0.0, "entropy": 0.0}
    for index, batch in data.chunks(EVAL_BATCH):
        steps = policy.steps(*batch.inputs)
        log_probs, _ = policy.score(steps, batch.sequences, batch.pool_mask)
        scores = log_probs.masked_fill(~batch.mask, -torch.inf)
        first = steps[0].squeeze(1).log_softmax(-1)
        per_batch = {
            "val_loss": _LOSSES[warmup](log_probs, batch.rewards, batch.mask, temperature),
            "val_reward": (scores.softmax(-1) * batch.rewards).sum(-1).mean(),
            "val_top_reward": batch.rewards.gather(1, scores.argmax(-1, keepdim=True)).mean(),
            "entropy": -(first.exp() * first).sum(-1).mean(),
        }
        for name, value in per_batch.items():
            sums[name] += float(value) * len(index)
            if not math.isfinite(sums[name]):
                raise pass_error(at, name, batch, log_probs)
    return {name: value / len(data) for name, value in sums.items()}


def group_statistics(rewards: Tensor, mask: Tensor, advantages: Tensor) -> dict[str, float]:
    """Return statistics of the groups, from tensors (n, G): adv_std, the mean over all groups of the standard deviation
    of advantages within a group (tied groups count 0); adv_max likewise; mean and spread of rewards; share of groups
    whose rewards are all equal, and how many groups were skipped, for that or because they have one rollout."""
    _, spread = group_mean_std(advantages, mask)
    _, reward_spread = group_mean_std(rewards, mask)
    tied = tied_groups(rewards, mask)
    return {
        "adv_std": float(spread.mean()),
        "adv_max": float(advantages.masked_fill(~mask, -torch.inf).amax(-1).mean()),
        "reward": float(rewards[mask].mean()),
        "reward_std": float(reward_spread.mean()),
        "frac_reward_zero_std": float(tied.float().mean()),
        "groups_skipped": int(tied.sum()),
    }


def group_report(row: dict, groups: int) -> str:
    """Return the line that follows an epoch of GRPO on the screen: what it had to learn from."""
    return f"       groups skipped {row['groups_skipped']} of {groups}, {brief(row)}"


def alarms(row: dict, config: GrpoConfig) -> dict[str, dict[str, str]]:
    """Return why an epoch of GRPO taught little or nothing and the option to change, {"warnings": {kind: text}}, or
    {}."""
    tied, idle, share = row["frac_reward_zero_std"], row.get("zero_grad_frac", 0.0), row.get("kl_share", 0.0)
    outside = row.get("clip_frac", 0.0)
    found = {}
    if tied == 1 or (idle > 0.5 and tied > 0.5 * idle):
        mend = "more varied rollouts (rollout.sample, rollout.temperatures, rollout.random) or a finer reward.mode"
        if config.online:
            mend = "raise grpo.online_samples or grpo.entropy_beta"
        if config.top_k:
            mend = "grpo.top_k=[] keeps all rollouts"
        why = "the rewards of every group are equal, so there is nothing to learn"
        if tied < 1:
            why = f"{idle:.0%} of the rollouts have no gradient, most of them in groups of equal rewards"
        found["tied"] = f"{why}: {mend}"
    elif idle > 0.5 or outside > 0.7:
        mend = "lower grpo.lr" if config.refresh_every == 1 else "lower grpo.refresh_every or grpo.lr"
        if not config.refresh_every:
            mend = "set grpo.refresh_every=5"
        clipped = f"{outside:.0%} of the ratios lie outside the clip range"
        found["clipped"] = f"{clipped}, {idle:.0%} of the rollouts have no gradient: {mend}"
    if share > 0.9:
        mend = "grpo.dropout=both" if config.dropout == "new_only" else "lower grpo.kl_beta"
        found["kl"] = f"{share:.0%} of the loss is KL, not reward: {mend}"
    if row.get("kl", 0.0) < 0:
        found["k1"] = "the KL estimate is negative and so no penalty: grpo.kl=k3 is one on logged rollouts too"
    return {"warnings": found} if found else {}
