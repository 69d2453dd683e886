"""Parquet copies of a VQA dataset, from the hub or a folder: columns question_id, image, question, answers.

The images are inside. `datasets` keeps the tables memory-mapped on disk, so neither loading nor reading text columns
holds or decodes one.
"""

import re
from pathlib import Path

from lever_lm.compat import first_line
from lever_lm.config import HUB_PREFIX, DataConfig, asset_path, fingerprint
from lever_lm.data.examples import Example, StoredImage, bytes_digest, refuse_or_skip, unique
from lever_lm.errors import LeverError
from lever_lm.hub import cached_snapshot

COLUMNS = ("question_id", "image", "question", "answers")
_OPTIONAL = ("image_id", "raw_answers")
# Which split a file or a hub split belongs to, by its name: val2014-00000-of-00002.parquet, train/0000.parquet.
_NAMES = {"train": r"train", "val": r"val|valid|validation|test|eval|dev"}


def parquet_files(root: Path) -> list[Path]:
    """The parquet files of a folder and the folders below it."""
    return sorted(root.rglob("*.parquet")) if root.is_dir() else []


def files_of(root: Path, split: str) -> list[Path]:
    """Those of a split by their names; all of them where none is named after a split."""
    files = parquet_files(root)
    named = {
        name: [file for file in files if _is_named(str(file.relative_to(root)), pattern)]
        for name, pattern in _NAMES.items()
    }
    return named[split] if any(named.values()) else files


def _is_named(text: str, pattern: str) -> bool:
    return re.search(rf"(?:^|[^a-z])(?:{pattern})(?:[^a-z]|$)", text.lower()) is not None


def load_split(source: str, config: DataConfig, split: str, skipped: list[str]) -> tuple[list[Example], str]:
    """One split (`train` or `val`) from a folder of parquet files or from `hub:REPO`, and its fingerprint.

    The hub's copy is taken from the local cache where there is one. Raises LeverError with source, row and what was
    expected; with skip_bad_examples such examples are left out and added to `skipped`.
    """
    import datasets

    table = _from_hub(source, split) if source.startswith(HUB_PREFIX) else _from_folder(asset_path(source), split)
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise LeverError(
            f"{source}: the {split} table has no column {', '.join(missing)}; expected {', '.join(COLUMNS)}, found "
            f"{', '.join(table.column_names)}"
        )
    try:
        images = table.select_columns("image").cast_column("image", datasets.Image(decode=False))
        # Kept on disk by `datasets` under the fingerprint of the table: computed once.
        digests = images.map(_digests, batched=True, batch_size=64, remove_columns="image")["digest"]
        texts = table.select_columns([name for name in (*COLUMNS, *_OPTIONAL) if name in table.column_names])
        rows = texts.remove_columns("image").to_list()
    except Exception as error:  # anybody's file: Arrow can fail on it in any way
        raise LeverError(f"{source}: cannot read the {split} table: {first_line(error)}") from error
    examples = _examples(rows, list(digests), images, f"{source}, {split}", config.skip_bad_examples, skipped)
    return examples, fingerprint(rows, list(digests))


def _digests(batch: dict) -> dict:
    contents = (image["bytes"] if image else None for image in batch["image"])
    return {"digest": [bytes_digest(content) if content else "" for content in contents]}


def _from_folder(root: Path, split: str):
    import datasets

    files = files_of(root, split)
    if not files:
        names = ", ".join(file.name for file in parquet_files(root)[:3])
        raise LeverError(
            f"{root}: no parquet file of the {split} split among {names}; put {split} into their names, or name "
            f"{'its folder: --set data.train_path=DIR' if split == 'train' else 'another folder: OKVQA_PATH'}"
        )
    datasets.disable_progress_bars()  # progress is shown by console.py alone
    try:
        return datasets.load_dataset("parquet", data_files={split: [str(file) for file in files]}, split=split)
    except Exception as error:
        raise LeverError(
            f"{root}: cannot read {', '.join(file.name for file in files)} as parquet: {first_line(error)}"
        ) from error


def _from_hub(source: str, split: str):
    import datasets

    repository = source.removeprefix(HUB_PREFIX)
    datasets.disable_progress_bars()
    if (snapshot := cached_snapshot(repository, "dataset")) and files_of(snapshot, split):
        return _from_folder(snapshot, split)
    try:
        splits = datasets.load_dataset(repository)
    except Exception as error:
        raise LeverError(
            f"{source}: not in the local cache, and not to be had from the hub: {first_line(error)}. Fetch it where "
            f"there is a network (hf download --repo-type dataset {repository}), or point OKVQA_PATH to a folder of "
            "its parquet files"
        ) from error
    named = [name for name in splits if _is_named(name, _NAMES[split])]
    if not named:
        raise LeverError(f"{source} has no {split} split, only {', '.join(splits)}: data.train_path, data.okvqa_path")
    return splits[named[0]]


def _examples(
    rows: list[dict], digests: list[str], images, where: str, skip_bad: bool, skipped: list[str]
) -> list[Example]:
    kept = []
    for number, (row, digest) in enumerate(zip(rows, digests, strict=True)):
        problem = _problem(row, digest)
        if problem:
            refuse_or_skip(f"{where}, row {number}, question {row['question_id']}: {problem}", skip_bad, skipped)
        else:
            kept.append({**row, "question_id": int(row["question_id"]), "number": number, "digest": digest})
    examples = []
    for row in unique(where, kept, skip_bad, skipped):
        answers = tuple(_text(entry, "answer") for entry in row["answers"])
        raw = row.get("raw_answers") or [_text(a, "raw_answer") or _text(a, "answer") for a in row["answers"]]
        # Without ids of their own, images are told apart by their content.
        image_id = row.get("image_id")
        image_id = int(row["digest"][:15], 16) if image_id is None else int(image_id)
        image = StoredImage(row["digest"], row["number"], images)
        examples.append(Example(row["question_id"], image_id, row["question"], answers, tuple(raw), image))
    return examples


def _problem(row: dict, digest: str) -> str | None:
    """What is wrong with a row, if anything."""
    if not str(row["question_id"]).isdecimal() or int(row["question_id"]) >= 2**63:
        return "question_id must be a number of 0 to 2**63 - 1"
    if not isinstance(row["question"], str) or not row["question"].strip():
        return f"it has no text, found {row['question']!r}"
    answers = row["answers"]
    if not isinstance(answers, list) or not answers or not all(isinstance(_text(a, "answer"), str) for a in answers):
        return f"it needs a list of answers, found {answers!r:.80}"
    if not str(row.get("image_id", 0) or 0).isdecimal():
        return f"image_id must be a number, found {row['image_id']!r}"
    return None if digest else "its image holds no bytes, and an address is not followed"


def _text(entry, key: str):
    """An answer: a string, or an object that holds it."""
    return entry.get(key) if isinstance(entry, dict) else entry
