"""From YAML texts and nested plain values to one Config. YAML files hold only differences from the defaults.

Values are read by the type of their field: text as it is written (`007`, `1.10`, `no`), integers in decimal.
"""

import contextlib
import dataclasses
import difflib
import os
import re
import types
import typing
from pathlib import Path

from lever_lm.config.schema import Config
from lever_lm.utils.errors import UsageError
from lever_lm.utils.paths import PACKAGE
from lever_lm.utils.safe_parse import CONFIG_LIMIT, Scalar, load_yaml, printable, read_bytes, shown


def configs_root() -> Path:
    """`configs/`: inside the installed package, else beside it in the checkout."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def named_yaml(kind: str, name: str) -> dict:
    """The YAML `configs/<kind>/<name>.yaml`. Raises UsageError with the nearest name when there is none."""
    folder = configs_root() / kind
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in known:
        raise UsageError(f"unknown {kind} {shown(name)}{_nearest(name, known)}: one of {', '.join(known)} (--{kind})")
    return read_yaml(folder / f"{name}.yaml")


def read_yaml(path: Path) -> dict:
    """A YAML mapping of plain values, read by the types of their fields. Raises UsageError naming the file when it is
    missing or something else."""
    try:
        content = _by_type(Config, load_yaml(read_bytes(path, CONFIG_LIMIT, pipe=True), as_written=True))
    except OSError as error:
        raise UsageError(f"cannot read the config {path}: {error.strerror or error} (--config)") from error
    except ValueError as error:
        raise UsageError(f"{path} is not a YAML file that can be read: {error} (--config)") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a mapping of config keys, found {type(content).__name__}")
    return content


# ---------------------------------------------------------------------- merging

LONGEST = 100  # characters of a name
_LONGEST_TEXT = 1 << 14  # bytes
_LARGEST = 2**64
_PARTS = 8  # dots of a key, at most; ours have one
_QUOTES = "'\""


def _nearest(name: str, known) -> str:
    match = difflib.get_close_matches(name[:LONGEST], list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def merge(base: dict, update: dict) -> dict:
    """`update` over `base`, section by section; neither is changed."""
    merged = dict(base)
    for key, value in update.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def dotted(key: str, value) -> dict:
    """`a.b`, v → {"a": {"b": v}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def parse_set(item: str) -> dict:
    """One `--set key=value`. The value of a text field is what was typed, or in quotes what YAML reads; that of another
    field is read as YAML, by its type."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise UsageError(f"--set takes key=value, found {shown(item)}")
    if key.count(".") > _PARTS:
        raise UsageError(f"unknown config key {shown(key)} (--set)")
    hint = _hint(key.strip())
    try:
        if hint is str:
            return dotted(key.strip(), _unquoted(text))
        return dotted(key.strip(), _by_type(hint, load_yaml(text, as_written=True)))
    except ValueError as error:
        raise UsageError(f"--set {shown(key).strip(_QUOTES)}: {shown(text)} is not a YAML value: {error}") from error


def _unquoted(text: str) -> str:
    """A text as it was typed; what is in quotes as a whole, as YAML reads it."""
    if text.strip()[:1] in ("'", '"'):
        with contextlib.suppress(ValueError):
            if isinstance(value := load_yaml(text), str):
                return value
    return text


def _hint(key: str):
    """The type of the field that a dotted key names; None where there is none."""
    hint = Config
    for part in key.split("."):
        hint = typing.get_type_hints(hint).get(part) if dataclasses.is_dataclass(hint) else None
    return hint


_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")


def _by_type(hint, value):
    """Values of `load_yaml(…, as_written=True)` as plain ones, read by the types of their fields where these are known.
    An integer that is written in no decimal digits, as 010 or 1:30, stays text, which `build` refuses."""
    if isinstance(value, dict):
        hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        return {key: _by_type(hints.get(key), item) for key, item in value.items()}
    if isinstance(value, list):
        item_hint = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
        return [_by_type(item_hint, item) for item in value]
    if not isinstance(value, Scalar):
        return value
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    number = isinstance(value.value, (int, float)) and not isinstance(value.value, bool)
    if value.value is not None and (
        hint is str or (number and (hint is float or (hint is int and not _DECIMAL.fullmatch(value.text))))
    ):
        return value.text
    return value.value


def build(values: dict) -> Config:
    """A Config from nested plain values. Unknown keys and wrong types raise UsageError and name the key."""
    config = _build(Config, values, "")
    _check_names(config)
    return config


def _build(cls, values: dict, prefix: str):
    if not isinstance(values, dict):
        raise UsageError(f"{prefix.rstrip('.')} must be a mapping of keys, found {shown(values)}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            name = f"{prefix}{key}" if isinstance(key, str) else f"{prefix}{shown(key)}"
            raise UsageError(f"unknown config key '{shown(name).strip(_QUOTES)}'{_suggest(name)}")
        hint = hints[key]
        nested = dataclasses.is_dataclass(hint)
        arguments[key] = _build(hint, value, f"{prefix}{key}.") if nested else _cast(hint, value, f"{prefix}{key}")
    return cls(**arguments)


def all_keys(cls=Config, prefix: str = "") -> list[str]:
    """Every dotted key of the config."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        keys += all_keys(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [f"{prefix}{name}"]
    return keys


def _suggest(key: str) -> str:
    """The known key whose last part, or whole, is nearest."""
    key, keys = key[:LONGEST], all_keys()
    if key in keys:  # it has dots in a file
        section, _, leaf = key.partition(".")
        return f": in YAML, `{section}:` and below it `{leaf}:`"
    by_leaf = {known.rsplit(".", 1)[-1]: known for known in keys}
    match = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    leaf = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(by_leaf), n=1, cutoff=0.6)
    section = difflib.get_close_matches(key, {known.split(".")[0] for known in keys}, n=1, cutoff=0.6)
    found = match[0] if match else by_leaf[leaf[0]] if leaf else section[0] if section else None
    return f" (did you mean {found!r}?)" if found else ": `lever config show --docs` lists all"


