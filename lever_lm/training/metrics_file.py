"""metrics.jsonl of a run: one row of JSON for each finished epoch."""

import contextlib
from pathlib import Path

from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_parse import FILE_LIMIT, is_epoch, loads, read_bytes


def metrics_rows(path: Path) -> tuple[list[dict], list[str]]:
    """Return the rows of a metrics.jsonl, each with an epoch and a phase of rce or grpo, and notes for the user: a last
    row that a kill cut short is left out. Raises LeverError naming the line that is no such row."""
    try:
        *ended, rest = read_bytes(path, FILE_LIMIT).decode("utf-8", "replace").split("\n")
    except OSError as error:
        raise LeverError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise LeverError(f"{path}: {error}: no metrics of a run") from error
    rows = [_row(text, f"{path}, line {number}") for number, text in enumerate(ended, 1) if text.strip()]
    cut_short = "the last row has no newline at its end: it was cut short and is ignored"
    return rows, [cut_short] if rest.strip() else []


def _row(text: str, where: str) -> dict:
    with contextlib.suppress(ValueError):
        row = loads(text, nan=True)
        if isinstance(row, dict) and is_epoch(row.get("epoch")) and row.get("phase") in ("rce", "grpo"):
            return row
    raise LeverError(f"{where}: not a metrics row with an epoch and a phase of rce or grpo")
