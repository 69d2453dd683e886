"""The queries that are shown: won over random demonstrations, lost to them, or drawn at random, each with what was
chosen and how surely; and how often each method shows an answer that would be right."""

import base64
from collections import Counter
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np

from lever_lm.data import Example, Image, VqaData, open_image
from lever_lm.evaluation.results import Sample, method_of, read_samples, samples_file
from lever_lm.selectors import CONTRASTS, RANDOM, ZERO_SHOT
from lever_lm.tasks import task_of
from lever_lm.utils.errors import LeverError
from lever_lm.utils.terminal import shown

EACH = 8  # queries of a kind
_MOST_ICDS = 32  # of one method on a card
_QUERY, _ICD = 320, 160  # pixels


@dataclass(frozen=True)
class Shown:
    """One method of an evaluation at one number of shots, with the samples of it and of others at the same."""

    method: str
    shots: int
    samples: dict[str, dict[int, Sample]]

    @property
    def ours(self) -> dict[int, Sample]:
        """The samples of the method itself."""
        return self.samples[self.method]


def read_shown(inference: Path, metrics: dict) -> Shown | None:
    """Return the method of an evaluation, by `method_of`, at the most shots at which random demonstrations were shown
    too, and what else was run there; None where only baselines were. metrics: of read_metrics. Raises LeverError where
    samples cannot be read."""
    results, ours = metrics["results"], method_of(metrics)
    if ours is None:
        return None
    beside = {row["shots"] for row in results if row["method"] == RANDOM}
    own = [row for row in results if row["method"] == ours]
    chosen = min(own, key=lambda row: (row["shots"] not in beside, -row["shots"]))
    samples = {}
    for method in dict.fromkeys(row["method"] for row in results if row["shots"] in (chosen["shots"], 0)):
        shots = 0 if method == ZERO_SHOT else chosen["shots"]
        samples[method] = read_samples(samples_file(inference, method, shots))
    return Shown(chosen["method"], chosen["shots"], samples)


def pick_queries(found: Shown) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Return question ids of each kind, and how many there are: `sample`, drawn from all; of the others some `win`s and
    `loss`es, spread over the file."""
    ours, random = found.ours, found.samples.get(RANDOM, {})
    gap = {i: ours[i].accuracy - random[i].accuracy for i in ours if i in random}
    kinds = {"win": [i for i in gap if gap[i] > 0], "loss": [i for i in gap if gap[i] < 0]}
    ids, drawn = list(ours), np.random.default_rng(0).permutation(len(ours))[:EACH]
    sample = [ids[i] for i in sorted(drawn.tolist())]
    chosen = {kind: _spread([i for i in ids if i not in sample], EACH) for kind, ids in kinds.items()}
    return {**chosen, "sample": sample}, {**{kind: len(ids) for kind, ids in kinds.items()}, "sample": len(ours)}


def _spread(ids: list[int], count: int) -> list[int]:
    return [ids[i * len(ids) // count] for i in range(count)] if len(ids) > count else ids


class Gallery:
    """What the page shows of the samples of an evaluation, over the data that was evaluated."""

    def __init__(self, found: Shown, data: VqaData):
        self.found, self.data, self.task = found, data, task_of(data)
        self.train = {example.question_id: example for example in data.train_examples}
        self.val = {example.question_id: example for example in data.val_examples}
        self._picture = cache(image_data_url)

    def _fits(self, icd: Example, query: Example) -> bool:
        return self.task.fits(icd.answer, query)

    def labels(self) -> list[dict]:
        """Return for each method, as shares of its queries: the `first` pick's own answer would be right, that of `any`
        shown ICD; and the accuracy of the LVLM, over all, where one was right (`with_right`) and where none was
        (`without`; None where there is no such query)."""
        fits = cache(lambda icd, query: self._fits(self.train[icd], self.val[query]))
        rows = []
        for method, samples in self.found.samples.items():
            known = [s for s in samples.values() if s.question_id in self.val and all(i in self.train for i in s.icds)]
            if known := [sample for sample in known if sample.icds]:
                right = [[fits(icd, sample.question_id) for icd in sample.icds] for sample in known]
                scores, some = np.array([s.accuracy for s in known]), np.array([any(r) for r in right])
                rows.append(
                    {
                        "method": method,
                        "ours": method == self.found.method,
                        "first": float(np.mean([r[0] for r in right])),
                        "any": float(some.mean()),
                        "accuracy": float(scores.mean()),
                        "with_right": float(scores[some].mean()) if some.any() else None,
                        "without": float(scores[~some].mean()) if not some.all() else None,
                    }
                )
        return rows

    def card(self, question_id: int, kind: str) -> dict:
        """Return what the page shows of one query. Raises LeverError for samples of other data."""
        query, samples, ours = self._known(self.val, question_id), self.found.samples, self.found.ours[question_id]
        others = {m: samples[m][question_id] for m in CONTRASTS if question_id in samples.get(m, {})}
        considered = [(icd, share) for icd, share in ours.considered if icd not in ours.icds]
        counts = Counter(ours.references).most_common()  # nine ×8, nein ×2
        return {
            "kind": kind,
            "id": question_id,
            "image": self._picture(query.image, _QUERY),
            "question": query.question,
            "references": ", ".join(f"{text} ×{n}" if n > 1 else text for text, n in counts),
            "ours": self._answered(ours, query),
            "considered": [self._demonstration(*pair, query) for pair in considered[:_MOST_ICDS]],
            "others": [{"method": method, **self._answered(sample, query)} for method, sample in others.items()],
        }

    def _answered(self, sample: Sample, query: Example) -> dict:
        """Return the LVLM's answer and the ICDs that it saw."""
        pairs = zip(sample.icds, sample.probabilities or [None] * len(sample.icds), strict=True)
        icds = [self._demonstration(*pair, query) for pair in list(pairs)[:_MOST_ICDS]]
        return {"answer": sample.answer, "accuracy": sample.accuracy, "icds": icds}

    def _demonstration(self, icd: int, share: float | None, query: Example) -> dict:
        example = self._known(self.train, icd)
        return {
            "image": self._picture(example.image, _ICD),
            "question": example.question,
            "answer": example.answer,
            "share": share,
            "fits": self._fits(example, query),
        }

    def _known(self, examples: dict[int, Example], question_id: int) -> Example:
        if question_id not in examples:
            raise LeverError(
                f"question {question_id} of the {self.found.method} samples is not in the data {shown(self.data.name)}:"
                " name the dataset that was evaluated (--dataset), or run `lever infer` again"
            )
        return examples[question_id]


def image_data_url(image: Image | None, size: int) -> str:
    """Return an image as the data URL of a JPEG, not larger than it is shown; "" of none. Raises LeverError where it
    cannot be read."""
    if image is None:
        return ""
    picture, file = open_image(image), BytesIO()
    picture.thumbnail((size, size))
    picture.save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
