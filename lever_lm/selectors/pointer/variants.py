"""The parts in which variants of the policy differ: how a pick changes the query state, how a state scores a candidate,
and what a candidate loses by likeness to the picks.

B queries, M sequences per query (1 when selecting), K candidates, H hidden. States and candidates are unit vectors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GateUpdate(nn.Linear):
    """s ← norm(g ⊙ s + (1 − g) ⊙ v_pick) with g = σ(W[s; v_pick] + b): the gated policy of Lever-Plus.

    (state (B, M, H), pick (B, M, H)) → state (B, M, H).
    """

    def __init__(self, hidden_dim: int):
        super().__init__(2 * hidden_dim, hidden_dim)
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, state: Tensor, pick: Tensor) -> Tensor:
        gate = torch.sigmoid(super().forward(torch.cat([state, pick], -1)))
        return F.normalize(gate * state + (1 - gate) * pick, dim=-1)


class GruUpdate(nn.GRUCell):
    """s ← norm(GRU(v_pick, s)): Cho et al., arXiv:1406.1078 §2.3, the pick as input and the query state as memory.

    Shapes as in GateUpdate.
    """

    def __init__(self, hidden_dim: int):
        super().__init__(hidden_dim, hidden_dim)

    def forward(self, state: Tensor, pick: Tensor) -> Tensor:
        return F.normalize(super().forward(pick.flatten(0, 1), state.flatten(0, 1)).view_as(state), dim=-1)


class AdditiveScorer(nn.Module):
    """tanh(w·tanh(W_s s + W_c v + b)), state (B, M, H) and candidates (B, K, H) → (B, M, K) in (−1, 1).

    The pointer of Vinyals et al., arXiv:1506.03134 §2.2. The outer tanh, with the policy's temperature 0.1, is the
    logit clipping at 10 of Bello et al., arXiv:1611.09940 §4. Untrained, it does not rank by similarity.
    """

    def __init__(self, hidden_dim: int):
        super().__init__()
        self.state = nn.Linear(hidden_dim, hidden_dim)
        self.candidate = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.score = nn.Linear(hidden_dim, 1, bias=False)

    def forward(self, state: Tensor, cands: Tensor) -> Tensor:
        joined = torch.tanh(self.state(state).unsqueeze(2) + self.candidate(cands).unsqueeze(1))
        return torch.tanh(self.score(joined).squeeze(-1))


class BilinearScorer(nn.Linear):
    """tanh(s·W v), shapes as in AdditiveScorer: Luong et al., arXiv:1508.04025 §3.1, clipped likewise. W starts as the
    identity, so that the untrained policy ranks by cosine similarity."""

    def __init__(self, hidden_dim: int):
        super().__init__(hidden_dim, hidden_dim, bias=False)
        nn.init.eye_(self.weight)

    def forward(self, state: Tensor, cands: Tensor) -> Tensor:
        return torch.tanh(state @ super().forward(cands).transpose(1, 2))


class MmrPenalty(nn.Module):
    """score_k − λ · max over the picks j of v_k·v_j: maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998).

    λ is learnt and starts at 0.5; a negative one asks for likeness. scores and closest (B, M, K) → (B, M, K).
    """

    def __init__(self, hidden_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, scores: Tensor, closest: Tensor) -> Tensor:
        return scores - self.weight * closest


# option → name → (attribute, and so parameter prefix, of the part in the policy; its class), None for no part
VARIANTS: dict[str, dict[str, tuple[str, type[nn.Module]] | None]] = {
    "state_update": {"none": None, "gate": ("query_update_gate", GateUpdate), "gru": ("query_update_gru", GruUpdate)},
    "scorer": {
        "dot": None,
        "additive": ("additive_scorer", AdditiveScorer),
        "bilinear": ("bilinear_scorer", BilinearScorer),
    },
    "diversity": {"none": None, "mmr": ("mmr_penalty", MmrPenalty)},
}
