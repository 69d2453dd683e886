"""One VQA item, the table of them, and the one place where an image becomes pixels."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from io import BytesIO
from typing import BinaryIO

from lever_lm.data.image_decode import Undecodable, decoded
from lever_lm.utils.atomic_io import open_regular
from lever_lm.utils.errors import LeverError
from lever_lm.utils.file_hashes import DIGESTS
from lever_lm.utils.terminal import one_line, shown

DIGITS = 16  # of its SHA-256: what identifies it


@dataclass(frozen=True)
class StoredImage:
    """An image inside a table on disk: its bytes are read when asked for. Equal to any other of the same content."""

    digest: str
    row: int = field(compare=False)
    table: "datasets.Dataset" = field(compare=False, repr=False)  # noqa: F821 - imported late

    def read(self) -> bytes:
        """The image file's bytes."""
        return self.table[self.row]["image"]["bytes"]

    def __str__(self) -> str:
        return f"in row {self.row} of the parquet files"


Image = str | StoredImage  # a path, or where in a table


@dataclass(frozen=True)
class Example:
    """One question about one image. `answers` are the reduced forms that accuracy is scored against, `raw_answers`
    what the annotators typed; ten of each in OK-VQA."""

    question_id: int
    image_id: int
    question: str
    answers: tuple[str, ...]
    raw_answers: tuple[str, ...]
    image: Image

    @cached_property
    def answer(self) -> str:
        """The answer shown where the example is an ICD: the commonest that is not blank, the first of equals; "" if
        there is none."""
        given = Counter(filter(str.strip, self.answers))
        return given.most_common(1)[0][0] if given else ""

    @cached_property
    def content(self) -> str:
        """The digest of the image's content. Raises LeverError when the image is not there."""
        return image_digest(self.image)


@dataclass(frozen=True)
class VqaData:
    """The two splits and their fingerprint. The row number of a training example is its id in rollout files."""

    name: str
    train_examples: tuple[Example, ...]
    val_examples: tuple[Example, ...]
    fingerprint: str
    skipped: tuple[str, ...] = ()
    stamps: tuple[str, ...] = ()  # the fingerprint of each split
    task: str = "vqa"  # how answers are scored: a name of tasks.TASKS

    def examples(self, split: str) -> tuple[Example, ...]:
        """Those of a split, `train` or `val`."""
        return {"train": self.train_examples, "val": self.val_examples}[split]

    def stamp(self, split: str) -> str:
        """The fingerprint of a split (`train`, `val`): of its questions, answers and images."""
        return self.stamps[("train", "val").index(split)] if self.stamps else self.fingerprint

    @cached_property
    def train(self) -> "datasets.Dataset":  # noqa: F821
        """The training split as a table of Example's columns, whose images are decoded on access."""
        return to_dataset(self.train_examples)

    @cached_property
    def val(self) -> "datasets.Dataset":  # noqa: F821
        """The evaluation split as such a table."""
        return to_dataset(self.val_examples)


def to_dataset(examples: Sequence[Example]):
    """Examples → `datasets.Dataset` whose `image` column decodes on access, never before."""
    import datasets

    text, number = datasets.Value("string"), datasets.Value("int64")
    features = datasets.Features(
        question_id=number,
        image_id=number,
        question=text,
        answers=datasets.List(text),
        raw_answers=datasets.List(text),
    )
    columns = {
        "question_id": [example.question_id for example in examples],
        "image_id": [example.image_id for example in examples],
        "question": [example.question for example in examples],
        "answers": [list(example.answers) for example in examples],
        "raw_answers": [list(example.raw_answers) for example in examples],
    }
    images = [example.image for example in examples]
    column = datasets.Image()
    stored = [isinstance(image, StoredImage) for image in images]
    if all(stored) and stored:
        table = images[0].table.select([image.row for image in images]).cast_column("image", column)
        return datasets.concatenate_datasets([datasets.Dataset.from_dict(columns, features=features), table], axis=1)
    features["image"] = column
    images = [{"bytes": image.read()} if own else image for image, own in zip(images, stored, strict=True)]
    return datasets.Dataset.from_dict({**columns, "image": images}, features=features)


