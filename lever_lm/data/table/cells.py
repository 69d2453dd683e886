"""The cells of a row → an Example: texts of whatever type, lists as they are written, the right option of a choice."""

import ast
import warnings
from collections.abc import Mapping
from string import ascii_uppercase

from lever_lm.config.schema import DataConfig
from lever_lm.data.example import Example, Image, image_digest
from lever_lm.data.rows import LONGEST_ID, Unusable, any_id, id_of_content, problem_of, unfit, whole_id
from lever_lm.data.table.columns import FIELD
from lever_lm.utils.safe_parse import loads
from lever_lm.utils.terminal import one_line, shown

_LONGEST_LIST = 1 << 16  # characters of a list that is written as a text
_TEXTS = ("answer", "raw", "caption")  # where an object of an answer has its text
_OPTIONS_OF_ALL = "--set 'data.options=[NAME, NAME]'"
_AS_INDEX = "if it counts the options from 0: --set data.columns.answer_index"


def text_of(cell) -> str | None:
    """Return the text of a cell: 3 and 3.0 are `3`, 2.5 is `2.5`, true is `True`. None for one that holds nothing.
    Raises Unusable for a list, an object or bytes."""
    if cell is None or cell != cell:  # NaN is what others write for nothing
        return None
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 2**53:
        cell = int(cell)
    if not isinstance(cell, (str, int, float)):
        raise Unusable(f"a text or a number is needed, found {shown(cell)}")
    return str(cell)


def holds_nothing(cell) -> bool:
    """Return whether a cell is null, NaN or blank."""
    return cell is None or cell != cell or (isinstance(cell, str) and not cell.strip())


def id_of(cell) -> int | str:
    """Return an id: a whole number as such, any other text as it stands. Raises Unusable."""
    text = text_of(cell) or ""
    if problem := unfit([text]):
        raise Unusable(problem)
    if (found := any_id(text.strip())) is None:
        raise Unusable(f"its id must be a text of one line and 1 to {LONGEST_ID} characters, found {shown(text)}")
    return found


def listed(cell, *, typed: bool) -> list:
    """Return the entries of a list: a list of JSON or parquet, a text that holds one in brackets, or in CSV the texts
    between bars, `a|b|c`. A single text is a list of one. Raises Unusable."""
    if isinstance(cell, dict):  # one object with a list of each part
        cell = next((cell[name] for name in _TEXTS if isinstance(cell.get(name), list)), [cell])
    if isinstance(cell, (list, tuple)):
        return list(cell)
    text = cell.strip() if isinstance(cell, str) else ""
    if text.startswith("[") and text.endswith("]"):
        return _list_in(text)
    return [cell] if typed or not text else [part.strip() for part in cell.split("|")]


def _list_in(text: str) -> list:
    """Return the list that a text holds, as JSON or Python write it."""
    found = None
    if len(text) <= _LONGEST_LIST:
        try:
            found = loads(text)
        except ValueError:
            with warnings.catch_warnings():  # of odd escapes
                warnings.simplefilter("ignore")
                try:
                    found = ast.literal_eval(text)
                except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
                    found = None
    # numpy writes its arrays without commas, which Python reads as one text.
    if not isinstance(found, list) or (len(found) == 1 and text.count("'") + text.count('"') > 2 and "," not in text):
        raise Unusable(f'{shown(text)} begins and ends as a list and is none; write it as JSON, ["a", "b"]')
    return found


