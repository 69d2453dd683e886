"""Public import path; the code is in `lever_lm.evaluation.run`."""

from lever_lm.evaluation.run import infer

__all__ = ["infer"]
