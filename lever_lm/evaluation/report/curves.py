"""What is drawn of runs: accuracy by shots, and the metrics of each epoch with what every strategy chooses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lever_lm.evaluation.report.svg import Series, line_chart
from lever_lm.evaluation.results import is_finite, read_metrics
from lever_lm.selectors import LEARNED, SELECTORS, ZERO_SHOT
from lever_lm.training.log_parser import History
from lever_lm.training.metrics import METRICS, STRATEGIES, metrics_on
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.select_checkpoint import best_row, read_history
from lever_lm.utils.errors import LeverError
from lever_lm.utils.terminal import printable

PHASES = {"rce": "RCE warm-up", "grpo": "GRPO"}
RUN_COLOURS = 6  # of runs that are compared


@dataclass(frozen=True)
class Evaluated:
    """A run and the folder of its evaluation, None where it was not evaluated."""

    run: RunFolder
    inference: Path | None

    @property
    def name(self) -> str:
        """The name of the run's folder, fit for a page."""
        return printable(self.run.path.resolve().name)

    def metrics(self) -> dict:
        """What read_metrics has of the evaluation, all empty where there is none."""
        if self.inference is None:
            return {"results": [], "tests": [], "checkpoint": "", "policies": {}}
        return read_metrics(self.inference)

    def history(self) -> History | None:
        """Where its metrics are from, as `lever best-ckpt` reads them; None where there are none, as where choices from
        a file were evaluated."""
        try:
            return read_history(self.run, None)
        except LeverError:
            return None

    def rows(self) -> list[dict]:
        """The metrics of each epoch: all of metrics.jsonl, else those that its checkpoints or its log have."""
        if rows := self.run.rows():
            return rows
        history = self.history()
        return [{"phase": history.phase, **row} for row in history.rows] if history else []


def distinct_names(runs: Sequence[Evaluated]) -> list[str]:
    """A name for each run: its folder's, with as much of the path before it as tells it from the others."""
    paths = [one.run.path.resolve().parts for one in runs]
    deepest = max(map(len, paths))
    depth = next((n for n in range(1, deepest) if len({path[-n:] for path in paths}) == len(set(paths))), deepest)
    names = [printable("/".join(path[-depth:])) for path in paths]
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def _drawable(results: Sequence[dict]) -> list[dict]:
    return [row for row in results if is_finite(row["accuracy"]) and all(map(is_finite, row["ci"]))]


def accuracy_series(results: Sequence[dict], others: Sequence[tuple[str, Sequence[dict]]] = ()) -> list[Series]:
    """Accuracy in percent by shots: every method of one run, and of others, by name, what was learned."""
    series = _by_method(_drawable(results))
    for i, (name, rows) in enumerate(others):
        learned = _by_method([row for row in _drawable(rows) if row["method"] in LEARNED])
        for one in learned:
            series.append(Series(f"{one.label}, {name}", f"run{(i + 1) % RUN_COLOURS}", one.points, one.intervals))
    return series


def _by_method(results: Sequence[dict]) -> list[Series]:
    series = []
    for method in dict.fromkeys(row["method"] for row in results):
        rows = sorted((row for row in results if row["method"] == method), key=lambda row: row["shots"])
        points = [(row["shots"], 100 * row["accuracy"]) for row in rows]
        intervals = [(100 * row["ci"][0], 100 * row["ci"][1]) for row in rows]
        colour = f"m_{method}" if method in SELECTORS else "m_policy"
        flat = method == ZERO_SHOT
        series.append(Series(printable(method), colour, points, [] if flat else intervals, flat))
    return series


def accuracy_chart(series: Sequence[Series]) -> str:
    """The series over the number of demonstrations."""
    shots = sorted({x for one in series if not one.flat for x, _ in one.points})
    room = 20 + min(150, 6 * max((len(one.label) for one in series), default=0))
    return line_chart(
        series,
        title="VQA accuracy in percent by number of demonstrations",
        across="demonstrations (shots)",
        ticks=shots,
        show="{:.1f}".format,
        size=(270 + room, 290),
        labels=room,
    )


@dataclass(frozen=True)
class Curve:
    """One metric of one phase: a line for each run."""

    phase: str
    metric: str
    series: list[Series]

    @property
    def title(self) -> str:
        """What it is of."""
        return METRICS[self.metric].title


def training_curves(runs: Sequence[tuple[str, list[dict]]]) -> list[Curve]:
    """The logged metrics of runs by name, over epochs; a strategy marks the epoch that it chooses."""
    curves = []
    for phase in PHASES:
        for metric in metrics_on("curve"):
            series = [
                Series(name, f"run{i % RUN_COLOURS}", points, marks=_marks(rows, phase, metric))
                for i, (name, rows) in enumerate(runs)
                if len(points := _points(rows, phase, metric)) > 1
            ]
            if series:
                curves.append(Curve(phase, metric, series))
    return curves


def _points(rows: list[dict], phase: str, metric: str) -> list[tuple[float, float]]:
    return [(row["epoch"], row[metric]) for row in rows if row["phase"] == phase and is_finite(row.get(metric))]


def _marks(rows: list[dict], phase: str, metric: str) -> dict[float, str]:
    """The epoch that the strategy of this metric chooses. A run with GRPO is chosen from there alone."""
    judged = "grpo" if any(row["phase"] == "grpo" for row in rows) else "rce"
    if metric not in STRATEGIES or phase != judged:
        return {}
    best = best_row([row for row in rows if row["phase"] == phase], STRATEGIES[metric])
    return {best["epoch"]: metric} if best else {}


def curve_chart(curve: Curve) -> str:
    """One metric over epochs."""
    return line_chart(curve.series, title=f"{PHASES[curve.phase]}, {curve.title}", across="epoch")
