"""Checks of the LVLM before it is used: its files and processor, its server, the device's memory, answer lengths."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.lvlm.families import family_of, refuse_other_kinds
from lever_lm.lvlm.openai_client import NO_LOG_PROBS, ServerError
from lever_lm.lvlm.openai_servers import check_server, scores_prompts
from lever_lm.lvlm.processor import processor_of
from lever_lm.utils.checks import GIB, Check, check_model
from lever_lm.utils.device import resolve_device
from lever_lm.utils.errors import LeverError, MendableError
from lever_lm.utils.hub import model_folder, parameter_count

_ACTIVATIONS = 2 * GIB  # beside the weights, in the smallest batches of 16-bit numbers


def check_lvlm(
    config: LvlmConfig, prompt: PromptConfig, *, scored: bool, wait: float, say: Callable[[str], None]
) -> Iterator[Check]:
    """Check the LVLM of a config, in this process or on servers.

    scored: reference answers are to be scored, too. wait: seconds to give a server that is still starting; `say` is
    told when it is waited for.
    """
    for url in config.servers:
        yield from _server(replace(config, server=url), scored, wait, say)
    if config.server:
        return
    try:
        refuse_other_kinds(config.path)
        check = check_model("lvlm.path", config.path)
        if check.status == "ok":
            processor_of(config, prompt, model_folder(config.path))
    except MendableError as error:
        check = Check("lvlm.path", "missing", error.found, error.mend)
    yield check


def _server(config: LvlmConfig, scored: bool, wait: float, say: Callable[[str], None]) -> Iterator[Check]:
    try:
        served = check_server(config, say, wait=wait)
    except ServerError as error:
        yield Check("lvlm.server", "missing", error.found, error.mend)
        return
    mended = ""
    if served.url != config.server:
        mended = f", where {config.server} has no list of models"
        say(f"server: {served.url} is asked{mended}")
    status, does, mend = "ok", f"serves {config.path}", ""
    if not served.card:
        status, does = "warning", "is there and does not say what it serves"
        mend = f"the first question will tell whether it knows {config.path}"
    yield Check("lvlm.server", status, f"{served.url} {does}{mended}", mend)
    if scored and served.card.get("owned_by") != "vllm":
        can = scores_prompts(config, served.url)
        if can is False:
            yield Check("log-probs", "missing", f"reference answers are to be scored by {config.server}", NO_LOG_PROBS)
        elif can is None:
            found = f"reference answers are to be scored, and {config.server} does not say that it is vLLM, which can"
            mend = "rollout.gt_prob=false and rollout.infoscore=0, unless it can too"
            yield Check("log-probs", "warning", found, mend)


def check_answer_lengths(config: LvlmConfig, prompt: PromptConfig, answers: Sequence[str]) -> Iterator[Check]:
    """Warn of reference answers (each annotator's counted) that are longer in the model's own tokens than what it may
    write. Without its tokenizer nothing is checked."""
    folder = model_folder(config.path)
    if folder is None or not answers:
        return
    try:
        tokenizer = processor_of(config, prompt, folder).tokenizer
    except LeverError:  # a check of its own where the model runs here
        return
    counts = Counter(answers)
    lengths = [len(ids) for ids in tokenizer(list(counts), add_special_tokens=False).input_ids]
    if longer := sum(n for n, length in zip(counts.values(), lengths, strict=True) if length > config.max_new_tokens):
        share = f"{longer / len(answers):.1%}, {longer} of {len(answers)}, each annotator's counted"
        found = f"reference answers of both splits that are longer than lvlm.max_new_tokens, {config.max_new_tokens}"
        mend = f"--set lvlm.max_new_tokens={max(lengths)} for all"
        yield Check("answer lengths", "warning", f"{found}: {share}", mend)


def check_device(name: str, lvlm: LvlmConfig | None) -> Iterator[Check]:
    """Check that a device is there and that the LVLM, where one is to run on it, fits into its memory."""
    try:
        device = resolve_device(name)
    except LeverError as error:
        yield Check("device", "missing", str(error), "--device cpu, or a machine with a GPU")
        return
    on_gpu, folder = device.type == "cuda", None if lvlm is None else model_folder(lvlm.path)
    parts = memory_needed(lvlm, folder, on_gpu=on_gpu) if folder else {}
    if not on_gpu:
        yield Check("device", "ok", f"{device}, {os.cpu_count()} cores")
        if sum(parts.values()) > GIB:
            found = f"no GPU for an LVLM of {parts['weights'] / GIB:.0f} GiB: days"
            yield Check("device", "warning", found, "use a GPU")
        return
    import torch

    needed, (free, total) = sum(parts.values()), torch.cuda.mem_get_info(device)
    memory = f"{torch.cuda.get_device_name(device)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
    listed = ", ".join(f"{what} {size / GIB:.1f}" for what, size in parts.items())
    about = f"{memory}, about {needed / GIB:.1f} needed{f' at the least: {listed}' if parts else ''}"
    status, mend = "ok", ""
    if needed > total:
        status, mend = "missing", "a larger GPU, or a smaller LVLM: --lvlm qwen2.5_vl_3B"
    elif needed > free:
        status, mend = "warning", "end other jobs on it (nvidia-smi), or CUDA_VISIBLE_DEVICES"
    yield Check("GPU memory", status, about, mend)


def memory_needed(config: LvlmConfig, folder: Path, *, on_gpu: bool) -> dict[str, float]:
    """Return the bytes that the model in a folder takes of the device at the least, by what they hold: its weights in
    `lvlm.dtype` (auto is bfloat16 on a GPU, float32 on a CPU), the smallest batches beside them, and, on a fast path,
    the image features where `lvlm.bank_memory` sets their bound. Where it sets none they take of what is left."""
    width = 2 if config.dtype in ("bfloat16", "float16") or (config.dtype == "auto" and on_gpu) else 4
    needed = {"weights": parameter_count(folder) * width}
    if needed["weights"] > GIB:  # a model of a few megabytes needs no more than a few
        needed["the smallest batches"] = _ACTIVATIONS * width // 2
    if config.bank_memory and family_of(config, folder) != "generic":
        needed["image features (lvlm.bank_memory)"] = config.bank_memory * GIB
    return needed
