"""YAML texts and nested plain values → one Config. YAML files hold only differences from the defaults.

Values are read by the type of their key: text as it is written (`007`, `1.10`, `no`), integers in decimal.
"""

import contextlib
import dataclasses
import difflib
import math
import os
import re
import typing
from pathlib import Path
from typing import NoReturn

from lever_lm.config.schema import Config, all_keys
from lever_lm.utils.errors import UsageError
from lever_lm.utils.paths import PACKAGE
from lever_lm.utils.safe_parse import CONFIG_LIMIT, Scalar, load_yaml, read_bytes
from lever_lm.utils.terminal import one_line, shown

LONGEST = 100  # characters of a name
_LONGEST_TEXT = 1 << 14  # bytes
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")

# ---------------------------------------------------------------------- files and --set


def configs_root() -> Path:
    """Return the folder `configs/`: inside the installed package, else beside it in the checkout."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def named_yaml(kind: str, name: str) -> dict:
    """Read the YAML `configs/<kind>/<name>.yaml`. Raises UsageError with the nearest name when there is none."""
    known = sorted(file.stem for file in (configs_root() / kind).glob("*.yaml"))
    if name not in known:
        nearest = _nearest(name, dict(zip(known, known, strict=True)), 0.5)
        raise UsageError(f"unknown {kind} {shown(name)}{nearest}: one of {', '.join(known)} (--{kind})")
    return read_yaml(configs_root() / kind / f"{name}.yaml")


def read_yaml(path: Path) -> dict:
    """Read a YAML mapping of config values. Raises UsageError naming the file when it is missing or something else."""
    try:
        content = _by_type(Config, load_yaml(read_bytes(path, CONFIG_LIMIT, pipe=True), as_written=True))
    except OSError as error:
        raise UsageError(f"cannot read the config {path}: {error.strerror or error} (--config)") from error
    except ValueError as error:
        raise UsageError(f"{path} is not a YAML file that can be read: {error} (--config)") from error
    if not isinstance(content, dict | None):
        raise UsageError(f"{path} must hold a mapping of config keys, found {type(content).__name__}")
    return content or {}


def parse_set(item: str) -> dict:
    """Read one `--set key=value`. The value of a text key is what was typed, or in quotes what YAML reads; that of
    another key is read as YAML, by its type. Raises UsageError."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise UsageError(f"--set takes key=value, found {shown(item)}")
    key = key.strip()
    kind, parts = Config, key.split(".")
    for i, part in enumerate(parts, 1):
        kind = _types(kind).get(part)
        if kind is None:
            _refuse_key(".".join(parts[:i]))
    try:
        if kind is str:
            return dotted(key, _unquoted(text))
        return dotted(key, _by_type(kind, load_yaml(text, as_written=True)))
    except ValueError as error:
        raise UsageError(f"--set {key}: {shown(text)} is not a YAML value: {error}") from error


def _unquoted(text: str) -> str:
    """Return a text as it was typed; where the whole of it is in quotes, as YAML reads it."""
    if text.strip()[:1] in ("'", '"'):
        with contextlib.suppress(ValueError):
            if isinstance(value := load_yaml(text), str):
                return value
    return text


# ---------------------------------------------------------------------- nested values


def merge(base: dict, update: dict) -> dict:
    """Return `update` over `base`, section by section; neither is changed."""
    merged = dict(base)
    for key, value in update.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def dotted(key: str, value) -> dict:
    """Return `a.b`, v as {"a": {"b": v}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def build(values: dict) -> Config:
    """Make a Config of nested plain values. Raises UsageError naming the key for unknown keys and wrong values."""
    config = _build(Config, values, "")
    _check_names(config)
    return config


def _build(kind, values, key: str):
    if not dataclasses.is_dataclass(kind):
        return _cast(kind, values, key)
    if not isinstance(values, dict):
        raise UsageError(f"{key} must be a mapping of keys, found {shown(values)}")
    types, arguments = _types(kind), {}
    for name, value in values.items():
        inner = ".".join(filter(None, [key, name if isinstance(name, str) else shown(name)]))
        if name not in types:
            _refuse_key(inner)
        arguments[name] = _build(types[name], value, inner)
    return kind(**arguments)


def _types(kind) -> dict:
    """Return the type of each key of a section; {} for what is no section."""
    return {one.name: one.type for one in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}


def _item(kind):
    """Return the type of a tuple's items; another type as it is."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind


