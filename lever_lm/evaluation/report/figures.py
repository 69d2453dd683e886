"""The report's charts as figures for papers: PNG at 300 dpi, and PDF, sized for a column, without titles.

Colours are Okabe and Ito's, which the colour-blind can tell apart; markers and dashes say the same in grey. The same
numbers give the same bytes: nothing of the machine, its settings or the time is in a file.
"""

import importlib.util
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import lever_lm
from lever_lm.evaluation.report.curves import Evaluated, Series, charts_of
from lever_lm.selectors import SELECTORS
from lever_lm.training.metrics import MEASURED, METRICS, RECOMMENDED
from lever_lm.utils.atomic_io import atomic_file
from lever_lm.utils.errors import LeverError
from lever_lm.utils.terminal import one_line

COLUMN, PAGE = 3.3, 6.8  # inches: the width of one column, of both
_OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_COLOURS = {f"m_{name}": one.colour for name, one in SELECTORS.items() if one.colour is not None}  # as on the page
_MARKERS = "os^Dv<>"  # one fewer than colours: the ninth line looks like none before it
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (4, 1.5, 1, 1.5)))
_GREY = "#555555"
_PANELS = 3  # in a row
_LONGEST = 40  # characters of a name
_METADATA = {"png": {"Software": None}, "pdf": {"Creator": None, "Producer": None, "CreationDate": None}}


def check_plots(directory: Path) -> None:
    """Raise LeverError where figures cannot be drawn here, or not into this directory."""
    if directory.exists() and not directory.is_dir():
        raise LeverError(f"cannot write {directory / 'accuracy.png'}: {directory} is a file (--png DIR)")
    if importlib.util.find_spec("matplotlib") is None:
        raise LeverError("--png needs a package that is not there: pip install 'lever-lm[plots]'")


def write_plots(runs: Sequence[Evaluated], directory: Path) -> list[Path]:
    """Draw the first run and the others over it: accuracy by shots, where one was evaluated, and the training curves of
    each phase. Returns the files in `directory`, which is made. Raises LeverError where a file cannot be written."""
    check_plots(directory)
    import matplotlib

    (_, series, curves), score = charts_of(runs), runs[0].metrics["score"]
    style = Path(lever_lm.__file__).with_name("templates") / "figures.mplstyle"
    written = []
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # of a name: a box stands for it
        matplotlib.rcdefaults()
        matplotlib.rc_file(style, use_default_template=False)
        if series:
            written += _save(_accuracy(series, score), directory / "accuracy")
        for phase, panels in curves.items():
            written += _save(_training(panels), directory / f"training_{phase}")
    return written


def _save(figure, stem: Path) -> list[Path]:
    paths = []
    for kind, metadata in _METADATA.items():
        content, path = io.BytesIO(), stem.with_suffix(f".{kind}")
        figure.savefig(content, format=kind, dpi=300, bbox_inches="tight", pad_inches=0.02, metadata=metadata)
        with atomic_file(path) as file:
            file.write(content.getvalue())
        paths.append(path)
    return paths


def _accuracy(series: Sequence[Series], score: str = "VQA accuracy"):
    """Return the score in percent by the number of demonstrations: a line with whiskers for each method, side by side
    where they meet; zero-shot is one grey line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(COLUMN, 2.6), layout="constrained")
    axes = figure.add_subplot()
    lines = [one for one in series if not one.flat]
    shots = sorted({x for one in lines for x, _ in one.points})  # 1, 2, 4 stand equally far apart
    for one in series:
        if one.flat:
            axes.axhline(one.points[0][1], color=_GREY, linestyle=(0, (1, 1)), label=_label(one.label))
    for i, one in enumerate(lines):
        aside = 0.07 * (i - (len(lines) - 1) / 2)
        axes.errorbar(
            [shots.index(x) + aside for x, _ in one.points],
            [y for _, y in one.points],
            yerr=[
                [max(y - low, 0) for (_, y), (low, _) in zip(one.points, one.intervals, strict=True)],
                [max(high - y, 0) for (_, y), (_, high) in zip(one.points, one.intervals, strict=True)],
            ],
            label=_label(one.label),
            capsize=1.5,
            elinewidth=0.7,
            **_look(_COLOURS.get(one.colour, len(_COLOURS) + i)),
        )
    axes.set_xticks(range(len(shots)), [f"{x:g}" for x in shots])
    axes.set(xlabel="demonstrations", ylabel=f"{score} (%)")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside lower center", ncols=2, handlelength=2.6, columnspacing=1.2)
    return figure


def _training(curves: dict[str, list[Series]]):
    """Return one panel a metric, over epochs; a ring around the epoch that the metric's own strategy chooses, and for a
    single run a line through all panels where val_reward does."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(_PANELS, len(curves))
    rows = -(-len(curves) // columns)
    names = list(dict.fromkeys(one.label for series in curves.values() for one in series))
    figure = Figure(figsize=(PAGE * columns / _PANELS, 1.45 * rows + 0.3), layout="constrained")
    strategy = MEASURED if MEASURED in curves else RECOMMENDED
    chosen = [x for one in curves.get(strategy, ()) for x in one.marks] if len(names) == 1 else []
    for number, (metric, series) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(rows, columns, number)
        for one in series:
            look = _look(names.index(one.label))
            axes.plot(*zip(*one.points, strict=True), **{**look, "marker": ""}, label=_label(one.label))
            for ring in (point for point in one.points if point[0] in one.marks):
                colours = {"facecolors": "white", "edgecolors": look["color"]}
                axes.scatter(*ring, s=22, zorder=3, **colours, label="chosen by this metric")
        for x in chosen:
            axes.axvline(x, color=_GREY, linewidth=0.7, linestyle=(0, (1, 1)), label=f"chosen by {strategy}")
        axes.set(xlabel="epoch", ylabel=METRICS[metric].label)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    found: dict = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4)
    return figure


def _look(number: int) -> dict:
    """Return colour, marker and dashes of the n-th line."""
    return {
        "color": _OKABE_ITO[number % len(_OKABE_ITO)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number % len(_DASHES)],
    }


def _label(name: str) -> str:
    """Return a name from a file as a label; matplotlib would leave out one that begins with an underscore."""
    text = one_line(name)
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return f" {text}" if text.startswith("_") else text
