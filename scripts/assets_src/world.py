"""The `digits` world: knowledge questions about digits in OK-VQA's own file layout, some demonstrations misleading.

What makes choosing worth learning: 40 % of the images are smudged, and the annotators of a smudged *training* item are
mostly wrong, so similarity alone (smudged queries look like smudged demonstrations) picks misleading ones. One can see
which. Validation labels are right, whatever the image looks like.
File schema: https://okvqa.allenai.org (the VQA format, plus `raw_answer`, `answer_type: other` and `confidence`).
"""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from assets_src.digit_images import load_digits, smudge, split_by_image
from assets_src.knowledge import DEMO_TYPES, NUM_TRAIN_PARAPHRASES, QUESTION_TYPES, annotator_answers

SMUDGED_FRACTION = 0.4
WRONG_IF_SMUDGED = 0.9
WRONG_IF_CLEAN = 0.03
DISSENTERS = 2  # annotators who give the right answer where the majority is wrong
QUESTIONS_PER_TRAIN_IMAGE = 2
NUM_VAL_QUERIES = 500
ARTICLE_RATE = 0.4  # share of polygon answers written with an article
JPEG_QUALITY = 95

LICENSE = {
    "name": "Creative Commons Attribution 4.0 International",
    "url": "https://creativecommons.org/licenses/by/4.0/",
}
ATTRIBUTION = """# Attribution

The images are derived from *Optical Recognition of Handwritten Digits* (E. Alpaydin and C. Kaynak, 1998, UCI Machine
Learning Repository, https://doi.org/10.24432/C50P49), licensed under CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/), through the copy of its test set in scikit-learn
(`sklearn.datasets.load_digits`).

Changed by us: resized from 8x8 to 56x56 pixels and stored as RGB JPEG; 40 % of the images blurred, paled and made
noisy; split anew into train and val. Questions and annotators' answers are ours and made by a program
(`scripts/build_assets.py digits`); many answers to the smudged training images are wrong on purpose.
The derived images, questions and answers are under CC BY 4.0 as well.
"""


@dataclass(frozen=True)
class Item:
    """One question about one image. `shown` is the digit whose answer most annotators gave; `digit` is the true one."""

    row: int
    index: int  # position among the questions of its image
    type_name: str
    paraphrase: int
    digit: int
    shown: int

    @property
    def image_id(self) -> int:
        return self.row + 1  # rows are shared by both splits, so ids are unique across them

    @property
    def question_id(self) -> int:
        return self.image_id * 10 + self.index

    @property
    def question(self) -> str:
        return QUESTION_TYPES[self.type_name].paraphrases[self.paraphrase]


def train_items(rows: list[int], labels: np.ndarray, smudged: np.ndarray, rng: random.Random) -> list[Item]:
    """Two questions of different types for every train image; a misled majority agrees on one other digit."""
    items = []
    for row in rows:
        digit = int(labels[row])
        for index, type_name in enumerate(rng.sample(DEMO_TYPES, QUESTIONS_PER_TRAIN_IMAGE)):
            misled = rng.random() < (WRONG_IF_SMUDGED if smudged[row] else WRONG_IF_CLEAN)
            shown = rng.choice([d for d in range(10) if d != digit]) if misled else digit
            items.append(Item(row, index, type_name, rng.randrange(NUM_TRAIN_PARAPHRASES), digit, shown))
    return items


def val_items(rows: list[int], labels: np.ndarray, rng: random.Random) -> list[Item]:
    """One question on each of 500 images, any of the four wordings, always labelled right."""
    items = []
    for row in sorted(rng.sample(rows, NUM_VAL_QUERIES)):
        type_name = rng.choice(DEMO_TYPES)
        paraphrase = rng.randrange(len(QUESTION_TYPES[type_name].paraphrases))
        items.append(Item(row, 0, type_name, paraphrase, int(labels[row]), int(labels[row])))
    return items


def item_answers(item: Item, seed: int) -> list[dict]:
    """The ten `answers` entries of an item; seeded by the question, not by the order of calls."""
    rng = random.Random(f"annotators-{seed}-{item.question_id}")
    answers = annotator_answers(item.type_name, item.shown, rng)
    if item.shown != item.digit:
        answers[-DISSENTERS:] = [QUESTION_TYPES[item.type_name].answers[item.digit]] * DISSENTERS
        rng.shuffle(answers)
    entries = []
    for position, answer in enumerate(answers, start=1):
        raw = answer
        if item.type_name == "polygon" and rng.random() < ARTICLE_RATE:
            raw = ("an " if answer[0] in "aeiou" else "a ") + answer
        entries.append({"answer_id": position, "answer": answer, "raw_answer": raw, "answer_confidence": "yes"})
    return entries


def write_split(out: Path, split: str, items: list[Item], images: np.ndarray, seed: int) -> None:
    """The questions file, the annotations file and the images of one split; images is (N, P, P) uint8."""
    info = {"description": "lever_lm digits: knowledge questions about handwritten digits", "version": "1.0"}
    common = {"info": info, "license": LICENSE, "data_type": "mscoco", "data_subtype": split}
    questions = [{"image_id": i.image_id, "question": i.question, "question_id": i.question_id} for i in items]
    annotations = [
        {
            "image_id": item.image_id,
            "question_id": item.question_id,
            "question_type": item.type_name,
            "answer_type": "other",
            "confidence": 3,
            "answers": item_answers(item, seed),
        }
        for item in items
    ]
    type_titles = {name: QUESTION_TYPES[name].title for name in DEMO_TYPES}
    write_json(
        out / f"OpenEnded_mscoco_{split}_questions.json", common | {"task_type": "Open-Ended", "questions": questions}
    )
    write_json(
        out / f"mscoco_{split}_annotations.json", common | {"question_types": type_titles, "annotations": annotations}
    )
    (out / split).mkdir()
    for row in sorted({item.row for item in items}):
        name = f"COCO_{split}_{row + 1:012d}.jpg"
        Image.fromarray(images[row]).convert("RGB").save(out / split / name, quality=JPEG_QUALITY, optimize=True)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="ascii")


def smudged_rows(num_images: int, seed: int) -> np.ndarray:
    """(N,) bool: which images are smudged; independent of split and digit."""
    chosen = random.Random(f"smudged-{seed}").sample(range(num_images), round(SMUDGED_FRACTION * num_images))
    return np.isin(np.arange(num_images), chosen)


def build(out: Path, seed: int = 0) -> dict:
    """Writes the world into `out` (replaced), byte for byte the same for a seed and a Pillow version."""
    greys, labels = load_digits()
    train_rows, val_rows = split_by_image(labels)
    smudged = smudged_rows(len(labels), seed)
    clean = greys / 255.0
    pixels = np.where(smudged[:, None, None], smudge(clean, np.random.default_rng(seed)), clean)
    images = (pixels * 255).round().astype(np.uint8)
    rng = random.Random(f"items-{seed}")
    train = train_items(train_rows, labels, smudged, rng)
    val = val_items(val_rows, labels, rng)

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_split(out, "train2014", train, images, seed)
    write_split(out, "val2014", val, images, seed)
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION, encoding="ascii")
    return {
        "train_questions": len(train),
        "val_questions": len(val),
        "smudged_train_images": float(smudged[train_rows].mean()),
        "smudged_val_images": float(smudged[[item.row for item in val]].mean()),
        "misled_train_items": sum(item.shown != item.digit for item in train) / len(train),
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }
