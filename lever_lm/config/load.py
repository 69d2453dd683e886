"""The sources of a config's values, one over the other: YAML files, environment variables, --set, options.

Precedence: dataclass default < named YAMLs < --config < environment < --set < flag. A --config file that names folders
of data keeps them whatever the environment says. For a command on a trained run, the config of the run stands in the
place of the defaults.
"""

import os
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import NamedTuple

from lever_lm.config.schema import Config, DataConfig, to_dict
from lever_lm.config.values import (
    FLAGS,
    LONGEST,
    build,
    configs_root,
    dotted,
    merge,
    named_yaml,
    parse_set,
    read_yaml,
    typed,
)
from lever_lm.utils.errors import UsageError
from lever_lm.utils.paths import ASSET_PREFIX, HUB_PREFIX
from lever_lm.utils.terminal import shown


def _flag(text: str) -> bool:
    known = {**FLAGS, "1": True, "0": False}
    if text.strip().lower() in known:
        return known[text.strip().lower()]
    raise ValueError("expected true or false")


# Variables that the lineage's job scripts export: the config keys that one sets, and how its text is read.
ENVIRONMENT: dict[str, tuple[tuple[str, ...], Callable]] = {
    "GRPO_EPOCHS": (("grpo.epochs",), int),
    "RCE_EPOCHS": (("rce.epochs",), int),
    "BATCH_SIZE": (("rce.batch_size", "grpo.batch_size"), int),
    "RCE_LR": (("rce.lr",), float),
    "GRPO_LR": (("grpo.lr",), float),
    "KL_BETA": (("grpo.kl_beta",), float),
    "NUM_LAYERS": (("policy.num_layers",), int),
    "USE_RANK_ADVANTAGE": (("grpo.advantage",), lambda text: "rank" if _flag(text) else "zscore"),
    "REWARD_MODE": (("reward.mode",), str),
    "HARD_WEIGHT": (("reward.hard_weight",), float),
    "SOFT_WEIGHT": (("reward.soft_weight",), float),
    "REL_WEIGHT": (("reward.rel_weight",), float),
    "RCE_USE_RAW_REWARD": (("rce.normalize",), lambda text: "none" if _flag(text) else "zscore"),
    "FREEZE_BACKBONE_IN_GRPO": (("grpo.freeze_backbone",), _flag),
    "SKIP_FALLBACK_REWARD": (("reward.skip_fallback",), _flag),
    "REQUIRE_POSITIVE_QUERY": (("reward.require_positive",), _flag),
    "OKVQA_PATH": (("data.okvqa_path", "data.train_path"), str),
    "VQAV2_PATH": (("data.okvqa_path", "data.train_path"), str),
    "COCO_PATH": (("data.coco_path",), str),
}
_PLACES = ("OKVQA_PATH", "VQAV2_PATH", "COCO_PATH")  # of these, the ones that say where files are on this machine


def environment_values(
    values: dict, environ, over: dict, names=tuple(ENVIRONMENT), kept: dict | None = None
) -> tuple[dict[str, dict], list[str]]:
    """Return each variable in effect, of `names`, with the nested values that it sets over `values`; and the variables
    that are passed over.

    over: values that win over the environment and are left out. kept: folders of data that stay as they are; a variable
    that names another one is passed over. Paths of local files leave the embedded dataset and the hub's copies alone.
    An empty variable is none. Raises UsageError on a bad value.
    """
    elsewhere, found, passed_over = _paths_of_others(merge(values, over), environ), {}, []
    for name in names:
        text, (keys, parse) = environ.get(name, ""), ENVIRONMENT[name]
        if not text.strip() or name in elsewhere or (name in _PLACES and _holds(over, keys[0])):
            continue
        try:
            value = parse(text)
        except ValueError as error:
            why = f"{str(error)[:LONGEST]}; unset it or mend it"
            raise UsageError(f"the environment variable {name} is {shown(text)}: {why}") from error
        if name in _PLACES and _holds(kept or {}, keys[0]):
            if merge(values, dotted(keys[0], value)) != values:
                passed_over.append(name)
            continue
        free = [key for key in keys if not _holds(merge(over, kept or {}), key)]
        if free:
            found[name] = reduce(merge, [dotted(key, "" if key == "data.train_path" else value) for key in free])
    return found, passed_over


def _paths_of_others(values: dict, environ) -> tuple[str, ...]:
    """Return the variables that name folders of other datasets than this one."""
    data = _section(values, "data")
    if data.get("file") or data.get("val_file"):  # images named by path may be COCO's
        return ("OKVQA_PATH", "VQAV2_PATH")
    if str(data.get("okvqa_path", DataConfig.okvqa_path)).startswith((ASSET_PREFIX, HUB_PREFIX)):
        return _PLACES
    if data.get("file_prefix", DataConfig.file_prefix) != "v2_":
        return ("VQAV2_PATH",)
    return ("OKVQA_PATH",) if environ.get("VQAV2_PATH", "").strip() else ()


def _section(values: dict, name: str) -> dict:
    """Return a section of nested values; {} where it is no mapping, which `build` refuses."""
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _holds(values: dict, key: str) -> bool:
    """Return whether nested values hold a key section.name."""
    section, _, name = key.partition(".")
    return name in _section(values, section)


# ---------------------------------------------------------------------- layers


class Layer(NamedTuple):
    """Nested config values of one source, under the name that messages give it."""

    source: str
    values: dict


def file_layer(path: Path | None) -> Layer | None:
    """Read the file of --config, if there is one. It may be a pipe, which can be read once."""
    return None if path is None else Layer(str(path), read_yaml(path))


