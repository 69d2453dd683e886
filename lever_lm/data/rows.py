"""Rows of a data file: what is checked of ids, questions and answers, and what becomes of a row that cannot be used."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from lever_lm.utils.errors import LeverError
from lever_lm.utils.terminal import shown

# What Qwen2.5-VL's tokenizer takes for the end of a turn or the place of an image wherever it stands, and half
# characters, which no tokenizer takes.
_UNFIT = re.compile(
    r"<\|(?:im_start|im_end|vision_start|vision_end|vision_pad|image_pad|video_pad|endoftext)\|>|[\ud800-\udfff]"
)


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


def unique(where, rows: list[dict], bad: BadExamples) -> list[dict]:
    """Return the rows, only the first of those with the same question_id."""
    for question_id, count in Counter(row["question_id"] for row in rows).items():
        if count > 1:
            bad.add(f"{where}: question_id {question_id} appears {count} times, expected once")
    first: dict = {}
    for row in rows:
        first.setdefault(row["question_id"], row)
    return list(first.values())


def problem_of(question, answers, raw_answers) -> str | None:
    """Return what is wrong with the texts of an example as a file holds them; None if nothing is."""
    if not isinstance(question, str) or not question.strip():
        return f"it has no text, found {shown(question)}"
    if not _are_texts(answers):
        return f"it needs a list of answers, found {shown(answers)}"
    if not any(map(str.strip, answers)):
        return "all its answers are blank"
    if not _are_texts(raw_answers):
        return f"its raw answers must be a list of texts, found {shown(raw_answers)} (raw_answers or answers)"
    if len(raw_answers) != len(answers):
        return (
            f"it has {len(answers)} answers and {len(raw_answers)} raw_answers: as many are needed, in the same order"
        )
    return unfit([question, *answers, *raw_answers])


def _are_texts(values) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)


def unfit(texts: Iterable[str]) -> str | None:
    """Return what among the texts can stand in no prompt, for a message; None if all can."""
    found = _UNFIT.search("\n".join(texts))
    if found is None:
        return None
    why = "a token of the LVLM's own" if found[0].startswith("<") else "half a character, no UTF-8"
    return f"{shown(found[0])} can stand in no question or answer: it is {why}"
