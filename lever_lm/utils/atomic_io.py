"""Files written whole or not at all, and files opened without being waited for.

When a write here returns, the file is on disk under its own name; before, nothing of it is.
"""

import contextlib
import hashlib
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lever_lm.utils.errors import LeverError
from lever_lm.utils.locks import NO_LOCKS, TAKEN, lock
from lever_lm.utils.safe_parse import open_file

TEMPORARY_PREFIX = ".tmp-"
_STOPS = (signal.SIGINT, signal.SIGTERM)
_STALE = 3600.0  # seconds after which no process writes a temporary file any more, where locks cannot tell

# ---------------------------------------------------------------------- writing


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM within the block take effect after it. For writes: torch.save turns a KeyboardInterrupt
    into a RuntimeError of its own, and a temporary file would stay."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread is interrupted
        yield
        return
    came: list[int] = []
    stops = [stop for stop in _STOPS if signal.getsignal(stop) is not None]  # None: not ours to put back
    before = [signal.signal(stop, lambda number, frame: came.append(number)) for stop in stops]
    try:
        yield
    finally:
        for stop, handler in zip(stops, before, strict=True):
            signal.signal(stop, handler)
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that appears under `path` whole or not at all: temporary file beside it, fsync, rename, fsync
    of the folder. Temporary files that killed writers left in the folder are removed. Raises LeverError."""
    with interrupts_wait(), _replacing(Path(path)) as file:
        yield file


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (folder := os.path.realpath(path.parent)) not in _swept:
            _swept.add(folder)
            sweep(path.parent)
        handle, name = _temporary(path.parent)
    except OSError as error:
        raise LeverError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
            os.replace(name, path)
        _sync_folder(path.parent)
    except OSError as error:
        _discard(name)
        raise LeverError(
            f"cannot write {path}: {error.strerror or error}; what was there before is unchanged"
        ) from error
    except BaseException:
        _discard(name)
        raise
    finally:
        _being_written.discard(name)


_swept: set[str] = set()  # folders, when this process first writes there: one may hold a hundred thousand files
_sweeping = threading.Lock()  # and naming a file that is not to be swept
_being_written: set[str] = set()  # temporary files of this process, which its own locks do not keep from it


def _temporary(folder: Path) -> tuple[int, str]:
    """Make a locked temporary file in a folder. Returns descriptor and path."""
    while True:
        with _sweeping:
            handle, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=folder)
            _being_written.add(name)
        refused = None
        try:
            lock(handle)
        except OSError as error:
            refused = None if error.errno in NO_LOCKS else error
        if refused is None and os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)
        _being_written.discard(name)
        if refused is not None and refused.errno not in TAKEN:  # else a process that sweeps is about to delete it
            _discard(name)
            raise refused


def sweep(folder: Path) -> None:
    """Remove the temporary files of a folder whose writers are gone."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
            with _sweeping, contextlib.suppress(OSError):
                # By its last part, which is never the same twice: a folder has many names.
                if path.name not in map(os.path.basename, _being_written):
                    _remove_if_left(path)


def _remove_if_left(path: Path) -> None:
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        lock(handle)
        path.unlink()
    except OSError as error:
        if error.errno in NO_LOCKS and time.time() - os.fstat(handle).st_mtime > _STALE:
            path.unlink()
    finally:
        os.close(handle)


def remove(path) -> None:
    """Delete a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _discard(path) -> None:
    """Delete a file of this process. An error before counts more than one here."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder outlast a power failure, where its disk can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8; bytes of file names that are none become escapes."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, content, *, indent: int | None = 1) -> None:
    """Write a JSON file atomically. Raises ValueError on NaN: it is no JSON."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=indent, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict, header: dict[str, str]) -> None:
    """Write a safetensors file atomically, with a header of strings."""
    from safetensors.torch import save

    with atomic_file(path) as file:
        file.write(save(tensors, metadata=header))


def append_line(path: Path, line: str) -> None:
    """Append one line and wait until it is on disk."""
    append_bytes(path, (line + "\n").encode("utf-8"))


def append_bytes(path: Path, content: bytes) -> None:
    """Append to a file and wait until it is on disk."""
    try:
        with interrupts_wait(), open(path, "ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise LeverError(f"cannot write {path}: {error.strerror}") from error


# ---------------------------------------------------------------------- reading


def open_regular(path: str | Path, what: str) -> BinaryIO:
    """Open a file to read bytes from. Raises LeverError where it is missing, a folder, a pipe or a device; `what` says
    what it was to be."""
    try:
        return open_file(path)
    except (OSError, ValueError) as error:
        raise LeverError(f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}") from error


def file_digest(path: Path) -> str:
    """Return 16 hex digits of a file's content: of its SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
