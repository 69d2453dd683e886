"""Public import path; the code is in `lever_lm.config.load`."""

from lever_lm.config.load import resolve

__all__ = ["resolve"]
