"""The seam to a vision-language model: what a backend must do, and the families that run in this process.

A model behind a server is `openai_server.ServerLvlm`. A model of `transformers` is a `local.LocalLvlm` around its
family, which is one function here and one module.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.lvlm.prompt import Prompt
from lever_lm.utils.distributed import Shards
from lever_lm.utils.progress import Track, untracked


class Backend(Protocol):
    """What `CachedLvlm` asks of a model. Lists come back in the order of the prompts."""

    def batches(self, prompts: Sequence[Prompt], answers: Sequence[str] | None = None) -> list[list[int]]:
        """Return the indices of the prompts, or of the prompts with the answers that are scored after them, in the
        batches in which they are to be asked: a function of the work alone. All processes of a job call it together.
        """

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return what the model writes after each prompt, uncut."""

    def answer_log_prob(self, prompts: Sequence[Prompt], answers: Sequence[str], *, end: bool = False) -> list[float]:
        """Return log P(answer | prompt), rounded to 6 decimals: the sum over the answer's tokens, and with `end` also
        that of the token that ends the turn after them. Raises LeverError for an empty answer."""


def _qwen2_5_vl(*arguments):
    from lever_lm.lvlm.qwen2_5_vl import Qwen2_5_VL

    return Qwen2_5_VL(*arguments)


# Name → (config, prompt, device, folder of image features, track, shards) → a `local.Family`.
FAMILIES: dict[str, Callable] = {"qwen2_5_vl": _qwen2_5_vl}


def load_local(
    config: LvlmConfig,
    prompt: PromptConfig,
    device: str = "auto",
    *,
    folder: Path | None = None,
    track: Track = untracked,
    shards: Shards = Shards(),
):
    """Return the `LocalLvlm` of a model's directory or hub id. Image features go to `folder`, where it is given, and
    stay there for the next command. Raises LeverError where the model cannot be loaded."""
    from lever_lm.lvlm.local import LocalLvlm

    return LocalLvlm(FAMILIES["qwen2_5_vl"](config, prompt, device, folder, track, shards), config, prompt)
