"""Inputs spoilt: any bytes, JSON by its values, lines by their words. Chance comes from the generator that is given."""

import json
import re
from collections.abc import Callable, Sequence
from random import Random

# What has steered a terminal, ended a line, or been no character at all.
CHARACTERS = [
    "\x1b[31m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "\u202e",
    "\u2066",
    "\u2028",
    "\x85",
    "\0",
    "\ufeff",
    "\r",
    "\n",
]
CHARACTERS += [
    "\x7f",
    "\x0b",
    "\x08" * 9,
    "é",
    "文",
    "🎲",
    "\ufffd",
    "\u0301" * 50,
    "%s",
    "{0.__class__}",
    "'",
    '"',
    "\\",
    "`",
]
_NUMBERS = [
    "0",
    "-0",
    "-1",
    "1e400",
    "-1e400",
    "1e-400",
    "NaN",
    "nan",
    "Infinity",
    "-inf",
    "1.5",
    "2147483648",
    "٣",
    "0x10",
]
_NUMBERS += [
    str(2**63 - 1),
    str(2**63),
    str(-(2**63) - 1),
    str(2**64),
    "9" * 40,
    "9" * 5000,
    "1_000",
    "1e308",
    "00",
    "+1",
]
_WORDS = [
    "",
    " ",
    "null",
    "true",
    "~",
    "../../../etc/passwd",
    "/dev/zero",
    "a" * 300,
    "x" * 70_000,
    "<script>alert(1)</script>",
]
_WORDS += [
    "http://127.0.0.1:9/x.png",
    "file:///etc/passwd",
    "__class__",
    "constructor",
    "{{7*7}}",
    "[]",
    "{}",
    "=",
    ":",
    "-",
]
TOKENS = [*CHARACTERS, *_NUMBERS, *_WORDS]
_RAW = [t.encode("utf-8") for t in TOKENS] + [
    b"\xff\xfe",
    b"\xc0\xaf",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\x80\x02",
    b"PK\x03\x04",
]
_EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1]

Mutation = Callable[[Random, bytes], bytes]


def encoded(text: str) -> bytes:
    """Text as bytes, half characters among it."""
    return text.encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------- bytes


def noise(rng: Random) -> bytes:
    """Bytes of nothing: of any kind, of ASCII, or of hostile words."""
    size = rng.choice((0, 1, 2, 8, 64, 512, 4096))
    kind = rng.randrange(3)
    if kind == 0:
        return rng.randbytes(size)
    if kind == 1:
        return bytes(rng.choices(range(32, 127), k=size))
    return b"".join(rng.choice(_RAW) for _ in range(min(size, 64)))


def spoil_bytes(rng: Random, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One to four changes of bytes, wherever they fall."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = rng.choice(_BYTE_CHANGES)(rng, content)
    if others and rng.random() < 0.1:
        other = rng.choice(others)
        content = content[: _place(rng, content)] + other[_place(rng, other) :]
    return content


def _place(rng: Random, content: bytes) -> int:
    return rng.randrange(len(content) + 1)


def _span(rng: Random, content: bytes) -> tuple[int, int]:
    start = _place(rng, content)
    return start, min(len(content), start + rng.choice((1, 2, 4, 16, 64, 1024)))


def _flip(rng: Random, content: bytes) -> bytes:
    if not content:
        return b"\1"
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 20))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(rng: Random, content: bytes) -> bytes:
    """A number at the border of its range, in either order of bytes."""
    size, start = rng.choice((1, 2, 4, 8)), _place(rng, content)
    number = (rng.choice(_EXTREMES) & (1 << 8 * size) - 1).to_bytes(size, rng.choice(("little", "big")))
    return content[:start] + number + content[start + size :]


def _cut(rng: Random, content: bytes) -> bytes:
    return content[: _place(rng, content)]


def _drop(rng: Random, content: bytes) -> bytes:
    start, stop = _span(rng, content)
    return content[:start] + content[stop:]


def _repeat(rng: Random, content: bytes) -> bytes:
    start, stop = _span(rng, content)
    return content[:stop] + content[start:stop] * rng.choice((1, 2, 100)) + content[stop:]


def _insert(rng: Random, content: bytes) -> bytes:
    start = _place(rng, content)
    block = rng.choice(_RAW) if rng.random() < 0.7 else rng.randbytes(rng.choice((1, 4, 100)))
    return content[:start] + block + content[start:]


def _extend(rng: Random, content: bytes) -> bytes:
    return content + rng.choice((b"\0", b" ", b"\n", rng.randbytes(16), content[-64:])) * rng.choice((1, 100, 4000))


_BYTE_CHANGES = (_flip, _overwrite, _cut, _drop, _repeat, _insert, _extend)

