"""OK-VQA and VQAv2 as officially distributed: a questions file, an annotations file, COCO images."""

import hashlib
import os
from pathlib import Path

from lever_lm.config.schema import DataConfig
from lever_lm.data.example import Example, refuse_or_skip, unfit, unique, whole_id
from lever_lm.utils.errors import LeverError
from lever_lm.utils.paths import asset_path
from lever_lm.utils.safe_parse import loads, read_bytes
from lever_lm.utils.terminal import shown

SPLITS = {"train": "train2014", "val": "val2014"}
# How many examples (train, val) the official releases have, by data.name.
OFFICIAL_SIZES = {"okvqa": (9009, 5046), "okvqa_hub": (9009, 5046), "vqav2": (443757, 214354)}
_IDS = ("question_id", "image_id")


def questions_file(root: Path, split: str, prefix: str = "") -> Path:
    """Where the official questions of a split (`train`, `val`) are; prefix is `v2_` for VQAv2."""
    return root / f"{prefix}OpenEnded_mscoco_{SPLITS[split]}_questions.json"


def annotations_file(root: Path, split: str, prefix: str = "") -> Path:
    """Where the official annotations of a split are."""
    return root / f"{prefix}mscoco_{SPLITS[split]}_annotations.json"


def images_folder(root: Path, split: str) -> Path:
    """The folder of a split's COCO images, with or without `mscoco2014/` above it. LeverError when there is none."""
    candidates = [root / SPLITS[split], root / "mscoco2014" / SPLITS[split]]
    for folder in candidates:
        if os.path.isdir(folder):  # False, too, below a folder that may not be entered
            return folder
    above = f", {root.parent} it seems" if root.name in SPLITS.values() else ""
    raise LeverError(
        f"no folder {' or '.join(map(str, candidates))}: set COCO_PATH (data.coco_path) to what holds it{above}"
    )


def load_split(source: str, config: DataConfig, split: str, skipped: list[str]) -> tuple[list[Example], str]:
    """One split (`train` or `val`) from the official files in the folder `source`, and its fingerprint.

    Raises LeverError with file, id and what was expected; with skip_bad_examples such examples are left out and
    added to `skipped`. Images are looked up in their folder's listing and not opened.
    """
    digest, skip_bad, root = hashlib.sha256(), config.skip_bad_examples, asset_path(source)
    questions_path = questions_file(root, split, config.file_prefix)
    annotations_path = annotations_file(root, split, config.file_prefix)
    questions = _read_list(questions_path, "questions", digest, skip_bad, skipped)
    annotations = _read_list(annotations_path, "annotations", digest, skip_bad, skipped)
    folder = images_folder(asset_path(config.coco_path), split)
    sizes = _sizes(folder)
    questions = unique(questions_path, questions, skip_bad, skipped)
    annotations = unique(annotations_path, annotations, skip_bad, skipped)
    annotated = {item["question_id"]: item for item in annotations}
    orphans = annotated.keys() - {item["question_id"] for item in questions}
    for orphan in sorted(orphans):
        problem = f"{annotations_path}: annotation {orphan} has no question in {questions_path.name}"
        refuse_or_skip(problem, skip_bad, skipped)
    examples: list[Example] = []
    shared: dict = {}
    for item in questions:
        problem = None
        try:
            example = _example(item, annotated, questions_path, annotations_path, folder, split, shared)
            name = Path(example.image).name
            if not sizes.get(name):
                problem = f"question {example.question_id}: image {example.image} is missing or empty"
            digest.update(f"{name}:{sizes.get(name)}".encode())
        except LeverError as error:
            problem = str(error)
        if problem is None:
            examples.append(example)
        else:
            refuse_or_skip(problem, skip_bad, skipped)
    return examples, digest.hexdigest()[:16]


def _sizes(folder: Path) -> dict[str, int]:
    """The files of a folder and their sizes."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except OSError as error:
        raise LeverError(f"cannot read the images in {folder}: {error.strerror} (COCO_PATH, data.coco_path)") from error


def _read_list(path: Path, key: str, digest, skip_bad: bool, skipped: list[str]) -> list[dict]:
    """The entries of an official file, their ids as numbers."""
    try:
        content = read_bytes(path)
    except OSError as error:
        raise LeverError(f"cannot read {path}: {error.strerror or error}; set OKVQA_PATH (data.okvqa_path)") from error
    digest.update(content)
    try:
        entries = loads(content, nan=True, halves=True)[key]  # what is wrong in one entry is that entry's
        if not isinstance(entries, list):
            raise TypeError(f"'{key}' is {shown(entries)}")
    except (ValueError, KeyError, TypeError) as error:
        raise LeverError(
            f"{path} is not an official VQA file ({_reason(error)}): expected an object with a list "
            f"'{key}' of objects with integer question_id and image_id"
        ) from error
    rows = []
    for number, entry in enumerate(entries):
        given = {name: entry.get(name) for name in _IDS} if isinstance(entry, dict) else entry
        ids = {name: whole_id(value) for name, value in given.items()} if isinstance(given, dict) else {"": None}
        if None in ids.values():
            problem = f"{path}: entry {number} of '{key}' needs a {' and an '.join(_IDS)} of 0 to 2**63 - 1"
            refuse_or_skip(f"{problem}, found {shown(given, 80)}", skip_bad, skipped)
        else:
            rows.append({**entry, **ids})
    return rows


def _reason(error: Exception) -> str:
    return f"no key {error}" if isinstance(error, KeyError) else str(error)


def _example(item, annotated, questions_path, annotations_path, folder, split, shared: dict) -> Example:
    question_id, image_id = item["question_id"], item["image_id"]
    annotation = annotated.get(question_id)
    if annotation is None:
        raise LeverError(f"{annotations_path}: no annotation for question {question_id} of {questions_path.name}")
    if annotation["image_id"] != image_id:
        raise LeverError(
            f"question {question_id} is about image {image_id} in {questions_path.name}, "
            f"but about image {annotation['image_id']} in {annotations_path.name}"
        )
    question, entries = item.get("question"), annotation.get("answers")
    if not isinstance(question, str) or not question.strip():
        raise LeverError(f"{questions_path}: question {question_id} has no text, found {shown(question)}")
    if not isinstance(entries, list) or not entries or not all(_is_answer(entry) for entry in entries):
        raise LeverError(
            f"{annotations_path}: question {question_id} needs a list of objects with 'answer', found {shown(entries)}"
        )
    if not any(entry["answer"].strip() for entry in entries):
        raise LeverError(f"{annotations_path}: all answers to question {question_id} are blank")
    # Answers repeat over and over: equal ones are kept once.
    answers = tuple(shared.setdefault(entry["answer"], entry["answer"]) for entry in entries)
    typed = (entry.get("raw_answer", entry["answer"]) for entry in entries)
    raw_answers = tuple(shared.setdefault(text, text) for text in typed)
    if problem := unfit((question, *answers, *raw_answers)):
        raise LeverError(f"{questions_path}: question {question_id}: {problem}")
    image = folder / f"COCO_{SPLITS[split]}_{image_id:012d}.jpg"
    return Example(question_id, image_id, question, answers, raw_answers, str(image))


def _is_answer(entry) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("answer"), str)
        and isinstance(entry.get("raw_answer", ""), str)
    )
