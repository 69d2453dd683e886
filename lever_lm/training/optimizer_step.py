"""One step of the optimizer, and the summary of an epoch's steps: what RCE and GRPO share."""

import math
import time

import torch
from torch import Tensor

from lever_lm.training.batches import Batch
from lever_lm.training.finite_checks import At, pass_error, rollouts
from lever_lm.training.nan_debug import backward


def optimizer_step(
    optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float, at: At, batch: Batch, log_probs: Tensor
) -> float:
    """Run the backward pass and one step of the optimizer; returns the norm of the gradient before clipping.

    log_probs (B, G): those of the batch that the loss is made of. Raises NotFinite, with weights and optimizer as they
    were, when loss or gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    log_probs.retain_grad()  # names the rollouts of a loss or gradient that is not finite
    operation = backward(loss, optimizer.zero_grad)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(trained, max_grad_norm))
    if not math.isfinite(norm) or not bool(torch.isfinite(loss.detach())):
        what = "gradient" if bool(torch.isfinite(loss.detach())) else "loss"
        raise pass_error(at, what, batch, log_probs, operation)
    try:
        optimizer.step()
    except RuntimeError as error:  # torch refuses a scalar that its float32 does not hold
        if "without overflow" not in str(error):
            raise
        of = rollouts(batch, batch.mask)
        raise at.stop(f"the step of the optimizer overflows: its learning rate is too large ({of})") from error
    return norm


def means(history: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean over steps of each statistic."""
    return {name: sum(step[name] for step in history) / len(history) for name in history[0]}


def timing(began: float, steps: int) -> dict[str, float]:
    """Return the seconds of the epoch and of one step, validation included."""
    elapsed = time.perf_counter() - began
    return {"epoch_time": round(elapsed, 4), "step_time": round(elapsed / max(steps, 1), 6)}
