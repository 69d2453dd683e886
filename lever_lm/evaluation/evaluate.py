"""N-shot inference: the LVLM answers the evaluation queries after the chosen demonstrations, and the task scores.

A choice is a list of training rows per query in pick order, best first; the prompt's order is prompt.build_prompt's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import numpy as np
from torch import Tensor

from lever_lm.config.schema import Config
from lever_lm.data import Example, VqaData
from lever_lm.data.embeddings import Embeddings, Features
from lever_lm.data.encoder import FeatureEncoder
from lever_lm.data.pools import sample_pools
from lever_lm.evaluation.statistics import bootstrap_interval, paired_test
from lever_lm.lvlm import CachedLvlm, build_prompt
from lever_lm.selectors import ZERO_SHOT, select
from lever_lm.selectors.pool_recall import pool_recalls
from lever_lm.selectors.problem import Problem
from lever_lm.tasks import Task, task_of
from lever_lm.utils.progress import Track, untracked


@dataclass(frozen=True)
class Outcome:
    """One method at one number of shots: predictions and scores, query by query. scores: official; raw_scores:
    official, against the unreduced answers; normalized_scores: with answers always normalised."""

    method: str
    shots: int
    predictions: list[str]
    scores: list[float]
    raw_scores: list[float]
    normalized_scores: list[float]

    def summary(self) -> dict:
        """Return the official accuracy as a fraction with its 95 % bootstrap interval, and the other scores' means."""
        return {
            "method": self.method,
            "shots": self.shots,
            "accuracy": float(np.mean(self.scores)),
            "ci": list(bootstrap_interval(self.scores)),
            "normalized_accuracy": float(np.mean(self.normalized_scores)),
            "raw_accuracy": float(np.mean(self.raw_scores)),
            "n": len(self.scores),
        }


class Evaluation:
    """The evaluation queries of a config, to choose for (`problem`) and to answer (`run`). Without features there is no
    problem: only choices from a file can be run then. lvlm: makes the LVLM, for a selector that asks it."""

    def __init__(
        self,
        config: Config,
        data: VqaData,
        features: Features | None,
        track: Track = untracked,
        lvlm: Callable[[], CachedLvlm] | None = None,
    ):
        self.config, self.data, self.features, self.track, self._lvlm = config, data, features, track, lvlm
        self.task = task_of(data)
        total = len(data.val_examples)
        count = min(config.infer.num_queries or total, total)
        # A subset of a larger one, and in the order of the file.
        self.rows = sorted(np.random.default_rng([config.seed, 2]).permutation(total)[:count].tolist())
        self.queries: list[Example] = [data.val_examples[row] for row in self.rows]

    @cached_property
    def problem(self) -> Problem:
        """The queries with their pools, features and what may be shown before them."""
        embeddings = (self.features.val.take(self.rows), self.features.train)
        examples = (self.queries, self.data.train_examples, self.task)
        problem = problem_of(self.config, *examples, embeddings, self.features.columns, self.track)
        return replace(problem, answer=self._answer, embed=self._embed)

    def pool_recall(self) -> dict[int, float]:
        """Return the recall of the pools of training and of inference, as `pool_recalls` does."""
        embeddings = (self.features.val.take(self.rows), self.features.train)
        return pool_recalls(self.config, self.queries, self.data.train_examples, self.task, embeddings)

    def _answer(self, shown: Sequence[Sequence[int]]) -> list[str]:
        """Return what the LVLM answers to each query after these training rows, first pick first."""
        train, pairs = self.data.train_examples, zip(shown, self.queries, strict=True)
        prompts = [build_prompt([train[row] for row in rows], query, self.config.prompt) for rows, query in pairs]
        return self._lvlm().answer(prompts, "selection")

    def _embed(self, texts: Sequence[str]) -> Tensor:
        """Return unit text embeddings (n, D) by the encoder of the features."""
        features = self.config.features
        return FeatureEncoder(features.encoder, self.config.device, features.batch_size).texts(texts, self.track)

    def select(self, name: str, shots: int) -> list[list[int]]:
        """Return the picks of a selector of the table."""
        return select(name, self.problem, shots, self.track)

    def run(self, choices: dict[str, list[list[int]]], shots: Sequence[int], lvlm: CachedLvlm) -> list[Outcome]:
        """Answer and score every method at every number of shots, as one list of work; zero_shot once. The task reduces
        answers before it scores them only with infer.okvqa_stem."""
        train, task = self.data.train_examples, self.task
        reduce = task.reducer((*train, *self.data.val_examples)) if self.config.infer.okvqa_stem else str
        names = ("accuracy", "raw_accuracy", "normalized_accuracy")
        jobs = [(m, k) for m in choices for k in ([0] if m == ZERO_SHOT else shots)]
        prompts = [
            build_prompt([train[i] for i in picks[:k]], query, self.config.prompt)
            for method, k in jobs
            for query, picks in zip(self.queries, choices[method], strict=True)
        ]
        answers, outcomes = iter(lvlm.answer(prompts, "inference")), []
        for job in jobs:
            written = list(islice(answers, len(self.queries)))
            predictions = [reduce(answer) for answer in written]
            scored = [task.metrics(*row) for row in zip(predictions, self.queries, written, strict=True)]
            outcomes.append(Outcome(*job, predictions, *([row[name] for row in scored] for name in names)))
        return outcomes


def problem_of(
    config: Config,
    queries: Sequence[Example],
    train: Sequence[Example],
    task: Task,
    embeddings: tuple[Embeddings, Embeddings],
    columns: Tensor | None = None,
    track: Track = untracked,
) -> Problem:
    """Return queries with the pools and features that a config asks for. embeddings: of (queries, train);
    columns: what its policy is told of `train` beside them."""
    size, seed = config.infer.pool_size, config.seed
    pools = sample_pools(config.sampler, queries, train, embeddings, size=size, seed=seed, track=track)
    of_query, of_icd = config.features.parts()
    features = (embeddings[0].combine(of_query), embeddings[1].combine(of_icd))
    return Problem(queries, train, embeddings, features, pools, seed, task, columns=columns)


def compare(ours: str, outcomes: Sequence[Outcome]) -> list[dict]:
    """Return the paired tests of a method against every other at the same number of shots (zero_shot at any)."""
    return [
        {"method": ours, "against": other.method, "shots": one.shots, **paired_test(one.scores, other.scores)}
        for one in outcomes
        for other in outcomes
        if one.method == ours != other.method and other.shots in (one.shots, 0)
    ]
