"""Answers already given, in SQLite: a question that was asked before is never asked again, across runs and kills.

Of several processes each writes to a file of its own and the leader alone opens the main one: on a network disk SQLite
cannot be trusted with two writers.
"""

import contextlib
import glob
import hashlib
import json
import math
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from lever_lm.config.schema import PromptConfig
from lever_lm.data import image_digest
from lever_lm.lvlm.prompt import Prompt, cut_answer
from lever_lm.utils.distributed import Shards
from lever_lm.utils.errors import LeverError, Unfinished
from lever_lm.utils.fingerprint import changed, changes
from lever_lm.utils.progress import Track, Work, loaded
from lever_lm.utils.terminal import shown

_SQL_VARIABLES = 500
_PATIENCE = 60.0  # seconds to wait for the writing of another process
_LOOK = 1.0  # seconds, where a file that is in use can be left to its user


class AnswerCache:
    """A table key → text in one SQLite file; what `put` returned from is on disk.

    The processes of a job put into `<stem>.rank<r>.sqlite` beside it, which `collect` brings together. `get` and
    `collect` are calls of the whole job.
    """

    def __init__(self, path: Path, shards: Shards = Shards()):
        self.path, self.shards = path, shards
        self._main = _open(path) if shards.leader else None
        self._own: sqlite3.Connection | None = None  # this rank's, opened when there is something to put

    def get(self, keys: Sequence[str]) -> dict[str, str]:
        """The known ones of these keys. Raises LeverError where the processes of a job do not ask for the same."""
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
        with _explained(self.path):
            for start in range(0, len(keys), _SQL_VARIABLES):
                part = keys[start : start + _SQL_VARIABLES]
                marks = ",".join("?" * len(part))
                found |= dict(self._main.execute(f"SELECT key, value FROM answers WHERE key IN ({marks})", part))
        return {key: value for key, value in found.items() if isinstance(value, str)}

    def changed_since(self, here: dict[str, str]) -> list[str]:
        """The parts of a stamp that nothing was asked under before, against the most alike of those that something was;
        [] for one that is known, or is the first. It is known from now on. A call of the leader."""
        with _explained(self.path), self._main:
            there = [dict(zip(here, row, strict=True)) for row in self._main.execute("SELECT lvlm, prompt FROM made")]
            if here in there:
                return []
            self._main.execute("INSERT INTO made VALUES (?, ?)", list(here.values()))
            return min((changed(other, here) for other in there), key=len, default=[])

    def put(self, items: dict[str, str]) -> None:
        """Store a batch whole."""
        if self.shards.world == 1:
            _store(self._main, self.path, items.items())
            return
        path = self.path.with_name(f"{self.path.stem}.rank{self.shards.rank}.sqlite")
        self._own = self._own or _open(path, alone=True)
        _store(self._own, path, items.items())

    def collect(self) -> None:
        """Move into the main file what the processes of this job have put, and what those of a killed one left,
        however many they were. Files that another job is writing to are left to it."""
        if self._own is not None:
            self._own.close()
            self._own = None
        self.shards.wait()
        if self.shards.leader:
            self._merge(self._rank_files())

    def _rank_files(self) -> list[Path]:
        """Those beside the main file, by rank."""
        ranks = {}
        for path in self.path.parent.glob(f"{glob.escape(self.path.stem)}.rank*.sqlite"):
            if number := re.fullmatch(r"\.rank(\d+)\.sqlite", path.name[len(self.path.stem) :]):
                ranks[path] = int(number[1])
        return sorted(ranks, key=ranks.__getitem__)

    def _merge(self, paths: list[Path]) -> None:
        """All of it in one transaction; only then are the files deleted."""
        with contextlib.ExitStack() as stack:
            taken: dict[Path, sqlite3.Connection] = {}
            for path in paths:
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
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError, ValueError) as error:  # the last: text that is no UTF-8
        if "locked" in str(error):
            raise _InUse(f"the answer cache {path} is in use by another job: run this when that has ended") from error
        if not path.exists():
            raise LeverError(f"the answer cache {path} was deleted while in use: run the same command again") from error
        said = shown(str(error), 200).strip("'\"")
        raise LeverError(f"cannot use the answer cache {path}: {said}; if it is broken, delete it") from error


