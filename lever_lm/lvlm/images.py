"""Images as they are shown: resized as by qwen_vl_utils within a budget of pixels, counted in tokens, sent as URLs."""

import base64
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from io import BytesIO

from lever_lm.config.schema import LvlmConfig
from lever_lm.data import Image, open_image
from lever_lm.utils.errors import UsageError

_URL_MEMORY = 1 << 30  # bytes of encoded images to keep
TOKEN_EDGE = 28  # pixels of an image, along each side, that are one token of a Qwen2.5-VL


def check_pixel_budget(config: LvlmConfig) -> None:
    """Raise UsageError where `lvlm.max_pixels` is less than one token."""
    if config.max_pixels < TOKEN_EDGE**2:
        raise UsageError(f"lvlm.max_pixels must be {TOKEN_EDGE**2} or more, one token, found {config.max_pixels}")


def image_tokens(picture, config: LvlmConfig) -> int:
    """Return the number of tokens of a `PIL.Image`."""
    width, height = fitted_size(picture, config)
    return width * height // TOKEN_EDGE**2


def fitted(picture, config: LvlmConfig, factor: int = TOKEN_EDGE):
    """Return an RGB `PIL.Image` resized to its `fitted_size`, as qwen_vl_utils does."""
    return picture.resize(fitted_size(picture, config, factor))


def fitted_size(picture, config: LvlmConfig, factor: int = TOKEN_EDGE) -> tuple[int, int]:
    """Return the width and height at which a `PIL.Image` is shown: those of qwen_vl_utils, multiples of `factor` (the
    edge of a token in pixels) within the budget. A picture so thin that the library's rounding leaves it no row of
    tokens gets one, and its long side what the budget holds."""
    from qwen_vl_utils.vision_process import smart_resize

    height, width = smart_resize(picture.height, picture.width, factor, config.min_pixels, config.max_pixels)
    if min(height, width) < factor:
        most = config.max_pixels // factor**2 * factor
        height, width = (factor, min(width, most)) if height < width else (min(height, most), factor)
    return width, height


class DataUrls:
    """Images as `data:` URLs of PNG files, upright and within the image budget, resized as for the local model. Each is
    encoded once while it is among the last that were asked for, whichever thread asks."""

    def __init__(self, config: LvlmConfig):
        self.config = config
        room = max(1, _URL_MEMORY // (4 * config.max_pixels))  # 3 bytes a pixel, 4 characters for 3 bytes
        pool = ThreadPoolExecutor(thread_name_prefix="data-urls")
        self._encoded = lru_cache(room)(lambda image: pool.submit(self._encode, image))
        self._lock = threading.Lock()

    def get(self, image: Image) -> str:
        """Return the URL of an image. Raises LeverError naming one that cannot be read."""
        with self._lock:
            encoded = self._encoded(image)
        return encoded.result()

    def part(self, image: Image) -> dict:
        """Return an image as a part of a message to a server."""
        return {"type": "image_url", "image_url": {"url": self.get(image)}}

    def _encode(self, image: Image) -> str:
        content = BytesIO()
        # Without loss; the least effort is a third of the time for a tenth more bytes.
        fitted(open_image(image), self.config).save(content, "PNG", compress_level=1)
        return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
