"""Rollouts: sequences proposed for each query, shown to the LVLM, scored by its answer, written as a rollout file.

K pool, S shots. A group holds sequences of several kinds (`gen_method`): beams and samples of the freshly initialised
policy, similarity, random. Sequences with the same ICDs in another order count as the same.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lever_lm.config import Config, RolloutConfig, fingerprint
from lever_lm.data import Example, Group, VqaData
from lever_lm.data.groups import is_query, load_groups, read_rollouts
from lever_lm.errors import LeverError, UsageError
from lever_lm.features import Features
from lever_lm.lvlm import CachedLvlm, Prompt, build_prompt, cut_answer
from lever_lm.metrics import normalize_answer, relevance, vqa_accuracy
from lever_lm.policy import PointerSelector
from lever_lm.runs import write_json
from lever_lm.samplers import query_rng, sample_pools

__all__ = ["Group", "group_report", "load_groups", "make_rollouts", "new_policy", "query_rows"]

# Bump when the same config would give other rollouts than before.
STAGE_VERSION = 1
# How many more sequences than wanted are drawn, so that repeats can be dropped.
_SPARE = 4


def new_policy(config: Config, d_model: int) -> PointerSelector:
    """The untrained policy of a config: the same weights for the same seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            return PointerSelector(d_model=d_model, **vars(config.policy))
        except ValueError as error:
            raise UsageError(f"policy: {error}") from error


def query_rows(count: int, total: int, seed: int) -> list[int]:
    """Which training examples get a group: the first `count` of a seeded permutation, in order of row number. A
    smaller count is a subset of a larger one."""
    return sorted(np.random.default_rng([seed, 1]).permutation(total)[:count].tolist())


def rollout_stamp(config: Config, data: VqaData, features: Features, lvlm: CachedLvlm) -> str:
    """Fingerprint of everything a rollout file depends on."""
    parts = (config.sampler, config.rollout, config.policy, config.features.name, config.seed)
    return fingerprint(STAGE_VERSION, data.fingerprint, features.fingerprint, lvlm.fingerprint, *parts)


def made_elsewhere(path: Path) -> bool:
    """Whether a rollout file is there that `lever rollout` did not make: one of Lever-Plus."""
    if not path.is_file():
        return False
    meta = read_rollouts(path).get("_meta")
    return not (isinstance(meta, dict) and "fingerprint" in meta)


def check_rows(path: Path, train: Sequence[Example]) -> None:
    """Raise LeverError where a rollout file's query ids are not the rows of this training split."""
    for key, entry in read_rollouts(path).items():
        if not is_query(key):
            continue
        if int(key) >= len(train):
            raise LeverError(f"{path}, query {key}: the training split has {len(train)} rows; was it another dataset?")
        query = entry.get("query") if isinstance(entry, dict) else None
        there = query.get("question_id") if isinstance(query, dict) else None
        if there is not None and str(there) != str(train[int(key)].question_id):
            raise LeverError(
                f"{path}, query {key}: question {there} there, question {train[int(key)].question_id} in row {key} of "
                "the training split: they are of another dataset or order. Pass their features: --embeddings, or "
                "put them where Lever-Plus does, results/<dataset>/cache/query_embeddings.pt"
            )


def make_rollouts(
    config: Config, data: VqaData, features: Features, lvlm: CachedLvlm, path: Path, say: Callable[[str], None]
) -> dict:
    """The rollout file at `path`, made where it is missing or its inputs have changed. Returns its group report.

    Raises LeverError rather than replace a file that `lever rollout` did not make.
    """
    stamp = rollout_stamp(config, data, features, lvlm)
    if path.is_file():
        if made_elsewhere(path):
            raise LeverError(
                f"{path} was not made by `lever rollout` and is not replaced: move it, or train on it with --rl-data"
            )
        if read_rollouts(path)["_meta"]["fingerprint"] == stamp:
            return group_report(path)
        say(f"{path} is of another config or data and is made again; answers already known are not asked again")
    proposals, train = propose_groups(config, data, features), data.train_examples
    prompts = proposals.prompts
    texts = iter(lvlm.generate(prompts, "rollouts"))
    probs = iter(_reference_probs(prompts, lvlm) if config.rollout.gt_prob else [None] * len(prompts))
    content: dict = {"_meta": {"fingerprint": stamp, "version": STAGE_VERSION, "n_train": len(train)}}
    for row, query, pool, group in zip(*proposals.by_query, strict=True):
        scored = [_score(trajectory, pool, next(texts), next(probs), query) for trajectory in group]
        content[str(row)] = {"query": _query(row, query), "candidate_pool_ids": pool, "pointer_candidates": scored}
    write_json(path, content, indent=None)
    return group_report(path)


# ---------------------------------------------------------------------- proposing


@dataclass(frozen=True)
class Proposals:
    """What is to be asked: rows of the queries, the queries, their pools and groups, and all prompts in this order."""

    by_query: tuple[list[int], list[Example], list[list[int]], list[list[dict]]]
    prompts: list[Prompt]


def propose_groups(config: Config, data: VqaData, features: Features) -> Proposals:
    """The groups of a config, not yet answered."""
    train = data.train_examples
    rows = query_rows(config.rollout.num_queries, len(train), config.seed)
    queries = [train[row] for row in rows]
    embeddings = (features.train.take(rows), features.train)
    pools = sample_pools(config.sampler, queries, train, embeddings, size=config.rollout.pool_size, seed=config.seed)
    policy = new_policy(config, features.train.image.shape[1]).eval()
    query_features, icd_features = features.queries("train", config.features), features.icds(config.features)
    groups = [
        propose(config.rollout, query, policy, query_features[row], icd_features[pool], config.seed)
        for query, row, pool in zip(queries, rows, pools, strict=True)
    ]
    prompts = [
        build_prompt([train[pool[i]] for i in trajectory["pointer"]], query, config.prompt)
        for query, pool, group in zip(queries, pools, groups, strict=True)
        for trajectory in group
    ]
    return Proposals((rows, queries, pools, groups), prompts)


