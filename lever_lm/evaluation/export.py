"""`lever export`: a checkpoint as a folder to share: model.safetensors, config.json, README.md, the model card with the
hub's metadata (templates/model_card.md.j2), and the kit of reproduction.py. What comes from files is text on the card,
no markup."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

from lever_lm import __version__
from lever_lm.config.schema import Config, DataConfig, to_dict
from lever_lm.config.values import build
from lever_lm.data import VqaData
from lever_lm.evaluation.reproduction import reproduction_kit
from lever_lm.evaluation.results import evaluations, read_metrics, table
from lever_lm.evaluation.templates import render
from lever_lm.selectors import CONTRASTS, ZERO_SHOT
from lever_lm.selectors.pointer.checkpoint import load_policy, own_config, policy_digest, read_checkpoint
from lever_lm.selectors.pointer.hub_format import (
    CARD,
    CONFIG,
    KIT,
    OF_POLICY,
    WEIGHTS,
    is_exported,
    setting_of,
    write_exported,
)
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.tasks import load_data
from lever_lm.training.environment import PACKAGES, recorded
from lever_lm.training.run_dir import RunFolder, inference_folder
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.hub import is_hub_id
from lever_lm.utils.paths import HUB_PREFIX
from lever_lm.utils.safe_parse import is_epoch
from lever_lm.utils.terminal import one_line

TAGS = ("in-context-learning", "demonstration-selection", "visual-question-answering", "vision-language-model")
_LONGEST = 200  # characters of a version or a fingerprint
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")  # as the hub names them
_MARKUP = re.compile(r"([\\`*_\[\]<>|~&#!$])")
# Licenses that are certain; of other datasets their own pages tell.
_DATA_LICENSES = {
    "asset:digits": "CC BY 4.0, derived from *Optical Recognition of Handwritten Digits* (E. Alpaydin and C. Kaynak, "
    "1998, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49), CC BY 4.0"
}


def export(
    checkpoint: Path,
    why: str,
    folder: Path,
    *,
    data: Callable[[], VqaData] | None = None,
    license_: str = "apache-2.0",
    overwrite: bool = False,
) -> dict:
    """Write a checkpoint into `folder` to be shared: the same bytes for the same run. Return what was written, and what
    of the kit was `left_out`, file → why.

    why: the reason for this checkpoint. The run that it lies in says what it was trained with; else that is not known.
    data: loads the dataset, by default from where the run had it. Raises LeverError where the folder holds something
    else, unless `overwrite`, and for a checkpoint that cannot be loaded; UsageError for a license that is no name.
    """
    if not _LICENSE.fullmatch(license_):
        raise UsageError(
            f"--license takes a name as the hub has it, such as apache-2.0 or cc-by-4.0; found {license_!r}"
        )
    if not checkpoint.is_file():
        raise LeverError(f"{checkpoint} is an exported policy already: copy its folder")
    _check_folder(folder, checkpoint, overwrite)
    run, content, policy = RunFolder(checkpoint.parent), read_checkpoint(checkpoint), load_policy(checkpoint)
    config = build(run.values()) if run.config.is_file() else None
    own, setting = own_config(content), setting_of(to_dict(config)) if config else {}
    # A policy of the user's own rollouts and features names no encoder, and its config's data are not its own.
    known = config is not None and isinstance(own.get("encoder"), str)
    if not known:
        setting = {key: part for key, part in setting.items() if key not in ("data", "features")}
    evaluated = _evaluated(run, policy) if known else None
    shared = {
        "lever_lm": __version__,
        "policy": policy.shape,
        **{name: own[name] for name in OF_POLICY[1:] if name in own},
        "phase": "rce" if content.get("phase") == "rce" else "grpo",
        "epoch": content["epoch"] + 1 if is_epoch(content.get("epoch")) else None,  # from 1, as in file names
        "chosen": re.split("[;:]", why)[0],  # what follows advises the run's owner
        "setting": setting,
        "fingerprints": _texts(recorded(run, "fingerprints"), ("data", "encoder", "lvlm")),
        "packages": _texts(recorded(run, "packages"), PACKAGES),
        "results": [row for row in evaluated["results"] if row["method"] == evaluated["method"]] if evaluated else [],
    }
    kit, left_out = {}, {}
    if config is not None:
        data, stamp = data or partial(load_data, config.data), recorded(run, "fingerprints").get("data")
        kit, left_out = reproduction_kit(config, known, evaluated, data, stamp)
    card = _card(folder.resolve().name, license_, config if known else None, config, shared, evaluated, kit)
    return {
        "folder": str(folder),
        "files": write_exported(folder, policy.state_dict(), shared, card, kit),
        "left_out": left_out,
        "checkpoint": str(checkpoint),
        "why": why,
        "evaluated": bool(evaluated),
    }


def _check_folder(folder: Path, checkpoint: Path, overwrite: bool) -> None:
    """Raise LeverError where a folder holds anything but what an export wrote, or could not finish writing; and always
    where it is that of a run, whose own config.yaml would be replaced."""
    if folder.exists() and not folder.is_dir():
        raise LeverError(f"{folder} is a file: choose another DIR")
    if RunFolder(folder).state.is_file() or folder.resolve() == checkpoint.parent.resolve():
        raise LeverError(f"{folder} is the folder of a run: choose another DIR")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()
    unfinished = WEIGHTS in names and names <= {WEIGHTS, CARD, *KIT}
    if names and not (overwrite or unfinished or is_exported(folder)):
        raise LeverError(
            f"{folder} is not empty, and holds no earlier export: choose another DIR, or write into it with "
            f"--overwrite ({', '.join((WEIGHTS, CONFIG, CARD, *KIT))} are replaced)"
        )


def _texts(values: dict, names: tuple[str, ...]) -> dict[str, str]:
    """Return the named entries of an env.json that are short texts."""
    return {n: values[n] for n in names if isinstance(values.get(n), str) and len(values[n]) < _LONGEST}


def _evaluated(run: RunFolder, policy: PointerSelector) -> dict | None:
    """Return the last evaluation of a policy with baselines, else the last, under the setting that it was trained in:
    what read_metrics says, its folder and its method; None where there is none. It is told by its weights: a file's
    name outlives what was in it."""
    digest = policy_digest(policy)
    for folder in evaluations(inference_folder(run.path)):
        try:
            found = read_metrics(folder)
        except LeverError:
            continue
        for row in found["results"]:
            if found["policies"].get(row["method"]) == digest:
                return {**found, "folder": folder, "method": row["method"]}
    return None


# ---------------------------------------------------------------------- the model card


def markdown(value) -> str:
    """Return a value as text in Markdown, on one line."""
    return _MARKUP.sub(r"\\\1", one_line(str(value)))


def _card(
    name: str,
    license_: str,
    known: Config | None,
    config: Config | None,
    shared: dict,
    evaluated: dict | None,
    kit: dict[str, str],
) -> str:
    """Return the text of README.md. known: the config of the run where dataset and encoder are its own, too; else
    rollouts and features were the maker's own. shared: the content of config.json. kit: the further files."""
    front: dict = {"license": license_, "library_name": "lever_lm", "tags": list(TAGS)}
    ours, shots, methods, tests = "", [], [], []
    if known:
        # Hub ids where the data came from the hub, else the dataset's name; no paths of this machine.
        paths = [
            path
            for path in (known.data.train_path, known.data.okvqa_path, known.data.file)
            if path.startswith(HUB_PREFIX)
        ]
        models = [shared["setting"]["features"]["encoder"], shared["setting"]["lvlm"]["path"]]
        front |= {"base_model": bases} if (bases := list(filter(is_hub_id, models))) else {}
        front["datasets"] = [path.removeprefix(HUB_PREFIX) for path in paths] or [known.data.name]
    if evaluated:
        ours = evaluated["method"]
        front |= {
            "metrics": ["accuracy"],
            "model-index": [_indexed(name, front["datasets"][-1], known, shared, evaluated["score"])],
        }
        shots, methods = table(evaluated["results"])
        compared = [test for test in evaluated["tests"] if test["method"] == ours]
        most = max((test["shots"] for test in compared), default=0)
        tests = [test for test in compared if test["shots"] == most and test["against"] in (ZERO_SHOT, *CONTRASTS)]
    text = render(
        "model_card.md.j2",
        {"md": markdown},
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000),
        name=name,
        license=license_,
        config=config,
        known=known is not None,
        shared=shared,
        lvlm=shared["setting"]["lvlm"]["path"] if config else "",
        data_license=_license_of(known.data) if known else "",
        evaluated=evaluated,
        ours=ours,
        shots=shots,
        methods=methods,
        tests=tests,
        kit=kit,
    )
    return text.rstrip() + "\n"


def _metric(score: str) -> str:
    """Return the hub's name of what a task calls its score."""
    return (
        "accuracy" if score.endswith("accuracy") else score.split(" /")[0].lower().replace(" ", "_").replace("-", "_")
    )


def _license_of(data: DataConfig) -> str:
    """Return the license of the data, where it is known."""
    return _DATA_LICENSES.get(data.okvqa_path if not data.file else data.file, "see the dataset's own terms")


def _indexed(name: str, dataset: str, config: Config, shared: dict, score: str) -> dict:
    """Return an entry of the hub's model index: the scores of a policy."""
    plural = {row["shots"]: "s" * (row["shots"] != 1) for row in shared["results"]}
    result = {
        "task": {"type": "visual-question-answering", "name": "Visual question answering"},
        "dataset": {"type": dataset, "name": config.data.name, "split": "validation"},
        "metrics": [
            {
                "type": _metric(score),
                "name": f"{score}, {row['shots']} shot{plural[row['shots']]}",
                "value": round(row["accuracy"], 4),
            }
            for row in shared["results"]
        ],
    }
    return {"name": name, "results": [result]}
