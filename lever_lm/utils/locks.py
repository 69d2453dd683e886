"""One process at a time: a lock file in a folder, and the lock on it.

Locks are POSIX record locks: the system drops them with the process that holds them, however it ends, and network disks
pass them on. A process's own lock does not keep itself out, and closing any descriptor of the file drops it.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_parse import loads
from lever_lm.utils.terminal import one_line

_TAKEN = (errno.EACCES, errno.EAGAIN)  # another process has the lock
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # the disk has none
_LOOK = 0.05  # seconds between looks at a lock that is waited for


class InUse(LeverError):
    """Another process has what this one asked for."""


_held: set[str] = set()  # by this process, which its own locks would let in again


@contextlib.contextmanager
def alone(path: Path, what: str, mend: str, *, wait: bool = False) -> Iterator[dict | None]:
    """Keep every other process out of a block that names the same lock file. Yields pid and host of the process that
    is gone and left the lock behind; None as a rule.

    what: what is locked, and mend: what else could be done, both for the message. Raises InUse with pid and host of the
    process that has it; with `wait` it is waited for.
    """
    key = os.path.realpath(path)
    if key in _held:
        raise InUse(_in_use(_myself(), what, mend))
    handle, left_by = _acquire(Path(path), what, mend, wait)
    _held.add(key)
    try:
        yield left_by
    finally:
        with contextlib.suppress(OSError):  # an error before counts more
            os.unlink(path)
        os.close(handle)
        _held.discard(key)


def _acquire(path: Path, what: str, mend: str, wait: bool) -> tuple[int, dict | None]:
    """Lock a file. Returns its descriptor, and the process that left the lock behind."""
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
    """Return the process that holds a lock file or left it behind, and whether it is ours now."""
    holder = _holder(handle)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (*_NO_LOCKS, *_TAKEN):
            raise
        return holder, error.errno in _NO_LOCKS and not _may_live(holder)
    return holder, True


def seen(path: Path) -> tuple[dict | None, bool]:
    """Return the process that took the lock file at `path` last (pid, host, command; None where the file names none),
    and whether it is held now. The lock is not taken meanwhile. Raises OSError where the file cannot be read."""
    if os.path.realpath(path) in _held:  # closing the file would drop this process's own lock
        return _myself(), True
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        holder = _holder(handle)
        return holder, _is_held(handle, holder)
    finally:
        os.close(handle)


def _is_held(handle: int, holder: dict | None) -> bool:
    """Return whether a process has a lock on the file; where system or disk do not say, whether `holder` may live."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # struct flock: type, whence, start, length, pid
            question = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            return struct.unpack("hhqqi", fcntl.fcntl(handle, fcntl.F_GETLK, question))[0] != fcntl.F_UNLCK
    return _may_live(holder)


def _is_at(handle: int, path: Path) -> bool:
    """Return whether a descriptor's file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _myself() -> dict:
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv[1:])[:200]}


def _holder(handle: int) -> dict | None:
    """Return the process that a lock file names, None where it names none."""
    try:
        found = loads(os.pread(handle, 4096, 0))
        host, command = (one_line(str(found.get(name, ""))) for name in ("host", "command"))
        return {"pid": int(found["pid"]), "host": host[:100], "command": command[:200]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _may_live(holder: dict | None) -> bool:
    """Return whether a process may be alive: one of another host may."""
    return holder is not None and (holder["host"] != socket.gethostname() or lives(holder["pid"]))


def lives(pid: int) -> bool:
    """Return whether this host has a process of this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _in_use(holder: dict | None, what: str, mend: str) -> str:
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    command = f" (lever {holder['command']})" if holder and holder["command"] else ""
    return f"{what} is in use by {who}{command}: wait until it has ended, or {mend}"
