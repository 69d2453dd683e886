"""Getting at transformers on every machine: late, offline-safe, and beside a torch without CUDA."""

import importlib
import re
import sys

from lever_lm.utils.distributed import Shards
from lever_lm.utils.errors import LeverError, UsageError

_declared = []  # keeps the operator library alive


def import_transformers():
    """The transformers module, with torchvision importable first.

    The registry's torchvision wheel is built for a CUDA torch; beside a CPU one its operators do not load and the
    import fails on their missing schemas. Declaring these is enough for the pure-Python part used here. Active only
    where the plain import fails.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _declare_operators()
    import transformers

    transformers.utils.logging.disable_progress_bar()  # progress is shown by console.py alone
    return transformers


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    for name in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    importlib.import_module("torchvision")


def load_whole(cls, path: str, dtype, **options):
    """`cls.from_pretrained(path)`, refused with ValueError where weights are missing: the library would go on with
    random ones in their place, and with a model of another kind that is all of them."""
    model, report = cls.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} weights of a {cls.__name__} are missing there, among them {missing[0]}")
    return model.eval()


def check_device_name(name: str) -> None:
    """Raise UsageError unless `name` is a device that can be asked for, there or not."""
    if name != "auto" and not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UsageError(f"unknown device {name!r}: expected auto, cpu, cuda or cuda:N (--device)")


def resolve_device(name: str):
    """`auto`, `cpu`, `cuda`, `cuda:1` → torch.device. Raises LeverError for a GPU that is not there.

    Under torchrun `auto` is the GPU of this process's number on its host, in turn where there are more processes, and
    becomes torch's current one: what names no GPU would else end on the first.
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
        torch.cuda.set_device(device)
        return device
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LeverError(f"no GPU is visible to torch, but the device is {name!r}: --device cpu, or auto")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise LeverError(f"the device is {name!r}, but torch sees {count} GPUs, counted from 0 (--device)")
    return device


def first_line(error: Exception) -> str:
    """The first line of a library's error, or its type where it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
