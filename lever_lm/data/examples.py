"""One VQA item, the table of them, and the one place where an image file becomes pixels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lever_lm.errors import LeverError


@dataclass(frozen=True)
class Example:
    """One question about one image. `answers` are the reduced forms that accuracy is scored against, `raw_answers`
    what the annotators typed; ten of each in OK-VQA. `image` is a path."""

    question_id: int
    image_id: int
    question: str
    answers: tuple[str, ...]
    raw_answers: tuple[str, ...]
    image: str

    @cached_property
    def answer(self) -> str:
        """The answer shown when the example is an ICD: the commonest, the first of equals."""
        return Counter(self.answers).most_common(1)[0][0]


@dataclass(frozen=True)
class VqaData:
    """The two splits as `datasets.Dataset`s (columns of Example; `image` decodes lazily) and their fingerprint."""

    name: str
    train: "datasets.Dataset"  # noqa: F821 - imported late
    val: "datasets.Dataset"  # noqa: F821
    fingerprint: str
    skipped: tuple[str, ...] = ()

    @cached_property
    def train_examples(self) -> tuple[Example, ...]:
        """Rows of the training split; the row number is an example's id in rollout files."""
        return to_examples(self.train)

    @cached_property
    def val_examples(self) -> tuple[Example, ...]:
        """Rows of the evaluation split."""
        return to_examples(self.val)


def to_dataset(examples: Sequence[Example]):
    """Examples → `datasets.Dataset` whose `image` column decodes on access, never before."""
    import datasets

    columns = {
        "question_id": [example.question_id for example in examples],
        "image_id": [example.image_id for example in examples],
        "question": [example.question for example in examples],
        "answers": [list(example.answers) for example in examples],
        "raw_answers": [list(example.raw_answers) for example in examples],
        "image": [example.image for example in examples],
    }
    text, number = datasets.Value("string"), datasets.Value("int64")
    features = datasets.Features(
        question_id=number,
        image_id=number,
        question=text,
        answers=datasets.List(text),
        raw_answers=datasets.List(text),
        image=datasets.Image(),
    )
    return datasets.Dataset.from_dict(columns, features=features)


def to_examples(dataset) -> tuple[Example, ...]:
    """`datasets.Dataset` → Examples; no image is decoded."""
    import datasets

    rows = dataset.cast_column("image", datasets.Image(decode=False)).to_list()
    return tuple(
        Example(
            question_id=row["question_id"],
            image_id=row["image_id"],
            question=row["question"],
            answers=tuple(row["answers"]),
            raw_answers=tuple(row["raw_answers"]),
            image=row["image"]["path"],
        )
        for row in rows
    )


def open_image(path: str | Path):
    """The image file as an upright RGB `PIL.Image`. Raises LeverError naming the file when it cannot be decoded."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise LeverError(f"image not found: {path} (check COCO_PATH or data.coco_path)") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise LeverError(
            f"cannot decode the image {path}: {error}. Replace the file, or go on without such examples: "
            "--set data.skip_bad_examples=true"
        ) from error
