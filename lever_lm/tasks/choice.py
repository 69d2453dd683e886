"""The task `choice`: one of several options, lettered in the question; the letter or the text is read."""

import re
from string import ascii_uppercase

from lever_lm.data.example import Example
from lever_lm.tasks.task import Task
from lever_lm.tasks.texts import bare, plain
from lever_lm.tasks.vqa_metrics import relevance

# `B`, `(b)`, `B.`, `B: blue`, `the answer is (B)`: a letter alone, or marked as one.
_LETTER = re.compile(r"(?:the )?(?:answer|option)?(?: is)?:?\s*(?:\(([a-z])\)|([a-z])(?:[.):]|$))", re.IGNORECASE)


class Choice(Task):
    """Accuracy of the option that is read. A demonstration's answer is its letter, or with data.show=text its text."""

    headline = "accuracy"

    def problem(self, example: Example) -> str | None:
        """Return what makes an example no multiple choice."""
        options = example.options
        if not 2 <= len(options) <= len(ascii_uppercase):
            return f"it has {len(options)} options, a choice is of 2 to 26 (data.columns, data.options)"
        if len({option.strip() for option in options}) < len(options):
            return f"two of its options are the same: {', '.join(options)}"
        if example.answers[0] not in options:
            return f"its answer {example.answers[0]!r} is none of its options: {', '.join(options)}"
        return None

    def question(self, example: Example) -> str:
        """Return the question with its options: `Which colour is it? (A) red (B) blue`."""
        lettered = (f"({letter}) {option}" for letter, option in zip(ascii_uppercase, example.options, strict=False))
        return " ".join([example.question, *lettered])

    def answer(self, example: Example) -> str:
        """Return the letter of the right option."""
        return ascii_uppercase[example.options.index(example.answers[0])]

    def read(self, text: str, example: Example) -> str | None:
        """Return the option that a text names, as demonstrations show theirs: its letter, or its text. Of both that
        could be meant the one that is shown counts; a longer text names the only option that stands in it."""
        letters = bool(example.shown)
        ways = (_by_letter, _by_text) if letters else (_by_text, _by_letter)
        found = next((place for way in (*ways, _within) if (place := way(text, example.options)) is not None), None)
        if found is None:
            return None
        return ascii_uppercase[found] if letters else example.options[found]

    def score(self, prediction: str, example: Example) -> float:
        """Return 1 for the right option, else 0."""
        return float(self.read(prediction, example) == (example.shown or example.answers[0]))

    def relevance(self, prediction: str, example: Example) -> tuple[float, float]:
        """Return how near the text of the option that was read comes to the right one's."""
        said = self.read(prediction, example)
        if said is None:
            return 0.0, 0.0
        text = example.options[ascii_uppercase.index(said)] if example.shown else said
        return relevance(text, example.answers)

    def references(self, example: Example) -> dict[str, float]:
        """Return the right option, as demonstrations show theirs."""
        return {example.shown or example.answers[0]: 1.0}


def _by_letter(text: str, options: tuple[str, ...]) -> int | None:
    match = _LETTER.match(text.strip())
    place = ascii_uppercase.index((match[1] or match[2]).upper()) if match else len(options)
    return place if place < len(options) else None


def _by_text(text: str, options: tuple[str, ...]) -> int | None:
    """Return the option that a text is: to the letter, or else the only one when both are without case, articles and
    punctuation around words."""
    if text.strip() in options:
        return options.index(text.strip())
    said = bare(text)
    alike = [place for place, option in enumerate(options) if said and bare(option) == said]
    return alike[0] if len(alike) == 1 else None


def _within(text: str, options: tuple[str, ...]) -> int | None:
    """Return the only option that stands in a text; one within another, as `blue` in `dark blue`, is not meant."""
    said = f" {plain(text)} "
    there = {place: f" {plain(option)} " for place, option in enumerate(options)}
    there = {place: words for place, words in there.items() if words.strip() and words in said}
    meant = [p for p, words in there.items() if not any(words in other and q != p for q, other in there.items())]
    return meant[0] if len(meant) == 1 else None
