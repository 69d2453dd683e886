"""Pseudo-answers: what the LVLM answers after similar demonstrations helps to find better ones. Source: Li et al., "How
to Configure Good In-Context Sequence for Visual Question Answering", CVPR 2024 (IQPR).
"""

from collections.abc import Iterator

import numpy as np

from lever_lm.data.pools import nearest, similarity_rows
from lever_lm.selectors.baselines import SAME_PARTS, similarity
from lever_lm.selectors.problem import Problem

_MORE = 4  # times the shots that are kept by image and question


def pseudo_answer(problem: Problem, shots: int) -> Iterator[list[int]]:
    """Ask the LVLM once, after the `shots` examples most similar by image and question; of the 4 · shots most similar
    ones keep those whose answers are most similar to that answer, by the text encoder, the most similar first.

    One LVLM call a query, over the whole training split; ties in random order. A blank pseudo-answer leaves the ranking
    by image and question.
    """
    picks = list(similarity(*SAME_PARTS)(problem, shots))
    answers = problem.answer(picks)
    distinct = sorted({example.answer for example in problem.train})
    place = {text: i for i, text in enumerate(distinct)}
    of_train = np.array([place[example.answer] for example in problem.train])
    likeness = (problem.embed(answers) @ problem.embed(distinct).T).double().numpy()  # (Q, distinct answers)
    by_both = similarity_rows(*problem.embeddings, SAME_PARTS)
    for query, answer, scores, like in zip(problem, answers, by_both, likeness, strict=True):
        near = np.array(nearest(scores, query.allowed, _MORE * shots, query.rng))
        ranked = like[of_train] if answer.strip() else scores
        yield nearest(ranked, near, shots, query.rng)
