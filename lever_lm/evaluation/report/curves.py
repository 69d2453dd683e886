"""What page and figures draw of runs: accuracy by shots, and the metrics of each epoch with what strategies choose."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lever_lm.evaluation.results import NOTHING, is_finite, read_metrics
from lever_lm.selectors import LEARNED, SELECTORS, ZERO_SHOT
from lever_lm.training.log_parser import History
from lever_lm.training.metrics import STRATEGIES, metrics_on, table_of
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

    @cached_property
    def metrics(self) -> dict:
        """What read_metrics returns of the evaluation, NOTHING where there is none."""
        return read_metrics(self.inference) if self.inference else NOTHING

    @cached_property
    def history(self) -> History | None:
        """The metrics as `lever best-ckpt` reads them; None where there are none, as where a file was evaluated."""
        try:
            return read_history(self.run, None)
        except LeverError:
            return None

    @cached_property
    def rows(self) -> list[dict]:
        """The metrics of each epoch: all of metrics.jsonl, else those that its checkpoints or its log have."""
        if rows := self.run.rows():
            return rows
        return [{"phase": self.history.phase, **row} for row in self.history.rows] if self.history else []


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


Curves = dict[str, dict[str, list[Series]]]  # phase → metric → a line for each run


def charts_of(runs: Sequence[Evaluated]) -> tuple[list[str], list[Series], Curves]:
    """Return the names of runs, the accuracy of the first with the others over it, and the training curves of all."""
    names = distinct_names([one.run.path for one in runs])
    others = [(name, one.metrics["results"]) for name, one in zip(names[1:], runs[1:], strict=True)]
    curves = training_curves([(name, one.rows) for name, one in zip(names, runs, strict=True)])
    return names, accuracy_series(runs[0].metrics["results"], others), curves


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run: its folder's, with as much of the path before it as tells it from the others."""
    paths = [folder.resolve().parts for folder in folders]
    deepest = max(map(len, paths))
    depth = next((n for n in range(1, deepest) if len({path[-n:] for path in paths}) == len(set(paths))), deepest)
    names = [printable("/".join(path[-depth:])) for path in paths]
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def accuracy_series(results: Sequence[dict], others: Sequence[tuple[str, Sequence[dict]]] = ()) -> list[Series]:
    """Return accuracy in percent by shots: every method of one run, and of others, by name, what was learned."""
    series = _by_method(results)
    for i, (name, rows) in enumerate(others):
        for one in _by_method([row for row in rows if row["method"] in LEARNED]):
            series.append(Series(f"{one.label}, {name}", f"run{(i + 1) % RUN_COLOURS}", one.points, one.intervals))
    return series


def _by_method(results: Sequence[dict]) -> list[Series]:
    series = []
    results = [row for row in results if is_finite(row["accuracy"]) and all(map(is_finite, row["ci"]))]
    for method in dict.fromkeys(row["method"] for row in results):
        rows = sorted((row for row in results if row["method"] == method), key=lambda row: row["shots"])
        points = [(row["shots"], 100 * row["accuracy"]) for row in rows]
        intervals = [(100 * row["ci"][0], 100 * row["ci"][1]) for row in rows]
        colour = f"m_{method}" if method in SELECTORS else "m_policy"
        flat = method == ZERO_SHOT
        series.append(Series(printable(method), colour, points, [] if flat else intervals, flat))
    return series


def training_curves(runs: Sequence[tuple[str, list[dict]]]) -> Curves:
    """Return the logged metrics of runs by name, over epochs; a strategy marks the epoch that it chooses."""
    curves: Curves = {}
    for phase in PHASES:
        for metric in metrics_on("curve"):
            for i, (name, all_rows) in enumerate(runs):
                rows = [row for row in all_rows if row["phase"] == phase]
                of_rce = metric == "temperature"  # the weights of no other warm-up have one
                shown = [row for row in rows if is_finite(row.get(metric)) and not (of_rce and table_of(row)[1])]
                points = [(row["epoch"], row[metric]) for row in shown]
                # A run with GRPO is chosen from there alone.
                chosen_from = phase == "grpo" or all(row["phase"] == "rce" for row in all_rows)
                last = [row for row in rows if table_of(row) == table_of(rows[-1])]  # of one loss
                best = best_row(last, STRATEGIES[metric]) if metric in STRATEGIES and chosen_from else None
                if len(points) > 1:
                    marks = {best["epoch"]: metric} if best else {}
                    warmups = dict.fromkeys(table_of(row)[1] or "rce" for row in rows if phase == "rce")
                    of = f" ({'+'.join(warmups)})" if any(loss != "rce" for loss in warmups) else ""
                    line = Series(f"{name}{of}", f"run{i % RUN_COLOURS}", points, marks=marks)
                    curves.setdefault(phase, {}).setdefault(metric, []).append(line)
    return curves
