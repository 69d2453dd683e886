"""The two loops: RCE warm-up and GRPO, a page each.

B queries in a batch, K candidates, G rollouts, S shots. Sources: RCE as in Lever-Plus; GRPO, arXiv:2402.03300 §4.1.
Deviations from the lineage, each an option of GrpoConfig: all rollouts of a group are learnt from; old and reference
policy are those at GRPO's start, and the old one is refreshed; dropout is off for old and new log-probs alike.
"""

import copy
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from lever_lm.batches import Batch, GroupTensors
from lever_lm.config import GrpoConfig, RceConfig
from lever_lm.errors import LeverError
from lever_lm.journal import Journal
from lever_lm.losses import adapt_kl_beta, grpo_loss, rce_loss, rce_temperature
from lever_lm.policy import PointerSelector
from lever_lm.rewards import group_advantage, group_mean_std, normalize_group, tied_groups

_EVAL_BATCH = 256
_BACKBONE = ("input_proj", "query_proj", "cand_proj")


def train_rce(
    policy: PointerSelector, train: GroupTensors, val: GroupTensors, config: RceConfig, journal: Journal
) -> None:
    """Warm-up: reward-weighted cross-entropy over the logged sequences, its temperature falling over all steps."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    journal.restore("rce", policy, optimizer)
    steps_per_epoch = math.ceil(len(train) / config.batch_size)
    total = config.epochs * steps_per_epoch
    for epoch in range(journal.done("rce") + 1, config.epochs + 1):
        began, losses, norms = time.perf_counter(), [], []
        policy.train()
        for i, batch in enumerate(shuffled(train, config.batch_size)):
            temperature = rce_temperature(
                (epoch - 1) * steps_per_epoch + i, total, config.temperature_start, config.temperature_end
            )
            log_probs = policy.log_prob(
                batch.query, batch.candidates, batch.sequences, batch.pool_mask, label_smoothing=config.label_smoothing
            )
            rewards = normalize_group(batch.rewards, batch.mask, method=config.normalize)
            loss = rce_loss(log_probs, rewards, batch.mask, temperature)
            norms.append(update(optimizer, loss, config.max_grad_norm, batch, f"RCE epoch {epoch}, step {i + 1}"))
            losses.append(float(loss.detach()))
        row = {
            "phase": "rce",
            "epoch": epoch,
            "train_loss": mean(losses),
            **validate(policy, val, config.temperature_end),
            "temperature": temperature,
            "grad_norm": mean(norms),
            **timing(began, len(losses)),
        }
        journal.commit(row, policy, optimizer, {})


def train_grpo(
    policy: PointerSelector,
    initial: PointerSelector,
    train: GroupTensors,
    val: GroupTensors,
    config: GrpoConfig,
    journal: Journal,
    *,
    val_temperature: float = 0.5,
) -> None:
    """Policy optimisation on the logged groups. `initial` is the policy before RCE (grpo.anchor=init starts there).

    val_temperature: that of the RCE loss reported as val_loss.
    """
    trained = [p for name, p in policy.named_parameters() if not _is_frozen(name, config)]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    extra = journal.restore("grpo", policy, optimizer)
    if extra is None:
        anchor = policy if config.anchor == "rce" else initial
        old = reference = snapshot(anchor)
        beta = config.kl_beta
        old_log_probs = reference_log_probs = _log_probs(policy, anchor, train, dropout=config.dropout == "both")
    else:
        old, reference, beta = extra["old"], extra["reference"], extra["beta"]
        old_log_probs = extra["old_log_probs"].to(train.rewards)
        reference_log_probs = extra["reference_log_probs"].to(train.rewards)
    for epoch in range(journal.done("grpo") + 1, config.epochs + 1):
        began, history = time.perf_counter(), []
        if config.refresh_every and epoch > 1 and (epoch - 1) % config.refresh_every == 0:
            old = snapshot(policy)
            old_log_probs = _log_probs(policy, policy, train, dropout=config.dropout == "both")
        mask = best_rollouts(train.rewards, train.mask, _top_k(config, epoch))
        advantages = group_advantage(
            train.rewards,
            mask,
            method=config.advantage,
            min_std=config.advantage_min_std,
            clip=config.advantage_clip,
        )
        policy.train(config.dropout != "off")
        for i, (index, batch) in enumerate(shuffled_places(train, config.batch_size)):
            log_probs = policy.log_prob(batch.query, batch.candidates, batch.sequences, batch.pool_mask)
            loss, metrics = grpo_loss(
                log_probs,
                old_log_probs[index],
                advantages[index],
                mask[index],
                clip_epsilon=config.clip_epsilon,
                kl_beta=beta,
                ref_log_probs=reference_log_probs[index] if config.reference == "start" else None,
            )
            norm = update(optimizer, loss, config.max_grad_norm, batch, f"GRPO epoch {epoch}, step {i + 1}")
            history.append({"train_loss": float(loss.detach()), "grad_norm": norm, **_floats(metrics)})
            if config.adaptive_kl:
                beta = adapt_kl_beta(beta, history[-1]["kl"])
        row = {
            "phase": "grpo",
            "epoch": epoch,
            **{name: mean([step[name] for step in history]) for name in history[0]},
            **validate(policy, val, val_temperature),
            **group_statistics(train, mask, advantages),
            "beta": beta,
            **timing(began, len(history)),
        }
        extra = {
            "old": old,
            "reference": reference,
            "old_log_probs": old_log_probs.cpu(),
            "reference_log_probs": reference_log_probs.cpu(),
            "beta": beta,
        }
        journal.commit(row, policy, optimizer, extra)


# ---------------------------------------------------------------------- steps


def update(optimizer, loss: Tensor, max_grad_norm: float, batch: Batch, where: str) -> float:
    """One optimizer step; returns the gradient's norm before clipping. Raises LeverError, with the weights as they
    were, when loss or gradient is not finite."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(trained, max_grad_norm))
    if not (math.isfinite(norm) and bool(torch.isfinite(loss.detach()))):
        what = "loss" if not bool(torch.isfinite(loss.detach())) else "gradient"
        raise LeverError(
            f"{where}: the {what} is not finite. Queries {batch.query_ids[:8]}, {int(batch.mask.sum())} rollouts, "
            f"rewards {float(batch.rewards.min()):.3g} to {float(batch.rewards.max()):.3g}. The checkpoints written so "
            "far are sound; lower the learning rate (rce.lr, grpo.lr) and run the command again"
        )
    optimizer.step()
    return norm


