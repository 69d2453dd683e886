"""What a person sees: lines, progress and tables on the terminal. With --json all of it goes to stderr."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lever_lm.utils.distributed import Shards
from lever_lm.utils.progress import WORTH_A_WORD, Stage, Work
from lever_lm.utils.terminal import one_line

_REDRAWN = 4  # times a second


class _Output(Console):
    """A console whose reader may go away: what it was told so far is all it gets, and the work goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Screen:
    """Where a command talks to. `quiet` leaves only results and errors, `verbose` adds details. Of the processes of a
    job only the leader talks."""

    def __init__(self, to_stderr: bool = False, quiet: bool = False, verbose: bool = False):
        leader = Shards.from_environment().leader
        stream = sys.stderr if to_stderr else sys.stdout
        # FORCE_COLOR makes a terminal of a log file as far as colours go; bars belong on a real one.
        bars = None if stream.isatty() else False
        self.out = _Output(file=stream, highlight=False, quiet=not leader, force_interactive=bars)
        self.quiet, self.verbose = quiet or not leader, verbose
        self._stages: list[Stage] = []  # those with a bar, the outer one first

    def say(self, text: str) -> None:
        """One line: text from data files is no markup, begins no line of its own and does not steer the terminal."""
        if not self.quiet:
            self.out.print(_text(text), soft_wrap=True)

    def detail(self, text: str) -> None:
        """One line that only a verbose command prints."""
        if self.verbose:
            self.say(text)

    def result(self, text: str) -> None:
        """One line that also a quiet command prints."""
        self.out.print(_text(text), soft_wrap=True)

    def track(self, items: Iterable, what: str, total: int) -> Iterator:
        """Yield the items, plain or a Work, and show how far they are: under a bar on a terminal, elsewhere by a line
        now and then. `total` counts units of the Work. `what` is `name: how much there is to do`, the line at the
        start; a stage of some seconds leaves another at its end."""
        work = items if isinstance(items, Work) else Work(items)
        stage = Stage(what, total, work)
        if not work.after:
            self.say(what)
        with self._drawing(stage) as drawn:
            for item in work:
                yield item
                stage.advance(work.size(item))
                if not drawn and stage.due():
                    self.say(stage.line())
        if stage.elapsed >= WORTH_A_WORD:
            self.say(stage.summary())

    @contextlib.contextmanager
    def _drawing(self, stage: Stage) -> Iterator[bool]:
        """Keep a bar of the stage below all lines that are said; False where there is none to see it. A stage within
        another has its bar below that one's."""
        if self.quiet or not self.out.is_interactive:
            yield False
            return
        self._stages.append(stage)
        if len(self._stages) == 1:
            _live.append(Live(get_renderable=self._bars, console=self.out, refresh_per_second=_REDRAWN, transient=True))
            _live[-1].start()
        try:
            yield True
        finally:
            self._stages.remove(stage)
            if not self._stages:
                settle()

    def _bars(self) -> Group:
        width = self.out.width
        return Group(*(line for stage in tuple(self._stages) for line in stage.drawn(width)))

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A result table; the first column is left-aligned, the others are numbers. Where a terminal is too narrow for
        it, a line for each row: no number is cut."""
        rows = [[*row] for row in rows]
        self.out.print(_text(title), soft_wrap=True)  # a title of the table's would break at its width
        widths = [max(len(one_line(cell)) for cell in column) for column in zip(header, *rows, strict=True)]
        if self.out.is_interactive and sum(widths) + 3 * len(widths) + 1 > self.out.width:
            for first, *others in rows:
                named = [f"{name} {cell}" for name, cell in zip(header[1:], others, strict=True) if cell]
                self.result(f"{first}: {', '.join(named)}")
            return
        table = Table()
        for i, name in enumerate(header):
            table.add_column(_text(name), justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*map(_text, row))
        self.out.print(table)


_live: list[Live] = []  # what is drawn now


def settle() -> None:
    """Remove the bars of a stage that has ended, in whatever way: an error keeps the loop it left from being closed,
    and a message would be drawn over."""
    while _live:
        _live.pop().stop()


def _text(text: str) -> Text:
    return Text(one_line(text))
