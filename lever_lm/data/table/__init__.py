"""A data set in tables of the user's own: `data.file`, `data.val_file`. One row is one question about at most one
image."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from lever_lm.config.schema import DataConfig
from lever_lm.data.example import Example, image_digest
from lever_lm.data.rows import BadExamples, Pose, Unusable, as_it_is
from lever_lm.data.table.cells import Cells
from lever_lm.data.table.images import ImageTable, PlacedImages
from lever_lm.data.table.splits import SHARED, SPLITS, Source, drawn, open_sources
from lever_lm.data.table.view import TableView, view
from lever_lm.utils.errors import UsageError
from lever_lm.utils.terminal import shown

__all__ = ["TableView", "is_table", "load_tables", "view"]

Loaded = dict[str, tuple[list[Example], str]]


def is_table(config: DataConfig) -> bool:
    """Return whether a config names tables rather than official files or parquet copies of these."""
    return bool(config.file or config.val_file)


def load_tables(config: DataConfig, bad: Mapping[str, BadExamples], pose: Pose = as_it_is) -> Loaded:
    """Load the examples of both splits (`train`, `val`), and the fingerprint of each: of its rows in their order,
    wherever they are. Images are looked up, not decoded.

    bad: where the unusable rows of a split go; those of a table whose split is yet to be drawn go to `train`. pose: as
    of load_dataset. Raises LeverError with file, row, what was found and the mend.
    """
    if len({option.strip().casefold() for option in config.options}) < len(config.options):
        raise UsageError(f"data.options holds an option twice: {', '.join(config.options)}")
    loading = _Loading(config, bad, pose)
    for source in open_sources(config):
        loading.read(source)
    return {split: (found, _stamp(found)) for split, found in loading.splits().items()}


@dataclass
class _Loading:
    """The examples so far, by split; and of those whose split is yet to be drawn, the image of each."""

    config: DataConfig
    bad: Mapping[str, BadExamples]
    pose: Pose
    found: dict[str, list[Example]] = field(default_factory=lambda: {split: [] for split in (*SPLITS, SHARED)})
    about: list[str] = field(default_factory=list)
    ids: dict[int | str, str] = field(default_factory=dict)  # id → the table that has it
    image_tables: dict[str, ImageTable] = field(default_factory=dict)  # by split
    rows: int = 0

    def read(self, source: Source) -> None:
        """Add the examples of a table."""
        cells: dict[bool, Cells] = {}
        placed = None
        if not self.config.image_table:
            stop_early = not self.bad["train"].skip
            placed = PlacedImages(source.table, source.columns.get("image", ""), self.config, stop_early=stop_early)
        for part, row, split in source.rows():
            number, self.rows = self.rows, self.rows + 1
            if not split:
                continue
            try:
                if row.problem:
                    raise Unusable(row.problem)
                if part.typed not in cells:
                    cells[part.typed] = Cells(self.config, source.columns, typed=part.typed)
                image = (placed or self._image_table(split, source)).of(part, row.cells)
                self._add(cells[part.typed].example(row.cells, image, number), split, source)
            except Unusable as error:
                self.bad["train" if split == SHARED else split].add(f"{part.where(row.number)}: {error}")

    def _image_table(self, split: str, source: Source) -> ImageTable:
        """Return the images of a split; one table has those of both where its address says nothing of a split."""
        name = split if "{split}" in self.config.image_table and split != SHARED else "train"
        if name not in self.image_tables:
            column, stop_early = source.columns.get("image_id", ""), not self.bad["train"].skip
            self.image_tables[name] = ImageTable(self.config, name, column, stop_early=stop_early)
        return self.image_tables[name]

    def _add(self, example: Example, split: str, source: Source) -> None:
        if (earlier := self.ids.get(example.question_id)) is not None:
            problem = f"an earlier row has its id, {shown(example.question_id)}"
            if earlier != source.table.source:
                problem = (
                    f"its id {shown(example.question_id)} is that of a row in {earlier}, too; give each question its "
                    "own, or count the rows: --set data.columns.id=''"
                )
            raise Unusable(problem)
        posed = self.pose(example)
        self.ids[example.question_id] = source.table.source
        self.found[split].append(posed)
        if split == SHARED:
            # Not `content`, which each example would keep: a million rows are about a thousand images.
            image = example.image
            self.about.append(f"without an image: {example.question}" if image is None else image_digest(image))

    def splits(self) -> dict[str, list[Example]]:
        """Return the examples of each split."""
        if self.found[SHARED]:
            chosen = drawn(self.about, self.config)
            for example, image in zip(self.found[SHARED], self.about, strict=True):
                self.found["val" if image in chosen else "train"].append(example)
        return {split: self.found[split] for split in SPLITS}


def _stamp(examples: list[Example]) -> str:
    """Return the fingerprint of a split's rows, as they are asked and shown; its images are no part of it, nor how
    answers are scored."""
    digest = hashlib.sha256()
    for e in examples:
        row = (e.question_id, e.image_id, e.question, e.answers, e.raw_answers, e.options, e.shown)
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()[:16]
