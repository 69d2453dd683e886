"""The recall of pools: how often a right answer is among what a policy may choose. It bounds what copying reaches."""

from collections.abc import Sequence

import numpy as np

from lever_lm.config.schema import Config
from lever_lm.data import Example
from lever_lm.data.embeddings import Embeddings
from lever_lm.data.pools import Candidates, pool_bound, sample_pools
from lever_lm.tasks import Task

LOOKED_AT = 1000  # queries; the share of a random subset of this size is off by at most .03 in 95 of 100


def pool_recall(task: Task, queries: Sequence[Example], train: Sequence[Example], pools: Sequence[list[int]]) -> float:
    """Return the share of queries whose pool holds a candidate whose own answer scores above 0 for the query."""
    hits = [
        any(task.fits(answer, query) for answer in dict.fromkeys(train[row].answer for row in pool))
        for query, pool in zip(queries, pools, strict=True)
    ]
    return float(np.mean(hits))


def pool_recalls(
    config: Config,
    queries: Sequence[Example],
    train: Sequence[Example],
    task: Task,
    embeddings: tuple[Embeddings, Embeddings] | None,
    candidates: Candidates | None = None,
) -> dict[int, float]:
    """Return rollout.pool_size → recall of the pools of that size, and infer.pool_size → the same; {} where no query
    has references. Over the queries that have any, LOOKED_AT of them, evenly spaced, where there are more. Arguments as
    of `sample_pools`."""
    judged = [row for row, query in enumerate(queries) if any(map(str.strip, query.answers))]
    if not judged:
        return {}
    rows = [judged[i] for i in np.linspace(0, len(judged) - 1, min(len(judged), LOOKED_AT)).astype(int)]
    asked, candidates = [queries[row] for row in rows], candidates or Candidates(train)
    taken = None if embeddings is None else (embeddings[0].take(rows), embeddings[1])

    def recall(size: int) -> float:
        made = {"size": size, "seed": config.seed, "candidates": candidates}
        return pool_recall(task, asked, train, sample_pools(config.sampler, asked, train, taken, **made))

    return {size: recall(size) for size in dict.fromkeys((config.rollout.pool_size, config.infer.pool_size))}


def recall_in_words(config: Config, recalls: dict[int, float]) -> str:
    """Return what `pool_recalls` found as a phrase, with the option of each size."""
    options: dict[int, list[str]] = {}
    for name, section in (("rollout.pool_size", config.rollout), ("infer.pool_size", config.infer)):
        options.setdefault(section.pool_size, []).append(name)
    parts = [
        f"{recalls[size]:.1%} of those of {size or f'the nearest {pool_bound(size):,}'} ({', '.join(names)})"
        for size, names in options.items()
    ]
    return f"a right answer is in {', in '.join(parts)}"
