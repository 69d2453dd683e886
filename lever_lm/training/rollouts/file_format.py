"""The rollout file: groups of scored sequences, read and written.

One JSON object; keys are query ids (rows of the embedding matrix) as decimal strings. Other keys are ignored, but
`_meta`, in which `lever rollout` says what it made the file of. Where trajectories point to: layouts.py.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lever_lm.config.schema import RewardConfig
from lever_lm.data import Example
from lever_lm.tasks import Task
from lever_lm.training.rollouts.layouts import pool_and_sequences
from lever_lm.training.rollouts.scores import check_reward_mode, is_scored, read_scores, trajectory_reward
from lever_lm.utils.atomic_io import write_json
from lever_lm.utils.errors import LeverError
from lever_lm.utils.fingerprint import changed, changes
from lever_lm.utils.safe_parse import read_json

_LONGEST_ID = 19  # digits that always fit in 63 bits


@dataclass(frozen=True)
class Group:
    """All rollouts of one query: pool (K global rows), sequences (G lists of pool positions), rewards (G, raw)."""

    query_id: int
    pool: list[int]
    sequences: list[list[int]]
    rewards: list[float]
    numbers: list[int] | None = field(default=None, compare=False)  # places in the file; all of them in order if None


@dataclass(frozen=True)
class RolloutFile:
    """A rollout file as it was read: its groups; the ids of all its queries, dropped ones included; and counts of its
    rollouts: `older` (of the older layout), `judged` (known to be right or wrong), `right`, `unevaluated` (failed or
    fell back), `dropped` (without a score), `scored`, and `zeroed` (scored, with a missing vqa_gt_prob as 0)."""

    path: Path
    groups: list[Group]
    query_ids: list[int]
    counts: Counter

    def summary(self) -> str:
        """Return one line for the screen."""
        rollouts, older = sum(len(group.sequences) for group in self.groups), self.counts["older"]
        layout = f"{older} of them by row, the older layout" if older else "by place in the pool"
        sizes = sorted({len(group.pool) for group in self.groups}) or [0]
        pools = f"pools of {sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "")
        judged = self.counts["judged"]
        right = f"{self.counts['right'] / judged:.1%} right" if judged else "none known to be right or wrong"
        left_out = {
            "unevaluated": "left out, as their evaluation failed or fell back (reward.skip_fallback)",
            "dropped": "left out, as they lack a score that reward.mode needs",
            "zeroed": "have no vqa_gt_prob, which counts as 0 (reward.missing)",
        }
        more = [f"{self.counts[name]} {what}" for name, what in left_out.items() if self.counts[name]]
        groups = f"{len(self.groups)} groups"
        if len(self.groups) < len(self.query_ids):
            groups += f" of {len(self.query_ids)} queries"
        parts = [f"{groups}, {rollouts} rollouts ({layout}), {pools}, {right}", *more]
        return f"rollouts: {self.path}: {'; '.join(parts)}"


def load_groups(
    path: str | Path,
    *,
    reward_mode: str = "hard_plus_soft",
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
    rel_weight: float = 0.1,
    skip_fallback: bool = True,
    require_positive: bool = False,
    missing: str = "lineage",
) -> list[Group]:
    """Read the groups of a rollout file, in the file's order of queries and rollouts.

    Rollouts are dropped where the evaluation failed or, with skip_fallback, fell back, and under `infoscore` where
    they have none; queries with none left, and with require_positive those without a correct rollout, are dropped.
    missing: what becomes of a rollout that lacks a score which the mode needs: `refuse`, `drop`, or `lineage`, which
    refuses all but a vqa_gt_prob: that counts as 0, as in Lever-Plus's loader, unless the whole file has none.
    Raises LeverError naming file, query and trajectory when a number is not finite, a score is missing, a position is
    out of range, a sequence repeats itself or contradicts its rows, or the schema is another.
    """
    how = RewardConfig(
        reward_mode, hard_weight, soft_weight, rel_weight, skip_fallback, require_positive, missing=missing
    )
    return read_groups(path, how).groups


def read_groups(path: str | Path, config: RewardConfig) -> RolloutFile:
    """Read a rollout file as `load_groups` does, of the first `max_groups` queries by id, and count what it holds."""
    check_reward_mode(config.mode)
    content = read_rollouts(path)
    ids = query_ids(content, config.max_groups)
    chosen = set(ids)
    groups, counts = [], Counter()
    for key, entry in content.items():
        if not is_query(key) or int(key) not in chosen:
            continue
        where = f"{path}, query {key}"
        evaluated = _evaluated(entry, config.skip_fallback, where)
        for i, trajectory in evaluated:
            read_scores(trajectory, f"{where}, trajectory {i}")
        kept = [(i, t) for i, t in evaluated if is_scored(t, config, counts, f"{where}, trajectory {i}")]
        counts["unevaluated"] += len(entry["pointer_candidates"]) - len(evaluated)
        counts["scored"] += len(kept)
        if not kept or (config.require_positive and not any(t.get("vqa_correct") == 1 for _, t in kept)):
            continue
        pool, sequences = pool_and_sequences(entry, kept, counts, where)
        rewards = [trajectory_reward(t, config, f"{where}, trajectory {i}") for i, t in kept]
        groups.append(Group(int(key), pool, sequences, rewards, [i for i, _ in kept]))
        marks = [t.get("vqa_correct") if t.get("vqa_correct") is not None else t.get("vqa_acc_score") for _, t in kept]
        counts["judged"] += sum(mark is not None for mark in marks)
        counts["right"] += sum(mark is not None and mark > 0 for mark in marks)
    if counts["zeroed"] and counts["zeroed"] == counts["scored"]:
        raise LeverError(f"{path}: no rollout has a vqa_gt_prob, which reward.mode={config.mode} needs")
    return RolloutFile(Path(path), groups, ids, counts)


def split_ids(query_ids: list[int]) -> tuple[set[int], set[int]]:
    """Split queries into training and validation: the first 80 % by sorted id, and the rest, before any is dropped."""
    ordered = sorted(query_ids)
    cut = int(0.8 * len(ordered))
    return set(ordered[:cut]), set(ordered[cut:])


def query_ids(content: dict, most: int = 0) -> list[int]:
    """Return the query ids of a rollout file's content, sorted; the first `most` of them, all for 0."""
    return sorted(int(key) for key in content if is_query(key))[: most or None]


