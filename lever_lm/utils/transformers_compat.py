"""transformers: imported late, beside any torchvision, and never with a part of a model's weights."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

left_out: set[str] = set()  # packages that transformers need not see: for a command, as other programs may need them
_declared = []  # keeps the operator library alive


def import_transformers():
    """Return the transformers module, with torchvision importable first.

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
    with _unseen(set() if "transformers" in sys.modules else left_out - set(sys.modules)):
        import transformers

    transformers.utils.logging.disable_progress_bar()  # progress is shown by console.py alone
    return transformers


@contextmanager
def _unseen(names: set[str]) -> Iterator[None]:
    """Hide packages from the import of transformers, which is slower for each that it finds. It asks once."""
    sys.modules |= dict.fromkeys(names)
    try:
        yield
        for name in names:
            getattr(sys.modules["transformers"].utils, f"is_{name}_available")()
    finally:
        for name in names:
            del sys.modules[name]


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what the library warns of: of every SigLIP, that no token of its vocabulary ends a text."""
    logging = import_transformers().utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


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
    """Return `cls.from_pretrained(path)`. Raises ValueError where weights are missing: the library would go on with
    random ones in their place, and with a model of another kind that is all of them."""
    model, report = cls.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} weights of a {cls.__name__} are missing there, among them {missing[0]}")
    return model.eval()


def first_line(error: Exception) -> str:
    """Return the first line of a library's error, or its type where it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
