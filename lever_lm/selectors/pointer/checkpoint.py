"""Checkpoints: v3 and v2 files, the key map between them, and the policy in them. A checkpoint is data, never code.

v3: {epoch (0-based), phase, model_state_dict, kl_beta, metrics} + our config and format.
v2: the older Lightning-shaped file {state_dict, epoch, global_step, pytorch-lightning_version, hyper_parameters}, with
our config under a key of its own.
"""

import hashlib
import io
import re
from pathlib import Path

import torch
from torch import Tensor

from lever_lm.selectors.fixed_set import FixedSet
from lever_lm.selectors.lever_lm import LeverLM
from lever_lm.selectors.pointer.hub_format import policy_folder, read_exported
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.selectors.pointer.variants import VARIANTS
from lever_lm.utils.atomic_io import atomic_file
from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_torch_load import load_torch
from lever_lm.utils.terminal import shown

FORMAT = "lever_lm/v3"
OWN_KEY = "lever_lm_config"
V2_PREFIX = "lever_lm.pointer_selector."
V2_HYPER_PARAMETERS = {"lr": 1e-4, "weight_decay": 1e-3, "warm_steps": 0.05}
# v3 prefix → v2 prefix: v2 knows a single cross-attention layer, without an index.
_LAYER_KEYS = {"cross_attn_layers.0.": "cross_attn.", "attn_norms.0.": "attn_norm."}
# option → what of it v2 can express
_IN_V2 = {"state_update": ("none", "gate"), "scorer": ("dot",), "diversity": ("none",), "stop": (False,)}
_NOT_OURS = "not the weights of a PointerSelector"
Policy = PointerSelector | LeverLM | FixedSet
# Arguments of a policy that its weights do not say → their types, least value and bound
_UNSEEN = {
    "dropout": ((int, float), 0, 1),
    "attn_dropout": ((int, float), 0, 1),
    "temperature": ((int, float), 1e-6, 1e6),
    "num_heads": ((int,), 1, 1 << 16),
}


# ---------------------------------------------------------------------- v3 files


def save_torch(path: Path, content: dict) -> None:
    """torch.save, atomically. Through memory: torch.save has an error of its own for a full disk."""
    with atomic_file(path) as file:  # and for Ctrl-C, which waits here
        buffer = io.BytesIO()
        torch.save(content, buffer)
        file.write(buffer.getbuffer())


def v3_content(policy: Policy, *, epoch: int, phase: str, kl_beta: float, metrics: dict, config: dict) -> dict:
    """The content of a v3 file. epoch counts from 0, as in Lever-Plus; config says what the policy was made for."""
    return {
        "epoch": epoch,
        "phase": phase,
        "model_state_dict": {name: tensor.detach().cpu().clone() for name, tensor in policy.state_dict().items()},
        "kl_beta": kl_beta,
        "metrics": metrics,
        "config": {"policy": policy.shape, **config},
        "format": FORMAT,
    }


def read_checkpoint(path: str | Path) -> dict:
    """The content of a v3 or v2 file, or of an exported folder or hub id in the form of a v3 file. Raises LeverError
    for anything else."""
    folder = policy_folder(path)
    return load_torch(path) if folder is None else read_exported(folder, path)


def own_config(content: dict) -> dict:
    """The config that a checkpoint of ours carries; {} for one of Lever-Plus."""
    found = (content.get(key) for key in (OWN_KEY, "config"))
    return next((config for config in found if isinstance(config, dict) and config), {})


def format_of(content: dict) -> str:
    """Return the format of a checkpoint's content: v2 where the weights stand in a state_dict, else v3."""
    return "v2" if "state_dict" in content and "model_state_dict" not in content else "v3"


def weights_of(content: dict, path: str | Path) -> dict[str, Tensor]:
    """The policy's weights under their v3 names. Raises LeverError when there are none."""
    if isinstance(content.get("model_state_dict"), dict):
        state = content["model_state_dict"]
    elif isinstance(content.get("state_dict"), dict):
        state = v2_to_v3_keys(content["state_dict"])
    else:
        raise LeverError(f"{path} holds neither a model_state_dict (v3) nor a state_dict (v2): not a policy checkpoint")
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise LeverError(f"{path} holds no policy weights")
    if odd := next((name for name, tensor in state.items() if not tensor.is_floating_point()), None):
        raise LeverError(f"{path}: {odd:.60} holds {state[odd].dtype}: {_NOT_OURS}")
    return state


