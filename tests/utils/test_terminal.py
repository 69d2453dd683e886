"""What a terminal shows of text and values from data, directly and through the command line."""

import io
import json
import os
import re
import subprocess
import sys
import time

import pytest
from helpers import clean_environment
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console
from values import ANYTHING, VALUES

from lever_lm.utils.console import Screen
from lever_lm.utils.terminal import json_text, one_line, printable, shown

ESCAPE, BIDI, BYTE = "\x1b[2J\x1b]0;owned\x07", "\u202e", "\udcff"
UNSAFE = [chr(code) for code in (*range(32), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"]
UNSAFE += [*"\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069", "\ud800", "\udcff", "\udfff"]


@given(ANYTHING)
def test_what_is_printable_can_be_encoded_and_steers_nothing(text):
    safe = printable(text)
    assert not set(UNSAFE) & set(safe)
    safe.encode("utf-8")
    assert printable(safe) == safe
    assert len(one_line(text).splitlines()) <= 1


def test_every_character_that_could_do_harm_is_seen_as_an_escape():
    for character in UNSAFE:
        code = ord(character)
        assert printable(f"a{character}b") == (f"a\\x{code:02x}b" if code < 256 else f"a\\u{code:04x}b")


def test_ordinary_text_of_any_language_is_unchanged():
    text = "ümläut ß 漢字かな 한국어 עברית العربية हिन्दी ไทย 🏳️‍🌈👩‍🚀🇩🇪 Σ × − → … a\n\tb \\x1b می‌خواهم e\u0301"
    assert printable(text) == text


@given(VALUES | st.recursive(ANYTHING, lambda inner: st.lists(inner) | st.dictionaries(ANYTHING, inner), max_leaves=8))
def test_json_for_a_terminal_reads_back_as_the_same_value(value):
    text = json_text(value)
    assume(not re.search("[\ud800-\udbff][\udc00-\udfff]", repr_raw(value)))  # two halves are one character in JSON
    assert json.loads(text) == value
    assert printable(text) == text
    assert "\n" not in text
    assert json_text({"ü": "漢字\x7f\u2028😀"}) == '{"ü": "漢字\\u007f\\u2028😀"}'


def repr_raw(value) -> str:
    """Every text in a value, in a row."""
    if isinstance(value, dict):
        return "\0".join(repr_raw(item) for pair in value.items() for item in pair)
    return "\0".join(map(repr_raw, value)) if isinstance(value, list) else str(value)


@given(VALUES | st.integers() | ANYTHING)
def test_what_is_shown_of_a_value_is_a_short_line(value):
    assert len(shown(value)) <= 60
    assert len(one_line(shown(value))) == len(shown(value))


def test_what_is_shown_of_the_largest_values_takes_no_time():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    huge = [deep, 10**6000, [[0] * 1000] * 1000, "x" * 10**8, {i: i for i in range(10**6)}]
    begun = time.process_time()
    for value in (*huge, huge):
        shown(value)
    assert time.process_time() - begun < 2
    assert shown(10**6000) == "an integer of 19932 bits"
    while deep:  # freed one by one: all at once recurses
        deep = deep.pop()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_screen_shows_what_comes_from_data_in_its_place(terminal):
    screen, text = Screen(), f"[red]x{ESCAPE}{BIDI}{BYTE}\nlever: done"
    screen.out = Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)
    screen.say(text)
    assert list(screen.track([1, 2], text, 2)) == [1, 2]
    screen.table(text, [text, text], [[text, text]])
    shown_text = screen.out.file.getvalue()
    for harm in (ESCAPE, BIDI, BYTE, "\nlever", "\x07"):
        assert harm not in shown_text
    assert shown_text.count("[red]x\\x1b[2J\\x1b]0;owned\\x07\\u202e\\udcff\\nlever: done") >= 7


# ---------------------------------------------------------------------- through the command line


def assert_calm(text: str) -> str:
    """Output of a command, which holds nothing that steers a terminal."""
    assert printable(text) == text
    return text


@pytest.mark.parametrize("name", [os.fsdecode(b"run\xff"), f"run{ESCAPE}{BIDI}\nlever: done"], ids=["byte", "steering"])
def test_a_run_folder_of_any_name_is_worked_in_and_named_without_harm(lever, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"phase": "grpo", "epoch": 1, "val_loss": 1.0, "kl": 0.05}\n')
    said, again = lever("best-ckpt", folder), lever("best-ckpt", folder, "--json")
    assert (said.status, again.status) == (0, 0)
    for done in (said, again):
        assert_calm(done.out + done.err).encode()
    assert again.json["checkpoint"] == str(folder / "grpo_epoch1.pt")


def test_a_byte_that_is_no_text_does_no_harm_in_a_locale_without_utf8(tmp_path):
    command = [sys.executable, "-m", "lever_lm", "convert", os.fsencode(tmp_path) + b"/run\xff.pt", "--debug"]
    done = subprocess.run(command, env=clean_environment(LC_ALL="C"), capture_output=True, timeout=300)
    assert done.returncode == 1
    said = assert_calm(done.stderr.decode("utf-8"))
    assert said.startswith("  Traceback")
    assert len(re.findall("(?m)^lever: ", said)) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("best-ckpt", f"--{ESCAPE}"),
        ("best-ckpt", "--limit", f"{ESCAPE}{BIDI}"),
        ("best-ckpt", "--set", f"{ESCAPE}=1"),
        ("best-ckpt", "--log", f"{ESCAPE}{BYTE}\nlever: done"),
        ("best-ckpt", "--config", f"{ESCAPE}\nlever: done"),
        (f"{ESCAPE}\nError: none",),
        ("infer", "--shots", f"{ESCAPE}\x85"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]).encode("ascii", "replace").decode().replace("\x1b", ""),
)
def test_what_a_command_line_says_is_not_repeated_raw(lever, arguments):
    done = lever(*arguments)
    assert done.status in (1, 2)
    assert_calm(done.out + done.err)
    assert len(re.findall("(?m)^(lever|Error): ", done.err)) == 1
    assert "defect" not in done.err


def test_the_length_of_a_message_is_bounded(lever):
    for arguments in (("--set", f"seed={'x' * 100_000}"), ("--set", f"{'x' * 100_000}=1"), ("--recipe", "x" * 100_000)):
        done = lever("best-ckpt", *arguments)
        assert done.status == 2
        assert len(done.err) < 1000