class Cells:
    """How the rows of a table become examples. columns: role → column. typed: see parts.Part. Equal texts and lists are
    kept once while it lives."""

    def __init__(self, config: DataConfig, columns: Mapping[str, str], *, typed: bool):
        self._config, self._columns, self._typed = config, columns, typed
        self._once: dict = {}

    def example(self, cells: Mapping, image: Image | None, row_id: int | str) -> Example:
        """Return the example of a row. row_id: its id where the table has no column of ids. Raises Unusable."""
        question_id = id_of(cells.get(self._columns["id"])) if "id" in self._columns else row_id
        question = self._question(cells)
        choice = self._config.task == "choice"
        if choice or self._answered_by_index(cells):
            options = self._options(cells)
            answers = raw_answers = [self._right_option(cells, options)]
        else:
            options = ()
            answers, raw_answers = self._answers(cells)
        if problem := problem_of(question, answers, raw_answers) or unfit(options):
            raise Unusable(problem)
        kept = [
            self._kept(tuple(map(self._kept, texts))) for texts in (answers, raw_answers, options if choice else ())
        ]
        return Example(question_id, self._image_id(cells, image), self._kept(question), *kept[:2], image, kept[2])

    def _kept(self, value):
        return self._once.setdefault(value, value)

    def cell(self, cells: Mapping, role: str):
        """Return what a row has for a role; None where it has nothing."""
        column = self._columns.get(role)
        value = None if column is None else cells.get(column)
        return None if value is None or holds_nothing(value) else value

    def _image_id(self, cells: Mapping, image: Image | None) -> int | str | None:
        if image is None:
            return None
        own = self.cell(cells, "image_id")
        return id_of_content(image_digest(image)) if own is None else self._kept(id_of(own))

    def _question(self, cells: Mapping) -> str | None:
        own = text_of(self.cell(cells, "question"))
        if own is not None or not self._config.question:
            return own

        def put(match) -> str:
            value = text_of(cells.get(match[1]))
            if value is None or not value.strip():
                raise Unusable(f"it has no {one_line(match[1])}, which data.question asks about")
            return value

        return FIELD.sub(put, self._config.question)

    # ------------------------------------------------------------------ answers

    def _answers(self, cells: Mapping) -> tuple[list, list]:
        """Return the answers and raw answers of a row, not checked yet. Bars part those of a list alone."""
        given, single = self.cell(cells, "answers"), self.cell(cells, "answer")
        given, bars = (single, False) if given is None else (given, True)
        if given is None:
            raise Unusable(f"it has no answer ({' or '.join(self._columns.get(r, r) for r in ('answer', 'answers'))})")
        entries = [given] if isinstance(given, str) and not bars else listed(given, typed=self._typed)
        answers = [_answer_text(entry) for entry in entries]
        typed = [text_of(entry.get("raw_answer")) if isinstance(entry, dict) else None for entry in entries]
        return answers, [answer if raw is None else raw for raw, answer in zip(typed, answers, strict=True)]

    def _answered_by_index(self, cells: Mapping) -> bool:
        if self.cell(cells, "answer_index") is None:
            return False
        return self.cell(cells, "answer") is None and self.cell(cells, "answers") is None

    # ------------------------------------------------------------------ choices

    def _options(self, cells: Mapping) -> tuple[str, ...]:
        own = self.cell(cells, "options")
        if own is None:
            if not self._config.options:
                raise Unusable(
                    f"it has no options ({self._columns.get('options', 'options')}); for all: {_OPTIONS_OF_ALL}"
                )
            return tuple(map(str.strip, self._config.options))
        options = tuple((text_of(option) or "").strip() for option in listed(own, typed=self._typed))
        if "" in options:
            raise Unusable(f"one of its options is blank: {shown(options)}")
        if len(set(options)) < len(options):
            raise Unusable(f"two of its options are the same: {shown(', '.join(options), 200)}")
        return options

    def _right_option(self, cells: Mapping, options: tuple[str, ...]) -> str:
        """Return the option that is the answer: that of the answer's text, or of the index, or of a letter."""
        given, index = self.cell(cells, "answer"), self.cell(cells, "answer_index")
        if given is None and (several := self.cell(cells, "answers")) is not None:
            named = {_answer_text(entry) for entry in listed(several, typed=self._typed)}
            if len(named) > 1:
                raise Unusable(f"a choice has one answer, found {shown(sorted(map(str, named)))}")
            given = next(iter(named), None)
        text = text_of(given)
        if index is None and isinstance(given, int) and self._of_all(cells):  # a label
            index = given
        by_text = None if text is None else _like(text, options)
        by_index = None if index is None else _at(index, options)
        if by_text is not None and by_index is not None and by_text != by_index:
            raise Unusable(
                f"its answer {shown(text)} and its answer_index {shown(index)} name two options, {shown(by_text)} and "
                f"{shown(by_index)}; name one column alone: --set data.columns.answer='' or answer_index=''"
            )
        found = by_text if by_text is not None else by_index
        if found is None and text is not None and len(text.strip()) == 1:
            place = ascii_uppercase.find(text.strip().upper())
            found = options[place] if 0 <= place < len(options) else None
        if found is None:
            said = "it has no answer, one" if text is None else f"its answer {shown(text)} is none"
            is_number = text is not None and text.strip().isdigit()
            mend = f"; {_AS_INDEX}={self._columns.get('answer', 'NAME')}" if is_number else ""
            raise Unusable(f"{said} of its options {shown(', '.join(options), 200)}{mend}")
        return found

    def _of_all(self, cells: Mapping) -> bool:
        return self.cell(cells, "options") is None


def _answer_text(entry) -> str | None:
    if isinstance(entry, dict):
        entry = next((entry[name] for name in _TEXTS if name in entry), None)
    return text_of(entry)


def _like(text: str, options: tuple[str, ...]) -> str | None:
    """Return the option of a text: the same without blanks around it, or else the only one in any capitals."""
    said = text.strip()
    if said in options:
        return said
    alike = [option for option in options if option.strip().casefold() == said.casefold()]
    return alike[0] if len(alike) == 1 else None


def _at(index, options: tuple[str, ...]) -> str:
    """Return the option at an index from 0. Raises Unusable."""
    place = int(index) if isinstance(index, bool) else whole_id(index.strip() if isinstance(index, str) else index)
    if place is None or place >= len(options):
        raise Unusable(f"its answer_index must be a whole number of 0 to {len(options) - 1}, found {shown(index)}")
    return options[place]
