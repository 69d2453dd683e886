"""How far a long stage is: what it counts, how fast it goes, how long it will take; as a line and as a bar."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lever_lm.utils.terminal import one_line

# Items, `name: how much there is to do`, and their number → the items, followed on the screen.
Track = Callable[[Iterable, str, int], Iterable]
Made = TypeVar("Made")

WORTH_A_WORD = 2.0  # seconds; what is done sooner needs no bar and no summary
BETWEEN_LINES = 30.0  # seconds between the lines of a stage where there is no bar
_RECENT = 60.0  # seconds that a rate is taken over, so that it follows batches that become smaller
_YOUNG = 0.3  # seconds; a bar that would only flash up is not drawn
_BAR = (6, 32)  # columns
_GAP = "  "


def untracked(items: Iterable, what: str, total: int) -> Iterable:
    """The Track that shows nothing."""
    return items


def unsaid(text: str) -> None:
    """Say nothing."""


def loaded(track: Track, what: str, load: Callable[[], Made]) -> Made:
    """What `load` makes: one piece of work, of which a bar shows only how long it has taken so far."""
    (made,) = [make() for make in track(Work([load], "models", after=WORTH_A_WORD), what, 1)]
    return made


def _one(item: Any) -> int:
    return 1


@dataclass(frozen=True)
class Work:
    """Items, and what a progress bar should know of them. Whoever shows no progress iterates over them as they are.

    unit: what is counted, in the plural; size: how many of these an item is; done: how many were done before the first
    item; known: how many need not be done, the answer being in a cache; now: the latest metrics in words; after:
    seconds before the first line where there is no bar, 0 for one at the start.
    """

    items: Iterable
    unit: str = "items"
    size: Callable[[Any], int] = _one
    done: int = 0
    known: int = 0
    now: Callable[[], str] = str
    after: float = 0.0

    def __iter__(self) -> Iterator:
        return iter(self.items)


class Stage:
    """A stage at work: `total` units, of which `work.done` were there when it began."""

    def __init__(self, what: str, total: int, work: Work):
        self.name, self.total, self.work = one_line(what.partition(":")[0]), total, work
        self.done, self._began = work.done, monotonic()
        self._marks = deque([(self._began, self.done)])
        self._next_line = self._began + (work.after or BETWEEN_LINES)

    def advance(self, count: int) -> None:
        """`count` more units are done."""
        now = monotonic()
        self.done += count
        self._marks.append((now, self.done))
        while len(self._marks) > 2 and self._marks[1][0] < now - _RECENT:
            self._marks.popleft()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return monotonic() - self._began

    @property
    def rate(self) -> float | None:
        """Units a second of late; None before the first one."""
        (then, before), (now, done) = self._marks[0], self._marks[-1]
        return (done - before) / (now - then) if done > before and now > then else None

    @property
    def left(self) -> float | None:
        """Seconds that the rest will take at this rate, counted down between one item and the next."""
        if self.rate is None:
            return None
        return max(0.0, (self.total - self.done) / self.rate - (monotonic() - self._marks[-1][0]))

    # ------------------------------------------------------------------ without a bar

    def due(self) -> bool:
        """Whether it is time for a line; True once for each."""
        now = monotonic()
        if now < self._next_line or self.done >= self.total:
            return False
        self._next_line = now + BETWEEN_LINES
        return True

    def line(self) -> str:
        """`inference: 1,200 of 6,500 prompts, 35.2/s, 2 min left, 340 known`."""
        parts = [f"{self.done:,} of {self.total:,} {self.work.unit}"]
        if self.rate:
            parts += [self._pace(self.rate, short=True), f"{duration(self.left)} left"]
        return f"{self.name}: {', '.join([*parts, *self._beside()])}"

    def summary(self) -> str:
        """`inference: 6,500 prompts in 3 min, 35.2/s`; what was there before is not counted."""
        count, took = self.done - self.work.done, max(self.elapsed, 1e-9)
        pace = f", {self._pace(count / took, short=True)}" if count > 1 else ""
        return f"{self.name}: {count:,} {self._units(count)} in {duration(took)}{pace}"

    def _beside(self) -> list[str]:
        known = [f"{self.work.known:,} known"] if self.work.known else []
        return [*known, *filter(None, [self.work.now()])]

    def _pace(self, rate: float, *, short: bool = False) -> str:
        if rate < 1:
            return f"{duration(1 / rate)}/{self._units(1)}"
        return f"{rate:,.{rate < 100:d}f}{'' if short else f' {self.work.unit}'}/s"

    def _units(self, count: int) -> str:
        return self.work.unit.removesuffix("s") if count == 1 else self.work.unit

    # ------------------------------------------------------------------ as a bar

    def drawn(self, width: int) -> list[RenderableType]:
        """Its lines on a terminal of `width` columns: name, bar and as many figures as fit; below, the metrics."""
        if self.elapsed < _YOUNG:
            return []
        longest = width // (3 if self.total > 1 else 2)
        name = self.name if len(self.name) <= longest else f"{self.name[: longest - 1]}…"
        figures = self._figures()
        while len(figures) > 1 and _room(width, name, figures) < _BAR[0]:
            figures.remove(max(figures, key=lambda figure: figure[1]))
        row = Table.grid(padding=(0, 1))
        for style in ("bold", "", ""):
            row.add_column(style=style, no_wrap=True)
        long = max(1, min(_room(width, name, figures), _BAR[1]))
        total = self.total if self.total > 1 else None  # of a single item nobody knows how far it is
        row.add_row(Text(name), ProgressBar(total, self.done, width=long), Text(_text(figures)))
        now = one_line(self.work.now())
        return [row, Text(f"  {now}", style="dim", no_wrap=True, overflow="ellipsis")] if now else [row]

    def _figures(self) -> list[tuple[str, int]]:
        """In the order in which they stand; the larger the number, the sooner one is left out for want of room."""
        figures = [(f"{self.done:,}/{self.total:,}", 0)] if self.total > 1 else []
        if self.rate:
            figures += [(self._pace(self.rate), 2), (f"{clock(self.left)} left", 1)]
        figures.append((clock(self.elapsed), 4))
        return figures + ([(f"{self.work.known:,} known", 3)] if self.work.known else [])


def _text(figures: list[tuple[str, int]]) -> str:
    return _GAP.join(text for text, _ in figures)


def _room(width: int, name: str, figures: list[tuple[str, int]]) -> int:
    """Columns that are left for the bar, with a space on either side."""
    return width - len(name) - len(_text(figures)) - 2


def duration(seconds: float) -> str:
    """`8 ms`, `0.4 s`, `34 s`, `12 min`, `3.5 h`."""
    if 0 < seconds < 0.095:
        return f"{max(1, round(seconds * 1000))} ms"
    if seconds < 90:
        return f"{seconds:.{seconds < 9.95:d}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def clock(seconds: float) -> str:
    """`0:34`, `12:05`, `3:00:00`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
