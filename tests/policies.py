"""Policies for tests: saved with weights of their own, and compared by their logits."""

from pathlib import Path

import torch

from lever_lm.selectors.pointer.checkpoint import save_torch, v3_content
from lever_lm.selectors.pointer.model import PointerSelector


def saved(path: Path, **shape) -> Path:
    """A v3 file of a policy whose every weight is its own."""
    torch.manual_seed(3)
    policy = PointerSelector(**{"d_model": 6, "hidden_dim": 8, **shape})
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    content = v3_content(
        policy, epoch=4, phase="grpo", kl_beta=0.1, metrics={}, config={"encoder": "clip@1", "seed": 5}
    )
    save_torch(path, content)
    return path


def logits(policy: PointerSelector) -> torch.Tensor:
    torch.manual_seed(1)
    query, candidates = torch.randn(3, policy.d_model), torch.randn(3, 7, policy.d_model)
    return policy.logits(query, candidates, torch.tensor([[0, 3, 4], [5, 1, -1], [2, 6, 0]]))
