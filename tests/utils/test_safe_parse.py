"""Text from strangers: read within bounds or refused in one line, and never printed raw."""

import gc
import io
import json
import os
import re
import subprocess
import sys
import time

import pytest
import yaml
from helpers import clean_environment
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from lever_lm.utils.console import Screen
from lever_lm.utils.safe_parse import CONFIG_LIMIT, FILE_LIMIT, lines, load_yaml, loads, read_bytes, read_json
from lever_lm.utils.terminal import json_text, one_line, printable, shown

ESCAPE, BIDI, BYTE = "\x1b[2J\x1b]0;owned\x07", "\u202e", "\udcff"
ANYTHING = st.text(st.characters(), max_size=60)  # surrogates and controls among them
SOUND = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85"), max_size=20)  # PyYAML loses \x85
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    PLAIN | SOUND, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(SOUND, inner, max_size=4), max_leaves=12
)
# Characters of the grammar more often than others: most texts get past the first one.
JSON_LIKE = st.text(st.sampled_from('[]{}:,"\\ue+-.0123456789ENatrflsd \n\x00\ud800é'), max_size=60)
YAML_LIKE = st.text(st.sampled_from("[]{}:,\"'\\&*!|>?-#%@`~<=.0123456789xobEeNaYnTZ_+ \n\t\x00\ud800é"), max_size=60)


def refused(read, content) -> str:
    """The one short line that a text is refused with."""
    with pytest.raises(ValueError) as caught:
        read(content)
    message = str(caught.value)
    assert 0 < len(message) < 500
    assert "\n" not in message
    assert printable(message) == message
    return message


def read_or_refused(read, content):
    """What is read; None where it is refused in a line."""
    try:
        return read(content)
    except ValueError:
        refused(read, content)
        return None


# ---------------------------------------------------------------------- JSON


@given(VALUES)
def test_sound_json_is_read_as_it_was_written(value):
    assert loads(json.dumps(value)) == value
    assert loads(json.dumps(value, ensure_ascii=False).encode("utf-8")) == value


@given(JSON_LIKE | ANYTHING)
@settings(max_examples=500)
def test_no_text_does_more_than_being_refused_as_json(text):
    found = read_or_refused(loads, text)
    if found is not None:
        assert found == json.loads(text)
    read_or_refused(lambda content: loads(content, nan=True), text)


@given(st.binary(max_size=60))
def test_no_bytes_do_more_than_being_refused(content):
    read_or_refused(loads, content)
    read_or_refused(load_yaml, content)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' appears twice"),
        ('{"\x1b": 1, "\x1b": 2}'.replace("\x1b", "\\u001b"), r"'\\x1b' appears twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[" * 40 + "]" * 40, "nested too deeply"),
        ("9" * 5000, "an integer of 5000 digits"),
        ("-" + "9" * 30, "an integer of 31 digits"),
        ("1e400", "1e400, which is not finite"),
        ("[-1e999]", "not finite"),
        ("[NaN]", "NaN, which is not finite"),
        ('{"a": -Infinity}', "-Infinity, which is not finite"),
        (b'"\xff"', "can't decode byte 0xff"),
        (b'"\xed\xa0\x80"', "can't decode byte 0xed"),
        ("{}".encode("utf-16"), "can't decode"),
        ('"\x00"', "control character"),
        ("\x00", "Expecting value"),
        ('["\\ud800"]', "half a character"),
        ('{"\\uDC00": 1}', "half a character"),
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
    ],
    ids=lambda value: str(value)[:16],
)
def test_json_that_is_refused_says_why(text, why):
    assert re.search(why, refused(loads, text))


def test_a_pair_of_halves_is_a_character():
    assert loads('"\\ud83d\\ude00"') == "😀"
    assert loads('"\\\\ud800"') == "\\ud800"


def test_a_name_of_any_bytes_comes_back_from_a_file_of_ours(tmp_path):
    (tmp_path / "best.json").write_text(json_text({"checkpoint": f"run{BYTE}"}))
    assert read_json(tmp_path / "best.json") == {"checkpoint": f"run{BYTE}"}


