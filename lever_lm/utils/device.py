"""The device that a command computes on."""

import re

from lever_lm.utils.distributed import Shards
from lever_lm.utils.errors import LeverError, UsageError


def check_device_name(name: str) -> None:
    """Raise UsageError unless `name` is the name of a device, there or not."""
    if name != "auto" and not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UsageError(f"unknown device {name!r}: expected auto, cpu, cuda or cuda:N (--device)")


def resolve_device(name: str):
    """Return the torch.device of `auto`, `cpu`, `cuda`, `cuda:1`. Raises LeverError for a GPU that is not there.

    Under torchrun `auto` is the GPU of this process's number on its host, in turn where there are more processes, and
    becomes torch's current one: tensors for `cuda` without a number would else end on the first.
    """
    import torch

    check_device_name(name)
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        job = Shards.from_environment()
        if job.world == 1:
            return torch.device("cuda")
        device = torch.device("cuda", job.local % torch.cuda.device_count())
        use_device(device)
        return device
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LeverError(f"no GPU is visible to torch, but the device is {name!r}: --device cpu, or auto")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise LeverError(f"the device is {name!r}, but torch sees {count} GPUs, counted from 0 (--device)")
    return device


def use_device(device) -> None:
    """Make a GPU that has a number torch's current one, in this thread alone."""
    import torch

    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
