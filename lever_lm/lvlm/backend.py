"""The families of models that run in this process: each has one function here and one module, around which
`local.LocalLvlm` does what all share. A model behind a server is `openai_server.ServerLvlm`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.data import Image
from lever_lm.lvlm.families import family_of, refuse_other_kinds
from lever_lm.lvlm.protocol import Backend
from lever_lm.utils.distributed import Shards
from lever_lm.utils.hub import fetch_model
from lever_lm.utils.progress import Track, untracked


def _qwen2_5_vl():
    from lever_lm.lvlm.qwen2_5_vl import Qwen2_5_VL

    return Qwen2_5_VL


def _qwen3_vl():
    from lever_lm.lvlm.qwen3_vl import Qwen3VL

    return Qwen3VL


def _generic():
    from lever_lm.lvlm.generic import Generic

    return Generic


# A name of lvlm.family → the class of it: (config, prompt, device, folder of image features, track, shards, images that
# are asked about first) → a Family.
FAMILIES: dict[str, Callable[[], type]] = {"qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl, "generic": _generic}


def load_local(
    config: LvlmConfig,
    prompt: PromptConfig,
    device: str = "auto",
    *,
    folder: Path | None = None,
    track: Track = untracked,
    shards: Shards = Shards(),
    ahead: Sequence[Image] = (),
) -> Backend:
    """Return the backend of a model's directory or hub id, of the family that its config.json names. Image features go
    to `folder`, where it is given, and stay there for the next command. The images `ahead` will be asked about first:
    they are decoded while the weights are loaded. Raises LeverError where the model cannot be loaded."""
    from lever_lm.lvlm.local import LocalLvlm

    refuse_other_kinds(config.path)
    family = FAMILIES[family_of(config, fetch_model(config.path, "--lvlm, lvlm.path"))]()
    return LocalLvlm(family(config, prompt, device, folder, track, shards, ahead), config, prompt)
