"""Lever-LM: a language model whose words are the training examples. Source: arXiv:2312.10104 §3.3.

B queries, N training examples, S shots, D feature size, H hidden. The sequence is [query, x_1, …, x_S]; the query's
place holds a learnt vector + W_q f_q, that of example x a learnt vector of x + W_d f_x; a GPT-2 gives at each place the
logits over all N examples, whose output vectors are the learnt ones (tied). The vocabulary is closed: the model says
nothing of an example that it was not trained with, so it belongs to one training split.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lever_lm.selectors.fixed_set import check_vocabulary
from lever_lm.selectors.problem import Problem
from lever_lm.utils.errors import LeverError
from lever_lm.utils.transformers_compat import import_transformers

LONGEST = 64  # shots
_CHUNK = 64


class LeverLM(nn.Module):
    """A GPT-2 of `num_layers` layers × `hidden_dim`, over `vocabulary` examples with features of `d_model` numbers."""

    stop = False
    split = ""  # `split_of` the training split, where a checkpoint says it

    def __init__(self, d_model: int, vocabulary: int, hidden_dim: int = 512, num_layers: int = 2, num_heads: int = 8):
        super().__init__()
        transformers = import_transformers()
        self.d_model, self.vocabulary = d_model, vocabulary
        self.hidden_dim, self.num_layers, self.num_heads = hidden_dim, num_layers, num_heads
        sizes = {"n_embd": hidden_dim, "n_layer": num_layers, "n_head": num_heads, "n_positions": LONGEST + 1}
        no_tokens = {"bos_token_id": None, "eos_token_id": None}
        self.gpt = transformers.GPT2Model(transformers.GPT2Config(vocab_size=vocabulary, **sizes, **no_tokens))
        self.query_vector = nn.Parameter(0.02 * torch.randn(hidden_dim))
        self.query_proj = nn.Linear(d_model, hidden_dim, bias=False)
        self.icd_proj = nn.Linear(d_model, hidden_dim, bias=False)

    @property
    def shape(self) -> dict[str, int]:
        """The constructor's arguments, as a checkpoint carries them."""
        names = ("d_model", "vocabulary", "hidden_dim", "num_layers", "num_heads")
        return {name: getattr(self, name) for name in names}

    def logits(self, query: Tensor, icds: Tensor, sequences: Tensor) -> Tensor:
        """Return the logits of each next example: query (B, D), icds (N, D), rows (B, T) → (B, T + 1, N)."""
        vectors = self.gpt.wte.weight
        first = (self.query_vector + self.query_proj(query)).unsqueeze(1)
        shown = vectors[sequences] + self.icd_proj(icds[sequences])
        hidden = self.gpt(inputs_embeds=torch.cat([first, shown], 1), use_cache=False).last_hidden_state
        return hidden @ vectors.T

    def loss(self, query: Tensor, icds: Tensor, sequences: Tensor) -> Tensor:
        """Return −Σ_t log p(x_t | query, x_<t), the mean over the sequences (B, S)."""
        logits = self.logits(query, icds, sequences[:, :-1])
        each = nn.functional.cross_entropy(logits.flatten(0, 1), sequences.flatten(), reduction="none")
        return each.view_as(sequences).sum(-1).mean()

    def choose(self, problem: Problem, shots: int) -> Iterator[list[int]]:
        """Yield the picks of each query in turn, from the whole training split. Raises LeverError where that is another
        one than the model was trained with."""
        check_vocabulary("Lever-LM", self.vocabulary, self.split, problem)
        queries, icds = problem.policy_features
        if queries.shape[1] != self.d_model:
            raise LeverError(
                f"Lever-LM expects features of {self.d_model} dimensions, these have {queries.shape[1]}: set "
                "features.encoder to the encoder it was trained with"
            )
        if shots > LONGEST:
            raise LeverError(f"Lever-LM picks at most {LONGEST} demonstrations, not {shots}: lower --shots")
        for start in range(0, len(queries), _CHUNK):
            asked = problem.queries[start : start + _CHUNK]
            allowed = torch.ones(len(asked), len(icds), dtype=torch.bool)
            for free, query in zip(allowed, asked, strict=True):
                free[list(problem.candidates.withheld(query))] = False
                if int(free.sum()) < shots:
                    raise LeverError(
                        f"question {query.question_id} may be shown {int(free.sum())} training examples, not {shots}: "
                        "lower --shots"
                    )
            yield from self.select(queries[start : start + _CHUNK], icds, shots, allowed).tolist()

    @torch.no_grad()
    def select(self, query: Tensor, icds: Tensor, shots: int, allowed: Tensor) -> Tensor:
        """Return the likeliest example again and again, (B, S) rows; allowed (B, N): True on what may be shown."""
        free, picks = allowed.clone(), torch.zeros(len(query), 0, dtype=torch.long, device=query.device)
        for _ in range(shots):
            last = self.logits(query, icds, picks)[:, -1].masked_fill(~free, -torch.inf)
            picks = torch.cat([picks, last.argmax(-1, keepdim=True)], 1)
            free.scatter_(1, picks[:, -1:], False)
        return picks
