"""What a command says: lines, progress and tables on the terminal. With --json all of it goes to stderr."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from time import monotonic

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from lever_lm.utils.distributed import Shards
from lever_lm.utils.progress import BETWEEN_LINES, WORTH_A_WORD, Work, duration
from lever_lm.utils.terminal import one_line

_YOUNG = 0.3  # seconds; a bar that would only flash up is not drawn
_RECENT = 600.0  # seconds that a rate is taken over, so that it follows batches that become smaller


class _Output(Console):
    """A console whose reader may go away: what it was told so far is all it gets, and the work goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Screen:
    """What a command talks to. `quiet` leaves only results and errors, `verbose` adds details. Of the processes of a
    job only the leader talks."""

    def __init__(self, to_stderr: bool = False, quiet: bool = False, verbose: bool = False):
        leader = Shards.from_environment().leader
        stream = sys.stderr if to_stderr else sys.stdout
        # FORCE_COLOR makes a terminal of a log file as far as colours go; bars belong on a real one.
        bars = None if stream.isatty() else False
        self.out = _Output(file=stream, highlight=False, quiet=not leader, force_interactive=bars)
        self.quiet, self.verbose = quiet or not leader, verbose
        self._bars: _Bars | None = None

    def say(self, text: str) -> None:
        """Print one line: text from data files is no markup, begins no line of its own and steers no terminal."""
        if not self.quiet:
            self.result(text)

    def detail(self, text: str) -> None:
        """Print one line if the command is verbose."""
        if self.verbose:
            self.say(text)

    def result(self, text: str) -> None:
        """Print one line, also of a quiet command."""
        self.out.print(_text(text), soft_wrap=True)

    def track(self, items: Iterable, what: str, total: int) -> Iterator:
        """Yield the items, plain or a Work, and show how far they are: by a bar below all lines on a terminal,
        elsewhere by a line now and then. `total` counts units of the Work. `what` is `name: how much there is to do`,
        the line at the start; a stage of some seconds leaves another at its end."""
        work = items if isinstance(items, Work) else Work(items)
        if not work.after:
            self.say(what)
        if self._bars is None:
            self._bars = _Bars(self.out, drawn=self.out.is_interactive and not self.quiet)
        bars, began = self._bars, monotonic()
        name, next_line = one_line(what.partition(":")[0]), began + (work.after or BETWEEN_LINES)
        task = bars.begin(name, total, work)
        try:
            for item in work:
                yield item
                bars.advance(task.id, work.size(item))
                if bars.disable and monotonic() >= next_line and task.completed < total:
                    self.say(f"{name}: {', '.join(filter(None, [_figures(task), work.now()]))}")
                    next_line = monotonic() + BETWEEN_LINES
        finally:
            bars.end(task)
        if (took := monotonic() - began) >= WORTH_A_WORD:
            self.say(work.summary(name, int(task.completed) - work.done, took))

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a result table; the first column is left-aligned, the others are numbers. Where a terminal is too
        narrow for it, a line for each row: no number is cut."""
        rows = [[*row] for row in rows]
        self.result(title)  # a title of the table's would break at its width
        widths = [max(len(one_line(cell)) for cell in column) for column in zip(header, *rows, strict=True)]
        width = sum(widths) + 3 * len(widths) + 1
        if self.out.is_interactive and width > self.out.width:
            for first, *others in rows:
                named = [f"{name} {cell}" for name, cell in zip(header[1:], others, strict=True) if cell]
                self.result(f"{first}: {', '.join(named)}")
            return
        table = Table()
        for i, name in enumerate(header):
            table.add_column(_text(name), justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*map(_text, row))
        edge = self.out.width
        self.out.width = max(width, edge)  # a file has none, and a terminal is wide enough
        self.out.print(table)
        self.out.width = edge


class _Figures(ProgressColumn):
    """The figures of a stage, the most important first: a narrow terminal cuts the last ones off."""

    def render(self, task: Task) -> Text:
        return Text(_figures(task))


class _Bars(Progress):
    """The stages at work, the outer one first: name, bar and figures; below each its latest metrics."""

    def __init__(self, console: Console, drawn: bool):
        super().__init__(
            TextColumn(
                "{task.description}", style="bold", markup=False, table_column=Column(no_wrap=True, min_width=9)
            ),
            BarColumn(bar_width=None, table_column=Column(min_width=6, max_width=32)),
            _Figures(table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            refresh_per_second=4,
            speed_estimate_period=_RECENT,
            transient=True,
            disable=not drawn,
            get_time=monotonic,
        )

    def begin(self, name: str, total: int, work: Work) -> Task:
        """Start a stage. The length of a single item is unknown: its bar moves to and fro."""
        number = self.add_task(name, total=total if total > 1 else None, completed=work.done, work=work)
        self.advance(number, 0)  # the rate counts from here
        if not _drawn and not self.disable:
            _drawn.append(self)
            self.start()
        return self._tasks[number]

    def end(self, task: Task) -> None:
        """Remove a stage, and with the last one all that is drawn."""
        self.remove_task(task.id)
        if not self._tasks:
            settle()

    def get_renderables(self) -> Iterator[RenderableType]:
        """What is drawn of the stages that have begun a moment ago or earlier."""
        for task in self.tasks:
            if task.elapsed >= _YOUNG:
                yield self.make_tasks_table([task])
                if now := one_line(task.fields["work"].now()):
                    yield Text(f"  {now}", style="dim", no_wrap=True, overflow="ellipsis")


_drawn: list[_Bars] = []  # on the terminal now


def settle() -> None:
    """Remove the bars of a stage that has ended, in whatever way: an error keeps the loop it left from being closed,
    and a message would be drawn over."""
    while _drawn:
        _drawn.pop().stop()


def _figures(task: Task) -> str:
    """`1,200 of 6,500 prompts, 35.2/s, 2 min left, 340 known`; of a single item how long it takes."""
    work = task.fields["work"]
    figures = [f"{int(task.completed):,} of {task.total:,} {work.unit}" if task.total else duration(task.elapsed)]
    if task.speed:
        figures += [work.pace(task.speed), f"{duration(task.time_remaining or 0)} left"]
    return ", ".join([*figures, f"{work.known:,} known"] if work.known else figures)


def _text(text: str) -> Text:
    return Text(one_line(text))
