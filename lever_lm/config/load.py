"""What sets the values of a config, one over the other: YAML files, environment variables, --set, options.

Precedence: dataclass default < named YAMLs < --config < environment < --set < flag. A --config file that names folders
of data keeps them whatever the environment says. For a command on a trained run, the config of the run stands in the
place of the defaults.
"""

import os
from pathlib import Path
from typing import NamedTuple

from lever_lm.config.schema import Config, DataConfig, to_dict
from lever_lm.config.values import (  # noqa: F401 - imported from here in 0.1
    LONGEST,
    all_keys,
    build,
    configs_root,
    dotted,
    merge,
    named_yaml,
    parse_set,
    read_yaml,
)
from lever_lm.utils.errors import UsageError
from lever_lm.utils.paths import ASSET_PREFIX, HUB_PREFIX
from lever_lm.utils.safe_parse import shown

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


def environment_values(values: dict, environ, over: dict, names=tuple(ENVIRONMENT)) -> dict[str, dict]:
    """Return each variable in effect, of `names`, with the nested values that it sets over `values`.

    `over`: values that win over the environment and are left out. Paths of local files leave the embedded dataset and
    the hub's copies alone. An empty variable is none. Raises UsageError on a bad value.
    """
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
            words = str(error)[:LONGEST]
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


def file_layer(path: Path | None) -> Layer | None:
    """What the file of --config sets, if there is one. It may be a pipe, which can be read once."""
    return None if path is None else Layer(str(path), read_yaml(path))


class Layers(NamedTuple):
    """The layers that set config values, each over those before it; the environment variables in effect as NAME=value;
    and a sentence for each variable that a --config file or a run wins over."""

    found: list[Layer]
    in_effect: list[str]
    passed_over: list[str]

    def config(self) -> Config:
        """The Config of the layers. Raises UsageError as `build` does."""
        return build(combined(self.found))


def layers(
    names: dict[str, str | None],
    file: Layer | None,
    sets: list[str],
    options: dict[str, dict],
    base: Layer | None = None,
    run: Layer | None = None,
) -> Layers:
    """What sets the config values of a command line.

    names: kind → name of a YAML in configs/ (None to leave out); file: of --config; options: how an option is spelt →
    its nested values; base: what wins over all but `sets` and `options`; run: the config of a run that is used, under
    all others. Of a run a named YAML changes what it names alone, and the environment where its files are that are
    not where they were.
    """
    found = [] if run is None else [run]
    for kind, name in names.items():
        if name is not None:
            values = named_yaml(kind, name)
            values = values if run is None else _of_kind(kind, values, run.values)
            found.append(Layer(f"configs/{kind}/{name}.yaml", values))
    places: dict = {}
    if file is not None:
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
    wanted = environment_values(known, os.environ, above, variables)
    taken = environment_values(known, os.environ, merge(places, above), variables)
    found += [Layer(name, values) for name, values in taken.items()]
    in_effect = [f"{name}={os.environ[name]}" for name in taken]
    named_by = "the run" if file is None else file.source
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


def resolve(names: dict[str, str | None], config_file: Path | None, sets: list[str], flags: dict):
    """The Config of a command line, and the environment variables in effect as NAME=value: of `layers`, where `flags`
    are the values of all options."""
    made = layers(names, file_layer(config_file), sets, {"options": flags})
    return made.config(), made.in_effect
