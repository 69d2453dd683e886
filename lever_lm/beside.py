"""A checkpoint named by anything, and the config that lies beside it: of a run, or of a policy that was shared."""

import os
from collections.abc import Sequence
from pathlib import Path

from lever_lm.checkpoint import own_config, read_checkpoint
from lever_lm.config import Config
from lever_lm.errors import LeverError
from lever_lm.exported import is_exported, policy_folder, setting_of
from lever_lm.finding import find_checkpoint
from lever_lm.runs import RunFolder
from lever_lm.settings import build, configs_root, environment_values, merge, named_yaml, parse_set, read_yaml
from lever_lm.untrusted import one_line


def locate(checkpoint: str | Path) -> tuple[Path, str, dict]:
    """The checkpoint of a run folder (as `lever infer` takes it), a file, an exported folder or a hub id; why this one;
    and nested config values from beside it, {} where there are none. Raises LeverError where there is no checkpoint."""
    path = Path(checkpoint)
    if os.path.isdir(path) and not is_exported(path):
        run = RunFolder(path)
        found, why = find_checkpoint(run, None, {})
        return found, why, run.values() if run.config.is_file() else {}
    if os.path.isfile(path):
        run = RunFolder(path.parent)
        return path, "as named", run.values() if run.config.is_file() else {}
    if policy_folder(path) is None:
        raise LeverError(f"no checkpoint {path}: expected a run folder, a checkpoint, an exported folder or OWNER/NAME")
    content = read_checkpoint(path)
    seed = own_config(content).get("seed", 0)
    return path, "as named", {**setting_of(content["setting"]), "seed": seed}


def config_beside(
    values: dict, checkpoint, dataset: str | None, lvlm: str | None, sets: Sequence[str], own: bool
) -> Config:
    """The config of nested values, and what is given in their place: names of YAMLs, items of --set. own: the dataset
    is not needed. Raises LeverError where it is and nothing says which, UsageError for unknown names and keys."""
    if dataset is not None:
        found = named_yaml("dataset", dataset)
        values = merge({"features": found.get("features", {})}, {**values, "data": found.get("data", {})})
    data = values.get("data")
    if not own and not (isinstance(data, dict) and data.get("okvqa_path")):
        values = {**values, "data": _same_name(data, checkpoint)}
    if lvlm is not None:
        values = merge(values, named_yaml("lvlm", lvlm))
    values = merge(values, {"data": environment_values(values)[0].get("data", {})})
    for item in sets:
        values = merge(values, parse_set(item))
    features = values.get("features")
    if not (isinstance(features, dict) and features.get("encoder")):
        raise LeverError(f"{checkpoint} does not say by which CLIP it sees: sets=['features.encoder=OWNER/NAME']")
    return build(values)


def _same_name(data, checkpoint) -> dict:
    """The dataset of configs/ whose folder has the name that a shared policy's had: its paths were somebody else's."""
    name = data.get("name") if isinstance(data, dict) else None
    files = sorted((configs_root() / "dataset").glob("*.yaml"))
    for found in (read_yaml(file).get("data") for file in files):
        if isinstance(found, dict) and found.get("name") == name:
            return found
    what = f"was trained on {one_line(str(name))!r}, which is none of configs/dataset" if name else "names no dataset"
    raise LeverError(f"{checkpoint} {what}: say which (dataset=NAME), or bring ICDs of your own (examples=…)")


def results_beside(checkpoint: Path) -> Path:
    """The results folder, with its caches, in which a checkpoint's run is; `results` for one that is elsewhere."""
    runs = checkpoint.resolve().parent.parent
    return runs.parent.parent if runs.name == "model_cpk" else Path("results")
