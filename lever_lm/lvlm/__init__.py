"""The frozen vision-language model: prompts in, answers and log-probs out, nothing asked twice."""

from collections.abc import Callable
from pathlib import Path

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.lvlm.answer_cache import AnswerCache, CachedLvlm, Track
from lever_lm.lvlm.prompt import Prompt, build_prompt, cut_answer
from lever_lm.utils.distributed import Shards
from lever_lm.utils.file_hashes import DIGESTS
from lever_lm.utils.hub import fetch_model
from lever_lm.utils.progress import unsaid

__all__ = ["CachedLvlm", "Prompt", "build_prompt", "cut_answer", "load_lvlm"]


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
    """The LVLM of a config behind the answer cache at `cache`. Of several processes, each calls this. say: is told of a
    server that is waited for."""
    if config.server:
        from lever_lm.lvlm.openai_server import ServerLvlm, server_fingerprint

        fingerprint = server_fingerprint(config, prompt)
        model = server_fingerprint(config, PromptConfig())
        return CachedLvlm(
            lambda: ServerLvlm(config, prompt, say), fingerprint, AnswerCache(cache, shards), track, model, prompt.cut
        )

    from lever_lm.lvlm.qwen2_5_vl import LocalLvlm, local_fingerprint, vision_fingerprint

    with shards.leader_first(), DIGESTS.kept(shards, track):
        fetch_model(config.path, "--lvlm, lvlm.path")
        fingerprint = local_fingerprint(config, prompt, device)
    bank = cache.with_name(f"{cache.stem.replace('answers', 'vision', 1)}_{vision_fingerprint(config, device)}")
    return CachedLvlm(
        lambda: LocalLvlm(config, prompt, device, bank=bank, track=track, shards=shards),
        fingerprint,
        AnswerCache(cache, shards),
        track,
        local_fingerprint(config, PromptConfig(), device),
        prompt.cut,
    )
