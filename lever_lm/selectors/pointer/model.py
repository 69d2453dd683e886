"""The policy: a pointer over a pool of candidates, step by step.

B queries, K candidates in the pool, G rollouts per query, S shots, D embedding; M sequences decoded side by side for
each query, O options of a step: the candidates and, with `stop`, the stop. pool_mask (B, K) bool, True on real
candidates. Sequences hold pool positions; −1 is padding and counts as no step, but with `stop` the first −1 after a
pick is the decision to stop, and does count. Deviation from the lineage: candidates are projected once per query, not
once per rollout, so training-mode dropout is drawn once per query.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lever_lm.selectors.pointer.decoding import MASKED_LOGIT, Decoding, gather_rows
from lever_lm.selectors.pointer.encoder import Encoder, Noise
from lever_lm.selectors.pointer.variants import VARIANTS


class PointerSelector(Encoder):
    """Scores the candidates of a pool and picks demonstrations one after the other.

    Sizes and dropout as in Encoder. Variants, their parts in variants.VARIANTS: state_update (none, gate, gru) is how a
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

    def widened(self, columns: int) -> "PointerSelector":
        """Return a copy for features with more columns, to which it gives no weight: it chooses as this policy does.
        Raises ValueError where D becomes H, for which there is no W_in."""
        if self.d_model + columns == self.hidden_dim:
            raise ValueError(
                f"hidden_dim {self.hidden_dim} is the size of the features with {columns} candidate_features, which "
                "needs another one"
            )
        wide = PointerSelector(**{**self.shape, "d_model": self.d_model + columns})
        entry = torch.eye(self.hidden_dim) if self.input_proj is None else self.input_proj.weight
        wide.load_state_dict({**self.state_dict(), "input_proj.weight": F.pad(entry.detach(), (0, columns))})
        return wide

    @property
    def shape(self) -> dict:
        """The constructor's arguments, as a checkpoint carries them."""
        names = ("d_model", "hidden_dim", "num_layers", "num_heads", "dropout", "attn_dropout", "temperature")
        return {name: getattr(self, name) for name in (*names, *VARIANTS, "stop")}

    def part(self, option: str) -> nn.Module | None:
        """The module that a variant option stands for, None where its value has none."""
        part = VARIANTS[option][getattr(self, option)]
        return None if part is None else getattr(self, part[0])

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
        decoding = Decoding.begin(self, query, candidates, pool_mask, noise)
        steps = [decoding.logits()]
        for pick in sequences[..., :-1].unbind(-1):
            decoding = decoding.advance(pick.clamp(min=0), pick >= 0)
            steps.append(decoding.logits())
        return steps

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
        noise: Noise | None = None,
        **options: float,
    ) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy of whole sequences, as `score` returns them; arguments as in `log_prob`."""
        steps = self.steps(query, candidates, sequences, pool_mask, noise=noise)
        return self.score(steps, sequences, pool_mask, **options)

    def log_prob(
        self, query: Tensor, candidates: Tensor, sequences: Tensor, pool_mask: Tensor | None = None, **options
    ) -> Tensor:
        """Log-probability of whole sequences, summed over their steps.

        query (B, D), candidates (B, K, D), sequences (B, G, S) long, pool_mask (B, K) → (B, G). Options: `temperature`
        (1.0) is that of `sample`: the log-probability with which it draws. With `label_smoothing` ε (0.0) a step gives
        (1 − ε) log p(pick) + ε · mean_k log p(k), whose negative is the smoothed cross-entropy. `noise`: the dropout,
        drawn if None. With `stop`, a sequence shorter than S includes its decision to stop.
        """
        return self.evaluate(query, candidates, sequences, pool_mask, **options)[0]

    def logits(self, query: Tensor, candidates: Tensor, sequences: Tensor, pool_mask: Tensor | None = None) -> Tensor:
        """Teacher-forced logits of one sequence per query: sequences (B, S) → (B, S, K), as in `steps`."""
        return torch.cat(self.steps(query, candidates, sequences.unsqueeze(1), pool_mask), 1)

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
        decoding = Decoding.begin(self, query, candidates, pool_mask)
        picks = torch.zeros(batch, 1, 0, dtype=torch.long, device=query.device)
        log_probs = probs = torch.zeros(batch, 1, device=query.device)
        for _ in range(shots):
            steps = _normalised(decoding.logits()).masked_fill(decoding.taken, -torch.inf)
            total = (log_probs.unsqueeze(-1) + steps).flatten(1)
            possible = int((~decoding.taken).flatten(1).sum(-1).min())
            log_probs, flat = total.topk(min(width, possible), -1)
            options = steps.shape[-1]
            parent, pick = flat // options, flat % options
            ended = (gather_rows(picks, parent)[..., -1:] < 0).any(-1)
            probs = probs.gather(1, parent) + steps.flatten(1).gather(1, flat).exp().masked_fill(ended, 0)
            picks = torch.cat([gather_rows(picks, parent), pick.masked_fill(pick == pool, -1).unsqueeze(-1)], -1)
            decoding = decoding.follow(parent).advance(pick)
        return picks, log_probs, probs

    def _roll(self, query, candidates, shots, pool_mask, num_samples, choose) -> Tensor:
        """Pick step by step with `choose`: logits (B, M, O), −inf where nothing may be picked, → (B, M)."""
        _check_shots(shots, candidates, pool_mask)
        decoding, picks = Decoding.begin(self, query, candidates, pool_mask), []
        for _ in range(shots):
            logits = decoding.logits().masked_fill(decoding.taken, -torch.inf)
            pick = choose(logits.expand(-1, num_samples, -1))
            picks.append(pick.masked_fill(pick == candidates.shape[1], -1))
            decoding = decoding.advance(pick)
        return torch.stack(picks, -1)


def _normalised(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of a step, (…, O): as `sample` draws, a masked candidate has no share in the sum. Its own stays finite,
    so that a logged sequence with a repeated pick has a log-prob and a gradient."""
    logits, masked, least = logits / temperature, logits == MASKED_LOGIT, torch.finfo(logits.dtype).min
    total = logits.masked_fill(masked, least).logsumexp(-1, keepdim=True)
    # A pool that is used up: nothing to choose, and nothing infinite.
    return logits - total.masked_fill(total == least, MASKED_LOGIT / temperature + math.log(logits.shape[-1]))


def _check_shots(shots: int, candidates: Tensor, pool_mask: Tensor | None) -> None:
    size = candidates.shape[1] if pool_mask is None else int(pool_mask.sum(-1).min())
    if not 1 <= shots <= size:
        raise ValueError(f"cannot pick {shots} shots from a pool of {size} candidates")
