"""GRPO: policy optimisation on groups of rollouts, logged ones and the policy's own. Source: arXiv:2402.03300 §4.1.

B queries in a batch, K candidates, G rollouts, S shots; n queries in all.
Deviations from the lineage, each an option of GrpoConfig: all rollouts of a group are learnt from; old and reference
policy are those at GRPO's start, and the old one is refreshed; old, reference and new policy draw the same dropout
masks, so that the ratio of unchanged weights is 1 and their KL 0.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lever_lm.config.schema import GrpoConfig
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.batches import GroupTensors, projected
from lever_lm.training.finite_checks import At, check
from lever_lm.training.losses import LOSSES, LossAndStats, adapt_kl_beta, group_mean, scheduled_lr
from lever_lm.training.optimizer_step import means, optimizer_step, timing
from lever_lm.training.reference_policy import FrozenPolicy, snapshot
from lever_lm.training.rewards import group_advantage, group_mean_std
from lever_lm.training.rollouts.online import Answer, explore, mix, online_statistics
from lever_lm.training.run_state import Journal
from lever_lm.training.select_checkpoint import epochs_since_best
from lever_lm.training.validation import Validate, alarms, group_report, group_statistics, validate

_BACKBONE = ("input_proj", "query_proj", "cand_proj")


@dataclass
class GrpoState:
    """What GRPO carries from epoch to epoch beside policy and optimizer; state.pt holds these fields.

    old, reference: weights of the old and the reference policy. beta: the weight of the KL. online: the round of the
    policy's own rollouts in use (sequences, rewards, mask).
    """

    old: dict[str, Tensor]
    reference: dict[str, Tensor]
    beta: float
    online: dict[str, Tensor] | None = None


def train_grpo(
    policy: PointerSelector,
    initial: PointerSelector,
    train: GroupTensors,
    val: GroupTensors,
    config: GrpoConfig,
    journal: Journal,
    *,
    val_temperature: float = 0.5,
    answer: Answer | None = None,
    also: Validate | None = None,
) -> None:
    """Train the policy for the epochs that are left.

    initial: the policy before RCE (grpo.anchor=init starts there). val_temperature: that of the RCE loss reported as
    val_loss. answer: sequences (n, G, S) for the n training queries → their rewards (n, G); grpo.online needs it. also:
    policy, place → further metrics of an epoch.
    """
    optimizer = torch.optim.AdamW(_trained(policy, config), lr=config.lr, weight_decay=config.weight_decay)
    state = _state(journal.restore("grpo", policy, optimizer), policy if config.anchor == "rce" else initial, config)
    steps = math.ceil(len(train) / config.batch_size)
    _tell_schedule(config, steps, journal)
    learner, features = _learner(policy, train, config)
    loss_of = _loss(config)
    old = reference = None
    for epoch in journal.epochs("grpo", config.epochs):
        if _out_of_patience(config, journal):
            break
        began, history, at = time.perf_counter(), [], partial(At, "grpo", epoch)
        fresh = config.online and (epoch - 1) % config.online_every == 0
        if fresh:
            state.online = explore(policy, train, config.online_samples, answer, journal.say, at("online rollouts"))
        if epoch > 1 and (fresh or (config.refresh_every and (epoch - 1) % config.refresh_every == 0)):
            state.old, old = snapshot(policy), None
        data, weights = mix(train, state.online, config.online_ratio)
        old = old or FrozenPolicy(policy, state.old, data, config.dropout, at("old policy"))
        if reference is None or fresh:
            reference = FrozenPolicy(policy, state.reference, data, config.dropout, at("reference policy"))
        data, advantages = _advantages(data, config, epoch)
        learner.train(config.dropout != "off")
        for i, (index, batch) in enumerate(replace(data, **features).shuffled(config.batch_size, len(train))):
            set_learning_rate(optimizer, config, (epoch - 1) * steps + i, steps)
            noise = learner.draw_noise(batch.query, batch.candidates)
            log_probs, entropy = learner.evaluate(*batch.inputs, noise=noise)
            terms = (log_probs, old.log_probs(index, noise), advantages[index], batch.mask)
            ref = reference.log_probs(index, noise) if config.reference == "start" else None
            loss, stats = loss_of(*terms, ref_log_probs=ref, weights=weights[index], kl_beta=state.beta)
            if config.entropy_beta:
                loss = loss - config.entropy_beta * group_mean(entropy, batch.mask, weights[index])
            norm = optimizer_step(optimizer, loss, config.max_grad_norm, at(f"step {i + 1}"), batch, log_probs)
            history.append({"train_loss": float(loss.detach()), "grad_norm": norm, **_floats(stats)})
            if config.adaptive_kl:
                state.beta = adapt_kl_beta(state.beta, history[-1].get("kl", math.nan))
        row = {"phase": "grpo", "epoch": epoch, "beta": state.beta, "lr": optimizer.param_groups[0]["lr"]}
        row |= means(history) | validate(learner, replace(val, **features), val_temperature, at("validation"))
        row |= also(policy, at("validation")) if also else {}
        row |= group_statistics(data.rewards, data.mask, advantages) | online_statistics(state.online)
        row |= timing(began, len(history))
        row |= alarms(row, config)
        journal.commit(row, policy, optimizer, vars(state))
        journal.say(group_report(row, len(data)))


# ---------------------------------------------------------------------- before the first epoch


def _trained(policy: PointerSelector, config: GrpoConfig) -> list[Tensor]:
    """Return the parameters that are learnt."""
    frozen = _BACKBONE if config.freeze_backbone else ()
    return [parameter for name, parameter in policy.named_parameters() if name.split(".")[0] not in frozen]


def _state(saved: dict | None, start: PointerSelector, config: GrpoConfig) -> GrpoState:
    """Return the state that the last epoch left; without one, old and reference policy are `start`."""
    if saved is not None:
        return GrpoState(**saved)
    weights = snapshot(start)
    return GrpoState(weights, weights, config.kl_beta)


def _learner(policy: PointerSelector, train: GroupTensors, config: GrpoConfig) -> tuple[PointerSelector, dict]:
    """Return the policy and {}; with grpo.freeze_backbone the part of the policy that learns, and the features that
    this part takes, projected once."""
    if not config.freeze_backbone:
        return policy, {}
    learner, seen = projected(policy, train)
    return learner, {"queries": seen.queries, "icds": seen.icds}


def _loss(config: GrpoConfig) -> Callable[..., LossAndStats]:
    """Return the loss that grpo.loss names, with those of its options that never change."""
    clip = {"clip_epsilon": config.clip_epsilon, "clip_epsilon_high": config.clip_epsilon_high or None}
    return partial(LOSSES[config.loss], kl_estimate=config.kl, **clip)


# ---------------------------------------------------------------------- groups


def best_rollouts(rewards: Tensor, mask: Tensor, k: int | None) -> Tensor:
    """Return the mask (B, G) of the k best rollouts of each group, the earlier first among equals; all for None."""
    if k is None:
        return mask
    order = rewards.masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    return mask & (rank < k)


def _advantages(data: GroupTensors, config: GrpoConfig, epoch: int) -> tuple[GroupTensors, Tensor]:
    """Return the groups with the rollouts that count in this epoch, and the advantage of each rollout (n, G). Raises
    NotFinite for rewards so large that their spread overflows: the advantages would be 0, and nothing learnt."""
    k = config.top_k[min(epoch, len(config.top_k)) - 1] if config.top_k else None
    data = replace(data, mask=best_rollouts(data.rewards, data.mask, k))
    advantages = group_advantage(
        data.rewards,
        data.mask,
        method=config.advantage,
        min_std=config.advantage_min_std,
        clip=config.advantage_clip,
        scale=config.advantage_scale,
    )
    spread = group_mean_std(data.rewards, data.mask)[1].expand_as(data.rewards)
    values = {"reward": data.rewards, "spread of rewards in the group": spread, "advantage": advantages}
    check(At("grpo", epoch), data, values)
    return data, advantages


# ---------------------------------------------------------------------- the schedule


def set_learning_rate(optimizer: torch.optim.Optimizer, config: GrpoConfig, step: int, steps_per_epoch: int) -> None:
    """Give the optimizer the schedule's rate for a step, counted from 0 over all epochs."""
    for group in optimizer.param_groups:
        group["lr"] = _learning_rate(config, step, steps_per_epoch)


