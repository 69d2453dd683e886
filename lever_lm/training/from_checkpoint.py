"""The config that a checkpoint is used under, that of its run or of a shared policy, and what is changed about it.

The command line and `Retriever` go by the same functions.
"""

from collections.abc import Sequence
from pathlib import Path

from lever_lm.config.load import Layer, Layers, combined, layers
from lever_lm.config.schema import Config, keys_of, to_dict
from lever_lm.config.values import configs_root, read_yaml
from lever_lm.selectors.pointer.hub_format import PLACES, SETTING
from lever_lm.training.find_checkpoint import locate, values_of
from lever_lm.training.run_dir import RunFolder, lvlm_name
from lever_lm.utils.errors import LeverError
from lever_lm.utils.terminal import one_line

# What makes an evaluation one of the run's own. Where files are says nothing of what is in them.
_COMPARED = [key for key in SETTING if key not in PLACES] + keys_of("machine")
_NAMES = {("lvlm", "path"), ("features", "encoder")}  # told by their last part: a model may lie anywhere
_LONGEST = 100  # characters of a value


# ---------------------------------------------------------------------- what is in force


def layers_beside(
    values: dict,
    checkpoint,
    names: dict[str, str | None],
    file: Layer | None = None,
    sets: Sequence[str] = (),
    options: dict[str, dict] | None = None,
    *,
    own: bool = False,
) -> Layers:
    """Return what sets the config under which a checkpoint is used: the `values` that lie with it, and over them what
    is given. names, file, sets, options: as of `layers`. own: no dataset is needed. Raises LeverError where one is and
    nothing says which, UsageError for unknown names and keys."""

    def made(run: dict) -> Layers:
        return layers(names, file, list(sets), options or {}, run=Layer("the run", run))

    found = made(values)
    if not own and not _has(found, "data", "okvqa_path") and not _has(found, "data", "file"):
        found = made({**values, "data": _same_name(values.get("data"), checkpoint)})
    if not _has(found, "features", "encoder"):
        raise LeverError(
            f"{checkpoint} does not say by which encoder it sees: sets=['features.encoder=OWNER/NAME'], or on the "
            "command line --set features.encoder=OWNER/NAME"
        )
    return found


def config_beside(
    values: dict, checkpoint, dataset: str | None, lvlm: str | None, sets: Sequence[str], own: bool
) -> Config:
    """Return the config of `layers_beside`."""
    names = {"dataset": dataset, "lvlm": lvlm}
    return layers_beside(values, checkpoint, names, sets=sets, own=own).config()


def _has(given: Layers, section: str, key: str) -> bool:
    part = combined(given.found).get(section)
    return isinstance(part, dict) and bool(part.get(key))


def _same_name(data, checkpoint) -> dict:
    """Return the dataset of configs/ that has the name of the one that a shared policy was trained on: the paths of the
    latter lie on another machine."""
    name = data.get("name") if isinstance(data, dict) else None
    files = sorted((configs_root() / "dataset").glob("*.yaml"))
    for found in (read_yaml(file).get("data") for file in files):
        if isinstance(found, dict) and found.get("name") == name:
            return found
    what = f"was trained on {one_line(str(name))!r}, which is none of configs/dataset" if name else "names no dataset"
    raise LeverError(
        f"{checkpoint} {what}: say which (dataset=NAME), or bring ICDs of your own (examples=…); on the command line "
        "--dataset NAME or --data FILE"
    )


def results_beside(checkpoint: Path) -> Path:
    """Return the results folder, with its caches, in which a checkpoint's run is; `results` for one elsewhere."""
    runs = checkpoint.resolve().parent.parent
    return runs.parent.parent if runs.name == "model_cpk" else Path("results")


# ---------------------------------------------------------------------- what was changed


def changes(checkpoint: Path, config: Config) -> dict[str, dict]:
    """Return what a config changes about the setting that a checkpoint was trained in: dotted key → the value
    in the `run` and the one `here`. Where no config lies beside it, nothing is known to differ but the LVLM that a run
    folder of Lever-Plus is named after."""
    if checkpoint.is_file():
        return changes_of_run(RunFolder(checkpoint.parent), config)
    return _changes(locate(checkpoint)[2], config)


def changes_of_run(run: RunFolder, config: Config) -> dict[str, dict]:
    """Return the same for the setting of a run folder."""
    named = {} if run.config.is_file() or run.lvlm() is None else {"lvlm": {"path": run.lvlm()}}
    return _changes(run.settings() if values_of(run) else named, config)


def _changes(there: dict, config: Config) -> dict[str, dict]:
    here, found = to_dict(config), {}
    for section, name in _COMPARED:
        part = there.get(section)
        if isinstance(part, dict) and name in part:
            old, new = part[name], here[section][name]
            if old != new and not ((section, name) in _NAMES and lvlm_name(str(old)) == lvlm_name(new)):
                found[f"{section}.{name}"] = {"run": old, "here": new}
    lvlm = there.get("lvlm")
    if isinstance(lvlm, dict) and "server" in lvlm and bool(lvlm["server"]) != bool(here["lvlm"]["server"]):
        found["lvlm.server"] = {"run": lvlm["server"], "here": here["lvlm"]["server"]}  # it answers in its own way
    if "seed" in there and there["seed"] != here["seed"]:
        found["seed"] = {"run": there["seed"], "here": here["seed"]}
    return found


def change_lines(changed: dict[str, dict]) -> list[str]:
    """Return what was changed as lines for the terminal, one for each key."""
    return [f"{key}: {_short(pair['run'])} in the run, {_short(pair['here'])} here" for key, pair in changed.items()]


def _short(value) -> str:
    text = one_line(str(value))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
