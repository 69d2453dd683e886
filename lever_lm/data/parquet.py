"""Parquet copies of a VQA dataset, from the hub or a folder: columns question_id, image, question, answers.

The images are inside, or named by path or address (image_download.py). `datasets` keeps the tables memory-mapped on
disk, so neither loading nor reading text columns holds or decodes one.
"""

import contextlib
import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path

from lever_lm.config.schema import DataConfig
from lever_lm.data.example import Example, StoredImage
from lever_lm.data.image_download import find_images
from lever_lm.data.rows import BadExamples, Pose, Unusable, as_it_is, example_of
from lever_lm.data.split_files import files_of, parquet_files, splits_named
from lever_lm.utils.errors import LeverError
from lever_lm.utils.fingerprint import fingerprint
from lever_lm.utils.hub import cached_snapshot
from lever_lm.utils.paths import HUB_PREFIX, asset_path
from lever_lm.utils.terminal import one_line
from lever_lm.utils.transformers_compat import first_line

COLUMNS = ("question_id", "image", "question", "answers")
_OPTIONAL = ("image_id", "raw_answers")
Files = list[tuple[str, int]]  # of a table, with the number of rows of each


def load_parquet(
    source: str, config: DataConfig, split: str, bad: BadExamples, pose: Pose = as_it_is
) -> tuple[list[Example], str]:
    """Load one split (`train` or `val`) from a folder of parquet files or from `hub:REPO`, and its fingerprint.

    The hub's copy is taken from the local cache where there is one. Raises LeverError with source, row and what was
    expected; examples that cannot be used go to `bad`.
    """
    import datasets

    datasets.disable_progress_bars()  # progress is shown by utils/console.py alone
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our error says what is wrong with a file
    of_hub = source.startswith(HUB_PREFIX)
    table, files = _from_hub(source, split) if of_hub else _from_folder(asset_path(source), split)
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise LeverError(
            f"{source}: the {split} table has no column {', '.join(missing)}; expected {', '.join(COLUMNS)}, found "
            f"{', '.join(table.column_names)}"
        )
    with _readable(f"the {split} table of {source}"):
        images = table.select_columns("image").cast_column("image", datasets.Image(decode=False))
        # Kept on disk by `datasets` under the fingerprint of the table: computed once.
        found = images.map(_digests, batched=True, batch_size=64, remove_columns="image").to_list()
        texts = table.select_columns([name for name in (*COLUMNS, *_OPTIONAL) if name in table.column_names])
        rows = texts.remove_columns("image").to_list()
    paths, problems = find_images(
        [image["place"] for image in found if image["place"]],
        *_folders(source, config),
        Path(datasets.config.HF_DATASETS_CACHE) / "lever_lm_images",
        allow_remote=config.allow_remote,
        stop_early=not bad.skip,
    )
    examples: dict[int, Example] = {}
    for number, (row, image) in enumerate(zip(rows, found, strict=True)):
        digest, place = image["digest"], image["place"]
        try:
            if not digest and place not in paths:
                raise Unusable(problems.get(place, "its image holds neither bytes nor a path"))
            example = pose(example_of(row, StoredImage(digest, number, images) if digest else paths[place]))
            if example.question_id in examples:
                raise Unusable("an earlier row has this question_id")
            examples[example.question_id] = example
        except Unusable as error:
            question = one_line(str(row["question_id"])[:40])
            bad.add(f"{source}, {split}, {_place(number, files)}, question {question}: {error}")
    return list(examples.values()), fingerprint(rows, found)


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    """Raise LeverError for what `datasets` and Arrow raise: on an untrusted file, or where their cache cannot be
    written."""
    import datasets

    try:
        yield
    except Exception as error:
        cache = datasets.config.HF_DATASETS_CACHE
        raise LeverError(
            f"cannot read {what}, or keep it in {cache} (HF_DATASETS_CACHE): {first_line(error.__cause__ or error)}"
        ) from error


def _digests(batch: dict) -> dict:
    """Return for each image in a batch the digest of its bytes, or else the place that it is said to be at."""
    images = [image or {"bytes": None, "path": None} for image in batch["image"]]
    return {
        "digest": [_sha256(image["bytes"]) if image["bytes"] else "" for image in images],
        "place": ["" if image["bytes"] else image["path"] or "" for image in images],
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]  # as utils.file_hashes has that of a file


def _folders(source: str, config: DataConfig) -> tuple[list[Path], list[Path]]:
    """Return the folders in which images named by path are looked for (of the data, and of the official images), and
    the folders in which they may lie once links are followed: the hub's cache keeps its files elsewhere."""
    of_hub = source.startswith(HUB_PREFIX)
    own = cached_snapshot(source.removeprefix(HUB_PREFIX), "dataset") if of_hub else asset_path(source)
    roots = [root for root in (own, asset_path(config.coco_path)) if root is not None and root.is_dir()]
    blobs = [own.parent.parent / "blobs"] if of_hub and own is not None else []
    return roots, [root.resolve() for root in (*roots, *blobs)]


def _from_folder(root: Path, split: str) -> tuple["datasets.Dataset", Files]:  # noqa: F821
    import datasets
    from pyarrow.parquet import read_metadata

    files = files_of(root, split)
    if not files:
        names = ", ".join(file.name for file in parquet_files(root)[:3])
        raise LeverError(
            f"{root}: no parquet file of the {split} split among {names}; put {split} into their names, or name "
            f"{'its folder: --set data.train_path=DIR' if split == 'train' else 'another folder: OKVQA_PATH'}"
        )
    with _readable(f"{', '.join(file.name for file in files)} in {root} as parquet"):
        names = [glob.escape(str(file)) for file in files]  # `datasets` takes patterns
        table = datasets.load_dataset("parquet", data_files={split: names}, split=split)
        return table, [(str(file.relative_to(root)), read_metadata(file).num_rows) for file in files]


def _from_hub(source: str, split: str) -> tuple["datasets.Dataset", Files]:  # noqa: F821
    """Return the same as `_from_folder`; no files where the table comes from the cache of `datasets`."""
    import datasets

    repository = source.removeprefix(HUB_PREFIX)
    if (snapshot := cached_snapshot(repository, "dataset")) and files_of(snapshot, split):
        return _from_folder(snapshot, split)
    mend = f"hf download --repo-type dataset {repository}, or take a folder of its parquet files: OKVQA_PATH"
    with _readable(f"{source}, not in the local cache, from the hub ({mend})"):
        splits = datasets.load_dataset(repository)
    named = splits_named(list(splits), source)[split]
    if not named:
        raise LeverError(f"{source} has no {split} split, only {', '.join(splits)}: data.train_path, data.okvqa_path")
    return splits[named[0]], []


def _place(number: int, files: Files) -> str:
    """Return the file of a row of the table, and its number there."""
    for name, rows in files:
        if number < rows:
            return f"{one_line(name)}, row {number}"
        number -= rows
    return f"row {number}"
