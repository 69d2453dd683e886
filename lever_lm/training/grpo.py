"""The two loops: RCE warm-up and GRPO, a page each.

B queries in a batch, K candidates, G rollouts, S shots. Sources: RCE as in Lever-Plus; GRPO, arXiv:2402.03300 §4.1.
Deviations from the lineage, each an option of GrpoConfig: all rollouts of a group are learnt from; old and reference
policy are those at GRPO's start, and the old one is refreshed; old, reference and new policy draw the same dropout
masks, so that the ratio of unchanged weights is 1 and their KL 0.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lever_lm.config.schema import GrpoConfig, RceConfig
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.batches import Batch, GroupTensors
from lever_lm.training.finite_checks import At, Pass, check_groups, grpo_terms, rce_terms
from lever_lm.training.losses import (
    adapt_kl_beta,
    group_mean,
    grpo_loss,
    kl_share,
    rce_loss,
    rce_temperature,
    scheduled_lr,
    zero_grad_frac,
)
from lever_lm.training.nan_debug import backward
from lever_lm.training.reference_policy import Anchor, snapshot
from lever_lm.training.rewards import group_advantage, group_mean_std, normalize_group, tied_groups
from lever_lm.training.rollouts.online import Answer, explore, mix, online_statistics
from lever_lm.training.run_state import Journal
from lever_lm.training.select_checkpoint import epochs_since_best
from lever_lm.training.validation import alarms, group_report, group_statistics, projected, validate

_BACKBONE = ("input_proj", "query_proj", "cand_proj")


def train_rce(
    policy: PointerSelector, train: GroupTensors, val: GroupTensors, config: RceConfig, journal: Journal
) -> None:
    """Warm-up: reward-weighted cross-entropy over the logged sequences, its temperature falling over all steps."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    journal.restore("rce", policy, optimizer)
    steps_per_epoch = math.ceil(len(train) / config.batch_size)
    total = config.epochs * steps_per_epoch
    for epoch in journal.epochs("rce", config.epochs):
        began, losses, norms = time.perf_counter(), [], []
        policy.train()
        for i, batch in enumerate(shuffled(train, config.batch_size)):
            temperature = rce_temperature(
                (epoch - 1) * steps_per_epoch + i, total, config.temperature_start, config.temperature_end
            )
            drawn = {
                "noise": policy.draw_noise(batch.query, batch.candidates),
                "label_smoothing": config.label_smoothing,
            }
            log_probs = policy.log_prob(batch.query, batch.candidates, batch.sequences, batch.pool_mask, **drawn)
            rewards = normalize_group(batch.rewards, batch.mask, method=config.normalize)
            loss = rce_loss(log_probs, rewards, batch.mask, temperature)
            at, terms = At("rce", epoch, f"step {i + 1}"), partial(rce_terms, rewards, temperature)
            seen = Pass(at, policy, batch, batch.mask, log_probs, terms, **drawn)
            norms.append(update(optimizer, loss, config.max_grad_norm, seen))
            losses.append(float(loss.detach()))
        row = {
            "phase": "rce",
            "epoch": epoch,
            "train_loss": mean(losses),
            **validate(policy, val, config.temperature_end, At("rce", epoch, "validation")),
            "frac_reward_zero_std": float(tied_groups(train.rewards, train.mask).float().mean()),
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
    answer: Answer | None = None,
) -> None:
    """Policy optimisation on the logged groups; with grpo.online also on groups that the policy itself proposes.

    initial: the policy before RCE (grpo.anchor=init starts there). val_temperature: that of the RCE loss reported as
    val_loss. answer: sequences (n, G, S) for the n training queries → their rewards (n, G); grpo.online needs it.
    """
    trained = [p for name, p in policy.named_parameters() if not _is_frozen(name, config)]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    memory = journal.restore("grpo", policy, optimizer)
    if memory is None:
        anchor = snapshot(policy if config.anchor == "rce" else initial)
        memory = {"old": anchor, "reference": anchor, "beta": config.kl_beta, "online": None}
    clip = {"clip_epsilon": config.clip_epsilon, "clip_epsilon_high": config.clip_epsilon_high or None}
    steps_per_epoch = math.ceil(len(train) / config.batch_size)
    _check_warmup(config, config.epochs * steps_per_epoch, journal)
    _tell_new_schedule(config, steps_per_epoch, journal)
    learner, features = policy, {}
    if config.freeze_backbone:
        learner, seen = projected(policy, train)
        features = {"queries": seen.queries, "icds": seen.icds}
    old = reference = None
    for epoch in journal.epochs("grpo", config.epochs):
        if config.patience and epochs_since_best(journal.rows) >= config.patience:
            journal.say(f"stopped early: val_reward has not risen for {config.patience} epochs (grpo.patience)")
            break
        began, history, at = time.perf_counter(), [], partial(At, "grpo", epoch)
        fresh = config.online and (epoch - 1) % config.online_every == 0
        if fresh:
            where = at("online rollouts")
            memory["online"] = explore(policy, train, config.online_samples, answer, journal.say, where)
        if epoch > 1 and (fresh or (config.refresh_every and (epoch - 1) % config.refresh_every == 0)):
            memory["old"], old = snapshot(policy), None
        data, weights = mix(train, memory.get("online"), config.online_ratio)
        if old is None:
            old = Anchor(policy, memory["old"], data, config.dropout, at("old policy"))
        if reference is None or fresh:
            reference = Anchor(policy, memory["reference"], data, config.dropout, at("reference policy"))
        mask = best_rollouts(data.rewards, data.mask, _top_k(config, epoch))
        advantages = group_advantage(
            data.rewards,
            mask,
            method=config.advantage,
            min_std=config.advantage_min_std,
            clip=config.advantage_clip,
            scale=config.advantage_scale,
        )
        _check_advantages(at(), data, mask, advantages)
        policy.train(config.dropout != "off")
        learner.train(config.dropout != "off")
        for i, (index, batch) in enumerate(shuffled_places(replace(data, **features), config.batch_size, len(train))):
            set_learning_rate(optimizer, config, epoch, i, steps_per_epoch)
            noise = learner.draw_noise(batch.query, batch.candidates)
            log_probs, entropy = learner.evaluate(
                batch.query, batch.candidates, batch.sequences, batch.pool_mask, noise=noise
            )
            old_log_probs = old.log_probs(index, noise)
            ref_log_probs = reference.log_probs(index, noise) if config.reference == "start" else None
            terms = (log_probs, old_log_probs, advantages[index], mask[index])
            loss, metrics = grpo_loss(
                *terms,
                **clip,
                weights=weights[index],
                kl_beta=memory["beta"],
                kl_estimate=config.kl,
                ref_log_probs=ref_log_probs,
            )
            if config.entropy_beta:
                loss = loss - config.entropy_beta * group_mean(entropy, mask[index], weights[index])
            parts = partial(grpo_terms, *terms[:3], ref_log_probs, config.kl)
            seen = Pass(at(f"step {i + 1}"), learner, batch, mask[index], log_probs, parts, entropy, noise)
            norm = update(optimizer, loss, config.max_grad_norm, seen)
            metrics |= {"zero_grad_frac": zero_grad_frac(*terms, **clip, weights=weights[index])}
            metrics |= {"kl_share": kl_share(metrics["kl_loss"], *terms[2:], weights[index])}
            history.append({"train_loss": float(loss.detach()), "grad_norm": norm, **_floats(metrics)})
            if config.adaptive_kl:
                memory["beta"] = adapt_kl_beta(memory["beta"], history[-1]["kl"])
        row = {
            "phase": "grpo",
            "epoch": epoch,
            **{name: mean([step[name] for step in history]) for name in history[0]},
            **validate(learner, replace(val, **features), val_temperature, at("validation")),
            **group_statistics(data.rewards, mask, advantages),
            **online_statistics(memory.get("online")),
            "beta": memory["beta"],
            "lr": optimizer.param_groups[0]["lr"],
            **timing(began, len(history)),
        }
        if found := alarms(row, config):
            row["warnings"] = found
        journal.commit(row, policy, optimizer, memory)
        journal.say(group_report(row, len(data)))


