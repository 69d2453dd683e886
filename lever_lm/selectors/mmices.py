"""MMICES: near images first, and among these near questions. Source: arXiv:2311.18021 §4.2, and its public codes."""

from collections.abc import Callable, Iterator

import numpy as np

from lever_lm.data.pools import nearest, similarity_rows
from lever_lm.selectors.problem import Problem

NEAR = 200  # training examples by their image


def rerank_near_images(*by: str) -> Callable[[Problem, int], Iterator[list[int]]]:
    """Return the selector that takes the NEAR training examples of largest cos(I_q, I_d) and ranks them by one more
    cosine, the largest first, so that it stands nearest the question.

    by: the parts of query and candidate that are compared, `("text", "text")` for cos(T_q, T_d), the paper's, or
    `("text", "img")` for cos(T_q, I_d), that of another public code. Over the whole training split; ties in random
    order.
    """

    def select(problem: Problem, shots: int) -> Iterator[list[int]]:
        images = similarity_rows(*problem.embeddings, [("img", "img")])
        second = similarity_rows(*problem.embeddings, [by])
        for query, image, other in zip(problem, images, second, strict=True):
            near = nearest(image, query.allowed, NEAR, query.rng)
            yield nearest(other, np.array(near), shots, query.rng)

    return select
