"""The GRPO rows of a training log, ours or Lever-Plus's: those of the last table in it."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from lever_lm.training.metrics import GRPO_MARKER, LOGGED, METRICS
from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_parse import lines

_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf|nan|infinity)", re.IGNORECASE)
_LOG_PART = 64 << 10  # bytes of a log that are looked at together
_LONGEST_ROW = 1000  # characters
_KEYS = {metric.column.heading: key for key, metric in METRICS.items() if metric.column}
_HEADING = re.compile("|".join(map(re.escape, _KEYS)) + r"|\S+")  # known ones, with the blank in them, or a word


@dataclass(frozen=True)
class History:
    """Metrics by epoch of one phase, where they came from, and notes on what was read."""

    rows: list[dict]
    source: str
    phase: str
    notes: list[str] = field(default_factory=list)


def read_log(path: Path) -> History:
    """Read the rows of the last GRPO table in a training log, by the names in its heading; the seed's columns where it
    has no such line. Raises LeverError where there are none."""
    tables, rows, columns, notes = 0, [], LOGGED, []
    try:
        for line in lines(path, _LOG_PART, overlap=len(GRPO_MARKER.encode())):
            if GRPO_MARKER in line.text:
                tables, rows, columns = tables + 1, [], LOGGED
            elif tables and line.whole and len(line.text) <= _LONGEST_ROW:
                if all(METRICS[key].column.heading in line.text for key in LOGGED):
                    columns = _HEADING.findall(line.text)[1:]
                elif (row := _row(line.text, columns)) and line.ended:
                    rows.append(row)
                elif row or (not line.ended and re.match(r"\s*\d+\s", line.text)):
                    notes.append("the last row has no newline at its end: it was cut short and is ignored")
    except OSError as error:
        raise LeverError(f"cannot read the log {path}: {error.strerror or error} (--log)") from error
    if not rows:
        raise LeverError(f"{path} holds no row of a GRPO table (heading {GRPO_MARKER!r}, then a row of numbers each)")
    if tables > 1:
        notes.append(f"the log holds {tables} GRPO tables: the last one counts")
    return History(rows, str(path), "grpo", notes)


def _row(text: str, columns) -> dict | None:
    """Return the epoch and the metrics in a line of a table; None where it is no such line. columns: headings or keys,
    of which unknown ones are left out."""
    epoch, *values = text.split() or [""]
    if not re.fullmatch("[0-9]{1,9}", epoch) or len(values) != len(columns) or not all(map(_NUMBER.fullmatch, values)):
        return None
    named = {_KEYS.get(name, name): float(value) for name, value in zip(columns, values, strict=True)}
    return {"phase": "grpo", "epoch": int(epoch), **{key: value for key, value in named.items() if key in METRICS}}
