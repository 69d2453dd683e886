"""The encoder of the policy: a query attends to its pool, and query and candidates become vectors of one space.

B queries, K candidates in the pool, D embedding, H hidden. x = W_in q, e = W_in c; per layer
x ← LayerNorm(MHA(x; e, e) + x); then W_q x and W_c e, with dropout. What is linear is multiplied out in the cheaper
order, which changes rounding and nothing else: the attention's key projection is folded into the query, its value
projection comes after pooling, W_c·W_in is one matrix.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Noise:
    """The dropout of one pass, as the factors 0 and 1 / (1 − p) that it multiplies by; None where nothing is dropped.
    Two policies that are given the same noise drop the same units."""

    attention: list[Tensor | None]  # (B, heads, K) of each layer
    query: Tensor | None  # (B, H)
    candidates: Tensor | None  # (B, K, H)


class Encoder(nn.Module):
    """The part of a policy before its picks. d_model: D of the features; hidden_dim: H (W_in is absent when D = H).

    dropout_last: dropout follows the projections W_q and W_c, as in the lineage's plain policy; else it stands before
    them, as in the gated one. Raises ValueError where the heads do not divide H.
    """

    def __init__(
        self,
        d_model: int,
        hidden_dim: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        attn_dropout: float,
        dropout_last: bool,
    ):
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim {hidden_dim} is not divisible by num_heads {num_heads}")
        self.d_model, self.hidden_dim, self.num_layers, self.num_heads = d_model, hidden_dim, num_layers, num_heads
        self.dropout, self.attn_dropout, self.dropout_last = dropout, attn_dropout, dropout_last
        self.input_proj = nn.Linear(d_model, hidden_dim, bias=False) if d_model != hidden_dim else None
        self.cross_attn_layers = nn.ModuleList(nn.MultiheadAttention(hidden_dim, num_heads) for _ in range(num_layers))
        self.attn_norms = nn.ModuleList(nn.LayerNorm(hidden_dim) for _ in range(num_layers))
        self.query_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.cand_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)

    def draw_noise(self, query: Tensor, candidates: Tensor) -> Noise:
        """The dropout of a pass over query (B, …) and candidates (B, K, …), from torch's global generator; none in eval
        mode."""
        batch, pool = candidates.shape[:2]

        def draw(p: float, *shape: int) -> Tensor | None:
            if not self.training or not p:
                return None
            if query.is_cuda:
                return query.new_empty(shape).bernoulli_(1 - p).div_(1 - p)
            # On a CPU bernoulli_ draws and compares these same numbers, but takes twice as long.
            return (torch.rand(shape, dtype=torch.float64) < 1 - p).to(query).div_(1 - p)

        attention = [draw(self.attn_dropout, batch, self.num_heads, pool) for _ in self.cross_attn_layers]
        query_mask = draw(self.dropout, batch, self.hidden_dim)
        return Noise(attention, query_mask, draw(self.dropout, batch, pool, self.hidden_dim))

    def _attend(
        self, layer: nn.MultiheadAttention, x: Tensor, c: Tensor, pool_mask: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        """Multi-head attention of one query vector over its pool: x (B, H), c (B, K, D) → (B, H).

        Equal to the module's own forward over W_in c, with W_in and the key projection folded into the query, and W_in
        and the value projection applied after pooling. The key bias cancels in softmax.
        """
        batch, heads, size = x.shape[0], self.num_heads, self.hidden_dim // self.num_heads
        w_q, w_k, w_v = layer.in_proj_weight.view(3, heads, size, self.hidden_dim)
        b_q, _, b_v = layer.in_proj_bias.view(3, heads, size)
        query = (torch.einsum("bh,nsh->bns", x, w_q) + b_q) / math.sqrt(size)
        query = torch.einsum("bns,nsh->bnh", query, w_k)
        if self.input_proj is not None:
            query = query @ self.input_proj.weight
        scores = query @ c.transpose(1, 2)
        if pool_mask is not None:
            scores = scores.masked_fill(~pool_mask.unsqueeze(1), -torch.inf)
        weights = _times(scores.softmax(-1), noise)
        pooled = weights @ c
        if self.input_proj is not None:
            pooled = self.input_proj(pooled)
        # With attention dropout the weights do not sum to one, and the value bias is scaled as the weights are.
        values = torch.einsum("bnh,nsh->bns", pooled, w_v) + b_v * weights.sum(-1, keepdim=True)
        return layer.out_proj(values.reshape(batch, self.hidden_dim))

    def _project_query(self, x: Tensor, noise: Tensor | None) -> Tensor:
        return _times(self.query_proj(x), noise) if self.dropout_last else self.query_proj(_times(x, noise))

    def _project_candidates(self, c: Tensor, noise: Tensor | None) -> Tensor:
        """c (B, K, D), or (B, K, 2H) from `project`, → (B, K, H)."""
        if self.cand_proj is None:
            return _times(c[..., self.hidden_dim :], noise)
        if self.input_proj is None:
            return _times(self.cand_proj(c), noise) if self.dropout_last else self.cand_proj(_times(c, noise))
        if not self.dropout_last:
            return self.cand_proj(_times(self.input_proj(c), noise))
        if c.shape[0] * c.shape[1] > self.d_model:  # W_c·W_in costs less than one more product for each candidate
            return _times(F.linear(c, self.cand_proj.weight @ self.input_proj.weight), noise)
        return _times(self.cand_proj(self.input_proj(c)), noise)

    def encode(
        self, query: Tensor, candidates: Tensor, pool_mask: Tensor | None = None, noise: Noise | None = None
    ) -> tuple[Tensor, Tensor]:
        """query (B, D), candidates (B, K, D) → unit query state (B, H) and candidates (B, K, H) at their own lengths.
        noise: the dropout, drawn if None."""
        noise = self.draw_noise(query, candidates) if noise is None else noise
        x = query if self.input_proj is None else self.input_proj(query)
        attended = candidates if self.cand_proj is not None else candidates[..., : self.hidden_dim]
        for layer, norm, mask in zip(self.cross_attn_layers, self.attn_norms, noise.attention, strict=True):
            x = norm(self._attend(layer, x, attended, pool_mask, mask) + x)
        state = F.normalize(self._project_query(x, noise.query), dim=-1)
        return state, self._project_candidates(candidates, noise.candidates)

    # ------------------------------------------------------------------ features projected once

    def after_input(self) -> "Encoder":
        """Return this module for features that input_proj has projected already: the same parameters, no copy."""
        inner = self._without("input_proj")
        inner.d_model = self.hidden_dim
        return inner

    @torch.no_grad()
    def project(self, queries: Tensor, icds: Tensor) -> tuple["Encoder", Tensor, Tensor]:
        """Project features that are looked up often once; no gradient goes back to the projections.

        Returns the module without them, sharing all other parameters, and what it takes in place of features: queries
        (N, D) → (N, H), icds (N, D) → (N, H), or (N, 2H) where no dropout precedes cand_proj: what the attention reads
        beside what is scored.
        """
        inner = self
        if self.input_proj is not None:
            inner, queries, icds = self.after_input(), self.input_proj(queries), self.input_proj(icds)
        if self.cand_proj is not None and self.dropout_last:
            inner, icds = inner._without("cand_proj"), torch.cat([icds, self.cand_proj(icds)], -1)
        return inner, queries, icds

    def _without(self, projection: str) -> "Encoder":
        inner = copy.copy(self)
        inner._modules = {**self._modules, projection: None}
        return inner


def _times(x: Tensor, noise: Tensor | None) -> Tensor:
    return x if noise is None else x * noise
