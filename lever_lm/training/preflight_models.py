"""Checks of models and servers before they are used: their files, their processor, what a server lists, lengths."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lever_lm.config.schema import Config, LvlmConfig
from lever_lm.lvlm.openai_client import ServerError
from lever_lm.lvlm.openai_servers import check_server
from lever_lm.lvlm.processor import load_processor
from lever_lm.utils.errors import LeverError, MendableError
from lever_lm.utils.hub import is_hub_id, lacking, model_folder, parameter_count, weight_files

GIB = 1 << 30
_ACTIVATIONS = 2 * GIB  # beside the weights, in the smallest batches of 16-bit numbers


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. status: ok, missing, or warning; `fetched`: missing here, but a command that may
    use the network gets it itself."""

    what: str
    status: str
    found: str
    mend: str = ""
    fetched: bool = False

    def line(self) -> str:
        """For the terminal."""
        return f"{self.status:>7}  {self.what}: {self.found}{f' → {self.mend}' if self.mend else ''}"


def model(option: str, path: str) -> Check:
    """A model's directory or hub id: its config, all weights and the files of its processor are there."""
    found = model_folder(path)
    missing = lacking(found) if found else []
    if found and not missing:
        size = sum(file.stat().st_size for file in weight_files(found))
        return Check(option, "ok", f"{path}, {size / GIB:.2f} GiB")
    if is_hub_id(path):
        lacks = f"lacks {', '.join(missing)} in" if missing else "is not in"
        mend = f"hf download {path}, or --set {option}=DIR"
        return Check(option, "missing", f"{path} {lacks} the hub's cache", mend, fetched=True)
    other = f"--set {option}=DIR or OWNER/NAME"
    if missing:
        return Check(option, "missing", f"{path} lacks {', '.join(missing)}", f"fetch these files again, or {other}")
    return Check(option, "missing", f"{path} is no directory and no hub id OWNER/NAME", other)


def lvlm(path: str) -> Check:
    """The LVLM that runs in this process: its files are there, and its processor can be used."""
    check = model("lvlm.path", path)
    if check.status == "ok":
        try:
            load_processor(path, model_folder(path))
        except MendableError as error:
            return Check("lvlm.path", "missing", error.found, error.mend)
    return check


def server(config: Config, wait: float, say: Callable[[str], None]) -> Iterable[Check]:
    """Whether every server of the config is there and answers as the LVLM, and, as far as it says who it is, scores
    what is to be."""
    for url in config.lvlm.servers:
        try:
            served = check_server(replace(config.lvlm, server=url), say, wait=wait)
        except ServerError as error:
            yield Check("lvlm.server", "missing", error.found, error.mend)
            continue
        mended = ""
        if served.url != url:
            mended = f", where {url} has no list of models"
            say(f"server: {served.url} is asked{mended}")
        if served.card:
            yield Check("lvlm.server", "ok", f"{served.url} serves {config.lvlm.path}{mended}")
        else:
            found = f"{served.url} is there and does not say what it serves{mended}"
            mend = f"the first question will tell whether it knows {config.lvlm.path}"
            yield Check("lvlm.server", "warning", found, mend)
        if (config.rollout.gt_prob or config.rollout.infoscore) and served.card.get("owned_by") != "vllm":
            found = f"reference answers are to be scored, and {url} does not say that it is vLLM, which can"
            mend = "rollout.gt_prob=false and rollout.infoscore=0, unless it can too"
            yield Check("log-probs", "warning", found, mend)


def answer_lengths(config: LvlmConfig, answers: Sequence[str]) -> Iterable[Check]:
    """A warning with the share of the reference answers, each annotator's counted, that are longer in the model's own
    tokens than what it may write; none where its tokenizer is not here."""
    folder = model_folder(config.path)
    if folder is None or not answers:
        return
    try:
        tokenizer = load_processor(config.path, folder).tokenizer
    except LeverError:  # a check of its own where the model runs here
        return
    distinct = list(dict.fromkeys(answers))
    lengths = dict(zip(distinct, map(len, tokenizer(distinct, add_special_tokens=False).input_ids), strict=True))
    if longer := sum(lengths[answer] > config.max_new_tokens for answer in answers):
        share = f"{longer / len(answers):.1%}, {longer} of {len(answers)}, each annotator's counted"
        found = f"reference answers of both splits that are longer than lvlm.max_new_tokens, {config.max_new_tokens}"
        mend = f"--set lvlm.max_new_tokens={max(lengths.values())} for all"
        yield Check("answer lengths", "warning", f"{found}: {share}", mend)


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
