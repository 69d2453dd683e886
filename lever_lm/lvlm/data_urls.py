"""Images as `data:` URLs, for requests to a server."""

import base64
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from io import BytesIO

from lever_lm.config.schema import LvlmConfig
from lever_lm.data import Image, open_image
from lever_lm.lvlm.image_size import fitted

_MEMORY = 1 << 30  # bytes of encoded images to keep


class DataUrls:
    """Images as `data:` URLs of PNG files, upright and within the image budget, resized as for the local model. Each is
    encoded once while it is among the last that were asked for, whichever thread asks."""

    def __init__(self, config: LvlmConfig):
        self.config = config
        room = max(1, _MEMORY // (4 * config.max_pixels))  # 3 bytes a pixel, 4 characters for 3 bytes
        pool = ThreadPoolExecutor(thread_name_prefix="data-urls")
        self._encoded = lru_cache(room)(lambda image: pool.submit(self._encode, image))
        self._lock = threading.Lock()

    def get(self, image: Image) -> str:
        """Return the URL of an image. Raises LeverError naming one that cannot be read."""
        with self._lock:
            encoded = self._encoded(image)
        return encoded.result()

    def _encode(self, image: Image) -> str:
        content = BytesIO()
        # Without loss; the least effort is a third of the time for a tenth more bytes.
        fitted(open_image(image), self.config).save(content, "PNG", compress_level=1)
        return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
