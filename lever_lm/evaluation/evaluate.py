"""N-shot inference: a policy or a baseline chooses ICDs for the evaluation queries, the LVLM answers, VQA scores.

A choice is a list of training rows per query in pick order, best first; the prompt's order is prompt.build_prompt's.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lever_lm.config.schema import Config
from lever_lm.data import Example, VqaData
from lever_lm.data.embeddings import Embeddings, Features
from lever_lm.data.pools import Candidates, nearest, query_rng, sample_pools, similarity_rows
from lever_lm.evaluation.statistics import bootstrap_interval, paired_test
from lever_lm.lvlm import CachedLvlm, build_prompt
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.tasks import TASKS
from lever_lm.utils.atomic_io import write_json, write_text
from lever_lm.utils.errors import LeverError
from lever_lm.utils.progress import WORTH_A_WORD, Track, Work, untracked
from lever_lm.utils.safe_parse import read_object

BASELINES = ("zero_shot", "random", "text_sim", "img_sim", "img_text_sim", "oracle")
_SIMILARITY_PARTS = {
    "text_sim": frozenset({"text"}),
    "img_sim": frozenset({"img"}),
    "img_text_sim": frozenset({"img", "text"}),
}
_CHUNK = 256
_CONSIDERED = 8  # candidates for the first place that are kept with a sample


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
        """The official accuracy as a fraction with its 95 % bootstrap interval, and the means of the other scores."""
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
    """The evaluation queries of a config with their pools, and what every method chooses for them. Without features
    there are no pools: only choices from outside can be run then."""

    def __init__(self, config: Config, data: VqaData, features: Features | None, track: Track = untracked):
        self.config, self.data, self.features, self.track = config, data, features, track
        self.task = TASKS[data.task]
        total = len(data.val_examples)
        count = min(config.infer.num_queries or total, total)
        # A subset of a larger one, and in the order of the file.
        self.rows = sorted(np.random.default_rng([config.seed, 2]).permutation(total)[:count].tolist())
        self.queries: list[Example] = [data.val_examples[row] for row in self.rows]

    @cached_property
    def embeddings(self) -> Embeddings:
        """Those of the queries."""
        return self.features.val.take(self.rows)

    @cached_property
    def pools(self) -> list[list[int]]:
        """The candidates of each query, as rows of the training split."""
        return sample_pools(
            self.config.sampler,
            self.queries,
            self.data.train_examples,
            (self.embeddings, self.features.train),
            size=self.config.rollout.pool_size,
            seed=self.config.seed,
            track=self.track,
        )

    @cached_property
    def candidates(self) -> Candidates:
        """The training split as what may be shown before a query."""
        return Candidates(self.data.train_examples)

    @cached_property
    def reduce(self) -> Callable[[str], str]:
        """From a written answer to the prediction that is scored: the same, but with infer.okvqa_stem."""
        if not self.config.infer.okvqa_stem:
            return str
        return self.task.reducer((*self.data.train_examples, *self.data.val_examples))

    def choose(self, policy: PointerSelector, shots: int, checkpoint: Path | str = "the policy") -> list[list[int]]:
        """Greedy picks of a policy from each query's pool. Raises LeverError naming checkpoint and query where the
        logits that they are read from are not finite: the largest of them would be the first."""
        icds = self.features.icds(self.config.features)
        if policy.d_model != icds.shape[1]:
            raise LeverError(
                f"the policy expects features of {policy.d_model} dimensions, these have {icds.shape[1]}: set "
                "features.encoder to the encoder it was trained with"
            )
        picks: list[list[int]] = []
        for pools, chunk, mask in self._chunks():
            try:
                places = policy.select(*chunk, shots, mask)
            except ValueError as error:
                raise LeverError(f"{error}: lower --shots or raise rollout.pool_size") from error
            with torch.no_grad():
                sound = torch.isfinite(policy.logits(*chunk, places, mask)).all(-1)  # (B, S)
            if not sound.all():
                row, step = (~sound).nonzero()[0].tolist()
                where = f"{checkpoint}, question {self.queries[len(picks) + row].question_id}"
                raise LeverError(
                    f"{where}: the logits of pick {step + 1} are NaN or infinite, and choose nothing: take another "
                    "checkpoint (--ckpt), or train again"
                )
            picks += [
                [pool[place] for place in chosen if place >= 0]  # fewer than `shots` where the policy stopped
                for pool, chosen in zip(pools, places.tolist(), strict=True)
            ]
        return picks

    def _chunks(self) -> Iterator[tuple[list[list[int]], tuple[Tensor, Tensor], Tensor]]:
        """The queries some at a time: their pools, the features (B, D) and (B, K, D), and which candidates are real."""
        queries = self.features.queries("val", self.config.features)[self.rows]
        icds, size = self.features.icds(self.config.features), max(map(len, self.pools))
        for start in range(0, len(self.queries), _CHUNK):
            pools = self.pools[start : start + _CHUNK]
            rows = torch.tensor([pool + [0] * (size - len(pool)) for pool in pools])
            mask = torch.tensor([[True] * len(pool) + [False] * (size - len(pool)) for pool in pools])
            yield pools, (queries[start : start + _CHUNK], icds[rows]), mask

    @torch.no_grad()
    def explain(self, policy: PointerSelector, picks: list[list[int]]) -> list[dict]:
        """How sure a policy was of its own picks. For each query `probabilities`, of each pick when it was made, and
        `considered`, the likeliest candidates for the first place as [question_id, probability]."""
        train, told = self.data.train_examples, []
        for pools, chunk, mask in self._chunks():
            chosen = picks[len(told) : len(told) + len(pools)]
            places = [[pool.index(row) for row in rows] for pool, rows in zip(pools, chosen, strict=True)]
            shots = max(map(len, places))
            padded = torch.tensor([row + [-1] * (shots - len(row)) for row in places])
            shares = policy.logits(*chunk, padded, mask).softmax(-1)  # (B, S, K), and one more with a stop
            real = shares[:, 0, : mask.shape[1]].masked_fill(~mask, -1.0)
            firsts = real.topk(min(_CONSIDERED, min(map(len, pools))))
            of_picks = shares.gather(-1, padded.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            for pool, row, sure, values, best in zip(
                pools, places, of_picks.tolist(), firsts.values.tolist(), firsts.indices.tolist(), strict=True
            ):
                considered = [
                    [train[pool[place]].question_id, round(value, 6)] for place, value in zip(best, values, strict=True)
                ]
                told.append({"probabilities": [round(p, 6) for p in sure[: len(row)]], "considered": considered})
        return told

    def baseline(self, name: str, shots: int) -> list[list[int]]:
        """What a baseline shows: random and similarities over the whole training split; the oracle ranks the pool by
        the accuracy of each ICD's own answer against the query's references, always normalised as in a reward, and by
        similarity among equals."""
        if name == "zero_shot":
            return [[] for _ in self.queries]
        train = self.data.train_examples
        parts = _SIMILARITY_PARTS.get(name, _SIMILARITY_PARTS["img_text_sim"])
        scores = similarity_rows(self.embeddings, self.features.train, parts)
        picks, rows = [], zip(self.queries, self.pools, scores, strict=True)
        for query, pool, row in self.track(Work(rows, "queries", after=WORTH_A_WORD), name, len(self.queries)):
            rng, among = query_rng(self.config.seed, query), self.candidates.allowed(query)
            if name == "oracle":
                among = np.array(pool)
                # Similarities lie within ±2, so an accuracy step of 0.1 always outweighs them.
                right = [self.task.score(train[i].answer, query) for i in pool]
                row[among] += 100 * np.array(right)
            chosen = rng.permutation(among)[:shots].tolist() if name == "random" else nearest(row, among, shots, rng)
            picks.append(chosen)
        return picks

    def run(self, choices: dict[str, list[list[int]]], shots: Sequence[int], lvlm: CachedLvlm) -> list[Outcome]:
        """Answer and score every method at every number of shots, as one list of work. zero_shot runs once."""
        train = self.data.train_examples
        jobs = [(m, k) for m in choices for k in ([0] if m == "zero_shot" else shots)]
        prompts = [
            build_prompt([train[i] for i in picks[:k]], query, self.config.prompt)
            for method, k in jobs
            for query, picks in zip(self.queries, choices[method], strict=True)
        ]
        answers = lvlm.answer(prompts, "inference")
        outcomes = []
        for i, (method, k) in enumerate(jobs):
            written = answers[i * len(self.queries) : (i + 1) * len(self.queries)]
            predictions = [self.reduce(answer) for answer in written]
            scored = [self.task.metrics(*row) for row in zip(predictions, self.queries, written, strict=True)]
            names = ("accuracy", "raw_accuracy", "normalized_accuracy")
            outcomes.append(Outcome(method, k, predictions, *([row[name] for row in scored] for name in names)))
        return outcomes

    def write(
        self,
        folder: Path,
        outcomes: list[Outcome],
        choices: dict[str, list[list[int]]],
        ours: str,
        facts: dict,
        reasons: dict[str, list[dict]] | None = None,
    ) -> dict:
        """Predictions (official result JSON) and per-sample JSONL of each method, icds.jsonl of `ours` in pick order,
        and metrics.json. reasons: what `explain` tells of a method's choices."""
        train = self.data.train_examples
        for outcome in outcomes:
            stem = f"{outcome.method}_{outcome.shots}shot"
            rows = [
                {"question_id": query.question_id, "answer": answer}
                for query, answer in zip(self.queries, outcome.predictions, strict=True)
            ]
            write_json(folder / f"predictions_{stem}.json", rows, indent=None)
            samples = [
                {
                    **row,
                    "question": query.question,
                    "image_id": query.image_id,
                    "accuracy": round(score, 6),
                    "references": list(query.answers),
                    "icds": [train[i].question_id for i in picks[: outcome.shots]],
                    **{name: told[: outcome.shots] if name == "probabilities" else told for name, told in why.items()},
                }
                for row, query, score, picks, why in zip(
                    rows,
                    self.queries,
                    outcome.scores,
                    choices[outcome.method],
                    (reasons or {}).get(outcome.method) or [{}] * len(rows),
                    strict=True,
                )
            ]
            write_text(folder / f"samples_{stem}.jsonl", _json_lines(samples))
        icds = [
            {"question_id": query.question_id, "icds": [train[i].question_id for i in picks]}
            for query, picks in zip(self.queries, choices[ours], strict=True)
        ]
        write_text(folder / "icds.jsonl", _json_lines(icds))
        results = [outcome.summary() for outcome in outcomes]
        earlier = _earlier(folder / "metrics.json", results, facts.get("setting"))
        new = {(test["method"], test["against"], test["shots"]) for test in facts.get("tests", ())}
        tests = [test for test in earlier["tests"] if (test["method"], test["against"], test["shots"]) not in new]
        metrics = {**facts, "tests": [*tests, *facts.get("tests", ())], "results": [*earlier["results"], *results]}
        write_json(folder / "metrics.json", metrics)
        return metrics


