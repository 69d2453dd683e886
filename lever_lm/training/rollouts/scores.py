"""The scores of a trajectory in the rollout file: by which names they are written and read, and the reward of them."""

import sys
from collections import Counter

from lever_lm.config.schema import RewardConfig
from lever_lm.data import Example
from lever_lm.tasks import Task
from lever_lm.training.rewards import needed_scores, reward
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.terminal import shown

_LARGEST = sys.float_info.max  # a longer integer is JSON, but no float
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


def score_entry(answer: str, gt_prob: float | None, query: Example, task: Task) -> dict:
    """Return the scores of an answer, by their names in the file: what rewards are made of."""
    accuracy = round(task.score(answer, query), 6)
    f1, edit = task.relevance(answer, query)
    return {
        "vqa_correct": int(task.fits(answer, query)),
        "vqa_acc_score": accuracy,
        **({} if gt_prob is None else {"vqa_gt_prob": round(gt_prob, 6)}),
        "vqa_rel_token_f1": round(f1, 6),
        "vqa_rel_edit_sim": round(edit, 6),
        "vqa_rel_score": round(max(f1, edit), 6),
    }


def is_scored(trajectory: dict, config: RewardConfig, counts: Counter, where: str) -> bool:
    """Return whether a trajectory has the scores that the reward needs. Raises LeverError where it has not and is not
    to be left out: a score that is not known is not a wrong answer."""
    needed = dict.fromkeys([*needed_scores(config.mode), *(["correct"] if config.require_positive else [])])
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


def trajectory_reward(trajectory: dict, config: RewardConfig, where: str) -> float:
    """Return the reward of a trajectory, or of its scores alone. Raises LeverError naming `where` when one
    of its scores is no finite number."""
    weights = {name: getattr(config, name) for name in ("hard_weight", "soft_weight", "rel_weight")}
    try:
        return reward(config.mode, **read_scores(trajectory, where), **weights)
    except ValueError as error:
        raise LeverError(f"{where}: {error} (reward.mode, reward.hard_weight, soft_weight, rel_weight)") from error


def read_scores(trajectory: dict, where: str) -> dict[str, float | None]:
    """Return the scores of a trajectory by their names in rewards.py. Raises LeverError for one that is not finite."""
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
