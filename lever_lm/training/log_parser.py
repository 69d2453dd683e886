"""The GRPO rows of a training log, ours or Lever-Plus's: those of the last run in it."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from lever_lm.training.metrics import GRPO_MARKER, LOGGED
from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_parse import Line, lines

_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|inf|nan|Infinity|NaN)"
_ROW = re.compile(rf"^\s*(\d{{1,9}})((?:\s+{_NUMBER}){{{len(LOGGED)}}})\s*$", re.IGNORECASE)
_LOG_PART = 64 << 10  # bytes of a log that are looked at together
_LONGEST_ROW = 1000  # characters
_JOINS = 5  # notes on tables that are one run


@dataclass(frozen=True)
class History:
    """Metrics by epoch of one phase, where they came from, and notes on what was read."""

    rows: list[dict]
    source: str
    phase: str
    notes: list[str] = field(default_factory=list)


def read_log(path: Path) -> History:
    """Read the GRPO rows of the last run in a training log: the rows of its last table, and those of the tables before
    that it goes on from, as a resumed run does. Raises LeverError where there are none."""
    tables, notes = _Tables(), []
    try:
        for line in lines(path, _LOG_PART, overlap=len(GRPO_MARKER.encode())):
            if line.ended or not line.whole:
                tables.add(line)
            elif re.match(r"^\s*\d+\s", line.text):
                notes.append("the last row has no newline at its end: it was cut short and is ignored")
    except OSError as error:
        raise LeverError(f"cannot read the log {path}: {error.strerror or error} (--log)") from error
    if not tables.last:
        raise LeverError(f"{path} holds no row of a GRPO table (heading {GRPO_MARKER!r}, then 8 numbers a row)")
    if tables.count > 1:
        notes.append(f"the log holds {tables.count} GRPO tables: the last one counts")
    joined = [part[-1]["epoch"] for part in reversed(tables.before)]
    notes += [f"it goes on from epoch {epoch} of the table before, whose epochs count too" for epoch in joined[:_JOINS]]
    if len(joined) > _JOINS:
        notes.append(f"and so on, {len(joined)} times in all")
    return History([row for part in (*tables.before, tables.last) for row in part], str(path), "grpo", notes)


class _Tables:
    """The GRPO tables of a log: how many there were, the rows of the last one so far, and of each table before that it
    goes on from the rows that count."""

    def __init__(self):
        self.count = 0
        self.before: list[list[dict]] = []
        self.last: list[dict] = []
        self._ended: list[dict] = []  # the table before, until the first row of this one tells what it is worth

    def add(self, line: Line) -> None:
        """Take the next line."""
        if GRPO_MARKER in line.text:
            self._ended, self.last = self.last, []
            self.count += 1
        elif self.count and line.whole and len(line.text) <= _LONGEST_ROW and (match := _ROW.match(line.text)):
            values = map(float, match[2].split())
            row = {"phase": "grpo", "epoch": int(match[1]), **dict(zip(LOGGED, values, strict=True))}
            if not self.last:
                self._join(row["epoch"])
            self.last.append(row)

    def _join(self, epoch: int) -> None:
        """Keep the rows of the table before that lie before `epoch`, where that is the epoch it goes on from."""
        earlier = [row for row in self._ended if row["epoch"] < epoch]
        goes_on = epoch > 1 and earlier and earlier[-1]["epoch"] == epoch - 1
        if not goes_on or earlier[0] is not self._ended[0]:
            self.before = []
        if goes_on:
            self.before.append(earlier)