class Layers(NamedTuple):
    """The layers that set config values, each over those before it; the environment variables in effect as NAME=value;
    and a sentence for each variable that a --config file or a run wins over."""

    found: list[Layer]
    in_effect: list[str]
    passed_over: list[str]

    def config(self) -> Config:
        """Return the Config of the layers. Raises UsageError as `build` does."""
        return build(combined(self.found))


def layers(
    names: dict[str, str | None],
    file: Layer | None,
    sets: list[str],
    options: dict[str, dict],
    base: Layer | None = None,
    run: Layer | None = None,
) -> Layers:
    """Return what sets the config values of a command line.

    names: kind → name of a YAML in configs/ (None to leave out); file: of --config; options: how an option is spelt →
    its nested values; base: what wins over all but `sets` and `options`; run: the config of a run that is used, under
    all others. Of a run, a named YAML changes what it names alone, and the environment changes where files are that are
    no longer where they were.
    """
    named = [(kind, name, named_yaml(kind, name)) for kind, name in names.items() if name is not None]
    if run is not None:
        named = [(kind, name, _of_kind(kind, values, run.values)) for kind, name, values in named]
    named = [Layer(f"configs/{kind}/{name}.yaml", values) for kind, name, values in named]
    below = [layer for layer in (run, *named, file) if layer]
    above = [] if base is None else [base]
    above += [Layer("--set", parse_set(item)) for item in sets]
    above += [Layer(option, values) for option, values in options.items()]
    known, over = combined(below), combined(above)
    places = _still_there(run.values, known) if run else {}
    if file is not None:
        data = _section(file.values, "data")
        places |= {key: data[key] for key in ("okvqa_path", "coco_path", "train_path") if key in data}
    variables = _PLACES if run else tuple(ENVIRONMENT)
    taken, passed_over = environment_values(known, os.environ, over, variables, {"data": places})
    why = f"(the folders are named by {'the run' if file is None else file.source})"
    found = below + [Layer(name, values) for name, values in taken.items()] + above
    in_effect = [f"{name}={os.environ[name]}" for name in taken]
    return Layers(found, in_effect, [f"{name}={os.environ[name]} {why}" for name in sorted(passed_over)])


def _still_there(run: dict, known: dict) -> dict:
    """Return the folders of data that a run names, that no YAML names anew, and that are where they were: a variable
    that is exported for other data leaves these alone. Where they were moved, the environment says where to."""
    there, here = _section(run, "data"), _section(known, "data")
    named = {key: there[key] for key in ("okvqa_path", "coco_path") if key in there and there[key] == here.get(key)}
    return {key: path for key, path in named.items() if isinstance(path, str) and Path(path).expanduser().is_dir()}


# Kind of a named YAML → the sections that it is about, and the key that says which one it names.
_KINDS = {"dataset": (("data",), "name"), "lvlm": (("lvlm", "prompt"), "path"), "sampler": (("sampler",), "name")}


def _of_kind(kind: str, values: dict, run: dict) -> dict:
    """Return what a named YAML changes about a run's config: the sections of its kind alone, so that --dataset leaves
    the sampler as it is. One that names another dataset or LVLM than the run's brings that section whole. A recipe
    is about the training and comes as it is."""
    if kind == "task":
        return _other_task(values, run)
    if kind not in _KINDS:
        return values
    sections, identity = _KINDS[kind]
    kept = {section: values[section] for section in sections if section in values}
    if kind == "dataset" and "features" not in run:
        kept["features"] = values.get("features", {})
    first = sections[0]
    there, here = _section(run, first), kept.get(first)
    whole = isinstance(here, dict) and (there.get(identity) != here.get(identity) or _is_table(kind, there, here))
    if whole:
        kept[first] = {**to_dict(Config())[first], **here}
    return _asked_as_the_run(kept, run) if kind == "lvlm" else kept


def _asked_as_the_run(values: dict, run: dict) -> dict:
    """Return what the YAML of an LVLM changes, but for what the run's task says of the same keys: it comes after."""
    task = _task_of(run)
    return {
        section: {key: _section(task, section).get(key, value) for key, value in keys.items()}
        if isinstance(keys, dict)
        else keys
        for section, keys in values.items()
    }


def _is_table(kind: str, there: dict, here: dict) -> bool:
    """Return whether the data of a run are a table, and those of a dataset's YAML are not."""
    return kind == "dataset" and bool(there.get("file")) and not here.get("file")


def _task_of(run: dict) -> dict:
    """Return what the YAML of a run's task says; {} for a task without one."""
    name = str(_section(run, "data").get("task", DataConfig.task))
    return named_yaml("task", name) if (configs_root() / "task" / f"{name}.yaml").is_file() else {}


def _other_task(values: dict, run: dict) -> dict:
    """Return what the YAML of a task changes about a run's config: nothing where it is the run's own, which may have
    been given other values. What the YAML of the run's task set, and the run has from there, is the default again."""
    if _section(values, "data").get("task") == _section(run, "data").get("task", DataConfig.task):
        return {}
    undone, defaults = {}, to_dict(Config())
    for section, keys in _task_of(run).items():
        there = typed({section: keys})[section]
        same = [key for key, value in there.items() if _section(run, section).get(key) == value]
        undone[section] = {key: defaults[section][key] for key in same}
    return merge(undone, values)


def combined(found: list[Layer]) -> dict:
    """Return the nested values of layers, later ones over earlier ones."""
    return reduce(merge, (layer.values for layer in found), {})


def resolve(
    names: dict[str, str | None], config_file: Path | None, sets: list[str], flags: dict
) -> tuple[Config, list[str]]:
    """Return the Config of named YAMLs, a file, `--set` items and nested values, as on a command line, and the names
    and values of the environment variables in effect. Raises UsageError as `build` does."""
    made = layers(names, file_layer(config_file), sets, {"options": flags})
    return made.config(), made.in_effect
