"""Line charts as inline SVG: numbers in, text out. Colours are classes of the page's style, so that they follow light
and dark; every point carries its value as a tooltip, and the whole chart its summary for who cannot see it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

_LEFT, _TOP, _BOTTOM = 42, 20, 36
_LABEL = 13  # units between two labels at the right
_DOTS = 200  # of a line, about: more stand on each other


@dataclass(frozen=True)
class Series:
    """One line. colour: a class of the page's style. intervals: (low, high) of each point, drawn as whiskers. flat: one
    value for all x, drawn from edge to edge. marks: x → what is chosen there."""

    label: str
    colour: str
    points: list[tuple[float, float]]
    intervals: list[tuple[float, float]] = field(default_factory=list)
    flat: bool = False
    marks: dict[float, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Frame:
    """From numbers to places in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int
    height: int
    right: int

    def across(self, x: float) -> float:
        """Units from the left."""
        low, high = self.x
        return _LEFT + (x - low) / ((high - low) or 1) * (self.width - _LEFT - self.right)

    def down(self, y: float) -> float:
        """Units from the top."""
        low, high = self.y
        return self.height - _BOTTOM - (y - low) / ((high - low) or 1) * (self.height - _TOP - _BOTTOM)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    across: str,
    ticks: Sequence[float] = (),
    show: Callable[[float], str] = "{:.4g}".format,
    size: tuple[int, int] = (300, 180),
    labels: int = 0,
) -> str:
    """An SVG of some lines over a common x, whose name is `across`. `ticks` are the x that are named, else round ones;
    `show` writes a value; `labels` units at the right hold the names of the lines, 0 for none."""
    width, height = size
    drawn = [one for one in series if one.points]
    values = [y for one in drawn for y in _extent(one)]
    places = [x for one in drawn if not one.flat for x, _ in one.points] or [0.0]
    if min(values) == max(values):  # a constant runs through the middle
        values = [values[0] - (abs(values[0]) or 1) / 2, values[0] + (abs(values[0]) or 1) / 2]
    rounded = round_ticks(min(values), max(values), 4)
    span = (min([*values, rounded[0]]), max([*values, rounded[-1]]))
    frame = _Frame((min(places), max(places)), span, width, height, labels or 10)
    ticks = ticks or [x for x in round_ticks(*frame.x, 5) if x == int(x)]
    parts = [
        *(_gridline(frame, y, show(y)) for y in rounded),
        *(_tick(frame, x) for x in ticks if frame.x[0] <= x <= frame.x[1]),
        f'<text class="axis" x="{(_LEFT + width - frame.right) / 2:.0f}" y="{height - 4}" text-anchor="middle">'
        f"{escape(across)}</text>",
        *(_line(frame, one, show) for one in drawn),
    ]
    if labels:
        parts += _labels(frame, drawn)
    summary = "; ".join(f"{one.label} {_summary(one, show)}" for one in drawn)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(f"{title}: {summary}")}">'
        f"{''.join(parts)}</svg>"
    )


def _extent(one: Series) -> list[float]:
    return [*(y for _, y in one.points), *(end for interval in one.intervals for end in interval)]


def _summary(one: Series, show: Callable[[float], str]) -> str:
    first, last = one.points[0][1], one.points[-1][1]
    return show(first) if len(one.points) == 1 else f"{show(first)} to {show(last)}"


def _gridline(frame: _Frame, y: float, text: str) -> str:
    place, end = frame.down(y), frame.width - frame.right
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{end}" y1="{place:.1f}" y2="{place:.1f}"/>'
        f'<text class="axis" x="{_LEFT - 5}" y="{place + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _tick(frame: _Frame, x: float) -> str:
    y = frame.height - _BOTTOM + 16
    return f'<text class="axis" x="{frame.across(x):.1f}" y="{y}" text-anchor="middle">{x:g}</text>'


def _line(frame: _Frame, one: Series, show: Callable[[float], str]) -> str:
    if one.flat:
        y, end = frame.down(one.points[0][1]), frame.width - frame.right
        text = escape(f"{one.label}: {show(one.points[0][1])}")
        return (
            f'<g class="{one.colour} flat"><title>{text}</title>'
            f'<line x1="{_LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/></g>'
        )
    places = [(frame.across(x), frame.down(y)) for x, y in one.points]
    parts = [f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>']
    for (x, _), (low, high) in zip(places, one.intervals, strict=True) if one.intervals else ():
        ends = f'y1="{frame.down(low):.1f}" y2="{frame.down(high):.1f}"'
        parts.append(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" {ends}/>')
    every = len(places) // _DOTS + 1
    for i, ((x, y), (epoch, value)) in enumerate(zip(places, one.points, strict=True)):
        chosen = one.marks.get(epoch)
        if i % every and not chosen and i < len(places) - 1:
            continue
        text = f"{one.label}, {epoch:g}: {show(value)}" + (f", chosen by {chosen}" if chosen else "")
        radius = 'class="chosen" r="4.5"' if chosen else f'r="{2.5 if len(places) < 30 else 1.5}"'
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" {radius}><title>{escape(text)}</title></circle>')
        if chosen:
            parts.append(f'<text class="at" x="{x:.1f}" y="{y - 8:.1f}" text-anchor="middle">{epoch:g}</text>')
    return f'<g class="{one.colour}">{"".join(parts)}</g>'


def _labels(frame: _Frame, series: Sequence[Series]) -> list[str]:
    """The name of each line beside its end, pushed apart where they would stand on each other."""
    wanted = sorted(((frame.down(one.points[-1][1]), one) for one in series), key=lambda pair: pair[0])
    places: list[float] = []
    for y, _ in wanted:
        places.append(max(y, places[-1] + _LABEL) if places else max(y, _TOP))
    lowest = frame.height - _BOTTOM + 4
    for i in range(len(places) - 1, -1, -1):  # what was pushed out below comes back up
        places[i] = min(places[i], lowest - _LABEL * (len(places) - 1 - i))
    x = frame.width - frame.right
    return [
        f'<g class="{one.colour}"><line class="lead" x1="{x + 2}" x2="{x + 10}" y1="{y:.1f}" y2="{place:.1f}"/></g>'
        f'<text class="name" x="{x + 13}" y="{place + 4:.1f}">{escape(one.label)}</text>'
        for (y, one), place in zip(wanted, places, strict=True)
    ]


def round_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers over a range, about so many, the first at or below `low` and the last at or above `high`."""
    span = max((high - low) or abs(high) or 1.0, 1e-300)  # of what is smaller there is no tenth
    step = 10.0 ** math.floor(math.log10(span / about))
    step *= next((factor for factor in (1, 2, 5) if step * factor * about >= span), 10)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) if abs(step) > 1e-9 else i * step for i in range(first, max(last, first + 1) + 1)]
