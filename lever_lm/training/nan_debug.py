"""`--detect-anomaly`: which module of the policy, and which operation of a backward pass, first gave no finite number.

Nothing is computed otherwise than without it: modules and gradients are only looked at, which takes time.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lever_lm.utils.errors import LeverError

_OPERATION = re.compile(r"Function '(\w+)' returned nan")
_LINE = re.compile(r'File "[^"]*[/\\]lever_lm[/\\]([\w/\\]+\.py)", line (\d+), in (\w+)')


@contextmanager
def detecting(policy: nn.Module, say: Callable[[str], None]) -> Iterator[None]:
    """While it lasts, a LeverError also names the first module of the policy whose output was not finite."""
    say("--detect-anomaly: every module's output and every gradient is looked at, training is slower")
    found: list[str] = []

    def look_at(name: str):
        def hook(module, given, output) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                sound = all(bool(torch.isfinite(x).all()) for x in given if isinstance(x, Tensor))
                found.append(f"{name} ({type(module).__name__}), of {'finite' if sound else 'such'} input")

        return hook

    handles = [module.register_forward_hook(look_at(name)) for name, module in policy.named_modules() if name]
    before = torch.is_anomaly_enabled()
    torch.autograd.set_detect_anomaly(True)
    try:
        yield
    except LeverError as error:
        if not found:
            raise
        raise LeverError(f"{error}. The first module whose output is not finite: {found[0]}") from error
    finally:
        torch.autograd.set_detect_anomaly(before)
        for handle in handles:
            handle.remove()


def backward(loss: Tensor, clear: Callable[[], None]) -> str:
    """The backward pass; clear() drops all gradients. Returns the operation whose gradient is NaN, which is looked for
    under `detecting` alone, and else nothing."""
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
