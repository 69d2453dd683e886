"""The table of tasks, and the task `vqa` by hand."""

import inspect

import pytest

from lever_lm.data import Example, VqaData
from lever_lm.tasks import TASKS, Task

REDUCED, TYPED = ("cat", "cat", "dog", "dog", "dog", "dog", " ", "caf\xe9", "cafe\u0301", "two"), ("cats",) * 10
EXAMPLE = Example(1, 1, "What?", REDUCED, TYPED, "")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_has_the_methods_of_the_protocol(task):
    for name, method in inspect.getmembers(Task, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(getattr(task, name)).parameters.keys() == inspect.signature(
                method
            ).parameters.keys() - {"self"}


def test_data_names_its_task():
    assert VqaData("x", (), (), "").task in TASKS


def test_vqa_scores_what_is_learnt_from_always_normalised_and_reports_the_official_accuracy():
    agreed = Example(1, 1, "What?", ("yes",) * 10, ("Yes",) * 10, "")
    task = TASKS["vqa"]
    assert task.score("Yes", agreed) == 1
    assert task.metrics("Yes", agreed, "Yes") == {"accuracy": 0.0, "normalized_accuracy": 1.0, "raw_accuracy": 1.0}
    assert list(task.metrics("cat", EXAMPLE, "cats").values()) == pytest.approx([0.6, 0.6, 1.0])
    assert task.relevance("the dog", EXAMPLE) == (1.0, 1.0)


def test_vqa_weighs_each_distinct_reference_by_its_annotators():
    assert TASKS["vqa"].references(EXAMPLE) == {"cat": 2 / 3, "dog": 1.0, "caf\xe9": 2 / 3, "two": 1 / 3}
    assert TASKS["vqa"].normalized_references(EXAMPLE)[-1] == "2"


def test_vqa_reduces_answers_as_the_annotations_do():
    reduce = TASKS["vqa"].reducer([EXAMPLE])
    assert reduce("Cats") == "dog", "the commonest reduction of what was typed"