# ---------------------------------------------------------------------- steps


def update(optimizer, loss: Tensor, max_grad_norm: float, seen: Pass) -> float:
    """One optimizer step; returns the gradient's norm before clipping. Raises LeverError, with weights and optimizer as
    they were, when loss or gradient is not finite."""
    optimizer.zero_grad(set_to_none=True)
    seen.keep_gradients()
    operation = backward(loss, optimizer.zero_grad)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(trained, max_grad_norm))
    if not math.isfinite(norm) or not bool(torch.isfinite(loss.detach())):
        what = "gradient" if bool(torch.isfinite(loss.detach())) else "loss"
        raise seen.error(what, operation)
    try:
        optimizer.step()
    except RuntimeError as error:  # torch refuses a scalar that its float32 does not hold
        if "without overflow" not in str(error):
            raise
        raise seen.overflow() from error
    return norm


def shuffled_places(data: GroupTensors, batch_size: int, queries: int = 0) -> Iterator[tuple[Tensor, Batch]]:
    """(places, batch) over all groups in random order, from torch's global generator. Where there are two groups of
    each of the `queries`, logged and online, both are in one batch: every batch mixes them alike."""
    queries = queries or len(data)
    order = torch.randperm(queries).to(data.rows.device)
    for index in order.split(batch_size):
        index = torch.cat([index + start for start in range(0, len(data), queries)])
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


