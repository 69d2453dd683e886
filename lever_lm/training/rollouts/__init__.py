"""Rollouts, warm-up, GRPO, and the choice of a checkpoint."""
