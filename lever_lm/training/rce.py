"""The warm-up's loop: supervised epochs on groups, by reward-weighted cross-entropy (RCE) or another loss of warmup.py.

B queries in a batch, K candidates, G rollouts, S shots. Source of RCE: Lever-Plus.
"""

import math
import time
from collections.abc import Callable

import torch

from lever_lm.config.schema import RceConfig
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.batches import GroupTensors
from lever_lm.training.finite_checks import At
from lever_lm.training.losses import rce_temperature
from lever_lm.training.optimizer_step import means, optimizer_step, timing
from lever_lm.training.rewards import tied_groups
from lever_lm.training.run_state import Journal
from lever_lm.training.validation import Validate, validate
from lever_lm.training.warmup import WARMUP_LOSSES


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