def propose(
    config: RolloutConfig, query: Example, policy: PointerSelector, feature: Tensor, candidates: Tensor, seed: int
) -> list[dict]:
    """The sequences of one group, best-founded kinds first: feature (D,), candidates (K, D)."""
    shots, pool = config.shots, len(candidates)
    if pool < shots:
        raise LeverError(f"question {query.question_id} has {pool} candidates for {shots} shots: lower rollout.shots")
    rng = query_rng(seed, query)
    similarity = candidates @ feature
    seen: set[frozenset[int]] = set()
    group: list[dict] = []

    def add(kind: str, sequences: Sequence[Sequence[int]], count: int, facts: Callable[[int], dict]) -> None:
        for i, sequence in enumerate(sequences):
            if count == 0:
                return
            if frozenset(sequence) not in seen:
                seen.add(frozenset(sequence))
                group.append({"pointer": [int(p) for p in sequence], "gen_method": kind, **facts(i)})
                count -= 1

    batch = (feature[None], candidates[None])
    beams, log_probs, probs = (t[0].tolist() for t in policy.beams(*batch, shots, _SPARE * max(config.beam, 1)))
    add(
        "beam",
        beams,
        config.beam,
        lambda i: {"beam_rank": i, "beam_score": round(probs[i], 6), "logprob_score": round(log_probs[i], 6)},
    )
    order = similarity.argsort(descending=True, stable=True).tolist()
    windows = [order[start : start + shots] for start in range(0, pool - shots + 1, shots)]
    add(
        "retrieval",
        windows,
        config.retrieval,
        lambda i: {"similarity_score": round(float(similarity[windows[i]].mean()), 6)},
    )
    for temperature in config.temperatures:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        drawn = policy.sample(
            *batch, shots, num_samples=_SPARE * max(config.sample, 1), temperature=temperature, generator=generator
        )
        with torch.no_grad():
            scores = policy.log_prob(*batch, drawn, temperature=temperature)[0].tolist()
        add(
            "sample",
            drawn[0].tolist(),
            config.sample,
            lambda i, s=scores, t=temperature: {"temperature": t, "logprob_score": round(s[i], 6)},
        )
    random = [rng.permutation(pool)[:shots].tolist() for _ in range(_SPARE * max(config.random, 1))]
    add("random", random, config.random, lambda i: {})
    return group


# ---------------------------------------------------------------------- scoring


def _reference_probs(prompts: list[Prompt], lvlm: CachedLvlm) -> list[float]:
    """Σ over a query's distinct reference answers of min(count / 3, 1) · P(answer | prompt), for each prompt."""
    pairs = [
        (i, answer, min(count / 3, 1.0))
        for i, prompt in enumerate(prompts)
        for answer, count in Counter(prompt.query.answers).items()
    ]
    log_probs = lvlm.answer_log_prob([prompts[i] for i, _, _ in pairs], [answer for _, answer, _ in pairs], "gt_prob")
    totals = [0.0] * len(prompts)
    for (i, _, weight), log_prob in zip(pairs, log_probs, strict=True):
        totals[i] += weight * math.exp(log_prob)
    return totals


def _score(trajectory: dict, pool: list[int], text: str, gt_prob: float | None, query: Example) -> dict:
    answer = cut_answer(text)
    accuracy = round(vqa_accuracy(answer, query.answers), 6)
    f1, edit = relevance(answer, query.answers)
    blank = {"beam_rank": None, "beam_score": None, "logprob_score": None, "temperature": None}
    return {
        **blank,
        **trajectory,
        "pointer_global": [pool[i] for i in trajectory["pointer"]],
        "vqa_raw_generation": text,
        "vqa_pred_answer": answer,
        "vqa_correct": int(accuracy > 0),
        "vqa_acc_score": accuracy,
        **({} if gt_prob is None else {"vqa_gt_prob": round(gt_prob, 6)}),
        "vqa_rel_token_f1": round(f1, 6),
        "vqa_rel_edit_sim": round(edit, 6),
        "vqa_rel_score": round(max(f1, edit), 6),
        "vqa_eval_mode": "vqaEval",
        "eval_split_used": "train",
        "eval_failed": False,
    }


def _query(row: int, query: Example) -> dict:
    return {
        "query_id": row,
        "question_id": query.question_id,
        "image_id": query.image_id,
        "question": query.question,
        "gt_answers_raw": list(query.raw_answers),
        "gt_answers_norm": [normalize_answer(answer) for answer in query.answers],
    }


def group_report(path: Path) -> dict:
    """How much there is to learn from: groups, rollouts, mean accuracy; groups that are tied, all right, all wrong."""
    groups = [entry["pointer_candidates"] for key, entry in read_rollouts(path).items() if is_query(key)]
    scores = [[t.get("vqa_acc_score") or 0.0 for t in group] for group in groups if group]
    return {
        "groups": len(groups),
        "rollouts": sum(map(len, groups)),
        "accuracy": round(float(np.mean([s for group in scores for s in group])), 4) if scores else 0.0,
        "tied": sum(max(s) == min(s) for s in scores),
        "all_right": sum(min(s) > 0 for s in scores),
        "all_wrong": sum(max(s) == 0 for s in scores),
    }
