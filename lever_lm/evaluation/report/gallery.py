"""The queries that are shown: won over random demonstrations, lost to them, or drawn at random, each with what was
chosen and how surely; and how often each method shows an answer that would be right."""

import base64
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np

from lever_lm.data import Example, Image, VqaData, open_image
from lever_lm.evaluation.results import Sample, read_samples, samples_file
from lever_lm.selectors import CONTRASTS, LEARNED, ZERO_SHOT
from lever_lm.tasks import TASKS, Task
from lever_lm.utils.errors import LeverError
from lever_lm.utils.terminal import printable, shown

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
        """Those of the method itself."""
        return self.samples[self.method]


def read_shown(inference: Path, results: Sequence[dict]) -> Shown | None:
    """The learned method of an evaluation at the most shots at which random demonstrations were shown too, and what
    else was run there; None where only baselines were. Raises LeverError where samples cannot be read."""
    learned = [row for row in results if row["method"] in LEARNED]
    if not learned:
        return None
    beside = {row["shots"] for row in results if row["method"] == "random"}
    chosen = min(learned, key=lambda row: (LEARNED.index(row["method"]), row["shots"] not in beside, -row["shots"]))
    methods = dict.fromkeys(row["method"] for row in results if row["shots"] in (chosen["shots"], 0))
    samples = {}
    for method in methods:
        shots = 0 if method == ZERO_SHOT else chosen["shots"]
        samples[method] = read_samples(samples_file(inference, method, shots))
    return Shown(chosen["method"], chosen["shots"], samples)


# ---------------------------------------------------------------------- what was learned


def right_labels(found: Shown, data: VqaData) -> list[dict]:
    """Of each method, as shares of its queries: the `first` pick's own answer would be right, that of `any` shown ICD;
    and the accuracy of the LVLM, over all, where one was right (`with_right`) and where none was (`without`; None
    where there is no such query)."""
    train, val = by_id(data.train_examples), by_id(data.val_examples)

    @cache
    def fits(icd: int, query: int) -> bool:
        return TASKS[data.task].score(train[icd].answer, val[query]) > 0

    rows = []
    for method, samples in found.samples.items():
        known = [s for s in samples.values() if s.icds and s.question_id in val and all(i in train for i in s.icds)]
        if known:
            right = [[fits(icd, sample.question_id) for icd in sample.icds] for sample in known]
            scores = {
                some: [s.accuracy for s, r in zip(known, right, strict=True) if any(r) == some] for some in (1, 0)
            }
            rows.append(
                {
                    "method": method,
                    "ours": method == found.method,
                    "first": float(np.mean([r[0] for r in right])),
                    "any": float(np.mean([any(r) for r in right])),
                    "accuracy": float(np.mean([s.accuracy for s in known])),
                    "with_right": float(np.mean(scores[1])) if scores[1] else None,
                    "without": float(np.mean(scores[0])) if scores[0] else None,
                }
            )
    return rows


def by_id(examples: Sequence[Example]) -> dict[int, Example]:
    """Examples by question id."""
    return {example.question_id: example for example in examples}


# ---------------------------------------------------------------------- the cards


def pick_queries(found: Shown) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Question ids of each kind, and how many there are: `sample`, drawn from all; of the others some `win`s and
    `loss`es, spread over the file."""
    ours, random = found.ours, found.samples.get("random", {})
    gap = {i: ours[i].accuracy - random[i].accuracy for i in ours if i in random}
    kinds = {"win": [i for i in gap if gap[i] > 0], "loss": [i for i in gap if gap[i] < 0]}
    ids, drawn = list(ours), np.random.default_rng(0).permutation(len(ours))[:EACH]
    sample = [ids[i] for i in sorted(drawn.tolist())]
    chosen = {kind: _spread([i for i in ids if i not in sample], EACH) for kind, ids in kinds.items()}
    return {**chosen, "sample": sample}, {**{kind: len(ids) for kind, ids in kinds.items()}, "sample": len(ours)}


def _spread(ids: list[int], count: int) -> list[int]:
    return [ids[i * len(ids) // count] for i in range(count)] if len(ids) > count else ids


def make_cards(found: Shown, data: VqaData, chosen: dict[str, list[int]]) -> list[dict]:
    """What the page shows of each query, by kind. Raises LeverError for samples of other data."""
    train, val, picture = by_id(data.train_examples), by_id(data.val_examples), cache(image_data_url)

    def known(examples: dict[int, Example], question_id: int) -> Example:
        if question_id not in examples:
            raise LeverError(
                f"question {question_id} of the {found.method} samples is not in the data {shown(data.name)}: name the "
                "dataset that was evaluated (--dataset), or run `lever infer` again"
            )
        return examples[question_id]

    def card(question_id: int, kind: str) -> dict:
        query = known(val, question_id)
        tell = _Teller(query, TASKS[data.task], lambda icd: known(train, icd), picture)
        others = {m: found.samples[m][question_id] for m in CONTRASTS if question_id in found.samples.get(m, {})}
        ours = found.ours[question_id]
        return {
            "kind": kind,
            "id": question_id,
            "image": picture(query.image, _QUERY),
            "question": printable(query.question),
            "references": _counted(ours.references),
            "ours": tell.answered(ours),
            "considered": tell.considered(ours),
            "others": [{"method": method, **tell.answered(sample)} for method, sample in others.items()],
        }

    return [card(question_id, kind) for kind, ids in chosen.items() for question_id in ids]


@dataclass(frozen=True)
class _Teller:
    """What is said of the ICDs of one query."""

    query: Example
    task: Task
    icd: Callable[[int], Example]
    picture: Callable[[Image, int], str]

    def answered(self, sample: Sample) -> dict:
        """The LVLM's answer and the ICDs that it saw."""
        shares = sample.probabilities or [None] * len(sample.icds)
        pairs = list(zip(sample.icds, shares, strict=True))[:_MOST_ICDS]
        icds = [self._demonstration(icd, share) for icd, share in pairs]
        return {"answer": printable(sample.answer), "accuracy": sample.accuracy, "icds": icds}

    def considered(self, sample: Sample) -> list[dict]:
        """The likeliest candidates for the first place that were not shown."""
        others = [(icd, share) for icd, share in sample.considered if icd not in sample.icds]
        return [self._demonstration(icd, share) for icd, share in others[:_MOST_ICDS]]

    def _demonstration(self, icd: int, share: float | None) -> dict:
        example = self.icd(icd)
        return {
            "id": icd,
            "image": self.picture(example.image, _ICD),
            "question": printable(example.question),
            "answer": printable(example.answer),
            "share": share,
            "fits": self.task.score(example.answer, self.query) > 0,
        }


def _counted(references: Sequence[str]) -> str:
    """`nine ×8, nein ×2`."""
    counts = Counter(printable(text) for text in references)
    return ", ".join(f"{text} ×{count}" if count > 1 else text for text, count in counts.most_common())


def image_data_url(image: Image, size: int) -> str:
    """An image as the data URL of a JPEG, not larger than it is shown. Raises LeverError where it cannot be read."""
    picture, file = open_image(image), BytesIO()
    picture.thumbnail((size, size))
    picture.save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
