"""Which epoch is best, from a run's metrics, its checkpoints, or a training log of ours or of the lineage."""

import contextlib
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from lever_lm.training.metrics import GRPO_MARKER, KL_RANGE, KL_TARGET, LOGGED, PHASES, RECOMMENDED, STRATEGIES, Metric
from lever_lm.training.metrics_file import metrics_rows
from lever_lm.training.run_dir import RunFolder
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.safe_parse import Line, is_epoch, lines, read_json
from lever_lm.utils.terminal import shown

_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|inf|nan|Infinity|NaN)"
_LOG_ROW = re.compile(rf"^\s*(\d{{1,9}})((?:\s+{_NUMBER}){{{len(LOGGED)}}})\s*$", re.IGNORECASE)
_LOG_PART = 64 << 10  # bytes of a log that are looked at together
_LONGEST_NAME = 256  # bytes of a file's
_LONGEST_ROW = 1000  # characters
_MOST_ROWS = 100_000  # epochs of one run
_JOINS = 5  # notes on tables that are one run


@dataclass(frozen=True)
class History:
    """Metrics by epoch of one phase, where they came from, and what had to be said about them."""

    rows: list[dict]
    source: str
    phase: str
    notes: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------- choosing


def check_strategy(name: str) -> Metric:
    """The strategy of this name. Raises UsageError."""
    if name not in STRATEGIES:
        raise UsageError(f"unknown strategy {shown(name)}: one of {', '.join(STRATEGIES)} (--strategy)")
    return STRATEGIES[name]


def broken(row: dict, *more: str) -> str:
    """Return which of LOGGED, or of `more` metrics, are NaN or infinite in a row, "" where none is: of an epoch that
    broke, no number says anything."""
    numbers = {name: row[name] for name in (*LOGGED, *more) if isinstance(row.get(name), float)}
    return ", ".join(f"{name} is {number}" for name, number in numbers.items() if not math.isfinite(number))


def usable(rows: list[dict], strategy: Metric) -> tuple[list[dict], list[dict]]:
    """Rows of epochs that did not break and have the strategy's metric, and the others as {epoch, why}."""
    kept, excluded = [], []
    for row in rows:
        value = row.get(strategy.key)
        if why := broken(row, strategy.key):
            excluded.append({"epoch": row["epoch"], "why": why})
        elif not isinstance(value, (int, float)) or isinstance(value, bool):
            excluded.append({"epoch": row["epoch"], "why": f"no {strategy.key}"})
        else:
            kept.append(row)
    return kept, excluded


def best_row(rows: list[dict], strategy: Metric) -> dict | None:
    """The best row, the first of equals; None when none qualifies."""
    scored = [(strategy.score(row[strategy.key]), row) for row in usable(rows, strategy)[0]]
    qualified = [(score, row) for score, row in scored if score is not None]
    return min(qualified, key=lambda pair: pair[0])[1] if qualified else None


def epochs_since_best(rows: list[dict]) -> int:
    """GRPO epochs since the first one of the largest val_reward; 0 where none has any."""
    grpo = [row for row in rows if row["phase"] == "grpo"]
    best = best_row(grpo, STRATEGIES[RECOMMENDED])
    return len(grpo) - 1 - grpo.index(best) if best else 0


