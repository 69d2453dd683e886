"""Rows of a data file: how one becomes an Example, and what becomes of one that cannot be used."""

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lever_lm.data.example import Example, Image, image_digest
from lever_lm.utils.errors import LeverError
from lever_lm.utils.terminal import one_line, shown

# What Qwen2.5-VL's tokenizer takes for the end of a turn or the place of an image wherever it stands, and half
# characters, which no tokenizer takes.
_UNFIT = re.compile(
    r"<\|(?:im_start|im_end|vision_start|vision_end|vision_pad|image_pad|video_pad|endoftext)\|>|[\ud800-\udfff]"
)
LONGEST_ID = 200  # characters
_AN_ID = "must be a whole number of 0 to 2**63 - 1"


class Unusable(Exception):
    """A row makes no example; says why."""


Pose = Callable[[Example], Example]  # what a row makes → what is asked and shown; raises Unusable


def as_it_is(example: Example) -> Example:
    """Return an example whose task asks and shows it as its row has it."""
    return example


@dataclass
class BadExamples:
    """The examples that cannot be used: the first is refused, or with `skip` all are left out and listed."""

    skip: bool = False
    problems: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        """List what is wrong with an example. Raises LeverError with it unless bad examples are skipped."""
        if not self.skip:
            raise LeverError(f"{problem}; to go on without such examples: --skip-bad-examples")
        self.problems.append(problem)


def whole_id(value) -> int | None:
    """Return the id of a question or an image, 0 to 2**63 - 1: from a whole number, from one that pandas made a float,
    or from a text of digits. None for all else."""
    if isinstance(value, float) and value.is_integer() and value < 2**53:
        value = int(value)
    text = str(value)
    sound = text.isascii() and text.isdigit() and len(text) < 20
    return int(text) if sound and int(text) < 2**63 else None


def any_id(value) -> int | str | None:
    """Return an id as examples have it: a whole number, or another text of one line and at most 200 characters, without
    blanks around it. None for anything else."""
    if (number := whole_id(value)) is not None or not isinstance(value, str):
        return number
    text = value.strip()
    return text if text and len(text) <= LONGEST_ID and one_line(text) == text else None


def example_of(row: dict, image: Image) -> Example:
    """Return the example of a row: question_id, question, answers (texts, or objects that hold one as `answer` and, as
    `raw_answer`, what was typed), and perhaps image_id and raw_answers. Without an id of its own, an image has that of
    its content. Raises Unusable."""
    question_id, image_id = whole_id(row["question_id"]), row.get("image_id")
    if question_id is None:
        raise Unusable(f"question_id {_AN_ID}")
    answers, raw_answers = _answers(row)
    if problem := problem_of(row["question"], answers, raw_answers):
        raise Unusable(problem)
    number = id_of_content(image_digest(image)) if image_id is None else whole_id(image_id)
    if number is None:
        raise Unusable(f"image_id {_AN_ID}, found {shown(image_id)}")
    # Equal texts are kept once in memory.
    answers, raw_answers = (tuple(map(sys.intern, texts)) for texts in (answers, raw_answers))
    return Example(question_id, number, row["question"], answers, raw_answers, image)


def id_of_content(digest: str) -> int:
    """Return the id of an image that has none of its own, by the digest of its content."""
    return int(digest[:15], 16)


def _answers(row: dict) -> tuple:
    """Return answers and raw answers of a row, not checked yet. Raw answers have a column of their own, or are in the
    objects, or are the answers."""
    entries, raw_answers = row.get("answers"), row.get("raw_answers")
    if not isinstance(entries, list):
        return entries, raw_answers
    objects = [entry if isinstance(entry, dict) else {"answer": entry} for entry in entries]
    answers = [entry.get("answer") for entry in objects]
    typed = [entry.get("raw_answer") for entry in objects]
    return answers, raw_answers or [a if raw is None else raw for raw, a in zip(typed, answers, strict=True)]


def problem_of(question, answers, raw_answers) -> str | None:
    """Return what is wrong with the texts of an example, for a message; None if nothing is."""
    if not isinstance(question, str) or not question.strip():
        return f"it has no question, found {shown(question)}"
    for name, texts in (("answers", answers), ("raw_answers", raw_answers)):
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            return f"its {name} must be a list of texts, found {shown(texts)}"
    if not any(map(str.strip, answers)):
        return "all its answers are blank"
    if len(raw_answers) != len(answers):
        return (
            f"it has {len(answers)} answers and {len(raw_answers)} raw_answers: as many are needed, in the same order"
        )
    return unfit([question, *answers, *raw_answers])


def unfit(texts: Iterable[str]) -> str | None:
    """Return what among the texts can stand in no prompt, for a message; None if all can."""
    found = _UNFIT.search("\n".join(texts))
    if found is None:
        return None
    why = "a token of the LVLM's own" if found[0].startswith("<") else "half a character, no UTF-8"
    return f"{shown(found[0])} can stand in no question or answer: it is {why}"