def _learning_rate(config: GrpoConfig, step: int, steps_per_epoch: int) -> float:
    total = config.epochs * steps_per_epoch
    return scheduled_lr(config.lr, step, total, schedule=config.schedule, warmup_steps=config.warmup_steps)


def _tell_schedule(config: GrpoConfig, steps_per_epoch: int, journal: Journal) -> None:
    """Say where the warm-up outlasts the training, and where the learning rate goes when the epochs that the schedule
    runs over are others than before."""
    if 0 < config.epochs * steps_per_epoch <= config.warmup_steps:
        steps = config.epochs * steps_per_epoch
        journal.say(f"warning: grpo.warmup_steps {config.warmup_steps} outlast all {steps} steps")
    last = journal.rows[-1] if journal.rows else {}
    if last.get("phase") != "grpo" or not last["epoch"] < config.epochs:
        return
    step = last["epoch"] * steps_per_epoch
    here, following = (_learning_rate(config, at, steps_per_epoch) for at in (step - 1, step))
    if not math.isclose(last["lr"], here, rel_tol=1e-9):
        journal.say(
            f"grpo.schedule={config.schedule} runs over {config.epochs} epochs now, another number than before: the "
            f"learning rate goes from {last['lr']:.3g} at the end of epoch {last['epoch']} to {following:.3g} in epoch "
            f"{last['epoch'] + 1}"
        )


def _out_of_patience(config: GrpoConfig, journal: Journal) -> bool:
    """Return True, and say so, when val_reward has not risen for grpo.patience epochs."""
    out = bool(config.patience) and epochs_since_best(journal.rows) >= config.patience
    if out:
        journal.say(f"stopped early: val_reward has not risen for {config.patience} epochs (grpo.patience)")
    return out


def _floats(stats: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in stats.items()}