def _earlier(path: Path, results: list[dict], setting: str | None) -> dict[str, list[dict]]:
    """Results of an earlier metrics.json of the same setting that the new ones do not replace, and its tests."""
    there = read_object(path)
    if setting is None or there.get("setting") != setting:
        return {"results": [], "tests": []}
    new = {(row["method"], row["shots"]) for row in results}
    rows, tests = (found if isinstance(found := there.get(name), list) else [] for name in ("results", "tests"))
    kept = [row for row in rows if is_result(row) and (row["method"], row["shots"]) not in new]
    return {"results": kept, "tests": [test for test in tests if is_test(test)]}


def rows_of_another_setting(path: Path, setting: str) -> int:
    """How many results an earlier metrics.json holds of another setting, which new ones would replace."""
    there = read_object(path)
    rows = there.get("results")
    return len(rows) if isinstance(rows, list) and there.get("setting") != setting else 0


def is_result(row) -> bool:
    """Whether a value is a row of the results in a metrics.json. normalized_accuracy may be missing: 0.1 had none."""
    number = (int, float)
    kinds = {"method": str, "shots": int, "accuracy": number, "raw_accuracy": number, "n": int, "ci": list}
    if not isinstance(row, dict) or not all(isinstance(row.get(key), kind) for key, kind in kinds.items()):
        return False
    if not isinstance(row.get("normalized_accuracy", 0.0), number):
        return False
    return len(row["ci"]) == 2 and all(isinstance(end, number) for end in row["ci"])


_TEST = {"method": str, "against": str, "shots": int, **dict.fromkeys(("difference", "low", "high", "p"), (int, float))}


def is_test(row) -> bool:
    """Whether a value is a row of the tests in a metrics.json."""
    return isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in _TEST.items())


def _json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def compare(ours: Outcome, others: list[Outcome]) -> list[dict]:
    """Paired tests of one method against others at the same number of shots (zero_shot at any)."""
    same = [other for other in others if other.shots in (ours.shots, 0) and other.method != ours.method]
    return [
        {"method": ours.method, "against": other.method, "shots": ours.shots, **paired_test(ours.scores, other.scores)}
        for other in same
    ]
