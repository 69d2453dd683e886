"""The `digits_sets` world: questions that one demonstration cannot answer, about the images of `digits`.

The answer is a word of two syllables (codes.py): the first belongs to the style that the question asks for, the second
to the digit. No two training examples share both, and no question of the evaluation shares both with any of them, so
that nobody has been shown an answer before: a query needs a demonstration in its style and one of its digit. Syllables
of training answers are wrong now and then, mostly where the image is smudged.
"""

import random
import shutil
from pathlib import Path

import numpy as np

from assets_src import codes
from assets_src.digit_images import load_digits
from assets_src.knowledge import NUM_ANNOTATORS
from assets_src.world import DISSENTERS, all_items, annotation_entries, smudged_rows, write_split

VAL_CELLS_PER_DIGIT = 20  # styles of each digit that are asked in the evaluation alone
WRONG_IF_SMUDGED, WRONG_IF_CLEAN = 0.35, 0.05  # of a syllable
SLIP = 0.03  # of an annotator, in a syllable
TRAIN_WORDINGS = codes.NUM_WORDINGS - 1
DESCRIPTION = "lever_lm digits_sets: words of two syllables, of a style and of a handwritten digit"
ATTRIBUTION = """# Attribution

Questions and annotators' answers are ours and made by a program (`scripts/build_assets.py sets`); some answers are
wrong on purpose. They are about the images of `digits`, whose ATTRIBUTION.md says where these come from, and are under
CC BY 4.0 as well.
"""


def ten_answers(right: int, shown: int, digits: list[int], rng: random.Random) -> list[dict]:
    """The `answers` entries of an item: what most annotators wrote, with a slip here and there; the right word from two
    where the others are misled."""
    words = [codes.misled(shown, SLIP, digits, rng) for _ in range(NUM_ANNOTATORS)]
    if shown != right:
        words[-DISSENTERS:] = [right] * DISSENTERS
        rng.shuffle(words)
    return annotation_entries([(codes.ANSWERS[word],) * 2 for word in words])


def build(out: Path, seed: int = 0) -> dict:
    """Writes the world into `out` (replaced), byte for byte the same for a seed."""
    _, labels = load_digits()
    smudged, rng = smudged_rows(len(labels), seed), random.Random(f"sets-{seed}")
    first, second = codes.world_code(seed)
    held_out = {digit: set(rng.sample(range(codes.NUM_STYLES), VAL_CELLS_PER_DIGIT)) for digit in range(10)}
    splits, wrong = {"train2014": [], "val2014": []}, 0
    train_rows, val_rows = (sorted({item.row for item in items}) for items in all_items(labels, smudged, seed))
    for digit in range(10):
        styles = sorted(set(range(codes.NUM_STYLES)) - held_out[digit])
        rows = rng.sample([row for row in train_rows if labels[row] == digit], len(styles))
        splits["train2014"] += zip(rows, styles, strict=True)
    for row in val_rows:
        splits["val2014"].append((row, rng.choice(sorted(held_out[int(labels[row])]))))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    titles = {style: f"Words in {style} style" for style in codes.STYLES}
    for split, cells in splits.items():
        asked = []
        for row, style in sorted(cells):
            right = shown = codes.answer_index(first[style], second[int(labels[row])])
            wording = rng.randrange(codes.NUM_WORDINGS)
            if split == "train2014":
                wording = rng.randrange(TRAIN_WORDINGS)
                shown = codes.misled(right, WRONG_IF_SMUDGED if smudged[row] else WRONG_IF_CLEAN, second, rng)
                wrong += shown != right
            answers = ten_answers(right, shown, second, rng)
            asked.append((row + 1, (row + 1) * 10, codes.question(style, wording), codes.STYLES[style], answers))
        write_split(out, split, DESCRIPTION, titles, asked)
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION, encoding="ascii")
    return {
        "train_questions": len(splits["train2014"]),
        "val_questions": len(val_rows),
        "misled_train_items": wrong / len(splits["train2014"]),
        "smudged_train_images": float(np.mean([smudged[row] for row, _ in splits["train2014"]])),
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }
