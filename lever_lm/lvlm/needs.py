"""What a model needs of the machine and of the config before it is loaded: memory, and room for the answers."""

from collections.abc import Sequence
from pathlib import Path

from lever_lm.config import LvlmConfig
from lever_lm.hub import parameter_count

GIB = 1 << 30
_ACTIVATIONS = 2 * GIB  # beside the weights, in the smallest batches of 16-bit numbers


def memory_needed(config: LvlmConfig, folder: Path, *, on_gpu: bool) -> dict[str, float]:
    """Return the bytes that the model in a folder takes of the device at the least, by what they hold: its weights in
    `lvlm.dtype` (auto is bfloat16 on a GPU, float32 on a CPU), the smallest batches beside them, and the image features
    where `lvlm.bank_memory` sets their bound. Where it sets none they take of what is left."""
    width = 2 if config.dtype in ("bfloat16", "float16") or (config.dtype == "auto" and on_gpu) else 4
    needed = {"weights": parameter_count(folder) * width}
    if needed["weights"] > GIB:  # a model of a few megabytes needs no more than a few
        needed["the smallest batches"] = _ACTIVATIONS * width // 2
    if config.bank_memory:
        needed["image features (lvlm.bank_memory)"] = config.bank_memory * GIB
    return needed


def beyond_reach(tokenizer, answers: Sequence[str], most: int) -> tuple[int, int]:
    """Return how many of the answers are longer than `most` tokens, and the tokens of the longest. An answer that
    stands there twice counts twice."""
    distinct = list(dict.fromkeys(answers))
    lengths = dict(zip(distinct, map(len, tokenizer(distinct, add_special_tokens=False).input_ids), strict=True))
    return sum(lengths[answer] > most for answer in answers), max(lengths.values())
