"""`--detect-anomaly`: where in the policy a number stopped being finite.

Nothing is computed otherwise than without it: outputs and gradients are only looked at, which takes time. The loops
know nothing of it; what is found is added to the message with which they stop.
"""

import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.finite_checks import NotFinite, rollouts
from lever_lm.utils.errors import LeverError

_OPERATION = re.compile(r"Function '(\w+)' returned nan")
_LINE = re.compile(r'File "[^"]*[/\\]lever_lm[/\\]([\w/\\]+\.py)", line (\d+), in (\w+)')
_PASSES = 4  # that are kept: one step asks three policies


@contextmanager
def detecting(policy: nn.Module, say: Callable[[str], None]) -> Iterator[None]:
    """Within this context, a NotFinite also names the decoding step, the first module whose output was not finite, and
    the query whose gradient broke or is the largest."""
    say("--detect-anomaly: every module's output and every gradient is looked at, training is slower")
    outputs: list[str] = []
    gradients: dict[str, Tensor] = {}
    passes: deque[tuple[Tensor, list[Tensor]]] = deque(maxlen=_PASSES)
    modules = [(name, module) for name, module in policy.named_modules() if name]
    hooks = [module.register_forward_hook(_look_at(name, outputs, gradients)) for name, module in modules]
    try:
        with torch.autograd.set_detect_anomaly(True), _decoding_kept(passes):
            yield
    except NotFinite as error:
        found = [*_first_step(error, passes), *outputs[:1], *_worst_gradient(error, gradients)]
        raise LeverError(". ".join([str(error), *found])) from error
    finally:
        for hook in hooks:
            hook.remove()


def _look_at(name: str, outputs: list[str], gradients: dict[str, Tensor]) -> Callable[..., None]:
    """Return a forward hook that notes an output that is not finite, and the largest entry in each row of its gradient.
    As a closure it reports to the same lists from a copy of the policy."""

    def hook(module: nn.Module, given: tuple, output: Tensor) -> None:
        if not isinstance(output, Tensor):
            return
        if not outputs and _broken(output):
            finite = not any(_broken(x) for x in given if isinstance(x, Tensor))
            kind = f"{name} ({type(module).__name__}), of {'finite' if finite else 'such'} input"
            outputs.append(f"The first module whose output is not finite: {kind}")
        if output.requires_grad:
            output.register_hook(lambda grad: gradients.__setitem__(name, grad.detach().flatten(1).abs().amax(1)))

    return hook


@contextmanager
def _decoding_kept(passes: deque) -> Iterator[None]:
    """Within this context, keep the log-probs of the last passes with the logits of their decoding steps."""
    score = PointerSelector.score

    def kept(self, steps, *args, **options):
        scored = score(self, steps, *args, **options)
        passes.append((scored[0], steps))
        return scored

    PointerSelector.score = kept
    try:
        yield
    finally:
        PointerSelector.score = score


def _first_step(error: NotFinite, passes) -> Iterator[str]:
    """Tell the first decoding step of the failed pass whose logits are not finite, and for which rollouts."""
    steps = next((steps for log_probs, steps in passes if log_probs is error.log_probs), [])
    for number, logits in enumerate(steps, 1):
        bad = ~torch.isfinite(logits).all(-1) & error.groups.mask
        if bad.any():
            yield f"The logits of {rollouts(error.groups, bad)} are not finite, from decoding step {number} on"
            return


def _worst_gradient(error: NotFinite, gradients: dict[str, Tensor]) -> Iterator[str]:
    """Tell the query whose gradient is not finite, at the first such module of the backward pass; where all gradients
    are finite, the query with the largest."""
    known = error.log_probs is not None and error.log_probs.grad is not None
    rows = {name: each for name, each in gradients.items() if known and len(each) == len(error.log_probs)}
    if not rows:
        return
    first = next((name for name, each in rows.items() if _broken(each)), None)
    if first is not None:
        what, place = "first gradient that is not finite", int((~torch.isfinite(rows[first])).int().argmax())
    else:
        first = max(rows, key=lambda name: float(rows[name].max()))
        what, place = "largest gradient", int(rows[first].argmax())
    yield f"The {what} is that of query {error.groups.query_ids[place]}, at the output of {first}"


def _broken(values: Tensor) -> bool:
    return not bool(torch.isfinite(values).all())


def backward(loss: Tensor, clear: Callable[[], None]) -> str:
    """Run the backward pass; clear() drops all gradients. Returns the operation whose gradient is NaN, which is looked
    for under `detecting` alone, and "" otherwise."""
    if not torch.is_anomaly_enabled():
        loss.backward()
        return ""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            loss.backward(retain_graph=True)
            return ""
        except RuntimeError as error:
            if (operation := _OPERATION.search(str(error))) is None:
                raise
    lines = [line for warning in said for line in _LINE.findall(str(warning.message))]
    at = "" if not lines else " of {}, line {}, {}".format(*lines[-1])
    clear()
    with torch.autograd.set_detect_anomaly(False):
        loss.backward()  # the whole gradient, as without anomaly detection
    return f"{operation[1]}{at}"
