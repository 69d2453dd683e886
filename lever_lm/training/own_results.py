"""The folder below results/ of a table of the user's own (`data.file`): its name, and the file in it that says whose
results these are."""

import contextlib
import hashlib
import os
import re
from pathlib import Path

from lever_lm.config.values import configs_root, read_yaml
from lever_lm.utils.atomic_io import write_json
from lever_lm.utils.errors import LeverError
from lever_lm.utils.paths import HUB_PREFIX
from lever_lm.utils.safe_parse import read_object

SOURCE = "source.json"
TABLES = (".jsonl", ".csv", ".tsv", ".parquet", ".json")
_LIMIT = 1 << 16  # bytes of source.json: a path
_LONGEST = 80  # bytes of a name, so that a digest has room behind it


def identity(file: str) -> str:
    """Return what a table is known by: the address of one on the hub, else its absolute path without links."""
    if file.startswith(HUB_PREFIX):
        return file.rstrip("/")
    return os.path.realpath(os.path.expanduser(file))


def folder_name(file: str, results: Path) -> str:
    """Return the name of a table's folder below `results`: its stem, or the stem with a digest of its `identity` where
    the folder of that name holds results of other data, or where a dataset of configs/ has that name."""
    whose, stem = identity(file), _stem(file)
    distinct = f"{stem}-{hashlib.sha256(whose.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    for name in (stem, distinct):
        if source_of(results / name) == whose:
            return name
    return distinct if os.path.exists(results / stem) or stem in _shipped() else stem


def source_of(folder: Path) -> str | None:
    """Return the `identity` of the table that the results in a folder are of; None where nothing says so."""
    known = read_object(folder / SOURCE, _LIMIT).get("file")
    return known if isinstance(known, str) else None


def keep_source(folder: Path, file: str) -> None:
    """Write into a folder of results which table they are of, unless it says so already. A folder that takes no file is
    left to what is written there next."""
    if not (folder / SOURCE).is_file():
        with contextlib.suppress(LeverError):
            write_json(folder / SOURCE, {"file": identity(file)})


def _stem(file: str) -> str:
    """Return the name of a table without its ending, of a folder, or of a repository of the hub, fit to be a folder's
    name."""
    if file.startswith(HUB_PREFIX):
        name = [*file.removeprefix(HUB_PREFIX).split("/"), ""][1]  # of OWNER/NAME, or of OWNER/NAME/PART
    else:
        # A link may lead to a file without an ending, as in the hub's cache.
        path = next((one for one in (Path(identity(file)), Path(file)) if _ending(one)), Path(identity(file)))
        name = path.stem if _ending(path) else path.name
    plain = re.sub(r"[^\w.-]+", "_", os.fsencode(name).decode("utf-8", "replace")).lstrip("._-")
    return plain.encode()[:_LONGEST].decode("utf-8", "ignore") or "data"


def _ending(path: Path) -> bool:
    """Return whether a path has the ending of a table, and is no folder."""
    return path.suffix.lower() in TABLES and not os.path.isdir(path)


def _shipped() -> set[str]:
    """Return the names that the datasets of configs/ have below results/."""
    files = (configs_root() / "dataset").glob("*.yaml")
    return {str((read_yaml(file).get("data") or {}).get("name")) for file in files}