def test_where_they_may_stand_numbers_that_are_not_finite_are_read():
    found = loads("[NaN, Infinity, -1e400, -12345678901234567890123, 12345678901234567890]", nan=True)
    assert repr(found) == "[nan, inf, -inf, -inf, 12345678901234567890]"


@pytest.mark.parametrize("collecting", [True, False])
@pytest.mark.parametrize("text", ["[1]", "[1", '{"a": 1, "a": 2}', "[" * 100_000])
def test_garbage_is_collected_after_reading_if_it_was_before(collecting, text):
    try:
        gc.enable() if collecting else gc.disable()
        read_or_refused(loads, text)
        assert gc.isenabled() is collecting
    finally:
        gc.enable()


def test_reading_strictly_takes_no_multiple_of_the_time():
    rows = [
        {"question_id": i, "image_id": i, "answers": [{"answer": "net", "id": j} for j in range(10)]}
        for i in range(9999)
    ]
    text, took = json.dumps(rows), {}
    for name, read in (("plain", json.loads), ("ours", loads)):
        took[name] = min(_seconds(lambda read=read: read(text)) for _ in range(3))
    assert took["ours"] < 5 * took["plain"]


def _seconds(work) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


# ---------------------------------------------------------------------- files


def test_a_file_beyond_its_limit_is_refused_without_being_read(tmp_path):
    path = tmp_path / "huge.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a hole: reading it would end in a MemoryError
    assert "larger than 16 MiB" in refused(read_json, path)
    assert "larger than 256 KiB" in refused(lambda p: read_bytes(p, CONFIG_LIMIT), path)
    path.write_bytes(b"[]" + b" " * (FILE_LIMIT - 2))
    assert read_json(path) == []


def test_a_pipe_a_folder_and_a_device_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(OSError):
            read_bytes(path)


@given(st.binary(max_size=80) | st.lists(st.sampled_from([b"ab", b"\n", b"\r", b"c"]), max_size=30).map(b"".join))
@example(b"abcd")
@example(b"abcd\nabcde\nf")
def test_lines_are_those_of_the_file_in_parts_that_join_again(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "lines"
    path.write_bytes(content)
    found = list(lines(path, 4))
    assert all(len(line.text.encode("utf-8", "replace")) <= 12 for line in found)
    wanted = content.split(b"\n")
    for number, line in enumerate(wanted, 1):
        parts = [part for part in found if part.number == number]
        if all(byte < 128 for byte in line):
            assert "".join(part.text for part in parts).encode() == line
        assert [part.ended for part in parts[:-1]] == [False] * len(parts[:-1])
        assert all(part.ended for part in parts[-1:]) or number == len(wanted)
        assert all(part.whole for part in parts) or len(line) >= 4
        assert not any(part.whole for part in parts) or len(parts) == 1


def test_parts_of_a_long_line_overlap_where_asked(tmp_path):
    (tmp_path / "log").write_bytes(b"abcdefgh\nij")
    assert [line.text for line in lines(tmp_path / "log", 4, overlap=2)] == ["abcd", "cdefgh", "gh", "ij"]


# ---------------------------------------------------------------------- YAML


@given(VALUES)
def test_yaml_of_plain_values_is_read_as_it_was_written(value):
    for options in ({}, {"sort_keys": False, "allow_unicode": True}, {"default_flow_style": True}):
        assert load_yaml(yaml.safe_dump(value, **options)) == value


@given(YAML_LIKE | ANYTHING)
@settings(max_examples=1000)
@example("!!timestamp x")
@example("2024-99-99")
@example("- &a b\n- *a")
@example("0x")
@example("1:2:3")
def test_no_text_does_more_than_being_refused_as_yaml(text):
    found = read_or_refused(load_yaml, text)
    if found is not None:
        assert repr(found) == repr(yaml.safe_load(text)), "what is read is what the library reads"


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (BOMB, "anchors and aliases"),
        ("a: &x 1", "anchors and aliases"),
        ("a: *x", "anchors and aliases"),
        ("a: !!python/object/apply:os.system ['true']", "a tag"),
        ("!!timestamp x", "a tag"),
        ("!!set {a}", "a tag"),
        ("a: !!binary aGk=", "a tag"),
        ("a: !x 1", "a tag"),
        ("a: 1\nb: 2\na: 3", "'a' appears twice at line 3"),
        ("a: {b: 1, b: 2}", "'b' appears twice"),
        ("1: a\n1.0: b", "appears twice"),
        ("a: 1\n<<: {b: 2}", "merge"),
        ("2024-99-99", "month must be"),
        ("a: " + "9" * 5000, "5000 digits"),
        ("a: 0x" + "f" * 5000, "5002 digits"),
        ("a: 1" + ":10" * 5000, "digits"),
        ("[" * 10_000, "nested too deeply"),
        ("- " * 10_000, "nested too deeply"),
        ("".join(" " * i + "a:\n" for i in range(100)), "nested too deeply"),
        ("? [1, 2]\n: 3", "no plain value"),
        ("a: \x1b", "special characters"),
        ("a\x00", "special characters"),
        (b"a: \xff", "can't decode"),
        ("a: b: c", "not allowed here"),
        ("a: 1\n---\nb: 2", "single document"),
        ("%YAML 9.9\n--- a", "incompatible"),
        ('"\\U99999999"', "too large"),
        ("!" + "t" * 100_000 + " x", "a tag"),
    ],
    ids=lambda value: str(value)[:16],
)
def test_yaml_that_is_refused_says_why(text, why):
    assert why in refused(load_yaml, text)


