"""Rollouts: sequences proposed for each query, shown to the LVLM, scored by its answer, written as a rollout file; and
the same for those that a policy proposes while it learns.

n queries, K pool, G rollouts per query, S shots. What is proposed: proposals.py, infoscore.py.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lever_lm.config.schema import Config
from lever_lm.data import Example, VqaData
from lever_lm.data.embeddings import Features
from lever_lm.lvlm import CachedLvlm, Prompt, build_prompt, cut_answer
from lever_lm.tasks import TASKS, Task
from lever_lm.training.rollouts.file_format import Group, is_query, load_groups, read_rollouts, trajectory_reward
from lever_lm.training.rollouts.infoscore import add_infoscore
from lever_lm.training.rollouts.propose import propose_groups
from lever_lm.utils.atomic_io import write_json
from lever_lm.utils.errors import LeverError
from lever_lm.utils.fingerprint import changed, changes, stamp
from lever_lm.utils.safe_parse import shown

__all__ = ["Group", "group_report", "load_groups", "make_rollouts", "online_rewards"]


def rollout_stamp(config: Config, data: VqaData, features: str, lvlm: CachedLvlm) -> dict[str, str]:
    """Fingerprints of everything a rollout file depends on; features: that of the features."""
    return stamp(
        "rollouts",
        training_data=data.stamp("train"),
        features=[features, config.features.name],
        sampler=config.sampler,
        LVLM=lvlm.model,
        prompt=config.prompt,
        rollout_setting=config.rollout,
        policy=config.policy,
        seed=config.seed,
    )


def is_made(path: Path, here: dict[str, str]) -> bool:
    """Whether the rollout file is there, made from what `rollout_stamp` says."""
    return path.is_file() and _meta(path).get("fingerprint") == here["fingerprint"]


def why_made_again(path: Path, here: dict[str, str]) -> str:
    """Return which inputs of the rollout file have changed, as a sentence; empty where it is not there or is up to
    date."""
    return "" if is_made(path, here) or not path.is_file() else changes(changed(_meta(path), here))


def _meta(path: Path) -> dict:
    meta = read_rollouts(path).get("_meta")
    return meta if isinstance(meta, dict) else {}


def made_elsewhere(path: Path) -> bool:
    """Whether a rollout file is there that `lever rollout` did not make: one of Lever-Plus."""
    if not path.is_file():
        return False
    return "fingerprint" not in _meta(path)


def check_rows(path: Path, train: Sequence[Example], *, named: bool = True) -> None:
    """Raise LeverError where a rollout file's query ids are not the rows of this training split; and unless the user
    `named` the dataset, where a query does not say its question, so that nobody knows."""
    for key, entry in read_rollouts(path).items():
        if not is_query(key):
            continue
        if int(key) >= len(train):
            raise LeverError(
                f"{path}, query {key}: the training split has {len(train)} rows: name the dataset that it was made of "
                "(--dataset)"
            )
        query = entry.get("query") if isinstance(entry, dict) else None
        there = query.get("question_id") if isinstance(query, dict) else None
        here = train[int(key)].question_id
        if there is None and not named:
            raise LeverError(
                f"{path}, query {key} has no query.question_id to tell of which dataset it is, so its features are "
                "missing: --embeddings FILE, or --dataset NAME where the query ids are that dataset's training rows"
            )
        if there is not None and str(there) != str(here):
            raise LeverError(
                f"{path}, query {key}: question {shown(there)} there, question {here} in row {key} of the training "
                "split: they are of another dataset or order. Pass their features: --embeddings, or put them where "
                "Lever-Plus does, results/<dataset>/cache/query_embeddings.pt"
            )


def make_rollouts(
    config: Config, data: VqaData, features: Features, lvlm: CachedLvlm, path: Path, say: Callable[[str], None]
) -> dict:
    """The rollout file at `path`, made where it is missing or its inputs have changed. Returns its group report. Of the
    processes of a job, all propose and score, and the leader alone reads and writes the file.

    Raises LeverError rather than replace a file that `lever rollout` did not make.
    """
    here, shards = rollout_stamp(config, data, features.fingerprint, lvlm), lvlm.shards
    if shards.from_leader(lambda: _look(path, here, say)):
        return shards.from_leader(lambda: group_report(path))
    proposals, train = propose_groups(config, data, features, lvlm.track), data.train_examples
    if config.rollout.infoscore:
        add_infoscore(proposals, config, train, lvlm)
    prompts = proposals.prompts(config, train)
    texts = iter(lvlm.generate(prompts, "rollouts"))
    end = config.rollout.gt_prob_end
    task = TASKS[data.task]
    probs = iter(_reference_probs(prompts, task, lvlm, end) if config.rollout.gt_prob else [None] * len(prompts))
    content: dict = {"_meta": {**here, "n_train": len(train)}}
    by_query = (proposals.rows, proposals.queries, proposals.pools, proposals.groups)
    for row, query, pool, group in zip(*by_query, strict=True):
        scored = [_scored(move, pool, next(texts), next(probs), query, task, config.prompt.cut) for move in group]
        content[str(row)] = {
            "query": _query(row, query, task),
            "candidate_pool_ids": pool,
            "pointer_candidates": scored,
        }
    if shards.leader:
        write_json(path, content, indent=None)
    return shards.from_leader(lambda: group_report(path))


def _look(path: Path, here: dict[str, str], say: Callable[[str], None]) -> bool:
    """`is_made`, and where it is not, say why."""
    if not path.is_file():
        return False
    if made_elsewhere(path):
        raise LeverError(
            f"{path} was not made by `lever rollout` and is not replaced: move it, or train on it with --rl-data"
        )
    if why := why_made_again(path, here):
        say(f"{path} is made again: {why}; answers already known are not asked again")
    return not why


def online_rewards(
    config: Config, data: VqaData, rows: Tensor, pools: Tensor, lvlm: CachedLvlm
) -> Callable[[Tensor], Tensor]:
    """What answers the rollouts of a policy that is learning: sequences (n, G, S) of pool positions, −1 where one is
    shorter, for the queries `rows` (n,) with `pools` (n, K) of training rows → rewards (n, G), by reward.mode."""

    task, train = TASKS[data.task], data.train_examples

    def rewards(sequences: Tensor) -> Tensor:
        jobs = [
            (train[row], [train[pool[place]] for place in sequence if place >= 0])
            for row, pool, group in zip(rows.tolist(), pools.tolist(), sequences.tolist(), strict=True)
            for sequence in group
        ]
        prompts = [build_prompt(icds, query, config.prompt) for query, icds in jobs]
        texts = lvlm.generate(prompts, "online rollouts")
        with_probs = "gtprob" in config.reward.mode
        end = config.rollout.gt_prob_end
        probs = _reference_probs(prompts, task, lvlm, end) if with_probs else [None] * len(prompts)
        answers = (cut_answer(text, config.prompt.cut) for text in texts)
        scored = (_scores(text, prob, query, task) for text, prob, (query, _) in zip(answers, probs, jobs, strict=True))
        values = [trajectory_reward(scores, config.reward, "an online rollout") for scores in scored]
        return torch.tensor(values).view(sequences.shape[:2])

    return rewards


# ---------------------------------------------------------------------- scoring


def _reference_probs(prompts: list[Prompt], task: Task, lvlm: CachedLvlm, end: bool) -> list[float]:
    """Return Σ over a query's distinct reference answers of weight · P(answer | prompt), for each prompt.

    With `end`, P is that of the answer and the end of the turn after it: these exclude one another, so that the sum is
    at most 1. Without, it is that of any text that begins so, and `1` and `10` share probability.
    """
    pairs = [
        (i, answer, weight)
        for i, prompt in enumerate(prompts)
        for answer, weight in task.references(prompt.query).items()
    ]
    asked = [prompts[i] for i, _, _ in pairs], [answer for _, answer, _ in pairs]
    log_probs = lvlm.answer_log_prob(*asked, "gt_prob", end=end)
    totals = [0.0] * len(prompts)
    for (i, _, weight), log_prob in zip(pairs, log_probs, strict=True):
        totals[i] += weight * math.exp(log_prob)
    return totals


def _scored(
    trajectory: dict, pool: list[int], text: str, gt_prob: float | None, query: Example, task: Task, cut: str
) -> dict:
    """Return a trajectory as the rollout file holds it; text: what the LVLM wrote."""
    answer = cut_answer(text, cut)
    blank = {"beam_rank": None, "beam_score": None, "logprob_score": None, "temperature": None}
    return {
        **blank,
        **trajectory,
        "pointer_global": [pool[i] for i in trajectory["pointer"]],
        "vqa_raw_generation": text,
        "vqa_pred_answer": answer,
        **_scores(answer, gt_prob, query, task),
        "vqa_eval_mode": "vqaEval",
        "eval_split_used": "train",
        "eval_failed": False,
    }


def _scores(answer: str, gt_prob: float | None, query: Example, task: Task) -> dict:
    """Return what rewards are made of, by its names in the rollout file."""
    accuracy = round(task.score(answer, query), 6)
    f1, edit = task.relevance(answer, query)
    return {
        "vqa_correct": int(accuracy > 0),
        "vqa_acc_score": accuracy,
        **({} if gt_prob is None else {"vqa_gt_prob": round(gt_prob, 6)}),
        "vqa_rel_token_f1": round(f1, 6),
        "vqa_rel_edit_sim": round(edit, 6),
        "vqa_rel_score": round(max(f1, edit), 6),
    }


def _query(row: int, query: Example, task: Task) -> dict:
    return {
        "query_id": row,
        "question_id": query.question_id,
        "image_id": query.image_id,
        "question": query.question,
        "gt_answers_raw": list(query.raw_answers),
        "gt_answers_norm": task.normalized_references(query),
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
