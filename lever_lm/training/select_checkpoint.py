"""The choice of the best epoch by the metrics of a run, its checkpoints, or a training log (ours or Lever-Plus's)."""

import contextlib
import math
import os
from pathlib import Path

from lever_lm.training.log_parser import History, read_log
from lever_lm.training.metrics import (
    KL_RANGE,
    KL_TARGET,
    LOGGED,
    MEASURED,
    PHASES,
    RECOMMENDED,
    STRATEGIES,
    Metric,
    table_of,
)
from lever_lm.training.metrics_file import metrics_rows
from lever_lm.training.run_dir import RunFolder
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.safe_parse import read_json
from lever_lm.utils.terminal import shown

_LONGEST_NAME = 256  # bytes of a file's

# ---------------------------------------------------------------------- choosing


def check_strategy(name: str) -> Metric:
    """Return the strategy of this name. Raises UsageError."""
    if name not in STRATEGIES:
        raise UsageError(f"unknown strategy {shown(name)}: one of {', '.join(STRATEGIES)} (--strategy)")
    return STRATEGIES[name]


def broken(row: dict, *more: str) -> str:
    """Return which of LOGGED, or of `more` metrics, are NaN or infinite in a row, "" where none is: of an epoch that
    broke, no number says anything."""
    numbers = {name: row[name] for name in (*LOGGED, *more) if isinstance(row.get(name), float)}
    return ", ".join(f"{name} is {number}" for name, number in numbers.items() if not math.isfinite(number))


def usable(rows: list[dict], strategy: Metric) -> tuple[list[dict], list[dict]]:
    """Return the rows of epochs that did not break and have the strategy's metric, and the others as {epoch, why}."""
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
    """Return the best row, the first of equals; None when none qualifies."""
    scored = [(strategy.score(row[strategy.key]), row) for row in usable(rows, strategy)[0]]
    qualified = [(score, row) for score, row in scored if score is not None]
    return min(qualified, key=lambda pair: pair[0])[1] if qualified else None


def epochs_since_best(rows: list[dict]) -> int:
    """Return the number of GRPO epochs since the first one of the largest val_reward; 0 where none has any."""
    grpo = [row for row in rows if row["phase"] == "grpo"]
    best = best_row(grpo, STRATEGIES[RECOMMENDED])
    return len(grpo) - 1 - grpo.index(best) if best else 0


def choose(history: History, name: str, run: RunFolder | None) -> dict:
    """Return the answer of `lever best-ckpt`: strategy, epoch, checkpoint, exists, metrics, rows, excluded, others,
    why."""
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
        if name == MEASURED:
            why += ", or measure it: lever train --validate-on answers"
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


def read_best(run: RunFolder) -> dict:
    """Read best.json. Raises LeverError when it is not what `lever best-ckpt` writes."""
    try:
        answer = read_json(run.best)
        name = Path(answer["checkpoint"]).name
        if answer["strategy"] in STRATEGIES and 0 < len(os.fsencode(name)) < _LONGEST_NAME and "\0" not in name:
            return answer
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise LeverError(f"{run.best} is not an answer of `lever best-ckpt`: run that again, or delete the file")


def worth_keeping(run: RunFolder, rows: list[dict], latest: int) -> set[Path]:
    """Return the checkpoints that pruning to the `latest` epochs of each phase spares: these, the best of
    every strategy, and the one that best.json names. A best epoch that is passed by another one is never the best
    again."""
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
    """Read the metrics from `log` where one is given; else from the run: from metrics.jsonl, its checkpoints, or
    train.log, in this order.

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
    """Keep the GRPO rows; those of the warm-up where there was no GRPO, of several warm-ups those of the last: numbers
    of different losses do not compare."""
    phase = "grpo" if any(row["phase"] == "grpo" for row in rows) else "rce"
    rows = [row for row in rows if row["phase"] == phase]
    return History([row for row in rows if table_of(row) == table_of(rows[-1])], source, phase, notes)


def _checkpoint_metrics(run: RunFolder) -> list[dict]:
    from lever_lm.utils.safe_torch_load import load_torch

    rows = []
    for (phase, epoch), path in sorted(run.checkpoints().items()):
        metrics = load_torch(path).get("metrics") if path.suffix == ".pt" else None
        numbers = {k: v for k, v in metrics.items() if _is_number(k, v)} if isinstance(metrics, dict) else {}
        if numbers:
            rows.append({**numbers, "phase": phase, "epoch": epoch})
    return rows


def _is_number(name, value) -> bool:
    return isinstance(name, str) and (isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63))
