"""Data: examples read from the official VQA files, from parquet copies, and from tables of the user's own."""

import os
from dataclasses import replace

from lever_lm.config.schema import DataConfig
from lever_lm.data.example import (
    Example,
    Image,
    StoredImage,
    VqaData,
    forget_digests,
    image_digest,
    image_digests,
    image_size,
    open_image,
    undecodable,
)
from lever_lm.data.okvqa import SPLITS, load_official, questions_file
from lever_lm.data.parquet import load_parquet
from lever_lm.data.rows import BadExamples, Pose, as_it_is
from lever_lm.data.split_files import parquet_files
from lever_lm.data.table import is_table, load_tables
from lever_lm.utils.errors import LeverError
from lever_lm.utils.fingerprint import fingerprint
from lever_lm.utils.paths import HUB_PREFIX, asset_path

__all__ = [
    "Example",
    "Image",
    "StoredImage",
    "VqaData",
    "forget_digests",
    "image_digest",
    "image_size",
    "in_both",
    "in_parquet",
    "is_table",
    "load_dataset",
    "load_split",
    "open_image",
    "source_of",
]


def source_of(config: DataConfig, split: str) -> str:
    """Return where the config says that a split (`train`, `val`) is."""
    if is_table(config):
        return (split == "val" and config.val_file) or config.file
    return (split == "train" and config.train_path) or config.okvqa_path


def in_parquet(config: DataConfig, split: str) -> bool:
    """Return whether a split comes from parquet files: a hub id, or a folder that holds such and no official files. One
    that comes from a table does not."""
    if is_table(config):
        return False
    source = source_of(config, split)
    if source.startswith(HUB_PREFIX):
        return True
    root = asset_path(source)
    return not os.path.isfile(questions_file(root, split, config.file_prefix)) and bool(parquet_files(root))


def load_split(config: DataConfig, split: str, bad: BadExamples, pose: Pose = as_it_is) -> tuple[list[Example], str]:
    """Load the examples of a split (`train`, `val`), and its fingerprint; images are not opened. Examples that cannot
    be used go to `bad`. Raises LeverError with file, id and what was expected."""
    if is_table(config):
        of_others = {name: BadExamples(skip=True) for name in SPLITS if name != split}
        return load_tables(config, {split: bad, **of_others}, pose)[split]
    load = load_parquet if in_parquet(config, split) else load_official
    return load(source_of(config, split), config, split, bad, pose)


def load_dataset(config: DataConfig, pose: Pose = as_it_is) -> VqaData:
    """Load both splits of a dataset. The embedded digits are shipped in OK-VQA's own layout and come the same way.

    pose: makes of an example, as its row has it, the one that is asked and shown, or raises rows.Unusable.
    Raises LeverError with file, id and what was expected; with skip_bad_examples such examples are left out and
    listed in `skipped`.
    """
    forget_digests()
    bad = BadExamples(config.skip_bad_examples)
    splits, stamps, digests = {}, {}, {}
    tables = load_tables(config, dict.fromkeys(SPLITS, bad), pose) if is_table(config) else {}
    for split in SPLITS:
        splits[split], stamps[split] = tables.get(split) or load_split(config, split, bad, pose)
        if bad.skip:
            splits[split] = _decodable(splits[split], bad)
        digests[split] = _digests(splits[split])
    repeated = in_both(config, splits["train"], splits["val"])
    for problem in repeated.values():
        bad.add(problem)
    splits["train"], digests["train"] = (
        [item for row, item in enumerate(items) if row not in repeated] for items in (splits["train"], digests["train"])
    )
    for split, examples in splits.items():
        if not examples:
            raise LeverError(f"{source_of(config, split)}: the {split} split holds no usable example: `lever doctor`")
        stamps[split] = fingerprint(stamps[split], [e.question_id for e in examples], digests[split])
    train, val = (tuple(splits[split]) for split in SPLITS)
    data = VqaData(config.name, train, val, "", tuple(bad.problems), tuple(stamps.values()), config.task, config)
    return replace(data, fingerprint=fingerprint(*stamps.values(), *data.scoring))


def in_both(config: DataConfig, train: list[Example], val: list[Example]) -> dict[int, str]:
    """Return the rows of training examples that ask what the evaluation split asks about an image of equal content,
    each with a message. Reads the images of questions that both splits ask; LeverError for one that cannot be read."""
    shared = {example.question for example in train} & {example.question for example in val}
    asked = {(example.question, example.content): example for example in val if example.question in shared}
    pairs = ((row, asked.get((e.question, e.content))) for row, e in enumerate(train) if e.question in shared)
    found = {row: example for row, example in pairs if example is not None}
    return {
        row: (
            f"{source_of(config, 'train')}: {len(found)} of {len(train)} training questions are in the evaluation "
            f"split, too ({source_of(config, 'val')}): question {train[row].question_id} is question "
            f"{example.question_id} there, {'about the same image' if example.image else 'both without an image'}"
        )
        for row, example in found.items()
    }


def _digests(examples: list[Example]) -> list[str]:
    """Return what identifies the content of each example's image. Raises LeverError with the question of an image that
    cannot be read."""
    images = list(dict.fromkeys(example.image for example in examples if example.image is not None))
    try:
        found = dict(zip(images, image_digests(images), strict=True))
        return [found.get(example.image, "") for example in examples]
    except LeverError as error:
        question = next(e for e in examples if e.image == error.__cause__.filename).question_id
        raise LeverError(f"question {question}: {error}") from error


def _decodable(examples: list[Example], bad: BadExamples) -> list[Example]:
    broken = undecodable(example.image for example in examples if example.image is not None)
    for example in examples:
        if example.image in broken:
            bad.add(f"question {example.question_id}: {broken[example.image]}")
    return [example for example in examples if example.image not in broken]
