"""What a policy may be told of a candidate beside its embeddings: one number for each training example.

N training examples, F numbers. A number in [0, 1] becomes a column 2x − 1 of the ICDs' features, whose embeddings have
length 1; the query has 0 there, so that similarity stays what it was. To add one, write a function and its line of
CANDIDATE_FEATURES.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lever_lm.data import Example
from lever_lm.data.embeddings import Embeddings
from lever_lm.data.pools import Candidates, nearest, query_rng, similarity_rows
from lever_lm.tasks import Task
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.progress import WORTH_A_WORD, Track, Work, untracked
from lever_lm.utils.terminal import shown

NEIGHBOURS = 10  # training examples that a label is compared with
_PAIRS = (("img", "img"), ("text", "text"))


@dataclass(frozen=True)
class Labelled:
    """The training examples with their embeddings, row for row, and how answers score."""

    train: Sequence[Example]
    embeddings: Embeddings
    task: Task
    track: Track = untracked


def agreement(of: Labelled) -> list[float]:
    """Return the share of each example's annotators whose answer is the shown one, in the form in which the task
    compares answers. Raises LeverError where an example has fewer than two answers: a single one agrees with itself."""
    few = [example for example in of.train if len(example.answers) < 2]
    if few:
        raise LeverError(
            "policy.candidate_features: agreement is the share of annotators who gave the shown answer, and "
            f"{len(few)} of {len(of.train)} examples, the first question {few[0].question_id}, have fewer than two "
            "answers: bring examples with the answers of all annotators, or train a policy without it"
        )
    found = []
    for example in of.train:
        (alone,) = of.task.normalized_references(replace(example, answers=(example.answer,)))
        given = of.task.normalized_references(example)
        found.append(given.count(alone) / len(given) if example.answer else 0.0)
    return found


def consistency(of: Labelled) -> list[float]:
    """Return the mean score of each example's shown answer for its NEIGHBOURS nearest examples by image and text, its
    own question and image left out. Raises LeverError where an example has no neighbour."""
    candidates, found = Candidates(of.train), []
    rows = zip(of.train, similarity_rows(of.embeddings, of.embeddings, _PAIRS), strict=True)
    work = Work(rows, "examples", after=WORTH_A_WORD)
    for example, similarity in of.track(work, f"consistency: {len(of.train)} examples", len(of.train)):
        allowed = candidates.allowed(example)
        if not allowed.size:
            raise LeverError(
                f"policy.candidate_features: consistency compares question {example.question_id} with examples of "
                "other images, and there are none: bring more examples, or train a policy without it"
            )
        near = nearest(similarity, allowed, NEIGHBOURS, query_rng(0, example))
        found.append(float(np.mean([of.task.score(example.answer, of.train[row]) for row in near])))
    return found


CANDIDATE_FEATURES: dict[str, Callable[[Labelled], list[float]]] = {
    "agreement": agreement,
    "consistency": consistency,
}


def check_candidate_features(names: Sequence[str]) -> None:
    """Raise UsageError for a name that is not in CANDIDATE_FEATURES, or is there twice."""
    for name in names:
        if name not in CANDIDATE_FEATURES or names.count(name) > 1:
            known = ", ".join(CANDIDATE_FEATURES)
            raise UsageError(f"policy.candidate_features names {shown(name)}: each of {known} at most once")


def candidate_columns(names: Sequence[str], of: Labelled) -> Tensor:
    """Return the columns (N, F) that these names add to the features of the training examples as ICDs."""
    columns = [2 * torch.tensor(CANDIDATE_FEATURES[name](of)) - 1 for name in names]
    return torch.stack(columns, 1) if columns else torch.zeros(len(of.train), 0)
