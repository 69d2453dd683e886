"""The task `vqa`: a free answer, scored against those of several annotators as OK-VQA and VQAv2 are."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from lever_lm.data.example import Example
from lever_lm.tasks.answer_stems import learn_stems
from lever_lm.tasks.task import Task
from lever_lm.tasks.vqa_metrics import vqa_accuracy


class Vqa(Task):
    """The VQA accuracy: official where it is reported, always normalised where it is learnt from."""

    headline = "VQA accuracy"

    def score(self, prediction: str, example: Example) -> float:
        """Return the accuracy with answers always normalised: that `Yes` is worth nothing where all ten annotators
        wrote `yes` is a rule of the official scorer, and no lesson."""
        return vqa_accuracy(prediction, example.answers, always_normalize=True)

    def metrics(self, prediction: str, example: Example, written: str) -> dict[str, float]:
        """Return the official accuracy, the always normalised one, and that of the answer as written against what the
        annotators typed."""
        return {
            "accuracy": vqa_accuracy(prediction, example.answers),
            "normalized_accuracy": self.score(prediction, example),
            "raw_accuracy": vqa_accuracy(written, example.raw_answers),
        }

    def measures(self, prediction: str, example: Example) -> tuple[float, ...]:
        """Return the official accuracy, the always normalised one, and 1 where anything was written."""
        scores = self.metrics(prediction, example, prediction)
        return scores["accuracy"], scores["normalized_accuracy"], float(bool(prediction.strip()))

    def summarize(self, measured: np.ndarray) -> dict[str, np.ndarray]:
        """Return the mean of both accuracies, and the share of empty answers."""
        official, normalized, was_read = np.moveaxis(measured, -1, 0)
        means = {"accuracy": official.mean(-1), "normalized_accuracy": normalized.mean(-1)}
        return {**means, "unparsed": 1 - was_read.mean(-1)}

    def references(self, example: Example) -> dict[str, float]:
        """Return the distinct reference answers, each with min(count / 3, 1), composed (NFC) as tokenizers do: é is one
        answer, whichever way it was typed. Blank answers are left out: they are no text to be probable."""
        counts = Counter(unicodedata.normalize("NFC", text) for text in example.answers if text.strip())
        return {text: min(count / 3, 1.0) for text, count in counts.items()}

    def reducer(self, examples: Iterable[Example]) -> Callable[[str], str]:
        """Return the reduction of OK-VQA's answers, learnt from (typed, reduced) pairs; see answer_stems.py."""
        return learn_stems(pair for e in examples for pair in zip(e.raw_answers, e.answers, strict=True)).reduce
