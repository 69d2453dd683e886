"""Charts as inline SVG: what stands where; the markup is in templates/chart.svg.j2 and dots.svg.j2. Colours are classes
of the page's style, so that they follow light and dark; every point has its value as a tooltip, and the whole chart its
summary for readers who cannot see it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lever_lm.evaluation.report.curves import Series
from lever_lm.evaluation.templates import render

_LEFT, _TOP, _BOTTOM = 42, 20, 36
_LABEL = 13  # units between two labels at the right
_DOTS = 200  # of a line, about: more stand on each other
_ROW = 20  # units between the rows of a dot chart
_LONGEST = 24  # characters of a name at the left


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
    series = [one for one in series if one.points]
    right, bottom = size[0] - (labels or 10), size[1] - _BOTTOM
    values = [y for one in series for y in (*(y for _, y in one.points), *sum(one.intervals, ()))]
    if min(values) == max(values):  # a constant runs through the middle
        half = (abs(values[0]) or 1) / 2
        values = [values[0] - half, values[0] + half]
    levels = round_ticks(min(values), max(values), 4)
    xs = [x for one in series if not one.flat for x, _ in one.points] or [0.0]
    x_of = _scale(xs, _LEFT, right)
    y_of = _scale([*values, *levels], bottom, _TOP)
    lines = [_line(one, x_of, y_of, show) for one in series]
    by_end = sorted(lines, key=lambda line: line["end"])
    return render(
        "chart.svg.j2",
        {},
        size=size,
        title=title,
        across=across,
        left=_LEFT,
        right=right,
        bottom=bottom,
        levels=[(y_of(level), show(level)) for level in levels],
        ticks=[(x_of(x), f"{x:g}") for x in ticks or _whole_ticks(xs) if min(xs) <= x <= max(xs)],
        lines=lines,
        names=list(zip(by_end, _apart([line["end"] for line in by_end], bottom + 4), strict=True)) if labels else [],
    )


@dataclass(frozen=True)
class Dot:
    """One row of a dot chart. colour: a class of the page's style. strong: the row that the page is about."""

    label: str
    colour: str
    value: float
    low: float
    high: float
    strong: bool = False


def dot_chart(
    dots: Sequence[Dot], *, title: str, across: str, show: Callable[[float], str], mark: float | None = None
) -> str:
    """Return an SVG with a row for each dot, in their order: its name, its interval as a whisker, and its value as
    `show` writes it. `across` names the numbers; at `mark` stands a dashed line."""
    left = 12 + 7 * min(_LONGEST, max(len(dot.label) for dot in dots))
    width, right, bottom = left + 300, left + 255, 10 + _ROW * len(dots)
    values = [value for dot in dots for value in (dot.value, dot.low, dot.high)]
    levels = round_ticks(min(values), max(values), 5)
    x_of = _scale([*values, *levels], left, right)
    return render(
        "dots.svg.j2",
        {},
        size=(width, bottom + _BOTTOM),
        title=title,
        across=across,
        left=left,
        right=right,
        bottom=bottom,
        levels=[(x_of(level), f"{level:g}") for level in levels],
        mark=None if mark is None else x_of(mark),
        rows=[
            {
                "dot": dot,
                "y": 10 + _ROW * i + _ROW // 2,
                "name": dot.label if len(dot.label) <= _LONGEST else f"{dot.label[: _LONGEST - 1]}…",
                "places": [x_of(value) for value in (dot.value, dot.low, dot.high)],
                "said": [show(value) for value in (dot.value, dot.low, dot.high)],
            }
            for i, dot in enumerate(dots)
        ],
    )


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """Return the function from numbers to places: the least of `values` stands at `start`, the largest at `end`."""
    low, high = min(values), max(values)
    return lambda value: round(start + (value - low) / ((high - low) or 1) * (end - start), 1)


def _line(one: Series, x_of: Callable, y_of: Callable, show: Callable[[float], str]) -> dict:
    """Return what the template draws of a line. dots: those of its points that are drawn; chosen: by what."""
    places = [(x_of(x), y_of(y)) for x, y in one.points]
    every, last = len(places) // _DOTS + 1, len(places) - 1
    return {
        "series": one,
        "places": places,
        "ends": [show(one.points[i][1]) for i in (0, -1)[: len(places)]],
        "end": places[-1][1],
        "whiskers": [
            (x, *map(y_of, ends)) for (x, _), ends in zip(places if one.intervals else (), one.intervals, strict=True)
        ],
        "dots": [
            {"x": x, "y": y, "at": f"{at:g}", "value": show(value), "chosen": one.marks.get(at)}
            for i, ((x, y), (at, value)) in enumerate(zip(places, one.points, strict=True))
            if not i % every or at in one.marks or i == last
        ],
    }


def _apart(wanted: Sequence[float], lowest: float) -> list[float]:
    """Return ascending heights so pushed apart that no label stands on another, none below `lowest`."""
    steps = _LABEL * np.arange(len(wanted))
    below = steps + np.maximum.accumulate(np.maximum(wanted, _TOP) - steps)
    return np.minimum(below, lowest - steps[::-1]).round(1).tolist()


def _whole_ticks(xs: Sequence[float]) -> list[float]:
    return [x for x in round_ticks(min(xs), max(xs), 5) if x == int(x)]


def round_ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers over a range, about so many, the first at or below `low`, the last at or above `high`."""
    span = max((high - low) or abs(high) or 1.0, 1e-300)  # of what is smaller there is no tenth
    step = 10.0 ** math.floor(math.log10(span / about))
    step *= next((factor for factor in (1, 2, 5) if step * factor * about >= span), 10)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) if abs(step) > 1e-9 else i * step for i in range(first, max(last, first + 1) + 1)]
