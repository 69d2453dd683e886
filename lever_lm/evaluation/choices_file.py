"""Choices of demonstrations in a file, from any method, written and read: `lever infer --icds` evaluates them."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from lever_lm.data import Example
from lever_lm.data.pools import Candidates
from lever_lm.data.rows import any_id
from lever_lm.utils.atomic_io import write_text
from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_parse import loads, read_bytes
from lever_lm.utils.terminal import shown

_FORMAT = 'expected {"question_id": [ICD question_ids]}, or lines {"question_id": 1, "icds": [2, 3]} as in icds.jsonl'


def write_icds(path: Path, queries: Sequence[Example], train: Sequence[Example], choices: list[list[int]]) -> None:
    """Write the choices, rows of `train` for each query in pick order, as one line a query."""
    rows = (
        {"question_id": q.question_id, "icds": [train[i].question_id for i in picks]}
        for q, picks in zip(queries, choices, strict=True)
    )
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_icds(path: Path, queries: Sequence[Example], train: Sequence[Example], shots: int) -> list[list[int]]:
    """Return the rows of `train` chosen for each query, in pick order, `shots` of each list.

    Raises LeverError naming file and question when a query has no choice or too few, when an ICD is no training
    example, stands twice among them, or shows the query itself or its image.
    """
    chosen = _by_question(_content(path), path)
    row_of = {example.question_id: row for row, example in enumerate(train)}
    candidates = Candidates(train)
    picks = []
    for query in queries:
        where = f"{path}, question {query.question_id}"
        if query.question_id not in chosen:
            raise LeverError(f"{where}: no choice; every question that is evaluated needs one (--icds)")
        icds = chosen[query.question_id][:shots]
        if len(icds) < shots:
            raise LeverError(f"{where}: {len(icds)} ICDs for {shots} shots; lower --shots")
        withheld = candidates.withheld(query)
        rows: list[int] = []
        for icd in icds:
            row = row_of.get(icd)
            if row is None:
                raise LeverError(f"{where}: ICD {icd} is not a question of the training split (--icds)")
            if row in withheld:
                raise LeverError(f"{where}: ICD {icd} is the question itself or shows its image (--icds)")
            if row in rows:
                raise LeverError(f"{where}: ICD {icd} appears twice among the {shots} that are shown (--icds)")
            rows.append(row)
        picks.append(rows)
    return picks


def _content(path: Path):
    """Return one JSON document, or the list of the documents on its lines."""
    try:
        text = read_bytes(path, pipe=True).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LeverError(f"cannot read the choices {path}: {error} (--icds)") from error
    where, rows = f"{path}", []
    try:
        with contextlib.suppress(json.JSONDecodeError):  # it may be one on each line
            return loads(text)
        for number, line in enumerate(text.split("\n"), 1):
            where = f"{path}, line {number}"
            rows += [loads(line)] if line.strip() else []
    except ValueError as error:
        raise LeverError(f"{where} is not JSON that can be read: {error}; {_FORMAT} (--icds)") from error
    return rows


def _by_question(content, path: Path) -> dict[int | str, list[int | str]]:
    if isinstance(content, dict) and "icds" not in content:
        pairs = list(content.items())
    else:
        rows = content if isinstance(content, list) else [content]
        if not all(isinstance(row, dict) and "question_id" in row for row in rows):
            raise LeverError(f"{path}: {_FORMAT} (--icds)")
        pairs = [(row["question_id"], row.get("icds")) for row in rows]
    chosen: dict[int | str, list[int | str]] = {}
    for question, icds in pairs:
        if any_id(question) is None or not isinstance(icds, list) or any(any_id(icd) is None for icd in icds):
            raise LeverError(f"{path}, question {shown(question, 40)}: {_FORMAT}; found {shown(icds)} (--icds)")
        if any_id(question) in chosen:
            raise LeverError(f"{path}: question {question} appears twice (--icds)")
        chosen[any_id(question)] = [any_id(icd) for icd in icds]
    if not chosen:
        raise LeverError(f"{path} is empty: {_FORMAT} (--icds)")
    return chosen
