"""What a task says: how an example is asked, how an answer is shown, read and scored, and what is told of many."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from lever_lm.config.schema import DataConfig
from lever_lm.data.example import Example, VqaData
from lever_lm.tasks.vqa_metrics import normalize_answer, relevance


class Task(Protocol):
    """One way to ask and to score. Texts that an LVLM wrote are cut before (`lvlm.prompt.cut_answer`).

    headline: what the mean of `score` is called.
    """

    headline: str = "accuracy"

    def told(self, config: DataConfig) -> "Task":
        """Return the task with what it takes from a config."""
        return self

    def of(self, data: VqaData) -> "Task":
        """Return the task with what it takes from a data set, as a scale or document frequencies, and its config."""
        return self.told(data.settings)

    # ------------------------------------------------------------------ asking

    def problem(self, example: Example) -> str | None:
        """Return why an example cannot be asked or scored, with the mend; None if it can."""
        return None

    def question(self, example: Example) -> str:
        """Return what is asked, as it stands in a prompt."""
        return example.question

    def answer(self, example: Example) -> str:
        """Return the answer, as it stands where the example is a demonstration."""
        return example.answer

    # ------------------------------------------------------------------ scoring

    def read(self, text: str, example: Example) -> str | None:
        """Return the prediction that a text makes; None where it cannot be read. What was read is read as itself."""
        return text.strip() or None

    @abstractmethod
    def score(self, prediction: str, example: Example) -> float:
        """Return the score in [0, 1] of which a reward is made."""

    def fits(self, prediction: str, example: Example) -> bool:
        """Return whether a demonstration's answer counts as right for a query."""
        return self.score(prediction, example) > 0

    def relevance(self, prediction: str, example: Example) -> tuple[float, float]:
        """Return how near a prediction comes to the references: (best token F1, best edit similarity), in [0, 1]."""
        return relevance(prediction, example.answers)

    def metrics(self, prediction: str, example: Example, written: str) -> dict[str, float]:
        """Return every score that is reported of one prediction, the headline as `accuracy`, first. written: the
        prediction before a `reducer`."""
        return {"accuracy": self.score(prediction, example)}

    def summary(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Return what is reported of many predictions, by name; `unparsed`: the share that could not be read."""
        rows = np.array([self.measures(*pair) for pair in zip(predictions, examples, strict=True)], dtype=np.float64)
        return {name: float(value) for name, value in self.summarize(rows).items()}

    def measures(self, prediction: str, example: Example) -> tuple[float, ...]:
        """Return the numbers of one prediction that `summarize` needs: here the score, and 1 where it was read."""
        return self.score(prediction, example), float(self.read(prediction, example) is not None)

    def summarize(self, measured: np.ndarray) -> dict[str, np.ndarray]:
        """Return what is reported of predictions, by name, from their measures: (…, n, k) → (…) each."""
        score, was_read = np.moveaxis(measured, -1, 0)
        return {self.headline.replace(" ", "_"): score.mean(-1), "unparsed": 1 - was_read.mean(-1)}

    # ------------------------------------------------------------------ references

    def references(self, example: Example) -> dict[str, float]:
        """Return the distinct reference answers, as an LVLM would write them, and their weights in gt_prob."""
        return {self.answer(example): 1.0}

    def normalized_references(self, example: Example) -> list[str]:
        """Return the reference answers in the form in which they are compared."""
        return [normalize_answer(answer) for answer in example.answers]

    def reducer(self, examples: Iterable[Example]) -> Callable[[str], str]:
        """Return a function from a written answer to the form of the references, learnt from annotated examples."""
        return str
