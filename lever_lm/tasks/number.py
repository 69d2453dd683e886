"""The task `number`: a quantity, scored by how far the number that was written is from the right one."""

import math
import re
from dataclasses import dataclass, field, replace

import numpy as np

from lever_lm.config.schema import DataConfig
from lever_lm.data.example import Example, VqaData
from lever_lm.tasks.task import Task
from lever_lm.tasks.vqa_metrics import NUMBER_WORDS
from lever_lm.utils.errors import UsageError

# A number in a text, as far as its digits go, and whether they are one: `3,5` is neither 3 nor 35.
_TOKEN = re.compile(r"(?<![\w.])[-+−]?(?:\d[\d.,]*|\.\d[\d.,]*)(?:[eE][-+]?\d+)?|[^\W\d_]+")
_NUMBER = re.compile(r"[-+−]?(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?")
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_TEENS = ["eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_WORDS = {
    **{word: float(number) for word, number in NUMBER_WORDS.items()},
    **{word: float(number) for number, word in enumerate(_TEENS, 11)},
    **{word: 10.0 * tens for tens, word in enumerate(_TENS, 2)},
}
_MORE = ("hundred", "thousand", "million", "billion", "dozen")  # behind a number, which is then another
_BELOW_ZERO = ("minus", "negative")
_NEAR = 0.9 - 1e-9  # of the score: a demonstration's answer that counts as right


@dataclass(frozen=True)
class Number(Task):
    """1 − min(1, |error| / scale). scale: the error that is worth nothing, data.scale, or else the range of the
    training answers. words: those that are numbers, in lower case."""

    scale: float = 1.0
    words: dict[str, float] = field(default_factory=lambda: dict(_WORDS))
    headline = "score"

    def told(self, config: DataConfig) -> "Number":
        """Return the task with the words of a config beside its own."""
        try:
            further = {str(word).lower(): float(value) for word, value in config.number_words.items()}
            if not all(map(math.isfinite, further.values())):
                raise ValueError("NaN or infinite")
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"data.number_words must name numbers, as {{uno: 1}}: {error}") from error
        return replace(self, words={**self.words, **further}, scale=config.scale or self.scale)

    def of(self, data: VqaData) -> "Number":
        """Return the task with the scale of a data set."""
        task = self.told(data.settings)
        numbers = [value for e in data.train_examples if (value := task.number(e.answers[0])) is not None]
        spread = max(numbers) - min(numbers) if numbers else 0.0
        return replace(task, scale=data.settings.scale or spread or 1.0)

    def problem(self, example: Example) -> str | None:
        """Return what makes an answer no number."""
        found = example.answers[0]
        if self.number(found) is not None:
            return None
        return f"its answer {found!r} is no number, as task number needs (words: data.number_words)"

    def number(self, text: str) -> float | None:
        """Return the number that a text is and nothing else, a percent sign allowed, or that its word means."""
        said = text.replace("%", "").strip()
        return self.words[said.lower()] if said.lower() in self.words else _parsed(said)

    def read(self, text: str, example: Example) -> str | None:
        """Return the first number of a text: `3`, `1,250`, `-2.5e3`, `40 %`, `minus two`, `twenty one`. None where it
        has none, and where it is not sure what it means: `3,5`, `one hundred`."""
        value = self._first(text)
        return None if value is None else f"{value:.12g}"

    def _first(self, text: str) -> float | None:
        tokens = _TOKEN.findall(text.lower())
        for place, token in enumerate(tokens):
            before, after = (tokens[i] if 0 <= i < len(tokens) else "" for i in (place - 1, place + 1))
            digits = not token.isalpha()
            if not digits and (token not in self.words or (token == "one" and before == "no")):
                continue
            value = _parsed(token.rstrip(".,")) if digits else self.words[token]
            if token in _TENS and 0 < self.words.get(after, 0) < 10:
                value, after = value + self.words[after], "".join(tokens[place + 2 : place + 3])
            if value is None or after in _MORE:
                return None
            return -value if before in _BELOW_ZERO else value
        return None

    def score(self, prediction: str, example: Example) -> float:
        """Return 1 − min(1, |error| / scale); 0 where no number was written."""
        value = self._first(prediction)
        return 0.0 if value is None else 1 - min(1.0, abs(value - self.number(example.answers[0])) / self.scale)

    def fits(self, prediction: str, example: Example) -> bool:
        """Return whether the error is at most a tenth of the scale."""
        return self.score(prediction, example) >= _NEAR

    def measures(self, prediction: str, example: Example) -> tuple[float, ...]:
        """Return the score, the number that was written (NaN for none) and the right one."""
        value = self._first(prediction)
        return self.score(prediction, example), math.nan if value is None else value, self.number(example.answers[0])

    def summarize(self, measured: np.ndarray) -> dict[str, np.ndarray]:
        """Return the mean score; MAE, RMSE and R² of the numbers that were written; the share of texts without one.
        What nothing can be said of is NaN: R² where all right numbers are equal."""
        score, said, right = np.moveaxis(measured, -1, 0)
        written = ~np.isnan(said)
        count = written.sum(-1)
        error = np.where(written, said - right, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = np.where(written, right, 0.0).sum(-1) / count
            spread = (np.where(written, right - mean[..., None], 0.0) ** 2).sum(-1)
            squares = (error**2).sum(-1)
            return {
                "score": score.mean(-1),
                "mae": np.abs(error).sum(-1) / count,
                "rmse": np.sqrt(squares / count),
                "r2": np.where(spread > 0, 1 - squares / spread, np.nan),
                "unparsed": 1 - written.mean(-1),
            }


def _parsed(text: str) -> float | None:
    """Return the number of a text of digits; None where it is none, or beyond what a float holds."""
    if not any(map(str.isdigit, text)) or not _NUMBER.fullmatch(text):
        return None
    value = float(text.replace(",", "").replace("−", "-"))
    return value if math.isfinite(value) else None
