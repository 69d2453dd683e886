"""Where a number stopped being finite: in which query, rollout and decoding step, and what mends it.

B queries, K candidates, G rollouts, S shots. Training looks at two numbers a step, the loss and the gradient's norm.
Only where one of them is not finite is the cause looked for, in the order in which numbers are made: features, rewards,
weights, logits, ratios, loss, gradient.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lever_lm.selectors.pointer.encoder import Noise
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.batches import Batch
from lever_lm.training.losses import KL_ESTIMATES
from lever_lm.utils.errors import LeverError

_NAMED = 3  # queries of a message, and rollouts of each
_MEND_REWARDS, _MEND_FEATURES = "mend the rewards of these rollouts", "encode it again (features.encoder, --embeddings)"
Terms = dict[str, tuple[Tensor, str]]  # what a loss is made of: name → its values (B, G), and what mends them


@dataclass(frozen=True)
class At:
    """A place in a run: phase (rce, grpo), epoch from 1, and what part of it."""

    phase: str
    epoch: int
    part: str = ""

    def __str__(self) -> str:
        return f"{self.phase.upper()} epoch {self.epoch}{', ' if self.part else ''}{self.part}"

    def stop(self, cause: str, mend: str = "") -> LeverError:
        """The error that ends the run here."""
        return LeverError(
            f"{self}: {cause}. Nothing of this epoch was written, the checkpoints before it are sound. The same "
            f"command stops here again: {mend or f'lower {self.phase}.lr'}, as another run (--run-name NAME) or from "
            "the start (--overwrite)"
        )


@dataclass(frozen=True)
class Pass:
    """One pass of a policy over a batch: log_probs (B, G) of the rollouts that count, mask (B, G), entropy (B, G) where
    it may be part of the loss, and the terms that a loss is made of. noise and label_smoothing as in `log_prob`."""

    at: At
    policy: PointerSelector
    batch: Batch
    mask: Tensor
    log_probs: Tensor
    terms: Callable[[], Terms]
    entropy: Tensor | None = None
    noise: Noise | None = None
    label_smoothing: float = 0.0

    def keep_gradients(self) -> None:
        """Let the backward pass leave behind what it brings to the log-probs: what finds the query of a gradient."""
        for output in self._outputs():
            output.retain_grad()

    def error(self, what: str, operation: str = "") -> LeverError:
        """Why `what`, a loss or a gradient or a metric, is not finite. operation: whose gradient is NaN, if known."""
        cause, mend = next(_causes(self))
        found = f" (in the backward pass first {operation})" if operation else ""
        return self.at.stop(f"the {what} is not finite: {cause}{found}", mend)

    def overflow(self) -> LeverError:
        """The optimizer's step is larger than a number can be."""
        of = _of(self.batch, self.mask)
        return self.at.stop(f"the step of the optimizer overflows: its learning rate is too large ({of})")

    def _outputs(self) -> list[Tensor]:
        return [output for output in (self.log_probs, self.entropy) if output is not None and output.requires_grad]


def rce_terms(rewards: Tensor, temperature: float) -> Terms:
    """What rce_loss is made of, arguments as there."""
    mend = "rce.normalize=zscore, or raise rce.temperature_end"
    return {"normalised reward": (rewards, mend), "reward over temperature": (rewards / temperature, mend)}


def grpo_terms(log_probs: Tensor, old: Tensor, advantages: Tensor, reference: Tensor | None, kl_estimate: str) -> Terms:
    """What grpo_loss is made of, arguments as there."""
    gap = log_probs - old if reference is None else reference - log_probs
    ratio = (log_probs - old).exp()
    terms = {"log-prob under the old policy": (old, "")}
    if reference is not None:
        terms["log-prob under the reference policy"] = (reference, "")
    return terms | {
        "advantage": (advantages, "grpo.advantage=rank"),
        "ratio to the old policy": (ratio, "lower grpo.lr or grpo.refresh_every"),
        "ratio times advantage": (ratio * advantages, "lower grpo.lr or grpo.advantage_clip"),
        f"KL estimate {kl_estimate}": (KL_ESTIMATES[kl_estimate](gap), "lower grpo.lr, or grpo.kl=k1"),
    }


