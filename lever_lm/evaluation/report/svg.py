"""Line charts as inline SVG: numbers in, text out. Colours are classes of the page's style, so that they follow light
and dark; every point has its value as a tooltip, and the whole chart its summary for readers who cannot see it."""

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
    """Return an SVG of some lines over a common x, whose name is `across`. `ticks` are the x that are named, else round
    ones; `show` writes a value; `labels` units at the right hold the names of the lines, 0 for none."""
    chart = _Chart([one for one in series if one.points], show, size, labels or 10)
    axis = f'<text class="axis" x="{(_LEFT + chart.edge) / 2:.0f}" y="{chart.height - 4}" text-anchor="middle">'
    parts = [
        *map(chart.gridline, chart.levels),
        *(chart.tick(x) for x in ticks or chart.round_x() if chart.x[0] <= x <= chart.x[1]),
        f"{axis}{escape(across)}</text>",
        *map(chart.line, chart.series),
        *(chart.names() if labels else ()),
    ]
    ends = ([show(one.points[i][1]) for i in (0, -1)[: len(one.points)]] for one in chart.series)
    summary = "; ".join(f"{one.label} {' to '.join(texts)}" for one, texts in zip(chart.series, ends, strict=True))
    picture = f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(f"{title}: {summary}")}">'
    return f"{picture}{''.join(parts)}</svg>"


class _Chart:
    """From numbers to places in the picture, and from places to SVG."""

    def __init__(self, series: list[Series], show: Callable[[float], str], size: tuple[int, int], right: int):
        self.series, self.show, self.height, self.edge = series, show, size[1], size[0] - right
        values = [y for one in series for y in (*(y for _, y in one.points), *sum(one.intervals, ()))]
        if min(values) == max(values):  # a constant runs through the middle
            values = [values[0] - (abs(values[0]) or 1) / 2, values[0] + (abs(values[0]) or 1) / 2]
        self.levels = round_ticks(min(values), max(values), 4)
        places = [x for one in series if not one.flat for x, _ in one.points] or [0.0]
        self.x = (min(places), max(places))
        self.y = (min([*values, self.levels[0]]), max([*values, self.levels[-1]]))

    def across(self, x: float) -> float:
        """Return units from the left."""
        low, high = self.x
        return _LEFT + (x - low) / ((high - low) or 1) * (self.edge - _LEFT)

    def down(self, y: float) -> float:
        """Return units from the top."""
        low, high = self.y
        return self.height - _BOTTOM - (y - low) / ((high - low) or 1) * (self.height - _TOP - _BOTTOM)

    def round_x(self) -> list[float]:
        return [x for x in round_ticks(*self.x, 5) if x == int(x)]

    def gridline(self, level: float) -> str:
        y = self.down(level)
        return (
            f'<line class="grid" x1="{_LEFT}" x2="{self.edge}" y1="{y:.1f}" y2="{y:.1f}"/><text class="axis" '
            f'x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{escape(self.show(level))}</text>'
        )

    def tick(self, x: float) -> str:
        y = self.height - _BOTTOM + 16
        return f'<text class="axis" x="{self.across(x):.1f}" y="{y}" text-anchor="middle">{x:g}</text>'

    def line(self, one: Series) -> str:
        if one.flat:
            y, value = self.down(one.points[0][1]), self.show(one.points[0][1])
            return (
                f'<g class="{one.colour} flat"><title>{escape(f"{one.label}: {value}")}</title>'
                f'<line x1="{_LEFT}" x2="{self.edge}" y1="{y:.1f}" y2="{y:.1f}"/></g>'
            )
        places = [(self.across(x), self.down(y)) for x, y in one.points]
        parts = [f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>']
        for (x, _), (low, high) in zip(places, one.intervals, strict=True) if one.intervals else ():
            ends = f'y1="{self.down(low):.1f}" y2="{self.down(high):.1f}"'
            parts.append(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" {ends}/>')
        every = len(places) // _DOTS + 1
        for i, ((x, y), (epoch, value)) in enumerate(zip(places, one.points, strict=True)):
            chosen = one.marks.get(epoch)
            if i % every and not chosen and i < len(places) - 1:
                continue
            text = f"{one.label}, {epoch:g}: {self.show(value)}" + (f", chosen by {chosen}" if chosen else "")
            radius = 'class="chosen" r="4.5"' if chosen else f'r="{2.5 if len(places) < 30 else 1.5}"'
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" {radius}><title>{escape(text)}</title></circle>')
            if chosen:
                parts.append(f'<text class="at" x="{x:.1f}" y="{y - 8:.1f}" text-anchor="middle">{epoch:g}</text>')
        return f'<g class="{one.colour}">{"".join(parts)}</g>'

    def names(self) -> list[str]:
        """Return the name of each line beside its end, pushed apart where they would stand on each other."""
        wanted = sorted(((self.down(one.points[-1][1]), one) for one in self.series), key=lambda pair: pair[0])
        places: list[float] = []
        for y, _ in wanted:
            places.append(max(y, places[-1] + _LABEL) if places else max(y, _TOP))
        lowest = self.height - _BOTTOM + 4
        for i in range(len(places) - 1, -1, -1):  # what was pushed out below comes back up
            places[i] = min(places[i], lowest - _LABEL * (len(places) - 1 - i))
        x = self.edge
        return [
            f'<g class="{one.colour}"><line class="lead" x1="{x + 2}" x2="{x + 10}" y1="{y:.1f}" y2="{place:.1f}"/></g>'
            f'<text class="name" x="{x + 13}" y="{place + 4:.1f}">{escape(one.label)}</text>'
            for (y, one), place in zip(wanted, places, strict=True)
        ]


def round_ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers over a range, about so many, the first at or below `low`, the last at or above `high`."""
    span = max((high - low) or abs(high) or 1.0, 1e-300)  # of what is smaller there is no tenth
    step = 10.0 ** math.floor(math.log10(span / about))
    step *= next((factor for factor in (1, 2, 5) if step * factor * about >= span), 10)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) if abs(step) > 1e-9 else i * step for i in range(first, max(last, first + 1) + 1)]
