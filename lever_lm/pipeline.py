"""Public import path; the code is in `lever_lm.training.pipeline`."""

from lever_lm.training.pipeline import Pipeline

__all__ = ["Pipeline"]