def check_groups(at: At, query_ids: list[int], numbers: Tensor | None, mask: Tensor, values: dict[str, Tensor]) -> None:
    """Raise LeverError, naming query and rollout, where a value (n, G) of a real rollout is not finite."""
    for name, tensor in values.items():
        if (bad := _bad(tensor, mask)).any():
            named = f"the {name} of {_rollouts(query_ids, numbers, bad)}"
            raise at.stop(f"{named} is {_first(tensor, bad)}", _MEND_REWARDS)


def not_finite(tree, name: str = "") -> str | None:
    """The name of the first number or tensor of nested dicts and lists that is not finite."""
    if isinstance(tree, Tensor):
        return None if bool(torch.isfinite(tree).all()) else name
    if isinstance(tree, float):
        return None if math.isfinite(tree) else name
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    found = (not_finite(value, f"{name}.{key}".lstrip(".")) for key, value in items)
    return next((inner for inner in found if inner is not None), None)


# ---------------------------------------------------------------------- the search


def _causes(seen: Pass) -> Iterator[tuple[str, str]]:
    """(cause, what mends it), the earliest made first; the last one always comes."""
    batch = seen.batch
    yield from _features(batch)
    if (bad := _bad(batch.rewards, batch.mask)).any():
        yield f"the reward of {_of(batch, bad)} is {_first(batch.rewards, bad)}", _MEND_REWARDS
    if broken := [name for name, weight in seen.policy.named_parameters() if not_finite(weight, name)]:
        named = f"the weights {', '.join(broken[:_NAMED])}{_more(len(broken))} of the policy are not"
        ids = ", ".join(map(str, batch.query_ids[:_NAMED])) + _more(len(batch.query_ids))
        yield f"{named}, the step before was too large (lost are all rollouts of this batch, query {ids})", ""
    if (bad := _bad(seen.log_probs, seen.mask)).any():
        yield _logits(seen, bad)
    size = seen.log_probs.detach().abs()
    for name, (values, mend) in seen.terms().items():
        if (bad := _bad(values, seen.mask)).any():
            yield f"the {name} of {_of(batch, bad)} is {_first(values, bad)}", mend
        size = values.detach().abs()
    if any(output.grad is not None for output in seen._outputs()):
        yield from _gradient(seen)
    largest = size.masked_fill(~seen.mask, -1)
    yield f"every part of it is, their sum overflows; the largest is of {_of(batch, largest == largest.max())}", ""


def _features(batch: Batch) -> Iterator[tuple[str, str]]:
    for i in (~torch.isfinite(batch.query).all(-1)).nonzero().flatten().tolist()[:1]:
        yield f"the feature of query {batch.query_ids[i]} is not (lost are all its rollouts)", _MEND_FEATURES
    bad = ~torch.isfinite(batch.candidates).all(-1)
    bad = bad if batch.pool_mask is None else bad & batch.pool_mask
    for i, place in bad.nonzero().tolist()[:1]:
        of = f"candidate {place} of the pool of query {batch.query_ids[i]}"
        yield f"the feature of {of} is not (lost are all its rollouts)", _MEND_FEATURES


@torch.no_grad()
def _logits(seen: Pass, bad: Tensor) -> tuple[str, str]:
    """The first decoding step at which a rollout whose log-prob is not finite has such a logit."""
    batch = seen.batch
    steps = seen.policy.steps(batch.query, batch.candidates, batch.sequences, batch.pool_mask, noise=seen.noise)
    for number, logits in enumerate(steps, 1):
        here = bad & ~torch.isfinite(logits).all(-1)
        if here.any():
            return f"the logits of {_of(batch, here)} are not, from decoding step {number} on", ""
    return f"the log-prob of {_of(batch, bad)} is {_first(seen.log_probs, bad)}, though its logits are finite", ""


