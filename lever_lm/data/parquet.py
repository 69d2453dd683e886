"""Parquet copies of a VQA dataset, from the hub or a folder: columns question_id, image, question, answers.

The images are inside, or named by path or address (image_download.py). `datasets` keeps the tables memory-mapped on
disk, so neither loading nor reading text columns holds or decodes one.
"""

import glob
import hashlib
from pathlib import Path

from lever_lm.config.schema import DataConfig
from lever_lm.data.example import Example, Image, StoredImage, image_digest
from lever_lm.data.image_download import Refused, cache_file, fetch_images, is_address, is_fetchable, local_image
from lever_lm.data.rows import BadExamples, problem_of, unique, whole_id
from lever_lm.data.split_files import files_of, parquet_files, splits_named
from lever_lm.utils.errors import LeverError
from lever_lm.utils.fingerprint import fingerprint
from lever_lm.utils.hub import cached_snapshot
from lever_lm.utils.paths import HUB_PREFIX, asset_path
from lever_lm.utils.terminal import one_line, shown
from lever_lm.utils.transformers_compat import first_line

COLUMNS = ("question_id", "image", "question", "answers")
_OPTIONAL = ("image_id", "raw_answers")


def load_parquet(source: str, config: DataConfig, split: str, bad: BadExamples) -> tuple[list[Example], str]:
    """Load one split (`train` or `val`) from a folder of parquet files or from `hub:REPO`, and its fingerprint.

    The hub's copy is taken from the local cache where there is one. Raises LeverError with source, row and what was
    expected; examples that cannot be used go to `bad`.
    """
    import datasets

    datasets.disable_progress_bars()  # progress is shown by utils/console.py alone
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our error says what is wrong with a file
    if source.startswith(HUB_PREFIX):
        table, files = _from_hub(source, split)
    else:
        _refuse_one_for_both(asset_path(source), config)
        table, files = _from_folder(asset_path(source), split)
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise LeverError(
            f"{source}: the {split} table has no column {', '.join(missing)}; expected {', '.join(COLUMNS)}, found "
            f"{', '.join(table.column_names)}"
        )
    what = "image column"
    try:
        images = table.select_columns("image").cast_column("image", datasets.Image(decode=False))
        what = "table"
        # Kept on disk by `datasets` under the fingerprint of the table: computed once.
        found = images.map(_digests, batched=True, batch_size=64, remove_columns="image").to_list()
        texts = table.select_columns([name for name in (*COLUMNS, *_OPTIONAL) if name in table.column_names])
        rows = texts.remove_columns("image").to_list()
    except Exception as error:  # Arrow can fail on an untrusted file in any way
        _refuse_cache(error)
        raise LeverError(f"{source}: cannot read the {split} {what}: {first_line(error)}") from error
    places = {number: image["place"] for number, image in enumerate(found) if image["place"]}
    stored = {i: StoredImage(image["digest"], i, images) for i, image in enumerate(found) if image["digest"]}
    named = _find_images(places, _roots(source, config), config.allow_remote, stop_early=not bad.skip)
    return _examples(rows, {**stored, **named}, f"{source}, {split}", files, bad), fingerprint(rows, found)


def _digests(batch: dict) -> dict:
    """Return for each image in a batch the digest of its bytes, or else the place that it is said to be at."""
    images = [image or {"bytes": None, "path": None} for image in batch["image"]]
    return {
        "digest": [_sha256(image["bytes"]) if image["bytes"] else "" for image in images],
        "place": ["" if image["bytes"] else image["path"] or "" for image in images],
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]  # as utils.file_hashes has that of a file


def _roots(source: str, config: DataConfig) -> tuple[list[Path], list[Path]]:
    """Return the folders in which images named by path are looked for (of the data, and of the official images), and
    the folders in which they may lie once links are followed: the hub's cache keeps its files elsewhere."""
    of_hub = source.startswith(HUB_PREFIX)
    own = cached_snapshot(source.removeprefix(HUB_PREFIX), "dataset") if of_hub else asset_path(source)
    roots = [root for root in (own, asset_path(config.coco_path)) if root is not None and root.is_dir()]
    blobs = [own.parent.parent / "blobs"] if of_hub and own is not None else []
    return roots, [root.resolve() for root in (*roots, *blobs)]


