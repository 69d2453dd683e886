"""CIDEr-D of image captions, number for number that of the public COCO evaluation code.

Source: CIDEr, arXiv:1411.5726 §3 and §6 (the variant D). N-grams of 1 to 4 words are weighed by tf-idf, where a
document is the set of references of one image; a prediction is compared with each reference by a clipped cosine under
a gaussian penalty of their lengths, and the mean over n and references is multiplied by 10. What the paper leaves open
is taken from the code: tf is a count, not a share; a length is a number of bigrams, so no word and one word are alike.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

N = 4
SIGMA = 6.0
CACHED = 8192  # vectors of references that are kept, of about 5 KB each

_ENCLITIC = r"'(?:s|re|ve|ll|d|m)(?!\w)"
_JOINED = re.compile(rf"((?<=\w)n't(?!\w)|(?<=\w){_ENCLITIC}|[#$%])")
_PUNCTUATION = re.compile(
    r"""[`"“”?!;()\[\]{}…–—]"""
    r"|(?<!\d)[,:]|[,:](?!\d)|(?<!\w)\.|\.(?!\w)"  # kept in 1,000 and 10:30, and in p.m
    r"|--+|(?<!\w)-|-(?!\w)"  # kept in t-shirt
    rf"|(?<!\w)'(?!\w)|(?<!\w)(?!{_ENCLITIC})'|'(?!\w)"  # kept in o'clock and 's
)

Ngram = tuple[str, ...]


def tokens(text: str) -> list[str]:
    """Return the words of a caption in lower case, without punctuation; of words already split so, the same.

    An approximation of the Penn Treebank tokenizer (in Java) whose punctuation COCO's code drops: `dog's` becomes
    dog 's and `don't` do n't; hyphens and points within words and numbers stay. Deviations: abbreviations lose their
    last point, brackets are dropped (there they become -lrb- and -rrb-), and `cannot` and `gonna` stay one word.
    """
    return _PUNCTUATION.sub(" ", _JOINED.sub(r" \1 ", text.lower().replace("’", "'"))).split()


@dataclass(frozen=True, slots=True)
class _Vector:
    """The tf-idf weights of a caption and their Euclidean norms, by n, and its number of bigrams."""

    weights: tuple[dict[Ngram, float], ...]
    norms: tuple[float, ...]
    length: int


class CiderD:
    """CIDEr-D with the document frequencies of a corpus: one sequence of reference captions an image.

    In a corpus of one image every n-gram has idf log 1 - log 1 = 0 and every score is 0, as in the public code.
    """

    def __init__(self, references: Sequence[Sequence[str]]):
        documents = [captions for captions in references if captions]
        frequencies: Counter[Ngram] = Counter()
        for captions in documents:
            frequencies.update({gram for text in captions for grams in _ngrams(tokens(text)) for gram in grams})
        # An n-gram of one image weighs as much as one of none: most are, and need not be kept.
        self._top = math.log(max(len(documents), 1))
        self._idf = {gram: self._top - math.log(count) for gram, count in frequencies.items() if count > 1}
        self._cache: dict[str, _Vector] = {}

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return the CIDEr-D in [0, 10] of a prediction against the references of its image; 0 without any."""
        predicted = self._vector(prediction)
        if not references or not predicted.weights[0]:
            return 0.0
        total = sum(_similarity(predicted, self._reference(text)) for text in references)
        return min(10 * total / (N * len(references)), 10.0)

    def _vector(self, text: str) -> _Vector:
        words = tokens(text)
        idf, top = self._idf, self._top
        weights = tuple(
            {gram: count * idf.get(gram, top) for gram, count in Counter(grams).items()} for grams in _ngrams(words)
        )
        norms = tuple(math.sqrt(sum(weight * weight for weight in of_n.values())) for of_n in weights)
        return _Vector(weights, norms, max(len(words) - 1, 0))

    def _reference(self, text: str) -> _Vector:
        vector = self._cache.get(text)
        if vector is None:
            if len(self._cache) >= CACHED:
                self._cache.clear()
            vector = self._cache[text] = self._vector(text)
        return vector


def _ngrams(words: Sequence[str]) -> list[list[Ngram]]:
    """Return the n-grams of a caption, repeats included, by n from 1 to N."""
    return [list(zip(*(words[start:] for start in range(n)), strict=False)) for n in range(1, N + 1)]


def _similarity(predicted: _Vector, reference: _Vector) -> float:
    """Return the sum over n of the clipped cosines, under the gaussian penalty: in [0, N]."""
    total = 0.0
    for hyp, ref, hyp_norm, ref_norm in zip(
        predicted.weights, reference.weights, predicted.norms, reference.norms, strict=True
    ):
        if hyp_norm and ref_norm:
            dot = sum(min(weight, ref[gram]) * ref[gram] for gram, weight in hyp.items() if gram in ref)
            total += dot / (hyp_norm * ref_norm)
    return total * math.exp(-((predicted.length - reference.length) ** 2) / (2 * SIGMA**2))
