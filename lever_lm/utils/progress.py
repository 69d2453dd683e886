"""What a long stage tells of its work: what it counts, how fast it goes, how long the rest will take."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

# Items, `name: how much there is to do`, and their number → the items, followed on the screen.
Track = Callable[[Iterable, str, int], Iterable]
Made = TypeVar("Made")

WORTH_A_WORD = 2.0  # seconds; what is done sooner needs no bar and no summary
BETWEEN_LINES = 30.0  # seconds between the lines of a stage where there is no bar


def untracked(items: Iterable, what: str, total: int) -> Iterable:
    """The Track that shows nothing."""
    return items


def unsaid(text: str) -> None:
    """Say nothing."""


def loaded(track: Track, what: str, load: Callable[[], Made]) -> Made:
    """Return what `load` makes: one piece of work, whose bar shows only how long it has taken so far."""
    (made,) = [make() for make in track(Work([load], "models", after=WORTH_A_WORD), what, 1)]
    return made


@dataclass(frozen=True)
class Work:
    """Items, and what a progress bar should know of them. Where no progress is shown, they are iterated as they are.

    unit: what is counted, in the plural; size: how many of these an item is; done: how many were done before the first
    item; known: how many need not be done, the answer being in a cache; now: the latest metrics in words; after:
    seconds before the first line where there is no bar, 0 for one at the start.
    """

    items: Iterable
    unit: str = "items"
    size: Callable[[Any], int] = lambda item: 1
    done: int = 0
    known: int = 0
    now: Callable[[], str] = str
    after: float = 0.0

    def __iter__(self) -> Iterator:
        return iter(self.items)

    def pace(self, rate: float) -> str:
        """`35.2/s` or `12 s/epoch`, of a rate in units a second."""
        return f"{rate:,.{rate < 100:d}f}/s" if rate >= 1 else f"{duration(1 / rate)}/{self.unit.removesuffix('s')}"

    def summary(self, name: str, count: int, seconds: float) -> str:
        """`inference: 6,500 prompts in 3 min, 35.2/s`."""
        unit = self.unit.removesuffix("s") if count == 1 else self.unit
        pace = f", {self.pace(count / seconds)}" if count > 1 else ""
        return f"{name}: {count:,} {unit} in {duration(seconds)}{pace}"


def duration(seconds: float) -> str:
    """`8 ms`, `0.4 s`, `34 s`, `12 min`, `3.5 h`."""
    if 0 < seconds < 0.095:
        return f"{max(1, round(seconds * 1000))} ms"
    if seconds < 90:
        return f"{seconds:.{seconds < 9.95:d}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
