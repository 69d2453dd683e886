"""The frozen vision-language model: prompts in, answers and log-probs out, nothing asked twice."""

from pathlib import Path

from lever_lm.config import LvlmConfig, PromptConfig
from lever_lm.hub import fetch_model
from lever_lm.lvlm.cache import AnswerCache, CachedLvlm, Track
from lever_lm.lvlm.prompt import Prompt, build_prompt, cut_answer

__all__ = ["CachedLvlm", "Prompt", "build_prompt", "cut_answer", "load_lvlm"]


def load_lvlm(config: LvlmConfig, prompt: PromptConfig, *, device: str, cache: Path, track: Track) -> CachedLvlm:
    """The LVLM of a config behind the answer cache at `cache`."""
    from lever_lm.lvlm.local import LocalLvlm, local_fingerprint

    fetch_model(config.path, "--lvlm, lvlm.path")
    fingerprint = local_fingerprint(config, prompt, device)
    return CachedLvlm(lambda: LocalLvlm(config, prompt, device), fingerprint, AnswerCache(cache), track)
