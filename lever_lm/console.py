"""Public import path; the code is in `lever_lm.utils.console`."""

from lever_lm.utils.console import Screen

__all__ = ["Screen"]