# ---------------------------------------------------------------------- JSON

# Values as they stand in a file; not all of them are JSON.
_JSON_VALUES = [json.dumps(word) for word in (*CHARACTERS, *_WORDS)] + _NUMBERS
_JSON_VALUES += [
    "[]",
    "{}",
    "[[]]",
    "[null]",
    "null",
    "true",
    "false",
    '"\\ud800"',
    '"\\udc00\\ud800"',
    '"\\u0000"',
    "[1, 2]",
]
_JSON_VALUES += [
    "[" * 20 + "]" * 20,
    "[" * 5000 + "]" * 5000,
    '{"a":' * 40 + "1" + "}" * 40,
    "[" * 100_000,
    "[0" + ",0" * 5000 + "]",
]
_JSON_VALUES += [
    '{"a":1,"a":2}',
    '{"":1}',
    '{"__proto__":{}}',
    "1" * 4400,
    "-" + "1" * 4400,
    "1." + "0" * 4400,
    "1e",
    "0.1e-9999",
]


def spoil_json(rng: Random, content: bytes) -> bytes:
    """A JSON document with one to three of its values replaced, taken away, doubled, moved, renamed or wrapped."""
    tree = [json.loads(content)]  # in a list: the whole may be replaced, too
    raw: list[tuple[str, str]] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        _spoil_node(rng, tree, raw)
    text = json.dumps(tree[0], ensure_ascii=rng.random() < 0.5) if tree else ""
    for mark, value in raw:
        text = text.replace(mark, value)
    return encoded(text)


def _spoil_node(rng: Random, tree: list, raw: list[tuple[str, str]]) -> None:
    holder, key = _any_place(rng, tree)
    if holder is None:
        return
    change = rng.randrange(8)
    if change < 4:
        mark = f"@{len(raw)}@"
        raw.append((f'"{mark}"', rng.choice(_JSON_VALUES)))
        holder[key] = mark
    elif change == 4:
        del holder[key]
    elif change == 5:
        if isinstance(holder, list):
            holder.insert(key, holder[key])
        else:  # a key twice
            mark = f"@{len(raw)}@"
            raw.append((f'"{mark}"', json.dumps(key)))
            holder[mark] = holder[key]
    elif change == 6:
        other, place = _any_place(rng, tree)
        if other is not None:
            holder[key] = json.loads(json.dumps(other[place]))  # a copy: no circles
    elif isinstance(holder, dict) and rng.random() < 0.7:
        holder[rng.choice(TOKENS)] = holder.pop(key)
    else:
        holder[key] = rng.choice(([holder[key]], {"value": holder[key]}, [holder[key]] * 3, str(holder[key])))


def _any_place(rng: Random, tree: list):
    """A container of the tree and a key or place in it; at every depth as likely."""
    places, level = [], [tree]
    while level:
        here = [(c, k) for c in level for k in (c if isinstance(c, dict) else range(len(c)))]
        if here:
            places.append(here)
        level = [value for c, k in here if isinstance(value := c[k], (dict, list))]
    return rng.choice(rng.choice(places)) if places else (None, None)


# ---------------------------------------------------------------------- lines and words

_WORD = re.compile(r"[^\s,:=\[\]{}]+")


def lines_spoiler(words: Sequence[str]) -> Mutation:
    """Spoils text by its lines and words; `words` are those that its grammar knows, beside the hostile ones."""

    def spoil(rng: Random, content: bytes) -> bytes:
        lines = content.decode("utf-8", "surrogatepass").split("\n")
        for _ in range(rng.choice((1, 1, 2, 4))):
            _spoil_lines(rng, lines, words)
        return encoded("\n".join(lines))

    return spoil


def _spoil_lines(rng: Random, lines: list[str], words: Sequence[str]) -> None:
    if not lines:
        lines.append("")
    i = rng.randrange(len(lines))
    word = rng.choice(words) if words and rng.random() < 0.5 else rng.choice(TOKENS)
    change = rng.randrange(10)
    if change < 4 and (found := list(_WORD.finditer(lines[i]))):
        place = rng.choice(found)
        lines[i] = lines[i][: place.start()] + word + lines[i][place.end() :]
    elif change == 4:
        del lines[i]
    elif change == 5:
        lines[i:i] = [lines[i]] * rng.choice((1, 2, 50))
    elif change == 6:
        j = rng.randrange(len(lines))
        lines[i], lines[j] = lines[j], lines[i]
    elif change == 7:
        lines[i] = rng.choice(("", " ", "  ", "\t", "- ", "# ")) + lines[i] + rng.choice(("", " ", ",", word))
    elif change == 8:
        lines.insert(i, word * rng.choice((1, 1, 40)))
    else:
        lines[i : i + 2] = ["".join(lines[i : i + 2])]
