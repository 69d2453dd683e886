"""Trackers: where the metrics of a run go besides its own files. They are no part of what a run is.

A tracker is told all rows when a run begins or goes on, then each new one. TensorBoard's is a file of events that holds
every row once: what the process before left is replaced, from the rows of the run's state.
"""

import importlib.util
import os
import socket
import time
from collections.abc import Sequence

from lever_lm.errors import LeverError, UsageError
from lever_lm.files import append_bytes, atomic_file, remove
from lever_lm.runs import RunFolder
from lever_lm.untrusted import CONFIG_LIMIT, one_line, read_bytes, shown


def check_tracker(name: str | None) -> None:
    """Raise UsageError for a name of no tracker, LeverError where its package is missing; None is no tracker."""
    if name is None:
        return
    if name not in TRACKERS:
        raise UsageError(f"unknown tracker {shown(name)}: one of {', '.join(TRACKERS)} (--tracker)")
    if importlib.util.find_spec(name) is None:
        raise LeverError(f"--tracker {name} needs a package that is not there: pip install 'lever-lm[{name}]'")


def track(name: str | None, run: RunFolder):
    """The tracker of this name for a run; None for none."""
    return None if name is None else TRACKERS[name](run)


_VERSION = "brain.Event:2"  # of the format, at the head of a file of events


class TensorBoard:
    """`tensorboard/events.out.tfevents.…` in the run's folder: each epoch's metrics as scalars `rce/…` and `grpo/…`,
    accuracies by number of shots as `accuracy/…`, the config as text."""

    def __init__(self, run: RunFolder):
        self.run, self.path = run, run.events / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.lever"

    def begin(self, rows: Sequence[dict]) -> None:
        """Write the rows so far to a file of this process, then empty that of the one before. Raises LeverError."""
        earlier = self.run.event_files()
        with atomic_file(self.path) as file:
            for event in (_event(file_version=_VERSION), _restart(), self._config(), *map(_epoch, rows)):
                file.write(_record(event))
        for path in earlier:  # a TensorBoard that is open would stay at a file that is gone
            if path.is_symlink() or not path.stat().st_size:
                remove(path)
            else:
                os.truncate(path, 0)

    def add(self, row: dict) -> None:
        """Append an epoch. Raises LeverError."""
        append_bytes(self.path, _record(_epoch(row)))

    def results(self, results: Sequence[dict]) -> None:
        """Append the accuracy of each method by its number of shots. Raises LeverError."""
        events = [_scalars(row["shots"], {f"accuracy/{row['method']}": row["accuracy"]}) for row in results]
        append_bytes(self.path, b"".join(map(_record, events)))

    def _config(self):
        from tensorboard.plugins.text.summary import text_pb

        text = read_bytes(self.run.config, CONFIG_LIMIT).decode("utf-8", "replace")
        code = "".join(f"    {one_line(line)}\n" for line in text.splitlines())  # indented: code, in Markdown
        return _event(step=0, summary=text_pb("config", code))


# `--tracker NAME`; the name is also that of the package it needs and of the extra that installs it.
TRACKERS = {"tensorboard": TensorBoard}


def _restart():
    """Makes a TensorBoard that is open forget what it has read from earlier files of the run."""
    from tensorboard.compat.proto.event_pb2 import SessionLog

    return _event(step=0, session_log=SessionLog(status=SessionLog.START))


def _epoch(row: dict):
    numbers = {name: value for name, value in row.items() if type(value) in (int, float) and name != "epoch"}
    return _scalars(row["epoch"], {f"{row['phase']}/{name}": value for name, value in numbers.items()})


def _scalars(step: int, values: dict[str, float]):
    from tensorboard.compat.proto.summary_pb2 import Summary

    found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    return _event(step=step, summary=Summary(value=found))


def _event(**content):
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=time.time(), **content)


class _Bytes(bytearray):
    """What RecordWriter writes to."""

    write = bytearray.extend


def _record(event) -> bytes:
    """An event as it stands in a file of events: its length, its bytes, their checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = _Bytes()
    RecordWriter(record).write(event.SerializeToString())
    return bytes(record)
