"""The rollout file: groups of scored sequences, in Lever-Plus's two JSON layouts, read and written.

One object; keys are query ids (rows of the embedding matrix) as decimal strings, other keys are ignored. In the
present layout a query names its pool (`candidate_pool_ids`) and trajectories point into it; in the old one
trajectories hold global rows and the pool is the sorted set of them.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from lever_lm.errors import LeverError, UsageError
from lever_lm.rewards import reward
from lever_lm.untrusted import read_json, shown

POOL_LIMIT = 64
_LARGEST = sys.float_info.max  # a longer integer is JSON, but no float
_LONGEST_ID = 19  # digits that always fit in 63 bits


@dataclass(frozen=True)
class Group:
    """All rollouts of one query: pool (K global rows), sequences (G lists of pool positions), rewards (G, raw)."""

    query_id: int
    pool: list[int]
    sequences: list[list[int]]
    rewards: list[float]
    numbers: list[int] | None = field(default=None, compare=False)  # places in the file; all of them in order if None


def load_groups(
    path: str | Path,
    *,
    reward_mode: str = "hard_plus_soft",
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
    rel_weight: float = 0.1,
    skip_fallback: bool = True,
    require_positive: bool = False,
) -> list[Group]:
    """Groups of a rollout file, in the file's order of queries and rollouts.

    Rollouts are dropped where the evaluation failed or, with skip_fallback, fell back, and under `infoscore` where
    they have none; queries with none left, and with require_positive those without a correct rollout, are dropped.
    Raises LeverError naming file, query and trajectory when a number is not finite, a position is out of range or the
    schema is another.
    """
    check_reward_mode(reward_mode)
    content = read_rollouts(path)
    weights = {"hard_weight": hard_weight, "soft_weight": soft_weight, "rel_weight": rel_weight}
    groups = []
    for key, entry in content.items():
        if not is_query(key):
            continue
        where = f"{path}, query {key}"
        kept = _usable(entry, skip_fallback, where)
        if reward_mode == "infoscore":  # found otherwise, a rollout has no such score: it is neither good nor bad
            kept = [(i, trajectory) for i, trajectory in kept if trajectory.get("infoscore") is not None]
        if not kept or (require_positive and not any(trajectory.get("vqa_correct") == 1 for _, trajectory in kept)):
            continue
        pool, sequences = _pool_and_sequences(entry, kept, where)
        rewards = [trajectory_reward(t, reward_mode, weights, f"{where}, trajectory {i}") for i, t in kept]
        groups.append(Group(int(key), pool, sequences, rewards, [i for i, _ in kept]))
    return groups


def split_ids(query_ids: list[int]) -> tuple[set[int], set[int]]:
    """Training and validation queries: the first 80 % by sorted id, and the rest. Taken before anything is dropped."""
    ordered = sorted(query_ids)
    cut = int(0.8 * len(ordered))
    return set(ordered[:cut]), set(ordered[cut:])


def is_query(key: str) -> bool:
    """Whether a top-level key of a rollout file is a query id."""
    return key.isascii() and key.isdigit() and len(key) < _LONGEST_ID


def read_rollouts(path: str | Path) -> dict:
    """The JSON object of a rollout file. Raises LeverError when it is missing or not one."""
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


def _usable(entry, skip_fallback: bool, where: str) -> list[tuple[int, dict]]:
    trajectories = entry.get("pointer_candidates") if isinstance(entry, dict) else None
    if not isinstance(trajectories, list) or not all(isinstance(t, dict) for t in trajectories):
        raise LeverError(f"{where}: expected an object with a list 'pointer_candidates' of objects")
    dropped_modes = {"error", "fallback"} if skip_fallback else {"error"}
    return [
        (i, t)
        for i, t in enumerate(trajectories)
        if not t.get("eval_failed") and not (isinstance(mode := t.get("vqa_eval_mode"), str) and mode in dropped_modes)
    ]


def _pool_and_sequences(entry: dict, kept: list[tuple[int, dict]], where: str) -> tuple[list[int], list[list[int]]]:
    if "pointer_global" in kept[0][1]:
        pool = _integers(entry.get("candidate_pool_ids"), f"{where}, candidate_pool_ids")[:POOL_LIMIT]
        if len(set(pool)) != len(pool):
            raise LeverError(f"{where}: candidate_pool_ids repeats an id")
        sequences = [_integers(t.get("pointer"), f"{where}, trajectory {i}, pointer") for i, t in kept]
    else:
        rows = [_integers(t.get("pointer_pos", t.get("pointer")), f"{where}, trajectory {i}, pointer") for i, t in kept]
        pool = sorted({row for sequence in rows for row in sequence})[:POOL_LIMIT]
        position = {row: i for i, row in enumerate(pool)}
        sequences = [[position.get(row, -1) for row in sequence] for sequence in rows]
    for (i, _), sequence in zip(kept, sequences, strict=True):
        if not sequence or not all(0 <= position < len(pool) for position in sequence):
            raise LeverError(
                f"{where}, trajectory {i}: positions {shown(sequence)} do not lie in a pool of {len(pool)}"
            )
    return pool, sequences


def _integers(value, where: str) -> list[int]:
    if not isinstance(value, list) or not all(type(v) is int and 0 <= v < 2**63 for v in value):
        raise LeverError(f"{where}: expected a list of non-negative integers, found {shown(value)}")
    return value


def trajectory_reward(trajectory: dict, mode: str, weights: dict, where: str) -> float:
    """The reward of a trajectory of the rollout file, or of as much of one. Raises LeverError naming `where` when one
    of its scores is no finite number."""
    names = {
        "correct": "vqa_correct",
        "accuracy": "vqa_acc_score",
        "gt_prob": "vqa_gt_prob",
        "relevance": "vqa_rel_score",
        "infoscore": "infoscore",
        "beam_score": "beam_score",
        "logprob_score": "logprob_score",
    }
    scores = {name: trajectory.get(field) for name, field in names.items()}
    for name, score in scores.items():
        number = isinstance(score, (int, float)) and -_LARGEST <= score <= _LARGEST  # false for NaN
        if score is not None and not number:
            raise LeverError(f"{where}: {names[name]} is {shown(score)}, expected a finite number or null")
    try:
        return reward(mode, **scores, **weights)
    except ValueError as error:
        raise LeverError(f"{where}: {error} (reward.mode, reward.hard_weight, soft_weight, rel_weight)") from error


def check_reward_mode(mode: str) -> None:
    """Raise UsageError unless `mode` is a reward mode."""
    try:
        reward(mode)
    except ValueError as error:
        raise UsageError(f"{error} (reward.mode)") from error
