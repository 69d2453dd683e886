"""Data: examples, the official VQA files, parquet copies, and rollout files."""

import os

from lever_lm.config import HUB_PREFIX, DataConfig, asset_path, fingerprint
from lever_lm.data.examples import (
    Example,
    Image,
    StoredImage,
    VqaData,
    image_digest,
    image_digests,
    open_image,
    undecodable,
)
from lever_lm.data.groups import Group
from lever_lm.data.okvqa import SPLITS, questions_file
from lever_lm.data.okvqa import load_split as load_official
from lever_lm.data.parquet import load_split as load_parquet
from lever_lm.data.parquet import parquet_files
from lever_lm.errors import LeverError

__all__ = [
    "Example",
    "Group",
    "Image",
    "StoredImage",
    "VqaData",
    "image_digest",
    "in_parquet",
    "load_dataset",
    "open_image",
    "source_of",
]


def source_of(config: DataConfig, split: str) -> str:
    """Where a split (`train`, `val`) is looked for, as the config says it."""
    return (split == "train" and config.train_path) or config.okvqa_path


def in_parquet(config: DataConfig, split: str) -> bool:
    """Whether a split comes from parquet files: a hub id, or a folder that holds such and no official files."""
    source = source_of(config, split)
    if source.startswith(HUB_PREFIX):
        return True
    root = asset_path(source)
    return not os.path.isfile(questions_file(root, split, config.file_prefix)) and bool(parquet_files(root))


def load_dataset(config: DataConfig) -> VqaData:
    """Both splits of a dataset. The embedded digits are shipped in OK-VQA's own layout and come the same way.

    Raises LeverError with file, id and what was expected; with skip_bad_examples such examples are left out and
    listed in `skipped`.
    """
    image_digest.cache_clear()  # what was read before may have changed
    skipped: list[str] = []
    splits, stamps = {}, []
    for split in SPLITS:
        load = load_parquet if in_parquet(config, split) else load_official
        examples, stamp = load(source_of(config, split), config, split, skipped)
        if config.skip_bad_examples:
            examples = _decodable(examples, skipped)
        if not examples:
            raise LeverError(f"{source_of(config, split)}: the {split} split holds no usable example: `lever doctor`")
        ids = [example.question_id for example in examples]
        stamps.append(fingerprint(stamp, ids, _digests(examples)))
        splits[split] = tuple(examples)
    return VqaData(config.name, splits["train"], splits["val"], fingerprint(*stamps), tuple(skipped), tuple(stamps))


def _digests(examples: list[Example]) -> list[str]:
    """What identifies the content of each example's image. Raises LeverError naming the question of one that cannot be
    read."""
    try:
        return image_digests([example.image for example in examples])
    except LeverError:
        for example in examples:
            try:
                image_digest(example.image)
            except LeverError as error:
                raise LeverError(f"question {example.question_id}: {error}") from error
        raise


def _decodable(examples: list[Example], skipped: list[str]) -> list[Example]:
    bad = undecodable(example.image for example in examples)
    skipped += [f"question {e.question_id}: {bad[e.image]}" for e in examples if e.image in bad]
    return [example for example in examples if example.image not in bad]
