"""Public import path; the code is in `lever_lm.tasks.vqa_metrics`."""

from lever_lm.tasks.vqa_metrics import normalize_answer, relevance, vqa_accuracy

__all__ = ["normalize_answer", "relevance", "vqa_accuracy"]
