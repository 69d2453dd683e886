"""The warm-up: supervised epochs on groups, by reward-weighted cross-entropy (RCE) or other losses of warmup.py.

B queries in a batch, K candidates, G rollouts, S shots. Source of RCE: Lever-Plus.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lever_lm.config.schema import Config, RceConfig
from lever_lm.selectors.pointer.checkpoint import Policy
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.batches import GroupTensors
from lever_lm.training.finite_checks import At
from lever_lm.training.losses import rce_temperature
from lever_lm.training.optimizer_step import means, optimizer_step, timing
from lever_lm.training.rewards import tied_groups
from lever_lm.training.run_state import Journal
from lever_lm.training.sequence_model import train_fixed_set, train_lever_lm
from lever_lm.training.validation import Validate, validate
from lever_lm.training.warmup import WARMUP_LOSSES, MatchGroups

NO_POINTER = {"lever_lm": train_lever_lm, "fixed_set": train_fixed_set}


def warm_up(
    policy: Policy,
    train: GroupTensors | None,
    val: GroupTensors | None,
    config: Config,
    journal: Journal,
    *,
    matches: MatchGroups | None = None,
    rl_data: Path | None = None,
    also: Validate | None = None,
) -> None:
    """Train by the losses of the config's warm-up, one after the other: on the logged groups `train`, or for `match` on
    the answers of the training split, without the queries that GRPO is validated by.

    matches: its groups; rl_data: the rollout file, if it is the user's own; also: as of train_rce.
    """
    if config.warmup in NO_POINTER:
        NO_POINTER[config.warmup](policy, train, val, config.rce, journal)
        return
    for name, epochs in shared_epochs(config.warmups, config.rce.epochs).items():
        how = {"warmup": name, "epochs": epochs}
        if name == "match" and epochs:
            _match(policy, val, config, journal, matches, rl_data, also, **how)
        elif epochs:
            train_rce(policy, train, val, config.rce, journal, also=also, **how)


def shared_epochs(losses: tuple[str, ...], epochs: int) -> dict[str, range]:
    """Return the epochs of each loss of a warm-up, of one loss or of two: the first has the first half, and the odd
    one."""
    ends = [epochs] if len(losses) == 1 else [(epochs + 1) // 2, epochs]
    return {loss: range(begin + 1, end + 1) for loss, begin, end in zip(losses, [0, *ends[:-1]], ends, strict=True)}


def _match(
    policy: PointerSelector,
    val: GroupTensors | None,
    config: Config,
    journal: Journal,
    matches: MatchGroups,
    rl_data: Path | None,
    also: Validate | None,
    **how,
) -> None:
    """Train by answer match. val_reward is that of the logged groups where there are any, as GRPO's is."""
    device = next(policy.parameters()).device
    rows, held_out = matches.split(rl_data)

    def measured(policy: PointerSelector, at: At) -> dict[str, float]:
        found = validate(policy, val, config.rce.temperature_end, at) if val is not None else {}
        return {name: value for name, value in found.items() if name != "val_loss"} | (also(policy, at) if also else {})

    first, judged = matches.draw(rows, 0).to(device), matches.held_out(held_out).to(device)
    drawn = lambda epoch: matches.draw(rows, epoch).to(device)  # noqa: E731
    train_rce(policy, first, judged, config.rce, journal, drawn=drawn, also=measured, **how)


def train_rce(
    policy: PointerSelector,
    train: GroupTensors,
    val: GroupTensors,
    config: RceConfig,
    journal: Journal,
    *,
    warmup: str = "rce",
    drawn: Callable[[int], GroupTensors] | None = None,
    epochs: range | None = None,
    also: Validate | None = None,
) -> None:
    """Train the policy for the epochs that are left. The temperature of the weights falls over all their steps.

    warmup: a name of WARMUP_LOSSES. drawn: epoch → its training groups, where each epoch has its own. epochs: those of
    this loss, all of config.epochs by default; one optimizer goes through several. also: policy, place → metrics of an
    epoch that take the place of those of `val`.
    """
    epochs = epochs or range(1, config.epochs + 1)
    other = "" if warmup == "rce" else warmup
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    journal.restore("rce", policy, optimizer)
    steps = math.ceil(len(train) / config.batch_size)
    temperatures = (len(epochs) * steps, config.temperature_start, config.temperature_end)
    for epoch in journal.epochs("rce", epochs.stop - 1, other):
        began, history = time.perf_counter(), []
        groups = drawn(epoch) if drawn else train
        policy.train()
        for i, (_, batch) in enumerate(groups.shuffled(config.batch_size)):
            noise = policy.draw_noise(batch.query, batch.candidates)
            temperature = rce_temperature((epoch - epochs.start) * steps + i, *temperatures)
            loss, scores = WARMUP_LOSSES[warmup](policy, batch, noise, temperature, config)
            at = At("rce", epoch, f"step {i + 1}", other)
            norm = optimizer_step(optimizer, loss, config.max_grad_norm, at, batch, scores)
            history.append({"train_loss": float(loss.detach()), "grad_norm": norm})
        row = {"phase": "rce", "epoch": epoch, **({"warmup": other} if other else {}), "temperature": temperature}
        at = At("rce", epoch, "validation", other)
        row |= (
            means(history)
            | validate(policy, val, config.temperature_end, at, warmup)
            | (also(policy, at) if also else {})
        )
        row |= {"frac_reward_zero_std": float(tied_groups(train.rewards, train.mask).float().mean())}
        row |= timing(began, len(history))
        journal.commit(row, policy, optimizer, {})
