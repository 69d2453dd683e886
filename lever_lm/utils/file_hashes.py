"""Digests of files' contents, each read once: they identify an image or a model's weights, whatever its name or date.

A digest is kept with the size and the times of its file. One whose file was changed a moment before is not kept: a
second change of the same size could leave the times as they are.
"""

import errno
import os
import stat
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lever_lm.utils.atomic_io import file_digest, write_json
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
        self.keep_in(None)

    def keep_in(self, file: Path | None, track: Track = untracked, *, make_folder: bool = False) -> None:
        """Share digests through `file` from now on; with None through none. It is written as soon as something is new
        and its folder is there; with make_folder it is made: the processes of a job find what the first one read.
        `track` follows what is read."""
        self._file, self._track, self._make_folder = file, track, make_folder
        self._is_new = False

    def of(self, paths: Iterable[Path | str]) -> list[str]:
        """Return the digests of files, 16 hex digits each. Raises OSError for one that cannot be read."""
        names = [os.path.abspath(path) for path in paths]
        stats = {name: _stat(name) for name in dict.fromkeys(names)}
        if self._unknown(stats):
            self._known |= self._kept()
        unknown = self._unknown(stats)
        found = {name: self._known[name][1] for name in stats.keys() - set(unknown)}
        if unknown:
            with ThreadPoolExecutor(_READERS) as pool:
                read = Work(pool.map(file_digest, unknown), "files", known=len(found), after=WORTH_A_WORD)
                found |= dict(zip(unknown, self._track(read, "digests", len(unknown)), strict=True))
            now = time.time_ns()
            for name in unknown:
                if max(stats[name][1:]) + _SETTLED < now and _stat(name) == stats[name]:
                    self._known[name] = (stats[name], found[name])
                    self._is_new = True
        self._save()
        return [found[name] for name in names]

    def _unknown(self, stats: dict[str, Stat]) -> list[str]:
        return [name for name, seen in stats.items() if self._known.get(name, (None,))[0] != seen]

    def _kept(self) -> dict[str, tuple[Stat, str]]:
        """Return what the file holds."""
        kept = {}
        for path, entry in (read_object(self._file, _LIMIT) if self._file else {}).items():
            kinds = [type(value) for value in entry] if isinstance(entry, list) else []
            if kinds == [int, int, int, str] and len(entry[3]) == 16 and entry[3].isalnum():
                kept[path] = (tuple(entry[:3]), entry[3])
        return kept

    def _save(self) -> None:
        if self._file is None or not self._is_new or not (self._make_folder or self._file.parent.is_dir()):
            return
        self._is_new = False
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
