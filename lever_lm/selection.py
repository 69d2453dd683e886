"""Which epoch is best, from a run's metrics, its checkpoints, or a training log of ours or of the lineage."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lever_lm.checkpoint import load_torch
from lever_lm.errors import LeverError, UsageError
from lever_lm.runs import RunFolder

KL_RANGE, KL_TARGET = (0.01, 0.1), 0.05
GRPO_MARKER = "阶段3：GRPO训练"
LOGGED = ("train_loss", "val_loss", "ppo_loss", "kl", "adv_std", "adv_max", "beta")
_NUMBER = r"[+-]?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|inf|nan|Infinity|NaN)"
_LOG_ROW = re.compile(rf"^\s*(\d+)((?:\s+{_NUMBER}){{{len(LOGGED)}}})\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Strategy:
    """A metric and what makes it good: `score` of a value, the least wins; None for a value that does not qualify."""

    metric: str
    why: str
    score: Callable[[float], float | None]


STRATEGIES: dict[str, Strategy] = {
    "val_loss": Strategy("val_loss", "least validation loss", lambda value: value),
    "ppo_loss": Strategy("ppo_loss", "least PPO loss", lambda value: value),
    "kl": Strategy(
        "kl",
        "KL in [0.01, 0.1], nearest 0.05",
        lambda value: abs(value - KL_TARGET) if KL_RANGE[0] <= value <= KL_RANGE[1] else None,
    ),
    "adv_std": Strategy("adv_std", "largest advantage spread", lambda value: -value),
    "val_reward": Strategy("val_reward", "largest validation reward", lambda value: -value),
    "val_top_reward": Strategy(
        "val_top_reward", "largest validation reward of the top-ranked rollout", lambda value: -value
    ),
}


@dataclass(frozen=True)
class History:
    """Metrics by epoch of one phase, where they came from, and what had to be said about them."""

    rows: list[dict]
    source: str
    phase: str
    notes: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------- choosing


def check_strategy(name: str) -> Strategy:
    """The strategy of this name. Raises UsageError."""
    if name not in STRATEGIES:
        raise UsageError(f"unknown strategy {name!r}: one of {', '.join(STRATEGIES)} (--strategy)")
    return STRATEGIES[name]


def usable(rows: list[dict], strategy: Strategy) -> tuple[list[dict], list[dict]]:
    """Rows with a finite value of the strategy's metric, and the others as {epoch, why}."""
    kept, excluded = [], []
    for row in rows:
        value = row.get(strategy.metric)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            excluded.append({"epoch": row["epoch"], "why": f"no {strategy.metric}"})
        elif not math.isfinite(value):
            excluded.append({"epoch": row["epoch"], "why": f"{strategy.metric} is {value}"})
        else:
            kept.append(row)
    return kept, excluded


def best_row(rows: list[dict], strategy: Strategy) -> dict | None:
    """The best row, the first of equals; None when none qualifies."""
    scored = [(strategy.score(row[strategy.metric]), row) for row in usable(rows, strategy)[0]]
    qualified = [(score, row) for score, row in scored if score is not None]
    return min(qualified, key=lambda pair: pair[0])[1] if qualified else None


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
        nearest = min(kept, key=lambda r: abs(r[strategy.metric] - KL_TARGET))
        why = (
            f"none in range: no epoch has a {strategy.metric} in [{KL_RANGE[0]}, {KL_RANGE[1]}]; nearest is epoch "
            f"{nearest['epoch']} with {nearest[strategy.metric]:.5g}. Try another --strategy"
        )
    elif row is None:
        why = f"no epoch has a finite {strategy.metric} in {history.source}. Try another --strategy"
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
        rows, notes = _read_metrics(run.metrics)
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


def _read_metrics(path: Path) -> tuple[list[dict], list[str]]:
    rows, notes = [], []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if lines and lines[-1].strip():
        notes.append("the last row has no newline at its end: it was cut short and is ignored")
    for number, line in enumerate(lines[:-1], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("epoch"), int)
            or row.get("phase") not in ("rce", "grpo")
        ):
            raise LeverError(f"{path}, line {number}: not a metrics row with an epoch and a phase of rce or grpo")
        rows.append(row)
    return rows, notes


def _checkpoint_metrics(run: RunFolder) -> list[dict]:
    rows = []
    for path in run.path.glob("*_epoch*.pt"):
        match = re.fullmatch(r"(rce|grpo)_epoch(\d+)\.pt", path.name)
        if match:
            metrics = load_torch(path).get("metrics")
            if isinstance(metrics, dict) and metrics:
                rows.append({**metrics, "phase": match[1], "epoch": int(match[2])})
    return sorted(rows, key=lambda row: (row["phase"], row["epoch"]))


def read_log(path: Path) -> History:
    """The GRPO rows of the last run in a training log: those of its last table, and of the tables before that it
    goes on from, as a resumed run does."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise LeverError(f"cannot read the log {path}: {error.strerror} (--log)") from error
    notes: list[str] = []
    tables: list[list[dict]] = []
    lines = text.split("\n")
    if lines[-1].strip() and _starts_like_row(lines[-1]):
        notes.append("the last row has no newline at its end: it was cut short and is ignored")
    for line in lines[:-1]:
        line = line.rstrip("\r")
        if GRPO_MARKER in line:
            tables.append([])
        elif tables and (match := _LOG_ROW.match(line)):
            values = map(float, match[2].split())
            row = {"phase": "grpo", "epoch": int(match[1]), **dict(zip(LOGGED, values, strict=True))}
            tables[-1].append(row)
    rows = tables.pop() if tables else []
    if tables:
        notes.append(f"the log holds {len(tables) + 1} GRPO tables: the last one counts")
    while rows and tables and rows[0]["epoch"] > 1:
        earlier = [row for row in tables.pop() if row["epoch"] < rows[0]["epoch"]]
        if not earlier or earlier[-1]["epoch"] != rows[0]["epoch"] - 1:
            break
        notes.append(f"it goes on from epoch {earlier[-1]['epoch']} of the table before, whose epochs count too")
        rows = earlier + rows
    if not rows:
        raise LeverError(f"{path} holds no row of a GRPO table (heading {GRPO_MARKER!r}, then 8 numbers a row)")
    return History(rows, str(path), "grpo", notes)


def _starts_like_row(line: str) -> bool:
    return re.match(r"^\s*\d+\s", line) is not None
