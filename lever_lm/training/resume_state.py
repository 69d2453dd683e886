"""What state.pt must hold to be gone on from, checked before any of it is used. Answers say what is wrong, or None.

The file lies in the run's folder, and a run's folder may be anybody's.
"""

import math

import torch
from torch import Tensor

from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.utils.terminal import shown

FIELDS = ("phase", "epoch", "policy", "optimizer", "rng", "extra", "rows", "inputs")
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of AdamW
_PHASES = ("rce", "grpo")
# of what an online round keeps: dimensions and kind
_ONLINE = {"sequences": (3, torch.int64), "rewards": (2, torch.float32), "mask": (2, torch.bool)}


def problem_of(state: dict) -> str | None:
    """What keeps a file's content from being the state of any run."""
    if missing := [name for name in FIELDS if name not in state]:
        return f"no {missing[0]}"
    rows = state["rows"]
    if not isinstance(rows, list) or not rows:
        return "no rows"
    for number, row in enumerate(rows, 1):
        if why := _problem_of_row(row):
            return f"row {number}: {why}"
    if (state["phase"], state["epoch"]) != (rows[-1]["phase"], rows[-1]["epoch"]):
        return "its last row is of another epoch"
    rng = state["rng"]
    if not isinstance(rng, dict) or "cpu" not in rng or not all(_is_bytes(value) for value in rng.values()):
        return "rng is no random state"
    if len(rng["cpu"]) != len(torch.get_rng_state()):
        return "rng is no random state"
    if not _is_state(state["policy"]):
        return "policy holds no weights"
    return _problem_of_extra(state["extra"])


def _problem_of_row(row) -> str | None:
    if not isinstance(row, dict) or row.get("phase") not in _PHASES or type(row.get("epoch")) is not int:
        return "no phase or no epoch"
    for name, value in row.items():
        plain = type(value) in (int, str, bool, type(None)) or (type(value) is float and math.isfinite(value))
        texts = isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair)
        if not isinstance(name, str) or not (texts if name == "warnings" else plain):
            return f"{shown(name)} is {shown(value)}"
    return None


def _problem_of_extra(extra) -> str | None:
    if not isinstance(extra, dict):
        return "extra is no dict"
    beta, online = extra.get("beta", 0.0), extra.get("online")
    if not isinstance(beta, (int, float)) or not math.isfinite(beta):
        return f"beta is {shown(beta)}"
    if online is None:
        return None
    sound = isinstance(online, dict) and online.keys() == _ONLINE.keys()
    for name, (dimensions, dtype) in _ONLINE.items() if sound else ():
        sound = sound and isinstance(online[name], Tensor)
        sound = sound and online[name].ndim == dimensions and online[name].dtype == dtype
    sound = sound and len({tuple(tensor.shape[:2]) for tensor in online.values()}) == 1
    return None if sound and bool(online["rewards"].isfinite().all()) else "online holds no rollouts"


def misfit(state: dict, policy: PointerSelector, optimizer: torch.optim.Optimizer | None = None) -> str | None:
    """What keeps a sound state from being that of this policy and, where it is given, this optimizer."""
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in policy.state_dict().items()}
    for name in ("policy", "old", "reference"):
        weights = state["policy"] if name == "policy" else state["extra"].get(name)
        if weights is None:
            continue
        if not _is_state(weights) or {k: (v.shape, v.dtype) for k, v in weights.items()} != shapes:
            return f"{name} holds the weights of another policy"
        if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
            return f"{name} holds NaN or infinite weights"
    return None if optimizer is None else _misfit_of_optimizer(state["optimizer"], optimizer)


def _misfit_of_optimizer(there, optimizer: torch.optim.Optimizer) -> str | None:
    here = optimizer.state_dict()
    if not isinstance(there, dict) or there.keys() != here.keys() or not isinstance(there["state"], dict):
        return "optimizer holds no optimizer's state"
    if [_kinds(group) for group in _list(there["param_groups"])] != [_kinds(group) for group in here["param_groups"]]:
        return "optimizer has other options"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, moments in there["state"].items():
        known = type(place) is int and 0 <= place < len(parameters)
        if not known or not isinstance(moments, dict) or moments.keys() != _MOMENTS:
            return "optimizer holds another policy's state"
        for name, value in moments.items():
            fits = isinstance(value, Tensor) and value.shape in ((), parameters[place].shape)
            if not fits or not value.is_floating_point() or not bool(value.isfinite().all()):
                return f"optimizer: {name} is of another policy, or not finite"
    return None


def _kinds(group) -> dict:
    """The kind of each option; which parameters it is for."""
    if not isinstance(group, dict):
        return {}
    kinds = {name: type(value) for name, value in group.items()}
    numbers = [value for value in group.values() if type(value) in (int, float)]
    params = [value if type(value) is int else None for value in _list(group.get("params"))]
    return kinds | {"params": params, "": all(math.isfinite(number) for number in numbers)}


def _list(value) -> list:
    return value if isinstance(value, list) else []


def _is_state(value) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _is_bytes(value) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 1
