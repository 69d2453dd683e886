"""Answers as they are compared where the VQA evaluator's rules would lose what counts: a sign, a `+`, a `#`."""

import re

from lever_lm.tasks.vqa_metrics import ARTICLES, NUMBER_WORDS

_AROUND = ".,!?;:\"'`()[]{}"  # of a word
_HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])")  # hot-dog is hot dog, -1 is not 1
_NUMBERS = {word: number for word, number in NUMBER_WORDS.items() if word != "none"}


def plain(text: str) -> str:
    """Return a text in lower case, with single blanks and no punctuation around its words, number words as digits."""
    words = (word.rstrip(_AROUND).lstrip(_AROUND) if word.strip(_AROUND) else "" for word in _spaced(text))
    return " ".join(_NUMBERS.get(word, word) for word in words if word)


def bare(text: str) -> str:
    """Return a plain text without its articles, unless it is nothing else."""
    words = plain(text).split()
    return " ".join(word for word in words if word not in ARTICLES) or " ".join(words)


def _spaced(text: str) -> list[str]:
    return _HYPHEN.sub(" ", text.lower()).split()