# ---------------------------------------------------------------------- policies


def load_policy(path: str | Path, num_heads: int = 1) -> Policy:
    """The policy, or another learnt selector, of a v3 or v2 file, or of a folder of `lever export` or a hub id
    OWNER/NAME of such, in eval mode.

    Its shape is read from our config where the file carries one, else from the weights; heads and the logit
    temperature are not in those: num_heads is taken as given and the temperature is 0.1. Raises LeverError when the
    file is no checkpoint, or its weights do not fit exactly.
    """
    return policy_of(read_checkpoint(path), path, num_heads)


def policy_of(content: dict, path: str | Path, num_heads: int = 1) -> Policy:
    """The policy in the content of a checkpoint, as `load_policy` returns it; path: the checkpoint's name in messages.
    Raises LeverError where weights are missing, do not fit, or are NaN or infinite."""
    state, claimed = weights_of(content, path), own_config(content).get("policy")
    kind = _kind_of(state)
    shape = infer_shape(state, num_heads, path) if kind is PointerSelector else _shape_of(kind, state, path)
    if claimed is not None:
        shape = _checked_shape(claimed, shape, path, kind)
    try:
        # Nothing is allocated for what the weights do not fit. A GPT-2 has tensors beside its weights.
        for device in ("meta", "cpu") if kind is LeverLM else ("meta",):
            with torch.device(device):
                policy = kind(**shape)
            policy.load_state_dict({name: tensor.float().clone() for name, tensor in state.items()}, assign=True)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        why = " ".join(str(error).split())[:300]
        raise LeverError(f"{path} does not hold the weights of a {kind.__name__}: {why}") from error
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise LeverError(f"{path}: NaN or infinite weights in {', '.join(broken[:3])}; use an earlier checkpoint")
    return policy.eval()


def new_of_shape(shape: dict) -> Policy:
    """Return an untrained policy, or another learnt selector, of the shape that a checkpoint's config holds."""
    if "vocabulary" not in shape:
        return PointerSelector(**shape)
    return (LeverLM if "d_model" in shape else FixedSet)(**shape)


def _kind_of(state: dict[str, Tensor]) -> type[Policy]:
    """The class that these weights are of, by their names."""
    if "gpt.wte.weight" in state:
        return LeverLM
    return FixedSet if state.keys() == {"scores"} else PointerSelector


def _shape_of(kind: type[Policy], state: dict[str, Tensor], path: str | Path) -> dict:
    """Constructor arguments of the LeverLM or the FixedSet that has these weights."""
    if kind is FixedSet:
        return {"vocabulary": state["scores"].numel()}
    inner, words = state.get("query_proj.weight"), state["gpt.wte.weight"]
    if inner is None or inner.ndim != 2 or words.ndim != 2:
        raise LeverError(f"{path} holds no query_proj.weight, or one of an odd shape: not the weights of a LeverLM")
    layers = {match[1] for key in state if (match := re.match(r"gpt\.h\.(\d+)\.", key))}
    sizes = {"d_model": inner.shape[1], "hidden_dim": inner.shape[0], "vocabulary": words.shape[0]}
    return {**sizes, "num_layers": len(layers)}


def _checked_shape(claimed, found: dict, path: str | Path, kind: type[Policy]) -> dict:
    """The shape that was found in the weights, with what a file's config adds. LeverError where the two differ."""
    for name, value in claimed.items() if isinstance(claimed, dict) else [("policy", claimed)]:
        if name in _UNSEEN:
            kinds, low, high = _UNSEEN[name]
            fits = type(value) in kinds and low <= value < high
        else:
            fits = type(value) is type(found.get(name)) and value == found[name]
        if not fits:
            claim = f"{shown(name)}={shown(value)}"
            raise LeverError(f"{path} does not hold the weights of a {kind.__name__} with {claim}, as its config says")
    return {**found, **claimed}


