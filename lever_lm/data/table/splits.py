"""Which rows of a table are trained on, which evaluated on: a file each, a column, names of files, or a share."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from lever_lm.config.schema import DataConfig
from lever_lm.data.split_files import splits_named
from lever_lm.data.table.columns import fields_of, find_columns
from lever_lm.data.table.files import open_table
from lever_lm.data.table.parts import Part, Row, Table
from lever_lm.utils.errors import LeverError
from lever_lm.utils.terminal import one_line

SPLITS = ("train", "val")
SHARED = "both"  # of a row whose split is drawn when its image is known
_NO_TRAIN = "data.val_file (--val) has an evaluation split alone; name the training split, too: --data FILE, data.file"


@dataclass(frozen=True)
class Source:
    """A table, role → its column, and how its rows are split: split_of gives `train`, `val`, SHARED, or "" for a row
    that is left out; `how` says it in words."""

    table: Table
    columns: Mapping[str, str]
    split_of: Callable[[Part, Row], str]
    how: str

    def rows(self) -> Iterator[tuple[Part, Row, str]]:
        """Yield the rows, each with its part and its split. Raises LeverError where there are none."""
        wanted, image = list(dict.fromkeys(self.columns.values())), self.columns.get("image")
        row = None
        for part in self.table.parts:
            for row in part.rows([name for name in part.columns if name in wanted], image):
                yield part, row, self.split_of(part, row)
        if row is None:
            raise LeverError(f"{self.table.source} holds no row below the names of its columns; name another table")


def open_sources(config: DataConfig, *, fetch: bool = True) -> list[Source]:
    """Open the tables of a data set: that of `data.file`, and that of `data.val_file` where it has its own. fetch: as
    of open_table. Raises LeverError."""
    if not config.file:
        raise LeverError(_NO_TRAIN)
    first = open_table(config.file, "--data, data.file", fetch=fetch)
    if not config.val_file:
        return [_one_table(first, config)]
    second = open_table(config.val_file, "--val, data.val_file", fetch=fetch)
    return [_whole(first.of_split("train"), config, "train"), _whole(second.of_split("val"), config, "val")]


def _columns(table: Table, config: DataConfig) -> dict[str, str]:
    # The columns of data.question are read, too.
    return {**find_columns(table, config), **{f"{{{name}}}": name for name in fields_of(config.question)}}


def _whole(table: Table, config: DataConfig, split: str) -> Source:
    return Source(table, _columns(table, config), lambda part, row: split, f"{split}: {table.source}")


def _one_table(table: Table, config: DataConfig) -> Source:
    columns = _columns(table, config)
    if by_word := _words(table, columns.get("split", "")):
        column = columns["split"]
        named = ", ".join(f"{one_line(word)!r} is {split}" for word, split in by_word.items())
        how = f"by the column {one_line(column)}: {named}; rows of other words are left out"

        def of_word(part: Part, row: Row) -> str:
            return "train" if row.problem else by_word.get(str(row.cells.get(column)), "")

        return Source(table, columns, of_word, how)
    if {part.split for part in table.parts} >= {*SPLITS}:
        return Source(table, columns, lambda part, row: part.split, "by the names of the files")
    how = f"by image: {config.val_share:.0%} of them are evaluated on (data.val_share, data.split_seed)"
    return Source(table, columns, lambda part, row: SHARED, how)


def _words(table: Table, column: str) -> dict[str, str]:
    """Return word → split of a column of splits; {} where it does not say both."""
    if not column:
        return {}
    found = dict.fromkeys(str(row.cells.get(column)) for part in table.parts for row in part.rows([column], None))
    named = splits_named([word for word in found if len(word) < 100], f"{table.source}, column {column}")
    by_word = {word: split for split, words in named.items() for word in words}
    return by_word if {*by_word.values()} == {*SPLITS} else {}


def drawn(images: Iterable[str], config: DataConfig) -> set[str]:
    """Return the images, by what identifies each, that are evaluated on: the same ones whatever the order of the rows.
    Raises LeverError where there are too few."""
    distinct = sorted(set(images), key=lambda name: hashlib.sha256(f"{config.split_seed}:{name}".encode()).digest())
    if len(distinct) < 2:
        raise LeverError(
            f"{config.file} is about {len(distinct)} image{'s' * (len(distinct) != 1)} (without images: questions): "
            "too few to train on some and evaluate on others; name a table for each: --data FILE --val FILE"
        )
    return set(distinct[: min(len(distinct) - 1, max(1, round(config.val_share * len(distinct))))])
