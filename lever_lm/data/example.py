"""Example, one VQA item; VqaData, the two splits; and the one place where an image becomes pixels."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from typing import BinaryIO

from lever_lm.config.schema import DataConfig
from lever_lm.data.image_decode import Undecodable, decoded, size_of
from lever_lm.utils.atomic_io import open_regular
from lever_lm.utils.errors import LeverError
from lever_lm.utils.file_hashes import DIGESTS
from lever_lm.utils.terminal import one_line


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
    """One question about one image, or about none. `answers` are the reduced forms that accuracy is scored against,
    `raw_answers` what the annotators typed; ten of each in OK-VQA. options: of a multiple choice, `answers` is one of
    them. shown: the answer as it stands where the example is an ICD, if that is none of `answers`. Ids are texts where
    they are no whole numbers."""

    question_id: int | str
    image_id: int | str | None
    question: str
    answers: tuple[str, ...]
    raw_answers: tuple[str, ...]
    image: Image | None
    options: tuple[str, ...] = ()
    shown: str = ""

    @cached_property
    def answer(self) -> str:
        """The answer shown where the example is an ICD: `shown`, or the commonest of `answers` that is not blank, the
        first of equals; "" if there is none."""
        if self.shown:
            return self.shown
        given = Counter(filter(str.strip, self.answers))
        return given.most_common(1)[0][0] if given else ""

    @cached_property
    def content(self) -> str:
        """The digest of the image's content; "" where there is no image. Raises LeverError when its file is missing."""
        return "" if self.image is None else image_digest(self.image)


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
    settings: DataConfig = field(default_factory=DataConfig)  # what the task takes from a config

    @property
    def scoring(self) -> list:
        """What of the config scores depend on, for fingerprints; nothing for the task vqa, which was the only one."""
        own = [self.settings.scale, self.settings.number_words] if self.task == "number" else []
        return [] if self.task == "vqa" else [self.task, *own]

    def examples(self, split: str) -> tuple[Example, ...]:
        """Return the examples of a split, `train` or `val`."""
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

    names = ("question_id", "image_id", "question", "answers", "raw_answers")
    columns = {name: [getattr(example, name) for example in examples] for name in names}
    images = [example.image for example in examples]
    if all(isinstance(image, StoredImage) for image in images):
        pictures = images[0].table.select([image.row for image in images])
    else:
        places = [(i.read(), None) if isinstance(i, StoredImage) else (None, i) for i in images]
        named = [dict(zip(("bytes", "path"), p, strict=True)) if any(p) else None for p in places]
        pictures = datasets.Dataset.from_dict({"image": named})
    pictures = pictures.cast_column("image", datasets.Image())
    return datasets.concatenate_datasets([datasets.Dataset.from_dict(columns), pictures], axis=1)


# ---------------------------------------------------------------------- images


def open_image(image: Image):
    """An image as upright RGB `PIL.Image`, transparency on white. Raises LeverError naming one that does not decode."""
    return _read(image, decoded)


def image_size(image: Image) -> tuple[int, int]:
    """Return the width and height of `open_image`, without decoding it. Raises LeverError naming one whose header
    cannot be read."""
    return _read(image, size_of)


def _read(image: Image, read: Callable):
    """Return read(the image's file)."""
    try:
        if isinstance(image, StoredImage):
            return read(BytesIO(image.read()))
        with _opened(image) as file:
            return read(file)
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


_SEEN: dict[str, str] = {}  # digests of image files, by path, until they are forgotten


def image_digest(image: Image) -> str:
    """Return what identifies an image's content, in a file or in a table. Raises LeverError when it is missing."""
    return _SEEN.get(image) or image_digests([image])[0] if isinstance(image, str) else image.digest


def forget_digests() -> None:
    """Look at image files anew when their digests are asked for next: they may have changed."""
    _SEEN.clear()


def image_digests(images: Sequence[Image]) -> list[str]:
    """Return what identifies the content of each image, read anew where a file has changed. Raises LeverError when one
    is missing."""
    files = [image for image in images if not isinstance(image, StoredImage)]
    try:
        of_file = dict(zip(files, DIGESTS.of(files), strict=True))
    except OSError as error:
        raise LeverError(f"cannot read the image {error.filename}: {error.strerror}") from error
    _SEEN.update(of_file)
    return [image.digest if isinstance(image, StoredImage) else of_file[image] for image in images]


def undecodable(images: Iterable[Image]) -> dict[Image, str]:
    """Return the images that do not decode, with the reason. Decodes all of them, on every core."""

    def problem(image: Image) -> str | None:
        try:
            open_image(image)
        except LeverError as error:
            return str(error)
        return None

    distinct = list(dict.fromkeys(images))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {image: why for image, why in zip(distinct, pool.map(problem, distinct), strict=True) if why}
