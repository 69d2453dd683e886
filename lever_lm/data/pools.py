"""Candidate pools: which K training examples a query may choose its demonstrations from.

Q queries, N training examples, K pool size. Each query has its own random generator, so a pool depends on the seed
and the query alone, never on the order of calls. Neither a query nor its image is ever among its candidates: that is
decided in `Candidates`, and only there.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

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
# Where each sampler takes its candidates from: shares of random, text-similar and image-similar ones.
SAMPLERS: dict[str, tuple[float, float, float]] = {
    "rand_sampler": (1.0, 0.0, 0.0),
    "text_sim_sampler": (0.0, 1.0, 0.0),
    "img_sim_sampler": (0.0, 0.0, 1.0),
    "mix_sampler": (0.5, 0.25, 0.25),
}


def query_rng(seed: int, query: Example) -> np.random.Generator:
    """The query's own generator: a function of the seed and the question alone."""
    return np.random.default_rng([seed, query.question_id])


class Candidates:
    """The training split as what may be shown before a query. Equal content is one image, whatever its ids say; an
    equal `image_id` is one image, too. Raises LeverError for an image that cannot be read."""

    def __init__(self, train: Sequence[Example]):
        self._images = [(example.image_id, example.content) for example in train]
        self._about: dict[int | str, list[int]] = defaultdict(list)  # image_id or content → rows
        self._asked: dict[int, list[int]] = defaultdict(list)  # question_id → rows
        for row, example in enumerate(train):
            self._asked[example.question_id].append(row)
            for name in self._images[row]:
                self._about[name].append(row)

    def withheld(self, query: Example) -> set[int]:
        """Return the rows of `train` that may not stand before this query: the question itself, all on its image."""
        own: set[int] = set()
        names = [query.image_id, query.content]
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


def similarity_rows(queries: Embeddings, train: Embeddings, parts: frozenset[str]) -> Iterator[np.ndarray]:
    """For each query its similarity (N,) to every training example: the sum of the cosines that `parts` names.

    In float64, whose rounding lies far under the jitter that breaks ties: a pool does not depend on how many queries
    were computed with it. Memory is that of one chunk of queries.
    """
    for start in range(0, len(queries.image), _CHUNK):
        chunk = queries.take(slice(start, start + _CHUNK))
        total = torch.zeros(len(chunk.image), len(train.image), dtype=torch.float64)
        if "img" in parts:
            total += chunk.image.double() @ train.image.double().T
        if "text" in parts:
            total += chunk.text.double() @ train.text.double().T
        yield from total.numpy()


def check_sampler(config: SamplerConfig) -> None:
    """Raise UsageError for an unknown sampler."""
    if config.name not in SAMPLERS:
        raise UsageError(f"unknown sampler {config.name!r}: one of {', '.join(SAMPLERS)} (--sampler)")


def candidate_counts(name: str, size: int) -> list[int]:
    """How many of a pool's candidates are random, text-similar and image-similar: the sampler's shares of `size`, by
    largest remainder, the earlier of equals first. A mix_sampler's pool of one is random, one of two has a text-similar
    candidate and no image-similar one."""
    exact = [share * size for share in SAMPLERS[name]]
    found = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: found[i] - exact[i])
    for i in by_remainder[: size - sum(found)]:
        found[i] += 1
    return found


def sample_pools(
    config: SamplerConfig,
    queries: Sequence[Example],
    train: Sequence[Example],
    embeddings: tuple[Embeddings, Embeddings] | None,
    *,
    size: int,
    seed: int,
    track: Track = untracked,
) -> list[list[int]]:
    """The pool of each query, as rows of `train`; smaller than `size` only where fewer examples are allowed.

    embeddings: those of (queries, train), row for row; rand_sampler takes None. Source of the mixture: Lever-Plus.
    """
    check_sampler(config)
    _, of_text, of_image = candidate_counts(config.name, size)
    if embeddings is None and of_text + of_image:
        raise ValueError(f"{config.name} needs embeddings")
    candidates = Candidates(train)
    by_text = _rows_or_none(embeddings, "text", of_text, len(queries))
    by_image = _rows_or_none(embeddings, "img", of_image, len(queries))
    pools = []
    work = Work(zip(queries, by_text, by_image, strict=True), "queries", after=WORTH_A_WORD)
    for query, text, image in track(work, f"pools: {len(queries)} queries", len(queries)):
        rng, rows = query_rng(seed, query), candidates.allowed(query)
        if rows.size == 0:
            raise LeverError(f"question {query.question_id}: no training example is left to show before it")
        sources = [(text, of_text), (image, of_image)]
        pools.append(_one_pool(rows, sources, size, rng))
    return pools


def _rows_or_none(embeddings, part: str, asked: int, count: int) -> Iterable[np.ndarray | None]:
    """Similarities for a source that is asked for, None per query for one that is not."""
    return similarity_rows(*embeddings, frozenset({part})) if asked else [None] * count


def _one_pool(rows: np.ndarray, sources, size: int, rng: np.random.Generator) -> list[int]:
    """The most similar rows of each source, topped up at random, in random order."""
    chosen: list[int] = []
    for scores, count in sources:
        if count:
            chosen += nearest(scores, rows, count, rng, exclude=chosen)
    rest = rows if not chosen else np.setdiff1d(rows, chosen, assume_unique=True)
    chosen += rng.permutation(rest)[: size - len(chosen)].tolist()
    return [chosen[i] for i in rng.permutation(len(chosen))]


def nearest(scores: np.ndarray, rows: np.ndarray, count: int, rng: np.random.Generator, exclude=()) -> list[int]:
    """The `count` rows of highest score, best first; ties in random order. scores (N,), rows distinct ones of 0..N−1,
    exclude likewise."""
    rows = np.setdiff1d(rows, exclude, assume_unique=True) if len(exclude) else rows
    noisy = scores[rows] + _JITTER * rng.random(rows.size)
    count = min(count, rows.size)
    top = np.argpartition(-noisy, count - 1)[:count] if count < rows.size else np.arange(rows.size)
    return rows[top[np.argsort(-noisy[top], kind="stable")]].tolist()
