"""Tables that are texts: JSON lines, a JSON list, CSV, TSV. CSV cells stay as they stand: `007`, `NA` and `1.0` too."""

import csv
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from lever_lm.data.table.parts import KINDS, Part, Row
from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_parse import LINE_LIMIT, lines, loads, read_bytes
from lever_lm.utils.terminal import one_line, shown

Read = tuple[Callable[[], Iterator[Row]], tuple[str, ...]]  # how to read the rows, and the columns


def text_part(split: str, file: Path) -> Part:
    """Return a file that is a text as a part of a table. Raises LeverError where it is no table."""
    name = one_line(str(file))
    suffix = file.suffix.lower()
    read, columns = {".jsonl": _json_lines, ".json": _json_list}.get(suffix, _csv)(file, name)
    unit = "row" if suffix == ".json" else "line"

    def rows(wanted: Sequence[str], image: str | None) -> Iterator[Row]:
        del wanted, image  # all of a row is read at once
        return read()

    return Part(split, file.parent, suffix not in (".csv", ".tsv"), columns, rows, lambda n: f"{name}, {unit} {n}")


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
        raise LeverError(f"{name} must hold a list of rows, found {shown(entries)}; name {KINDS}")
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
