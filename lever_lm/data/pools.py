"""Candidate pools: which K training examples a query may choose its demonstrations from.

Q queries, N training examples, K pool size. Each query has its own random generator, so a pool depends on the seed
and the query alone, never on the order of calls. Neither a query nor its image is ever among its candidates: that is
decided in `Candidates`, and only there.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from lever_lm.config.schema import SamplerConfig
from lever_lm.data import Example
from lever_lm.data.embeddings import Embeddings
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.progress import WORTH_A_WORD, Track, Work, untracked

# Breaks ties of repeated questions; far under any difference that means something.
_JITTER = 1e-6
_CHUNK = 512
NEAREST = 1024  # candidates of a pool that is to hold the whole split: a policy's cost grows with the pool


def query_rng(seed: int, query: Example) -> np.random.Generator:
    """Return the query's own generator: a function of the seed and the question alone."""
    return np.random.default_rng([seed, seed_of(query)])


def seed_of(query: Example) -> int:
    """Return the number of a question by which its draws are seeded: its id, or one made of the text that its id is."""
    number = query.question_id
    return number if isinstance(number, int) else int.from_bytes(hashlib.sha256(number.encode()).digest()[:8])


class Candidates:
    """The training examples that may be shown before a query. Equal content is one image, whatever its ids say; an
    equal `image_id` is one image, too. Raises LeverError for an image that cannot be read.

    by_content: False goes by ids alone and reads no image, for an estimate."""

    def __init__(self, train: Sequence[Example], *, by_content: bool = True):
        self._by_content = by_content
        self._images = [self._names(example) for example in train]
        self._about: dict[int | str, list[int]] = defaultdict(list)  # image_id or content → rows
        self._asked: dict[int | str, list[int]] = defaultdict(list)  # question_id → rows
        for row, example in enumerate(train):
            self._asked[example.question_id].append(row)
            for name in self._images[row]:
                self._about[name].append(row)

    def _names(self, example: Example) -> tuple[int | str, ...]:
        if example.image is None:
            return ()
        return (example.image_id, example.content) if self._by_content else (example.image_id,)

    def withheld(self, query: Example) -> set[int]:
        """Return the rows of `train` that may not stand before this query: the question itself, all on its image."""
        own: set[int] = set()
        names = [*self._names(query)]
        for name in names:  # grows on the way: each row may know the image by another name
            for row in self._about.get(name, ()):
                if row not in own:
                    own.add(row)
                    names += self._images[row]
        return own.union(self._asked.get(query.question_id, ()))

    def allowed(self, query: Example) -> np.ndarray:
        """Return the rows of `train` that may stand before this query, in order."""
        fine = np.ones(len(self._images), dtype=bool)
        fine[list(self.withheld(query))] = False
        return np.flatnonzero(fine)


Pairs = Sequence[tuple[str, str]]  # part of the query, `img` or `text`, and part of the training example


def similarity_rows(queries: Embeddings, train: Embeddings, pairs: Pairs) -> Iterator[np.ndarray]:
    """Yield for each query its similarity (N,) to every training example: the sum of the cosines of `pairs`.

    In float64, whose rounding lies far under the jitter that breaks ties: a pool does not depend on how many queries
    were computed with it. Memory is that of one chunk of queries.
    """
    for start in range(0, len(queries.image), _CHUNK):
        yield from _similarities(queries, train, pairs, start)


def _similarities(queries: Embeddings, train: Embeddings, pairs: Pairs, start: int) -> np.ndarray:
    """Similarities of the chunk of queries that begins at `start`, (at most _CHUNK, N)."""
    chunk = queries.take(slice(start, start + _CHUNK))
    total = torch.zeros(len(chunk.image), len(train.image), dtype=torch.float64)
    for ours, theirs in pairs:
        total += chunk.part(ours).double() @ train.part(theirs).double().T
    return total.numpy()


def nearest(scores: np.ndarray, rows: np.ndarray, count: int, rng: np.random.Generator, exclude=()) -> list[int]:
    """Return the `count` rows of highest score, best first; ties in random order. scores (N,), rows distinct ones of
    0..N−1, exclude likewise."""
    rows = _without(rows, exclude, len(scores))
    noisy = scores[rows] + _JITTER * rng.random(rows.size)
    count = min(count, rows.size)
    top = np.argpartition(-noisy, count - 1)[:count] if count < rows.size else np.arange(rows.size)
    return rows[top[np.argsort(-noisy[top], kind="stable")]].tolist()


