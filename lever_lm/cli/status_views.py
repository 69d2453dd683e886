"""The state of a run as a person reads it on the terminal."""

import socket
import time
from pathlib import Path

from lever_lm.cli.status import who
from lever_lm.training.metrics import PHASES, RECOMMENDED, metrics_on
from lever_lm.utils.progress import duration
from lever_lm.utils.terminal import one_line

_FAR = 24 * 3600  # seconds; what ends later has no hour of the day


def status_lines(status: dict) -> list[str]:
    """The state of a run for the terminal."""
    last = status["checkpoint"]
    facts = {
        "why": _why(status),
        "training": ", then ".join(map(_count, status["phases"], status["phases"].values())),
        "checkpoint": f"{Path(last['path']).name}, {duration(last['age'])} old" if last else "none yet",
        "time": _time_line(status),
        "last epoch": _numbers(status["metrics"] or {}),
        "best": ", ".join(f"{k} {v['value']:.4f} in epoch {v['epoch']}" for k, v in status["best"].items()),
        "rollouts": _rollouts_line(status),
        "disk": f"{status['bytes'] / 1e6:,.1f} MB",
        "GPU": _gpus_line(status),
        "go on with": status["command"],
    }
    lines = [f"{status['run']}: {status['state']}", *(f"  {name:<11} {text}" for name, text in facts.items() if text)]
    return lines + [f"  {'note':<11} {note}" for note in status["notes"]]


def status_row(status: dict) -> str:
    """The state of a run on one line, its name last: nothing need be cut."""
    *_, dataset, _, name = Path(status["run"]).resolve().parts
    epochs = f"{status['epoch']}/{'?' if status['epochs'] is None else status['epochs']}"
    phase = f"{status['phase'].upper()} " if status["phase"] in PHASES else ""
    known, at_least = status["seconds_left"], status["phase_seconds_left"]
    left = f"{duration(known)} left" if known else f"> {duration(at_least)} left" if known is None and at_least else ""
    best = status["best"].get(RECOMMENDED)
    reward = f"{RECOMMENDED} {best['value']:.4f}" if best else ""
    return f"{status['state']:<9}  {phase + epochs:<16}  {left:<13}  {reward:<17}  {dataset}/{name}"


def _why(status: dict) -> str:
    process = status["process"]
    if status["state"] != "running":
        return status["why"]
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(process["since"]))
    command = f": lever {process['command']}" if process["command"] else ""
    return f"{who(process)} since {since}{command}"


def _count(phase: str, count: dict) -> str:
    of = "" if count["of"] is None else f" of {count['of']}"
    return f"{phase.upper()} {count['done']}{of} epochs"


def _time_line(status: dict) -> str:
    each, left, of = status["epoch_time"], status["seconds_left"], "training"
    if left is None:
        left, of = status["phase_seconds_left"], "this phase"
    parts = [] if each is None else [f"{duration(each)} an epoch"]
    if left and left < _FAR and status["state"] == "running":
        parts.append(
            f"{duration(left)} of {of} left, until about {time.strftime('%H:%M', time.localtime(time.time() + left))}"
        )
    elif left:
        parts.append(f"{duration(left)} of {of} left")
    return ", ".join(parts)


def _numbers(row: dict) -> str:
    values = [f"{name} {row[name]:.4f}" for name in metrics_on("status") if isinstance(row.get(name), (int, float))]
    return f"{row['phase'].upper()} {row['epoch']}: {', '.join(values)}" if values else ""


def _rollouts_line(status: dict) -> str:
    if status["rollouts"] is None:
        return ""
    exists, path = status["rollouts"]["exists"], one_line(status["rollouts"]["path"])
    there = path if exists else "not made yet" if status["phase"] == "rollouts" else f"{path}, which is not there"
    return there + (f"; {status['answers']:,} answers in the cache" if status["answers"] is not None else "")


def _gpus_line(status: dict) -> str:
    """The GPUs of this host, and the host of the run where that is another one."""
    here = "; ".join(map(_gpu_line, status["gpus"])) or "none on this host"
    host = status["process"]["host"] if status["state"] == "running" else None
    return here if host in (None, socket.gethostname()) else f"{here}; the run is on {host}"


def _gpu_line(gpu: dict) -> str:
    known = gpu["used"] is not None and gpu["total"] is not None
    memory = f"{gpu['used'] / 1024:.1f} of {gpu['total'] / 1024:.1f} GiB" if known else ""
    busy = f"{gpu['utilization']} % busy" if gpu["utilization"] is not None else ""
    return ", ".join(filter(None, [gpu["name"], memory, busy]))
