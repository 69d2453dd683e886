"""Online rollouts: sequences that the policy samples while it learns, and their mix with the logged rollouts.

n training queries, G rollouts per query, S shots.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.batches import EVAL_BATCH, GroupTensors
from lever_lm.training.finite_checks import At, check
from lever_lm.training.rewards import tied_groups
from lever_lm.utils.errors import LeverError

# Sequences (n, G, S) of pool positions for the training queries → their rewards (n, G).
Answer = Callable[[Tensor], Tensor]


@torch.no_grad()
def explore(
    policy: PointerSelector, train: GroupTensors, samples: int, answer: Answer, say: Callable[[str], None], at: At
) -> dict[str, Tensor]:
    """Return a round of the policy's own rollouts, `samples` for each training query, with their rewards. The rollouts
    of one query are a group: the policy is compared with itself. Raises NotFinite where the log-prob of a logged
    rollout, without which nothing can be drawn, or the reward of an online rollout is not finite."""
    policy.eval()
    for _, batch in train.chunks(EVAL_BATCH):
        check(at, batch, {"log-prob": policy.log_prob(*batch.inputs)})
    shots = train.sequences.shape[2]
    try:
        drawn = [
            policy.sample(batch.query, batch.candidates, shots, batch.pool_mask, num_samples=samples)
            for _, batch in train.chunks(EVAL_BATCH)
        ]
    except ValueError as error:
        raise LeverError(
            f"online rollouts: {error}; make rollouts of fewer (rollout.shots), or grpo.online=false"
        ) from error
    sequences = torch.cat(drawn)
    rewards = answer(sequences).to(train.rewards)
    online = {"sequences": sequences, "rewards": rewards, "mask": torch.ones_like(rewards, dtype=torch.bool)}
    check(at, train.with_rollouts(**online), {"reward": rewards})
    found = online_statistics(online)
    say(
        f"online: {rewards.numel()} rollouts of the policy, mean reward {found['online_reward']:.4f}, "
        f"{found['online_reward_zero_std']:.0%} of groups tied"
    )
    return online


def online_statistics(online: dict[str, Tensor] | None) -> dict[str, float]:
    """Return the mean reward of the round in use, and the share of its groups that are tied; {} without a round."""
    if online is None:
        return {}
    tied = tied_groups(online["rewards"], online["mask"]).float().mean()
    return {"online_reward": float(online["rewards"].mean()), "online_reward_zero_std": float(tied)}


def mix(train: GroupTensors, online: dict[str, Tensor] | None, ratio: float) -> tuple[GroupTensors, Tensor]:
    """Return logged and online groups as one set, and the weight of each group: online ones have `ratio` of the
    whole."""
    if online is None:
        return train, torch.ones(len(train), device=train.rewards.device)
    own = train.with_rollouts(**{name: tensor.to(train.rows.device) for name, tensor in online.items()})
    if ratio == 1:
        return own, torch.ones(len(own), device=own.rewards.device)
    weights = torch.tensor([1 - ratio, ratio], device=train.rewards.device).repeat_interleave(len(train))
    return train.stacked(own), weights
