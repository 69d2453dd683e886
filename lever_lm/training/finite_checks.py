"""Training stops at the first loss, reward or gradient that is NaN or infinite, before anything of it is written.

The message names phase, epoch, step, queries and rollouts, and the option that mends it. `--detect-anomaly` (nan_debug)
also looks for the decoding step, the module and the operation.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lever_lm.training.batches import Batch, GroupTensors
from lever_lm.utils.errors import LeverError

_NAMED = 3  # queries of a message, and rollouts of each
_GRADIENT = "gradient of the loss by the log-prob"
_MENDS = {  # value or phase → the option to change
    "reward": "mend the rewards of these rollouts",
    "spread of rewards in the group": "mend the rewards of these rollouts",
    f"rce {_GRADIENT}": "lower rce.lr, rce.normalize=zscore, or raise rce.temperature_end",
    f"grpo {_GRADIENT}": "lower grpo.lr, grpo.refresh_every or grpo.advantage_clip, or grpo.kl=k1",
}


class NotFinite(LeverError):
    """A number of training is NaN or infinite. groups: those it was found in; log_probs (B, G): theirs, if known."""

    groups: Batch | GroupTensors | None = None
    log_probs: Tensor | None = None


@dataclass(frozen=True)
class At:
    """A place in a run: phase (rce, grpo), epoch from 1, what part of it, and the warm-up where that is not RCE."""

    phase: str
    epoch: int
    part: str = ""
    warmup: str = ""

    def __str__(self) -> str:
        return f"{(self.warmup or self.phase).upper()} epoch {self.epoch}{', ' if self.part else ''}{self.part}"

    def stop(self, cause: str, mend: str = "") -> NotFinite:
        """The error that ends the run here."""
        return NotFinite(
            f"{self}: {cause}. Nothing of this epoch was written, the checkpoints before it are sound. The same "
            f"command stops here again: {mend or f'lower {self.phase}.lr'}, as another run (--run-name NAME) or from "
            "the start (--overwrite)"
        )


def check(at: At, groups: Batch | GroupTensors, values: dict[str, Tensor]) -> None:
    """Raise NotFinite, naming queries and rollouts, where one of the values (n, G) of a real rollout is not finite."""
    if error := _found(at, groups, values):
        raise error


def pass_error(at: At, what: str, batch: Batch, log_probs: Tensor, operation: str = "") -> NotFinite:
    """Return the error for a loss, gradient or metric (`what`) that is not finite, from what it was made of: rewards,
    log-probs (B, G) and, after a backward pass, their gradient. operation: whose gradient is NaN, where that is known.
    """
    said = f"the {what} is not finite{f' (first in {operation})' if operation else ''}: "
    values = {"reward": batch.rewards, "log-prob": log_probs}
    if log_probs.requires_grad and log_probs.grad is not None:
        values[_GRADIENT] = log_probs.grad
    if found := _found(at, batch, values, said):
        return found
    error = at.stop(f"{said}it overflows over {rollouts(batch, batch.mask)}")
    error.groups, error.log_probs = batch, log_probs
    return error


def _found(at: At, groups: Batch | GroupTensors, values: dict[str, Tensor], said: str = "") -> NotFinite | None:
    for name, tensor in values.items():
        bad = ~torch.isfinite(tensor) & groups.mask
        if bad.any():
            cause = f"{said}the {name} of {rollouts(groups, bad)} is {float(tensor.detach()[bad][0]):.4g}"
            error = at.stop(cause, _MENDS.get(name) or _MENDS.get(f"{at.phase} {name}", ""))
            error.groups, error.log_probs = groups, values.get("log-prob")
            return error
    return None


def not_finite(tree, name: str = "") -> str | None:
    """Return the name of the first number or tensor of nested dicts and lists that is not finite, None if all are."""
    if isinstance(tree, Tensor):
        # The sum of finite numbers may overflow, but that of others is never finite; it is far cheaper to look at.
        return None if bool(tree.sum().isfinite() or tree.isfinite().all()) else name
    if isinstance(tree, float):
        return None if math.isfinite(tree) else name
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    found = (not_finite(value, f"{name}.{key}".lstrip(".")) for key, value in items)
    return next((inner for inner in found if inner is not None), None)


def rollouts(groups: Batch | GroupTensors, chosen: Tensor) -> str:
    """Name the rollouts of chosen (n, G) by their queries and their numbers in the rollout file; a few, and how many
    more there are."""
    named, rows = [], chosen.any(-1).nonzero().flatten().tolist()
    for i in rows[:_NAMED]:
        places = chosen[i].nonzero().flatten()
        numbers = places if groups.numbers is None else groups.numbers[i, places]
        own = bool((numbers < 0).any())  # they are in no file
        listed = ", ".join(map(str, (places if own else numbers).tolist()[:_NAMED])) + _more(len(places), "")
        kind = f"{'online ' if own else ''}rollout{'s' if len(places) > 1 else ''}"
        named.append(f"query {groups.query_ids[i]}, {kind} {listed}")
    return "; ".join(named) + _more(len(rows), " queries")


def _more(count: int, of: str) -> str:
    return f" and {count - _NAMED} more{of}" if count > _NAMED else ""
