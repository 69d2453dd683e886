"""How `lever doctor` shows a table of the user's own: what was read, by which columns, as which task, what is odd."""

from dataclasses import asdict, dataclass, field

from lever_lm.config.schema import DataConfig
from lever_lm.utils.checks import Check
from lever_lm.utils.errors import LeverError
from lever_lm.utils.terminal import one_line

_LONGEST = 60  # characters of a cell that is shown
_WHY = {  # task → what of a table speaks for it
    "vqa": "each row has the answers of ten people or more",
    "short_answer": "its answers are a few words, of fewer than ten people",
    "choice": "its rows have options",
    "number": "every answer is a number",
    "caption": "its answers are sentences",
}


@dataclass(frozen=True)
class TableView:
    """A table as lines of the terminal and as a key of JSON; or the check that says why it cannot be read. Nothing for
    data that are no table."""

    lines: list[str] = field(default_factory=list)
    json: dict = field(default_factory=dict)
    missing: list[Check] = field(default_factory=list)


def look_at(config: DataConfig) -> TableView:
    """Return how the table of a config is read."""
    if not config.file:
        return TableView()
    from lever_lm.data.table import view

    try:
        seen = view(config)
    except LeverError as error:
        found, _, mend = str(error).partition("; ")
        return TableView(missing=[Check("data", "missing", found, mend or "mend it, or name another table by --data")])
    return TableView(_lines(seen, config.task), {"data": {**asdict(seen), "files": [str(file) for file in seen.files]}})


def _lines(seen, task: str) -> list[str]:
    files = [str(file) for file in seen.files]
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    columns = ", ".join(f"{role}: {name}" for role, name in seen.columns.items())
    unused = f"; unused: {', '.join(seen.unused)}" if seen.unused else ""
    lines = [
        ("data", f"{''.join(files[:1])}{more}, {seen.rows:,} rows"),
        ("columns", f"{columns}{unused}"),
        ("split", seen.split),
        ("task", _task(task, seen.task)),
        *((f"row {number}", _row(row)) for number, row in enumerate(seen.first, 1)),
        *(("odd", odd) for odd in seen.odd),
    ]
    return [f"{what:>7}  {one_line(found)}" for what, found in lines]


def _task(taken: str, fits: str) -> str:
    """Return the task that is taken, and why that one or another fits."""
    why = _WHY.get(fits, "by its columns")
    return f"{taken}: {why}" if taken == fits else f"{taken}, but {why}: --task {fits}"


def _row(row: dict) -> str:
    return " | ".join(f"{role}: {_short(text)}" for role, text in row.items())


def _short(value) -> str:
    text = one_line(str(value))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