def _gradient(seen: Pass) -> Iterator[tuple[str, str]]:
    """Query by query, then rollout by rollout: whose gradient is not finite, or whose norm."""
    batch, before = seen.batch, [output.grad for output in seen._outputs()]
    for grad in before:
        if grad is not None and (bad := _bad(grad, seen.mask)).any():
            yield f"that of the loss with respect to the log-prob of {_of(batch, bad)} is {_first(grad, bad)}", ""
    weights = [weight for weight in seen.policy.parameters() if weight.requires_grad]

    def norm(i: int, rollouts: list[int]) -> float:
        """The gradient's norm from these rollouts of one query alone."""
        of = slice(i, i + 1)
        pool_mask = None if batch.pool_mask is None else batch.pool_mask[of]
        options = {"noise": _noise(seen.noise, of), "label_smoothing": seen.label_smoothing}
        sequences = batch.sequences[of, rollouts]
        again = seen.policy.evaluate(batch.query[of], batch.candidates[of], sequences, pool_mask, **options)
        # Without an entropy in the loss, `before` is of the log-probs alone.
        pairs = [
            (output, g[of, rollouts]) for output, g in zip(again[: len(before)], before, strict=True) if g is not None
        ]
        outputs, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, weights, grads, allow_unused=True)
        return float(nn.utils.get_total_norm([grad for grad in found if grad is not None]))

    real = [row.nonzero().flatten().tolist() for row in seen.mask]
    norms = [norm(i, rollouts) if rollouts else 0.0 for i, rollouts in enumerate(real)]
    place = max(range(len(norms)), key=lambda i: math.inf if math.isnan(norms[i]) else norms[i])
    bad = torch.zeros_like(seen.mask)
    if math.isfinite(norms[place]):
        bad[place] = seen.mask[place]
        yield f"that of each query is, their sum overflows; the largest is of {_of(batch, bad)}", ""
    alone = [rollout for rollout in real[place] if not math.isfinite(norm(place, [rollout]))]
    bad[place, alone or real[place]] = True
    yield f"that of {_of(batch, bad)} overflows", ""


def _noise(noise: Noise | None, of: slice) -> Noise | None:
    """The dropout of some queries of a batch."""
    if noise is None:
        return None
    query, candidates = (None if part is None else part[of] for part in (noise.query, noise.candidates))
    return Noise([None if part is None else part[of] for part in noise.attention], query, candidates)


# ---------------------------------------------------------------------- names


def _bad(values: Tensor, mask: Tensor) -> Tensor:
    return ~torch.isfinite(values) & mask


def _first(values: Tensor, bad: Tensor) -> str:
    return f"{float(values.detach()[bad][0]):.4g}"


def _of(batch: Batch, bad: Tensor) -> str:
    return _rollouts(batch.query_ids, batch.numbers, bad)


def _rollouts(query_ids: list[int], numbers: Tensor | None, bad: Tensor) -> str:
    """The rollouts of bad (n, G), by their queries and their numbers in the rollout file."""
    named = []
    rows = bad.any(-1).nonzero().flatten().tolist()
    for i in rows[:_NAMED]:
        places = bad[i].nonzero().flatten().tolist()
        own = numbers is not None and int(numbers[i, places[0]]) < 0
        of_file = places if numbers is None or own else numbers[i, places].tolist()
        listed = ", ".join(map(str, of_file[:_NAMED])) + _more(len(places))
        kind = "online rollout" if own else "rollout"
        named.append(f"query {query_ids[i]}, {kind}{'s' if len(places) > 1 else ''} {listed}")
    return "; ".join(named) + (f"; and {len(rows) - _NAMED} more queries" if len(rows) > _NAMED else "")


def _more(count: int) -> str:
    return f" and {count - _NAMED} more" if count > _NAMED else ""