def _cast(hint, value, key: str):
    origin = typing.get_origin(hint)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_cast(item, entry, key) for entry in values)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _cast(typing.get_args(hint)[0], value, key)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-4 as a string
        except (ValueError, OverflowError):
            number = float("nan")
        if number == number and abs(number) != float("inf"):
            return number
    elif (hint is int and isinstance(value, int) and not isinstance(value, bool)) or (
        hint in (bool, str) and isinstance(value, hint)
    ):
        _check_bounds(value, key)
        return value
    elif hint is str and isinstance(value, (int, float)) and value is not True:
        return "off" if value is False else str(value)  # YAML 1.1 reads a bare off as false
    raise UsageError(f"{key} must be of type {hint.__name__}, found {shown(value)}")


def _check_bounds(value, key: str) -> None:
    """Raise UsageError for an integer or a text that nothing could take: it would fail far from here, without a key."""
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise UsageError(f"{key} must lie within ±2**64, found {shown(value)}")
    if isinstance(value, str):
        try:
            length = len(value.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError:
            length = None
        if length is None or length > _LONGEST_TEXT or "\0" in value:
            raise UsageError(f"{key} must be text of at most {_LONGEST_TEXT} bytes, without NUL, found {shown(value)}")


def _check_names(config: Config) -> None:
    """Raise UsageError for what cannot be the name of a folder or a part of one: these name our files."""
    name = config.data.name
    if name in ("", ".", "..") or "/" in name or _is_long(name) or printable(name) != name or set(name) & {"\n", "\t"}:
        raise UsageError(f"data.name must be a folder's name, found {shown(name)}")
    for key, path in (("lvlm.path", config.lvlm.path), ("features.encoder", config.features.encoder)):
        if _is_long(Path(path).name):
            raise UsageError(f"{key} ends in a name of more than {LONGEST} bytes: {shown(path)}")


def _is_long(name: str) -> bool:
    return len(os.fsencode(name)) > LONGEST
