"""Which family a model is of, by its config.json; refused where the library has no class of images and text for it."""

from pathlib import Path

from lever_lm.config.schema import LvlmConfig
from lever_lm.utils.errors import MendableError
from lever_lm.utils.hub import is_hub_id, model_folder
from lever_lm.utils.safe_parse import read_object
from lever_lm.utils.terminal import shown
from lever_lm.utils.transformers_compat import import_transformers

# model_type of a model's config.json → its family, where that is not `generic`.
FAST = {
    "qwen2_vl": "qwen2_5_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
}
OTHER = "name another model (--lvlm, lvlm.path)"


def model_type(folder: Path | None) -> str | None:
    """Return the model_type of a model's config.json; None where there is none that can be read."""
    return None if folder is None else read_object(folder / "config.json").get("model_type")


def family_of(config: LvlmConfig, folder: Path | None) -> str:
    """Return the family that the model in a folder is of. Raises MendableError where lvlm.family names a fast path that
    does not know it, as its answers would be of another model, and where lvlm.processor is set for a fast path."""
    kind = model_type(folder)
    own = FAST.get(kind, "generic")
    if config.family not in ("auto", "generic", own):
        found = f"lvlm.family={config.family} does not know the model_type {shown(kind)} of {config.path}"
        raise MendableError(found, f"--set lvlm.family=auto, which is {own}")
    family = own if config.family == "auto" else config.family
    if config.processor and family != "generic":
        found = (
            f"lvlm.processor.{next(iter(config.processor))} is taken by the generic path, {config.path} has a fast one"
        )
        raise MendableError(found, "lvlm.min_pixels and lvlm.max_pixels bound its images, or --set lvlm.family=generic")
    return family


def keeps_features(config: LvlmConfig) -> bool:
    """Return whether the images' features of a model are kept on disk: on a fast path, or where it is not here yet."""
    folder = model_folder(config.path)
    return folder is None or (config.family != "generic" and model_type(folder) in FAST)


def refuse_other_kinds(path: str) -> None:
    """Raise MendableError where the model is here and is none of images and text: before its files are looked for, as
    it lacks none of its own."""
    folder = model_folder(path)
    if model_type(folder) is not None:
        check_model_type(path, folder)


def check_model_type(path: str, folder: Path) -> None:
    """Raise MendableError unless the library has a class of images and text for a model, and that is all it needs: code
    that a model brings along is never run."""
    library = import_transformers()
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as OF_IMAGES

    described, kind = read_object(folder / "config.json"), model_type(folder)
    if kind in OF_IMAGES:
        return
    here, mend = f"transformers {library.__version__}", OTHER
    if kind is None:
        found = "its config.json cannot be read, or names no model_type"
        mend = f"fetch it again{f' (hf download {path})' if is_hub_id(path) else ''}, or {OTHER}"
    elif kind in library.CONFIG_MAPPING:
        found = f"{here} has no model of images and text for its model_type {shown(kind)}"
    elif described.get("auto_map"):
        found = f"its model_type {shown(kind)} needs code of its own (auto_map in config.json), which is never run"
        mend = f"take a copy that {here} has a class for, often one whose name ends in -hf, or {OTHER}"
    else:
        found = f"{here} does not know its model_type {shown(kind)}"
        mend = f"pip install -U transformers, or {OTHER}"
    raise MendableError(f"cannot load the LVLM {path}: {found}", mend)
