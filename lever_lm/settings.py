"""From YAML files, environment variables and flags to one Config.

Precedence: dataclass default < named YAMLs < --config < environment < --set < flag. YAML files hold only differences.
"""

import dataclasses
import difflib
import os
import types
import typing
from pathlib import Path
from typing import NamedTuple

from lever_lm.config import ASSET_PREFIX, HUB_PREFIX, PACKAGE, Config, DataConfig
from lever_lm.errors import UsageError
from lever_lm.untrusted import CONFIG_LIMIT, load_yaml, read_bytes, shown


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
    """A YAML mapping of plain values. Raises UsageError naming the file when it is missing or something else."""
    try:
        content = load_yaml(read_bytes(path, CONFIG_LIMIT, pipe=True))
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

_LONGEST = 100  # characters of a name
_LONGEST_TEXT = 1 << 14  # bytes
_LARGEST = 2**64
_PARTS = 8  # dots of a key, at most; ours have one
_QUOTES = "'\""


def _nearest(name: str, known) -> str:
    match = difflib.get_close_matches(name[:_LONGEST], list(known), n=1, cutoff=0.5)
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
    """One `--set key=value`; the value is read as YAML."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise UsageError(f"--set takes key=value, found {shown(item)}")
    if key.count(".") > _PARTS:
        raise UsageError(f"unknown config key {shown(key)} (--set)")
    try:
        return dotted(key.strip(), load_yaml(text))
    except ValueError as error:
        raise UsageError(f"--set {shown(key).strip(_QUOTES)}: {shown(text)} is not a YAML value: {error}") from error


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
    key, keys = key[:_LONGEST], all_keys()
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
    if name in ("", ".", "..") or "/" in name or _is_long(name):
        raise UsageError(f"data.name must be a folder's name, found {shown(name)}")
    for key, path in (("lvlm.path", config.lvlm.path), ("features.encoder", config.features.encoder)):
        if _is_long(Path(path).name):
            raise UsageError(f"{key} ends in a name of more than {_LONGEST} bytes: {shown(path)}")


def _is_long(name: str) -> bool:
    return len(os.fsencode(name)) > _LONGEST


# ---------------------------------------------------------------------- environment

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def _flag(text: str) -> bool:
    if text.strip().lower() in (*_TRUE, *_FALSE):
        return text.strip().lower() in _TRUE
    raise ValueError("expected true or false")


# Variables that the lineage's job scripts export: name → (parser, config values it stands for).
ENVIRONMENT = {
    "GRPO_EPOCHS": (int, lambda v: {"grpo.epochs": v}),
    "RCE_EPOCHS": (int, lambda v: {"rce.epochs": v}),
    "BATCH_SIZE": (int, lambda v: {"rce.batch_size": v, "grpo.batch_size": v}),
    "RCE_LR": (float, lambda v: {"rce.lr": v}),
    "GRPO_LR": (float, lambda v: {"grpo.lr": v}),
    "KL_BETA": (float, lambda v: {"grpo.kl_beta": v}),
    "NUM_LAYERS": (int, lambda v: {"policy.num_layers": v}),
    "USE_RANK_ADVANTAGE": (_flag, lambda v: {"grpo.advantage": "rank" if v else "zscore"}),
    "REWARD_MODE": (str, lambda v: {"reward.mode": v}),
    "HARD_WEIGHT": (float, lambda v: {"reward.hard_weight": v}),
    "SOFT_WEIGHT": (float, lambda v: {"reward.soft_weight": v}),
    "REL_WEIGHT": (float, lambda v: {"reward.rel_weight": v}),
    "RCE_USE_RAW_REWARD": (_flag, lambda v: {"rce.normalize": "none" if v else "zscore"}),
    "FREEZE_BACKBONE_IN_GRPO": (_flag, lambda v: {"grpo.freeze_backbone": v}),
    "SKIP_FALLBACK_REWARD": (_flag, lambda v: {"reward.skip_fallback": v}),
    "REQUIRE_POSITIVE_QUERY": (_flag, lambda v: {"reward.require_positive": v}),
    "OKVQA_PATH": (str, lambda v: {"data.okvqa_path": v, "data.train_path": ""}),
    "VQAV2_PATH": (str, lambda v: {"data.okvqa_path": v, "data.train_path": ""}),
    "COCO_PATH": (str, lambda v: {"data.coco_path": v}),
}


def environment_values(values: dict, environ=os.environ, over: dict | None = None) -> tuple[dict, list[str]]:
    """Config values that the environment sets, and the variables in effect as NAME=value.

    `over`: values that win over the environment; a variable whose every value they set is not in effect. Paths of
    local files leave the embedded dataset and the hub's copies alone. An empty variable is none. Raises UsageError on
    a bad value.
    """
    elsewhere = _paths_of_others(values, environ)
    found, in_effect = {}, []
    for name, (parse, to_values) in ENVIRONMENT.items():
        text = environ.get(name, "")
        if not text.strip() or name in elsewhere:
            continue
        try:
            parsed = parse(text)
        except ValueError as error:
            words = str(error)[:_LONGEST]
            raise UsageError(
                f"the environment variable {name} is {shown(text)}: {words}; unset it or mend it"
            ) from error
        for key, value in to_values(parsed).items():
            found = merge(found, dotted(key, value))
        if not all(_is_set(over or {}, key) for key in to_values(parsed)):
            in_effect.append(f"{name}={text}")
    return found, in_effect


def _paths_of_others(values: dict, environ) -> tuple[str, ...]:
    """Variables that name folders of other datasets than this one."""
    data = values.get("data", {})
    data = data if isinstance(data, dict) else {}  # build() refuses it
    if str(data.get("okvqa_path", DataConfig.okvqa_path)).startswith((ASSET_PREFIX, HUB_PREFIX)):
        return ("OKVQA_PATH", "VQAV2_PATH", "COCO_PATH")
    if data.get("file_prefix", DataConfig.file_prefix) != "v2_":
        return ("VQAV2_PATH",)
    return ("OKVQA_PATH",) if environ.get("VQAV2_PATH", "").strip() else ()


def _is_set(values: dict, key: str) -> bool:
    """Whether nested values hold a dotted key."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


