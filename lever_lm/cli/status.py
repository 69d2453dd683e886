"""The state of a run, read from its folder while it is at work or after it has ended: nothing there is touched, no lock
is taken and no model is loaded.
"""

import contextlib
import shlex
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lever_lm.config.schema import Config
from lever_lm.config.values import build
from lever_lm.training.environment import read_environment, typed_again
from lever_lm.training.log_parser import read_log
from lever_lm.training.metrics import PHASES, STRATEGIES, recommended_by, table_of
from lever_lm.training.metrics_file import metrics_rows
from lever_lm.training.run_dir import LOCK, Layout, RunFolder
from lever_lm.training.select_checkpoint import best_row, epochs_since_best
from lever_lm.utils.errors import LeverError
from lever_lm.utils.locks import seen

_LATELY = 10  # epochs that the time of one is taken from
_GPU = "name,memory.used,memory.total,utilization.gpu"
_CUT = 200  # characters of a command that a lock file holds, at most
_PATIENCE = 5.0  # seconds for nvidia-smi, which hangs where a driver does


def run_status(run: RunFolder, layout: Layout | None = None) -> dict:
    """Return the state of a run as plain values. `layout` names its cache of answers, unless its own config and place
    do. A file that cannot be read is among the `notes`, and the rest is told without it.

    state: running, finished, killed (epochs are missing and no process is at work), not begun, or unknown where there
    are checkpoints and no config. phase: rollouts, rce, grpo, or done; epoch and epochs are of rce and grpo, and
    `seconds_left` of training, None until the speed of each phase is known. Raises LeverError where there is no folder.
    """
    if run.path.is_file():
        raise LeverError(f"{run.path} is a file: name its folder, {run.path.parent}")
    if not run.path.is_dir():
        raise LeverError(
            f"no run folder {run.path}: train first (`lever train`), or name the run (RUN_DIR, --run-name, --results); "
            "`lever status --all` lists those that are there"
        )
    notes: list[str] = []
    config = _told(notes, lambda: build(run.settings())) if run.config.is_file() else None
    place = run.path.resolve()
    if config and place.parent.name == "model_cpk":  # where `lever train` puts it
        layout = Layout(config, place.parents[2])
    process, working = _worker(run.path / LOCK)
    rows = _told(notes, lambda: _rows(run, notes, working)) or []
    there = [(row["phase"], row["epoch"]) for row in rows] or run.checkpoints()
    done = {name: max([0, *(epoch for phase, epoch in there if phase == name)]) for name in PHASES}
    wanted = {name: getattr(config, name).epochs if config else None for name in PHASES}
    left = {name: max(0, wanted[name] - done[name]) if config else 0 for name in PHASES}
    if early := bool(config and left["grpo"] and 0 < config.grpo.patience <= epochs_since_best(rows)):
        left["grpo"] = 0
    state, why = _state(config, done, left, process, working, early)
    phase = next((name for name in PHASES if left[name]), "done" if any(done.values()) else "rce")
    counted = phase if phase in PHASES else PHASES[done["grpo"] > 0]
    times = {name: _epoch_time(rows, name) for name in PHASES}
    unknown = any(left[name] and times[name] is None for name in PHASES)
    return {
        "run": str(run.path),
        "state": state,
        "why": why,
        "process": process,
        "phase": phase if any(done.values()) or run.config.is_file() else "rollouts",
        "epoch": done[counted],
        "epochs": wanted[counted],
        "warmup": config.warmup if config else "rce",
        "phases": {name: {"done": done[name], "of": wanted[name]} for name in PHASES},
        "checkpoint": _latest(run),
        "epoch_time": times[counted],
        "seconds_left": None if unknown else sum(left[name] * (times[name] or 0.0) for name in PHASES),
        "metrics": rows[-1] if rows else None,
        "best": _best(rows),
        "answers": _answers(layout.answers) if layout else None,
        "command": _command(run, process) if state in ("killed", "not begun") else None,
        "notes": notes,
    }


def runs_below(results: Path) -> list[dict]:
    """The state of every run below a results folder. Raises LeverError where there is none."""
    found = [run_status(RunFolder(path)) for path in sorted(results.glob("*/model_cpk/*/"))]
    if not found:
        raise LeverError(f"no run below {results}: train first (`lever train`), or name another --results")
    return found


def _told(notes: list[str], read: Callable[[], Any]) -> Any:
    """Return what `read` gives; None, and a note, where a file is not what it should be."""
    try:
        return read()
    except LeverError as error:
        notes.append(str(error))
        return None


