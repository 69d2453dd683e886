"""The task `short_answer`: a free answer, right where it is one of the accepted ones. One reference is enough."""

from lever_lm.data.example import Example
from lever_lm.tasks.task import Task
from lever_lm.tasks.vqa_metrics import normalize_answer


class ShortAnswer(Task):
    """Exact match with any of the accepted answers, all normalised as the VQA evaluator normalises: case, articles,
    punctuation, number words."""

    headline = "exact match"

    def score(self, prediction: str, example: Example) -> float:
        """Return 1 for an accepted answer, else 0."""
        said = _normal(prediction)
        return float(said != "" and any(said == _normal(answer) for answer in example.answers))

    def references(self, example: Example) -> dict[str, float]:
        """Return every accepted answer with weight 1: whichever is said, it is right."""
        return {answer.strip(): 1.0 for answer in example.answers if answer.strip()}


def _normal(text: str) -> str:
    """Return a text as it is compared. A text that normalises to nothing, as the answer `A`, stays what it is."""
    return normalize_answer(text) or text.strip().lower()