# ---------------------------------------------------------------------- resolving


class Layer(NamedTuple):
    """Nested config values of one source, as it is to be named."""

    source: str
    values: dict


def layers(
    names: dict[str, str | None],
    config_file: Path | None,
    sets: list[str],
    options: dict[str, dict],
    base: Layer | None = None,
) -> tuple[list[Layer], list[str]]:
    """Whatever sets a config value on a command line, each over those before it; and the environment variables in
    effect as NAME=value.

    names: kind → name of a YAML in configs/ (None to leave out); options: how an option is spelt → its nested values;
    base: what wins over all but `sets` and `options`.
    """
    found = [
        Layer(f"configs/{kind}/{name}.yaml", named_yaml(kind, name)) for kind, name in names.items() if name is not None
    ]
    if config_file is not None:
        found.append(Layer(str(config_file), read_yaml(config_file)))
    over = [] if base is None else [base]
    over += [Layer("--set", parse_set(item)) for item in sets]
    over += [Layer(option, values) for option, values in options.items()]
    in_effect = environment_values(combined(found), over=combined(over))[1]
    for variable in in_effect:
        name, _, text = variable.partition("=")
        parse, to_values = ENVIRONMENT[name]
        found += [Layer(name, dotted(key, value)) for key, value in to_values(parse(text)).items()]
    return found + over, in_effect


def combined(found: list[Layer]) -> dict:
    """The nested values of layers, later ones over earlier ones."""
    values: dict = {}
    for layer in found:
        values = merge(values, layer.values)
    return values


def resolve(
    names: dict[str, str | None], config_file: Path | None, sets: list[str], flags: dict, base: dict | None = None
):
    """The Config of a command line, and the environment variables in effect as NAME=value: of `layers`, where `flags`
    are the values of all options, and `base` nested values too."""
    there = None if base is None else Layer("base", base)
    found, in_effect = layers(names, config_file, sets, {"options": flags}, there)
    return build(combined(found)), in_effect
