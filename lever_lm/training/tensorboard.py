"""Trackers: where the metrics of a run go besides its own files. They are no part of what a run is.

A tracker is told all rows when a run begins or goes on, then each new one. TensorBoard's events hold every row once:
a process that goes on with a run adds a file of events, with the rows that the files before lack.
"""

import importlib.util
import math
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lever_lm.training.run_dir import RunFolder
from lever_lm.utils.atomic_io import append_bytes, atomic_file
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.safe_parse import CONFIG_LIMIT, read_bytes
from lever_lm.utils.terminal import one_line, shown

_VERSION = "brain.Event:2"  # of the format, at the head of a file of events
_LONGEST = 1 << 20  # bytes of an event


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
    `grpo/…`, accuracies by number of shots as `accuracy/…`, the config as text."""

    def __init__(self, run: RunFolder):
        self.run, self.path = run, run.events / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.lever"
        self._accuracies: dict[tuple[str, int], float] = {}  # (tag, shots) → the last one

    def begin(self, rows: Sequence[dict]) -> None:
        """Write the config, and the rows that earlier files lack, to a file of this process. Raises LeverError."""
        there = {(tag.split("/")[0], step) for path in self.run.event_files() for tag, step in self._read(path)}
        missing = [row for row in rows if (row["phase"], row["epoch"]) not in there]
        with atomic_file(self.path) as file:
            file.write(_record(file_version=_VERSION) + self._config(len(rows)) + b"".join(map(_epoch, missing)))

    def add(self, row: dict) -> None:
        """Append an epoch. Raises LeverError."""
        append_bytes(self.path, _epoch(row))

    def results(self, results: Iterable[dict]) -> None:
        """Append the accuracy of each method by its number of shots, unless it is there. Raises LeverError."""
        for row in results:
            tag, shots, accuracy = f"accuracy/{row['method']}", row["shots"], row["accuracy"]
            there = self._accuracies.get((tag, shots), math.nan)
            if not math.isclose(there, accuracy, rel_tol=1e-6):  # events are in single precision
                append_bytes(self.path, _scalars(shots, {tag: accuracy}))

    def _read(self, path: Path) -> Iterator[tuple[str, int]]:
        """Yield tag and step of each scalar in a file of events, and keep the accuracies."""
        for event in _events(path):
            for value in event.summary.value:
                yield value.tag, event.step
                if value.tag.startswith("accuracy/"):
                    self._accuracies[value.tag, event.step] = value.simple_value

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


class _Bytes(bytearray):
    """The file-like object that RecordWriter writes to."""

    write = bytearray.extend


def _record(**content) -> bytes:
    """Return an event as it stands in a file of events: its length, its bytes, their checksums."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = _Bytes()
    RecordWriter(record).write(Event(wall_time=time.time(), **content).SerializeToString())
    return bytes(record)


def _events(path: Path) -> Iterator:
    """Yield the events of a file, up to a record that is cut short or is none."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    if path.is_symlink() or not path.is_file():
        return
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            length = int.from_bytes(head[:8], "little")
            if length > _LONGEST or len(content := file.read(length + 4)) < length + 4:
                return
            try:
                event = Event.FromString(content[:length])
            except DecodeError:
                return
            yield event
