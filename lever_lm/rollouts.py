"""Public import path; the code is in `lever_lm.training.rollouts.file_format`."""

from lever_lm.training.rollouts.file_format import Group, load_groups

__all__ = ["Group", "load_groups"]
