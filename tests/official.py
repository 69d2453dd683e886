"""Datasets as people have them: the official VQA files with every field, parquet copies of them, the hub's cache.

Made, not downloaded; what is odd about real photographs (greyscale, CMYK, a PNG under a .jpg name, EXIF rotation, one
pixel) is among the training images.
"""

import hashlib
import json
import os
from io import BytesIO
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

SUBTYPE = {"train": "train2014", "val": "val2014"}
QUESTIONS = "OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "mscoco_{}_annotations.json"
# The first training images, in this order. The others, and all of val, are plain colour photographs.
ODD = ("grayscale", "cmyk", "rgba", "rotated", "one_pixel")
SIZES = ((64, 48), (48, 64), (80, 60), (61, 47))
SUBJECTS = (("surfing", "surf"), ("bananas", "banana"), ("trains", "train"), ("kite", "kite"), ("zebras", "zebra"))
WORDS = ("What sport is this", "Which fruit has these", "What vehicle moves on", "Name the toy of", "What animal has")


# ---------------------------------------------------------------------- official files


def build_official(
    root: Path,
    *,
    coco: Path | None = None,
    prefix: str = "",
    train: int = 24,
    val: int = 12,
    mscoco2014: bool = False,
    raw: bool = True,
) -> Path:
    """Questions and annotations of both splits in `root`, the images in `coco` (default: `root`). Returns `root`.

    train, val: numbers of questions. mscoco2014: the image folders lie one level deeper. raw: OK-VQA's entries, with
    `raw_answer`; otherwise VQAv2's, with `multiple_choice_answer`.
    """
    root.mkdir(parents=True, exist_ok=True)
    images = (coco or root) / "mscoco2014" if mscoco2014 else (coco or root)
    for split, total in (("train", train), ("val", val)):
        asked = _questions(split, total)
        annotated = [_annotation(item, i, raw) for i, item in enumerate(asked)]
        write_official(root, split, asked, annotated, prefix)
        for number, image_id in enumerate(dict.fromkeys(item["image_id"] for item in asked)):
            kind = ODD[number] if split == "train" and number < len(ODD) else "photo"
            path = image_path(images, split, image_id)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo(image_id, kind))
    return root


def image_path(coco: Path, split: str, image_id: int) -> Path:
    """`COCO_train2014_000000000009.jpg` in its folder."""
    return coco / SUBTYPE[split] / f"COCO_{SUBTYPE[split]}_{image_id:012d}.jpg"


def write_official(root: Path, split: str, questions: list, annotations: list, prefix: str = "") -> None:
    """The two files of a split around these entries."""
    about = {
        "info": {
            "description": "made for a test",
            "url": "http://okvqa.allenai.org",
            "version": "1.0",
            "year": 2019,
            "contributor": "nobody",
            "date_created": "2019-03-20 12:00:00",
        },
        "license": {"url": "http://creativecommons.org/licenses/by/4.0/", "name": "CC BY 4.0"},
        "data_subtype": SUBTYPE[split],
        "data_type": "mscoco",
    }
    files = {
        QUESTIONS: {**about, "task_type": "Open-Ended", "questions": questions},
        ANNOTATIONS: {**about, "question_types": {"one": "Vehicles", "two": "Brands"}, "annotations": annotations},
    }
    for name, content in files.items():
        (root / f"{prefix}{name.format(SUBTYPE[split])}").write_text(json.dumps(content), encoding="utf-8")


def read_official(root: Path, split: str, prefix: str = "") -> tuple[list[dict], list[dict]]:
    """(questions, annotations) of a split as they stand in the files."""
    names = ((QUESTIONS, "questions"), (ANNOTATIONS, "annotations"))
    return tuple(
        json.loads((root / f"{prefix}{name.format(SUBTYPE[split])}").read_text(encoding="utf-8"))[key]
        for name, key in names
    )


def _questions(split: str, total: int) -> list[dict]:
    """3, 2, 1, 3, 2, 1, … questions an image; ids as OK-VQA forms them."""
    rows: list[dict] = []
    for number in count():
        image_id = (9, 42)[split == "val"] + 1931 * number
        for k in range(3 - number % 3):
            if len(rows) == total:
                return rows
            text = f"{WORDS[(number + k) % len(WORDS)]} number {number} {'again ' * k}here?"
            rows.append({"image_id": image_id, "question": text, "question_id": 10 * image_id + k + 1})
    raise AssertionError


def _annotation(question: dict, number: int, raw: bool) -> dict:
    typed, stemmed = SUBJECTS[number % len(SUBJECTS)]
    other_typed, other = SUBJECTS[(number + 1) % len(SUBJECTS)]
    pairs = [(typed, stemmed)] * 7 + [(other_typed, other)] * 3
    answers = [
        {
            "answer_id": i,
            "answer": a if raw else r,
            "answer_confidence": "yes" if i < 9 else "maybe",
            **({"raw_answer": r} if raw else {}),
        }
        for i, (r, a) in enumerate(pairs, 1)
    ]
    return {
        "image_id": question["image_id"],
        "question_id": question["question_id"],
        "question_type": "one" if raw else "what is this",
        "answer_type": "other",
        "answers": answers,
        **({"confidence": 3} if raw else {"multiple_choice_answer": typed}),
    }


# ---------------------------------------------------------------------- images