def is_query(key: str) -> bool:
    """Return whether a top-level key of a rollout file is a query id."""
    return key.isascii() and key.isdigit() and len(key) < _LONGEST_ID


def read_rollouts(path: str | Path) -> dict:
    """Read the JSON object of a rollout file. Raises LeverError when it is missing or not one."""
    try:
        content = read_json(path, None, nan=True)  # where a score is not finite, its trajectory is named
    except OSError as error:
        raise LeverError(
            f"cannot read the rollout file {path}: {error.strerror or error}; make it with `lever rollout`"
        ) from error
    except ValueError as error:
        raise LeverError(
            f"{path} is not JSON ({error}): expected a rollout file of `lever rollout` or Lever-Plus"
        ) from error
    if not isinstance(content, dict) or not any(is_query(key) for key in content):
        raise LeverError(f"{path} holds no queries: expected an object whose keys are query ids")
    spelt: dict[int, str] = {}
    for key in filter(is_query, content):
        if spelt.setdefault(int(key), key) != key:
            raise LeverError(f"{path} holds query {int(key)} twice, as {spelt[int(key)]} and as {key}")
    return content


def _evaluated(entry, skip_fallback: bool, where: str) -> list[tuple[int, dict]]:
    trajectories = entry.get("pointer_candidates") if isinstance(entry, dict) else None
    if not isinstance(trajectories, list) or not all(isinstance(t, dict) for t in trajectories):
        raise LeverError(f"{where}: expected an object with a list 'pointer_candidates' of objects")
    dropped_modes = {"error", "fallback"} if skip_fallback else {"error"}
    return [
        (i, t)
        for i, t in enumerate(trajectories)
        if not t.get("eval_failed") and not (isinstance(mode := t.get("vqa_eval_mode"), str) and mode in dropped_modes)
    ]


# ---------------------------------------------------------------------- what it was made of


def made_of(path: Path) -> dict | None:
    """Return what `lever rollout` made a rollout file of: None where no file is there, {} for one that it did not make,
    such as one of Lever-Plus."""
    if not path.is_file():
        return None
    meta = read_rollouts(path).get("_meta")
    return meta if isinstance(meta, dict) and "fingerprint" in meta else {}


def rollout_calls(path: Path) -> int | None:
    """Return how many prompts were put to the LVLM for a rollout file: as it says, else one for each rollout; None
    where it holds log-probs and does not say."""
    content = read_rollouts(path)
    meta = content.get("_meta")
    said = meta.get("lvlm_calls") if isinstance(meta, dict) else None
    if isinstance(said, int) and not isinstance(said, bool):
        return said
    entries = [entry.get("pointer_candidates") for key, entry in content.items() if is_query(key)]
    rollouts = [one for group in entries if isinstance(group, list) for one in group if isinstance(one, dict)]
    scored = any("vqa_gt_prob" in one or one.get("infoscore") is not None for one in rollouts)
    return None if scored else len(rollouts)


def why_made_again(made: dict, here: dict[str, str]) -> str:
    """Return which of the inputs that a file was `made_of` have changed, as a sentence; empty where it is up to date.
    here: what `rollout_stamp` says."""
    return "" if made["fingerprint"] == here["fingerprint"] else changes(changed(made, here))


# ---------------------------------------------------------------------- writing


def write_rollouts(path: Path, meta: dict, entries: dict[int, dict]) -> None:
    """Write a rollout file; entries: row of the query → `query_entry`. Raises LeverError."""
    write_json(path, {"_meta": meta, **{str(row): entry for row, entry in entries.items()}}, indent=None)


def query_entry(row: int, query: Example, task: Task, pool: list[int], trajectories: list[dict]) -> dict:
    """Return the entry of a query, the training example in this row, with its pool (K rows) and trajectories."""
    described = {
        "query_id": row,
        "question_id": query.question_id,
        "image_id": query.image_id,
        "question": query.question,
        "gt_answers_raw": list(query.raw_answers),
        "gt_answers_norm": task.normalized_references(query),
    }
    return {"query": described, "candidate_pool_ids": pool, "pointer_candidates": trajectories}


def trajectory_entry(proposed: dict, pool: list[int], text: str, answer: str, scores: dict) -> dict:
    """Return a trajectory: what was `proposed` (see propose.py), the `text` that the LVLM wrote, the `answer` that is
    cut out of it, and its `score_entry`."""
    blank = {"beam_rank": None, "beam_score": None, "logprob_score": None, "temperature": None}
    return {
        **blank,
        **proposed,
        "pointer_global": [pool[i] for i in proposed["pointer"]],
        "vqa_raw_generation": text,
        "vqa_pred_answer": answer,
        **scores,
        "vqa_eval_mode": "vqaEval",
        "eval_split_used": "train",
        "eval_failed": False,
    }


def group_report(path: Path) -> dict:
    """Count how much there is to learn from in a file: groups, rollouts, mean accuracy; groups that are tied, all
    right, all wrong."""
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
