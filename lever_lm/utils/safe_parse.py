"""JSON, YAML and logs of any origin, read within bounds.

An error in a text is a ValueError whose words are one short line; callers add the file and what mends it.
"""

import errno
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import yaml

from lever_lm.utils.terminal import shown

CONFIG_LIMIT = 256 << 10  # bytes of a YAML file; ours have 4 KiB
FILE_LIMIT = 16 << 20  # bytes of a JSON file of ours that is read whole: best.json, metrics.json, an index
LINE_LIMIT = 1 << 20  # bytes of a line of JSON
_DEPTH = 32  # brackets within brackets
_DIGITS = 20  # of an integer: 64 bits, and its sign
_NULL = ("", "~", "null", "Null", "NULL")  # in YAML, without quotes
_WORDS = 300  # characters of a library's own words

# ---------------------------------------------------------------------- reading files


def open_file(path: Path | str) -> BinaryIO:
    """Open a regular file to read bytes from. Raises OSError for all else: a pipe or a device may hang a command."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # NONBLOCK: no wait for a writer
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file")
    return file


def read_bytes(path: Path | str, limit: int | None = None, *, pipe: bool = False) -> bytes:
    """Read a regular file, or with `pipe` any. Raises OSError, and ValueError where it holds more than `limit` bytes,
    which are not read."""
    with open(path, "rb") if pipe else open_file(path) as file:
        content = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise ValueError(f"it is larger than {f'{limit >> 20} MiB' if limit >> 20 else f'{limit >> 10} KiB'}")
    return content


def read_json(path: Path | str, limit: int | None = FILE_LIMIT, *, nan: bool = False):
    """Return the content of a JSON file. Raises OSError, and ValueError as `loads` does."""
    return loads(read_bytes(path, limit), nan=nan)


def read_object(path: Path | str, limit: int | None = FILE_LIMIT) -> dict:
    """Return the object in a JSON file; {} where there is none that can be read."""
    try:
        content = read_json(path, limit)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class Line(NamedTuple):
    """A line of a file, or a part of one that is too long: its number from 1, its text without the newline, whether
    that is the whole line, and whether a newline ends it."""

    number: int
    text: str
    whole: bool
    ended: bool


def lines(path: Path | str, limit: int, overlap: int = 0) -> Iterator[Line]:
    """Yield the lines of a file; longer ones in parts of `limit` bytes, each of which begins with the last
    `overlap` bytes of the part before. Bytes that are no UTF-8 are replaced. Raises OSError."""
    with open(path, "rb") as file:
        number, before, begun = 1, b"", False
        while part := file.readline(limit):
            ended = part.endswith(b"\n")
            text = (before + part).removesuffix(b"\n").decode("utf-8", "replace")
            yield Line(number, text, not begun and (ended or len(part) < limit), ended)
            number, before = (number + 1, b"") if ended else (number, part[-overlap:] if overlap else b"")
            begun = not ended


def is_epoch(value) -> bool:
    """Return whether a value can be the number of an epoch."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9


# ---------------------------------------------------------------------- JSON


def loads(content: bytes | str, *, nan: bool = False):
    """Return a JSON text as Python values; a byte order mark before it is passed over. Raises ValueError for what is no
    JSON, a key that an object holds twice, numbers beyond 64 bits or a float, NaN and infinity, and deep nesting. With
    `nan`, NaN and infinity are read, and integers beyond 64 bits as floats. Texts may hold half a character, as names
    of files do that are of any bytes."""
    text = (content if isinstance(content, str) else content.decode("utf-8")).removeprefix("\ufeff")
    numbers = {"parse_int": _any_integer} if nan else {"parse_int": _integer, "parse_float": _float}
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=float if nan else _float, **numbers)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    if len(text) <= FILE_LIMIT and text.count("[") + text.count("{") > _DEPTH:
        _check_depth(value)
    return value


def _once(pairs: list[tuple]) -> dict:
    """Return an object. Raises ValueError where it names a key twice: JSON would keep the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        (repeated, _), *_ = (Counter(name for name, _ in pairs) - Counter(found.keys())).items()
        raise ValueError(f"{shown(repeated)} appears twice in one object")
    return found


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"it holds an integer of {len(text)} digits")
    return int(text)


def _any_integer(text: str) -> int | float:
    return int(text) if len(text) <= _DIGITS else float(text)


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"it holds the number {text[:40]}, which is not finite")
    return value


def _check_depth(value) -> None:
    """Raise ValueError for brackets within more than _DEPTH others."""
    level = [value]
    for _ in range(_DEPTH + 1):
        inner = []
        for item in level:
            if isinstance(item, (dict, list)):
                inner += item.values() if isinstance(item, dict) else item
        level = inner
    if level:
        raise ValueError("its brackets are nested too deeply")


# ---------------------------------------------------------------------- YAML


def load_yaml(content: bytes | str):
    """Return a YAML text as lists and mappings of texts, and None for what is empty or null. Raises ValueError for what
    is no YAML or holds more than that: tags, anchors and aliases, a key twice in one mapping, deep nesting."""
    try:
        return deepcopy(_parsed(content if isinstance(content, str) else content.decode("utf-8")))
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        words = " ".join(str(error).replace('in "<unicode string>",', "at").split())
        raise ValueError(words if len(words) <= _WORDS else f"{words[:_WORDS]}…") from None


@lru_cache(maxsize=16)  # a command reads the config of its run several times
def _parsed(text: str):
    return yaml.load(text, _TextLoader)


class _TextLoader(yaml.BaseLoader):
    """YAML as a config needs it. An alias can stand for more memory than there is, and a tag for another type."""

    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(None, None, "anchors and aliases are not read", event.start_mark)
        if event.tag is not None:
            raise yaml.MarkedYAMLError(None, None, f"a tag, {shown(event.tag)}, is not read", event.start_mark)
        if self.depth >= _DEPTH:
            raise yaml.MarkedYAMLError(None, None, "nested too deeply", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_scalar(self, node):
        return None if node.style is None and node.value in _NULL else super().construct_scalar(node)

    def construct_mapping(self, node, deep=False):
        found: dict = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key is no plain value", key_node.start_mark)
            key = self.construct_object(key_node)
            if key in found:
                raise yaml.MarkedYAMLError(None, None, f"{shown(key)} appears twice", key_node.start_mark)
            found[key] = self.construct_object(value_node, deep)
        return found
