"""A shared policy, untrusted data: a folder of model.safetensors, config.json and a model card, or a hub id of such.

config.json says of the policy what a checkpoint does (shape, encoder, features, dataset, seed, phase, epoch), and in
`setting` the config keys that it is used with. Only keys of SETTING are taken from there, and of the paths only those
that mean the same on every machine: a downloaded folder names no file of this machine, and no server. The files of KIT
are for people: nothing is read from them.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lever_lm.config.schema import keys_of
from lever_lm.utils.atomic_io import remove, write_json, write_tensors, write_text
from lever_lm.utils.errors import LeverError
from lever_lm.utils.hub import POLICY_FILES, fetch_policy, is_hub_id
from lever_lm.utils.paths import ASSET_PREFIX, HUB_PREFIX
from lever_lm.utils.safe_parse import is_epoch, read_bytes, read_json, read_object
from lever_lm.utils.terminal import shown

FORMAT, VERSION = "lever_lm/policy", 1
CONFIG, WEIGHTS = POLICY_FILES
CARD = "README.md"
KIT = PICKS, PROMPTS, RUN_CONFIG = ("picks.jsonl", "prompts.txt", "config.yaml")
_CONFIG_LIMIT = 1 << 20  # bytes
_WEIGHTS_LIMIT = 1 << 30
_LONGEST_ID = 96  # characters of a hub id
# Keys that a checkpoint has in its config, too.
OF_POLICY = ("policy", "encoder", "features", "embeddings", "dataset", "seed", "train_split", "candidate_features")
_KEYS = {"format", "format_version", "lever_lm", *OF_POLICY, "phase", "epoch", "chosen"}
_KEYS |= {"setting", "fingerprints", "packages", "results"}
_WHAT = "a policy as `lever export` writes it"
# What of a config a policy is used with, whoever uses it.
_SECTIONS = ("data", "features", "sampler", "policy", "infer", "prompt", "lvlm")  # in the order of the file
SETTING = sorted(keys_of("answers", "place"), key=lambda key: _SECTIONS.index(key[0]))
PLACES = set(keys_of("place"))
# No way out of the assets; of a repository, perhaps a folder or a file, where `{split}` may stand.
_EVERYWHERE = rf"{ASSET_PREFIX}[\w-][\w.-]*|{HUB_PREFIX}[\w-][\w.-]*/[\w-][\w.-]*(?:/[\w{{}}-][\w.{{}}-]*)*"
_MODELS = {("features", "encoder"), ("lvlm", "path")}


def setting_of(values: dict, keys: Sequence[tuple[str, ...]] = SETTING) -> dict:
    """Return what is shared of nested config values: these keys. A folder of this machine is left out; of a model's
    folder the name stays, as that of the model to look for."""
    kept: dict = {}
    for key in keys:
        *section, name = key
        there = values.get(section[0]) if section else values
        value = _shareable(key, there.get(name)) if isinstance(there, dict) else None
        if value is not None:
            (kept.setdefault(section[0], {}) if section else kept)[name] = value
    return kept


def _shareable(key: tuple[str, ...], value):
    """Return a config value as it means the same on every machine; None where it does not."""
    if key == ("data", "file_prefix"):
        return None if "/" in str(value) else value
    if not isinstance(value, str) or not value or key not in PLACES | _MODELS or re.fullmatch(_EVERYWHERE, value):
        return value
    if key in PLACES or value.startswith((ASSET_PREFIX, HUB_PREFIX)):
        return None
    name = value if is_hub_id(value) else Path(value.rstrip("/")).name
    return None if name.startswith((".", "~")) else name


# ---------------------------------------------------------------------- the folder


def is_exported(folder: Path) -> bool:
    """Return whether a folder holds a policy that `lever export` wrote."""
    return read_object(folder / CONFIG, _CONFIG_LIMIT).get("format") == FORMAT


def policy_folder(path: str | Path) -> Path | None:
    """The folder of a shared policy: `path` itself where it is a folder; of a hub id OWNER/NAME the one in the hub's
    cache, downloaded where it is missing; None for all else. Raises LeverError where the hub does not have it."""
    if os.path.isdir(path):
        return Path(path)
    if (
        len(str(path)) <= _LONGEST_ID
        and is_hub_id(str(path))
        and Path(path).suffix not in (".pt", ".pth", ".ckpt", ".safetensors")
        and not os.path.isdir(Path(path).parts[0])  # a mistyped `results/…` is not asked of the hub
    ):
        return fetch_policy(str(path))
    return None


def write_exported(
    folder: Path, weights: dict[str, torch.Tensor], config: dict, card: str, kit: Mapping[str, str]
) -> list[str]:
    """Write a shared policy; config: the content of config.json; kit: names of KIT → their texts, the others are
    removed. Returns the files' paths."""
    # The config is what makes the folder a policy: it is removed first and written last, so that a killed export leaves
    # no mixture of two policies.
    for name in (CONFIG, *KIT):
        remove(folder / name)
    write_tensors(folder / WEIGHTS, {name: t.contiguous() for name, t in weights.items()}, {"format": "pt"})
    for name, text in {CARD: card, **kit}.items():
        write_text(folder / name, text)
    write_json(folder / CONFIG, {"format": FORMAT, "format_version": VERSION, **config})
    return [str(folder / name) for name in (WEIGHTS, CONFIG, CARD, *kit)]


