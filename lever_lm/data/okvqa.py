"""OK-VQA and VQAv2 as officially distributed: a questions file, an annotations file, COCO images."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

from lever_lm.config import DataConfig, asset_path
from lever_lm.data.examples import Example, VqaData, open_image, to_dataset
from lever_lm.errors import LeverError

YEARS = {"train": "train2014", "val": "val2014"}


def questions_file(root: Path, split: str) -> Path:
    """Where the official questions of a split (`train`, `val`) are."""
    return root / f"OpenEnded_mscoco_{YEARS[split]}_questions.json"


def annotations_file(root: Path, split: str) -> Path:
    """Where the official annotations of a split are."""
    return root / f"mscoco_{YEARS[split]}_annotations.json"


def images_folder(root: Path, split: str) -> Path:
    """The folder of a split's COCO images, with or without `mscoco2014/` above it. LeverError when there is none."""
    candidates = [root / YEARS[split], root / "mscoco2014" / YEARS[split]]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise LeverError(f"no folder {' or '.join(map(str, candidates))}: set COCO_PATH (data.coco_path) to what holds it")


def load_okvqa(config: DataConfig) -> VqaData:
    """Both splits. Raises LeverError with file, id and what was expected; with skip_bad_examples such examples are
    left out and listed in `skipped`."""
    questions_root, images_root = asset_path(config.okvqa_path), asset_path(config.coco_path)
    digest, skipped, splits = hashlib.sha256(), [], {}
    for split in YEARS:
        examples = _load_split(questions_root, images_root, split, config.skip_bad_examples, skipped, digest)
        splits[split] = to_dataset(examples)
    return VqaData(config.name, splits["train"], splits["val"], digest.hexdigest()[:16], tuple(skipped))


def _load_split(questions_root, images_root, split, skip_bad, skipped, digest) -> list[Example]:
    questions_path, annotations_path = questions_file(questions_root, split), annotations_file(questions_root, split)
    questions = _read_list(questions_path, "questions", digest)
    annotations = _read_list(annotations_path, "annotations", digest)
    folder = images_folder(images_root, split)
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}
    questions = _unique(questions_path, questions, skip_bad, skipped)
    annotations = _unique(annotations_path, annotations, skip_bad, skipped)
    annotated = {item["question_id"]: item for item in annotations}
    orphans = annotated.keys() - {item["question_id"] for item in questions}
    for orphan in sorted(orphans):
        problem = f"{annotations_path}: annotation {orphan} has no question in {questions_path.name}"
        _refuse_or_skip(problem, skip_bad, skipped)
    examples = []
    for item in questions:
        problem = example = None
        try:
            example = _example(item, annotated, questions_path, annotations_path, folder, split)
            name = Path(example.image).name
            if not sizes.get(name):
                problem = f"question {example.question_id}: image {example.image} is missing or empty"
            elif skip_bad:
                open_image(example.image)
            digest.update(f"{name}:{sizes.get(name)}".encode())
        except LeverError as error:
            problem = str(error)
        if problem is None:
            examples.append(example)
        else:
            _refuse_or_skip(problem, skip_bad, skipped)
    if not examples:
        raise LeverError(f"{questions_path} holds no usable example")
    return examples


def _read_list(path: Path, key: str, digest) -> list[dict]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LeverError(f"cannot read {path}: {error.strerror}; set OKVQA_PATH (data.okvqa_path)") from error
    digest.update(content)
    try:
        rows = json.loads(content)[key]
        if all(_is_id(row["question_id"]) and _is_id(row["image_id"]) for row in rows):
            return rows
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LeverError(
            f"{path} is not an official VQA file ({_reason(error)}): expected an object with a list "
            f"'{key}' of objects with integer question_id and image_id"
        ) from error
    raise LeverError(f"{path}: every entry of '{key}' needs a question_id and image_id of 0 to 2**63 - 1")


def _is_id(value) -> bool:
    return isinstance(value, int) and 0 <= value < 2**63


def _reason(error: Exception) -> str:
    return f"no key {error}" if isinstance(error, KeyError) else str(error)


def _refuse_or_skip(problem: str, skip_bad: bool, skipped: list[str]) -> None:
    if not skip_bad:
        raise LeverError(f"{problem}; to go on without such examples: --set data.skip_bad_examples=true")
    skipped.append(problem)


def _unique(path: Path, rows: list[dict], skip_bad: bool, skipped: list[str]) -> list[dict]:
    """The rows, the first of those with the same id."""
    for question_id, count in Counter(row["question_id"] for row in rows).items():
        if count > 1:
            problem = f"{path}: question_id {question_id} appears {count} times, expected once"
            _refuse_or_skip(problem, skip_bad, skipped)
    return list({row["question_id"]: row for row in reversed(rows)}.values())[::-1] if skip_bad else rows


def _example(item, annotated, questions_path, annotations_path, folder, split) -> Example:
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
        raise LeverError(f"{questions_path}: question {question_id} has no text, found {question!r}")
    if not isinstance(entries, list) or not entries or not all(_is_answer(entry) for entry in entries):
        raise LeverError(
            f"{annotations_path}: question {question_id} needs a list of objects with 'answer', found {entries!r:.80}"
        )
    answers = tuple(entry["answer"] for entry in entries)
    raw_answers = tuple(entry.get("raw_answer", entry["answer"]) for entry in entries)
    image = folder / f"COCO_{YEARS[split]}_{image_id:012d}.jpg"
    return Example(question_id, image_id, question, answers, raw_answers, str(image))


def _is_answer(entry) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("answer"), str)
        and isinstance(entry.get("raw_answer", ""), str)
    )
