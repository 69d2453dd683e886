"""Files written whole or not at all, and files opened without being waited for.

When a write here returns, the file is on disk under its own name; before, nothing of it is.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lever_lm.utils.errors import LeverError
from lever_lm.utils.locks import lives
from lever_lm.utils.safe_parse import open_file

TEMPORARY_PREFIX = ".tmp-"
_STOPS = (signal.SIGINT, signal.SIGTERM)
_STALE = 86400.0  # seconds without a write, after which another host's process writes a temporary file no more
_BEGUN = time.time_ns()  # tells this process from one of the same number before it

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


_swept: set[str] = set()  # folders, when this process first writes there: one may hold a hundred thousand files


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that appears under `path` whole or not at all: temporary file beside it, fsync, rename, fsync
    of the folder. Temporary files that killed writers left in the folder are removed. Raises LeverError."""
    path = Path(path)
    with interrupts_wait(), contextlib.ExitStack() as undo:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if (folder := os.path.realpath(path.parent)) not in _swept:
                _swept.add(folder)
                sweep(path.parent)
            handle, name = tempfile.mkstemp(prefix=_prefix(), dir=path.parent)
            undo.callback(_discard, name)
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o644)
                os.replace(name, path)
            _sync_folder(path.parent)
        except OSError as error:
            why = error.strerror or error
            raise LeverError(f"cannot write {path}: {why}; what was there before is unchanged") from error


def _prefix() -> str:
    """Return how the names of this process's temporary files begin: with its host, its number and its beginning."""
    return f"{TEMPORARY_PREFIX}{_host()}-{os.getpid()}-{_BEGUN}-"


def _host() -> str:
    """Return the name of this host, and the number of its table of processes: containers may share the name alone."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def sweep(folder: Path) -> None:
    """Remove the temporary files of a folder whose writers are gone: processes of this host that have ended, and those
    of other hosts that have written nothing for a day."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
            with contextlib.suppress(OSError):
                if _is_left(path):
                    path.unlink()


def _is_left(path: Path) -> bool:
    if path.name.startswith(_prefix()):
        return False
    if ours := re.match(rf"{re.escape(TEMPORARY_PREFIX + _host())}-(\d+)-", path.name):
        return int(ours[1]) == os.getpid() or not lives(int(ours[1]))
    return time.time() - path.stat().st_mtime > _STALE


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
