"""An LVLM behind its answer cache: only unknown prompts go to the model, and its answers are stored as they come."""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from lever_lm.config.schema import PromptConfig
from lever_lm.data import image_digest
from lever_lm.lvlm.answer_cache import AnswerCache, sqlite_errors
from lever_lm.lvlm.prompt import Prompt, cut_answer
from lever_lm.lvlm.protocol import Backend
from lever_lm.utils.errors import LeverError
from lever_lm.utils.progress import Track, Work, loaded
from lever_lm.utils.terminal import shown


class CachedLvlm:
    """An LVLM behind its cache. The model is loaded when the first unknown question comes.

    `load` makes the backend, for the prompts that it will be asked first; `fingerprint` is that of model, decoding and
    prompt style, `model` the same for the default prompt style. Keys also hold texts and image contents, so changed
    data is asked anew. Answers are kept as they were written; `cut` is the rule by which they end (prompt.cut). Batches
    are cut from the list of unknown prompts and committed whole, while the model has the next one: what a killed job
    left is the same batches again. The processes of a job deal them among themselves; each makes the same calls with
    the same prompts and gets all answers.
    """

    def __init__(
        self,
        load: Callable[[Sequence[Prompt]], Backend],
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
        self.prompts = 0  # different prompts of all calls so far, asked now or known, by whichever process

    def backend(self, prompts: Sequence[Prompt] = ()) -> Backend:
        """Return the model itself, loaded on first use, for prompts that it will be asked first."""
        if self._backend is None:
            self._backend = loaded(self.track, "loading the LVLM", partial(self._load, prompts))
        return self._backend

    def generate(self, prompts: Sequence[Prompt], what: str = "answers") -> list[str]:
        """Return what the model writes after each prompt, uncut. `what` names the job on the progress bar."""
        return self._through_cache([self._key("answer", prompt) for prompt in prompts], what, prompts)

    def answer(self, prompts: Sequence[Prompt], what: str = "answers") -> list[str]:
        """Return the answer to each prompt, cut at its end."""
        return [cut_answer(text, self._cut) for text in self.generate(prompts, what)]

    def answer_log_prob(
        self, prompts: Sequence[Prompt], answers: Sequence[str], what: str = "log-probs", *, end: bool = False
    ) -> list[float]:
        """Return log P(answer | prompt), rounded to 6 decimals. `end`: and that the turn ends after it."""
        kind = "log_prob_end" if end else "log_prob"
        keys = [self._key(f"{kind}:{answer}", prompt) for prompt, answer in zip(prompts, answers, strict=True)]
        found = self._through_cache(keys, what, prompts, answers, end=end)
        with sqlite_errors(self.cache.path):
            return [_finite(value) for value in found]

    def unknown(self, prompts: Sequence[Prompt]) -> int:
        """Return how many of the prompts would go to the model to be answered."""
        keys = {self._key("answer", prompt) for prompt in prompts}
        return len(keys) - len(self.cache.get(list(keys)))

    @property
    def tally(self) -> str:
        """A line on how many prompts this process has asked so far, and how many it found in the cache."""
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

    def _through_cache(self, keys: list[str], what: str, *work: Sequence, **options) -> list[str]:
        """Return the stored text for each key, after the model was asked for the unknown ones. work: the prompts, and
        the answers that are scored; options: of `Backend.ask`."""
        row_of: dict[str, int] = {}
        for row, key in enumerate(keys):
            row_of.setdefault(key, row)
        self.cache.collect()  # first what a killed job left
        known = self.cache.get(list(row_of))
        self.known += len(known)
        self.prompts += len(row_of)
        if pending := {key: row for key, row in row_of.items() if key not in known}:
            label = f"{what}: {len(pending)} prompts to ask, {len(known)} known"
            chosen = [[part[row] for row in pending.values()] for part in work]
            self._ask(list(pending), chosen, label, len(known), options)
            new = self.cache.get(list(pending))
            if lost := len(pending) - len(new):
                raise LeverError(
                    f"{lost} of {len(pending)} answers did not arrive in {self.cache.path}: the "
                    "hosts of a job need one results folder on a disk that they share (--results DIR)"
                )
            known |= new
        return [known[key] for key in keys]

    def _ask(self, keys: list[str], work: list[list], label: str, known: int, options: dict) -> None:
        """Have unknown keys answered, by this process its share of the batches, and stored. `known`: the number of keys
        that need not be asked."""
        prompts, *answers = work
        backend = self.backend(prompts)
        self.shards.wait()  # until every rank has its model: the time taken is that of answering
        started = time.monotonic()
        batches = backend.batches(prompts, *answers)
        mine = self.shards.share(self.shards.from_leader(lambda: batches))
        share = sum(map(len, mine))
        if self.shards.world > 1:
            label += f"; the share of rank 0 of {self.shards.world}: {share}"
        parts = backend.ask(prompts, mine, *answers, **options)
        followed = Work(parts, "prompts", lambda part: len(part[0]), known=known)
        with ThreadPoolExecutor(1, "answers") as thread, contextlib.closing(parts):
            stored: Future = thread.submit(int)
            for rows, found in self.track(followed, label, share):
                stored.result()  # at most one part is on its way to the disk
                stored = thread.submit(self._keep, dict(zip([keys[i] for i in rows], found, strict=True)))
            stored.result()
        self.shards.wait()
        if self.shards.leader:
            seconds = max(time.monotonic() - started, 1e-6)
            self.cache.put({self._speed_key: repr(len(keys) / seconds / self.shards.world)})
        self.cache.collect()

    def _keep(self, answers: dict[str, str | float]) -> None:
        self.cache.put({key: value if isinstance(value, str) else repr(value) for key, value in answers.items()})
        self.asked += len(answers)

    def _key(self, kind: str, prompt: Prompt) -> str:
        icds = [[icd.question, icd.answer, icd.image and image_digest(icd.image)] for icd in prompt.icds]
        query = [prompt.query.question, prompt.query.image and image_digest(prompt.query.image)]
        kind = f"bare {kind}" if prompt.bare else kind
        return hashlib.sha256(json.dumps([self.fingerprint, kind, icds, query]).encode()).hexdigest()


def _finite(text: str) -> float:
    """Return a finite number. Raises ValueError for any other text."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {shown(text)} for a log-prob")
    return value