def _check_warmup(config: GrpoConfig, steps: int, journal: Journal) -> None:
    if 0 < steps <= config.warmup_steps:
        journal.say(f"warning: grpo.warmup_steps {config.warmup_steps} outlast all {steps} steps")


def _tell_new_schedule(config: GrpoConfig, steps_per_epoch: int, journal: Journal) -> None:
    """Say where the learning rate goes when the epochs that the schedule runs over are others than before."""
    last = journal.rows[-1] if journal.rows else {}
    if last.get("phase") != "grpo" or not last["epoch"] < config.epochs:
        return
    step = last["epoch"] * steps_per_epoch
    here, following = (_learning_rate(config, at, steps_per_epoch) for at in (step - 1, step))
    if not math.isclose(last["lr"], here, rel_tol=1e-9):
        journal.note(
            f"grpo.schedule={config.schedule} runs over {config.epochs} epochs now, another number than before: the "
            f"learning rate goes from {last['lr']:.3g} at the end of epoch {last['epoch']} to {following:.3g} in epoch "
            f"{last['epoch'] + 1}"
        )


def _check_advantages(at: At, data: GroupTensors, mask: Tensor, advantages: Tensor) -> None:
    """Rewards so large that their spread overflows would leave advantages of 0, and nothing learnt."""
    spread = group_mean_std(data.rewards, mask)[1].expand_as(data.rewards)
    values = {"reward": data.rewards, "spread of rewards in the group": spread, "advantage": advantages}
    check_groups(at, data.rows.tolist(), data.numbers, mask, values)


def _is_frozen(name: str, config: GrpoConfig) -> bool:
    return config.freeze_backbone and name.split(".")[0] in _BACKBONE


def set_learning_rate(optimizer, config: GrpoConfig, epoch: int, step: int, steps_per_epoch: int) -> None:
    """The schedule's rate for a step (from 0) of an epoch (from 1)."""
    for group in optimizer.param_groups:
        group["lr"] = _learning_rate(config, (epoch - 1) * steps_per_epoch + step, steps_per_epoch)


def _learning_rate(config: GrpoConfig, step: int, steps_per_epoch: int) -> float:
    total = config.epochs * steps_per_epoch
    return scheduled_lr(config.lr, step, total, schedule=config.schedule, warmup_steps=config.warmup_steps)


def timing(began: float, steps: int) -> dict[str, float]:
    """Seconds of the epoch and of one step, validation included."""
    elapsed = time.perf_counter() - began
    return {"epoch_time": round(elapsed, 4), "step_time": round(elapsed / max(steps, 1), 6)}


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def _floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
