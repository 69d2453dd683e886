"""Qwen3-VL, with experts or without: as Qwen2.5-VL, and its language model is given deeper features of the images too.

T tokens of all images, H hidden, D layers of the vision tower whose features are added to the first D layers of the
language model (DeepStack, arXiv:2406.04334). The feature cache holds (T, (1 + D)·H).
"""

from torch import Tensor

from lever_lm.lvlm.qwen2_5_vl import Qwen2_5_VL


class Qwen3VL(Qwen2_5_VL):
    """The `local.Family` of a directory or hub id of a Qwen3-VL."""

    def _shown(self, features: Tensor, is_image: Tensor) -> tuple[Tensor, dict]:
        first, *deeper = features.split(self.model.config.text_config.hidden_size, -1)
        return first, {"visual_pos_masks": is_image, "deepstack_visual_embeds": deeper}
