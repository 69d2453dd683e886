"""Parquet files and copies on the hub as tables of `datasets`, which keeps them memory-mapped on disk: neither loading
nor reading their texts holds or decodes an image."""

import contextlib
import glob
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from lever_lm.data.split_files import files_of, parquet_files, splits_named
from lever_lm.utils.errors import LeverError
from lever_lm.utils.hub import addresses, cached_dataset, download_command
from lever_lm.utils.paths import HUB_PREFIX, asset_path
from lever_lm.utils.terminal import one_line
from lever_lm.utils.transformers_compat import first_line

Files = list[tuple[str, int]]  # of a table, with the number of rows of each


def quiet() -> None:
    """Keep `datasets` from the screen: progress is shown by utils/console.py alone, and our error says what is wrong
    with a file."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
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


def images_of(table, column: str) -> tuple["datasets.Dataset", list[dict]]:  # noqa: F821
    """Return the images of a table as a table with the one column `image`, not decoded; and for each the `digest` of
    its bytes, or else the `place` that it is said to be at. Raises what `readable` turns into a LeverError."""
    import datasets

    images = table.select_columns(column)
    images = images if column == "image" else images.rename_column(column, "image")
    images = images.cast_column("image", datasets.Image(decode=False))
    # Kept on disk by `datasets` under the fingerprint of the table: computed once.
    return images, images.map(_digests, batched=True, batch_size=64, remove_columns="image").to_list()


def _digests(batch: dict) -> dict:
    images = [image or {"bytes": None, "path": None} for image in batch["image"]]
    return {
        "digest": [_sha256(image["bytes"]) if image["bytes"] else "" for image in images],
        "place": ["" if image["bytes"] else image["path"] or "" for image in images],
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]  # as utils.file_hashes has that of a file


def image_folders(own: Path | None, coco_path: str, *, of_hub: bool) -> tuple[list[Path], list[Path]]:
    """Return the folders in which images named by path are looked for (of the data, and of the official images), and
    the folders in which they may lie once links are followed: the hub's cache keeps its files elsewhere."""
    roots = [root for root in (own, asset_path(coco_path)) if root is not None and root.is_dir()]
    snapshots = (
        [folder for folder in (own, *own.parents) if folder.parent.name == "snapshots"] if of_hub and own else []
    )
    blobs = [folder.parent.parent / "blobs" for folder in snapshots]
    return roots, [root.resolve() for root in (*roots, *blobs)]


def read_parquet(files: Sequence[Path], root: Path, split: str) -> tuple["datasets.Dataset", Files]:  # noqa: F821
    """Return parquet files below a folder as one table. Raises LeverError for one that cannot be read."""
    import datasets
    from pyarrow.parquet import read_metadata

    with readable(f"{', '.join(file.name for file in files)} in {root} as parquet"):
        names = [glob.escape(str(file)) for file in files]  # `datasets` takes patterns
        table = datasets.load_dataset("parquet", data_files={split: names}, split=split)
        return table, [(str(file.relative_to(root)), read_metadata(file).num_rows) for file in files]


def from_folder(root: Path, split: str) -> tuple["datasets.Dataset", Files]:  # noqa: F821
    """Return the parquet files of a split below a folder as one table. Raises LeverError where there are none."""
    files = files_of(root, split)
    if not files:
        names = ", ".join(file.name for file in parquet_files(root)[:3])
        raise LeverError(
            f"{root}: no parquet file of the {split} split among {names}; put {split} into their names, or name "
            f"{'its folder: --set data.train_path=DIR' if split == 'train' else 'another folder: OKVQA_PATH'}"
        )
    return read_parquet(files, root, split)


def from_hub(source: str, split: str) -> tuple["datasets.Dataset", Files]:  # noqa: F821
    """Return the same of `hub:REPO`; no files where the table comes from the cache of `datasets`."""
    repository = source.removeprefix(HUB_PREFIX)
    if (snapshot := cached_dataset(repository)) and files_of(snapshot, split):
        return from_folder(snapshot, split)
    splits = hub_splits(repository, "or take a folder of its parquet files: OKVQA_PATH")
    named = splits_named(list(splits), source)[split]
    if not named:
        raise LeverError(f"{source} has no {split} split, only {', '.join(splits)}: data.train_path, data.okvqa_path")
    return splits[named[0]], []


def hub_splits(repository: str, mend: str) -> dict[str, "datasets.Dataset"]:  # noqa: F821
    """Return the splits of a data set of the hub through `datasets`: from its cache, or downloaded. Raises LeverError
    with the command that fetches it, and `mend`."""
    import datasets

    address = next((name for name in addresses(repository) if in_datasets_cache(name)), repository)
    fetch = download_command(repository)
    with readable(f"{HUB_PREFIX}{repository}, not in the local cache, from the hub ({fetch}, {mend})"):
        return datasets.load_dataset(address)


def in_datasets_cache(repository: str) -> bool:
    """Return whether `datasets` has prepared a data set of the hub on this machine."""
    import datasets

    name = repository.replace("/", "___").lower()
    return any(Path(datasets.config.HF_DATASETS_CACHE).glob(f"{glob.escape(name)}*"))


def place(number: int, files: Files) -> str:
    """Return the file of a row of the table, and its number there."""
    for name, rows in files:
        if number < rows:
            return f"{one_line(name)}, row {number}"
        number -= rows
    return f"row {number}"
