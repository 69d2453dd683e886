"""Text and values from data, as a terminal may show them: on one line, and without what steers it."""

import json
import re
import reprlib

# C0 but tab and newline, DEL, C1, line and paragraph separators, bidi embeddings, overrides and isolates, surrogates,
# the byte order mark.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def printable(text: str) -> str:
    """Return the text with what could steer a terminal or cannot be encoded as visible escapes: `\\x1b`, `\\u202e`."""
    return _UNSAFE.sub(lambda match: _escape(ord(match[0])), text)


def one_line(text: str) -> str:
    """Return `printable`, with line breaks as `\\n`: text from data begins no line of output."""
    return printable(text).replace("\n", "\\n")


def shown(value, limit: int = 60) -> str:
    """Return at most `limit` characters of a value's repr, on one line, in bounded time whatever its size and depth."""
    text = one_line(_Short(limit).repr(value))
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def json_text(value) -> str:
    """Return a value as one line of JSON that a terminal may show and that reads back as the same value."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class _Short(reprlib.Repr):
    def __init__(self, limit: int):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, limit, limit
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 20

    def repr_bytes(self, value, level):
        return repr(value[: self.maxstring])

    def repr_int(self, value, level):
        return repr(value) if value.bit_length() < 256 else f"an integer of {value.bit_length()} bits"
