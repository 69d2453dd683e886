"""Digests of files' contents, each read once: they identify an image or a model's weights, whatever its name or date.

A digest is kept with the size and the times of its file. One whose file was changed a moment before is not kept: a
second change of the same size could leave the times as they are.
"""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lever_lm.utils.atomic_io import file_digest, write_json
from lever_lm.utils.distributed import Shards
from lever_lm.utils.errors import LeverError
from lever_lm.utils.progress import WORTH_A_WORD, Track, Work, untracked
from lever_lm.utils.safe_parse import read_object

_SETTLED = 2 * 10**9  # nanoseconds; the coarsest file times in use
_READERS = 8
_LIMIT = 256 << 20  # bytes of the file; VQAv2's 123,000 images are 16 MiB

Stat = tuple[int, int, int]  # size, time of change of the content, and of anything about the file: in nanoseconds


class Digests:
    """Digests by path, in this process and in the file that `keep_in` names: shared by the processes that work in its
    folder, and harmless to lose."""

    def __init__(self):
        self._known: dict[str, tuple[Stat, str]] = {}
        self._file: Path | None = None
        self._changed = False
        self._held = False
        self._track: Track = untracked

    def keep_in(self, file: Path | None) -> None:
        """Learn what `file` holds, and keep there what is found out from now on; with None, write no file."""
        self._file = file
        self._load()

    @contextlib.contextmanager
    def saved_at_the_end(self) -> Iterator[None]:
        """Write the file when the block ends, also where it is interrupted; a LeverError changes nothing. The processes
        of a job need the file before."""
        self._held = True
        try:
            yield
        except LeverError:
            self._changed = False
            raise
        finally:
            self._held = False
            self.save()

    @contextlib.contextmanager
    def kept(self, shards: Shards, track: Track = untracked) -> Iterator[None]:
        """Keep what is found out in the block; of a job, the leader writes it, and the others find it. `track` follows
        what is read meanwhile."""
        self._load()
        outer, self._track = self._track, track
        try:
            yield
        finally:
            self._track = outer
        if shards.leader and not (self._held and shards.world == 1):
            if shards.world > 1 and self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
            self.save()

    def _load(self) -> None:
        for path, entry in (read_object(self._file, _LIMIT) if self._file else {}).items():
            kinds = [type(value) for value in entry] if isinstance(entry, list) else []
            if kinds == [int, int, int, str] and len(entry[3]) == 16 and entry[3].isalnum():
                self._known.setdefault(path, (tuple(entry[:3]), entry[3]))

    def of(self, paths: Iterable[Path | str]) -> list[str]:
        """Return the digests of files, 16 hex digits each. Raises OSError for one that cannot be read."""
        names = [os.path.abspath(path) for path in paths]
        stats = {name: _stat(name) for name in dict.fromkeys(names)}
        unknown = [name for name, seen in stats.items() if self._known.get(name, (None,))[0] != seen]
        found = {name: self._known[name][1] for name in stats.keys() - set(unknown)}
        if unknown:
            with ThreadPoolExecutor(_READERS) as pool:
                read = Work(pool.map(file_digest, unknown), "files", known=len(found), after=WORTH_A_WORD)
                found |= dict(zip(unknown, self._track(read, "digests", len(unknown)), strict=True))
            now = time.time_ns()
            for name in unknown:
                if max(stats[name][1:]) + _SETTLED < now and _stat(name) == stats[name]:
                    self._known[name] = (stats[name], found[name])
                    self._changed = True
        return [found[name] for name in names]

    def save(self) -> None:
        """Write the file where there is something new and its folder is there; go on without where it cannot be."""
        if self._file is None or not self._changed or not self._file.parent.is_dir():
            return
        self._changed = False
        try:
            write_json(self._file, {path: [*seen, digest] for path, (seen, digest) in self._known.items()}, indent=None)
        except (LeverError, ValueError):  # a full disk; a name that is no text
            self._file = None


def _stat(name: str) -> Stat:
    found = os.stat(name)
    if not stat.S_ISREG(found.st_mode):  # reading it might never end
        raise OSError(errno.EINVAL, "it is no regular file", name)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


DIGESTS = Digests()
