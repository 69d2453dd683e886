"""The frozen vision-language model: prompts in, answers and log-probs out, nothing asked twice."""

from collections.abc import Callable, Sequence
from pathlib import Path

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.lvlm.answer_cache import AnswerCache
from lever_lm.lvlm.backend import load_local
from lever_lm.lvlm.cached import CachedLvlm
from lever_lm.lvlm.images import check_pixel_budget
from lever_lm.lvlm.prompt import Prompt, build_prompt, cut_answer
from lever_lm.utils.distributed import Shards
from lever_lm.utils.hub import fetch_model
from lever_lm.utils.progress import Track, unsaid

__all__ = ["CachedLvlm", "Prompt", "build_prompt", "check_pixel_budget", "cut_answer", "load_lvlm"]


def load_lvlm(
    config: LvlmConfig,
    prompt: PromptConfig,
    *,
    device: str,
    cache: Path,
    track: Track,
    shards: Shards = Shards(),
    say: Callable[[str], None] = unsaid,
) -> CachedLvlm:
    """Return the LVLM of a config behind the answer cache at `cache`; every process of a job calls this. `say` is told
    of a server that is waited for."""
    if config.server:
        from lever_lm.lvlm.openai_server import ServerLvlm, server_fingerprint

        fingerprints = [server_fingerprint(config, style) for style in (prompt, PromptConfig())]

        def load(prompts: Sequence[Prompt]):
            return ServerLvlm(config, prompt, say)

    else:
        from lever_lm.lvlm.local import local_fingerprint, vision_fingerprint

        with shards.leader_first():
            fetch_model(config.path, "--lvlm, lvlm.path")
            fingerprints = [local_fingerprint(config, style, device) for style in (prompt, PromptConfig())]
        stem = cache.stem.replace("answers", "vision", 1)
        folder = cache.with_name(f"{stem}_{vision_fingerprint(config, device)}")

        def load(prompts: Sequence[Prompt]):
            ahead = [image for prompt in prompts for image in prompt.images]
            return load_local(config, prompt, device, folder=folder, track=track, shards=shards, ahead=ahead)

    fingerprint, model = fingerprints
    return CachedLvlm(load, fingerprint, AnswerCache(cache, shards), track, model, prompt.cut)