def _by_type(kind, value):
    """Return values of `load_yaml(…, as_written=True)` as plain ones. Text stays as it is written, and so does a number
    that is written in another way than its key's type has it, as 010 or 1:30, which `build` refuses."""
    if isinstance(value, dict):
        types = _types(kind)
        return {key: _by_type(types.get(key), item) for key, item in value.items()}
    kind = _item(kind)
    if isinstance(value, list):
        return [_by_type(kind, item) for item in value]
    if not isinstance(value, Scalar) or value.value is None:
        return value.value if isinstance(value, Scalar) else value
    odd = kind is float or (kind is int and not _DECIMAL.fullmatch(value.text))
    return value.text if kind is str or (odd and _is_number(value.value)) else value.value


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cast(kind, value, key: str):
    """Return a value as its key's type. Raises UsageError where it is of another."""
    if _item(kind) is not kind:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_cast(_item(kind), item, key) for item in values)
    if kind is float and (_is_number(value) or isinstance(value, str)):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(number := float(value)):  # YAML 1.1 reads 1e-4 as a text
                return number
    elif kind is str and (_is_number(value) or value is False):
        return "off" if value is False else str(value)  # YAML 1.1 reads a bare off as false
    elif type(value) is kind:
        if kind is str and ("\0" in value or _size(value) > _LONGEST_TEXT):
            raise UsageError(f"{key} must be text of at most {_LONGEST_TEXT} bytes, without NUL, found {shown(value)}")
        return value
    raise UsageError(f"{key} must be of type {kind.__name__}, found {shown(value)}")


def _size(text: str) -> float:
    """Return the bytes of a text or path; infinity for what can be neither: half a character."""
    try:
        return len(os.fsencode(text))
    except UnicodeEncodeError:
        return math.inf


def _check_names(config: Config) -> None:
    """Raise UsageError for what cannot be the name of a folder or a part of one: these name our files."""
    name = config.data.name
    if name in ("", ".", "..") or {"/", "\t"} & {*name} or _size(name) > LONGEST or one_line(name) != name:
        raise UsageError(f"data.name must be a folder's name, found {shown(name)}")
    for key, path in (("lvlm.path", config.lvlm.path), ("features.encoder", config.features.encoder)):
        if _size(Path(path).name) > LONGEST:
            raise UsageError(f"{key} ends in a name of more than {LONGEST} bytes: {shown(path)}")


# ---------------------------------------------------------------------- suggestions


def _refuse_key(key: str) -> NoReturn:
    """Raise UsageError for an unknown key, with what it may mean: one that is like it in whole or in its last part, or
    a section."""
    section, _, leaf = key.rpartition(".")
    keys = {known: known for known in all_keys()}
    leaves = {known.rpartition(".")[2]: known for known in keys}
    sections = {name: name for name in (known.partition(".")[0] for known in keys)}
    meant = _nearest(key, keys) or _nearest(leaf, leaves) or _nearest(key, sections)
    if key in keys:  # its dots are in a file
        meant = f": in YAML, `{section}:` and below it `{leaf}:`"
    name = shown(key).strip("'\"")
    raise UsageError(f"unknown config key '{name}'{meant or ': `lever config show --docs` lists all'}")


def _nearest(name: str, known: dict[str, str], cutoff: float = 0.6) -> str:
    """Return ` (did you mean …?)` of a name that is like one of `known`, which says for each what is meant."""
    match = difflib.get_close_matches(name[:LONGEST], known, n=1, cutoff=cutoff)
    return f" (did you mean {known[match[0]]!r}?)" if match else ""
