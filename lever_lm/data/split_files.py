"""Parquet files by split: the name of a file, or of a split on the hub, says to which it belongs."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lever_lm.utils.errors import LeverError

# Which split a file or a hub split belongs to, by its name: val2014-00000-of-00002.parquet; by its folder's where its
# own says nothing: train/0000.parquet. The first that is there: beside a validation split, one called test is without
# answers.
_NAMES = {"train": ("train",), "val": ("val|valid|validation", "eval|dev", "test")}


def parquet_files(root: Path) -> list[Path]:
    """Return the parquet files of a folder and the folders below it."""
    # A folder may be called so, too. A link to nothing is kept, to be refused by name.
    return sorted(path for path in root.rglob("*.parquet") if not path.is_dir()) if os.path.isdir(root) else []


def files_of(root: Path, split: str) -> list[Path]:
    """Return the parquet files of a split by their names; all files where none is named after a split. Raises
    LeverError for a file that is named after both."""
    files = parquet_files(root)
    named = splits_named([str(file.relative_to(root)) for file in files], str(root))
    return [root / name for name in named[split]] if any(named.values()) else files


def splits_named(names: Sequence[str], where: str) -> dict[str, list[str]]:
    """Return for each split the names that say they are of it. Raises LeverError for a name that says both."""
    said = {name: _said(name) for name in names}
    for name, kinds in said.items():
        if len({split for split, _ in kinds}) > 1:
            raise LeverError(
                f"{where}: {name} is named after both splits; rename it after the one that it holds, or move it away"
            )
    return {
        split: next(filter(None, ([name for name, kinds in said.items() if (split, p) in kinds] for p in patterns)), [])
        for split, patterns in _NAMES.items()
    }


def _said(name: str) -> set[tuple[str, str]]:
    """Return each split that a path is named after, with the pattern that says so: by the file's own name, or else by
    that of the nearest folder whose name says one."""
    for part in reversed(Path(name).parts):
        found = {
            (split, pattern)
            for split, patterns in _NAMES.items()
            for pattern in patterns
            if re.search(rf"(?:^|[^a-z])(?:{pattern})(?:[^a-z]|$)", part.lower())
        }
        if found:
            return found
    return set()