def _open(path: Path, *, alone: bool = False, patience: float = _PATIENCE) -> sqlite3.Connection:
    """A table of answers, made where there is none. `alone`: until it is closed, no other process can read it."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, timeout=patience)
        try:
            db.execute("PRAGMA synchronous=EXTRA")  # what was put outlasts a power failure
            db.execute("PRAGMA trusted_schema=OFF")
            if alone:
                db.execute("PRAGMA locking_mode=EXCLUSIVE")
                db.execute("BEGIN EXCLUSIVE")
            if db.execute("SELECT 1 FROM sqlite_master WHERE type NOT IN ('table', 'index')").fetchone():
                raise ValueError("it holds more than tables")  # a view may never end, a trigger do anything
            db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
            db.execute("CREATE TABLE IF NOT EXISTS made (lvlm TEXT, prompt TEXT)")
            if path.with_name(f"{path.name}-journal").exists():
                # A writer that was killed before its journal counted leaves it to the next one: be that.
                db.execute("PRAGMA user_version=0")
            db.commit()
        except (sqlite3.Error, ValueError):
            db.close()
            raise
        return db


def _store(db: sqlite3.Connection, path: Path, rows: Iterable[tuple[str, str]]) -> None:
    with _explained(path), db:
        db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)


def _rows(db: sqlite3.Connection, path: Path) -> Iterator[tuple[str, str]]:
    with _explained(path):
        yield from db.execute("SELECT key, value FROM answers ORDER BY key")


def _finite(text: str) -> float:
    """Raises ValueError for what is no finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {shown(text)} for a log-prob")
    return value


