"""An untrusted image file becomes pixels: known formats only, of a bounded size, with one kind of error."""

import logging
import re
import warnings
from collections.abc import Callable
from typing import BinaryIO

# The formats of photographs (MPO, several in one JPEG, counts as JPEG) that decode without another program and without
# a library that writes to the terminal: PIL would hand an EPS to Ghostscript, and a TIFF to libtiff.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_RATIO = 200  # of an image's sides: what Qwen2.5-VL can be shown
MAX_PIXELS = (1 << 30) // 12  # PIL's own limit: 256 MiB at 3 bytes each
_WORDS = 200  # characters of a decoder's own message
# What a decoder reports about a file reaches the user as our error or not at all.
_UNSAID = tuple(("ignore", None, kind, re.compile(r"PIL\."), 0) for kind in (UserWarning, RuntimeWarning))


class Undecodable(Exception):
    """An image is refused; says why."""


def decoded(file: BinaryIO):
    """Return the first frame of an image file as upright RGB `PIL.Image`, transparency on white. Raises Undecodable."""
    return _read(file, _upright)


def size_of(file: BinaryIO) -> tuple[int, int]:
    """Return the width and height of `decoded`, from the file's header. Raises Undecodable."""
    return _read(file, _upright_size)


def _read(file: BinaryIO, read: Callable):
    """Return read(the opened `PIL.Image`). Raises Undecodable."""
    import PIL.Image

    _hush()
    try:
        with PIL.Image.open(file, formats=FORMATS) as opened:
            _check_size(opened.width, opened.height)
            return read(opened)
    except Undecodable:
        raise
    except PIL.UnidentifiedImageError as error:
        raise Undecodable(f"it is none of {', '.join(FORMATS)}") from error
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise Undecodable(f"it has more than {MAX_PIXELS} pixels") from error
    except MemoryError as error:
        raise Undecodable("there is not enough memory for it") from error
    except Exception as error:  # six decoders, on untrusted bytes: struct.error, IndexError, zlib.error, …
        said = " ".join(str(error).split()).rstrip(".")[:_WORDS]
        raise Undecodable(said or type(error).__name__) from error


def _hush() -> None:
    """Keep PIL's warnings from the screen: for good, as `warnings.catch_warnings` is of no use among threads."""
    for entry in _UNSAID:
        if entry not in warnings.filters:
            warnings.filterwarnings("ignore", category=entry[2], module=entry[3].pattern)
    log = logging.getLogger("PIL")
    if not log.handlers:
        log.addHandler(logging.NullHandler())


def _check_size(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise Undecodable(f"it has {width} by {height} pixels")
    if width * height > MAX_PIXELS:
        raise Undecodable(f"it has {width} by {height} pixels, more than {MAX_PIXELS}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise Undecodable(f"its sides, {width} and {height}, are in a ratio over {MAX_RATIO}")


def _upright(opened):
    import PIL.Image
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(opened)
    _check_size(*upright.size)  # a GIF's frame may be larger than its screen
    if upright.mode in ("I;16", "I;16L", "I;16B", "I;16N"):  # PIL would cut off all above 255
        return _to_eight_bits(upright)
    if upright.mode in ("I", "F"):
        raise Undecodable("its pixels are 32-bit numbers, of no known scale")
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        upright = PIL.Image.alpha_composite(PIL.Image.new("RGBA", upright.size, "white"), upright)
    return upright.convert("RGB")


def _upright_size(opened) -> tuple[int, int]:
    from PIL.ExifTags import Base

    lies = opened.getexif().get(Base.Orientation, 1) in (5, 6, 7, 8)
    return opened.size[::-1] if lies else opened.size


def _to_eight_bits(grey):
    import numpy as np
    import PIL.Image

    pixels = np.asarray(grey)
    clear = pixels == grey.info.get("transparency", -1)
    return PIL.Image.fromarray(np.where(clear, 255, pixels >> 8).astype(np.uint8)).convert("RGB")
