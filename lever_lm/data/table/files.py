"""The files of a table: JSON lines, a JSON list, CSV, TSV or parquet; one file, a folder of one kind, a hub copy.

Rows come one by one, in the order of the file names. CSV cells are texts as they stand: `007`, `NA` and `1.0` too.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lever_lm.data.example import StoredImage
from lever_lm.data.parquet_files import hub_splits, images_of, place, quiet, read_parquet, readable
from lever_lm.data.split_files import splits_named
from lever_lm.utils.errors import LeverError
from lever_lm.utils.hub import cached_dataset
from lever_lm.utils.paths import HUB_PREFIX, asset_path
from lever_lm.utils.safe_parse import LINE_LIMIT, lines, loads, read_bytes
from lever_lm.utils.terminal import one_line, shown

SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv", ".json")
_BATCH = 1000  # rows of parquet that are made Python values at once
_KINDS = "a .jsonl, .csv, .tsv or .parquet file, a folder of these, or hub:OWNER/NAME"


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


def open_table(source: str, option: str) -> Table:
    """Open a table. option: what names it, for messages. Raises LeverError with the file, what was found and the
    mend."""
    quiet()
    root, files = find_files(source, option)
    if not files:
        return _from_datasets(source, option)
    labels = [str(file.relative_to(root)) for file in files]
    named = splits_named(labels, str(root)) if len(files) > 1 or root != files[0].parent else {}
    if not any(named.values()):
        named = {"": labels}
    groups = [(split, [root / label for label in names]) for split, names in named.items() if names]
    if files[0].suffix.lower() == ".parquet":
        parts = [_parquet_part(split, *read_parquet(group, root, "train"), root) for split, group in groups]
    else:
        parts = [_text_part(split, file, label_of(file, root)) for split, group in groups for file in group]
    taken = {label for names in named.values() for label in names}
    return Table(source, tuple(parts), tuple(label for label in labels if label not in taken))


def label_of(file: Path, root: Path) -> str:
    """Return the name of a file in messages: below its folder if there are several."""
    return one_line(str(file.relative_to(root.parent) if file.parent != root else file))


def find_files(source: str, option: str) -> tuple[Path, list[Path]]:
    """Return the files of a table and the folder above them; no files where it is a copy on the hub that is not in the
    hub's cache. Raises LeverError."""
    if source.startswith(HUB_PREFIX):
        return _cached(source)
    path = asset_path(source)
    if path.is_dir():
        files = _of_one_kind(path, source, option)
        return path, files
    if not path.is_file():
        found = "is not there" if not path.exists() else "is no regular file"
        raise LeverError(f"{source} {found}; name {_KINDS} ({option})")
    if path.suffix.lower() not in SUFFIXES:
        raise LeverError(f"{source} ends in {shown(path.suffix)}; name {_KINDS} ({option})")
    return path.parent, [path]


def hub_address(source: str) -> tuple[str, str]:
    """Return the repository of `hub:OWNER/NAME/PART`, and the folder or file in it. Raises LeverError."""
    owner, _, rest = source.removeprefix(HUB_PREFIX).partition("/")
    name, _, within = rest.partition("/")
    if not owner or not name or ".." in Path(within).parts or within.startswith("/"):
        raise LeverError(
            f"{shown(source)} names no data set of the hub; expected hub:OWNER/NAME or hub:OWNER/NAME/PART"
        )
    return f"{owner}/{name}", within.strip("/")


def _cached(source: str) -> tuple[Path, list[Path]]:
    repository, within = hub_address(source)
    if Path(within).suffix.lower() in SUFFIXES:
        snapshot = cached_dataset(repository, [within])
        found = snapshot is not None and (snapshot / within).is_file()
        return (snapshot / within).parent if found else Path(), [snapshot / within] if found else []
    for suffix in SUFFIXES[:-1]:  # the .json files of a repository are about it
        snapshot = cached_dataset(repository, [f"{within}/*{suffix}" if within else f"*{suffix}"])
        if snapshot is not None and (files := _listed(snapshot / within, suffix)):
            return snapshot / within, files
    return Path(), []


def _listed(folder: Path, suffix: str) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() == suffix and not path.is_dir())
    return sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts))


def _of_one_kind(folder: Path, source: str, option: str) -> list[Path]:
    kinds = [files for suffix in SUFFIXES if (files := _listed(folder, suffix))]
    if not kinds:
        raise LeverError(f"{source} holds no table; name {_KINDS} ({option})")
    if len(kinds) > 1 and kinds[1][0].suffix != ".json":
        names = " and ".join(one_line(str(files[0].relative_to(folder))) for files in kinds)
        raise LeverError(f"{source} holds tables of several kinds, {names}; name the file that is meant ({option})")
    return kinds[0]


# ---------------------------------------------------------------------- parquet


def _from_datasets(source: str, option: str) -> Table:
    repository, within = hub_address(source)
    splits = hub_splits(repository, f"or name a file or folder of it ({option})", within)
    named = splits_named(list(splits), source)
    if not any(named.values()):
        named = {"": list(splits)}
    parts = [_parquet_part(split, splits[name], [], None) for split, names in named.items() for name in names]
    taken = {name for names in named.values() for name in names}
    return Table(source, tuple(parts), tuple(name for name in splits if name not in taken))


def _parquet_part(split: str, table, files: list[tuple[str, int]], folder: Path | None) -> Part:
    rows = partial(_parquet_rows, table, ", ".join(name for name, _ in files))
    return Part(split, folder, True, tuple(table.column_names), rows, lambda number: place(number, files))


