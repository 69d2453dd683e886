"""The policy: a pointer over a pool of candidates, step by step.

B queries, K candidates in the pool, G rollouts per query, S shots, D embedding, H hidden; M sequences decoded side by
side for each query. pool_mask (B, K) bool, True on real candidates. Sequences hold pool positions; −1 is padding and
counts as no step, but with `stop` the first −1 after a pick is the decision to stop, and does count.
Maths: with the unit query u and the unit candidates v of encoder.py, logit_k = u·v_k / temperature. Masking lives here
and only here: a picked or padded candidate has logit −100. Deviation from the lineage: candidates are projected once
per query, not once per rollout, so training-mode dropout is drawn once per query.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lever_lm.selectors.pointer.encoder import Encoder, Noise
from lever_lm.selectors.pointer.variants import VARIANTS

MASKED_LOGIT = -100.0


@dataclass(frozen=True)
class _Decoding:
    """M half-made sequences per query, one that stands for all before the first pick. O options: the K candidates and,
    with `stop`, the stop after them.

    cands (B, O, H) and their lengths (B, O); state (B, M, H), or (B, 1, H) where picks do not change it; scores
    (B, M or 1, O) of that state; closest (B, M, O), likeness to the nearest pick, None before there is one or where it
    does not matter; taken (B, M, O), True on what may not be picked.
    """

    cands: Tensor
    lengths: Tensor
    state: Tensor
    scores: Tensor
    closest: Tensor | None
    taken: Tensor


class PointerSelector(Encoder):
    """Scores the candidates of a pool and picks demonstrations one after the other.

    Sizes and dropout as in Encoder. Variants, their parts in decoder.VARIANTS: state_update (none, gate, gru) is how a
    pick changes the query state; scorer (dot, additive, bilinear) how a state scores a candidate; diversity (none, mmr)
    what likeness to the picks costs; stop lets the policy end a sequence after its first pick. Parameter names are
    those of Lever-Plus's v3 checkpoints. Raises ValueError on a shape or name that cannot be.
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
        scorer: str = "dot",
        diversity: str = "none",
        stop: bool = False,
    ):
        variants = {"state_update": state_update, "scorer": scorer, "diversity": diversity}
        for option, known in VARIANTS.items():
            if variants[option] not in known:
                raise ValueError(f"unknown {option} {variants[option]!r}; choose one of {', '.join(known)}")
        sizes = (d_model, hidden_dim, num_layers, num_heads)
        super().__init__(*sizes, dropout, attn_dropout, dropout_last=state_update == "none")
        self.state_update, self.scorer, self.diversity, self.stop = state_update, scorer, diversity, stop
        self.temperature = temperature
        for option, known in VARIANTS.items():
            if (part := known[getattr(self, option)]) is not None:
                self.add_module(part[0], part[1](hidden_dim))
        if stop:
            self.stop_embedding = nn.Parameter(torch.randn(hidden_dim))
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
        return {name: getattr(self, name) for name in (*names, *VARIANTS, "stop")}

    def _part(self, option: str) -> nn.Module | None:
        part = VARIANTS[option][getattr(self, option)]
        return None if part is None else getattr(self, part[0])

    # ------------------------------------------------------------------ decoding

    def _begin(
        self, query: Tensor, candidates: Tensor, pool_mask: Tensor | None, noise: Noise | None = None
    ) -> _Decoding:
        """The empty sequence of each query."""
        state, cands = self.encode_raw(query, candidates, pool_mask, noise)
        batch, pool = candidates.shape[:2]
        taken = torch.zeros(batch, pool, dtype=torch.bool, device=query.device) if pool_mask is None else ~pool_mask
        if self.stop:
            cands, taken = (
                torch.cat([cands, self.stop_embedding.expand(batch, 1, -1)], 1),
                F.pad(taken, (0, 1), value=True),
            )
        lengths = cands.norm(dim=-1).clamp(min=1e-12)
        state = state.unsqueeze(1)
        return _Decoding(cands, lengths, state, self._scores(state, cands, lengths), None, taken.unsqueeze(1))

    def _scores(self, state: Tensor, cands: Tensor, lengths: Tensor) -> Tensor:
        scorer = self._part("scorer")
        return _cosine(state, cands, lengths) if scorer is None else scorer(state, cands / lengths.unsqueeze(-1))

    def _logits(self, decoding: _Decoding) -> Tensor:
        """Logits of the next pick, (B, M, O)."""
        scores = decoding.scores
        if decoding.closest is not None:
            scores = self._part("diversity")(scores, decoding.closest)
        return torch.where(decoding.taken, MASKED_LOGIT, scores / self.temperature)

    def _advance(self, decoding: _Decoding, pick: Tensor, real: Tensor | None = None) -> _Decoding:
        """The sequences after one more pick, (B, M) of options; where `real` (B, M) is False nothing was picked."""
        cands, lengths, state, scores, closest, taken = vars(decoding).values()
        pool, real = cands.shape[1] - self.stop, torch.ones_like(pick, dtype=torch.bool) if real is None else real
        taken = taken | (F.one_hot(pick, cands.shape[1]).bool() & real.unsqueeze(-1))
        if self.stop:  # allowed from now on, and the only way on once it was chosen
            stopped = (pick == pool).unsqueeze(-1)
            taken = torch.cat([taken[..., :pool] | stopped, torch.zeros_like(stopped)], -1)
        if (update := self._part("state_update")) is not None:
            picked = _unit_rows(cands, pick)
            state = torch.where(real.unsqueeze(-1), update(state.expand_as(picked), picked), state)
            scores = self._scores(state, cands, lengths)
        if self._part("diversity") is not None:
            likeness = _cosine(_unit_rows(cands, pick), cands[:, :pool], lengths[:, :pool])
            likeness = F.pad(likeness, (0, int(self.stop)))  # to stop is like nothing
            closest = (
                likeness if closest is None else torch.where(real.unsqueeze(-1), closest.maximum(likeness), closest)
            )
        return _Decoding(cands, lengths, state, scores, closest, taken)

    def _follow(self, decoding: _Decoding, parent: Tensor) -> _Decoding:
        """New sequences, each going on from one of the old: parent (B, W) places among these."""
        cands, lengths, state, scores, closest, taken = vars(decoding).values()
        if self._part("state_update") is not None:
            state = _gather(state, parent)  # the scores are those of the state after the pick
        closest = None if closest is None else _gather(closest, parent)
        return _Decoding(cands, lengths, state, scores, closest, _gather(taken, parent))

    # ------------------------------------------------------------------ scoring

    def steps(
        self,
        query: Tensor,
        candidates: Tensor,
        sequences: Tensor,
        pool_mask: Tensor | None = None,
        *,
        noise: Noise | None = None,
    ) -> list[Tensor]:
        """Teacher-forced logits of every step: sequences (B, G, S) → S times (B, G, K), the first (B, 1, K), as all
        sequences of a query begin alike. Masked positions are −100. With `stop` there is one more column, the last."""
        decoding = self._begin(query, candidates, pool_mask, noise)
        steps = [self._logits(decoding)]
        for pick in sequences[..., :-1].unbind(-1):
            decoding = self._advance(decoding, pick.clamp(min=0), pick >= 0)
            steps.append(self._logits(decoding))
        return steps

    def step_logits(
        self, query: Tensor, candidates: Tensor, sequences: Tensor, pool_mask: Tensor | None = None
    ) -> Tensor:
        """`steps` as one tensor (B, G, S, K)."""
        steps = self.steps(query, candidates, sequences, pool_mask)
        return torch.stack([step.expand(-1, sequences.shape[1], -1) for step in steps], 2)

    def score(
        self,
        steps: list[Tensor],
        sequences: Tensor,
        pool_mask: Tensor | None = None,
        *,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """From `steps` of sequences (B, G, S): log_prob of whole sequences, and the entropy of their steps'
        distributions in nats, the mean over a sequence's steps: both (B, G). Arguments as in log_prob."""
        pool = steps[0].shape[-1] - self.stop
        labels, counted = sequences.clamp(min=0), sequences >= 0
        if self.stop:
            stops = ~counted & F.pad(counted, (1, 0))[..., :-1]  # no pick here, one just before
            labels, counted = labels.masked_fill(stops, pool), counted | stops
        total = entropy = torch.zeros_like(steps[0][..., 0])
        for logits, label, counts in zip(steps, labels.unbind(-1), counted.unbind(-1), strict=True):
            log_probs = _normalised(logits, temperature)
            picked = log_probs.expand(-1, label.shape[1], -1).gather(-1, label.unsqueeze(-1)).squeeze(-1)
            if label_smoothing:
                # With padding the mean is over the real candidates, so that padding a pool changes nothing.
                real = torch.ones_like(logits[:, 0, :pool], dtype=torch.bool) if pool_mask is None else pool_mask
                real = F.pad(real, (0, int(self.stop)), value=True)
                weights = (real / real.sum(-1, keepdim=True)).unsqueeze(1)
                picked = (1 - label_smoothing) * picked + label_smoothing * (log_probs * weights).sum(-1)
            total = total + picked.masked_fill(~counts, 0)
            entropy = entropy - (log_probs.exp() * log_probs).sum(-1) * counts
        return total, entropy / counted.sum(-1).clamp(min=1)

    def evaluate(
        self,
        query: Tensor,
        candidates: Tensor,
        sequences: Tensor,
        pool_mask: Tensor | None = None,
        *,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
        noise: Noise | None = None,
    ) -> tuple[Tensor, Tensor]:
        """log_prob and entropy of whole sequences, as `score` has them; noise as in `encode`."""
        steps = self.steps(query, candidates, sequences, pool_mask, noise=noise)
        return self.score(steps, sequences, pool_mask, temperature=temperature, label_smoothing=label_smoothing)

    def log_prob(
        self,
        query: Tensor,
        candidates: Tensor,
        sequences: Tensor,
        pool_mask: Tensor | None = None,
        *,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
        noise: Noise | None = None,
    ) -> Tensor:
        """Log-probability of whole sequences, summed over their steps.

        query (B, D), candidates (B, K, D), sequences (B, G, S) long, pool_mask (B, K) → (B, G). `temperature` is that
        of `sample`: the log-probability with which it draws. With label_smoothing ε a step gives
        (1 − ε) log p(pick) + ε · mean_k log p(k), whose negative is the smoothed cross-entropy. With `stop`, a sequence
        shorter than S includes its decision to stop. noise: the dropout, drawn if None.
        """
        options = {"temperature": temperature, "label_smoothing": label_smoothing, "noise": noise}
        return self.evaluate(query, candidates, sequences, pool_mask, **options)[0]

    def logits(self, query: Tensor, candidates: Tensor, sequences: Tensor, pool_mask: Tensor | None = None) -> Tensor:
        """step_logits of one sequence per query: sequences (B, S) → (B, S, K)."""
        return self.step_logits(query, candidates, sequences.unsqueeze(1), pool_mask).squeeze(1)

    # ------------------------------------------------------------------ choosing

    @torch.no_grad()
    def select(self, query: Tensor, candidates: Tensor, shots: int, pool_mask: Tensor | None = None) -> Tensor:
        """Greedy picks, the first pick first: (B, S) long, −1 after a stop. Raises ValueError when a pool is smaller
        than `shots`."""
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
        """Picks drawn from the policy at a temperature: (B, num_samples, S) long, without repeats in a sequence, −1
        after a stop."""

        def draw(logits: Tensor) -> Tensor:
            probs = (logits / temperature).softmax(-1)
            return torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(logits.shape[:2])

        return self._roll(query, candidates, shots, pool_mask, num_samples, draw)

    @torch.no_grad()
    def beams(
        self, query: Tensor, candidates: Tensor, shots: int, width: int, pool_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The `width` likeliest sequences by beam search, best first: sequences (B, W, S), −1 after a stop, log-probs
        (B, W) and sums of step probabilities (B, W). W is smaller than `width` where there are fewer sequences."""
        _check_shots(shots, candidates, pool_mask)
        batch, pool = candidates.shape[:2]
        decoding = self._begin(query, candidates, pool_mask)
        picks = torch.zeros(batch, 1, 0, dtype=torch.long, device=query.device)
        log_probs = probs = torch.zeros(batch, 1, device=query.device)
        for _ in range(shots):
            steps = _normalised(self._logits(decoding)).masked_fill(decoding.taken, -torch.inf)
            total = (log_probs.unsqueeze(-1) + steps).flatten(1)
            possible = int((~decoding.taken).flatten(1).sum(-1).min())
            log_probs, flat = total.topk(min(width, possible), -1)
            options = steps.shape[-1]
            parent, pick = flat // options, flat % options
            ended = (_gather(picks, parent)[..., -1:] < 0).any(-1)
            probs = probs.gather(1, parent) + steps.flatten(1).gather(1, flat).exp().masked_fill(ended, 0)
            picks = torch.cat([_gather(picks, parent), pick.masked_fill(pick == pool, -1).unsqueeze(-1)], -1)
            decoding = self._advance(self._follow(decoding, parent), pick)
        return picks, log_probs, probs

    def _roll(self, query, candidates, shots, pool_mask, num_samples, choose) -> Tensor:
        """Pick step by step with `choose`: logits (B, M, O), −inf where nothing may be picked, → (B, M)."""
        _check_shots(shots, candidates, pool_mask)
        decoding, picks = self._begin(query, candidates, pool_mask), []
        for _ in range(shots):
            logits = self._logits(decoding).masked_fill(decoding.taken, -torch.inf)
            pick = choose(logits.expand(-1, num_samples, -1))
            picks.append(pick.masked_fill(pick == candidates.shape[1], -1))
            decoding = self._advance(decoding, pick)
        return torch.stack(picks, -1)


def _normalised(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of a step, (…, O): as `sample` draws, a masked candidate has no share in the sum. Its own stays finite,
    so that a logged sequence with a repeated pick has a log-prob and a gradient."""
    logits, masked = logits / temperature, logits == MASKED_LOGIT
    masked = masked & ~masked.all(-1, keepdim=True)  # a pool that is used up: nothing to choose, and nothing infinite
    return logits - logits.masked_fill(masked, torch.finfo(logits.dtype).min).logsumexp(-1, keepdim=True)


def _check_shots(shots: int, candidates: Tensor, pool_mask: Tensor | None) -> None:
    size = candidates.shape[1] if pool_mask is None else int(pool_mask.sum(-1).min())
    if not 1 <= shots <= size:
        raise ValueError(f"cannot pick {shots} shots from a pool of {size} candidates")


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows (B, K, H), index (B, M) → (B, M, H)."""
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def _unit_rows(rows: Tensor, index: Tensor) -> Tensor:
    return F.normalize(_gather(rows, index), dim=-1)


def _cosine(units: Tensor, rows: Tensor, lengths: Tensor) -> Tensor:
    """units (B, M, H), rows (B, K, H) of these lengths (B, K) → (B, M, K). To divide the products by the lengths costs
    less than to divide the rows, and in the backward pass far less."""
    return units @ rows.transpose(1, 2) / lengths.unsqueeze(1)