def choose(history: History, name: str, run: RunFolder | None) -> dict:
    """The answer of `lever best-ckpt`: strategy, epoch, checkpoint, exists, metrics, rows, excluded, others, why."""
    strategy = check_strategy(name)
    kept, excluded = usable(history.rows, strategy)
    row = best_row(history.rows, strategy)
    path = run.checkpoint(history.phase, row["epoch"]) if run is not None and row else None
    others = {
        other: (best["epoch"] if (best := best_row(history.rows, STRATEGIES[other])) else None)
        for other in STRATEGIES
        if other != name
    }
    why = strategy.why
    if row is None and kept:
        nearest = min(kept, key=lambda r: abs(r[strategy.key] - KL_TARGET))
        why = (
            f"none in range: no epoch has a {strategy.key} in [{KL_RANGE[0]}, {KL_RANGE[1]}]; nearest is epoch "
            f"{nearest['epoch']} with {nearest[strategy.key]:.5g}. Try another --strategy"
        )
    elif row is None:
        why = f"no epoch has a finite {strategy.key} and no broken number in {history.source}. Try another --strategy"
    return {
        "strategy": name,
        "epoch": row["epoch"] if row else None,
        "phase": history.phase,
        "checkpoint": str(path) if path else None,
        "exists": bool(path and path.is_file()),
        "metrics": {k: v for k, v in row.items() if k not in ("epoch", "phase")} if row else None,
        "rows": len(history.rows),
        "excluded": excluded,
        "others": others,
        "why": why,
        "source": history.source,
        "notes": history.notes,
    }


def kept_choice(run: RunFolder) -> tuple[str, int] | None:
    """Strategy and epoch of best.json; None where there is none, or none of ours."""
    try:
        answer = read_best(run)
        return (answer["strategy"], answer["epoch"]) if is_epoch(answer["epoch"]) else None
    except (LeverError, KeyError):
        return None


def read_best(run: RunFolder) -> dict:
    """The content of best.json. Raises LeverError when it is not what `lever best-ckpt` writes."""
    try:
        answer = read_json(run.best)
        name = Path(answer["checkpoint"]).name
        if answer["strategy"] in STRATEGIES and 0 < len(os.fsencode(name)) < _LONGEST_NAME and "\0" not in name:
            return answer
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise LeverError(f"{run.best} is not an answer of `lever best-ckpt`: run that again, or delete the file")


def worth_keeping(run: RunFolder, rows: list[dict], latest: int) -> set[Path]:
    """The checkpoints that pruning to the `latest` epochs of each phase spares: these, the best of every strategy, and
    the one that best.json names. A best epoch that is passed by another one is never the best again."""
    kept: set[Path] = set()
    with contextlib.suppress(LeverError):
        kept |= {run.path / Path(read_best(run)["checkpoint"]).name}
    for phase in PHASES:
        of_phase = [row for row in rows if row["phase"] == phase]
        best = (best_row(of_phase, strategy) for strategy in STRATEGIES.values())
        spared = [*of_phase[-latest:], *(row for row in best if row is not None)]
        kept |= {run.checkpoint(phase, row["epoch"]) for row in spared}
    return kept


# ---------------------------------------------------------------------- reading


def read_history(run: RunFolder | None, log: Path | None) -> History:
    """From `log` where one is given; else from metrics.jsonl, the checkpoints, or train.log of the run, in this order.

    Raises LeverError when there is nothing to choose from.
    """
    if log is not None:
        return read_log(log)
    if run is not None and run.path.is_file():
        raise LeverError(f"{run.path} is a file: name its folder, {run.path.parent}")
    if run is None or not run.path.is_dir():
        where = run.path if run else "a run"
        raise LeverError(f"no run folder {where}: train first (`lever train`), or name the run (--run-name, --results)")
    if run.metrics.is_file():
        rows, notes = metrics_rows(run.metrics)
        if rows:
            return _one_phase(rows, str(run.metrics), notes)
    rows = _checkpoint_metrics(run)
    if rows:
        return _one_phase(rows, f"the metrics in the checkpoints of {run.path}", [])
    if run.log.is_file():
        return read_log(run.log)
    raise LeverError(
        f"{run.path} has no metrics.jsonl, no checkpoint with metrics and no train.log: nothing to choose from. "
        "Train first (`lever train`), or pass a training log with --log FILE"
    )


def _one_phase(rows: list[dict], source: str, notes: list[str]) -> History:
    """GRPO rows only; RCE rows where there was no GRPO."""
    phase = "grpo" if any(row["phase"] == "grpo" for row in rows) else "rce"
    return History([row for row in rows if row["phase"] == phase], source, phase, notes)


