"""Data: examples, the official VQA files, and rollout files."""

from lever_lm.config import DataConfig
from lever_lm.data.examples import Example, VqaData, open_image
from lever_lm.data.groups import Group
from lever_lm.data.okvqa import load_okvqa

__all__ = ["Example", "Group", "VqaData", "load_dataset", "open_image"]


def load_dataset(config: DataConfig) -> VqaData:
    """The dataset a config names. The embedded digits are shipped in OK-VQA's own layout and come the same way."""
    return load_okvqa(config)
