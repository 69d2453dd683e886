"""Trackers: where the metrics of a run go besides its own files. They are no part of what a run is.

A tracker is told all rows when a run begins or goes on, then each new one. TensorBoard's is a file of events that holds
every row once: what the process before left is replaced, from the rows of the run's state. Accuracies are in no state:
they are taken over from the files before.
"""

import importlib.util
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lever_lm.training.run_dir import RunFolder
from lever_lm.utils.atomic_io import append_bytes, atomic_file, remove
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.safe_parse import CONFIG_LIMIT, read_bytes
from lever_lm.utils.terminal import one_line, shown


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
_ACCURACY = "accuracy/"  # how the names of what was measured after training begin
_LONGEST = 1 << 20  # bytes of an event
_LONG = 1e7  # seconds; no epoch takes months
_MOST = 2000  # accuracies; ours are some ten methods at some ten numbers of shots


class TensorBoard:
    """`tensorboard/events.out.tfevents.…` in the run's folder: each epoch's metrics as scalars `rce/…` and `grpo/…`,
    accuracies by number of shots as `accuracy/…`, the config as text."""

    def __init__(self, run: RunFolder):
        self.run, self.path = run, run.events / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.lever"
        self._measured: dict[tuple, object] = {}  # (name, step) → the event of the last accuracy

    def begin(self, rows: Sequence[dict]) -> None:
        """Write the rows so far to a file of this process, then empty that of the one before. Raises LeverError."""
        earlier, ends = self.run.event_files(), _ends(rows)
        for path in earlier:
            self._measured |= {_name(event): event for event in _accuracies(path)}
        at = {"wall_time": ends[0]}
        head = (_event(file_version=_VERSION, **at), _restart(**at), self._config(**at))
        with atomic_file(self.path) as file:
            for event in (*head, *map(_epoch, rows, ends[1:]), *self._measured.values()):
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
        events = [_scalars(row["shots"], {f"{_ACCURACY}{row['method']}": row["accuracy"]}) for row in results]
        known = self._measured
        new = [one for one in events if _name(one) not in known or known[_name(one)].summary != one.summary]
        append_bytes(self.path, b"".join(map(_record, new)))

    def _config(self, **content):
        from tensorboard.plugins.text.summary import text_pb

        text = read_bytes(self.run.config, CONFIG_LIMIT).decode("utf-8", "replace")
        code = "".join(f"    {one_line(line)}\n" for line in text.splitlines())  # indented: code, in Markdown
        return _event(step=0, summary=text_pb("config", code), **content)


# `--tracker NAME`; the name is also that of the package it needs and of the extra that installs it.
TRACKERS = {"tensorboard": TensorBoard}


def _restart(**content):
    """Makes a TensorBoard that is open forget what it has read from earlier files of the run."""
    from tensorboard.compat.proto.event_pb2 import SessionLog

    return _event(step=0, session_log=SessionLog(status=SessionLog.START), **content)


def _ends(rows: Sequence[dict]) -> list[float]:
    """When the first epoch began and each one ended, as far as their times tell, had the last one ended now."""
    ends = [time.time()]
    for row in reversed(rows):
        took = row.get("epoch_time")
        ends.append(ends[-1] - (took if isinstance(took, (int, float)) and 0 <= took < _LONG else 0.0))
    return ends[::-1]


def _epoch(row: dict, end: float | None = None):
    numbers = {name: value for name, value in row.items() if type(value) in (int, float) and name != "epoch"}
    values = {f"{row['phase']}/{name}": value for name, value in numbers.items()}
    return _scalars(row["epoch"], values, **({} if end is None else {"wall_time": end}))


def _scalars(step: int, values: dict[str, float], **content):
    from tensorboard.compat.proto.summary_pb2 import Summary

    found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    return _event(step=step, summary=Summary(value=found), **content)


def _event(**content):
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(**{"wall_time": time.time(), **content})


def _name(event) -> tuple[str, int]:
    """Which accuracy an event is: its name, and the number of shots."""
    return event.summary.value[0].tag, event.step


def _accuracies(path: Path) -> Iterator:
    """The accuracies in a file of events, up to a record that is none or cut short."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    if path.is_symlink() or not path.is_file():
        return
    found = 0
    with path.open("rb") as file:
        while found < _MOST and len(head := file.read(12)) == 12:
            length = struct.unpack("<Q", head[:8])[0]
            if length > _LONGEST or len(content := file.read(length + 4)) < length + 4:
                return
            if _ACCURACY.encode() not in content:
                continue
            try:
                event = Event.FromString(content[:length])
            except DecodeError:
                return
            values = event.summary.value
            if len(values) == 1 and values[0].tag.startswith(_ACCURACY) and values[0].HasField("simple_value"):
                found += 1
                yield event


class _Bytes(bytearray):
    """What RecordWriter writes to."""

    write = bytearray.extend


def _record(event) -> bytes:
    """An event as it stands in a file of events: its length, its bytes, their checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = _Bytes()
    RecordWriter(record).write(event.SerializeToString())
    return bytes(record)
