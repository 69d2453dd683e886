"""Which column of a table is the image, the question, the answer: by usual names, or as `data.columns` says."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from lever_lm.config.schema import DataConfig
from lever_lm.config.values import FLAGS
from lever_lm.data.table.parts import Table
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.terminal import one_line, shown

# The usual names of a role's column, in lower case; the first that is there is taken. `text` is none of a question: it
# is the words of a meme, a document, or the answer.
ROLES: dict[str, tuple[str, ...]] = {
    "image": ("image", "image_path", "img", "file", "file_name", "filename", "path", "photo", "picture"),
    "question": ("question", "query", "prompt"),
    "answers": ("answers", "references", "captions", "sentences"),
    "answer": ("answer", "label", "target", "caption", "sentence"),
    "options": ("options", "choices"),
    "answer_index": ("answer_index", "answer_idx", "correct_choice_idx", "label_idx"),
    "id": ("id", "question_id", "qid", "sample_id"),
    "image_id": ("image_id",),
    "split": ("split", "set", "partition"),
}
FIELD = re.compile(r"\{([^{}]*)\}")  # in data.question: what the row has in the column of that name
_NAMED = 20  # columns that a message names


def find_columns(table: Table, config: DataConfig) -> dict[str, str]:
    """Return role → name of its column. A role that data.columns gives an empty name has none. Raises UsageError for
    an unknown role, and LeverError for what the table lacks, with the columns that are there."""
    chosen = _chosen(table, config.columns)
    found = dict(chosen)
    for role, usual in ROLES.items():
        if role not in chosen:
            free = {name.strip().lower(): name for name in reversed(table.columns) if name not in chosen.values()}
            found[role] = next((free[name] for name in usual if name in free), "")
    columns = {role: found[role] for role in ROLES if found[role]}
    _check_complete(table, columns, config)
    return columns


def candidates(table: Table, role: str, columns: Mapping[str, str]) -> list[str]:
    """Return the columns that could be a role's too, beside the one that is taken."""
    taken = set(columns.values())
    return [name for name in table.columns if name.strip().lower() in ROLES[role] and name not in taken]


def there(table: Table) -> str:
    """Return the columns of a table for a message."""
    names = table.columns
    listed = ", ".join(one_line(name)[:40] for name in names[:_NAMED])
    return listed + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _chosen(table: Table, names: Mapping) -> dict[str, str]:
    chosen = {}
    for role, value in names.items():
        if role not in ROLES:
            raise UsageError(f"data.columns.{role} is no role of a column: one of {', '.join(ROLES)}")
        chosen[role] = _named(table, role, value)
    return chosen


def _named(table: Table, role: str, value) -> str:
    """Return the column that a value of data.columns names: there, a text that reads as a flag or a number is one."""
    if value is None or value == "":
        return ""
    read = {name: FLAGS.get(name.lower(), _number(name)) for name in table.columns}
    exact = [name for name in table.columns if name == value]
    alike = [
        name
        for name in table.columns
        if name.lower() == str(value).lower() or (type(value) is type(read[name]) and read[name] == value)
    ]
    if not exact and len(alike) != 1:
        near = get_close_matches(str(value), table.columns, n=1)
        meant = f" (did you mean {shown(near[0])}?)" if near else ""
        raise LeverError(
            f"{table.source} has no column {shown(value)}{meant}, found {there(table)}; name one of these: --set "
            f"data.columns.{role}=NAME"
        )
    return (exact or alike)[0]


def _number(name: str) -> float | int | None:
    for kind in (int, float):
        try:
            return kind(name)
        except ValueError:
            continue
    return None


def _check_complete(table: Table, columns: Mapping[str, str], config: DataConfig) -> None:
    """Raise LeverError where a table lacks what every example needs."""
    for name in fields_of(config.question):
        if name not in table.columns:
            raise LeverError(
                f"data.question takes {{{one_line(name)}}} from a column that {table.source} does not have, found "
                f"{there(table)}; name one of these in --set data.question"
            )
    if "question" not in columns and not config.question:
        raise LeverError(
            f"{table.source} has no column of the question ({', '.join(ROLES['question'])}), found {there(table)}; "
            "name it: --set data.columns.question=NAME, or ask one thing of all: --set 'data.question=TEXT'"
        )
    if not {"answer", "answers", "answer_index"} & columns.keys():
        usual = ", ".join((*ROLES["answer"], *ROLES["answers"]))
        raise LeverError(
            f"{table.source} has no column of the answer ({usual}), found {there(table)}; name it: --set "
            "data.columns.answer=NAME (answers, answer_index). Its first line must name the columns, if it is CSV"
        )


def fields_of(question: str) -> Iterable[str]:
    """Return the columns that a text of data.question names."""
    return dict.fromkeys(FIELD.findall(question))
