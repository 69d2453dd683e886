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
    """Within this context, a NotFinite also names the decoding step and the first module whose output was not finite,
    and `backward` the operation whose gradient was not."""
    say("--detect-anomaly: every module's output and every gradient is looked at, training is slower")
    outputs: list[str] = []
    passes: deque[tuple[Tensor, list[Tensor]]] = deque(maxlen=_PASSES)
    hooks = [module.register_forward_hook(_look_at(name, outputs)) for name, module in policy.named_modules() if name]
    score = PointerSelector.score

    def kept(self, steps, *args, **options):
        scored = score(self, steps, *args, **options)
        passes.append((scored[0], steps))
        return scored

    PointerSelector.score = kept
    try:
        with torch.autograd.set_detect_anomaly(True):
            yield
    except NotFinite as error:
        raise LeverError(". ".join([str(error), *_first_step(error, passes), *outputs[:1]])) from error
    finally:
        PointerSelector.score = score
        for hook in hooks:
            hook.remove()


def _look_at(name: str, outputs: list[str]) -> Callable[..., None]:
    """Return a forward hook that notes an output that is not finite. As a closure it reports to the same list from a
    copy of the policy."""

    def hook(module: nn.Module, given: tuple, output: Tensor) -> None:
        if not outputs and isinstance(output, Tensor) and _broken(output):
            finite = not any(_broken(x) for x in given if isinstance(x, Tensor))
            kind = f"{name} ({type(module).__name__}), of {'finite' if finite else 'such'} input"
            outputs.append(f"The first module whose output is not finite: {kind}")

    return hook


def _first_step(error: NotFinite, passes) -> Iterator[str]:
    """Tell the first decoding step of the failed pass whose logits are not finite, and for which rollouts."""
    steps = next((steps for log_probs, steps in passes if log_probs is error.log_probs), [])
    for number, logits in enumerate(steps, 1):
        bad = ~torch.isfinite(logits).all(-1) & error.groups.mask
        if bad.any():
            yield f"The logits of {rollouts(error.groups, bad)} are not finite, from decoding step {number} on"
            return


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
