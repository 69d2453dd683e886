"""RCE warm-up: reward-weighted cross-entropy over the logged sequences. Source: Lever-Plus.

B queries in a batch, K candidates, G rollouts, S shots.
"""

import math
import time

import torch

from lever_lm.config.schema import RceConfig
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.batches import GroupTensors
from lever_lm.training.finite_checks import At
from lever_lm.training.losses import rce_loss, rce_temperature
from lever_lm.training.optimizer_step import means, optimizer_step, timing
from lever_lm.training.rewards import normalize_group, tied_groups
from lever_lm.training.run_state import Journal
from lever_lm.training.validation import validate


def train_rce(
    policy: PointerSelector, train: GroupTensors, val: GroupTensors, config: RceConfig, journal: Journal
) -> None:
    """Train the policy for the epochs that are left. The temperature of the weights falls over all steps."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    journal.restore("rce", policy, optimizer)
    steps = math.ceil(len(train) / config.batch_size)
    temperatures = (config.epochs * steps, config.temperature_start, config.temperature_end)
    for epoch in journal.epochs("rce", config.epochs):
        began, history = time.perf_counter(), []
        policy.train()
        for i, (_, batch) in enumerate(train.shuffled(config.batch_size)):
            noise = policy.draw_noise(batch.query, batch.candidates)
            log_probs = policy.log_prob(*batch.inputs, noise=noise, label_smoothing=config.label_smoothing)
            rewards = normalize_group(batch.rewards, batch.mask, method=config.normalize)
            temperature = rce_temperature((epoch - 1) * steps + i, *temperatures)
            loss = rce_loss(log_probs, rewards, batch.mask, temperature)
            at = At("rce", epoch, f"step {i + 1}")
            norm = optimizer_step(optimizer, loss, config.max_grad_norm, at, batch, log_probs)
            history.append({"train_loss": float(loss.detach()), "grad_norm": norm})
        row = {"phase": "rce", "epoch": epoch, "temperature": temperature, **means(history)}
        row |= validate(policy, val, config.temperature_end, At("rce", epoch, "validation"))
        row |= {"frac_reward_zero_std": float(tied_groups(train.rewards, train.mask).float().mean())}
        row |= timing(began, len(history))
        journal.commit(row, policy, optimizer, {})
