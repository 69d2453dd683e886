"""From YAML files, environment variables and flags to one Config.

Precedence: dataclass default < named YAMLs < --config < environment < --set < flag. YAML files hold only differences. A
--config file that names folders of data keeps them whatever the environment says. For a command on a trained run, the
config of the run stands in the place of the defaults.

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
from typing import NamedTuple

from lever_lm.config import ASSET_PREFIX, HUB_PREFIX, PACKAGE, Config, DataConfig, to_dict
from lever_lm.errors import UsageError
from lever_lm.untrusted import CONFIG_LIMIT, Scalar, load_yaml, printable, read_bytes, shown


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
    key, keys = key[:_LONGEST], all_keys()
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


# Those that say where files are on this machine; the others are of a training.
_PLACES = ("OKVQA_PATH", "VQAV2_PATH", "COCO_PATH")


def environment_values(values: dict, environ=os.environ, over: dict | None = None) -> tuple[dict, list[str]]:
    """Config values that the environment sets, and the variables in effect as NAME=value.

    `over`: values that win over the environment; a variable whose every value they set is not in effect. Paths of
    local files leave the embedded dataset and the hub's copies alone. An empty variable is none. Raises UsageError on
    a bad value.
    """
    found, in_effect = {}, []
    for name, set_to in _environment(values, environ, over or {}).items():
        found = merge(found, set_to)
        in_effect.append(f"{name}={environ[name]}")
    return found, in_effect


def _environment(values: dict, environ, over: dict, names=tuple(ENVIRONMENT)) -> dict[str, dict]:
    """Of `names`, each variable in effect and the nested values that it sets, without those that `over` sets."""
    elsewhere = _paths_of_others(merge(values, over), environ)
    found = {}
    for name in names:
        parse, to_values = ENVIRONMENT[name]
        text = environ.get(name, "")
        if not text.strip() or name in elsewhere:
            continue
        try:
            set_to = to_values(parse(text))
        except ValueError as error:
            words = str(error)[:_LONGEST]
            raise UsageError(
                f"the environment variable {name} is {shown(text)}: {words}; unset it or mend it"
            ) from error
        left = {key: value for key, value in set_to.items() if not _is_set(over, key)}
        if left and not (name in _PLACES and next(iter(set_to)) not in left):
            found[name] = {}
            for key, value in left.items():
                found[name] = merge(found[name], dotted(key, value))
    return found


def _paths_of_others(values: dict, environ) -> tuple[str, ...]:
    """Variables that name folders of other datasets than this one."""
    data = values.get("data", {})
    data = data if isinstance(data, dict) else {}  # build() refuses it
    if str(data.get("okvqa_path", DataConfig.okvqa_path)).startswith((ASSET_PREFIX, HUB_PREFIX)):
        return _PLACES
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


def file_layer(path: Path) -> Layer:
    """What the file of --config sets. It may be a pipe, which can be read once."""
    return Layer(str(path), read_yaml(path))


class Layers(NamedTuple):
    """Whatever sets a config value, each over those before it; the environment variables in effect as NAME=value; and
    those that a --config file or a run wins over, as a sentence each."""

    found: list[Layer]
    in_effect: list[str]
    passed_over: list[str]


def layers(
    names: dict[str, str | None],
    config_file: Path | Layer | None,
    sets: list[str],
    options: dict[str, dict],
    base: Layer | None = None,
    run: Layer | None = None,
) -> Layers:
    """What sets the config values of a command line.

    names: kind → name of a YAML in configs/ (None to leave out); config_file: the file of --config, or what was read
    from it; options: how an option is spelt → its nested values;
    base: what wins over all but `sets` and `options`; run: the config of a run that is used, under all others. Of a run
    a named YAML changes what it names alone, and the environment where its files are that are not where they were.
    """
    found = [] if run is None else [run]
    for kind, name in names.items():
        if name is not None:
            values = named_yaml(kind, name)
            values = values if run is None else _of_kind(kind, values, run.values)
            found.append(Layer(f"configs/{kind}/{name}.yaml", values))
    places: dict = {}
    if config_file is not None:
        file = config_file if isinstance(config_file, Layer) else file_layer(config_file)
        found.append(file)
        data = file.values.get("data")
        keys = ("okvqa_path", "coco_path", "train_path")
        places = {"data": {key: data[key] for key in keys if key in data}} if isinstance(data, dict) else {}
    over = [] if base is None else [base]
    over += [Layer("--set", parse_set(item)) for item in sets]
    over += [Layer(option, values) for option, values in options.items()]
    known, above = combined(found), combined(over)
    variables = tuple(ENVIRONMENT) if run is None else _PLACES
    if run is not None:
        places = merge(_still_there(run.values, known), places)
    wanted = _environment(known, os.environ, above, variables)
    taken = _environment(known, os.environ, merge(places, above), variables)
    found += [Layer(name, values) for name, values in taken.items()]
    in_effect = [f"{name}={os.environ[name]}" for name in taken]
    named_by = "the run" if config_file is None else file.source
    passed = [
        f"{name}={os.environ[name]} (the folders are named by {named_by})"
        for name in wanted.keys() - taken
        if merge(known, wanted[name]) != known  # it says the same
    ]
    return Layers(found + over, in_effect, sorted(passed))


def _still_there(run: dict, known: dict) -> dict:
    """The folders of data that a run names, that nothing else names by now, and that are where they were: a variable
    that is exported for other data leaves these alone. Where they were moved, the environment says where to."""
    there, here = (values.get("data") if isinstance(values.get("data"), dict) else {} for values in (run, known))
    named = {key: path for key in ("okvqa_path", "coco_path") if (path := there.get(key)) == here.get(key)}
    return {"data": {k: p for k, p in named.items() if isinstance(p, str) and os.path.isdir(Path(p).expanduser())}}


# Kind of a named YAML → the sections that it is about, and the key that says which one it names.
_KINDS = {"dataset": (("data",), "name"), "lvlm": (("lvlm", "prompt"), "path"), "sampler": (("sampler",), "name")}


def _of_kind(kind: str, values: dict, run: dict) -> dict:
    """What a named YAML changes about a run's config: the sections of its kind alone, so that --dataset leaves the
    sampler as it is. One that names another dataset or LVLM than the run's brings that section whole. A recipe is about
    the training and comes as it is."""
    if kind not in _KINDS:
        return values
    sections, identity = _KINDS[kind]
    kept = {section: values[section] for section in sections if section in values}
    if kind == "dataset" and "features" not in run:
        kept["features"] = values.get("features", {})
    first = sections[0]
    there, here = run.get(first), kept.get(first)
    if isinstance(here, dict) and not (isinstance(there, dict) and there.get(identity) == here.get(identity)):
        kept[first] = {**to_dict(Config())[first], **here}
    return kept


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
    made = layers(names, config_file, sets, {"options": flags}, there)
    return build(combined(made.found)), made.in_effect
