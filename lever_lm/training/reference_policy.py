"""Policies that stay as they were while another learns: the old one of the ratio, and the reference of the KL.

B queries, K candidates, G rollouts, S shots.
"""

import copy

import torch
from torch import Tensor

from lever_lm.selectors.pointer.encoder import Noise
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.batches import Batch, GroupTensors
from lever_lm.training.finite_checks import At, Pass
from lever_lm.training.validation import EVAL_BATCH, projected


def snapshot(policy: PointerSelector) -> dict[str, Tensor]:
    """A copy of the weights that training does not reach."""
    return {name: tensor.detach().cpu().clone() for name, tensor in policy.state_dict().items()}


class Anchor:
    """A policy that stays as it was, and its log-probs of the rollouts of `data`.

    dropout as in GrpoConfig. With `both` they are taken step by step, through the very masks of the learning policy:
    under masks of its own the ratio of unchanged weights would be noise. Raises LeverError, naming `at`, query and
    rollout, where one is not finite.
    """

    def __init__(self, policy: PointerSelector, weights: dict[str, Tensor], data: GroupTensors, dropout: str, at: At):
        model = copy.deepcopy(policy)
        model.load_state_dict(weights)
        model.requires_grad_(False)
        self.model, self.data = projected(model, data)
        masked = dropout == "both" and bool(model.dropout or model.attn_dropout)
        self.model.train(masked)
        self.known = None
        if not masked:
            chunks = self.data.chunks(EVAL_BATCH)
            self.known = torch.cat([self._log_probs(batch, None) for _, batch in chunks])
            bad = ~(torch.isfinite(self.known) | ~data.mask).all(-1)
            if bad.any():
                index = bad.nonzero().flatten()
                batch = data.batch(index)
                raise Pass(at, model.eval(), batch, batch.mask, self.known[index], dict).error("log-prob")

    def log_probs(self, index: Tensor, noise: Noise) -> Tensor:
        """Of the groups at these places, (B, G); noise: the learning policy's."""
        return self._log_probs(self.data.batch(index), noise) if self.known is None else self.known[index]

    @torch.no_grad()
    def _log_probs(self, batch: Batch, noise: Noise | None) -> Tensor:
        return self.model.log_prob(batch.query, batch.candidates, batch.sequences, batch.pool_mask, noise=noise)
