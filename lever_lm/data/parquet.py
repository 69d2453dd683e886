"""Parquet copies of a VQA dataset, from the hub or a folder: columns question_id, image, question, answers.

The images are inside, or named by path or address (image_download.py).
"""

from pathlib import Path

from lever_lm.config.schema import DataConfig
from lever_lm.data.example import Example, StoredImage
from lever_lm.data.image_download import find_images
from lever_lm.data.parquet_files import from_folder, from_hub, image_folders, images_of, place, quiet, readable
from lever_lm.data.rows import BadExamples, Pose, Unusable, as_it_is, example_of
from lever_lm.utils.errors import LeverError
from lever_lm.utils.fingerprint import fingerprint
from lever_lm.utils.hub import cached_dataset
from lever_lm.utils.paths import HUB_PREFIX, asset_path
from lever_lm.utils.terminal import one_line

COLUMNS = ("question_id", "image", "question", "answers")
_OPTIONAL = ("image_id", "raw_answers")


def load_parquet(
    source: str, config: DataConfig, split: str, bad: BadExamples, pose: Pose = as_it_is
) -> tuple[list[Example], str]:
    """Load one split (`train` or `val`) from a folder of parquet files or from `hub:REPO`, and its fingerprint.

    The hub's copy is taken from the local cache where there is one. Raises LeverError with source, row and what was
    expected; examples that cannot be used go to `bad`.
    """
    import datasets

    quiet()
    of_hub = source.startswith(HUB_PREFIX)
    table, files = from_hub(source, split) if of_hub else from_folder(asset_path(source), split)
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise LeverError(
            f"{source}: the {split} table has no column {', '.join(missing)}; expected {', '.join(COLUMNS)}, found "
            f"{', '.join(table.column_names)}"
        )
    with readable(f"the {split} table of {source}"):
        images, found = images_of(table, "image")
        texts = table.select_columns([name for name in (*COLUMNS, *_OPTIONAL) if name in table.column_names])
        rows = texts.remove_columns("image").to_list()
    own = cached_dataset(source.removeprefix(HUB_PREFIX)) if of_hub else asset_path(source)
    paths, problems = find_images(
        [image["place"] for image in found if image["place"]],
        *image_folders(own, config.coco_path, of_hub=of_hub),
        Path(datasets.config.HF_DATASETS_CACHE) / "lever_lm_images",
        allow_remote=config.allow_remote,
        stop_early=not bad.skip,
    )
    examples: dict[int, Example] = {}
    for number, (row, image) in enumerate(zip(rows, found, strict=True)):
        digest, where = image["digest"], image["place"]
        try:
            if not digest and where not in paths:
                raise Unusable(problems.get(where, "its image holds neither bytes nor a path"))
            example = pose(example_of(row, StoredImage(digest, number, images) if digest else paths[where]))
            if example.question_id in examples:
                raise Unusable("an earlier row has this question_id")
            examples[example.question_id] = example
        except Unusable as error:
            question = one_line(str(row["question_id"])[:40])
            bad.add(f"{source}, {split}, {place(number, files)}, question {question}: {error}")
    return list(examples.values()), fingerprint(rows, found)
