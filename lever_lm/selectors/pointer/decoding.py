"""Half-made sequences of picks and the logits of their next pick.

B queries, K candidates, M sequences side by side for each query, D embedding, H hidden. O options: the K candidates
and, with `stop`, the stop after them. Maths: with the unit state u and the unit candidates v of encoder.py,
logit_k = u·v_k / temperature. Masking lives here and only here: a picked or padded candidate has logit −100.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lever_lm.selectors.pointer.encoder import Noise

MASKED_LOGIT = -100.0


@dataclass(frozen=True)
class Decoding:
    """M sequences per query; one stands for all before the first pick.

    policy: the PointerSelector that decodes; cands (B, O, H); state (B, M, H), or (B, 1, H) where picks do not change
    it; scores (B, M or 1, O) of that state; closest (B, M, O), likeness to the nearest pick, None before there is one
    or where it does not matter; taken (B, M, O), True on what may not be picked.
    """

    policy: nn.Module
    cands: Tensor
    state: Tensor
    scores: Tensor
    closest: Tensor | None
    taken: Tensor

    @classmethod
    def begin(
        cls, policy: nn.Module, query: Tensor, candidates: Tensor, pool_mask: Tensor | None, noise: Noise | None = None
    ) -> "Decoding":
        """The empty sequence of each query: query (B, D), candidates (B, K, D), pool_mask (B, K)."""
        state, cands = policy.encode(query, candidates, pool_mask, noise)
        batch, pool = candidates.shape[:2]
        taken = torch.zeros(batch, pool, dtype=torch.bool, device=query.device) if pool_mask is None else ~pool_mask
        if policy.stop:
            cands = torch.cat([cands, policy.stop_embedding.expand(batch, 1, -1)], 1)
            taken = F.pad(taken, (0, 1), value=True)
        state = state.unsqueeze(1)
        return cls(policy, cands, state, _scores(policy, state, cands), None, taken.unsqueeze(1))

    def logits(self) -> Tensor:
        """Logits of the next pick, (B, M, O)."""
        scores = self.scores
        if self.closest is not None:
            scores = self.policy.part("diversity")(scores, self.closest)
        return torch.where(self.taken, MASKED_LOGIT, scores / self.policy.temperature)

    def advance(self, pick: Tensor, real: Tensor | None = None) -> "Decoding":
        """The sequences after one more pick, (B, M) of options; where `real` (B, M) is False nothing was picked."""
        policy, cands, state, scores, closest = self.policy, self.cands, self.state, self.scores, self.closest
        pool, real = cands.shape[1] - policy.stop, torch.ones_like(pick, dtype=torch.bool) if real is None else real
        taken = self.taken | (F.one_hot(pick, cands.shape[1]).bool() & real.unsqueeze(-1))
        if policy.stop:  # allowed from now on, and the only way on once it was chosen
            stopped = (pick == pool).unsqueeze(-1)
            taken = torch.cat([taken[..., :pool] | stopped, torch.zeros_like(stopped)], -1)
        if (update := policy.part("state_update")) is not None:
            picked = _unit_rows(cands, pick)
            state = torch.where(real.unsqueeze(-1), update(state.expand_as(picked), picked), state)
            scores = _scores(policy, state, cands)
        if policy.part("diversity") is not None:
            likeness = _Cosine.apply(_unit_rows(cands, pick), cands[:, :pool])
            likeness = F.pad(likeness, (0, int(policy.stop)))  # the stop option has similarity 0 to every candidate
            if closest is not None:
                likeness = torch.where(real.unsqueeze(-1), closest.maximum(likeness), closest)
            closest = likeness
        return replace(self, state=state, scores=scores, closest=closest, taken=taken)

    def follow(self, parent: Tensor) -> "Decoding":
        """New sequences, each going on from one of the old: parent (B, W) places among these. The scores are left as
        they are: `advance` computes those of the state after the pick."""
        state = self.state if self.policy.part("state_update") is None else gather_rows(self.state, parent)
        closest = None if self.closest is None else gather_rows(self.closest, parent)
        return replace(self, state=state, closest=closest, taken=gather_rows(self.taken, parent))


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows (B, K, H), index (B, M) → (B, M, H)."""
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def _scores(policy: nn.Module, state: Tensor, cands: Tensor) -> Tensor:
    scorer = policy.part("scorer")
    return _Cosine.apply(state, cands) if scorer is None else scorer(state, F.normalize(cands, dim=-1))


def _unit_rows(rows: Tensor, index: Tensor) -> Tensor:
    return F.normalize(gather_rows(rows, index), dim=-1)


class _Cosine(torch.autograd.Function):
    """units (B, M, H), rows (B, K, H) at their own lengths → (B, M, K). The backward pass by hand makes one array of
    (B, K, H), and autograd's makes six."""

    @staticmethod
    def forward(ctx, units: Tensor, rows: Tensor) -> Tensor:
        lengths = rows.norm(dim=-1).clamp(min=1e-12).unsqueeze(1)
        cosines = units @ rows.transpose(1, 2) / lengths
        ctx.save_for_backward(units, rows, lengths, cosines)
        return cosines

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        units, rows, lengths, cosines = ctx.saved_tensors
        grad = grad / lengths
        along = (grad * cosines).sum(1, keepdim=True) / lengths  # longer rows have the same cosines
        of_rows = grad.transpose(1, 2) @ units
        return grad @ rows, of_rows.addcmul_(along.transpose(1, 2), rows, value=-1)
