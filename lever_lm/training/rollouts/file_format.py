"""The rollout file: groups of scored sequences, in Lever-Plus's two JSON layouts, read and written.

One object; keys are query ids (rows of the embedding matrix) as decimal strings, other keys are ignored. In the
present layout a query names its pool (`candidate_pool_ids`) and trajectories hold places in it; in the older one
trajectories hold rows and the pool is the sorted set of them. Each trajectory is read by its own layout:

- `pointer_global` marks the present layout, and must agree with the places;
- `pointer_pos`, a query's `_fix_failed`, and a query without a pool mark the older one;
- an unmarked pointer into a pool holds places where it can; else, where all of it are ids of the pool, rows.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lever_lm.config.schema import RewardConfig
from lever_lm.training.rewards import NEEDED, reward
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.safe_parse import read_json
from lever_lm.utils.terminal import shown

_LARGEST = sys.float_info.max  # a longer integer is JSON, but no float
_LONGEST_ID = 19  # digits that always fit in 63 bits
# A score's name in rewards.py → in the file.
_FIELDS = {
    "correct": "vqa_correct",
    "accuracy": "vqa_acc_score",
    "gt_prob": "vqa_gt_prob",
    "relevance": "vqa_rel_score",
    "infoscore": "infoscore",
    "beam_score": "beam_score",
    "logprob_score": "logprob_score",
}


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
    """What was read of a rollout file: its groups; the ids of all its queries, dropped ones included; and counts of its
    rollouts: `older` (of the older layout), `judged` (known to be right or wrong), `right`, `unevaluated` (failed or
    fell back), `dropped` (without a score), `scored`, and `zeroed` (scored, with a missing vqa_gt_prob as 0)."""

    path: Path
    groups: list[Group]
    query_ids: list[int]
    counts: Counter

    def summary(self) -> str:
        """One line for the screen."""
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
    """Groups of a rollout file, in the file's order of queries and rollouts.

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
            _scores(trajectory, f"{where}, trajectory {i}")
        kept = [(i, t) for i, t in evaluated if _is_scored(t, config, counts, f"{where}, trajectory {i}")]
        counts["unevaluated"] += len(entry["pointer_candidates"]) - len(evaluated)
        counts["scored"] += len(kept)
        if not kept or (config.require_positive and not any(t.get("vqa_correct") == 1 for _, t in kept)):
            continue
        pool, sequences = _pool_and_sequences(entry, kept, counts, where)
        rewards = [trajectory_reward(t, config, f"{where}, trajectory {i}") for i, t in kept]
        groups.append(Group(int(key), pool, sequences, rewards, [i for i, _ in kept]))
        marks = [t.get("vqa_correct") if t.get("vqa_correct") is not None else t.get("vqa_acc_score") for _, t in kept]
        counts["judged"] += sum(mark is not None for mark in marks)
        counts["right"] += sum(mark is not None and mark > 0 for mark in marks)
    if counts["zeroed"] and counts["zeroed"] == counts["scored"]:
        raise LeverError(f"{path}: no rollout has a vqa_gt_prob, which reward.mode={config.mode} needs")
    return RolloutFile(Path(path), groups, ids, counts)


def split_ids(query_ids: list[int]) -> tuple[set[int], set[int]]:
    """Training and validation queries: the first 80 % by sorted id, and the rest. Taken before anything is dropped."""
    ordered = sorted(query_ids)
    cut = int(0.8 * len(ordered))
    return set(ordered[:cut]), set(ordered[cut:])


def query_ids(content: dict, most: int = 0) -> list[int]:
    """The query ids of a rollout file's content, sorted; the first `most` of them, all for 0."""
    return sorted(int(key) for key in content if is_query(key))[: most or None]


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


def _is_scored(trajectory: dict, config: RewardConfig, counts: Counter, where: str) -> bool:
    """Return whether a trajectory has the scores that the reward needs. Raises LeverError where it has not and is not
    to be left out: a score that is not known is not a wrong answer."""
    needed = dict.fromkeys([*NEEDED[config.mode], *(["correct"] if config.require_positive else [])])
    lacking = [_FIELDS[name] for name in needed if trajectory.get(_FIELDS[name]) is None]
    if config.mode == "legacy" and all(trajectory.get(_FIELDS[name]) is None for name in ("correct", "accuracy")):
        lacking = [_FIELDS["correct"], _FIELDS["accuracy"]]  # either will do
    if not lacking:
        return True
    if config.missing == "lineage" and lacking == ["vqa_gt_prob"]:
        counts["zeroed"] += 1
        return True
    # What was found otherwise has no InfoScore, in any file.
    if config.missing != "drop" and "infoscore" not in lacking:
        raise LeverError(
            f"{where} has no {' and no '.join(lacking)}, which reward.mode={config.mode} needs"
            f"{' with reward.require_positive' if config.require_positive else ''}: score it, choose a reward.mode "
            "whose scores are there, or leave such rollouts out with --set reward.missing=drop"
        )
    counts["dropped"] += 1
    return False


