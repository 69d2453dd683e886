"""`lever export`: a checkpoint as a folder to share, model.safetensors, config.json and a model card."""

import re
from collections.abc import Sequence
from pathlib import Path

from lever_lm import __version__
from lever_lm.config.schema import to_dict
from lever_lm.config.values import build
from lever_lm.evaluation.model_card import model_card
from lever_lm.evaluation.results import evaluations, read_metrics
from lever_lm.selectors.pointer.checkpoint import load_policy, own_config, policy_digest, read_checkpoint
from lever_lm.selectors.pointer.hub_format import CARD, CONFIG, WEIGHTS, is_exported, setting_of, write_exported
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.environment import PACKAGES, recorded
from lever_lm.training.run_dir import RunFolder, inference_folder
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.safe_parse import is_epoch

_LONGEST = 200  # characters of a version or a fingerprint
# The part of find_checkpoint's reason that advises the run's owner.
_ADVICE = re.compile(r"(, chosen when|, an epoch that broke|; best\.json names).*", re.DOTALL)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")  # as the hub names them


def export(checkpoint: Path, why: str, folder: Path, *, license_: str = "apache-2.0", overwrite: bool = False) -> dict:
    """Write a checkpoint into `folder` to be shared: the same bytes for the same run. Return what was written.

    why: the reason for this checkpoint. The run that it lies in says what it was trained with; else that is not known.
    Raises LeverError where the folder holds something else, unless `overwrite`, and for a checkpoint that cannot be
    loaded; UsageError for a license that is no name.
    """
    if not _LICENSE.fullmatch(license_):
        raise UsageError(
            f"--license takes a name as the hub has it, such as apache-2.0 or cc-by-4.0; found {license_!r}"
        )
    if not checkpoint.is_file():
        raise LeverError(f"{checkpoint} is an exported policy already: copy its folder")
    _check_folder(folder, overwrite)
    run, content, policy = RunFolder(checkpoint.parent), read_checkpoint(checkpoint), load_policy(checkpoint)
    config = build(run.values()) if run.config.is_file() else None
    own = own_config(content)
    # A policy of the user's own rollouts and features names no encoder, and its config's data are not its own.
    known = config is not None and isinstance(own.get("encoder"), str)
    evaluated = _evaluated(run, policy) if known else None
    setting = setting_of(to_dict(config)) if config else {}
    if not known:
        setting = {key: part for key, part in setting.items() if key not in ("data", "features")}
    shared = {
        "lever_lm": __version__,
        "policy": policy.shape,
        **{name: own[name] for name in ("encoder", "features", "embeddings", "dataset", "seed") if name in own},
        "phase": "rce" if content.get("phase") == "rce" else "grpo",
        "epoch": content["epoch"] + 1 if is_epoch(content.get("epoch")) else None,  # from 1, as in file names
        "chosen": _ADVICE.sub("", why),
        "setting": setting,
        "fingerprints": _texts(recorded(run, "fingerprints"), ("data", "encoder", "lvlm")),
        "packages": _texts(recorded(run, "packages"), PACKAGES),
        "results": [row for row in evaluated["results"] if row["method"] == evaluated["method"]] if evaluated else [],
    }
    card = model_card(folder.resolve().name, license_, config, shared, evaluated, known=known)
    return {
        "folder": str(folder),
        "files": write_exported(folder, policy.state_dict(), shared, card),
        "checkpoint": str(checkpoint),
        "why": why,
        "evaluated": bool(evaluated),
    }


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Raise LeverError where a folder holds anything but what an export wrote, or could not finish writing."""
    if folder.exists() and not folder.is_dir():
        raise LeverError(f"{folder} is a file: choose another DIR")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()
    unfinished = WEIGHTS in names and names <= {WEIGHTS, CARD}
    if names and not (overwrite or unfinished or is_exported(folder)):
        raise LeverError(
            f"{folder} is not empty, and holds no earlier export: choose another DIR, or write into it with "
            f"--overwrite ({WEIGHTS}, {CONFIG} and {CARD} are replaced)"
        )


def _texts(values: dict, names: Sequence[str]) -> dict[str, str]:
    """Return the named entries of an env.json that are short texts."""
    return {n: values[n] for n in names if isinstance(values.get(n), str) and len(values[n]) < _LONGEST}


def _evaluated(run: RunFolder, policy: PointerSelector) -> dict | None:
    """Return the last evaluation of a policy with baselines, else the last, under the setting that it was trained in:
    results, tests, its method, and the number of queries; None where there is none. It is told by its weights: a file's
    name outlives what was in it."""
    digest = policy_digest(policy)
    for folder in evaluations(inference_folder(run.path)):
        try:
            found = read_metrics(folder)
        except LeverError:
            continue
        for row in found["results"]:
            if found["policies"].get(row["method"]) == digest:
                return {**found, "method": row["method"], "n": max(row["n"] for row in found["results"])}
    return None
