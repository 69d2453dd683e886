"""Public import path; the code is in `lever_lm.selectors.pointer.model`."""

from lever_lm.selectors.pointer.model import PointerSelector

__all__ = ["PointerSelector"]
