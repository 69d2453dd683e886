"""OK-VQA and VQAv2 as officially distributed: a questions file, an annotations file, COCO images."""

import hashlib
import os
from pathlib import Path

from lever_lm.config.schema import DataConfig
from lever_lm.data.example import Example
from lever_lm.data.rows import BadExamples, Pose, Unusable, as_it_is, example_of, whole_id
from lever_lm.utils.errors import LeverError
from lever_lm.utils.paths import asset_path
from lever_lm.utils.safe_parse import loads, read_bytes
from lever_lm.utils.terminal import shown

SPLITS = {"train": "train2014", "val": "val2014"}
# How many examples (train, val) the official releases have, by data.name.
OFFICIAL_SIZES = {"okvqa": (9009, 5046), "okvqa_hub": (9009, 5046), "vqav2": (443757, 214354)}
_IDS = ("question_id", "image_id")


def questions_file(root: Path, split: str, prefix: str = "") -> Path:
    """Return the official questions file of a split (`train`, `val`); prefix is `v2_` for VQAv2."""
    return root / f"{prefix}OpenEnded_mscoco_{SPLITS[split]}_questions.json"


def annotations_file(root: Path, split: str, prefix: str = "") -> Path:
    """Return the official annotations file of a split."""
    return root / f"{prefix}mscoco_{SPLITS[split]}_annotations.json"


def images_folder(root: Path, split: str) -> Path:
    """Return the folder of a split's COCO images, with or without `mscoco2014/` above it. LeverError if there is
    none."""
    candidates = [root / SPLITS[split], root / "mscoco2014" / SPLITS[split]]
    for folder in candidates:
        if os.path.isdir(folder):  # False, too, below a folder that may not be entered
            return folder
    above = f", {root.parent} it seems" if root.name in SPLITS.values() else ""
    raise LeverError(
        f"no folder {' or '.join(map(str, candidates))}: set COCO_PATH (data.coco_path) to what holds it{above}"
    )


def load_official(
    source: str, config: DataConfig, split: str, bad: BadExamples, pose: Pose = as_it_is
) -> tuple[list[Example], str]:
    """Load one split (`train` or `val`) from the official files in the folder `source`, and its fingerprint.

    Raises LeverError with file, id and what was expected; examples that cannot be used go to `bad`. Images are looked
    up in their folder's listing and not opened.
    """
    digest, root = hashlib.sha256(), asset_path(source)
    paths = [file(root, split, config.file_prefix) for file in (questions_file, annotations_file)]
    questions, annotations = (
        _read_list(path, key, digest, bad) for path, key in zip(paths, ("questions", "annotations"), strict=True)
    )
    folder = images_folder(asset_path(config.coco_path), split)
    sizes = _sizes(folder)
    for orphan in sorted(annotations.keys() - questions.keys()):
        bad.add(f"{paths[1]}: annotation {orphan} has no question in {paths[0].name}")
    examples = []
    for question_id, item in questions.items():
        name = f"COCO_{SPLITS[split]}_{item['image_id']:012d}.jpg"
        annotation = annotations.get(question_id)
        try:
            if annotation is None:
                raise Unusable("it has no annotation")
            if annotation["image_id"] != item["image_id"]:
                raise Unusable(f"it is about image {item['image_id']} here, about {annotation['image_id']} there")
            row = {key: item.get(key) for key in (*_IDS, "question")}
            example = pose(example_of({**row, "answers": annotation.get("answers")}, str(folder / name)))
        except Unusable as error:
            bad.add(f"{paths[0]} and {paths[1].name}, question {question_id}: {error}")
            continue
        digest.update(f"{name}:{sizes.get(name)}".encode())
        if sizes.get(name):
            examples.append(example)
        else:
            bad.add(f"question {question_id}: image {example.image} is missing or empty")
    return examples, digest.hexdigest()[:16]


def _sizes(folder: Path) -> dict[str, int]:
    """Return the files of a folder and their sizes."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except OSError as error:
        raise LeverError(f"cannot read the images in {folder}: {error.strerror} (COCO_PATH, data.coco_path)") from error


def _read_list(path: Path, key: str, digest, bad: BadExamples) -> dict[int, dict]:
    """Return the entries of an official file by question_id, their ids as numbers; of equal ones the first."""
    try:
        content = read_bytes(path)
    except OSError as error:
        raise LeverError(f"cannot read {path}: {error.strerror or error}; set OKVQA_PATH (data.okvqa_path)") from error
    digest.update(content)
    try:
        entries = list(enumerate(loads(content, nan=True)[key]))  # what is wrong in one entry is its own
    except (ValueError, KeyError, TypeError) as error:
        raise LeverError(
            f"{path} is not an official VQA file ({shown(str(error), 200)}): expected an object with a list '{key}' of "
            "objects with integer question_id and image_id"
        ) from error
    rows: dict[int, dict] = {}
    for number, entry in entries:
        given = {name: entry.get(name) for name in _IDS} if isinstance(entry, dict) else {}
        ids = {name: whole_id(value) for name, value in given.items()}
        if None in ids.values() or not ids:
            problem = f"{path}: entry {number} of '{key}' needs a {' and an '.join(_IDS)} of 0 to 2**63 - 1"
            bad.add(f"{problem}, found {shown(given or entry, 80)}")
        elif ids["question_id"] in rows:
            bad.add(f"{path}: question_id {ids['question_id']} appears more than once")
        else:
            rows[ids["question_id"]] = {**entry, **ids}
    return rows
