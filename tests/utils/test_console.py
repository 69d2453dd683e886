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
from rich.console import Console

from lever_lm.training.metrics import table_header
from lever_lm.utils import console
from lever_lm.utils.console import Screen, settle
from lever_lm.utils.progress import BETWEEN_LINES, Work, duration, loaded
from lever_lm.utils.terminal import printable


@pytest.fixture
def now(monkeypatch):
    """A clock that goes on only when it is told to."""
    passed = [1000.0]
    monkeypatch.setattr(console, "monotonic", lambda: sum(passed))
    return passed.append


def on_terminal(width: int = 80) -> Screen:
    """A screen on what passes for a terminal, kept as text."""
    screen = Screen()
    screen.out = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, highlight=False)
    return screen


def plain_lines(capsys) -> list[str]:
    text = capsys.readouterr().out
    assert printable(text) == text
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
                written += os.read(terminal, 1 << 16)
            except OSError:  # the other end is closed
                break
            if stop_after and stop_after.encode() in written:
                os.kill(pid, signal.SIGINT)
                stop_after = ""
        else:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(terminal)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, written.decode("utf-8")


# ---------------------------------------------------------------------- without a terminal


def test_plain_output_shows_life_now_and_then_and_a_summary(now, capsys):
    batches = [[0] * 10] * 20
    for _ in Screen().track(Work(batches, "prompts", len, known=3), "inference: 200 prompts to ask, 3 known", 200):
        now(BETWEEN_LINES / 4)
    assert plain_lines(capsys) == [
        "inference: 200 prompts to ask, 3 known",
        "inference: 40 of 200 prompts, 1.3/s, 2 min left, 3 known",
        "inference: 80 of 200 prompts, 1.3/s, 2 min left, 3 known",
        "inference: 120 of 200 prompts, 1.3/s, 60 s left, 3 known",
        "inference: 160 of 200 prompts, 1.3/s, 30 s left, 3 known",
        "inference: 200 prompts in 2 min, 1.3/s",
    ]


def test_slow_units_are_told_by_the_time_of_one_and_those_that_were_there_count_for_nothing(now, capsys):
    work = Work(range(47, 51), "epochs", done=46, now=lambda: "val_reward 0.5", after=BETWEEN_LINES)
    for _ in Screen().track(work, "GRPO", 50):
        now(12)
    assert plain_lines(capsys) == [
        "GRPO: 49 of 50 epochs, 12 s/epoch, 12 s left, val_reward 0.5",
        "GRPO: 4 epochs in 48 s, 12 s/epoch",
    ]


@pytest.mark.parametrize("colours", [None, "1"])
def test_a_short_stage_says_no_more_than_its_beginning_or_nothing(monkeypatch, capsys, colours):
    if colours:
        monkeypatch.setenv("FORCE_COLOR", colours)  # makes no terminal of a log file
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


def test_times():
    words = ["0.0 s", "8 ms", "0.4 s", "34 s", "12 min", "3.0 h"]
    assert list(map(duration, (0, 0.008, 0.4, 34, 725, 10_800))) == words


# ---------------------------------------------------------------------- on a terminal


@pytest.mark.parametrize("width", [20, 40, 100])
def test_a_bar_fits_every_width_and_leaves_out_what_matters_least(now, width):
    screen = on_terminal(width)
    work = Work([0, 1], "prompts", lambda item: 1200, known=340, now=lambda: "loss 0.1\x1b[2J, " + "x" * width)
    stage = screen.track(work, "inference: 6500 prompts", 6500)
    next(stage)
    now(34)
    next(stage)
    bar, below = (line.rstrip() for line in drawn(screen))
    assert len(bar) <= width >= len(below)
    assert ("1,200 of 6,500" in bar) == (width >= 40)
    assert ("35.3/s, 3 min" in bar) == (width >= 60)
    assert ("35.3/s, 3 min left, 340 known" in bar) == (width >= 100)
    assert below.startswith("  loss 0.1\\x1b[2J"[: width - 2])
    stage.close()


def drawn(screen: Screen) -> list[str]:
    """The bars that stand on a screen now, as text."""
    paper = Console(file=io.StringIO(), width=screen.out.width, color_system=None)
    paper.print(screen._bars.get_renderable())
    return paper.file.getvalue().splitlines()


def test_a_bar_shows_rate_time_left_and_cache_hits_and_lines_stay_above_it():
    screen = on_terminal(100)
    for number in screen.track(Work(range(4), "epochs", known=5, now=lambda: "val_reward 0.5"), "GRPO: 4 epochs", 4):
        time.sleep(0.3)
        screen.say(f"row {number} of the table")
    seen = screen.out.file.getvalue()
    assert re.search(r"GRPO +[━╸╺ ]+ [123] of 4 epochs, [\d.]+/s, [\d.]+ s left, 5 known", seen)
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
    assert [line.split(" ")[0] for line in drawn(screen)] == ["GRPO", "online"]
    inner.close()
    assert [line.split(" ")[0] for line in drawn(screen)] == ["GRPO"]
    outer.close()


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
    status, seen = through_terminal(["train", *SMALL[:4], "--grpo-epochs", "1000"], warm, stop_after="  100  ")
    assert status == 130
    assert seen.rstrip().endswith("lever: interrupted; run the same command again to go on")
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") > 0
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen))
    bars = [line for line in lines if re.match("GRPO +━", line)]
    assert any(re.search(r"\d+ of 1,000 epochs, .*(/s|/epoch), .* left", bar) for bar in bars), bars
    assert any(line.startswith("  train_loss ") and "val_reward" in line for line in lines)
    table = (warm / RUN / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line in table][: len(table) - 1] == table[: len(table) - 1]
    assert lines.count(table_header("grpo")[1]) == 1
