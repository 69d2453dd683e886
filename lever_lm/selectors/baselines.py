"""Selectors that learn nothing: none, random, similarity, and the oracle, which knows the query's references."""

from collections.abc import Callable, Iterator

import numpy as np

from lever_lm.data.pools import nearest, similarity_rows
from lever_lm.selectors.problem import Problem

SAME_PARTS = (("img", "img"), ("text", "text"))
_ABOVE = 100  # cosines sum to at most 2, so that a step of 0.1 in the score always outweighs them


def nothing(problem: Problem, shots: int) -> Iterator[list[int]]:
    """Show no demonstrations."""
    return ([] for _ in problem.queries)


def random(problem: Problem, shots: int) -> Iterator[list[int]]:
    """Draw from the whole training split."""
    for query in problem:
        yield query.rng.permutation(query.allowed)[:shots].tolist()


def similarity(*pairs: tuple[str, str]) -> Callable[[Problem, int], Iterator[list[int]]]:
    """Return the selector of the training examples whose cosines to the query, summed over `pairs` of a part of the
    query and a part of the example (img, text), are largest; ties in random order.

    cos(I_q, I_d) + cos(I_q, T_d) is MUIER: MSIER, EMNLP 2024.
    """

    def select(problem: Problem, shots: int) -> Iterator[list[int]]:
        rows = similarity_rows(*problem.embeddings, pairs)
        for query, scores in zip(problem, rows, strict=True):
            yield nearest(scores, query.allowed, shots, query.rng)

    return select


def oracle(problem: Problem, shots: int) -> Iterator[list[int]]:
    """Rank the pool by what each ICD's own answer would score for the query, as in a reward, and among equals by the
    similarity of image and text."""
    rows = similarity_rows(*problem.embeddings, SAME_PARTS)
    for query, scores in zip(problem, rows, strict=True):
        answers = [problem.train[row].answer for row in query.pool]
        right = {answer: problem.task.score(answer, query.example) for answer in dict.fromkeys(answers)}
        scores[query.pool] += _ABOVE * np.array([right[answer] for answer in answers])
        yield nearest(scores, np.array(query.pool), shots, query.rng)