def shuffled_places(data: GroupTensors, batch_size: int) -> Iterator[tuple[Tensor, Batch]]:
    """(places, batch) over all groups in random order, from torch's global generator."""
    order = torch.randperm(len(data)).to(data.rows.device)
    for index in order.split(batch_size):
        yield index, data.batch(index)


def shuffled(data: GroupTensors, batch_size: int) -> Iterator[Batch]:
    """Batches over all groups in random order."""
    for _, batch in shuffled_places(data, batch_size):
        yield batch


def best_rollouts(rewards: Tensor, mask: Tensor, k: int | None) -> Tensor:
    """The mask of each group's k best rollouts, earlier ones first among equals; all of them for None. (B, G)."""
    if k is None:
        return mask
    order = rewards.masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    return mask & (rank < k)


def _top_k(config: GrpoConfig, epoch: int) -> int | None:
    return config.top_k[min(epoch, len(config.top_k)) - 1] if config.top_k else None


def _is_frozen(name: str, config: GrpoConfig) -> bool:
    return config.freeze_backbone and name.split(".")[0] in _BACKBONE


def snapshot(policy: PointerSelector) -> dict[str, Tensor]:
    """A copy of the weights that training does not reach."""
    return {name: tensor.detach().cpu().clone() for name, tensor in policy.state_dict().items()}


@torch.no_grad()
def _log_probs(policy: PointerSelector, of: PointerSelector, data: GroupTensors, *, dropout: bool) -> Tensor:
    """Log-probs of all rollouts under a policy, (n, G)."""
    model = of if of is policy else copy.deepcopy(of).to(data.rewards.device)
    model.train(dropout)
    parts = [
        model.log_prob(batch.query, batch.candidates, batch.sequences, batch.pool_mask)
        for _, batch in data.chunks(_EVAL_BATCH)
    ]
    return torch.cat(parts)


# ---------------------------------------------------------------------- measuring


@torch.no_grad()
def validate(policy: PointerSelector, data: GroupTensors, temperature: float) -> dict[str, float]:
    """Judged on the validation groups, dropout off: val_loss, the RCE loss; val_reward, the mean over groups of
    Σ_i softmax(log π)_i · r_i over the logged rollouts; val_top_reward, the reward of the one the policy ranks first;
    entropy of the first pick, in nats."""
    policy.eval()
    sums = {"val_loss": 0.0, "val_reward": 0.0, "val_top_reward": 0.0, "entropy": 0.0}
    for index, batch in data.chunks(_EVAL_BATCH):
        log_probs = policy.log_prob(batch.query, batch.candidates, batch.sequences, batch.pool_mask)
        scores = log_probs.masked_fill(~batch.mask, -torch.inf)
        first = policy.logits(batch.query, batch.candidates, batch.sequences[:, 0, :1], batch.pool_mask).log_softmax(-1)
        per_batch = {
            "val_loss": rce_loss(log_probs, batch.rewards, batch.mask, temperature),
            "val_reward": (scores.softmax(-1) * batch.rewards).sum(-1).mean(),
            "val_top_reward": batch.rewards.gather(1, scores.argmax(-1, keepdim=True)).mean(),
            "entropy": -(first.exp() * first).sum(-1).mean(),
        }
        for name, value in per_batch.items():
            sums[name] += float(value) * len(index)
    return {name: value / len(data) for name, value in sums.items()}


def group_statistics(data: GroupTensors, mask: Tensor, advantages: Tensor) -> dict[str, float]:
    """What the groups have to teach: adv_std, the mean over all groups of the standard deviation of advantages within
    a group (tied groups count 0); adv_max likewise; mean and spread of rewards; share of tied groups."""
    _, spread = group_mean_std(advantages, mask)
    _, reward_spread = group_mean_std(data.rewards, mask)
    return {
        "adv_std": float(spread.mean()),
        "adv_max": float(advantages.masked_fill(~mask, -torch.inf).amax(-1).mean()),
        "reward": float(data.rewards[mask].mean()),
        "reward_std": float(reward_spread.mean()),
        "frac_reward_zero_std": float(tied_groups(data.rewards, mask).float().mean()),
    }


def timing(began: float, steps: int) -> dict[str, float]:
    """Seconds of the epoch and of one step, validation included."""
    elapsed = time.perf_counter() - began
    return {"epoch_time": round(elapsed, 4), "step_time": round(elapsed / max(steps, 1), 6)}


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def _floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