def _parquet_rows(table, what: str, columns: Sequence[str], image: str | None) -> Iterator[Row]:
    with readable(f"the table {what}"):
        images, found = images_of(table, image) if image else (None, [])
        texts = [name for name in columns if name != image]
        batches = table.select_columns(texts).iter(_BATCH) if texts else ()
        yield from _numbered(batches, texts, images, found, len(table), image)


def _numbered(batches, texts: list[str], images, found: list[dict], count: int, image: str | None) -> Iterator[Row]:
    rows = (dict(zip(texts, row, strict=True)) for batch in batches for row in zip(*map(batch.get, texts), strict=True))
    for number, cells in enumerate(rows if texts else ({} for _ in range(count))):
        if image:
            digest, where = found[number]["digest"], found[number]["place"]
            cells[image] = StoredImage(digest, number, images) if digest else where or None
        yield Row(number, cells)


# ---------------------------------------------------------------------- texts


def _text_part(split: str, file: Path, name: str) -> Part:
    suffix = file.suffix.lower()
    read, columns = {".jsonl": _json_lines, ".json": _json_list}.get(suffix, _csv)(file, name)
    unit = "row" if suffix == ".json" else "line"

    def rows(wanted: Sequence[str], image: str | None) -> Iterator[Row]:
        del wanted, image  # all of a row is read at once
        return read()

    return Part(split, file.parent, suffix not in (".csv", ".tsv"), columns, rows, lambda n: f"{name}, {unit} {n}")


Read = tuple[Callable[[], Iterator[Row]], tuple[str, ...]]


def _json_lines(file: Path, name: str) -> Read:
    read = partial(_rows_of_lines, file, name)
    columns = dict.fromkeys(key for row in read() for key in row.cells)
    if not columns:
        first = next((row.problem for row in read()), "it is empty")
        raise LeverError(f"{name} holds no row: {first}; expected a JSON object on each line")
    return read, tuple(columns)


def _rows_of_lines(file: Path, name: str) -> Iterator[Row]:
    long = 0  # the number of a line that was too long: what is left of it is no line
    try:
        for line in lines(file, LINE_LIMIT):
            if not line.text.strip() or line.number == long:
                continue
            problem, cells = "", {}
            if not line.whole:
                problem, long = f"it is longer than {LINE_LIMIT >> 20} MiB", line.number
            elif "\ufffd" in line.text:
                problem = "it holds what is no UTF-8; save the file as UTF-8"
            else:
                problem, cells = _object(line.text)
            yield Row(line.number, cells, problem)
    except OSError as error:
        raise _unreadable(name, error) from error


def _object(text: str) -> tuple[str, dict]:
    try:
        cells = loads(text, nan=True)
    except ValueError as error:
        return f"it is no JSON: {shown(str(error), 100)}", {}
    return ("", cells) if isinstance(cells, dict) else (f"it is no JSON object, found {shown(cells)}", {})


def _json_list(file: Path, name: str) -> Read:
    try:
        entries = loads(read_bytes(file), nan=True)
    except OSError as error:
        raise _unreadable(name, error) from error
    except ValueError as error:
        raise LeverError(f"{name} is no JSON: {shown(str(error), 100)}; JSON lines end in .jsonl") from error
    if not isinstance(entries, list) or not entries:
        raise LeverError(f"{name} must hold a list of rows, found {shown(entries)}; name {_KINDS}")
    rows = [
        Row(i, e) if isinstance(e, dict) else Row(i, {}, f"it is no object, found {shown(e)}")
        for i, e in enumerate(entries)
    ]
    return lambda: iter(rows), tuple(dict.fromkeys(key for row in rows for key in row.cells))


def _csv(file: Path, name: str) -> Read:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    header = next(_records(file, name, delimiter), (0, []))[1]
    if not header:
        raise LeverError(f"{name} is empty; its first line must name the columns")
    if len(header) == 1 and ";" in header[0]:
        raise LeverError(f"{name} is separated by ';', found the one column {shown(header[0])}; save it with commas")
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise LeverError(f"{name} names a column twice: {shown(repeated[0])}; its first line must name the columns")
    return partial(_rows_of_csv, file, name, delimiter, header), tuple(header)


def _rows_of_csv(file: Path, name: str, delimiter: str, header: list[str]) -> Iterator[Row]:
    records = _records(file, name, delimiter)
    next(records)
    for number, record in records:
        if len(record) == len(header):
            yield Row(number, dict(zip(header, record, strict=True)))
        elif record:
            yield Row(number, {}, f"it has {len(record)} cells, the first line names {len(header)} columns")


def _records(file: Path, name: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a CSV file, each with the number of its first line. Raises LeverError with that number."""
    start = 1
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            reader = csv.reader(_bounded(opened), delimiter=delimiter, strict=True)
            for record in reader:
                yield start, record
                start = reader.line_num + 1
    except OSError as error:
        raise _unreadable(name, error) from error
    except UnicodeDecodeError as error:
        raise LeverError(f"{name}, line {start} or soon after: it is no UTF-8; save the file as UTF-8") from error
    except csv.Error as error:
        raise LeverError(f"{name}, line {start}: {error}; mend its quotes, or save it as .jsonl") from error


def _bounded(opened) -> Iterator[str]:
    while line := opened.readline(LINE_LIMIT):
        if len(line) == LINE_LIMIT and not line.endswith("\n"):
            raise csv.Error(f"a line of more than {LINE_LIMIT >> 20} MiB")
        yield line


def _unreadable(name: str, error: OSError) -> LeverError:
    return LeverError(f"cannot read {name}: {error.strerror or error}")
