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
    pairs = []
    for answer in answers:
        raw = answer
        if item.type_name == "polygon" and rng.random() < ARTICLE_RATE:
            raw = ("an " if answer[0] in "aeiou" else "a ") + answer
        pairs.append((answer, raw))
    return annotation_entries(pairs)


def annotation_entries(pairs: list[tuple[str, str]]) -> list[dict]:
    """The `answers` of an annotation from ten (answer, raw_answer)."""
    return [
        {"answer_id": position, "answer": answer, "raw_answer": raw, "answer_confidence": "yes"}
        for position, (answer, raw) in enumerate(pairs, start=1)
    ]


def write_split(out: Path, split: str, description: str, titles: dict[str, str], asked: list[tuple]) -> None:
    """The questions file and the annotations file of one split; asked: (image_id, question_id, question, question type,
    `answers`)."""
    info = {"description": description, "version": "1.0"}
    common = {"info": info, "license": LICENSE, "data_type": "mscoco", "data_subtype": split}
    questions = [{"image_id": image, "question": text, "question_id": number} for image, number, text, _, _ in asked]
    annotations = [
        {
            "image_id": image,
            "question_id": number,
            "question_type": kind,
            "answer_type": "other",
            "confidence": 3,
            "answers": answers,
        }
        for image, number, _, kind, answers in asked
    ]
    write_json(
        out / f"OpenEnded_mscoco_{split}_questions.json", common | {"task_type": "Open-Ended", "questions": questions}
    )
    write_json(
        out / f"mscoco_{split}_annotations.json", common | {"question_types": titles, "annotations": annotations}
    )


def write_digits(out: Path, split: str, items: list[Item], images: np.ndarray, seed: int) -> None:
    """One split of this world with its images, (N, P, P) uint8."""
    titles = {name: QUESTION_TYPES[name].title for name in DEMO_TYPES}
    asked = [(i.image_id, i.question_id, i.question, i.type_name, item_answers(i, seed)) for i in items]
    write_split(out, split, "lever_lm digits: knowledge questions about handwritten digits", titles, asked)
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


def all_items(labels: np.ndarray, smudged: np.ndarray, seed: int) -> tuple[list[Item], list[Item]]:
    """The items of both splits, train and val."""
    train_rows, val_rows = split_by_image(labels)
    rng = random.Random(f"items-{seed}")
    return train_items(train_rows, labels, smudged, rng), val_items(val_rows, labels, rng)


def build(out: Path, seed: int = 0) -> dict:
    """Writes the world into `out` (replaced), byte for byte the same for a seed and a Pillow version."""
    greys, labels = load_digits()
    smudged = smudged_rows(len(labels), seed)
    clean = greys / 255.0
    pixels = np.where(smudged[:, None, None], smudge(clean, np.random.default_rng(seed)), clean)
    images = (pixels * 255).round().astype(np.uint8)
    train, val = all_items(labels, smudged, seed)

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_digits(out, "train2014", train, images, seed)
    write_digits(out, "val2014", val, images, seed)
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION, encoding="ascii")
    return {
        "train_questions": len(train),
        "val_questions": len(val),
        "smudged_train_images": float(smudged[[item.row for item in train]].mean()),
        "smudged_val_images": float(smudged[[item.row for item in val]].mean()),
        "misled_train_items": sum(item.shown != item.digit for item in train) / len(train),
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }
