"""Public import path; the code is in `lever_lm.utils.errors`."""

from lever_lm.utils.errors import LeverError, UsageError

__all__ = ["LeverError", "UsageError"]