def _pool_and_sequences(
    entry: dict, kept: list[tuple[int, dict]], counts: Counter, where: str
) -> tuple[list[int], list[list[int]]]:
    """The pool of a query, and its trajectories as places in it."""
    pool = None
    if entry.get("candidate_pool_ids") is not None or any(t.get("pointer_global") is not None for _, t in kept):
        pool = _integers(entry.get("candidate_pool_ids"), f"{where}, candidate_pool_ids")
        if len(set(pool)) != len(pool):
            raise LeverError(f"{where}: candidate_pool_ids repeats an id")
    named = [f"{where}, trajectory {i}" for i, _ in kept]
    by_row = pool is None or bool(entry.get("_fix_failed"))
    read = [_rows(t, pool, by_row, name) for (_, t), name in zip(kept, named, strict=True)]
    layouts = {layout for _, layout in read}
    if layouts == {"older"}:
        pool = sorted({row for rows, _ in read for row in rows})
    place = {row: i for i, row in enumerate(pool)}
    for (rows, layout), name in zip(read, named, strict=True):
        if not all(row in place for row in rows):
            raise LeverError(f"{name}: rows {shown(rows)} do not lie in candidate_pool_ids")
        if len(set(rows)) != len(rows):
            raise LeverError(f"{name}: its sequence names a candidate twice (rows {shown(rows)})")
        if layout == "either" and "ids" in layouts:
            raise LeverError(
                f"{name}: its pointer can be places in the pool and ids of it, and others of the query can only be "
                "ids: say which they are by pointer_global beside places, or by pointer_pos in place of pointer"
            )
    counts["older"] += sum(layout in ("older", "ids") for _, layout in read)
    return pool, [[place[row] for row in rows] for rows, _ in read]


def _rows(trajectory: dict, pool: list[int] | None, by_row: bool, where: str) -> tuple[list[int], str]:
    """The rows that a trajectory shows, and its layout: `places` in the pool, `older` by its marks, unmarked `ids` of
    the pool, or unmarked places that could be ids just as well (`either`)."""
    written = trajectory.get("pointer_global")
    rows = trajectory.get("pointer_pos")
    if written is None and (rows is not None or by_row):
        rows = _integers(trajectory.get("pointer") if rows is None else rows, f"{where}, pointer")
        if not rows:
            raise LeverError(f"{where}: its pointer is empty")
        return rows, "older"
    pointer = _integers(trajectory.get("pointer"), f"{where}, pointer")
    are_places, are_ids = bool(pointer) and max(pointer) < len(pool), set(pointer) <= set(pool)
    if written is None and pointer and are_ids and not are_places:
        return pointer, "ids"
    if not are_places:
        ids = "" if written is not None else ", and are not ids of it"
        raise LeverError(f"{where}: positions {shown(pointer)} do not lie in a pool of {len(pool)}{ids}")
    rows = [pool[place] for place in pointer]
    if written is not None and rows != _integers(written, f"{where}, pointer_global"):
        raise LeverError(f"{where}: pointer_global is {shown(written)}, but pointer names rows {shown(rows)}")
    return rows, "either" if written is None and are_ids and rows != pointer else "places"


def _integers(value, where: str) -> list[int]:
    if not isinstance(value, list) or not all(type(v) is int and 0 <= v < 2**63 for v in value):
        raise LeverError(f"{where}: expected a list of non-negative integers, found {shown(value)}")
    return value


def trajectory_reward(trajectory: dict, config: RewardConfig, where: str) -> float:
    """The reward of a trajectory of the rollout file, or of as much of one. Raises LeverError naming `where` when one
    of its scores is no finite number."""
    weights = {name: getattr(config, name) for name in ("hard_weight", "soft_weight", "rel_weight")}
    try:
        return reward(config.mode, **_scores(trajectory, where), **weights)
    except ValueError as error:
        raise LeverError(f"{where}: {error} (reward.mode, reward.hard_weight, soft_weight, rel_weight)") from error


def _scores(trajectory: dict, where: str) -> dict[str, float | None]:
    """The scores of a trajectory by their names in rewards.py. Raises LeverError where one is no finite number."""
    scores = {name: trajectory.get(key) for name, key in _FIELDS.items()}
    for name, score in scores.items():
        number = isinstance(score, (int, float)) and -_LARGEST <= score <= _LARGEST  # false for NaN
        if score is not None and not number:
            raise LeverError(f"{where}: {_FIELDS[name]} is {shown(score)}, expected a finite number or null")
    return scores


def check_reward_mode(mode: str) -> None:
    """Raise UsageError unless `mode` is a reward mode."""
    try:
        reward(mode)
    except ValueError as error:
        raise UsageError(f"{error} (reward.mode)") from error
