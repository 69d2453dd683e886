"""The seam to a vision-language model: what a backend must do, and the families that run in this process.

A model behind a server is `openai_server.ServerLvlm`. A model of `transformers` has its family here: one function and
one module, around which `local.LocalLvlm` does what all families share.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.lvlm.families import family_of, refuse_other_kinds
from lever_lm.lvlm.prompt import Prompt
from lever_lm.utils.distributed import Shards
from lever_lm.utils.hub import fetch_model
from lever_lm.utils.progress import Track, untracked


class Backend(ABC):
    """What `CachedLvlm` asks of a model: first for the batches of the whole work, then for the answers of some."""

    @abstractmethod
    def batches(self, prompts: Sequence[Prompt], answers: Sequence[str] | None = None) -> list[list[int]]:
        """Return the indices of the prompts, or of the prompts with the answers that are scored after them, in the
        batches in which they are to be asked: a function of the work alone. All processes of a job call it together.
        """

    @abstractmethod
    def ask(
        self,
        prompts: Sequence[Prompt],
        batches: Sequence[list[int]],
        answers: Sequence[str] | None = None,
        *,
        end: bool = False,
    ) -> Iterator[tuple[list[int], list]]:
        """Yield (indices of prompts, a result for each) as they come, which together are all of the batches: what the
        model writes after each prompt, uncut. Or, with `answers`, log P(answer | prompt), rounded to 6 decimals: the
        sum over the answer's tokens, and with `end` also that of the token that ends the turn after them. Raises
        LeverError for an empty answer."""

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return what the model writes after each prompt, uncut, in the order of the prompts."""
        return self._all(prompts)

    def answer_log_prob(self, prompts: Sequence[Prompt], answers: Sequence[str], *, end: bool = False) -> list[float]:
        """Return log P(answer | prompt) in the order of the prompts, as `ask` has it."""
        return self._all(prompts, answers, end=end)

    def _all(self, prompts: Sequence[Prompt], answers: Sequence[str] | None = None, *, end: bool = False) -> list:
        whole = [list(range(len(prompts)))] if prompts else []
        found = {i: one for part in self.ask(prompts, whole, answers, end=end) for i, one in zip(*part, strict=True)}
        return [found[i] for i in range(len(prompts))]


def _qwen2_5_vl():
    from lever_lm.lvlm.qwen2_5_vl import Qwen2_5_VL

    return Qwen2_5_VL


def _qwen3_vl():
    from lever_lm.lvlm.qwen3_vl import Qwen3VL

    return Qwen3VL


def _generic():
    from lever_lm.lvlm.generic import Generic

    return Generic


# A name of lvlm.family → the class of it: (config, prompt, device, folder of image features, track, shards) → a Family.
FAMILIES: dict[str, Callable[[], type]] = {"qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl, "generic": _generic}


def load_local(
    config: LvlmConfig,
    prompt: PromptConfig,
    device: str = "auto",
    *,
    folder: Path | None = None,
    track: Track = untracked,
    shards: Shards = Shards(),
) -> Backend:
    """Return the backend of a model's directory or hub id, of the family that its config.json names. Image features go
    to `folder`, where it is given, and stay there for the next command. Raises LeverError where the model cannot be
    loaded."""
    from lever_lm.lvlm.local import LocalLvlm

    refuse_other_kinds(config.path)
    family = FAMILIES[family_of(config, fetch_model(config.path, "--lvlm, lvlm.path"))]()
    return LocalLvlm(family(config, prompt, device, folder, track, shards), config, prompt)