def infer_shape(state: dict[str, Tensor], num_heads: int, path: str | Path = "checkpoint") -> dict:
    """Constructor arguments of the policy that has these weights."""
    inner, entry = state.get("query_proj.weight"), state.get("input_proj.weight")
    if inner is None or any(
        weight is not None and (weight.ndim != 2 or not weight.numel()) for weight in (inner, entry)
    ):
        raise LeverError(f"{path} holds no query_proj.weight, or projections of odd shapes: {_NOT_OURS}")
    layers = {match[1] for key in state if (match := re.match(r"cross_attn_layers\.(\d+)\.", key))}
    modules = {key.split(".")[0] for key in state}
    variants = {
        option: next((name for name, part in known.items() if part and part[0] in modules), next(iter(known)))
        for option, known in VARIANTS.items()
    }
    return {
        "d_model": inner.shape[1] if entry is None else entry.shape[1],
        "hidden_dim": inner.shape[0],
        "num_layers": len(layers),
        "num_heads": num_heads,
        **variants,
        "stop": "stop_embedding" in state,
    }


def policy_digest(policy: PointerSelector) -> str:
    """16 hex digits of a policy's weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------- conversion


def v3_to_v2_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """v3 names → v2 names; weights of further layers keep their index and have no place in v2."""
    return {V2_PREFIX + _rename(key, _LAYER_KEYS): tensor for key, tensor in state.items()}


def v2_to_v3_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """v2 names → v3 names, with or without the outer prefix."""
    if not all(isinstance(key, str) for key in state):
        return {}
    back = {new: old for old, new in _LAYER_KEYS.items()}
    inner = V2_PREFIX.split(".", 1)[1]
    return {_rename(key.removeprefix(V2_PREFIX).removeprefix(inner), back): tensor for key, tensor in state.items()}


def _rename(key: str, prefixes: dict[str, str]) -> str:
    old = next(filter(key.startswith, prefixes), "")
    return prefixes.get(old, "") + key.removeprefix(old)


def to_v2(content: dict, path: str | Path, *, allow_truncate: bool = False) -> tuple[dict, list[str]]:
    """The v2 content of a v3 file, and the names of weights that were left out.

    Raises LeverError when the file holds no sound policy, or when v2 cannot express it: more than one layer, unless
    allow_truncate drops them.
    """
    policy, state = policy_of(content, path), weights_of(content, path)
    if not isinstance(policy, PointerSelector):
        raise LeverError(f"{path}: v2 cannot express a {type(policy).__name__}; use the v3 file as it is")
    shape = policy.shape
    beyond = [f"{option}={shape[option]}" for option, held in _IN_V2.items() if shape[option] not in held]
    if names := own_config(content).get("candidate_features"):
        beyond.append(f"policy.candidate_features={shown(names)}")
    beyond += ["num_layers=0"] if not shape["num_layers"] else []
    if beyond:
        raise LeverError(f"{path}: v2 cannot express a policy with {', '.join(beyond)}; use the v3 file as it is")
    extra = [key for key in state if re.match(r"(cross_attn_layers|attn_norms)\.[1-9]", key)]
    if extra and not allow_truncate:
        raise LeverError(
            f"{path} has {shape['num_layers']} cross-attention layers and v2 has one: the converted policy would "
            "choose otherwise. --allow-truncate keeps the first layer all the same"
        )
    kept = {key: tensor.clone() for key, tensor in state.items() if key not in extra}
    own = dict(own_config(content))
    if own.get("policy") and extra:
        own["policy"] = {**own["policy"], "num_layers": 1}
    converted = {
        "state_dict": v3_to_v2_keys(kept),
        "epoch": content.get("epoch", 0),
        "global_step": 0,
        "pytorch-lightning_version": "2.0.0",
        "hyper_parameters": dict(V2_HYPER_PARAMETERS),
    }
    return {**converted, **({OWN_KEY: own} if own else {})}, extra


def to_v3(content: dict, path: str | Path) -> dict:
    """The v3 content of a v2 file; phase and metrics are not in v2 and stay empty. Raises LeverError when the file
    holds no sound policy."""
    policy, own = policy_of(content, path), own_config(content)
    about = {"phase": own.get("phase", "grpo"), "kl_beta": own.get("kl_beta", 0.0), "metrics": {}}
    return v3_content(policy, epoch=content.get("epoch", 0), **about, config=own)
