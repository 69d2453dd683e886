"""OK-VQA's reduced answers, learned from its annotations: a prediction is reduced as an annotator's answer was.

OK-VQA releases each answer twice, as typed (`raw_answer`: racing cars) and reduced (`answer`: race car), and is scored
against the second, so a prediction in plain English loses points that published numbers partly hold and partly do
not. The reduction's code was never released; what it did to 140,000 answers was.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stems:
    """The reductions of whole answers and of single words, and the words of which reduced answers are made."""

    answers: dict[str, str]
    words: dict[str, str]
    known: frozenset[str]

    def reduce(self, text: str) -> str:
        """Return a prediction as the annotations would hold it: as a whole where it was typed so, else word by word."""
        plain = _plain(text)
        if plain in self.answers:
            return self.answers[plain]
        return " ".join(self._word(word) for word in plain.split())

    def _word(self, word: str) -> str:
        if word in self.words:
            return self.words[word]
        if word in self.known:
            return word
        return next((shorter for shorter in _shorter(word) if shorter in self.known), word)


def learn_stems(pairs: Iterable[tuple[str, str]]) -> Stems:
    """Learn from (raw_answer, answer) pairs of the annotators; the commonest reduction of each counts."""
    whole: dict[str, Counter] = defaultdict(Counter)
    single: dict[str, Counter] = defaultdict(Counter)
    known: set[str] = set()
    for raw, reduced in pairs:
        raw, reduced = _plain(raw), _plain(reduced)
        whole[raw][reduced] += 1
        words = reduced.split()
        known.update(words)
        if len(words) == len(raw.split()):
            for word, stem in zip(raw.split(), words, strict=True):
                single[word][stem] += 1
    return Stems(_commonest(whole), _commonest(single), frozenset(known))


def _plain(text: str) -> str:
    """Return a text in lower case, with single spaces and no punctuation around words."""
    return " ".join(word for word in (part.strip('.,!?;:"') for part in text.lower().split()) if word)


def _commonest(counts: dict[str, Counter]) -> dict[str, str]:
    return {text: counter.most_common(1)[0][0] for text, counter in counts.items()}


def _shorter(word: str) -> list[str]:
    """Return the words that a plural or an -ing form may come from, the likeliest first. One is taken if it is
    known."""
    if word.endswith("ing") and len(word) > 5:
        stem = word[:-3]
        doubled = [stem[:-1]] if stem[-1] == stem[-2] else []
        return [*doubled, stem, f"{stem}e"]
    if word.endswith("s") and len(word) > 3:
        return [word[:-1], word[:-2], f"{word[:-3]}y"] if word.endswith("es") else [word[:-1]]
    return []
