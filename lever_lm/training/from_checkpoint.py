"""A checkpoint named by anything, and the config that it is used under: of its run, or of a policy that was shared. The
command line and `Retriever` go by the same functions.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from lever_lm.config.load import Layer, Layers, combined, layers
from lever_lm.config.schema import Config, keys_of, to_dict
from lever_lm.config.values import configs_root, read_yaml
from lever_lm.selectors.pointer.checkpoint import own_config, read_checkpoint
from lever_lm.selectors.pointer.hub_format import PLACES, SETTING, is_exported, policy_folder, setting_of
from lever_lm.training.environment import recorded
from lever_lm.training.find_checkpoint import find_checkpoint
from lever_lm.training.run_dir import RunFolder, lvlm_name
from lever_lm.utils.errors import LeverError
from lever_lm.utils.terminal import one_line

# What makes an evaluation one of the run's own. Where files are says nothing of what is in them.
_COMPARED = [key for key in SETTING if key not in PLACES] + keys_of("machine")
_NAMES = {("lvlm", "path"), ("features", "encoder")}  # told by their last part: a model may lie anywhere
_OF_A_COMMAND = ("device", "infer", "keep")
_LONGEST = 100  # characters of a value


def locate(checkpoint: str | Path) -> tuple[Path, str, dict]:
    """The checkpoint of a run folder (as `lever infer` takes it), a file, an exported folder or a hub id; why this one;
    and nested config values from beside it, {} where there are none. Raises LeverError where there is no checkpoint."""
    path = Path(checkpoint)
    if os.path.isdir(path) and not is_exported(path):
        run = RunFolder(path)
        found, why = find_checkpoint(run, None, {})
        return found, why, values_of(run)
    if os.path.isfile(path):
        return path, "as named", values_of(RunFolder(path.parent))
    if policy_folder(path) is None:
        raise LeverError(f"no checkpoint {path}: expected a run folder, a checkpoint, an exported folder or OWNER/NAME")
    content = read_checkpoint(path)
    seed = own_config(content).get("seed", 0)
    return path, "as named", {**setting_of(content["setting"]), "seed": seed}


def values_of(run: RunFolder) -> dict:
    """The nested config values that a run is used under: its own, without those of a single command. {} where it has no
    config, or learned from features of the user's own, of which its config says nothing."""
    if not run.config.is_file() or "embeddings" in recorded(run, "sources"):
        return {}
    return {key: value for key, value in run.values().items() if key not in _OF_A_COMMAND}


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
    """What sets the config under which a checkpoint is used: the values from beside it, and over them what is given.
    names, file, sets, options: as of `layers`. own: no dataset is needed. Raises LeverError where one is and
    nothing says which, UsageError for unknown names and keys."""

    def made(run: dict) -> Layers:
        return layers(names, file, list(sets), options or {}, run=Layer("the run", run))

    found = made(values)
    if not own and not _has(found, "data", "okvqa_path"):
        found = made({**values, "data": _same_name(values.get("data"), checkpoint)})
    if not _has(found, "features", "encoder"):
        raise LeverError(
            f"{checkpoint} does not say by which CLIP it sees: sets=['features.encoder=OWNER/NAME'], or on the command "
            "line --set features.encoder=OWNER/NAME"
        )
    return found


def config_beside(
    values: dict, checkpoint, dataset: str | None, lvlm: str | None, sets: Sequence[str], own: bool
) -> Config:
    """The config of `layers_beside`."""
    names = {"dataset": dataset, "lvlm": lvlm}
    return layers_beside(values, checkpoint, names, sets=sets, own=own).config()


def _has(given: Layers, section: str, key: str) -> bool:
    part = combined(given.found).get(section)
    return isinstance(part, dict) and bool(part.get(key))


def _same_name(data, checkpoint) -> dict:
    """The dataset of configs/ whose folder has the name that a shared policy's had: its paths were somebody else's."""
    name = data.get("name") if isinstance(data, dict) else None
    files = sorted((configs_root() / "dataset").glob("*.yaml"))
    for found in (read_yaml(file).get("data") for file in files):
        if isinstance(found, dict) and found.get("name") == name:
            return found
    what = f"was trained on {one_line(str(name))!r}, which is none of configs/dataset" if name else "names no dataset"
    raise LeverError(
        f"{checkpoint} {what}: say which (dataset=NAME), or bring ICDs of your own (examples=…); on the command line "
        "--dataset NAME"
    )


def results_beside(checkpoint: Path) -> Path:
    """The results folder, with its caches, in which a checkpoint's run is; `results` for one that is elsewhere."""
    runs = checkpoint.resolve().parent.parent
    return runs.parent.parent if runs.name == "model_cpk" else Path("results")


# ---------------------------------------------------------------------- what was changed


def changes(checkpoint: Path, config: Config) -> dict[str, dict]:
    """What a config changes about the setting that a checkpoint was trained in: dotted key → the value in the `run` and
    the one `here`. Nothing is known to differ where no config lies beside it, but the LVLM that a run folder of
    Lever-Plus is named after."""
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
    """What was changed, for a person: a line for each key."""
    return [f"{key}: {_short(pair['run'])} in the run, {_short(pair['here'])} here" for key, pair in changed.items()]


def _short(value) -> str:
    text = one_line(str(value))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
