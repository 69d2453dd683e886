"""Start a real `transformers serve` beside a CPU torch: `python serve_tiny.py FOLDER PORT`.

Two things stand in its way there, and neither is the server's: torchvision needs our mend to be imported at all, and
its image decoder is among the operators that are missing, so that Pillow decodes in its place.
"""

import sys
from io import BytesIO


def decode_image(encoded, mode=None, apply_exif_orientation=False):
    """torchvision.io.decode_image by Pillow: bytes (N,) uint8 → RGB (3, H, W) uint8."""
    import numpy
    import PIL.Image
    import torch

    with PIL.Image.open(BytesIO(encoded.numpy().tobytes())) as picture:
        return torch.from_numpy(numpy.array(picture.convert("RGB"))).permute(2, 0, 1)


def main(folder: str, port: str) -> None:
    """Serve the model of a folder on the loopback until killed."""
    from lever_lm.utils.transformers_compat import import_transformers

    import_transformers()
    import torchvision.io
    from transformers.cli.serve import Serve

    torchvision.io.decode_image = decode_image
    Serve(force_model=folder, host="127.0.0.1", port=int(port), device="cpu", dtype="float32")


if __name__ == "__main__":
    main(*sys.argv[1:])
