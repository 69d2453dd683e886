"""The state of a run as a person reads it on the terminal."""

import socket
import time
from pathlib import Path

from lever_lm.cli.status import who
from lever_lm.training.metrics import PHASES, metrics_on, recommended_by
from lever_lm.utils.progress import duration

_YEAR = 365 * 24 * 3600  # seconds; what ends later has no date


def status_lines(status: dict) -> list[str]:
    """The state of a run for the terminal."""
    last = status["checkpoint"]
    facts = {
        "why": _why(status),
        "training": ", then ".join(_count(_phase(status, name), n) for name, n in status["phases"].items()),
        "checkpoint": f"{Path(last['path']).name}, {duration(last['age'])} old" if last else "none yet",
        "time": _time_line(status),
        "last epoch": _numbers(status, status["metrics"] or {}),
        "best": ", ".join(f"{k} {v['value']:.4f} in epoch {v['epoch']}" for k, v in status["best"].items()),
        "LVLM": f"{status['answers']:,} answers in the cache" if status["answers"] is not None else "",
        "GPU": _gpus_line(status),
        "go on with": status["command"],
    }
    lines = [f"{status['run']}: {status['state']}", *(f"  {name:<11} {text}" for name, text in facts.items() if text)]
    return lines + [f"  {'note':<11} {note}" for note in status["notes"]]


def status_row(status: dict) -> str:
    """The state of a run on one line, its name last: nothing need be cut."""
    *_, dataset, _, name = Path(status["run"]).resolve().parts
    epochs = f"{status['epoch']}/{'?' if status['epochs'] is None else status['epochs']}"
    phase = f"{_phase(status, status['phase'])} " if status["phase"] in PHASES else ""
    left = f"{duration(status['seconds_left'])} left" if status["seconds_left"] else ""
    strategy = recommended_by([status["best"]])
    best = status["best"].get(strategy)
    reward = f"{strategy} {best['value']:.4f}" if best else ""
    return f"{status['state']:<9}  {phase + epochs:<16}  {left:<13}  {reward:<17}  {dataset}/{name}"


def _why(status: dict) -> str:
    process = status["process"]
    if status["state"] != "running":
        return status["why"]
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(process["since"]))
    command = f": lever {process['command']}" if process["command"] else ""
    return f"{who(process)} since {since}{command}"


def _phase(status: dict, phase: str) -> str:
    """Return the name of a phase; that of the warm-up is what it learns from."""
    return (status["warmup"] if phase == "rce" else phase).upper()


def _count(phase: str, count: dict) -> str:
    of = "" if count["of"] is None else f" of {count['of']}"
    return f"{phase} {count['done']}{of} epochs"


def _time_line(status: dict) -> str:
    each, left = status["epoch_time"], status["seconds_left"]
    parts = [] if each is None else [f"{duration(each)} an epoch"]
    if left:
        parts.append(f"{duration(left)} of training left")
        if status["state"] == "running" and left < _YEAR:
            parts.append(f"until about {time.strftime('%Y-%m-%d %H:%M', time.localtime(time.time() + left))}")
    return ", ".join(parts)


def _numbers(status: dict, row: dict) -> str:
    values = [f"{name} {row[name]:.4f}" for name in metrics_on("status") if isinstance(row.get(name), (int, float))]
    return f"{_phase(status, row['phase'])} {row['epoch']}: {', '.join(values)}" if values else ""


def _gpus_line(status: dict) -> str:
    """The GPUs of this host, and the host of the run where that is another one."""
    here = "; ".join(status["gpus"]) or "none on this host"
    host = status["process"]["host"] if status["state"] == "running" else None
    return here if host in (None, socket.gethostname()) else f"{here}; the run is on {host}"
