"""N-shot inference: the LVLM answers the evaluation queries after the chosen demonstrations, and the task scores.

A choice is a list of training rows per query in pick order, best first; the prompt's order is prompt.build_prompt's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice

import numpy as np
from torch import Tensor

from lever_lm.config.schema import Config
from lever_lm.data import Example, VqaData
from lever_lm.data.embeddings import Embeddings, Features
from lever_lm.data.encoder import FeatureEncoder
from lever_lm.data.pools import sample_pools
from lever_lm.evaluation.statistics import (
    Summarize,
    bootstrap_interval,
    corpus_differences,
    corpus_metrics,
    paired_test,
    roc_auc,
)
from lever_lm.lvlm import CachedLvlm, build_prompt
from lever_lm.lvlm.prompt import Prompt
from lever_lm.selectors import ZERO_SHOT, select
from lever_lm.selectors.pool_recall import pool_recalls
from lever_lm.selectors.problem import Problem
from lever_lm.tasks import Task, task_of
from lever_lm.utils.errors import UsageError
from lever_lm.utils.progress import Track, untracked


@dataclass(frozen=True)
class Outcome:
    """One method at one number of shots: predictions and scores, query by query. scores: the task's headline; others:
    its further scores, by name. measured (Q, k) and summarize: of which the corpus metrics are made, see Task."""

    method: str
    shots: int
    predictions: list[str]
    scores: list[float]
    others: dict[str, list[float]] = field(default_factory=dict)
    measured: np.ndarray | None = None
    summarize: Summarize | None = None

    def summary(self) -> dict:
        """Return the mean score as a fraction with its 95 % bootstrap interval, the means of the other scores, and the
        corpus metrics with their intervals."""
        row = {"method": self.method, "shots": self.shots, "accuracy": float(np.mean(self.scores))}
        row["ci"] = list(bootstrap_interval(self.scores))
        row |= {name: float(np.mean(values)) for name, values in self.others.items()}
        row["n"] = len(self.scores)
        if self.measured is not None:
            row["metrics"] = corpus_metrics(self.measured, self.summarize)
        return row


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
        asked = {query.options for query in data.val_examples} if config.infer.auc else {("no", "yes")}
        if len(asked) > 1 or len(*asked) != 2:
            raise UsageError("infer.auc is of a choice between the same two options in each row: --set infer.auc=false")
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
        jobs = [(m, k) for m in choices for k in ([0] if m == ZERO_SHOT else shots)]
        prompts = [
            build_prompt([train[i] for i in picks[:k]], query, self.config.prompt)
            for method, k in jobs
            for query, picks in zip(self.queries, choices[method], strict=True)
        ]
        answers, outcomes = iter(lvlm.answer(prompts, "inference")), []
        margins = iter(self._margins(prompts, lvlm) if self.config.infer.auc else ())
        for job in jobs:
            written = list(islice(answers, len(self.queries)))
            predictions = [reduce(answer) for answer in written]
            scored = [task.metrics(*row) for row in zip(predictions, self.queries, written, strict=True)]
            scores, *others = ({name: [row[name] for row in scored]} for name in scored[0])
            pairs = zip(predictions, self.queries, strict=True)
            measured, summarize = np.array([task.measures(*pair) for pair in pairs]), task.summarize
            if self.config.infer.auc:
                measured = np.column_stack([measured, list(islice(margins, len(self.queries)))])
                summarize = partial(_with_auc, task.summarize)
            further = {name: values for one in others for name, values in one.items()}
            outcomes.append(Outcome(*job, predictions, *scores.values(), further, measured, summarize))
        return outcomes

    def _margins(self, prompts: Sequence[Prompt], lvlm: CachedLvlm) -> list[tuple[float, float]]:
        """Return of each prompt log P(second option) − log P(first option), and 1 where the second one is right."""
        said = [
            [(letter, text)[not q.shown] for letter, text in zip("AB", q.options, strict=True)] for q in self.queries
        ]
        said = [said[i % len(self.queries)] for i in range(len(prompts))]
        asked, answers = [prompt for prompt in prompts for _ in "AB"], [text for pair in said for text in pair]
        found = lvlm.answer_log_prob(asked, answers, "log-probs of both options")
        right = [float(query.answers[0] == query.options[1]) for query in self.queries]
        margins = [second - first for first, second in zip(found[::2], found[1::2], strict=True)]
        return [(margin, right[i % len(right)]) for i, margin in enumerate(margins)]


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


def _with_auc(summarize: Summarize, measured: np.ndarray) -> dict[str, np.ndarray]:
    """Return the metrics of a task with the ROC-AUC of its last two columns, (margin, 1 where the second is right)."""
    return {**summarize(measured[..., :-2]), "roc_auc": roc_auc(measured[..., -2], measured[..., -1])}


def compare(ours: str, outcomes: Sequence[Outcome]) -> list[dict]:
    """Return the paired tests of a method against every other at the same number of shots (zero_shot at any); of the
    corpus metrics that are no means of scores, the differences with their paired bootstrap intervals."""
    return [
        {
            "method": ours,
            "against": other.method,
            "shots": one.shots,
            **paired_test(one.scores, other.scores),
            **corpus_differences(one.measured, other.measured, one.summarize),
        }
        for one in outcomes
        for other in outcomes
        if one.method == ours != other.method and other.shots in (one.shots, 0)
    ]
