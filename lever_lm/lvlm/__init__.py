"""The frozen vision-language model: prompts in, answers and log-probs out, nothing asked twice."""

from pathlib import Path

from lever_lm.config import LvlmConfig, PromptConfig, asset_path
from lever_lm.errors import LeverError
from lever_lm.lvlm.cache import AnswerCache, CachedLvlm, Track
from lever_lm.lvlm.prompt import Prompt, build_prompt, cut_answer

__all__ = ["CachedLvlm", "Prompt", "build_prompt", "cut_answer", "load_lvlm"]


def load_lvlm(config: LvlmConfig, prompt: PromptConfig, *, device: str, cache: Path, track: Track) -> CachedLvlm:
    """The LVLM of a config behind the answer cache at `cache`."""
    from lever_lm.lvlm.local import LocalLvlm, local_fingerprint

    if config.path.startswith(("asset:", "/", ".", "~")) and not asset_path(config.path).is_dir():
        raise LeverError(f"no directory {config.path} for the LVLM (--lvlm, lvlm.path)")
    fingerprint = local_fingerprint(config, prompt, device)
    return CachedLvlm(lambda: LocalLvlm(config, prompt, device), fingerprint, AnswerCache(cache), track)
