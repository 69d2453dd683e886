"""What a person sees while a long stage is at work: a bar with figures on a terminal, plain lines elsewhere."""

import io
import os
import pty
import re
import select
import signal
import sys
import time

import pytest
from helpers import RUN, SMALL, clean_environment
from rich.console import Console, Group

from lever_lm.training.metrics import table_header
from lever_lm.utils import progress
from lever_lm.utils.console import Screen, settle
from lever_lm.utils.progress import BETWEEN_LINES, Stage, Work, clock, duration, loaded

CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # all but newlines


@pytest.fixture
def now(monkeypatch):
    """A clock that goes on only when it is told to."""
    seconds = {"now": 1000.0}
    monkeypatch.setattr(progress, "monotonic", lambda: seconds["now"])

    def forward(by: float) -> None:
        seconds["now"] += by

    return forward


def on_terminal(width: int = 80) -> Screen:
    """A screen on what passes for a terminal, kept as text."""
    screen = Screen()
    screen.out = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, highlight=False)
    return screen


def text_of(stage: Stage, width: int) -> list[str]:
    """A stage's bar as text."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(Group(*stage.drawn(width)))
    return console.file.getvalue().splitlines()


def plain_lines(capsys) -> list[str]:
    text = capsys.readouterr().out
    assert not CONTROL.search(text), repr(text)
    return text.splitlines()


def through_terminal(arguments: list, cwd, columns: int = 100, stop_after: str = "") -> tuple[int, str]:
    """`python -m lever_lm …` on a pseudo-terminal: its status, and all that was written there. It is interrupted once
    `stop_after` has been."""
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover
        os.chdir(cwd)
        environment = clean_environment(TERM="xterm", COLUMNS=str(columns))
        os.execve(sys.executable, [sys.executable, "-m", "lever_lm", *map(str, arguments)], environment)
    written, deadline = b"", time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if not select.select([terminal], [], [], 0.2)[0]:
                continue
            try:
                part = os.read(terminal, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            written += part
            if stop_after and stop_after.encode() in written:
                os.kill(pid, signal.SIGINT)
                stop_after = ""
        else:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(terminal)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, written.decode("utf-8")


# ---------------------------------------------------------------------- the figures


def test_a_stage_counts_in_its_unit_and_knows_how_long_the_rest_takes(now):
    batches = [[0] * 4, [0] * 4, [0] * 2]
    stage = Stage("rollouts: 10 prompts to ask, 7 known", 10, Work(batches, "prompts", len, known=7))
    assert (stage.rate, stage.left) == (None, None)
    assert stage.line() == "rollouts: 0 of 10 prompts, 7 known"
    now(2)
    stage.advance(4)
    assert (stage.rate, stage.left) == (2.0, 3.0)
    assert stage.line() == "rollouts: 4 of 10 prompts, 2.0/s, 3.0 s left, 7 known"
    now(1)
    assert stage.left == 2.0
    stage.advance(6)
    assert stage.summary() == "rollouts: 10 prompts in 3.0 s, 3.3/s"


def test_slow_units_are_told_by_the_time_of_one_and_those_that_were_there_count_for_nothing(now):
    latest = ["val_reward 0.5"]
    stage = Stage("GRPO", 50, Work(range(21, 51), "epochs", done=20, now=lambda: latest[0]))
    for _ in range(3):
        now(12)
        stage.advance(1)
    assert stage.line() == "GRPO: 23 of 50 epochs, 12 s/epoch, 5 min left, val_reward 0.5"
    assert stage.summary() == "GRPO: 3 epochs in 36 s, 12 s/epoch"


def test_the_rate_is_that_of_the_last_minute(now):
    stage = Stage("x", 10_000, Work([]))
    for seconds, count in [(100, 100)] * 3 + [(1, 50)] * 70:
        now(seconds)
        stage.advance(count)
    assert stage.rate == pytest.approx(50, rel=0.05)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_a_bar_fits_every_width_and_leaves_out_what_matters_least(now, width):
    stage = Stage("inference: 6500 prompts", 6500, Work([], "prompts", known=340))
    now(34)
    stage.advance(1200)
    (line,) = text_of(stage, width)
    assert len(line) <= width
    assert "1,200/6,500" in line
    assert ("2:30 left" in line) == (width >= 40)
    assert ("35.3 prompts/s" in line) == (width >= 60)
    assert ("340 known" in line) == (width >= 80)
    assert ("  0:34" in line) == (width >= 80)
    if width >= 40:
        assert line.index("1,200/6,500") - line.index("━") > 6, "room for the bar"


def test_metrics_stand_below_the_bar_on_one_line(now):
    stage = Stage(
        "GRPO", 5, Work([], "epochs", now=lambda: "train_loss 0.1234, val_loss 5.1200\x1b[2J, val_reward 0.8")
    )
    now(1)
    assert text_of(stage, 80)[1] == "  train_loss 0.1234, val_loss 5.1200\\x1b[2J, val_reward 0.8"
    assert len(text_of(stage, 30)) == 2


@pytest.mark.parametrize(
    ("seconds", "words", "figures"),
    [
        (0, "0.0 s", "0:00"),
        (0.008, "8 ms", "0:00"),
        (0.4, "0.4 s", "0:00"),
        (34, "34 s", "0:34"),
        (725, "12 min", "12:05"),
        (10_800, "3.0 h", "3:00:00"),
    ],
)
def test_times(seconds, words, figures):
    assert (duration(seconds), clock(seconds)) == (words, figures)


# ---------------------------------------------------------------------- without a terminal


def test_plain_output_shows_life_now_and_then_and_a_summary(now, capsys):
    batches = [[0] * 10] * 20
    for _ in Screen().track(Work(batches, "prompts", len, known=3), "inference: 200 prompts to ask, 3 known", 200):
        now(BETWEEN_LINES / 4)
    assert plain_lines(capsys) == [
        "inference: 200 prompts to ask, 3 known",
        "inference: 40 of 200 prompts, 1.3/s, 2 min left, 3 known",
        "inference: 80 of 200 prompts, 1.3/s, 90 s left, 3 known".replace("90 s", duration(90)),
        "inference: 120 of 200 prompts, 1.3/s, 60 s left, 3 known",
        "inference: 160 of 200 prompts, 1.3/s, 30 s left, 3 known",
        "inference: 200 prompts in 2 min, 1.3/s",
    ]


def test_a_short_stage_says_no_more_than_its_beginning_or_nothing(capsys):
    assert list(Screen().track(range(3), "vision: 3 images", 3)) == [0, 1, 2]
    assert list(Screen().track(Work(range(3), "files", after=2), "digests", 3)) == [0, 1, 2]
    assert loaded(Screen().track, "loading", lambda: "model") == "model"
    assert plain_lines(capsys) == ["vision: 3 images"]


def test_quiet_says_nothing_and_verbose_adds_details(now, capsys):
    for screen in (Screen(quiet=True), Screen(), Screen(verbose=True)):
        screen.detail("a detail")
        for _ in screen.track(range(2), "stage: 2 items", 2):
            now(60 if screen.quiet else 0)
    assert plain_lines(capsys) == ["stage: 2 items", "a detail", "stage: 2 items"]


def test_forced_colours_make_no_terminal_of_a_log_file(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    list(Screen().track(range(3), "vision: 3 images", 3))
    assert plain_lines(capsys) == ["vision: 3 images"]


# ---------------------------------------------------------------------- on a terminal


def test_a_bar_shows_rate_time_left_and_cache_hits_and_lines_stay_above_it():
    screen = on_terminal(100)
    for number in screen.track(Work(range(4), "epochs", known=5, now=lambda: "val_reward 0.5"), "GRPO: 4 epochs", 4):
        time.sleep(0.3)
        screen.say(f"row {number} of the table")
    seen = screen.out.file.getvalue()
    assert re.search(r"GRPO [━╸╺ ]+ [123]/4  [\d.]+ epochs/s  0:0\d left  0:0\d  5 known", seen)
    assert "  val_reward 0.5" in seen
    for number in range(4):  # whole, on a line of its own, with the bar erased before it
        assert re.search(rf"(\x1b\[2K|\n|\r)row {number} of the table\n", seen), number
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") == 1, "the cursor is there again"


def test_a_stage_within_another_has_its_bar_below(now):
    screen = on_terminal()
    outer = screen.track(range(2), "GRPO", 2)
    next(outer)
    inner = screen.track(range(30), "online rollouts: 30 prompts", 30)
    next(inner)
    now(1)
    assert [str(row.columns[0]._cells[0]) for row in screen._bars().renderables] == ["GRPO", "online rollouts"]
    inner.close()
    outer.close()
    assert screen._stages == []


def test_a_bar_of_a_stage_that_failed_is_gone_before_the_message():
    screen = on_terminal()
    kept = screen.track(range(2), "GRPO", 2)
    next(kept)
    assert "\x1b[?25h" not in screen.out.file.getvalue()
    settle()
    assert screen.out.file.getvalue().endswith("\x1b[?25h\r")
    settle()
    kept.close()


@pytest.mark.parametrize("width", [40, 80])
def test_a_table_is_whole_on_any_terminal(width):
    screen = on_terminal(width)
    screen.table(
        "accuracy", ["method", "1 shot", "4 shots"], [["zero_shot", "0.244 [0.21, 0.28]", ""], ["grpo"] + ["0.8"] * 2]
    )
    seen = screen.out.file.getvalue()
    assert "zero_shot" in seen
    assert "0.244 [0.21, 0.28]" in seen
    assert ("grpo: 1 shot 0.8, 4 shots 0.8\n" in seen) == (width == 40)


def test_training_on_a_real_terminal(warm):
    status, seen = through_terminal(["train", *SMALL[:4], "--grpo-epochs", "2000"], warm, stop_after="  200  ")
    assert status == 130
    assert seen.rstrip().endswith(
        "lever: interrupted; run the same command again to go on\x1b[0m".removesuffix("\x1b[0m")
    )
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") > 0
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen))
    bars = [line for line in lines if line.startswith("GRPO ━")]
    assert any(re.search(r"\d+/2,000  .*(epochs/s|/epoch)  \d+:\d\d left  \d+:\d\d", bar) for bar in bars), bars
    assert any(line.startswith("  train_loss ") and "val_reward" in line for line in lines)
    table = (warm / RUN / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line in table][: len(table) - 1] == table[: len(table) - 1]
    assert lines.count(table_header("grpo")[1]) == 1
