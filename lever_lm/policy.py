"""The policy: a pointer over a pool of candidates, step by step.

B queries, K candidates in the pool, G rollouts per query, S shots, D embedding, H hidden.
pool_mask (B, K) bool, True on real candidates. Sequences hold pool positions; −1 is padding and counts as no step.
Maths: x = W_in q, e = W_in c; per layer x ← LayerNorm(MHA(x; e, e) + x); u = norm(W_q x), v = norm(W_c e);
logit_k = u·v_k / temperature. Masking lives here and only here: a picked or padded candidate has logit −100.
Deviation from the lineage: candidates are projected once per query, not once per rollout, so training-mode dropout is
drawn once per query.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lever_lm.decoder import STATE_UPDATES

MASKED_LOGIT = -100.0


class PointerSelector(nn.Module):
    """Scores the candidates of a pool and picks demonstrations one after the other.

    d_model D of the features; hidden_dim H (W_in is absent when D = H); num_layers cross-attention layers;
    state_update: how a pick changes the query state, one of decoder.STATE_UPDATES. Parameter names are those of
    Lever-Plus's v3 checkpoints. Raises ValueError on a shape or name that cannot be.
    """

    def __init__(
        self,
        d_model: int = 768,
        hidden_dim: int = 256,
        num_layers: int = 1,
        num_heads: int = 1,
        dropout: float = 0.5,
        attn_dropout: float = 0.1,
        temperature: float = 0.1,
        state_update: str = "none",
    ):
        super().__init__()
        if state_update not in STATE_UPDATES:
            raise ValueError(f"unknown state_update {state_update!r}; choose one of {', '.join(STATE_UPDATES)}")
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim {hidden_dim} is not divisible by num_heads {num_heads}")
        self.d_model, self.hidden_dim, self.num_layers, self.num_heads = d_model, hidden_dim, num_layers, num_heads
        self.dropout, self.attn_dropout, self.temperature = dropout, attn_dropout, temperature
        self.state_update = state_update
        self.input_proj = nn.Linear(d_model, hidden_dim, bias=False) if d_model != hidden_dim else None
        self.cross_attn_layers = nn.ModuleList(nn.MultiheadAttention(hidden_dim, num_heads) for _ in range(num_layers))
        self.attn_norms = nn.ModuleList(nn.LayerNorm(hidden_dim) for _ in range(num_layers))
        self.query_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.cand_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        update = STATE_UPDATES[state_update]
        if update is not None:
            self.add_module(update[0], update[1](hidden_dim))
        self._init_projections()

    def _init_projections(self) -> None:
        """Near-identity scoring: the untrained policy ranks by cosine similarity."""
        with torch.no_grad():
            if self.input_proj is not None:
                nn.init.xavier_uniform_(self.input_proj.weight)
            for projection in (self.query_proj, self.cand_proj):
                noise = 0.01 * torch.randn(self.hidden_dim, self.hidden_dim)
                projection.weight.copy_(torch.eye(self.hidden_dim) + noise)

    @property
    def shape(self) -> dict:
        """The constructor's arguments, as a checkpoint carries them."""
        names = ("d_model", "hidden_dim", "num_layers", "num_heads", "dropout", "attn_dropout", "temperature")
        return {name: getattr(self, name) for name in (*names, "state_update")}

    def _update(self, state: Tensor, pick: Tensor) -> Tensor:
        update = STATE_UPDATES[self.state_update]
        return state if update is None else getattr(self, update[0])(state, pick)

    # ------------------------------------------------------------------ encoding

    def _attend(self, layer: nn.MultiheadAttention, x: Tensor, e: Tensor, pool_mask: Tensor | None) -> Tensor:
        """Multi-head attention of one query vector over its pool: x (B, H), e (B, K, H) → (B, H).

        Equal to the module's own forward, with the key projection folded into the query and the value projection
        applied after pooling: two products of H² a query instead of two of K·H². The key bias cancels in softmax.
        """
        batch, heads, size = x.shape[0], self.num_heads, self.hidden_dim // self.num_heads
        w_q, w_k, w_v = layer.in_proj_weight.view(3, heads, size, self.hidden_dim)
        b_q, _, b_v = layer.in_proj_bias.view(3, heads, size)
        query = (torch.einsum("bh,nsh->bns", x, w_q) + b_q) / math.sqrt(size)
        scores = torch.einsum("bnh,bkh->bnk", torch.einsum("bns,nsh->bnh", query, w_k), e)
        if pool_mask is not None:
            scores = scores.masked_fill(~pool_mask.unsqueeze(1), -torch.inf)
        weights = F.dropout(scores.softmax(-1), self.attn_dropout, self.training)
        pooled = torch.einsum("bnk,bkh->bnh", weights, e)
        # With attention dropout the weights do not sum to one, and the value bias is scaled as the weights are.
        values = torch.einsum("bnh,nsh->bns", pooled, w_v) + b_v * weights.sum(-1, keepdim=True)
        return layer.out_proj(values.reshape(batch, self.hidden_dim))

    def _project(self, projection: nn.Linear, x: Tensor) -> Tensor:
        """Dropout stands before the projection in the gated policy and after it in the plain one, as in the lineage."""
        if self.state_update == "none":
            return F.dropout(projection(x), self.dropout, self.training)
        return projection(F.dropout(x, self.dropout, self.training))

    def encode(self, query: Tensor, candidates: Tensor, pool_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """query (B, D), candidates (B, K, D) → unit query state (B, H) and unit candidates (B, K, H)."""
        x, e = query, candidates
        if self.input_proj is not None:
            x, e = self.input_proj(x), self.input_proj(e)
        for layer, norm in zip(self.cross_attn_layers, self.attn_norms, strict=True):
            x = norm(self._attend(layer, x, e, pool_mask) + x)
        state = F.normalize(self._project(self.query_proj, x), dim=-1)
        return state, F.normalize(self._project(self.cand_proj, e), dim=-1)

    # ------------------------------------------------------------------ scoring

    def _score(self, state: Tensor, cands: Tensor, taken: Tensor) -> Tensor:
        """state (B, M, H), cands (B, K, H), taken (B, M, K) bool → logits (B, M, K)."""
        logits = torch.einsum("bmh,bkh->bmk", state, cands) / self.temperature
        return logits.masked_fill(taken, MASKED_LOGIT)

    def _teacher_forced(self, query: Tensor, candidates: Tensor, sequences: Tensor, pool_mask: Tensor | None) -> Tensor:
        """Logits of every step of every sequence: sequences (B, G, S) → (B, G, S, K)."""
        batch, group, shots = sequences.shape
        start, cands = self.encode(query, candidates, pool_mask)
        state = start.unsqueeze(1).expand(-1, group, -1)
        taken = _unavailable(batch, group, candidates.shape[1], pool_mask, query.device)
        steps = []
        for t in range(shots):
            steps.append(self._score(state, cands, taken))
            pick, real = sequences[..., t].clamp(min=0), sequences[..., t : t + 1] >= 0
            if t + 1 < shots:
                taken = taken | (F.one_hot(pick, taken.shape[-1]).bool() & real)
                state = torch.where(real, self._update(state, _gather(cands, pick)), state)
        return torch.stack(steps, 2)

    def log_prob(
        self,
        query: Tensor,
        candidates: Tensor,
        sequences: Tensor,
        pool_mask: Tensor | None = None,
        *,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Log-probability of whole sequences, summed over their steps.

        query (B, D), candidates (B, K, D), sequences (B, G, S) long, pool_mask (B, K) → (B, G). `temperature` is that
        of `sample`: the log-probability with which it draws. With label_smoothing ε a step gives
        (1 − ε) log p(pick) + ε · mean_k log p(k), whose negative is the smoothed cross-entropy.
        """
        logits = self._teacher_forced(query, candidates, sequences, pool_mask)
        log_probs = (logits / temperature).log_softmax(-1)
        picked = log_probs.gather(-1, sequences.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        if label_smoothing:
            # With padding the mean is over the real candidates, so that padding a pool changes nothing.
            real = torch.ones_like(candidates[..., 0], dtype=torch.bool) if pool_mask is None else pool_mask
            weights = (real / real.sum(-1, keepdim=True))[:, None, None]
            picked = (1 - label_smoothing) * picked + label_smoothing * (log_probs * weights).sum(-1)
        return picked.masked_fill(sequences < 0, 0).sum(-1)

    def logits(self, query: Tensor, candidates: Tensor, sequences: Tensor, pool_mask: Tensor | None = None) -> Tensor:
        """Teacher-forced logits of one sequence per query: sequences (B, S) → (B, S, K); masked positions −100."""
        return self._teacher_forced(query, candidates, sequences.unsqueeze(1), pool_mask).squeeze(1)

    # ------------------------------------------------------------------ choosing

    @torch.no_grad()
    def select(self, query: Tensor, candidates: Tensor, shots: int, pool_mask: Tensor | None = None) -> Tensor:
        """Greedy picks, the first pick first: (B, S) long. Raises ValueError when a pool is smaller than `shots`."""
        return self._roll(query, candidates, shots, pool_mask, 1, lambda logits: logits.argmax(-1)).squeeze(1)

    @torch.no_grad()
    def sample(
        self,
        query: Tensor,
        candidates: Tensor,
        shots: int,
        pool_mask: Tensor | None = None,
        *,
        num_samples: int = 1,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Picks drawn from the policy at a temperature: (B, num_samples, S) long, without repeats in a sequence."""

        def draw(logits: Tensor) -> Tensor:
            # A masked candidate must stay impossible at any temperature.
            probs = (logits / temperature).masked_fill(logits <= MASKED_LOGIT, -torch.inf).softmax(-1)
            return torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(logits.shape[:2])

        return self._roll(query, candidates, shots, pool_mask, num_samples, draw)

    @torch.no_grad()
    def beams(
        self, query: Tensor, candidates: Tensor, shots: int, width: int, pool_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The `width` likeliest sequences by beam search, best first: sequences (B, W, S), log-probs (B, W) and sums of
        step probabilities (B, W). W is smaller than `width` where there are fewer sequences."""
        batch, pool = candidates.shape[:2]
        _check_shots(shots, candidates, pool_mask)
        state, cands = self.encode(query, candidates, pool_mask)
        state = state.unsqueeze(1)
        taken = _unavailable(batch, 1, pool, pool_mask, query.device)
        picks = torch.zeros(batch, 1, 0, dtype=torch.long, device=query.device)
        log_probs = probs = torch.zeros(batch, 1, device=query.device)
        for _ in range(shots):
            steps = self._score(state, cands, taken).log_softmax(-1).masked_fill(taken, -torch.inf)
            total = (log_probs.unsqueeze(-1) + steps).flatten(1)
            possible = int((~taken).flatten(1).sum(-1).min())
            log_probs, flat = total.topk(min(width, possible), -1)
            parent, pick = flat // pool, flat % pool
            probs = probs.gather(1, parent) + steps.flatten(1).gather(1, flat).exp()
            picks = torch.cat([_gather(picks, parent), pick.unsqueeze(-1)], -1)
            taken = taken.gather(1, parent.unsqueeze(-1).expand(-1, -1, pool)) | F.one_hot(pick, pool).bool()
            state = self._update(_gather(state, parent), _gather(cands, pick))
        return picks, log_probs, probs

    def _roll(self, query, candidates, shots, pool_mask, num_samples, choose) -> Tensor:
        """Pick step by step with `choose`: logits (B, M, K) → (B, M)."""
        _check_shots(shots, candidates, pool_mask)
        start, cands = self.encode(query, candidates, pool_mask)
        state = start.unsqueeze(1).expand(-1, num_samples, -1)
        taken = _unavailable(query.shape[0], num_samples, candidates.shape[1], pool_mask, query.device)
        picks = []
        for _ in range(shots):
            pick = choose(self._score(state, cands, taken))
            picks.append(pick)
            taken = taken | F.one_hot(pick, taken.shape[-1]).bool()
            state = self._update(state, _gather(cands, pick))
        return torch.stack(picks, -1)


def _check_shots(shots: int, candidates: Tensor, pool_mask: Tensor | None) -> None:
    size = candidates.shape[1] if pool_mask is None else int(pool_mask.sum(-1).min())
    if not 1 <= shots <= size:
        raise ValueError(f"cannot pick {shots} shots from a pool of {size} candidates")


def _unavailable(batch: int, group: int, pool: int, pool_mask: Tensor | None, device) -> Tensor:
    """(B, G, K) bool, True where a candidate may not be picked before the first step: on padding."""
    if pool_mask is None:
        return torch.zeros(batch, group, pool, dtype=torch.bool, device=device)
    return (~pool_mask).unsqueeze(1).expand(-1, group, -1)


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows (B, K, H), index (B, M) → (B, M, H)."""
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
