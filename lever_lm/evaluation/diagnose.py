"""What a sceptic asks of demonstrations, answered on the picks of one method: `lever diagnose`.

Q queries, S shots. Every row is an accuracy over the same queries, or a number made of their predictions, with what it
says about this method. Prompts go through the answer cache. What is counted and how: diagnostics.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np

from lever_lm.data import Example
from lever_lm.data.pools import query_rng
from lever_lm.evaluation import diagnostics as count
from lever_lm.evaluation.evaluate import Evaluation
from lever_lm.evaluation.report.phrasing import percent, points
from lever_lm.evaluation.statistics import bootstrap_interval, paired_test
from lever_lm.lvlm import CachedLvlm, Prompt, build_prompt

ORDERS = 10
_ALPHA = 0.05


@dataclass(frozen=True)
class Finding:
    """A row: `value` with its 95 % interval, where it is a mean over queries; `against` the method's own accuracy the
    paired test {difference, low, high, p}, where it is another accuracy; `says`, what it means for this method; parts:
    more numbers by name."""

    key: str
    label: str
    value: float
    says: str
    interval: tuple[float, float] | None = None
    test: dict[str, float] | None = None
    parts: dict | None = None

    def row(self) -> dict:
        """Return the finding as JSON has it, without what it lacks."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class _Answered:
    predictions: list[str]
    scores: list[float]

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.scores))