def _worker(lock: Path) -> tuple[dict | None, bool]:
    """The process that works under a lock file, or left it behind, since when (seconds of the epoch), and whether it
    still does."""
    try:
        holder, held = seen(lock)
        return {**(holder or {"pid": None, "host": None, "command": ""}), "since": lock.stat().st_mtime}, held
    except OSError:
        return None, False


def _state(
    config: Config | None, done: dict, left: dict, process: dict | None, working: bool, early: bool
) -> tuple[str, str]:
    """Return the state, and what it was concluded from."""
    called = {"rce": config.warmup if config else "rce"}
    missing = ", ".join(f"{count} {called.get(name, name).upper()} epochs" for name, count in left.items() if count)
    if working:
        return "running", "a process is at work in it"
    if process:
        return "killed", f"{who(process)} ended in the midst of it"
    if config is None and any(done.values()):
        return "unknown", "no config.yaml that can be read says how many epochs it was to have; Lever-Plus keeps none"
    if not any(done.values()):
        return "not begun", "no epoch has ended, and no process is at work"
    if missing:
        return "killed", f"{missing} are missing, and no process is at work"
    stopped = f"stopped early by grpo.patience after epoch {done['grpo']}"
    return "finished", stopped if early else "all epochs of its config are there"


def who(process: dict) -> str:
    """Name the process that works, or worked, under a lock file, which may be empty."""
    return "a process" if process["pid"] is None else f"process {process['pid']} on {process['host']}"


def _rows(run: RunFolder, notes: list[str], working: bool) -> list[dict]:
    """The rows of metrics.jsonl, else of train.log."""
    if run.metrics.is_file():
        rows, said = metrics_rows(run.metrics)
        notes += [] if working else said  # a row that is just being written is cut short, too
        return rows
    if run.log.is_file():
        with contextlib.suppress(LeverError):  # no table in it yet
            return read_log(run.log).rows
    return []


def _latest(run: RunFolder) -> dict | None:
    """The last checkpoint, and how many seconds ago it was written."""
    with contextlib.suppress(LeverError, OSError):  # there is none, or it was pruned a moment ago
        path = run.latest_checkpoint()
        return {"path": str(path), "age": round(max(0.0, time.time() - path.stat().st_mtime), 1)}
    return None


def _epoch_time(rows: list[dict], phase: str) -> float | None:
    """Return the mean seconds of the last epochs of a phase; None where no row says it."""
    times = [row.get("epoch_time") for row in rows if row["phase"] == phase][-_LATELY:]
    known = [value for value in times if isinstance(value, (int, float)) and 0 <= value < float("inf")]
    return sum(known) / len(known) if known else None


def _best(rows: list[dict]) -> dict:
    """Metric → the best epoch so far and its value, among the epochs that are chosen from."""
    phase = PHASES[any(row["phase"] == "grpo" for row in rows)]
    of_phase = [row for row in rows if row["phase"] == phase]
    of_phase = [row for row in of_phase if table_of(row) == table_of(of_phase[-1])]
    best = {name: best_row(of_phase, STRATEGIES[name]) for name in (recommended_by(of_phase), "val_loss")}
    return {n: {"phase": phase, "epoch": row["epoch"], "value": row[n]} for n, row in best.items() if row}


def _answers(path: Path) -> int | None:
    """How many answers the cache holds; None where there is no cache, or another process is just writing to it."""
    with contextlib.suppress(sqlite3.Error):
        address = f"{path.resolve().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=1.0)) as db:
            return db.execute("SELECT count(*) FROM answers WHERE key NOT LIKE 'speed:%'").fetchone()[0]
    return None


def _command(run: RunFolder, process: dict | None) -> str | None:
    """Return the command that goes on with a run: the one that last worked on it by env.json, or, for a run that was
    killed before that was written, by its lock; None where neither says it whole."""
    kept = read_environment(run)
    words = shlex.split(typed_again(kept.get("last_command", kept.get("command"))))
    if not words and process is not None and 0 < len(process["command"]) < _CUT:
        words = ["lever", *process["command"].split()]
    return shlex.join(word for word in words if word not in ("--overwrite", "--no-resume")) or None  # it goes on


def gpus() -> list[str]:
    """Return each GPU of this host with its memory and how busy it is, by nvidia-smi; [] without it."""
    command = ["nvidia-smi", f"--query-gpu={_GPU}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return []
    found = [line.rsplit(", ", 3) for line in answer.splitlines() if line.count(", ") >= 3]
    return [f"{name}, {used} of {total}, {busy} busy" for name, used, total, busy in found]
