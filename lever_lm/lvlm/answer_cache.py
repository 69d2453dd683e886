"""Answers already given, in SQLite: a question that was asked before is never asked again, across runs and kills.

Of several processes each writes to a file of its own and the leader alone opens the main one: on a network disk SQLite
cannot be trusted with two writers.
"""

import contextlib
import hashlib
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lever_lm.utils.distributed import Shards
from lever_lm.utils.errors import LeverError
from lever_lm.utils.terminal import shown

_SQL_VARIABLES = 500  # keys in one query
_PATIENCE = 60.0  # seconds to wait for the writing of another process
_LOOK = 1.0  # seconds, where a file that is in use can be left to its user


class AnswerCache:
    """A table key → text in one SQLite file. What was put is on disk once `put` returns. Any thread may call, one at a
    time.

    The processes of a job put into `<stem>.rank<r>.sqlite` beside it, which `collect` brings together. `get` and
    `collect` are calls of the whole job.
    """

    def __init__(self, path: Path, shards: Shards = Shards()):
        self.path, self.shards = path, shards
        self._main = _open(path) if shards.leader else None
        self._own: sqlite3.Connection | None = None  # this rank's, opened when there is something to put

    def get(self, keys: Sequence[str]) -> dict[str, str]:
        """Return the values of those keys that are known. Raises LeverError where the processes of a job do not ask for
        the same."""
        asked = hashlib.sha256("".join(keys).encode()).digest()
        by_leader, found = self.shards.from_leader(lambda: (asked, self._look_up(keys)))
        if asked != by_leader:
            raise LeverError(
                f"rank {self.shards.rank} would ask other prompts than rank 0: give all hosts the same data, the "
                "same config, and the same versions of the packages"
            )
        return found

    def _look_up(self, keys: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        with sqlite_errors(self.path):
            for start in range(0, len(keys), _SQL_VARIABLES):
                part = keys[start : start + _SQL_VARIABLES]
                marks = ",".join("?" * len(part))
                found |= dict(self._main.execute(f"SELECT key, value FROM answers WHERE key IN ({marks})", part))
        return {key: value for key, value in found.items() if isinstance(value, str)}

    def put(self, items: dict[str, str]) -> None:
        """Store all items in one transaction."""
        if self.shards.world == 1:
            _store(self._main, self.path, items.items())
            return
        path = self.path.with_name(f"{self.path.stem}.rank{self.shards.rank}.sqlite")
        self._own = self._own or _open(path, alone=True)
        _store(self._own, path, items.items())

    def collect(self) -> None:
        """Move into the main file what the processes of this job have put, and what those of a killed job left, however
        many they were. Files that another job is writing to are left to it."""
        if self._own is not None:
            self._own.close()
            self._own = None
        self.shards.wait()
        if self.shards.leader:
            self._merge()

    def _merge(self) -> None:
        """Store the rows of all rank files in one transaction; only then delete the files."""
        name = re.compile(rf"{re.escape(self.path.stem)}\.rank\d+\.sqlite")
        left = sorted(path for path in self.path.parent.glob("*.sqlite") if name.fullmatch(path.name))
        with contextlib.ExitStack() as stack:
            taken: dict[Path, sqlite3.Connection] = {}
            for path in left:
                with contextlib.suppress(_InUse):
                    taken[path] = stack.enter_context(contextlib.closing(_open(path, alone=True, patience=_LOOK)))
            _store(self._main, self.path, (row for path, db in taken.items() for row in _rows(db, path)))
            for path in taken:
                path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
                path.unlink()

    def close(self) -> None:
        """Close the files; a later use is an error."""
        for db in (self._main, self._own):
            if db is not None:
                db.close()


class _InUse(LeverError):
    """Another process has the file."""


@contextlib.contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Raise as LeverError, naming the file, what goes wrong with an answer cache in the block."""
    try:
        yield
    except (sqlite3.Error, OSError, ValueError) as error:  # ValueError: a text that is no UTF-8, no log-prob
        if "locked" in str(error):
            raise _InUse(f"the answer cache {path} is in use by another job: run this when that has ended") from error
        if not path.exists():
            raise LeverError(f"the answer cache {path} was deleted while in use: run the same command again") from error
        said = shown(str(error), 200).strip("'\"")
        raise LeverError(f"cannot use the answer cache {path}: {said}; if it is broken, delete it") from error


def _open(path: Path, *, alone: bool = False, patience: float = _PATIENCE) -> sqlite3.Connection:
    """Open a cache file, or make it. `alone`: until it is closed, no other process can read it."""
    with sqlite_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, timeout=patience, check_same_thread=False)
        try:
            db.execute("PRAGMA synchronous=EXTRA")  # what was put outlasts a power failure
            if alone:
                db.execute("PRAGMA locking_mode=EXCLUSIVE")
                db.execute("BEGIN EXCLUSIVE")
            if db.execute("SELECT 1 FROM sqlite_master WHERE type NOT IN ('table', 'index')").fetchone():
                raise ValueError("it holds more than tables")  # a view may never end, a trigger do anything
            db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
            if path.with_name(f"{path.name}-journal").exists():
                # A writer that was killed before its journal counted leaves it to the next one: be that.
                db.execute("PRAGMA user_version=0")
            db.commit()
        except (sqlite3.Error, ValueError):
            db.close()
            raise
        return db


def _store(db: sqlite3.Connection, path: Path, rows: Iterable[tuple[str, str]]) -> None:
    with sqlite_errors(path), db:
        db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)


def _rows(db: sqlite3.Connection, path: Path) -> Iterator[tuple[str, str]]:
    with sqlite_errors(path):
        yield from db.execute("SELECT key, value FROM answers ORDER BY key")
