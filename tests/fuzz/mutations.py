"""Spoil inputs: any bytes, the parts of a sequence (lines, opcodes, chunks), the values of a tree (JSON, checkpoints).

All chance comes from the generator that is given.
"""

import copy
import json
import re
from collections.abc import Callable, Sequence
from random import Random

Mutation = Callable[[Random, bytes], bytes]


def table(text: str) -> list[str]:
    """Return the entries of a table that is written as one text, over lines."""
    return text.replace("¦\n", "¦").split("¦")


# What has steered a terminal, ended a line, or been no character at all.
CHARACTERS = table(
    "\x1b[31m¦\x1b]0;title\x07¦\x9b2J¦\u202e¦\u2066¦\u2028¦\x85¦\0¦\ufeff¦\r¦\n¦\x7f¦\x0b¦\x08\x08\x08¦é¦文¦🎲"
)
CHARACTERS += [*table("\ufffd¦%s¦{0.__class__}¦'¦\"¦\\¦`"), "\u0301" * 50]
NUMBERS = table("0¦-0¦-1¦1e400¦-1e400¦1e-400¦NaN¦nan¦Infinity¦-inf¦1.5¦2147483648¦٣¦0x10¦1_000¦1e308¦00¦+1")
NUMBERS += [str(2**63 - 1), str(2**63), str(-(2**63) - 1), str(2**64), "9" * 40, "9" * 5000]
WORDS = table("null¦true¦~¦../../../etc/passwd¦/dev/zero¦<script>alert(1)</script>¦http://127.0.0.1:9/x.png¦=¦:¦-")
WORDS += [*table("file:///etc/passwd¦__class__¦constructor¦{{7*7}}¦[]¦{}¦¦ "), "a" * 300, "x" * 70_000]
TOKENS = [*CHARACTERS, *NUMBERS, *WORDS]
_RAW = [token.encode() for token in TOKENS]
_RAW += [b"\xff\xfe", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x80\x02", b"PK\x03\x04"]
EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1]
# Values as they stand in a file; not all of them are JSON.
_JSON = table(
    r'{"a":1,"a":2}¦{"":1}¦{"__proto__":{}}¦[[]]¦[null]¦null¦false¦"\ud800"¦"\udc00\ud800"¦"\u0000"¦[1, 2]¦1e'
)
_JSON += [*map(json.dumps, [*CHARACTERS, *WORDS]), *NUMBERS, "1" * 4400, "-" + "1" * 4400, "1." + "0" * 4400]
_JSON += ["0.1e-9999", "[" * 20 + "]" * 20, "[" * 5000 + "]" * 5000, "[" * 100_000, '{"a":' * 40 + "1" + "}" * 40]
_JSON += ["[0" + ",0" * 5000 + "]"]


def encoded(text: str) -> bytes:
    """Return text as bytes, half characters among it."""
    return text.encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------- bytes


def noise(rng: Random) -> bytes:
    """Return bytes of no format: of any kind, of ASCII, or of hostile words."""
    size, kind = rng.choice((0, 1, 2, 8, 64, 512, 4096)), rng.randrange(3)
    if kind == 0:
        return rng.randbytes(size)
    return bytes(rng.choices(range(32, 127), k=size)) if kind == 1 else b"".join(rng.choices(_RAW, k=min(size, 64)))


def extreme(rng: Random, size: int) -> bytes:
    """Return a number at the border of its range, in either order of bytes."""
    return (rng.choice(EXTREMES) & (1 << 8 * size) - 1).to_bytes(size, rng.choice(("little", "big")))


