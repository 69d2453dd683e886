"""The files of a table: one file, a folder of one kind, or a copy on the hub. Rows come in the order of the names."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from lever_lm.data.example import StoredImage
from lever_lm.data.parquet_files import hub_splits, images_of, in_datasets_cache, place, quiet, read_parquet, readable
from lever_lm.data.split_files import splits_named
from lever_lm.data.table.parts import KINDS, SUFFIXES, Part, Row, Table
from lever_lm.data.table.texts import text_part
from lever_lm.utils.errors import LeverError
from lever_lm.utils.hub import addresses, cached_dataset, download_command, fetch_dataset
from lever_lm.utils.paths import HUB_PREFIX, asset_path
from lever_lm.utils.terminal import one_line, shown

_BATCH = 1000  # rows of parquet that are made Python values at once


def open_table(source: str, option: str, *, fetch: bool = True) -> Table:
    """Open a table. option: what names it, for messages. fetch: whether a copy on the hub that is not on this machine
    is downloaded. Raises LeverError with the file, what was found and the mend."""
    quiet()
    root, files = find_files(source, option)
    if not files:
        repository, within = hub_address(source)
        if not fetch and (within or not any(map(in_datasets_cache, addresses(repository)))):
            raise LeverError(f"{source} is not in the hub's cache; {download_command(repository, within)}")
        if not within:
            return _from_datasets(source, option)
        fetch_dataset(repository, within, f"or another table: {option}")
        root, files = find_files(source, option)
        if not files:
            raise LeverError(f"{source} holds no table; name {KINDS} ({option})")
    labels = [str(file.relative_to(root)) for file in files]
    named = splits_named(labels, str(root)) if len(files) > 1 or root != files[0].parent else {}
    if not any(named.values()):
        named = {"": labels}
    groups = [(split, [root / label for label in names]) for split, names in named.items() if names]
    if files[0].suffix.lower() == ".parquet":
        parts = [_parquet_part(split, *read_parquet(group, root, "train"), root, source) for split, group in groups]
    else:
        parts = [text_part(split, file) for split, group in groups for file in group]
    taken = {label for names in named.values() for label in names}
    return Table(source, tuple(parts), tuple(label for label in labels if label not in taken))


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
        raise LeverError(f"{source} {found}; name {KINDS} ({option})")
    if path.suffix.lower() not in SUFFIXES:
        raise LeverError(f"{source} ends in {shown(path.suffix)}; name {KINDS} ({option})")
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
        if snapshot is not None and (files := _tables(snapshot / within).get(suffix)):
            return snapshot / within, files
    return Path(), []


def _tables(folder: Path) -> dict[str, list[Path]]:
    """Return suffix → the tables of that kind below a folder, hidden ones aside."""
    found: dict[str, list[Path]] = {suffix: [] for suffix in SUFFIXES}
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in found and not hidden and not path.is_dir():
            found[path.suffix.lower()].append(path)
    return {suffix: sorted(files) for suffix, files in found.items() if files}


def _of_one_kind(folder: Path, source: str, option: str) -> list[Path]:
    kinds = _tables(folder)
    if not kinds:
        raise LeverError(f"{source} holds no table; name {KINDS} ({option})")
    first, *others = kinds
    if [suffix for suffix in others if suffix != ".json"]:  # such a file may be about the others
        names = " and ".join(one_line(str(files[0].relative_to(folder))) for files in kinds.values())
        raise LeverError(f"{source} holds tables of several kinds, {names}; name the file that is meant ({option})")
    return kinds[first]


# ---------------------------------------------------------------------- parquet


def _from_datasets(source: str, option: str) -> Table:
    splits = hub_splits(hub_address(source)[0], f"or name a file or folder of it ({option})")
    named = splits_named(list(splits), source)
    if not any(named.values()):
        named = {"": list(splits)}
    parts = [
        _parquet_part(split, splits[name], [], None, f"{source}, {name}")
        for split, names in named.items()
        for name in names
    ]
    taken = {name for names in named.values() for name in names}
    return Table(source, tuple(parts), tuple(name for name in splits if name not in taken))


def _parquet_part(split: str, table, files: list[tuple[str, int]], folder: Path | None, source: str) -> Part:
    named = [(str(folder / name), count) for name, count in files] if folder else []

    def where(number: int) -> str:
        return place(number, named) if named else f"{source}, row {number}"

    return Part(split, folder, True, tuple(table.column_names), partial(_parquet_rows, table, source), where)


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
