"""Text from strangers: read within bounds or refused in one line, and never printed raw."""

import json
import os
import re
import time

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from values import ANYTHING, VALUES

from lever_lm.utils.safe_parse import CONFIG_LIMIT, FILE_LIMIT, lines, load_yaml, loads, read_bytes, read_json
from lever_lm.utils.terminal import json_text, printable

BYTE = "\udcff"
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
@settings(max_examples=300)
def test_no_text_does_more_than_being_refused_as_json(text):
    found = read_or_refused(loads, text)
    if found is not None:
        assert found == json.loads(text)
    read_or_refused(lambda content: loads(content, nan=True), text)


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
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
    ],
    ids=lambda value: str(value)[:16],
)
def test_json_that_is_refused_says_why(text, why):
    assert re.search(why, refused(loads, text))


def test_halves_are_read_as_names_of_any_bytes_have_them(tmp_path):
    assert loads('["\\ud83d\\ude00", "\\\\ud800"]') == ["😀", "\\ud800"]
    (tmp_path / "best.json").write_text(json_text({"checkpoint": f"run{BYTE}"}))
    assert read_json(tmp_path / "best.json") == {"checkpoint": f"run{BYTE}"}


def test_where_they_may_stand_numbers_that_are_not_finite_are_read():
    found = loads("[NaN, Infinity, -1e400, -12345678901234567890123, 12345678901234567890]", nan=True)
    assert repr(found) == "[nan, inf, -inf, -1.2345678901234568e+22, 12345678901234567890]"


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


def texts(value):
    """A plain value as YAML has it here."""
    if isinstance(value, dict):
        return {key: texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [texts(item) for item in value]
    return value if value is None or isinstance(value, str) else yaml.safe_dump(value).split("\n")[0]


@given(VALUES)
@settings(max_examples=50)
def test_yaml_of_plain_values_is_read_as_it_was_written(value):
    for options in ({}, {"sort_keys": False, "allow_unicode": True}, {"default_flow_style": True}):
        assert load_yaml(yaml.safe_dump(value, **options)) == texts(value)


@given(YAML_LIKE | ANYTHING)
@settings(max_examples=300)
@example("2024-99-99")
@example("0x")
@example("1:2:3")
@example("a: 1\n<<: {b: 2}")
def test_no_text_does_more_than_being_refused_as_yaml(text):
    found = read_or_refused(load_yaml, text)
    if found is not None:
        assert str(found).replace("None", "''") == str(yaml.load(text, yaml.BaseLoader)).replace("None", "''")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (BOMB, "anchors and aliases"),
        ("a: *x", "anchors and aliases"),
        ("a: !!python/object/apply:os.system ['true']", "a tag"),
        ("a: !!binary aGk=", "a tag"),
        ("a: !x 1", "a tag"),
        ("a: 1\nb: 2\na: 3", "'a' appears twice at line 3"),
        ("[" * 10_000, "nested too deeply"),
        ("".join(" " * i + "a:\n" for i in range(100)), "nested too deeply"),
        ("? [1, 2]\n: 3", "no plain value"),
        ("a: \x1b", "special characters"),
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


@pytest.mark.parametrize("piece", ["k: 1\n", "[1,", "- ", "a: |\n "])
def test_a_large_yaml_takes_seconds_whatever_is_in_it(piece):
    text = (piece * CONFIG_LIMIT)[: CONFIG_LIMIT // 16]
    begun = time.process_time()
    read_or_refused(load_yaml, text)
    assert time.process_time() - begun < 2