def spoil_bytes(rng: Random, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Change one to four spans of bytes, wherever they fall; or go on with another input."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(content) + 1)
        stop = min(len(content), start + rng.choice((1, 2, 4, 16, 64, 1024)))
        before, span, after, change = content[:start], content[start:stop], content[stop:], rng.randrange(7)
        if change == 0:  # bits
            flipped = bytearray(content or b"\0")
            for _ in range(rng.choice((1, 1, 3, 20))):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            content = bytes(flipped)
        elif change == 1:
            number = extreme(rng, rng.choice((1, 2, 4, 8)))
            content = before + number + content[start + len(number) :]
        elif change == 2:
            content = before
        elif change == 3:
            content = before + after
        elif change == 4:
            content = before + span * rng.choice((2, 3, 101)) + after
        elif change == 5:
            content = before + (rng.choice(_RAW) if rng.random() < 0.7 else rng.randbytes(40)) + span + after
        else:
            content += rng.choice((b"\0", b" ", b"\n", rng.randbytes(16), content[-64:])) * rng.choice((1, 100, 4000))
    if others and rng.random() < 0.1:
        other = rng.choice(others)
        content = content[: rng.randrange(len(content) + 1)] + other[rng.randrange(len(other) + 1) :]
    return content


# ---------------------------------------------------------------------- sequences


def spoil_parts(rng: Random, parts: list, new: Callable[[], object], alter: Callable[[object], object]) -> list:
    """Change a sequence at one to four places: drop, repeat, swap or join parts, put in a `new` one, `alter` one."""
    parts = list(parts)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not parts:
            parts.append(new())
        i, j, change = rng.randrange(len(parts)), rng.randrange(len(parts)), rng.randrange(10)
        if change < 4:
            parts[i] = alter(parts[i])
        elif change == 4:
            del parts[i]
        elif change == 5:
            parts[i:i] = [parts[i]] * rng.choice((1, 2, 50))
        elif change == 6:
            parts[i], parts[j] = parts[j], parts[i]
        elif change == 7 and isinstance(parts[i], str):
            parts[i : i + 2] = ["".join(parts[i : i + 2])]
        else:
            parts[i : i + rng.randrange(2)] = [new()]
    return parts


_WORD = re.compile(r"[^\s,:=\[\]{}]+")


def lines_spoiler(words: Sequence[str]) -> Mutation:
    """Return a mutation of text by its lines and words; `words` are those that its grammar knows."""

    def spoil(rng: Random, content: bytes) -> bytes:
        def word() -> str:
            return rng.choice(words if words and rng.random() < 0.5 else TOKENS)

        def alter(line: str) -> str:
            if rng.random() < 0.8 and (found := list(_WORD.finditer(line))):
                start, stop = rng.choice(found).span()
                return line[:start] + word() + line[stop:]
            return rng.choice(("", " ", "  ", "\t", "- ", "# ")) + line + rng.choice(("", " ", ",", word()))

        lines = content.decode("utf-8", "surrogatepass").split("\n")
        return encoded("\n".join(spoil_parts(rng, lines, lambda: word() * rng.choice((1, 1, 40)), alter)))

    return spoil


# ---------------------------------------------------------------------- trees


def spoil_tree(rng: Random, tree: list, new: Callable[[object], object], name: Callable[[object], object]) -> None:
    """Change one to three values of a tree of lists and dicts: replace (`new` of the old one), take away, double, copy
    from elsewhere, give another `name`, wrap. The tree is a list of the whole, which may be replaced, too."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = _any_place(rng, tree)
        if holder is None:
            return
        change = rng.randrange(8)
        if change < 4:
            holder[key] = new(holder[key])
        elif change == 4:
            del holder[key]
        elif change == 5 and isinstance(holder, list):
            holder.insert(key, holder[key])
        elif change == 6:
            other, place = _any_place(rng, tree)
            holder[key] = copy.deepcopy(other[place])  # a copy: no circles
        elif isinstance(holder, dict) and rng.random() < 0.7:
            value = holder[key] if rng.random() < 0.5 else holder.pop(key)
            holder[name(key)] = value
        else:
            holder[key] = rng.choice(([holder[key]], {"value": holder[key]}, [holder[key]] * 3, str(holder[key])))


def _any_place(rng: Random, tree: list):
    """Return a container of the tree and a key or place in it; every depth is as likely."""
    places, level = [], [tree]
    while level:
        here = [(c, k) for c in level for k in (c if isinstance(c, dict) else range(len(c)))]
        if here:
            places.append(here)
        level = [value for c, k in here if isinstance(value := c[k], (dict, list))]
    return rng.choice(rng.choice(places)) if places else (None, None)


def spoil_json(rng: Random, content: bytes) -> bytes:
    """Spoil a JSON document as a tree; the new values may be no JSON, and a key may stand twice."""
    tree, raw = [json.loads(content)], []

    def mark(text: str) -> str:  # stands for text that json.dumps would not write
        raw.append((f'"@{len(raw)}@"', text))
        return f"@{len(raw) - 1}@"

    spoil_tree(
        rng,
        tree,
        lambda old: mark(rng.choice(_JSON)),
        lambda key: rng.choice(TOKENS) if rng.random() < 0.7 else mark(json.dumps(key)),
    )
    text = json.dumps(tree[0], ensure_ascii=rng.random() < 0.5) if tree else ""
    for place, value in raw:
        text = text.replace(place, value)
    return encoded(text)


def spoil_json_lines(rng: Random, content: bytes) -> bytes:
    """Spoil some line of JSON lines as JSON, or the lines as lines."""
    lines = content.split(b"\n")
    if rng.random() < 0.3 or len(lines) < 2:
        return lines_spoiler(["epoch", "phase", "rce", "question_id", "icds", "[]", "{}"])(rng, content)
    i = rng.randrange(len(lines) - 1)
    lines[i] = spoil_json(rng, lines[i])
    return b"\n".join(lines)
