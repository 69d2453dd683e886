"""Tasks: how an example is asked and an answer is scored; one module a task, and the table of them.

To add a task, write a class with the methods of Task in a module of its own and name it in TASKS.
"""

from collections.abc import Callable
from dataclasses import replace

from lever_lm.config.schema import DataConfig
from lever_lm.data import VqaData, load_dataset
from lever_lm.data.example import Example
from lever_lm.data.rows import Unusable, as_it_is
from lever_lm.tasks.caption import Caption
from lever_lm.tasks.choice import Choice
from lever_lm.tasks.number import Number
from lever_lm.tasks.short_answer import ShortAnswer
from lever_lm.tasks.task import Task
from lever_lm.tasks.vqa import Vqa
from lever_lm.utils.errors import UsageError
from lever_lm.utils.terminal import shown

__all__ = ["TASKS", "Task", "check_task", "load_data", "pose_of", "task_of"]

TASKS: dict[str, Task] = {  # by the config's data.task
    "vqa": Vqa(),
    "short_answer": ShortAnswer(),
    "choice": Choice(),
    "number": Number(),
    "caption": Caption(),
}


def check_task(name: str) -> None:
    """Raise UsageError for a name that is not in TASKS."""
    if name not in TASKS:
        raise UsageError(f"unknown task {shown(name)}: one of {', '.join(TASKS)} (--task, data.task)")


def task_of(data: VqaData) -> Task:
    """Return the task of a data set, with what it takes from it."""
    return TASKS[data.task].of(data)


def pose_of(config: DataConfig) -> Callable[[Example], Example]:
    """Return the function from an example, as its row has it, to the example as it is asked and shown. That raises
    Unusable for one that cannot be."""
    task = TASKS[config.task].told(config)
    if all(getattr(type(task), name) is getattr(Task, name) for name in ("problem", "question", "answer")):
        return as_it_is

    def pose(example: Example) -> Example:
        if problem := task.problem(example):
            raise Unusable(problem)
        question = example.question if config.show == "hidden" else task.question(example)
        answer = task.answer(example) if config.show == "letter" else example.answer
        shown = "" if answer == example.answer else answer
        return (
            example if (question, shown) == (example.question, "") else replace(example, question=question, shown=shown)
        )

    return pose


def load_data(config: DataConfig) -> VqaData:
    """Load a data set as its task asks it. Raises LeverError as `data.load_dataset` does."""
    check_task(config.task)
    return load_dataset(config, pose_of(config))