def _find_images(
    places: dict[int, str], roots: tuple[list[Path], list[Path]], allow_remote: bool, stop_early: bool
) -> dict[int, str | Refused]:
    """Return the files of images that a table does not hold, by row, or the reason for a missing one. Addresses are
    fetched with data.allow_remote, into a folder beside what `datasets` keeps."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lever_lm_images"
    found: dict[int, str | Refused] = {}
    remote: dict[int, str] = {}
    for number, place in places.items():
        try:
            if not is_address(place):
                found[number] = local_image(place, *roots)
            elif not is_fetchable(place):
                raise Refused(f"its image is at {shown(place, 80)}, which is never followed")
            elif not allow_remote:
                raise Refused(f"its image is at {shown(place, 80)}, which is followed with --allow-remote alone")
            else:
                remote[number] = place
        except Refused as error:
            found[number] = error
    problems = fetch_images(remote.values(), folder, stop_early=stop_early)
    for number, place in remote.items():
        why = problems.get(place)
        found[number] = Refused(f"its image {shown(place, 200)}: {why}") if why else str(cache_file(place, folder))
    return found


def _from_folder(root: Path, split: str) -> tuple["datasets.Dataset", list[tuple[str, int]]]:  # noqa: F821
    """Return the table of a split, and the files it is made of with the number of rows of each."""
    import datasets
    from pyarrow.parquet import read_metadata

    files = files_of(root, split)
    if not files:
        names = ", ".join(file.name for file in parquet_files(root)[:3])
        raise LeverError(
            f"{root}: no parquet file of the {split} split among {names}; put {split} into their names, or name "
            f"{'its folder: --set data.train_path=DIR' if split == 'train' else 'another folder: OKVQA_PATH'}"
        )
    try:
        names = [glob.escape(str(file)) for file in files]  # `datasets` takes patterns
        table = datasets.load_dataset("parquet", data_files={split: names}, split=split)
        return table, [(str(file.relative_to(root)), read_metadata(file).num_rows) for file in files]
    except Exception as error:
        _refuse_cache(error)
        raise LeverError(
            f"{root}: cannot read {', '.join(file.name for file in files)} as parquet: "
            f"{first_line(error.__cause__ or error)}"
        ) from error


def _refuse_one_for_both(root: Path, config: DataConfig) -> None:
    """Raise LeverError where both splits would be the same files: no evaluation on what was trained on."""
    files = parquet_files(root)
    named = splits_named([str(file.relative_to(root)) for file in files], str(root))
    if files and not config.train_path and not any(named.values()):
        raise LeverError(
            f"{root}: no split in the names of {', '.join(file.name for file in files[:3])}; put train and val into "
            "them, or name the training split's folder: --set data.train_path=DIR"
        )


def _refuse_cache(error: BaseException) -> None:
    """Raise LeverError where a failure is that of the folder in which `datasets` keeps its tables."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE)
    while error is not None:
        place = Path(error.filename) if isinstance(error, OSError) and isinstance(error.filename, str) else None
        if place and (place.is_relative_to(folder) or folder.is_relative_to(place)):
            raise LeverError(
                f"cannot write {folder}, where `datasets` keeps what it read: {error.strerror}; set HF_DATASETS_CACHE "
                "(or HF_HOME) to a folder that can be written"
            ) from error
        error = error.__cause__ or error.__context__


def _from_hub(source: str, split: str) -> tuple["datasets.Dataset", list[tuple[str, int]]]:  # noqa: F821
    """Return the same as `_from_folder`; no files where the table comes from the cache of `datasets`."""
    import datasets

    repository = source.removeprefix(HUB_PREFIX)
    if (snapshot := cached_snapshot(repository, "dataset")) and files_of(snapshot, split):
        return _from_folder(snapshot, split)
    try:
        splits = datasets.load_dataset(repository)
    except Exception as error:
        _refuse_cache(error)
        raise LeverError(
            f"{source}: not in the local cache, and not to be had from the hub: {first_line(error)}. Fetch it where "
            f"there is a network (hf download --repo-type dataset {repository}), or take a "
            "folder of its parquet files: --dataset okvqa_local with OKVQA_PATH"
        ) from error
    named = splits_named(list(splits), source)[split]
    if not named:
        raise LeverError(f"{source} has no {split} split, only {', '.join(splits)}: data.train_path, data.okvqa_path")
    return splits[named[0]], []


def _examples(
    rows: list[dict], images: dict[int, Image | Refused], where: str, files: list[tuple[str, int]], bad: BadExamples
) -> list[Example]:
    kept = []
    for number, row in enumerate(rows):
        image = images.get(number, Refused("its image holds neither bytes nor a path"))
        answers, raw_answers = _answers(row)
        problem = _problem(row, answers, raw_answers) or (str(image) if isinstance(image, Refused) else None)
        if problem:
            bad.add(f"{where}, {_place(number, files)}, question {one_line(str(row['question_id'])[:40])}: {problem}")
        else:
            texts = {"answers": tuple(answers), "raw_answers": tuple(raw_answers)}
            kept.append({**row, **texts, "question_id": whole_id(row["question_id"]), "image": image})
    return [
        Example(
            row["question_id"],
            # Without ids of their own, images are told apart by their content.
            int(image_digest(row["image"])[:15], 16) if row.get("image_id") is None else whole_id(row["image_id"]),
            row["question"],
            row["answers"],
            row["raw_answers"],
            row["image"],
        )
        for row in unique(where, kept, bad)
    ]


def _place(number: int, files: list[tuple[str, int]]) -> str:
    """Return the file of a row of the table, and its number there."""
    for name, rows in files:
        if number < rows:
            return f"{one_line(name)}, row {number}"
        number -= rows
    return f"row {number}"


def _answers(row: dict) -> tuple:
    """Return answers and raw answers of a row, not checked yet. An answer is a text, or an object that holds it; raw
    answers have a column of their own, or are in the objects, or are the answers."""
    entries, raw_answers = row["answers"], row.get("raw_answers")
    if not isinstance(entries, list):
        return entries, raw_answers
    answers = [entry.get("answer") if isinstance(entry, dict) else entry for entry in entries]
    in_objects = [entry.get("raw_answer") if isinstance(entry, dict) else entry for entry in entries]
    return answers, raw_answers or [raw or answer for raw, answer in zip(in_objects, answers, strict=True)]


def _problem(row: dict, answers, raw_answers) -> str | None:
    """Return what is wrong with a row except for its image; None if nothing is."""
    ids = "must be a whole number of 0 to 2**63 - 1"
    if whole_id(row["question_id"]) is None:
        return f"question_id {ids}"
    if problem := problem_of(row["question"], answers, raw_answers):
        return problem
    if row.get("image_id") is not None and whole_id(row["image_id"]) is None:
        return f"image_id {ids}, found {shown(row['image_id'])}"
    return None
