"""Policies that stay as they were while another learns: the old one of the ratio, and the reference of the KL.

B queries, K candidates, G rollouts, S shots.
"""

import copy

import torch
from torch import Tensor

from lever_lm.selectors.pointer.encoder import Noise
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.batches import EVAL_BATCH, Batch, GroupTensors, projected
from lever_lm.training.finite_checks import At, check


def snapshot(policy: PointerSelector) -> dict[str, Tensor]:
    """Return a copy of the weights that training does not change."""
    return {name: tensor.detach().cpu().clone() for name, tensor in policy.state_dict().items()}


class FrozenPolicy:
    """A policy that stays as it was, and its log-probs of the rollouts of `data`.

    dropout as in GrpoConfig. With `both` the log-probs are taken step by step, under the dropout masks of the learning
    policy: under masks of its own the ratio of unchanged weights would be noise. Raises NotFinite, naming `at`, query
    and rollout, where one is not finite.
    """

    def __init__(self, policy: PointerSelector, weights: dict[str, Tensor], data: GroupTensors, dropout: str, at: At):
        model = copy.deepcopy(policy)
        model.load_state_dict(weights)
        model.requires_grad_(False)
        self.model, self.data = projected(model, data)
        masked = dropout == "both" and bool(model.dropout or model.attn_dropout)
        self.model.train(masked)
        self.known = (
            None if masked else torch.cat([self._checked(batch, at) for _, batch in self.data.chunks(EVAL_BATCH)])
        )

    def log_probs(self, index: Tensor, noise: Noise) -> Tensor:
        """Return the log-probs (B, G) of the groups at these places; noise: the learning policy's."""
        return self._log_probs(self.data.batch(index), noise) if self.known is None else self.known[index]

    def _checked(self, batch: Batch, at: At) -> Tensor:
        log_probs = self._log_probs(batch, None)
        check(at, batch, {"log-prob": log_probs})
        return log_probs

    @torch.no_grad()
    def _log_probs(self, batch: Batch, noise: Noise | None) -> Tensor:
        return self.model.log_prob(*batch.inputs, noise=noise)
