"""The task `caption`: a sentence about an image, scored by CIDEr-D against the references of that image."""

from dataclasses import dataclass, field

import numpy as np

from lever_lm.data.example import Example, VqaData
from lever_lm.tasks.cider import CiderD
from lever_lm.tasks.task import Task

_NEAR = 0.1  # of the score: a demonstration's caption that counts as right, at CIDEr-D 1


@dataclass(frozen=True)
class Caption(Task):
    """CIDEr-D / 10. The document frequencies are those of the split that an example is of: what a policy learns from
    takes nothing from the references that it is judged by."""

    train: CiderD = field(default_factory=lambda: CiderD([]))
    val: CiderD = field(default_factory=lambda: CiderD([]))
    judged: frozenset = frozenset()  # question ids of the evaluation split
    headline = "CIDEr-D / 10"

    def of(self, data: VqaData) -> "Caption":
        """Return the task with the document frequencies of a data set."""
        splits = (data.train_examples, data.val_examples)
        scorers = (CiderD([example.answers for example in split]) for split in splits)
        return Caption(*scorers, frozenset(example.question_id for example in data.val_examples))

    def score(self, prediction: str, example: Example) -> float:
        """Return CIDEr-D / 10, in [0, 1]."""
        scorer = self.val if example.question_id in self.judged else self.train
        return scorer.score(prediction, example.answers) / 10

    def fits(self, prediction: str, example: Example) -> bool:
        """Return whether a caption has a CIDEr-D of 1 or more."""
        return self.score(prediction, example) >= _NEAR

    def summarize(self, measured: np.ndarray) -> dict[str, np.ndarray]:
        """Return the mean CIDEr-D, in [0, 10], and the share of empty captions."""
        score, was_read = np.moveaxis(measured, -1, 0)
        return {"cider_d": 10 * score.mean(-1), "unparsed": 1 - was_read.mean(-1)}

    def references(self, example: Example) -> dict[str, float]:
        """Return the distinct references, which share the weight of 1."""
        texts = list(dict.fromkeys(text.strip() for text in example.answers if text.strip()))
        return dict.fromkeys(texts, 1 / len(texts))
