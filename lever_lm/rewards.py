"""Public import path; the code is in `lever_lm.training.rewards`."""

from lever_lm.training.rewards import group_advantage, normalize_group, reward

__all__ = ["group_advantage", "normalize_group", "reward"]
