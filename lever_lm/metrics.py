"""Public import path; the code is in `lever_lm.tasks.vqa`."""

from lever_lm.tasks.vqa import normalize_answer, relevance, vqa_accuracy

__all__ = ["normalize_answer", "relevance", "vqa_accuracy"]