class CachedLvlm:
    """An LVLM behind its cache. The model is loaded when the first unknown question comes.

    `load` makes the backend (generate, answer_log_prob, batches); `fingerprint` is that of model, decoding and
    prompt style, `model` the same for any prompt style. Keys also hold texts and image contents, so changed data is
    asked anew. Answers are kept as they were written; `cut` is the rule by which they end (prompt.cut). Batches are cut
    from the sorted list of unknown prompts and committed whole: what a killed job left is the same batches again. The
    processes of a job deal them among themselves; each makes the same calls with the same prompts, gets all answers,
    and calls `batches` of the backend whenever the others do.
    """

    def __init__(
        self,
        load: Callable[[], object],
        fingerprint: str,
        cache: AnswerCache,
        track: Track,
        model: str = "",
        cut: str = PromptConfig.cut,
    ):
        self._load, self._backend, self._cut = load, None, cut
        self.fingerprint, self.cache, self.track, self.shards = fingerprint, cache, track, cache.shards
        self.model = model or fingerprint
        self.asked = 0  # prompts that went to the model in this process
        self.known = 0  # prompts answered from the cache

    @property
    def backend(self):
        """The model itself, loaded on first use."""
        if self._backend is None:
            self._backend = loaded(self.track, "loading the LVLM", self._load)
        return self._backend

    def generate(self, prompts: Sequence[Prompt], what: str = "answers") -> list[str]:
        """What the model writes after each prompt, uncut. `what` names the job on the progress bar."""
        keys = [self._key("answer", prompt) for prompt in prompts]
        return self._through_cache(
            keys, (prompts,), lambda batch: self.backend.generate([prompts[i] for i in batch]), what
        )

    def answer(self, prompts: Sequence[Prompt], what: str = "answers") -> list[str]:
        """The answer to each prompt, cut at its end."""
        return [cut_answer(text, self._cut) for text in self.generate(prompts, what)]

    def answer_log_prob(
        self, prompts: Sequence[Prompt], answers: Sequence[str], what: str = "log-probs", *, end: bool = False
    ) -> list[float]:
        """log P(answer | prompt), rounded to 6 decimals. `end`: and that the turn ends after it."""
        kind = "log_prob_end" if end else "log_prob"
        keys = [self._key(f"{kind}:{answer}", prompt) for prompt, answer in zip(prompts, answers, strict=True)]

        def ask(batch: list[int]) -> list[float]:
            return self.backend.answer_log_prob([prompts[i] for i in batch], [answers[i] for i in batch], end=end)

        found = self._through_cache(keys, (prompts, answers), ask, what)
        with _explained(self.cache.path):
            return [_finite(value) for value in found]

    def unknown(self, prompts: Sequence[Prompt]) -> int:
        """How many of the prompts would go to the model to be answered."""
        keys = {self._key("answer", prompt) for prompt in prompts}
        return len(keys) - len(self.cache.get(list(keys)))

    @property
    def tally(self) -> str:
        """How many prompts this process has asked so far, and how many it had no need to."""
        return f"LVLM so far: {self.asked:,} prompts asked, {self.known:,} known from {self.cache.path}"

    @property
    def speed(self) -> float | None:
        """Prompts a second in as many processes as these, from when this model was last asked; None before."""
        known = self.cache.get([self._speed_key])
        with contextlib.suppress(ValueError):
            return _finite(known[self._speed_key]) * self.shards.world if known else None
        return None

    @property
    def _speed_key(self) -> str:
        return f"speed:{self.fingerprint}"  # of one process

    def _through_cache(self, keys: list[str], work: tuple[Sequence, ...], ask, what: str) -> list[str]:
        """What is known or asked for each key. `work`: the prompts, and where these are scored the answers; `ask` has
        the backend do what the numbers it is given say."""
        first = {}
        for i, key in enumerate(keys):
            first.setdefault(key, i)
        self.cache.collect()  # first what a killed job left
        known = self.cache.get(list(first))
        pending = [i for key, i in first.items() if key not in known]
        self.known += len(first) - len(pending)
        if pending:
            self._ask(pending, keys, work, ask, what, len(known))
            new = self.cache.get([keys[i] for i in pending])
            if len(new) < len(pending):
                raise LeverError(
                    f"{len(pending) - len(new)} of {len(pending)} answers did not arrive in {self.cache.path}: the "
                    "hosts of a job need one results folder on a disk that they share (--results DIR)"
                )
            known |= new
        return [known[key] for key in keys]

    def _ask(self, pending: list[int], keys: list[str], work: tuple[Sequence, ...], ask, what: str, known: int) -> None:
        """Have the prompts that `pending` numbers answered, by this process its share of the batches, and stored.
        `known`: how many beside them need not be asked."""
        backend, label = self.backend, f"{what}: {len(pending)} prompts to ask, {known} known"
        if self.shards.leader and (news := self.cache.changed_since({"LVLM": self.model, "prompt": self.fingerprint})):
            news = news[:1] if "LVLM" in news else news  # the fingerprint is of both
            label += f"; {changes(news)} since answers were last kept here"
        self.shards.wait()  # until every rank has its model: the time taken is that of answering
        started = time.monotonic()
        batches = backend.batches(*([part[i] for i in pending] for part in work))
        batches = self.shards.from_leader(lambda: batches)
        mine = self.shards.share(batches)
        share = sum(map(len, mine))
        if self.shards.world > 1:
            label += f"; the share of rank 0 of {self.shards.world}: {share}"
        for batch in self.track(Work(mine, "prompts", len, known=known), label, share):
            rows = [pending[j] for j in batch]
            try:
                answers = ask(rows)
            except Unfinished as error:
                self._keep({keys[rows[j]]: answer for j, answer in error.answered.items()})
                raise
            self._keep(dict(zip((keys[i] for i in rows), answers, strict=True)))
        self.shards.wait()
        if self.shards.leader:
            seconds = max(time.monotonic() - started, 1e-6)
            self.cache.put({self._speed_key: repr(len(pending) / seconds / self.shards.world)})
        self.cache.collect()

    def _keep(self, answers: dict[str, str | float]) -> None:
        self.cache.put({key: value if isinstance(value, str) else repr(value) for key, value in answers.items()})
        self.asked += len(answers)

    def _key(self, kind: str, prompt: Prompt) -> str:
        shown = [[icd.question, icd.answer, image_digest(icd.image)] for icd in prompt.icds]
        query = [prompt.query.question, image_digest(prompt.query.image)]
        return hashlib.sha256(json.dumps([self.fingerprint, kind, shown, query]).encode()).hexdigest()
