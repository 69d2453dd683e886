"""The config for a person to read: each value with the source that set it, and what differs between two configs."""

import dataclasses
from pathlib import Path

import yaml

from lever_lm.config.load import Layer, combined, file_layer, layers
from lever_lm.config.schema import Config, all_keys, to_dict
from lever_lm.config.values import build, configs_root
from lever_lm.training.run_dir import RunFolder
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.terminal import one_line, shown


@dataclasses.dataclass(frozen=True)
class View:
    """A resolved config: its name, its values, and dotted key → the source that set it last."""

    name: str
    config: Config
    sources: dict[str, str]

    def values(self) -> dict:
        """Dotted key → value, in the order of the dataclasses."""
        return flat(to_dict(self.config))

    def changed(self) -> dict[str, dict]:
        """Dotted key → {from, default}, of the values that are not the default."""
        defaults = flat(to_dict(Config()))
        return {
            key: {"from": self.sources[key], "default": defaults[key]}
            for key, value in self.values().items()
            if value != defaults[key]
        }


# ---------------------------------------------------------------------- reading


def view(
    what: str | None, names: dict[str, str | None], config_file: Path | None, sets: list[str], options: dict[str, dict]
) -> View:
    """The config of a run folder, or of a recipe or YAML file among the options of a command line; of the options alone
    for None. In a run folder's config only `sets` and `options` change anything. Raises UsageError for another name."""
    if what is None:
        return _view("the options", *_layered(names, config_file, sets, options))
    recipes = _recipes()
    if what in recipes:
        return _view(what, *_layered({**names, "recipe": what}, config_file, sets, options))
    path = Path(what)
    if is_run(what):
        run = Layer(str(path / "config.yaml"), to_dict(run_config(path)))
        return _view(what, *_layered({}, None, sets, options, run))
    if path.exists() and not path.is_fifo():  # a pipe without a writer would be waited for
        return _view(what, *_layered(names, path, sets, options))
    kinds = f"a run folder, a YAML file or a recipe ({', '.join(recipes)})"
    raise UsageError(f"no config {shown(what, 200)}: expected {kinds}")


def is_run(what: str | None) -> bool:
    """Whether `view` takes this for a run folder."""
    return what is not None and what not in _recipes() and Path(what).is_dir()


def _recipes() -> list[str]:
    return sorted(file.stem for file in (configs_root() / "recipe").glob("*.yaml"))


def run_config(path: Path) -> Config:
    """The config of a run folder, keys that it does not know yet at their defaults. Raises LeverError."""
    run = RunFolder(path)
    if not run.config.is_file():
        raise LeverError(f"{path} is no run folder: it holds no {run.config.name}")
    try:
        return build(run.values())
    except UsageError as error:
        raise LeverError(f"{run.config}: {error}") from error


def _layered(names, config_file: Path | None, *more) -> list[Layer]:
    return layers(names, file_layer(config_file), *more).found


def _view(name: str, *found: Layer) -> View:
    sources = {key: layer.source for layer in found for key in flat(layer.values)}
    return View(name, build(combined(list(found))), sources)


def flat(values: dict, prefix: str = "") -> dict:
    """Nested values as dotted key → value."""
    found: dict = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


# ---------------------------------------------------------------------- showing


def as_yaml(view: View, docs: dict[str, str] | None = None) -> list[str]:
    """The lines of a YAML file that reads back as this config. A value that is not the default has a comment with its
    source and the default; with `docs`, each key is preceded by what is said of it."""
    changed, lines, section = view.changed(), [], ""
    for key, value in view.values().items():
        first, dot, last = key.rpartition(".")
        indent = "  " if dot else ""
        if docs and first != section and first in docs:
            lines += ["", f"# {docs[first]}"]
        elif docs and dot == "" and section:
            lines.append("")
        if first != section and first:
            lines.append(f"{first}:")
        section = first
        if docs and key in docs:
            lines.append(f"{indent}# {docs[key]}")
        note = changed.get(key)
        said = f"  # {one_line(note['from'])}; default {_plain(note['default'])}" if note else ""
        lines.append(f"{indent}{last}: {_plain(value)}{said}")
    return lines[1:] if lines and not lines[0] else lines


def _plain(value) -> str:
    """A value as YAML on one line that the terminal shows as it is."""
    options = {"default_flow_style": True, "width": float("inf")}
    text = yaml.safe_dump(value, allow_unicode=True, **options).removesuffix("\n").removesuffix("\n...")
    if one_line(text) != text:
        text = yaml.safe_dump(value, default_style='"', **options).removesuffix("\n")
    return text


def differences(one: View, other: View) -> dict[str, tuple]:
    """Dotted key → the two values, where they differ."""
    there, here = one.values(), other.values()
    return {key: (there[key], here[key]) for key in all_keys() if there[key] != here[key]}


def difference_lines(one: View, other: View) -> list[str]:
    """What `differences` found, for a person."""
    found = differences(one, other)
    if not found:
        return [f"{one_line(one.name)} and {one_line(other.name)}: no difference"]
    keys, verb = ("key", "differs") if len(found) == 1 else ("keys", "differ")
    head = f"{one_line(one.name)} → {one_line(other.name)}: {len(found)} {keys} of {len(all_keys())} {verb}"
    return [head, *(f"{key}: {_plain(old)} → {_plain(new)}" for key, (old, new) in found.items())]
