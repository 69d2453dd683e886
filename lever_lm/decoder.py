"""What happens to the query state from one pick to the next: the parts of the policy that differ between variants.

B queries, M sequences per query (1 when selecting), H hidden. A state update is a module
(state (B, M, H), pick (B, M, H)) → state (B, M, H); both are unit vectors and stay so.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GateUpdate(nn.Linear):
    """s ← norm(g ⊙ s + (1 − g) ⊙ v_pick) with g = σ(W[s; v_pick] + b): the gated policy of Lever-Plus."""

    def __init__(self, hidden_dim: int):
        super().__init__(2 * hidden_dim, hidden_dim)
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, state: Tensor, pick: Tensor) -> Tensor:
        gate = torch.sigmoid(super().forward(torch.cat([state, pick], -1)))
        return F.normalize(gate * state + (1 - gate) * pick, dim=-1)


# name → (attribute, and so parameter prefix, of the module in the policy; the module's class)
STATE_UPDATES: dict[str, tuple[str, type[nn.Module]] | None] = {
    "none": None,
    "gate": ("query_update_gate", GateUpdate),
}
