"""Policies that stay as they were while another learns: the old one of the ratio, and the reference of the KL.

B queries, K candidates, G rollouts, S shots.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from lever_lm.batches import Batch, GroupTensors
from lever_lm.judging import EVAL_BATCH
from lever_lm.policy import PointerSelector


def snapshot(policy: PointerSelector) -> dict[str, Tensor]:
    """A copy of the weights that training does not reach."""
    return {name: tensor.detach().cpu().clone() for name, tensor in policy.state_dict().items()}


class Anchor:
    """A policy that stays as it was, and its log-probs of the rollouts of `data`.

    dropout as in GrpoConfig. With `both` they are taken step by step, under the very masks that the learning policy
    draws next: under masks of its own the ratio of unchanged weights would be noise.
    """

    def __init__(self, policy: PointerSelector, weights: dict[str, Tensor], data: GroupTensors, dropout: str):
        model = copy.deepcopy(policy)
        model.load_state_dict(weights)
        model.requires_grad_(False)
        self.model, projected = behind_frozen_input(model, data)
        self.data = replace(data, **projected)
        masked = dropout == "both" and bool(model.dropout or model.attn_dropout)
        self.model.train(masked)
        chunks = self.data.chunks(EVAL_BATCH)
        self.known = None if masked else torch.cat([self._log_probs(batch) for _, batch in chunks])

    def log_probs(self, index: Tensor) -> Tensor:
        """Of the groups at these places, (B, G)."""
        if self.known is not None:
            return self.known[index]
        with torch.random.fork_rng([index.device] if index.device.type == "cuda" else []):
            return self._log_probs(self.data.batch(index))

    @torch.no_grad()
    def _log_probs(self, batch: Batch) -> Tensor:
        return self.model.log_prob(batch.query, batch.candidates, batch.sequences, batch.pool_mask)


def behind_frozen_input(policy: PointerSelector, data: GroupTensors) -> tuple[PointerSelector, dict[str, Tensor]]:
    """The policy behind its frozen input projection, and the features projected once instead of in every step."""
    if policy.input_proj is None:
        return policy, {}
    with torch.no_grad():
        return policy.after_input(), {name: policy.input_proj(getattr(data, name)) for name in ("queries", "icds")}
