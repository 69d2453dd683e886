"""Trackers: where the metrics of a run go besides its own files. They are no part of what a run is.

A tracker is told all rows when a run begins or goes on, then each new one. TensorBoard's events hold every row once:
a process that goes on with a run writes the rows before afresh, in place of the files of earlier processes.
"""

import importlib.util
import io
import socket
import time
from collections.abc import Iterable, Sequence

from lever_lm.training.run_dir import RunFolder
from lever_lm.utils.atomic_io import append_bytes, atomic_file, remove
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.safe_parse import CONFIG_LIMIT, read_bytes
from lever_lm.utils.terminal import one_line, shown


def check_tracker(name: str | None) -> None:
    """Raise UsageError for the name of no tracker, LeverError where its package is missing; None is no tracker."""
    if name is None:
        return
    if name not in TRACKERS:
        raise UsageError(f"unknown tracker {shown(name)}: one of {', '.join(TRACKERS)} (--tracker)")
    if importlib.util.find_spec(name) is None:
        raise LeverError(f"--tracker {name} needs a package that is not there: pip install 'lever-lm[{name}]'")


class TensorBoard:
    """`tensorboard/events.out.tfevents.….lever` in the run's folder: each epoch's metrics as scalars `rce/…` and
    `grpo/…`, accuracies by number of shots as `accuracy/…`, the config as text. (SummaryWriter writes in a thread,
    which prints a traceback of its own on a full disk.)"""

    def __init__(self, run: RunFolder):
        self.run, self.path = run, run.events / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.lever"

    def begin(self, rows: Sequence[dict]) -> None:
        """Write the config and all rows to a file of this process, in place of earlier ones. Raises LeverError."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        start = _record(session_log=SessionLog(status=SessionLog.START))  # a TensorBoard that is open starts anew
        before = self.run.event_files()
        with atomic_file(self.path) as file:
            version = _record(file_version="brain.Event:2")
            file.write(version + start + self._config(len(rows)) + b"".join(map(_epoch, rows)))
        for path in before:
            remove(path)

    def add(self, row: dict) -> None:
        """Append an epoch. Raises LeverError."""
        append_bytes(self.path, _epoch(row))

    def results(self, results: Iterable[dict]) -> None:
        """Append the accuracy of each method by its number of shots. Raises LeverError."""
        for row in results:
            append_bytes(self.path, _scalars(row["shots"], {f"accuracy/{row['method']}": row["accuracy"]}))

    def _config(self, step: int) -> bytes:
        from tensorboard.plugins.text.summary import text_pb

        text = read_bytes(self.run.config, CONFIG_LIMIT).decode("utf-8", "replace")
        code = "".join(f"    {one_line(line)}\n" for line in text.splitlines())  # indented: code, in Markdown
        return _record(step=step, summary=text_pb("config", code))


# `--tracker NAME`; the name is also that of the package it needs and of the extra that installs it.
TRACKERS = {"tensorboard": TensorBoard}


def _epoch(row: dict) -> bytes:
    numbers = {name: value for name, value in row.items() if type(value) in (int, float) and name != "epoch"}
    return _scalars(row["epoch"], {f"{row['phase']}/{name}": value for name, value in numbers.items()})


def _scalars(step: int, values: dict[str, float]) -> bytes:
    from tensorboard.compat.proto.summary_pb2 import Summary

    found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    return _record(step=step, summary=Summary(value=found))


def _record(**content) -> bytes:
    """Return an event as it stands in a file of events: its length, its bytes, their checksums."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), **content).SerializeToString())
    return record.getvalue()