def _without(rows: np.ndarray, exclude: Sequence[int], total: int) -> np.ndarray:
    """Return the rows of 0..total−1 that are not among `exclude`, in their order."""
    if not len(exclude):
        return rows
    left = np.ones(total, dtype=bool)
    left[exclude] = False
    return rows[left[rows]]


# ---------------------------------------------------------------------- samplers


@dataclass(frozen=True)
class Draw:
    """One query's pool to draw: the rows of the training split that may stand before it, the size of the pool, the
    query's generator, and its similarity (N,) to every training example by `img` or `text`."""

    rows: np.ndarray
    size: int
    rng: np.random.Generator
    similarity: Callable[[str], np.ndarray]

    def nearest(self, part: str, count: int, exclude: Sequence[int] = ()) -> list[int]:
        """Return the `count` rows most similar by image or text, best first."""
        return nearest(self.similarity(part), self.rows, count, self.rng, exclude) if count else []


def _mixed(draw: Draw) -> list[int]:
    """Half at random, a quarter by text, a quarter by image, as in Lever-Plus. A size that is no multiple of four has
    the first of its remainder at random, the second by text."""
    by_text = draw.nearest("text", (draw.size + 2) // 4)
    return by_text + draw.nearest("img", (draw.size + 1) // 4, exclude=by_text)


def _nearest_by_both(draw: Draw) -> list[int]:
    """The whole split through a similarity prefilter: the nearest by image and text."""
    return nearest(draw.similarity("img") + draw.similarity("text"), draw.rows, draw.size, draw.rng)


# A sampler returns the rows that it wants in the pool; `sample_pools` fills the rest at random, and shuffles.
SAMPLERS: dict[str, Callable[[Draw], list[int]]] = {
    "rand_sampler": lambda draw: [],
    "text_sim_sampler": lambda draw: draw.nearest("text", draw.size),
    "img_sim_sampler": lambda draw: draw.nearest("img", draw.size),
    "mix_sampler": _mixed,
}


NEEDS_NO_FEATURES = ("rand_sampler",)


def pool_bound(size: int) -> int:
    """Return how many candidates a pool of infer.pool_size holds at most."""
    return size or NEAREST


def check_sampler(config: SamplerConfig) -> None:
    """Raise UsageError for an unknown sampler."""
    if config.name not in SAMPLERS:
        raise UsageError(f"unknown sampler {config.name!r}: one of {', '.join(SAMPLERS)} (--sampler)")


def sample_pools(
    config: SamplerConfig,
    queries: Sequence[Example],
    train: Sequence[Example],
    embeddings: tuple[Embeddings, Embeddings] | None,
    *,
    size: int,
    seed: int,
    candidates: Candidates | None = None,
    track: Track = untracked,
) -> list[list[int]]:
    """Return the pool of each query, as rows of `train`; smaller than `size` only where fewer examples are allowed.
    size 0: the NEAREST examples by image and text, whatever the sampler.

    embeddings: of (queries, train), row for row; None for a sampler of NEEDS_NO_FEATURES. candidates: of `train`.
    """
    check_sampler(config)
    sampler = SAMPLERS[config.name] if size else _nearest_by_both
    candidates, size, pools = candidates or Candidates(train), pool_bound(size), []

    @lru_cache(maxsize=2)  # images and texts of one chunk
    def chunk(part: str, start: int) -> np.ndarray:
        return _similarities(*embeddings, [(part, part)], start)

    work = Work(enumerate(queries), "queries", after=WORTH_A_WORD)
    for i, query in track(work, f"pools: {len(queries)} queries", len(queries)):
        rng, rows = query_rng(seed, query), candidates.allowed(query)
        if rows.size == 0:
            raise LeverError(f"question {query.question_id}: no training example is left to show before it")
        draw = Draw(rows, size, rng, lambda part, i=i: chunk(part, i - i % _CHUNK)[i % _CHUNK])
        pool = np.array(sampler(draw), dtype=np.int64)
        pool = np.concatenate([pool, rng.permutation(_without(rows, pool, len(train)))[: size - len(pool)]])
        pools.append(pool[rng.permutation(len(pool))].tolist())
    return pools
