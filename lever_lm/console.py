"""What a person sees: lines, progress and tables on the terminal. With --json all of it goes to stderr."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lever_lm.shards import Shards
from lever_lm.untrusted import one_line


class _Output(Console):
    """A console whose reader may go away: what it was told so far is all it gets, and the work goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Screen:
    """Where a command talks to. `quiet` leaves only results and errors. Of the processes of a job only the leader
    talks."""

    def __init__(self, to_stderr: bool = False, quiet: bool = False):
        leader = Shards.from_environment().leader
        self.out = _Output(file=sys.stderr if to_stderr else sys.stdout, highlight=False, quiet=not leader)
        self.quiet = quiet or not leader

    def say(self, text: str) -> None:
        """One line: text from data files is no markup, begins no line of its own and does not steer the terminal."""
        if not self.quiet:
            self.out.print(_text(text), soft_wrap=True)

    def result(self, text: str) -> None:
        """One line that also a quiet command prints."""
        self.out.print(_text(text), soft_wrap=True)

    def track(self, items: Iterable, what: str, total: int) -> Iterator:
        """Yield the items under a progress bar; on anything but a terminal, under one line at the start."""
        if self.quiet or not self.out.is_terminal:
            self.say(what)
            yield from items
            return
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.out) as progress:
            task = progress.add_task(one_line(what), total=total)
            for item in items:
                yield item
                progress.advance(task)

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A result table; the first column is left-aligned, the others are numbers."""
        self.out.print(_text(title), soft_wrap=True)  # a title of the table's would break at its width
        table = Table()
        for i, name in enumerate(header):
            table.add_column(_text(name), justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*map(_text, row))
        self.out.print(table)


def _text(text: str) -> Text:
    return Text(one_line(text))