def read_exported(folder: Path, named: str | Path) -> dict:
    """A shared policy in the form of a v3 checkpoint, and its `setting`. named: the folder's name in messages.

    Raises LeverError where a file is missing, too large, of another format, or of a later version.
    """
    config = _read_config(folder, named)
    epoch = config.get("epoch")
    return {
        "epoch": epoch - 1 if is_epoch(epoch) and epoch else 0,
        "phase": config.get("phase") if config.get("phase") in ("rce", "grpo") else "grpo",
        "model_state_dict": _read_weights(folder / WEIGHTS, named),
        "kl_beta": 0.0,
        "metrics": {},
        "config": {name: config[name] for name in OF_POLICY if name in config},
        "setting": config["setting"] if isinstance(config.get("setting"), dict) else {},
    }


def _read_config(folder: Path, named: str | Path) -> dict:
    try:
        config = read_json(folder / CONFIG, _CONFIG_LIMIT)
        if not isinstance(config, dict) or config.get("format") != FORMAT or not isinstance(config.get("policy"), dict):
            raise ValueError("it is of something else, or does not say the policy's shape")
        if (version := config.get("format_version")) != VERSION:
            wrote = shown(config.get("lever_lm"))
            raise ValueError(
                f"of version {shown(version)}, not {VERSION}: install the lever_lm that wrote it ({wrote})"
            )
        if unknown := sorted(set(config) - _KEYS):
            raise ValueError(f"it holds a key {shown(unknown[0])}, which is none of a policy's")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise LeverError(
            f"cannot read the checkpoint {named}: Is a directory, with {CONFIG}: {why}; expected {_WHAT}"
        ) from error
    return config


def _read_weights(path: Path, named: str | Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    try:  # read, not mapped: a file that is cut while it is mapped would take the process with it
        weights = load(read_bytes(path, _WEIGHTS_LIMIT))
        if small := next((t.dtype for t in weights.values() if t.is_floating_point() and t.element_size() < 2), None):
            raise ValueError(f"{small} can be stored, and not computed with")
        return weights
    except Exception as error:  # SafetensorError, or of a type that torch does not have
        why = getattr(error, "strerror", None) or shown(re.sub(r"\s+", " ", str(error)), 200).strip("'\"")
        raise LeverError(f"cannot read the weights {named}/{path.name}: {why}; expected {_WHAT}") from error
