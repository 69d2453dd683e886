"""Public import path; the code is in `lever_lm.selectors.pointer.checkpoint`."""

from lever_lm.selectors.pointer.checkpoint import load_policy, read_checkpoint, to_v2, to_v3

__all__ = ["load_policy", "read_checkpoint", "to_v2", "to_v3"]
