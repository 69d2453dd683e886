"""Public import path; the code is in `lever_lm.training.losses`."""

from lever_lm.training.losses import adapt_kl_beta, grpo_loss, rce_loss, rce_temperature

__all__ = ["adapt_kl_beta", "grpo_loss", "rce_loss", "rce_temperature"]