@pytest.mark.parametrize("piece", ["k: 1\n", "[1,", "- ", "a ", '"\\x41', "a: |\n "])
def test_the_largest_yaml_takes_seconds_whatever_is_in_it(piece):
    text = (piece * CONFIG_LIMIT)[:CONFIG_LIMIT]
    assert _seconds(lambda: read_or_refused(load_yaml, text)) < 60


# ---------------------------------------------------------------------- showing


UNSAFE = [
    *map(chr, range(32)),
    "\x7f",
    *map(chr, range(0x80, 0xA0)),
    "\u2028",
    "\u2029",
    *"\u202a\u202b\u202c\u202d\u202e",
]
UNSAFE += [*"\u2066\u2067\u2068\u2069", "\ud800", "\udcff", "\udfff"]
UNSAFE = [character for character in UNSAFE if character not in "\n\t"]


@given(ANYTHING)
def test_what_is_printable_can_be_encoded_and_steers_nothing(text):
    safe = printable(text)
    assert not set(UNSAFE) & set(safe)
    safe.encode("utf-8")
    assert printable(safe) == safe
    assert len(one_line(text).splitlines()) <= 1


@pytest.mark.parametrize("character", UNSAFE, ids=ascii)
def test_every_character_that_could_do_harm_is_seen_as_an_escape(character):
    code = ord(character)
    assert printable(f"a{character}b") == (f"a\\x{code:02x}b" if code < 256 else f"a\\u{code:04x}b")


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "ümläut ß",
        "漢字かな",
        "한국어",
        "עברית",
        "العربية",
        "हिन्दी",
        "ไทย",
        "🏳️‍🌈👩‍🚀🇩🇪",
        "Σ × − → …",
        "a\n\tb",
        "\\x1b",
        "می‌خواهم",
        "e\u0301",
    ],
)
def test_ordinary_text_of_any_language_is_unchanged(text):
    assert printable(text) == text


@given(VALUES | st.recursive(ANYTHING, lambda inner: st.lists(inner) | st.dictionaries(ANYTHING, inner), max_leaves=8))
def test_json_for_a_terminal_reads_back_as_the_same_value(value):
    text = json_text(value)
    assume(not re.search("[\ud800-\udbff][\udc00-\udfff]", repr_raw(value)))  # two halves are one character in JSON
    assert json.loads(text) == value
    assert printable(text) == text
    assert "\n" not in text


def repr_raw(value) -> str:
    """Every text in a value, in a row."""
    if isinstance(value, dict):
        return "\0".join(repr_raw(item) for pair in value.items() for item in pair)
    return "\0".join(map(repr_raw, value)) if isinstance(value, list) else str(value)


def test_json_for_a_terminal_keeps_other_languages_readable():
    assert json_text({"ü": "漢字\x7f\u2028😀"}) == '{"ü": "漢字\\u007f\\u2028😀"}'


