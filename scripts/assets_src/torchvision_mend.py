"""Makes `import torchvision` work beside a CPU-only torch."""

import sys

import torch

_declared: list[torch.library.Library] = []  # a Library takes its operators along when it is collected


def mend_torchvision() -> None:
    """Imports torchvision, mending it only if the plain import fails.

    The PyPI wheel of torchvision is built for CUDA. Beside a CPU-only torch its binary part does not load, and the
    import then dies at `operator torchvision::nms does not exist`. Declaring the schemas of the two operators whose
    fake implementations it registers lets the import pass; nothing that we use calls them.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        import torchvision  # noqa: F401
