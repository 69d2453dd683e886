"""Images in tokens."""

import pytest
from PIL import Image

from lever_lm.config.schema import LvlmConfig
from lever_lm.lvlm.images import fitted_size
from lever_lm.utils.transformers_compat import import_transformers


@pytest.mark.parametrize(("patch", "tokens"), [(14, 391), (16, 300)], ids=["Qwen2-VL, Qwen2.5-VL", "Qwen3-VL"])
def test_an_image_of_640_by_480_has_as_many_tokens_as_the_page_says(patch, tokens):
    import_transformers()  # with a torchvision, which qwen_vl_utils imports
    width, height = fitted_size(Image.new("RGB", (640, 480)), LvlmConfig(), 2 * patch)
    assert width * height / (2 * patch) ** 2 == tokens