def _checkpoint_metrics(run: RunFolder) -> list[dict]:
    from lever_lm.utils.safe_torch_load import load_torch

    rows = []
    for path in run.path.glob("*_epoch*.pt"):
        match = re.fullmatch(r"(rce|grpo)_epoch(\d{1,9})\.pt", path.name)
        if match:
            metrics = load_torch(path).get("metrics")
            numbers = {k: v for k, v in metrics.items() if _is_number(k, v)} if isinstance(metrics, dict) else {}
            if numbers:
                rows.append({**numbers, "phase": match[1], "epoch": int(match[2])})
    return sorted(rows, key=lambda row: (row["phase"], row["epoch"]))


def _is_number(name, value) -> bool:
    return isinstance(name, str) and (isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63))


def read_log(path: Path) -> History:
    """The GRPO rows of the last run in a training log: those of its last table, and of the tables before that it
    goes on from, as a resumed run does. Raises LeverError where there are none, or more than a run can have."""
    tables, notes = _Tables(), []
    try:
        for line in lines(path, _LOG_PART, overlap=len(GRPO_MARKER.encode())):
            if line.ended or not line.whole:
                tables.add(line)
            elif _starts_like_row(line.text):
                notes.append("the last row has no newline at its end: it was cut short and is ignored")
    except OSError as error:
        raise LeverError(f"cannot read the log {path}: {error.strerror or error} (--log)") from error
    except OverflowError as error:
        raise LeverError(f"{path} holds {error}: no log of a training run (--log)") from error
    if tables.count > 1:
        notes.append(f"the log holds {tables.count} GRPO tables: the last one counts")
    joined = [epoch for epoch, _ in tables.before][::-1]
    notes += [f"it goes on from epoch {epoch} of the table before, whose epochs count too" for epoch in joined[:_JOINS]]
    if len(joined) > _JOINS:
        notes.append(f"and so on, {len(joined)} times in all")
    rows = [row for _, part in tables.before for row in part] + tables.last
    if not tables.last:
        raise LeverError(f"{path} holds no row of a GRPO table (heading {GRPO_MARKER!r}, then 8 numbers a row)")
    return History(rows, str(path), "grpo", notes)


class _Tables:
    """The GRPO tables of a log, of which only the last is kept and those that it goes on from.

    last: rows of the last table so far; before: (last epoch, rows) of each table that this one goes on from.
    """

    def __init__(self):
        self.count = 0
        self.before: list[tuple[int, list[dict]]] = []
        self.last: list[dict] = []
        self._ended: list[dict] = []  # the table before, until the first row of this one tells what it is worth
        self._kept = 0  # rows in `before`

    def add(self, line: Line) -> None:
        """Take the next line. Raises OverflowError, naming it, for more rows than a run can have."""
        if GRPO_MARKER in line.text:
            self._ended, self.last = self.last, []
            self.count += 1
        elif self.count and line.whole and len(line.text) <= _LONGEST_ROW and (match := _LOG_ROW.match(line.text)):
            values = map(float, match[2].split())
            row = {"phase": "grpo", "epoch": int(match[1]), **dict(zip(LOGGED, values, strict=True))}
            if not self.last:
                self._join(row["epoch"])
            self.last.append(row)
            if len(self.last) + self._kept > _MOST_ROWS:
                raise OverflowError(f"more than {_MOST_ROWS} epochs of one run")

    def _join(self, epoch: int) -> None:
        """Keep of the table before what lies before `epoch`, where that is the epoch it goes on from."""
        earlier = [row for row in self._ended if row["epoch"] < epoch]
        goes_on = epoch > 1 and earlier and earlier[-1]["epoch"] == epoch - 1
        if not goes_on or earlier[0] is not self._ended[0]:
            self._forget()
        if goes_on:
            self.before.append((epoch - 1, earlier))
            self._kept += len(earlier)

    def _forget(self) -> None:
        self.before, self._kept = [], 0


def _starts_like_row(line: str) -> bool:
    return re.match(r"^\s*\d+\s", line) is not None
