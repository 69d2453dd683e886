"""Training of the selectors that are no pointer: Lever-LM on the sequences that InfoScore found, and the fixed set.

n queries, G rollouts, S shots. Both are epochs of the phase `rce`, as every warm-up.
"""

import math
import time

import torch
from torch import Tensor

from lever_lm.config.schema import RceConfig
from lever_lm.selectors.fixed_set import FixedSet, presence_scores
from lever_lm.selectors.lever_lm import LeverLM
from lever_lm.training.batches import GroupTensors
from lever_lm.training.finite_checks import At
from lever_lm.training.optimizer_step import means, optimizer_step, timing
from lever_lm.training.run_state import Journal


def train_lever_lm(model: LeverLM, train: GroupTensors, val: GroupTensors, config: RceConfig, journal: Journal) -> None:
    """Train by the cross-entropy of all logged sequences, each as probable as any other: those of an InfoScore search
    (arXiv:2312.10104 §3.2)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    journal.restore("rce", model, optimizer)
    groups, places = train.mask.nonzero().T
    for epoch in journal.epochs("rce", config.epochs):
        began, history = time.perf_counter(), []
        model.train()
        for i, some in enumerate(torch.randperm(len(groups)).to(groups.device).split(config.batch_size)):
            at, batch = At("rce", epoch, f"step {i + 1}"), train.batch(groups[some])
            rows = shown_rows(train)[groups[some], places[some]]
            loss = model.loss(batch.query, train.icds, rows)
            history.append({"train_loss": float(loss.detach()), "grad_norm": _step(optimizer, loss, config, at, batch)})
        row = {"phase": "rce", "epoch": epoch, "temperature": 1.0, **means(history)}
        journal.commit(row | _validate(model, val) | timing(began, len(history)), model, optimizer, {})


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, config: RceConfig, at: At, batch) -> float:
    scores = loss.expand(batch.mask.shape).clone()  # the loss has no parts that are a rollout's
    return optimizer_step(optimizer, scores.mean(), config.max_grad_norm, at, batch, scores)


def shown_rows(data: GroupTensors) -> Tensor:
    """Return the training rows of every rollout, (n, G, S), −1 where it shows fewer."""
    rows = data.pools.gather(1, data.sequences.clamp(min=0).flatten(1)).view_as(data.sequences)
    return rows.masked_fill(data.sequences < 0, -1)


@torch.no_grad()
def _validate(model: LeverLM, val: GroupTensors) -> dict[str, float]:
    """Return val_loss, the loss of the validation groups' sequences, and val_reward, the mean over groups of
    Σ_i softmax(log p)_i · r_i over their sequences."""
    model.eval()
    rows, log_probs = shown_rows(val).clamp(min=0), torch.zeros(val.mask.shape, device=val.mask.device)
    for index, batch in val.chunks(64):
        for place in range(rows.shape[1]):
            sequences = rows[index, place]
            steps = model.logits(batch.query, val.icds, sequences[:, :-1]).log_softmax(-1)
            log_probs[index, place] = steps.gather(-1, sequences.unsqueeze(-1)).squeeze(-1).sum(-1)
    shares = log_probs.masked_fill(~val.mask, -torch.inf).softmax(-1)
    first = val.rewards.gather(1, shares.argmax(-1, keepdim=True))
    return {
        "val_loss": float(-log_probs[val.mask].mean()),
        "val_reward": float((shares * val.rewards).sum(-1).mean()),
        "val_top_reward": float(first.mean()),
    }


def train_fixed_set(
    model: FixedSet, train: GroupTensors, val: GroupTensors, config: RceConfig, journal: Journal
) -> None:
    """Score every training example by its presence in the rollouts: one epoch, in which nothing is drawn."""
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    journal.restore("rce", model, optimizer)
    for epoch in journal.epochs("rce", config.epochs):
        began = time.perf_counter()
        total = len(train.icds)
        model.scores.copy_(presence_scores(shown_rows(train), train.rewards, train.mask, total))
        rows = shown_rows(val)
        scores = model.scores[rows.clamp(min=0)].masked_fill(rows < 0, 0).sum(-1)
        first = val.rewards.gather(1, scores.masked_fill(~val.mask, -torch.inf).argmax(-1, keepdim=True))
        found = {"train_loss": 0.0, "val_loss": 0.0, "val_reward": float(first.mean())}
        row = {"phase": "rce", "epoch": epoch, "temperature": 1.0, "grad_norm": 0.0, **found}
        journal.commit(row | timing(began, 1), model, optimizer, {})
        if not math.isfinite(row["val_reward"]):
            raise At("rce", epoch).stop("a reward is not finite")
