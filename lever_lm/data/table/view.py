"""What the tables of a config hold, for a look before any work: columns, the first rows, the split, what is odd."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lever_lm.config.schema import DataConfig
from lever_lm.data.example import Example, Image
from lever_lm.data.rows import Unusable
from lever_lm.data.table.cells import Cells
from lever_lm.data.table.columns import ROLES, candidates
from lever_lm.data.table.files import find_files
from lever_lm.data.table.images import ImageTable, PlacedImages
from lever_lm.data.table.parts import Part, Row
from lever_lm.data.table.splits import SHARED, Source, open_sources
from lever_lm.utils.terminal import one_line, shown

_LONG = 6  # words of an answer on average, above which it is a caption
_SHOWN = 200  # characters of a cell in a view


@dataclass(frozen=True)
class TableView:
    """What the tables of a config hold.

    files: those that are read. rows: in all. columns: role → name of its column; unused: the others. first: the first
    rows, role → text. split: how the two splits are made, and of how many rows. task: the one that fits these answers.
    odd: what may be wrong, a sentence each.
    """

    files: tuple[str, ...]
    rows: int
    columns: dict[str, str]
    unused: tuple[str, ...]
    first: tuple[dict[str, str], ...]
    split: str
    task: str
    odd: tuple[str, ...]


def view(config: DataConfig, rows: int = 5) -> TableView:
    """Return what the tables of a config hold, the first `rows` rows of it as texts. Fetches nothing, decodes no image.
    Raises LeverError as load_tables does for a table that cannot be read at all; bad rows are counted."""
    sources = open_sources(config, fetch=False)
    first = sources[0]
    columns = {role: name for role, name in first.columns.items() if role in ROLES}
    looked = _Look(config, "options" in columns or bool(config.options), rows)
    for source in sources:
        looked.read(source)
    said = {role: candidates(first.table, role, first.columns) for role in columns}
    odd = [
        f"{one_line(', '.join(more))} could be the {role}, too: {one_line(columns[role])} is taken"
        for role, more in said.items()
        if more
    ]
    used = {*first.columns.values()}
    return TableView(
        files=tuple(name for source in sources for name in _files(source)),
        rows=looked.rows,
        columns=columns,
        unused=tuple(name for name in first.table.columns if name not in used),
        first=tuple(looked.first),
        split=_split_in_words(sources, looked.counts),
        task=looked.task(columns),
        odd=(*odd, *looked.odd()),
    )


def _files(source: Source) -> list[str]:
    root, files = find_files(source.table.source, "")
    taken = [str(file) for file in files if str(file.relative_to(root)) not in source.table.left_out]
    return taken or [source.table.source]


def _split_in_words(sources: list[Source], counts: Mapping[str, int]) -> str:
    names = {"train": "training", "val": "evaluation", "": "left out"}
    known = ", ".join(f"{counts[split]:,} {names[split]}" for split in names if counts[split])
    return "; ".join(filter(None, ["; ".join(source.how for source in sources), known]))


@dataclass
class _Look:
    """What was seen of the rows so far."""

    config: DataConfig
    choice: bool
    wanted: int
    rows: int = 0
    first: list[dict[str, str]] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)  # rows by split
    problems: list[str] = field(default_factory=list)
    bad: int = 0
    ids: dict = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    repeated: list[str] = field(default_factory=list)
    of_ids: list[str] = field(default_factory=list)
    repeats: Counter = field(default_factory=Counter)
    without_image: int = 0
    answers: Counter = field(default_factory=Counter)  # how many answers a row has
    words: int = 0
    texts: int = 0
    numbers: bool = True
    longest: tuple[int, str, str] = (0, "", "")

    def read(self, source: Source) -> None:
        """Look at the rows of a table."""
        config = replace(self.config, task="choice" if self.choice else "vqa")
        cells = {typed: Cells(config, source.columns, typed=typed) for typed in (True, False)}
        placed = PlacedImages(source.table, source.columns.get("image", ""), config, stop_early=True, remote=False)
        tables: dict[str, ImageTable] = {}
        for part, row, split in source.rows():
            number, self.rows = self.rows, self.rows + 1
            self.counts[split] += 1
            if len(self.first) < self.wanted:
                self.first.append(_as_texts(source.columns, row))
            if not split:
                continue
            images = placed
            if config.image_table:
                name = "train" if split == SHARED else split
                if name not in tables:
                    column = source.columns.get("image_id", "")
                    tables[name] = ImageTable(config, name, column, stop_early=True, remote=False)
                images = tables[name]
            try:
                if row.problem:
                    raise Unusable(row.problem)
                image = images.of(part, row.cells)
                # Without the image, whose content would be read.
                self._take(cells[part.typed].example(row.cells, None, number), image, part, row)
            except Unusable as error:
                self.bad += 1
                if not self.problems:
                    self.problems.append(f"{part.where(row.number)}: {error}")

    def _take(self, example: Example, image: Image | None, part: Part, row: Row) -> None:
        where = part.where(row.number)
        key = hash((example.question, image, example.answers))
        if key in self.seen:
            self.repeats["row"] += 1
            self.repeated = self.repeated or [where]
        self.seen.add(key)
        if example.question_id in self.ids:
            self.repeats["id"] += 1
            self.of_ids = self.of_ids or [f"{where}: {shown(example.question_id)}"]
        self.ids[example.question_id] = None
        self.without_image += image is None
        self.answers[len(example.answers)] += 1
        for answer in example.answers:
            size = len(answer.split())
            self.words, self.texts = self.words + size, self.texts + 1
            self.numbers = self.numbers and _is_number(answer)
            if size > self.longest[0]:
                self.longest = (size, answer, where)

    def task(self, columns: Mapping[str, str]) -> str:
        """Return the task that fits the answers."""
        if self.choice:
            return "choice"
        if self.texts and self.numbers:
            return "number"
        named = {columns.get(role, "").lower() for role in ("answer", "answers")}
        several = any(count > 1 for count in self.answers) or named & {"caption", "captions", "sentence", "sentences"}
        if self.texts and self.words / self.texts > _LONG and several:
            return "caption"
        return "vqa" if self.answers and min(self.answers) >= 10 else "short_answer"

    def odd(self) -> list[str]:
        """Return what may be wrong with the rows, a sentence each."""
        usable = sum(self.answers.values())
        words, answer, where = self.longest
        found = [
            (self.bad, f"{self.bad:,} rows cannot be used, the first: {''.join(self.problems)}"),
            (
                self.repeats["id"],
                f"{self.repeats['id']:,} rows have the id of another, the first: {''.join(self.of_ids)}",
            ),
            (self.repeats["row"], f"{self.repeats['row']:,} rows repeat another, the first: {''.join(self.repeated)}"),
            (0 < self.without_image < usable, f"{self.without_image:,} of {usable:,} rows have no image"),
            (words > _LONG, f"the longest answer has {words} words: {shown(answer, _SHOWN)} ({where})"),
        ]
        return [text for is_so, text in found if is_so]


def _is_number(text: str) -> bool:
    try:
        return float(text.replace(",", "")) == float(text.replace(",", ""))
    except ValueError:
        return False


def _as_texts(columns: Mapping[str, str], row: Row) -> dict[str, str]:
    named = {role: row.cells.get(column) for role, column in columns.items() if role in ROLES}
    return {
        role: one_line(cell if isinstance(cell, str) else shown(cell, _SHOWN))[:_SHOWN]
        for role, cell in named.items()
        if cell is not None
    }