class Diagnosis:
    """The picks of one method for the queries of an evaluation, at a number of shots. other: another LVLM, by its name,
    that is given the same picks."""

    def __init__(
        self,
        evaluation: Evaluation,
        lvlm: CachedLvlm,
        picks: Sequence[Sequence[int]],
        shots: int,
        other: tuple[str, CachedLvlm] | None = None,
    ):
        self.evaluation, self.lvlm, self.other = evaluation, lvlm, other
        self.config, self.train = evaluation.config, evaluation.data.train_examples
        self.task, self.queries = evaluation.task, evaluation.queries
        self.picks = [list(rows[:shots]) for rows in picks]
        self.shown = [[self.train[row] for row in rows] for rows in self.picks]

    def _with_generators(self) -> Iterator[tuple[list[Example], np.random.Generator]]:
        """Yield the demonstrations of each query, with the query's own generator, fresh for each row."""
        for icds, query in zip(self.shown, self.queries, strict=True):
            yield icds, query_rng(self.config.seed, query)

    def findings(self) -> list[Finding]:
        """Return all rows, in the order in which they are read."""
        parts = (self._own, self._zero_shot, self._images, self._answers, self._copies, self._in_context)
        return [
            one
            for part in (*parts, self._without_lvlm, self._order, self._independence, self._transfer)
            for one in part()
        ]

    # ------------------------------------------------------------------ asking

    def _ask(
        self, shown: Sequence[Sequence[Example]], what: str, *, bare: bool = False, lvlm: CachedLvlm | None = None
    ) -> _Answered:
        """Have the LVLM answer all queries after these demonstrations, first pick first."""
        prompts: list[Prompt] = [
            replace(build_prompt(icds, query, self.config.prompt), bare=bare)
            for icds, query in zip(shown, self.queries, strict=True)
        ]
        predictions = (lvlm or self.lvlm).answer(prompts, what)
        return _Answered(predictions, self._scores(predictions))

    def _scores(self, predictions: Sequence[str]) -> list[float]:
        """Return the headline score of each prediction."""
        pairs = zip(predictions, self.queries, strict=True)
        return [next(iter(self.task.metrics(text, query, text).values())) for text, query in pairs]

    def _says(self, prediction: str, answer: str) -> bool:
        """Return whether a prediction is an answer, as the task compares them."""
        said, meant = (
            self.task.normalized_references(replace(self.queries[0], answers=(text,))) for text in (prediction, answer)
        )
        return bool(prediction.strip()) and said == meant

    @cached_property
    def own(self) -> _Answered:
        """The answers after the method's own demonstrations."""
        return self._ask(self.shown, "picks")

    @cached_property
    def nothing(self) -> _Answered:
        """The answers without demonstrations."""
        return self._ask([[] for _ in self.queries], "zero-shot")

    def _accuracy(self, key: str, label: str, found: _Answered, says: Callable[[str], str]) -> Finding:
        """Return a row of another accuracy; says: (the gap in words) → the sentence."""
        test = paired_test(self.own.scores, found.scores)
        gap = f"{points(test['difference'])} points [{points(test['low'])}, {points(test['high'])}]"
        gap = gap if test["p"] < _ALPHA else f"nothing that {len(self.queries):,} queries can show ({gap})"
        return Finding(key, label, found.accuracy, says(gap), bootstrap_interval(found.scores), test)

    # ------------------------------------------------------------------ the rows

    def _own(self) -> Iterator[Finding]:
        shots = max(map(len, self.picks))
        says = f"What is compared below: {len(self.queries):,} queries, {shots} demonstrations for each."
        yield Finding("picks", "as chosen", self.own.accuracy, says, bootstrap_interval(self.own.scores))

    def _zero_shot(self) -> Iterator[Finding]:
        yield self._accuracy(
            "zero_shot", "no demonstrations", self.nothing, lambda gap: f"The demonstrations are worth {gap}."
        )
        bare = self._ask([[] for _ in self.queries], "zero-shot, bare question", bare=True)
        worth = self.nothing.accuracy - bare.accuracy
        yield self._accuracy(
            "zero_shot_bare",
            "no demonstrations, and only the question",
            bare,
            lambda gap: (
                f"The template's words alone are worth {points(worth)} points; with demonstrations it is {gap}."
            ),
        )

    def _images(self) -> Iterator[Finding]:
        def changed(change: Callable[[list[Example], np.random.Generator], list]) -> list[list[Example]]:
            return [
                [replace(icd, image=image) for icd, image in zip(icds, change(icds, rng), strict=True)]
                for icds, rng in self._with_generators()
            ]

        for key, label, change, says in (
            (
                "images_removed",
                "images of demonstrations removed",
                lambda icds, rng: [None] * len(icds),
                "Their images are",
            ),
            (
                "images_shuffled",
                "images shuffled among them",
                lambda icds, rng: [icds[i].image for i in _deranged(len(icds), rng)],
                "That each image stands with its own question is",
            ),
            ("images_replaced", "images replaced by others", self._other_images, "That these are the images is"),
        ):
            found = self._ask(changed(change), label)
            yield self._accuracy(key, label, found, lambda gap, says=says: f"{says} worth {gap}.")

    def _other_images(self, icds: list[Example], rng: np.random.Generator) -> list:
        return [self.train[int(rng.integers(len(self.train)))].image for _ in icds]

    def _answers(self) -> Iterator[Finding]:
        def other(icds: list[Example], rng: np.random.Generator) -> list[Example]:
            return [self.train[int(rng.integers(len(self.train)))] for _ in icds]

        for key, label, change, says in (
            (
                "answers_shuffled",
                "answers shuffled among them",
                lambda icds, rng: [icds[i] for i in _deranged(len(icds), rng)],
                "That each answer stands with its own question is",
            ),
            ("answers_replaced", "answers replaced by others", other, "That these are the answers is"),
        ):
            pairs = (zip(icds, change(icds, rng), strict=True) for icds, rng in self._with_generators())
            shown = [[replace(icd, answers=one.answers, shown=one.shown) for icd, one in part] for part in pairs]
            found = self._ask(shown, label)
            yield self._accuracy(key, label, found, lambda gap, says=says: f"{says} worth {gap}.")

    @cached_property
    def _shown_answers(self) -> list[list[str]]:
        return [[icd.answer for icd in icds] for icds in self.shown]

    def _copies(self) -> Iterator[Finding]:
        """The rate at which predictions are shown answers, less that of the zero-shot predictions: what is copied."""
        shown = self._shown_answers
        with_, without = (count.copies(one.predictions, shown, self._says) for one in (self.own, self.nothing))
        test = paired_test([float(hit) for hit in with_], [float(hit) for hit in without])
        wrong = [i for i, score in enumerate(self.own.scores) if score == 0]
        among_wrong = float(np.mean([with_[i] - without[i] for i in wrong])) if wrong else 0.0
        places = count.copies_by_place(self.own.predictions, shown, self._says)
        before = count.copies_by_place(self.nothing.predictions, shown, self._says)
        by_place = [ours - theirs for ours, theirs in zip(places, before, strict=True)]
        rate, zero_shot = float(np.mean(with_)), float(np.mean(without))
        says = (
            f"{percent(rate)} of the answers are one that was shown, {percent(zero_shot)} without showing it; among "
            f"wrong answers the excess is {points(among_wrong)} points."
        )
        parts = {"rate": rate, "zero_shot_rate": zero_shot, "among_wrong": among_wrong}
        interval = (test["low"], test["high"])
        label = "answers copied beyond zero-shot"
        yield Finding("excess_copy", label, test["difference"], says, interval, parts={**parts, "by_place": by_place})

    def _in_context(self) -> Iterator[Finding]:
        pairs = zip(self.shown, self.queries, strict=True)
        right = [any(self.task.fits(icd.answer, query) for icd in icds) for icds, query in pairs]
        scores = np.array(self.own.scores)
        mask = np.array(right)
        with_ = float(scores[mask].mean()) if mask.any() else None
        without = float(scores[~mask].mean()) if not mask.all() else None
        told = [
            f"{percent(part)} where {what}"
            for part, what in ((with_, "it is"), (without, "it is not"))
            if part is not None
        ]
        says = f"A right answer is shown to {percent(float(mask.mean()))}; the accuracy is {' and '.join(told)}."
        parts = {"accuracy_with": with_, "accuracy_without": without}
        interval = bootstrap_interval(mask.astype(float))
        yield Finding("answer_in_context", "a right answer is shown", float(mask.mean()), says, interval, parts=parts)

    def _without_lvlm(self) -> Iterator[Finding]:
        for key, label, read in (
            ("majority_vote", "majority of the shown answers, no LVLM", count.majority),
            ("copy_first", "answer of the first pick, no LVLM", lambda answers: answers[0] if answers else ""),
        ):
            predictions = [read(answers) for answers in self._shown_answers]
            found = _Answered(predictions, self._scores(predictions))
            yield self._accuracy(
                key, label, found, lambda gap: f"Over this, reading the query's image and question adds {gap}."
            )

    def _order(self) -> Iterator[Finding]:
        if max(map(len, self.picks)) < 2:
            return
        reversed_ = self._ask([icds[::-1] for icds in self.shown], "reversed order")
        yield self._accuracy(
            "reversed", "in reversed order", reversed_, lambda gap: f"The chosen order is worth {gap}."
        )
        drawn = [
            [[icds[i] for i in rng.permutation(len(icds))] for _ in range(ORDERS)]
            for icds, rng in self._with_generators()
        ]
        orders = [self._ask(shown, "random order").scores for shown in zip(*drawn, strict=True)]
        spread, of_query = count.spread_over_orders(orders)
        mean = float(np.mean(orders))
        says = (
            f"Over {ORDERS} random orders the accuracy is {percent(mean)} ± {100 * spread:.1f}; the score of "
            f"a query has a standard deviation of {of_query:.2f}."
        )
        parts = {"mean": mean, "std": spread, "std_of_a_query": of_query}
        yield Finding("order_sensitivity", f"spread over {ORDERS} orders", spread, says, parts=parts)

    def _independence(self) -> Iterator[Finding]:
        entropy, largest = count.entropy_of_picks(self.picks)
        share = entropy / largest if largest else 0.0
        distinct = len({row for rows in self.picks for row in rows})
        says = f"{distinct:,} examples are shown in all; 1 means that every query has its own, 0 that all share one."
        yield Finding("entropy", "entropy of the picks, of the largest", share, says, parts={"nats": entropy})
        shots = max(map(len, self.picks))
        popular = count.most_picked(self.picks, len(self.train))
        shown = []
        for query in self.queries:
            free = [row for row in popular if row not in self.evaluation.problem.candidates.withheld(query)]
            shown.append([self.train[row] for row in free[:shots]])
        found = self._ask(shown, "the most picked")
        yield self._accuracy(
            "most_picked",
            f"the {shots} most picked for every query",
            found,
            lambda gap: f"Choosing by query is worth {gap}.",
        )

    def _transfer(self) -> Iterator[Finding]:
        if self.other is None:
            return
        name, lvlm = self.other
        found = self._ask(self.shown, f"the picks, given to {name}", lvlm=lvlm)
        nothing = self._ask([[] for _ in self.queries], f"zero-shot, {name}", lvlm=lvlm)
        worth = paired_test(found.scores, nothing.scores)
        gap = f"{points(worth['difference'])} points [{points(worth['low'])}, {points(worth['high'])}]"
        says = f"To {name} these demonstrations are worth {gap} over none."
        parts = {"lvlm": name, "zero_shot": nothing.accuracy}
        interval = bootstrap_interval(found.scores)
        yield Finding("other_lvlm", f"the same picks, given to {name}", found.accuracy, says, interval, worth, parts)


def _deranged(count: int, rng: np.random.Generator) -> list[int]:
    """Return a permutation of `count` places that leaves none where it was; of one place, that place."""
    order = rng.permutation(count)
    moved = np.empty(count, dtype=int)
    moved[order] = np.roll(order, 1)
    return moved.tolist()
