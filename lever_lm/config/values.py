"""YAML texts and nested plain values → one Config. YAML files hold only differences from the defaults.

YAML says what is a list or a mapping; what stands in it is text, and read by the type of its key: `007`, `1.10` and
`no` are text for a text key, and integers are decimal.
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
from lever_lm.utils.safe_parse import CONFIG_LIMIT, load_yaml, read_bytes
from lever_lm.utils.terminal import one_line, shown

LONGEST = 100  # characters of a name
_LONGEST_TEXT = 1 << 14  # bytes
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]{0,24})")
OPTION = object  # the type of what stands in a mapping that is no section: any
FLAGS = {**dict.fromkeys(("true", "yes", "on"), True), **dict.fromkeys(("false", "no", "off"), False)}

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
    """Read a YAML mapping of config values, as text. Raises UsageError naming the file when it is missing or something
    else."""
    try:
        content = load_yaml(read_bytes(path, CONFIG_LIMIT, pipe=True))
    except OSError as error:
        raise UsageError(f"cannot read the config {path}: {error.strerror or error} (--config)") from error
    except ValueError as error:
        raise UsageError(f"{path} is not a YAML file that can be read: {error} (--config)") from error
    if not isinstance(content, dict | None):
        raise UsageError(f"{path} must hold a mapping of config keys, found {shown(content)}")
    return content or {}


def parse_set(item: str) -> dict:
    """Read one `--set key=value`. The value of a text key is what was typed, or in quotes what YAML reads; that of
    another key is read as YAML. Raises UsageError."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise UsageError(f"--set takes key=value, found {shown(item)}")
    key = key.strip()
    kind, parts = Config, key.split(".")
    for i, part in enumerate(parts, 1):
        kind = OPTION if kind in (dict, OPTION) else _types(kind).get(part)
        if kind is None:
            _refuse_key(".".join(parts[:i]))
    try:
        value = load_yaml(text)
    except ValueError as error:
        if kind is not str:
            raise UsageError(f"--set {key}: {shown(text)} is not a YAML value: {error}") from error
        value = text
    quoted = text.strip()[:1] in ("'", '"') and isinstance(value, str)
    return dotted(key, text if kind is str and not quoted else value)


# ---------------------------------------------------------------------- nested values


def merge(base: dict, update: dict, *, within: bool = False) -> dict:
    """Return `update` over `base`, section by section; neither is changed. within: they are parts of a section, of
    which an empty mapping takes the place of another."""
    merged = dict(base)
    for key, value in update.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and (value or not within)
        merged[key] = merge(merged[key], value, within=True) if both else value
    return merged


def with_measured_pool(values: dict) -> dict:
    """Return stored config values with the pools that their run was measured with. 0.1 stored no infer.pool_size, and
    chose from pools of rollout.pool_size."""
    rollout, infer = values.get("rollout"), values.get("infer", {})
    if not (isinstance(rollout, dict) and "pool_size" in rollout and isinstance(infer, dict)) or "pool_size" in infer:
        return values
    return merge(values, dotted("infer.pool_size", rollout["pool_size"]))


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


def _cast(kind, value, key: str):
    """Return a value as its key's type, by which a text is read. Raises UsageError where it is of another."""
    if typing.get_origin(kind) is tuple:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_cast(typing.get_args(kind)[0], item, key) for item in values)
    if kind is dict and isinstance(value, dict):
        return {name: _option(one, f"{key}.{name}") for name, one in value.items()}
    is_text = isinstance(value, str)
    is_number = type(value) in (int, float)
    if kind is str and (is_text or is_number):
        if "\0" in (text := str(value)) or _size(text) > _LONGEST_TEXT:
            raise UsageError(f"{key} must be text of at most {_LONGEST_TEXT} bytes, without NUL, found {shown(value)}")
        return text
    if kind is float and (is_text or is_number):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(number := float(value)):
                return number
    elif kind is int and is_text and _DECIMAL.fullmatch(value):
        return int(value)
    elif kind is bool and is_text and value.lower() in FLAGS:
        return FLAGS[value.lower()]
    elif type(value) is kind:
        return value
    raise UsageError(f"{key} must be of type {kind.__name__}, found {shown(value)}")


def _option(value, key: str):
    """Return the value of an option whose type nobody said: a text that reads as a flag or a number is one; of a
    mapping or a list, each that stands in it."""
    if isinstance(value, dict):
        return {str(name): _option(one, f"{key}.{name}") for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_option(one, key) for one in value]
    if isinstance(value, str):
        for kind in (bool, int, float):
            with contextlib.suppress(UsageError):
                return _cast(kind, value, key)
    if value is not None and type(value) not in (str, bool, int, float):
        raise UsageError(f"{key} must be a flag, a number, a text, or a mapping or list of these, found {shown(value)}")
    return value


def typed(values, kind=Config):
    """Return nested values as YAML and JSON hold them, read by the types of their keys; as they are where they are of
    none or of another."""
    if isinstance(values, dict) and kind is not dict:
        types = _types(kind)
        return {key: typed(value, types.get(key)) for key, value in values.items()}
    try:
        value = values if kind is None else _cast(kind, values, "")
    except UsageError:
        return values
    return [*value] if isinstance(value, tuple) else value


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
