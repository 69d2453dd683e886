"""`lever config`: what config a command line gives, what set each value, and how two configs differ."""

from pathlib import Path
from typing import Annotated

import typer
import yaml

from lever_lm.cli import completion
from lever_lm.cli.options import Common, command, emit, option_values
from lever_lm.cli.own_data import check_val, fresh_layers
from lever_lm.cli.run_config import NO_CONFIG, refuse_options
from lever_lm.config.load import Layer, combined, file_layer, layers
from lever_lm.config.schema import Config, key_docs, to_dict
from lever_lm.config.values import all_keys, build
from lever_lm.training.run_dir import RunFolder
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.terminal import one_line, shown

config_app = typer.Typer(help="Show the config that options give or a run has, or compare two.", no_args_is_help=True)

Where = "A recipe, a YAML file, or a run folder"


@command(config_app, "show")
def show(
    common: Common,
    what: Annotated[
        str | None, typer.Argument(help=f"{Where}; else what the options give.", autocompletion=completion.configs)
    ] = None,
    docs: Annotated[bool, typer.Option("--docs", help="With what each key means.")] = False,
) -> None:
    """The config as YAML; a value that is not the default says what set it. `> my.yaml` makes a file for --config."""
    view, told = _view(common, what), {"docs": key_docs()} if docs else {}
    _print(common, as_yaml(view, told.get("docs", {})))
    emit(common, {"config": to_dict(view.config), "changed": view.changed, **told})


@command(config_app, "diff")
def diff(
    common: Common,
    one: Annotated[str, typer.Argument(metavar="A", help=f"{Where}.", autocompletion=completion.configs)],
    other: Annotated[
        str | None,
        typer.Argument(metavar="B", help=f"{Where}; else what the options give.", autocompletion=completion.configs),
    ] = None,
) -> None:
    """What differs between two configs, key by key. The options complete recipes and YAML files, not run folders."""
    there, here = (_view(common, what, alone=True) for what in (one, other))
    pairs = {key: (there.values[key], here.values[key]) for key in all_keys()}
    found = {key: {"a": old, "b": new} for key, (old, new) in pairs.items() if old != new}
    names = f"{one_line(there.name)} {'→' if found else 'and'} {one_line(here.name)}"
    keys, verb = ("key", "differs") if len(found) == 1 else ("keys", "differ")
    count = f"{len(found)} {keys} of {len(pairs)} {verb}" if found else "no difference"
    lines = [f"{key}: {_plain(pair['a'])} → {_plain(pair['b'])}" for key, pair in found.items()]
    _print(common, [f"{names}: {count}", *lines])
    emit(common, {"a": there.name, "b": here.name, "identical": not found, "differences": found})


class View:
    """A resolved config: its name, its values by dotted key in the order of the dataclasses, and for each value that is
    not the default, `changed`: {from, default}, the source that set it last."""

    def __init__(self, name: str, found: list[Layer]):
        self.name, self.config = name, build(combined(found))
        self.values, defaults = flat(to_dict(self.config)), flat(to_dict(Config()))
        sources = {key: layer.source for layer in found for key in flat(layer.values)}
        changed = [key for key, value in self.values.items() if value != defaults[key]]
        self.changed = {key: {"from": sources[key], "default": defaults[key]} for key in changed}


def _view(common: Common, what: str | None, alone: bool = False) -> View:
    """The config of a run folder, or of a recipe or YAML file among the options; of the options alone for None. Over a
    run folder's config count --set and options, with `alone` nothing. Raises UsageError for another name."""
    sets, options = common.set_ or [], option_values(common)
    recipes, path = completion.yaml_names("recipe"), Path(what or "")
    if what is None or what in recipes:
        found = fresh_layers(common, file_layer(common.config), options, recipe=what or common.recipe)
    elif path.is_dir():
        if not alone:
            refuse_options(common, f"{what} brings its own config", *NO_CONFIG)
        run = Layer(str(path / "config.yaml"), to_dict(_run_config(RunFolder(path))))
        found = layers({}, None, [] if alone else sets, {} if alone else options, base=run)
    elif path.exists():
        refuse_options(common, f"{what} stands in the place of --config", "config")
        found = fresh_layers(common, file_layer(path), options)
    else:
        kinds = f"a run folder, a YAML file or a recipe ({', '.join(recipes)})"
        raise UsageError(f"no config {shown(what, 200)}: expected {kinds}")
    view = View(what or "the options", found.found)
    if what is None or not path.is_dir():
        check_val(common, view.config)
    return view


def _run_config(run: RunFolder) -> Config:
    """The config of a run folder, keys that it does not know yet at their defaults. Raises LeverError."""
    if not run.config.is_file():
        raise LeverError(f"{run.path} is no run folder: it holds no {run.config.name}")
    try:
        return build(run.values())
    except UsageError as error:
        raise LeverError(f"{run.config}: {error}") from error


def flat(values: dict, prefix: str = "") -> dict:
    """Nested values as dotted key → value, which may be a mapping of options."""
    found: dict = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) and name not in all_keys() else {name: value}
    return found


def as_yaml(view: View, docs: dict[str, str]) -> list[str]:
    """The lines of a YAML file that reads back as this config. A value that is not the default has a comment with its
    source and the default; each key in `docs` is preceded by what is said of it."""
    lines, section = [], ""
    for key, value in view.values.items():
        first, dot, last = key.rpartition(".")
        indent = "  " if dot else ""
        if docs and section and first != section:
            lines.append("")
        if first and first != section:
            lines += [f"# {docs[first]}"] if first in docs else []
            lines.append(f"{first}:")
        section = first
        lines += [f"{indent}# {docs[key]}"] if key in docs else []
        note = view.changed.get(key)
        said = f"  # {one_line(note['from'])}; default {_plain(note['default'])}" if note else ""
        lines.append(f"{indent}{last}: {_plain(value)}{said}")
    return lines


def _plain(value) -> str:
    """A value as YAML on one line that the terminal shows as it is."""
    options = {"default_flow_style": True, "width": float("inf")}
    text = yaml.safe_dump(value, allow_unicode=True, **options).removesuffix("\n").removesuffix("\n...")
    if one_line(text) != text:
        text = yaml.safe_dump(value, default_style='"', **options).removesuffix("\n")
    return text


def _print(common: Common, lines: list[str]) -> None:
    """Print the lines as the result, unless --json takes their place."""
    from lever_lm.utils.console import Screen

    screen = Screen(quiet=common.quiet)
    for line in [] if common.json_ else lines:
        screen.result(line)
