"""The problem that selectors are tried on."""

import pytest

from lever_lm.evaluation.evaluate import problem_of
from lever_lm.tasks import TASKS


@pytest.fixture(scope="session")
def digits_problem(digits_config, digits, digits_features):
    """The first 20 evaluation questions of the digits."""
    embeddings = (digits_features.val.take(slice(20)), digits_features.train)
    return problem_of(digits_config, digits.val_examples[:20], digits.train_examples, TASKS["vqa"], embeddings)