@given(VALUES | st.integers() | ANYTHING)
def test_what_is_shown_of_a_value_is_a_short_line(value):
    assert len(shown(value)) <= 60
    assert len(one_line(shown(value))) == len(shown(value))


def test_what_is_shown_of_the_largest_values_takes_no_time():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    huge = [deep, 10**6000, [[0] * 1000] * 1000, "x" * 10**8, {i: i for i in range(10**6)}]
    assert _seconds(lambda: [shown(value) for value in (*huge, huge)]) < 2
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


def lever_bytes(*arguments, cwd, **extra):
    """`python -m lever_lm …` in a process of its own, its output as bytes."""
    command = [sys.executable, "-m", "lever_lm", *arguments]
    return subprocess.run(command, cwd=cwd, env=clean_environment(**extra), capture_output=True, timeout=300)


def assert_calm(output: bytes) -> str:
    """Output as text, which holds nothing that steers a terminal."""
    text = output.decode("utf-8")
    assert printable(text) == text
    return text


ROW = {"phase": "grpo", "epoch": 1, "val_loss": 1.0, "kl": 0.05}
NAMES = {"byte": b"run\xff", "steering": f"run{ESCAPE}{BIDI}\nlever: done".encode()}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_run_folder_of_any_name_is_worked_in_and_named_without_harm(tmp_path, name):
    folder = os.path.join(os.fsencode(tmp_path), name)
    os.mkdir(folder)
    with open(os.path.join(folder, b"metrics.jsonl"), "w") as file:
        file.write(json.dumps(ROW) + "\n")
    said = lever_bytes("best-ckpt", folder, cwd=tmp_path, PYTHONUTF8="1")
    assert said.returncode == 0, said.stderr
    assert_calm(said.stdout + said.stderr)
    again = lever_bytes("best-ckpt", folder, "--json", cwd=tmp_path, PYTHONUTF8="1")
    assert again.returncode == 0, again.stderr
    assert_calm(again.stderr)
    assert json.loads(assert_calm(again.stdout))["checkpoint"] == os.fsdecode(os.path.join(folder, b"grpo_epoch1.pt"))
    none = lever_bytes("convert", folder + b".pt", "--debug", cwd=tmp_path, LC_ALL="C")
    assert none.returncode == 1
    said = assert_calm(none.stderr)
    assert said.startswith("  Traceback")
    assert len(re.findall("(?m)^lever: ", said)) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("best-ckpt", f"--{ESCAPE}"),
        ("best-ckpt", "--limit", f"{ESCAPE}{BIDI}"),
        ("best-ckpt", "--set", f"{ESCAPE}=1"),
        ("best-ckpt", "--set", f"seed={ESCAPE}"),
        ("best-ckpt", "--recipe", f"{ESCAPE}\nlever: done"),
        ("best-ckpt", "--log", f"{ESCAPE}{BYTE}\nlever: done"),
        ("best-ckpt", "--config", f"{ESCAPE}\nlever: done"),
        (f"{ESCAPE}\nError: none",),
        ("train", "--rl-data", f"{ESCAPE}\x9b2J\nlever: done"),
        ("infer", "--icds", f"{ESCAPE}{BIDI}"),
        ("infer", "--shots", f"{ESCAPE}\x85"),
        ("convert", "a", "--to", ESCAPE),
    ],
    ids=lambda arguments: " ".join(arguments[:2]).encode("ascii", "replace").decode().replace("\x1b", ""),
)
def test_what_a_command_line_says_is_not_repeated_raw(lever, arguments):
    done = lever(*arguments)
    assert done.status in (1, 2)
    assert_calm((done.out + done.err).encode("utf-8"))
    assert len(re.findall("(?m)^(lever|Error): ", done.err)) == 1
    assert "defect" not in done.err


def test_the_length_of_a_message_is_bounded(lever):
    for arguments in (("--set", f"seed={'x' * 100_000}"), ("--set", f"{'x' * 100_000}=1"), ("--recipe", "x" * 100_000)):
        done = lever("best-ckpt", *arguments)
        assert done.status == 2
        assert len(done.err) < 1000