# ---------------------------------------------------------------------- images


def open_image(image: Image):
    """An image as upright RGB `PIL.Image`, transparency on white. Raises LeverError naming one that does not decode."""
    try:
        if isinstance(image, StoredImage):
            return decoded(BytesIO(image.read()))
        with _opened(image) as file:
            return decoded(file)
    except Undecodable as error:
        raise LeverError(
            f"cannot decode the image {one_line(str(image))}: {one_line(str(error))}. Replace the file, or go on "
            "without such examples: --skip-bad-examples"
        ) from error


def _opened(image: str) -> BinaryIO:
    try:
        return open_regular(image, "the image")
    except LeverError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise LeverError(f"image not found: {one_line(str(image))} (check COCO_PATH or data.coco_path)") from error
        raise


@lru_cache(maxsize=200_000)
def image_digest(image: Image) -> str:
    """What identifies an image's content, whether in a file or in a table. Raises LeverError when it is not there."""
    return image_digests([image])[0]


def image_digests(images: Sequence[Image]) -> list[str]:
    """What identifies the content of each image. Raises LeverError when one is not there."""
    files = [image for image in images if not isinstance(image, StoredImage)]
    try:
        of_file = dict(zip(files, DIGESTS.of(files), strict=True))
    except OSError as error:
        raise LeverError(f"cannot read the image {error.filename}: {error.strerror}") from error
    return [image.digest if isinstance(image, StoredImage) else of_file[image] for image in images]


def bytes_digest(content: bytes) -> str:
    """Hex digits that identify a file's content."""
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def undecodable(images: Iterable[Image]) -> dict[Image, str]:
    """Those of the images that do not decode, with the reason. Decodes them all, on every core."""

    def problem(image: Image) -> str | None:
        try:
            open_image(image)
        except LeverError as error:
            return str(error)
        return None

    distinct = list(dict.fromkeys(images))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {image: why for image, why in zip(distinct, pool.map(problem, distinct), strict=True) if why}


# ---------------------------------------------------------------------- what is wrong with a data file

# What Qwen2.5-VL's tokenizer takes for the end of a turn or the place of an image wherever it stands, and half
# characters, which no tokenizer takes.
_UNFIT = re.compile(
    r"<\|(?:im_start|im_end|vision_start|vision_end|vision_pad|image_pad|video_pad|endoftext)\|>|[\ud800-\udfff]"
)


def unfit(texts: Iterable[str]) -> str | None:
    """What among the texts can stand in no prompt, for a message; None where all can."""
    found = _UNFIT.search("\n".join(texts))
    if found is None:
        return None
    why = "a token of the LVLM's own" if found[0].startswith("<") else "half a character, no UTF-8"
    return f"{shown(found[0])} can stand in no question or answer: it is {why}"


def whole_id(value) -> int | None:
    """The id of a question or an image, 0 to 2**63 - 1: from a whole number, from one that pandas made a float, or from
    a text of digits. None for all else."""
    if isinstance(value, float) and value.is_integer() and value < 2**53:
        value = int(value)
    text = str(value)
    sound = text.isascii() and text.isdigit() and len(text) < 20
    return int(text) if sound and int(text) < 2**63 else None


def refuse_or_skip(problem: str, skip_bad: bool, skipped: list[str]) -> None:
    """Raise LeverError for a bad example, or count it among the skipped ones."""
    if not skip_bad:
        raise LeverError(f"{problem}; to go on without such examples: --skip-bad-examples")
    skipped.append(problem)


def unique(where, rows: list[dict], skip_bad: bool, skipped: list[str]) -> list[dict]:
    """The rows, the first of those with the same question_id."""
    for question_id, count in Counter(row["question_id"] for row in rows).items():
        if count > 1:
            problem = f"{where}: question_id {question_id} appears {count} times, expected once"
            refuse_or_skip(problem, skip_bad, skipped)
    first: dict = {}
    for row in rows:
        first.setdefault(row["question_id"], row)
    return list(first.values())
