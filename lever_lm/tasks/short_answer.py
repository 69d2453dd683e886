"""The task `short_answer`: a free answer, right where it is one of the accepted ones. One reference is enough."""

from lever_lm.data.example import Example
from lever_lm.tasks.task import Task
from lever_lm.tasks.texts import bare


class ShortAnswer(Task):
    """Exact match with any of the accepted answers, without case, articles, hyphens and punctuation around words;
    number words are numbers. Signs count: `-1` is not `1`, `C++` not `C`."""

    headline = "exact match"

    def score(self, prediction: str, example: Example) -> float:
        """Return 1 for an accepted answer, else 0."""
        said = bare(prediction)
        return float(said != "" and any(said == bare(answer) for answer in example.answers))

    def normalized_references(self, example: Example) -> list[str]:
        """Return the accepted answers as they are compared."""
        return [bare(answer) for answer in example.answers]

    def references(self, example: Example) -> dict[str, float]:
        """Return every accepted answer with weight 1: whichever is said, it is right."""
        return {answer.strip(): 1.0 for answer in example.answers if answer.strip()}
