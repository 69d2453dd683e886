"""How files get to disk whole, how one process keeps a folder to itself, and how what somebody else names is opened.

What a write here returned from is on disk under its own name; before, nothing of it is. Locks are POSIX record locks:
the system drops them with the process that holds them, however it ends, and network disks pass them on.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lever_lm.errors import LeverError
from lever_lm.untrusted import loads, one_line

TEMPORARY_PREFIX = ".tmp-"
_STOPS = (signal.SIGINT, signal.SIGTERM)
_TAKEN = (errno.EACCES, errno.EAGAIN)  # another process has the lock
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # the disk has none
_STALE = 3600.0  # seconds after which nobody is writing a temporary file any more, where locks cannot tell
_LOOK = 0.05  # seconds between looks at a lock that is waited for

# ---------------------------------------------------------------------- writing


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM within the block take effect after it. For writes: torch.save turns a KeyboardInterrupt into a
    RuntimeError of its own, and a temporary file made a moment before has nobody yet to remove it."""
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
    """A binary file that appears under `path` whole or not at all: temporary file beside it, fsync, rename, fsync of
    the folder. What killed writers left in the folder is removed on the way."""
    with interrupts_wait(), _replacing(Path(path)) as file:
        yield file


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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


_sweeping = threading.Lock()  # and naming a file that is not to be swept
_being_written: set[str] = set()  # temporary files of this process, which its own locks do not keep from it


def _temporary(folder: Path) -> tuple[int, str]:
    """A locked temporary file in a folder: descriptor and path."""
    while True:
        with _sweeping:
            handle, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=folder)
            _being_written.add(name)
        try:
            _lock(handle)
        except OSError as error:
            if error.errno not in (*_NO_LOCKS, *_TAKEN):
                os.close(handle)
                raise
        if os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)  # swept by another process before it was locked
        _being_written.discard(name)


def sweep(folder: Path) -> None:
    """Remove the temporary files of a folder whose writers are gone."""
    try:
        found = [entry.path for entry in os.scandir(folder) if entry.name.startswith(TEMPORARY_PREFIX)]
    except OSError:
        return
    for name in found:
        with _sweeping, contextlib.suppress(OSError):
            if name not in _being_written:
                _remove_if_left(name)


def _remove_if_left(name: str) -> None:
    handle = os.open(name, os.O_RDWR | os.O_CLOEXEC)
    try:
        _lock(handle)
        os.unlink(name)
    except OSError as error:
        if error.errno in _NO_LOCKS and time.time() - os.fstat(handle).st_mtime > _STALE:
            os.unlink(name)
    finally:
        os.close(handle)


def remove(path) -> None:
    """Delete a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _discard(path) -> None:
    """Delete a file of this process. Where its disk does not let it, what is said before counts more."""
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
    """Write a text file atomically, as UTF-8; of a file name that is none, its bytes as escapes."""
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
    try:
        with interrupts_wait(), open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise LeverError(f"cannot write {path}: {error.strerror}") from error


# ---------------------------------------------------------------------- reading


def open_regular(path: str | Path, what: str) -> BinaryIO:
    """A file to read bytes from. Raises LeverError where it is missing, a folder, a pipe or a device, none of which may
    hang a command; `what` says what it was to be. Its own OSErrors are those of `open`, as `__cause__`."""
    try:
        # Opening a pipe waits for its writer otherwise.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except (OSError, ValueError) as error:
        raise LeverError(f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise LeverError(f"cannot read {what} {path}: it is no regular file")
    return file


def file_digest(path: Path) -> str:
    """16 hex digits of a file's content."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()[:16] if hasattr(hashlib, "file_digest") else _digest(file)
        )


def _digest(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------- locks


class InUse(LeverError):
    """Another process has what this one asked for."""


_held: set[str] = set()  # by this process, which its own locks would let in again


@contextlib.contextmanager
def alone(path: Path, what: str, mend: str, *, wait: bool = False) -> Iterator[dict | None]:
    """Keep every other process out of a block that names the same lock file. Yields who left the lock behind: a process
    that is gone; None as a rule.

    what: what is locked, and mend: what else could be done, both for the message. Raises InUse with pid and host of the
    process that has it; with `wait` it is waited for.
    """
    key = os.path.abspath(path)
    if key in _held:
        raise InUse(_in_use(_myself(), what, mend))
    handle, left_by = _acquire(Path(path), what, mend, wait)
    _held.add(key)
    try:
        yield left_by
    finally:
        _discard(path)
        os.close(handle)
        _held.discard(key)


def _acquire(path: Path, what: str, mend: str, wait: bool) -> tuple[int, dict | None]:
    """The locked file's descriptor, and who left the lock behind."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            holder, free = _take(handle)
            if free and _is_at(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(_myself()).encode(), 0)
                return handle, holder
            os.close(handle)
        except OSError as error:
            raise LeverError(f"cannot lock {path}: {error.strerror or error}") from error
        if not free and not wait:
            raise InUse(_in_use(holder, what, mend))
        time.sleep(0 if free else _LOOK)  # free, and gone from its place: the one who had it has removed it


def _take(handle: int) -> tuple[dict | None, bool]:
    """Who holds a lock file or left it behind, and whether it is ours now."""
    try:
        _lock(handle)
        return _holder(handle), True
    except OSError as error:
        if error.errno not in (*_NO_LOCKS, *_TAKEN):
            raise
        holder = _holder(handle)
        return holder, error.errno in _NO_LOCKS and not _lives(holder)


def _lock(handle: int) -> None:
    """Raises OSError, of _TAKEN or _NO_LOCKS as a rule."""
    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(handle: int, path: Path) -> bool:
    """Whether a descriptor's file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _myself() -> dict:
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv[1:])[:200]}


def _holder(handle: int) -> dict | None:
    """Who wrote into a lock file; None where nobody did."""
    try:
        found = loads(os.pread(handle, 4096, 0))
        pid, host, command = found["pid"], found["host"], found.get("command", "")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(pid, int) or not isinstance(host, str) or not isinstance(command, str):
        return None
    return {"pid": pid, "host": one_line(host)[:100], "command": one_line(command)[:200]}


def _lives(holder: dict | None) -> bool:
    """Whether a holder may be alive, as far as can be seen from this host."""
    if holder is None or holder["host"] != socket.gethostname():
        return holder is not None
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _in_use(holder: dict | None, what: str, mend: str) -> str:
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    command = f" (lever {holder['command']})" if holder and holder["command"] else ""
    return f"{what} is in use by {who}{command}: wait until it has ended, or {mend}"
