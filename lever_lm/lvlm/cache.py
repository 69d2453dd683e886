"""Answers already given, in SQLite: a question that was asked before is never asked again, across runs and kills."""

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from lever_lm.data import image_digest
from lever_lm.errors import LeverError
from lever_lm.lvlm.prompt import Prompt, cut_answer

_SQL_VARIABLES = 500
Track = Callable[[Iterable, str, int], Iterable]


class AnswerCache:
    """A table key → text in one SQLite file; what `put` returned from is on disk."""

    def __init__(self, path: Path):
        self.path = path
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60)
            self._db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
            self._db.commit()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise LeverError(f"cannot use the answer cache {self.path}: {error}; if it is broken, delete it") from error

    def get(self, keys: Sequence[str]) -> dict[str, str]:
        """The known ones of these keys."""
        found: dict[str, str] = {}
        with self._explained():
            for start in range(0, len(keys), _SQL_VARIABLES):
                part = keys[start : start + _SQL_VARIABLES]
                marks = ",".join("?" * len(part))
                found |= dict(self._db.execute(f"SELECT key, value FROM answers WHERE key IN ({marks})", part))
        return found

    def put(self, items: dict[str, str]) -> None:
        """Store a batch whole."""
        with self._explained(), self._db:
            self._db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", items.items())

    def close(self) -> None:
        """Close the file; a later use is an error."""
        self._db.close()


class CachedLvlm:
    """An LVLM behind its cache. The model is loaded when the first unknown question comes.

    `load` makes the backend (generate, answer_log_prob, batches); `fingerprint` is that of model, decoding and
    prompt style. Keys also hold texts and image contents, so changed data is asked anew. Batches are cut from the
    sorted list of unknown prompts and committed whole: what a killed job left is the same batches again.
    """

    def __init__(self, load: Callable[[], object], fingerprint: str, cache: AnswerCache, track: Track):
        self._load, self._backend = load, None
        self.fingerprint, self.cache, self.track = fingerprint, cache, track
        self.asked = 0  # prompts that went to the model
        self.known = 0  # prompts answered from the cache

    @property
    def backend(self):
        """The model itself, loaded on first use."""
        if self._backend is None:
            self._backend = self._load()
        return self._backend

    def generate(self, prompts: Sequence[Prompt], what: str = "answers") -> list[str]:
        """What the model writes after each prompt, uncut. `what` names the job on the progress bar."""
        keys = [self._key("answer", prompt) for prompt in prompts]
        return self._through_cache(
            keys, prompts, lambda batch: self.backend.generate([prompts[i] for i in batch]), what
        )

    def answer(self, prompts: Sequence[Prompt], what: str = "answers") -> list[str]:
        """The answer to each prompt, cut at its end."""
        return [cut_answer(text) for text in self.generate(prompts, what)]

    def answer_log_prob(
        self, prompts: Sequence[Prompt], answers: Sequence[str], what: str = "log-probs"
    ) -> list[float]:
        """log P(answer | prompt), rounded to 6 decimals."""
        keys = [self._key(f"log_prob:{answer}", prompt) for prompt, answer in zip(prompts, answers, strict=True)]

        def ask(batch: list[int]) -> list[str]:
            values = self.backend.answer_log_prob([prompts[i] for i in batch], [answers[i] for i in batch])
            return [repr(value) for value in values]

        return [float(value) for value in self._through_cache(keys, prompts, ask, what)]

    def unknown(self, prompts: Sequence[Prompt]) -> int:
        """How many of the prompts would go to the model to be answered."""
        keys = {self._key("answer", prompt) for prompt in prompts}
        return len(keys) - len(self.cache.get(list(keys)))

    @property
    def speed(self) -> float | None:
        """Prompts a second when this model was last asked, None before."""
        known = self.cache.get([self._speed_key])
        return float(known[self._speed_key]) if known else None

    @property
    def _speed_key(self) -> str:
        return f"speed:{self.fingerprint}"

    def _through_cache(self, keys: list[str], prompts: Sequence[Prompt], ask, what: str) -> list[str]:
        first = {}
        for i, key in enumerate(keys):
            first.setdefault(key, i)
        known = self.cache.get(list(first))
        pending = [i for key, i in first.items() if key not in known]
        self.known += len(first) - len(pending)
        if pending:
            batches = self.backend.batches([prompts[i] for i in pending])
            label = f"{what}: {len(pending)} prompts to ask, {len(first) - len(pending)} known"
            started = time.monotonic()
            for batch in self.track(batches, label, len(batches)):
                rows = [pending[j] for j in batch]
                new = dict(zip((keys[i] for i in rows), ask(rows), strict=True))
                self.cache.put(new)
                known |= new
                self.asked += len(rows)
            seconds = max(time.monotonic() - started, 1e-6)
            self.cache.put({self._speed_key: repr(len(pending) / seconds)})
        return [known[key] for key in keys]

    def _key(self, kind: str, prompt: Prompt) -> str:
        shown = [[icd.question, icd.answer, image_digest(icd.image)] for icd in prompt.icds]
        query = [prompt.query.question, image_digest(prompt.query.image)]
        return hashlib.sha256(json.dumps([self.fingerprint, kind, shown, query]).encode()).hexdigest()
