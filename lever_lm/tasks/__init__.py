"""Tasks: how an answer is scored; one module a task, and the table of them.

To add a task, write a class with the methods of Task in a module of its own and name it in TASKS.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

from lever_lm.data.example import Example
from lever_lm.tasks.vqa import Vqa
from lever_lm.utils.errors import UsageError
from lever_lm.utils.terminal import shown


class Task(Protocol):
    """The scores of a text that an LVLM wrote about an example; texts are cut, see `lvlm.prompt.cut_answer`."""

    def score(self, prediction: str, example: Example) -> float:
        """Return the score in [0, 1] of which a reward is made; above 0, a demonstration's answer fits a query."""

    def relevance(self, prediction: str, example: Example) -> tuple[float, float]:
        """Return how near a prediction comes to the references: (best token F1, best edit similarity), in [0, 1]."""

    def metrics(self, prediction: str, example: Example, written: str) -> dict[str, float]:
        """Return every score that is reported, by its name in metrics.json, the headline first. written: the prediction
        before a `reducer`."""

    def references(self, example: Example) -> dict[str, float]:
        """Return the distinct reference answers and their weights in gt_prob."""

    def normalized_references(self, example: Example) -> list[str]:
        """Return the reference answers in the form in which they are compared."""

    def reducer(self, examples: Iterable[Example]) -> Callable[[str], str]:
        """Return a function from a written answer to the form of the references, learnt from annotated examples."""


TASKS: dict[str, Task] = {"vqa": Vqa()}  # by the config's data.task


def check_task(name: str) -> None:
    """Raise UsageError for a name that is not in TASKS."""
    if name not in TASKS:
        raise UsageError(f"unknown task {shown(name)}: one of {', '.join(TASKS)} (data.task)")