def photo(seed: int, kind: str = "photo") -> bytes:
    """An image file: colour gradients under noise, its size a function of the seed. Same seed, same bytes."""
    rng = np.random.default_rng(seed)
    width, height = SIZES[seed % len(SIZES)]
    ramp = np.linspace(0, 1, width)[None, :, None] * rng.uniform(0, 160, 3)
    ramp = ramp + np.linspace(0, 1, height)[:, None, None] * rng.uniform(0, 90, 3)
    pixels = np.clip(ramp + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels)
    buffer = BytesIO()
    if kind == "rgba":
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        picture.save(buffer, "PNG")
        return buffer.getvalue()
    options = {"quality": 90}
    if kind == "rotated":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6  # the camera was held upright: to be turned by 90°
    picture = {
        "grayscale": lambda: picture.convert("L"),
        "cmyk": lambda: picture.convert("CMYK"),
        "one_pixel": lambda: picture.resize((1, 1)),
    }.get(kind, lambda: picture)()
    picture.save(buffer, "JPEG", **options)
    return buffer.getvalue()


# ---------------------------------------------------------------------- parquet copies


def parquet_rows(
    official: Path, split: str, *, coco: Path | None = None, ids_as_text: bool = True, dict_answers: bool = False
) -> list[dict]:
    """The rows of a split as the hub's copies have them, the image files' bytes inside."""
    (named,) = official.glob("*" + QUESTIONS.format(SUBTYPE[split]))
    prefix = named.name.removesuffix(QUESTIONS.format(SUBTYPE[split]))
    questions, annotations = read_official(official, split, prefix)
    by_id = {item["question_id"]: item for item in annotations}
    folders = [coco or official, (coco or official) / "mscoco2014"]
    rows = []
    for item in questions:
        annotation = by_id[item["question_id"]]
        places = (image_path(folder, split, item["image_id"]) for folder in folders)
        path = next(place for place in places if place.is_file())
        rows.append(
            {
                "question_id": str(item["question_id"]) if ids_as_text else item["question_id"],
                "image": {"bytes": path.read_bytes(), "path": path.name},
                "question": item["question"],
                "answers": annotation["answers"] if dict_answers else [a["answer"] for a in annotation["answers"]],
                "question_type": annotation["question_type"],
                "answer_type": annotation["answer_type"],
            }
        )
    return rows


def write_parquet(path: Path, rows: list[dict], *, described: bool = True, row_group_size: int | None = None) -> Path:
    """One parquet file. described: with the column types that `datasets` leaves in the file's metadata, as the hub's
    copies have them; otherwise as pyarrow alone would write the rows."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    if described:
        features = datasets.Features.from_arrow_schema(table.schema)
        if "image" in features and pyarrow.types.is_struct(table.schema.field("image").type):
            features["image"] = datasets.Image()
        table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def build_parquet(
    root: Path,
    official: Path,
    *,
    splits: tuple[str, ...] = ("train", "val2014"),
    coco: Path | None = None,
    ids_as_text: bool = True,
    dict_answers: bool = False,
    described: bool = True,
    shards: int = 1,
    names: str = "data/{split}-{shard:05d}-of-{shards:05d}.parquet",
) -> Path:
    """A parquet copy of an official fixture, as `datasets` lays out a hub repository. Returns `root`.

    splits: as the files name them; what starts with `train` is the training split, all else the evaluation split.
    """
    for split in splits:
        which = "train" if split.startswith("train") else "val"
        rows = parquet_rows(official, which, coco=coco, ids_as_text=ids_as_text, dict_answers=dict_answers)
        size = -(-len(rows) // shards)
        for shard in range(shards):
            path = root / names.format(split=split, shard=shard, shards=shards)
            write_parquet(path, rows[shard * size : (shard + 1) * size], described=described)
    return root


# ---------------------------------------------------------------------- the hub's cache


def hub_cache(home: Path, repository: str, kind: str, folder: Path, *, left_out: tuple[str, ...] = ()) -> Path:
    """A folder laid out below HF_HOME as `hf download` does: refs, snapshots of symlinks, blobs, the file listing.

    kind: `model` or `dataset`. left_out: files of the repository that were not downloaded: listed, but not there.
    Returns the snapshot. In a process that has imported huggingface_hub already, HF_HOME comes too late: set
    `huggingface_hub.constants.HF_HUB_CACHE` to `home / "hub"`.
    """
    storage = home / "hub" / f"{kind}s--{repository.replace('/', '--')}"
    commit = hashlib.sha1(repository.encode()).hexdigest()
    snapshot = storage / "snapshots" / commit
    for made in (storage / "blobs", storage / "refs", storage / "trees", snapshot):
        made.mkdir(parents=True, exist_ok=True)
    (storage / "refs" / "main").write_text(commit)
    listing = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, content = file.relative_to(folder), file.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        listing[str(name)] = {"size": len(content), "blob_id": git}
        blob = git
        if file.suffix in (".safetensors", ".bin", ".parquet", ".jpg"):  # what the hub keeps as large files
            blob = hashlib.sha256(content).hexdigest()
            listing[str(name)] |= {"lfs_sha256": blob, "lfs_size": len(content)}
        if str(name) in left_out:
            continue
        (storage / "blobs" / blob).write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(storage / "blobs" / blob, link.parent))
    for name in left_out:
        listing.setdefault(name, {"size": 1, "blob_id": hashlib.sha1(name.encode()).hexdigest()})
    tree = {"format_version": 1, "files": dict(sorted(listing.items()))}
    (storage / "trees" / f"{commit}.json").write_text(json.dumps(tree))
    return snapshot
