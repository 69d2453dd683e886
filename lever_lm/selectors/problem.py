"""What a selector is given: queries, what may be shown before each of them, features and seeds.

The leak check (`Candidates`), the pools and the queries' random generators are decided here and in data/pools.py; no
selector decides them for itself. Q queries, N training examples, K candidates, D feature size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from lever_lm.data import Example
from lever_lm.data.embeddings import Embeddings, with_columns
from lever_lm.data.pools import Candidates, query_rng
from lever_lm.tasks import Task


@dataclass(frozen=True)
class Query:
    """One query with what may be shown before it, as rows of the training split: `allowed`, in order, is all but the
    query itself and its image; `pool` holds its K candidates. rng: its own generator, fresh for each selector."""

    example: Example
    allowed: np.ndarray
    pool: list[int]
    rng: np.random.Generator


@dataclass(frozen=True)
class Problem:
    """Queries to choose demonstrations for. embeddings: of (queries, train), row for row. features: (Q, D) and (N, D)
    of queries and ICDs; columns (N, F): what a policy is told of the ICDs beside them. pools: the candidates of each
    query, rows of `train`. task: how answers score.

    answer: rows shown to each query → what the LVLM answers; embed: n texts → unit text embeddings (n, D). Both for a
    selector that asks while it chooses.
    """

    queries: Sequence[Example]
    train: Sequence[Example]
    embeddings: tuple[Embeddings, Embeddings]
    features: tuple[Tensor, Tensor]
    pools: Sequence[list[int]]
    seed: int
    task: Task
    answer: Callable[[list[list[int]]], list[str]] | None = None
    embed: Callable[[Sequence[str]], Tensor] | None = None
    columns: Tensor | None = None

    @cached_property
    def candidates(self) -> Candidates:
        """The training split as what may be shown before a query."""
        return Candidates(self.train)

    @cached_property
    def policy_features(self) -> tuple[Tensor, Tensor]:
        """Features of queries and ICDs with the columns, as a learnt selector sees them."""
        return with_columns(self.features, self.columns)

    def __iter__(self) -> Iterator[Query]:
        for example, pool in zip(self.queries, self.pools, strict=True):
            yield Query(example, self.candidates.allowed(example), pool, query_rng(self.seed, example))
