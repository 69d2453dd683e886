"""How large an image is shown and how many tokens it takes: resized as by qwen_vl_utils, within a budget of pixels."""

from lever_lm.config.schema import LvlmConfig
from lever_lm.utils.errors import UsageError

TOKEN_EDGE = 28  # pixels of an image, along each side, that are one token of a Qwen2.5-VL


def check_pixel_budget(config: LvlmConfig) -> None:
    """Raise UsageError where `lvlm.max_pixels` is less than one token."""
    if config.max_pixels < TOKEN_EDGE**2:
        raise UsageError(f"lvlm.max_pixels must be {TOKEN_EDGE**2} or more, one token, found {config.max_pixels}")


def tokens_of_pixels(pixels: float, config: LvlmConfig) -> float:
    """Return about how many tokens an image of so many pixels takes once it is within the budget."""
    return min(max(pixels, config.min_pixels), config.max_pixels) / TOKEN_EDGE**2


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
