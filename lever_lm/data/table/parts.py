"""A table as its parts: files of one split each, whose rows come one by one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lever_lm.utils.errors import LeverError

SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv", ".json")
KINDS = "a .jsonl, .csv, .tsv or .parquet file, a folder of these, or hub:OWNER/NAME"


class Row(NamedTuple):
    """A row of a table: its number in the file, and its cells by column; where it is broken, why instead. An image
    inside a parquet file is a StoredImage."""

    number: int
    cells: dict
    problem: str = ""


@dataclass(frozen=True)
class Part:
    """Some files of a table that are of one split, which is "" where no name says one.

    folder: where images named by path are. typed: a number in a cell is a number, not its text. rows(columns, image):
    yields each Row with these columns, and the image in the column of that name.
    """

    split: str
    folder: Path | None
    typed: bool
    columns: tuple[str, ...]
    rows: Callable[[Sequence[str], str | None], Iterator[Row]]
    where: Callable[[int], str]  # the number of a row → its file and line, for messages


@dataclass(frozen=True)
class Table:
    """A source as the user wrote it, its parts, and the names of files that belong to no split."""

    source: str
    parts: tuple[Part, ...]
    left_out: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """The names of the columns, in order."""
        return list(dict.fromkeys(name for part in self.parts for name in part.columns))

    def of_split(self, split: str) -> "Table":
        """Return the table of the parts that are named after a split, or of all where none is named after any."""
        named = tuple(part for part in self.parts if part.split == split)
        if not named and any(part.split for part in self.parts):
            raise LeverError(
                f"{self.source}: no file of the {split} split in it; name the file itself "
                f"({'--data, data.file' if split == 'train' else '--val, data.val_file'})"
            )
        return Table(self.source, named or self.parts, self.left_out)
