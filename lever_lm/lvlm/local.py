"""A model of `transformers` in this process, of any family: prompts in batches that fit, decoding, fingerprints."""

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lever_lm.config.schema import LvlmConfig, PromptConfig, keys_of
from lever_lm.lvlm.decoding import NotFinite, Process
from lever_lm.lvlm.families import family_of
from lever_lm.lvlm.prompt import Prompt, wording
from lever_lm.lvlm.protocol import Answers, Backend, Batches, Parts, Prompts
from lever_lm.utils.device import resolve_device, use_device
from lever_lm.utils.errors import LeverError
from lever_lm.utils.fingerprint import CODE, fingerprint
from lever_lm.utils.hub import content_digests, model_folder
from lever_lm.utils.terminal import shown
from lever_lm.utils.transformers_compat import first_line, import_transformers, load_whole

_CHARS_PER_TOKEN = 3  # of English, a few less than there are: good enough to sort and to budget by


class Family(Protocol):
    """A loaded model and what is its family's own; one prompt's numbers do not depend on the rest of its batch.

    `vision` encodes images that are new (`see`, and `see_together` where a job shares them) and counts the `tokens` of
    an image that it has seen. shorter, leaner: what makes a prompt shorter, and what needs less memory; for messages.
    batch_tokens: tokens in a batch, at most, padding and the answers that are scored counted, unless lvlm.batch_tokens
    says so.
    """

    shorter: str
    leaner: str
    batch_tokens: int
    config: LvlmConfig
    model: torch.nn.Module
    processor: Any
    tokenizer: Any
    vision: Any
    device: torch.device
    dtype: torch.dtype

    def prepare(self, prompts: Sequence[Prompt], targets: Sequence[Sequence[int]] | None = None) -> Any:
        """Return what the model is given of prompts whose images have been seen, each with its target (token ids)
        behind it, if any. Runs in a thread of its own, while the model has the batch before."""

    def write(self, prepared: Any, eos: Tensor, process: Process | None) -> Tensor:
        """Return the tokens of the model's answers to prompts: (B, T) int64, at most lvlm.max_new_tokens, each up to
        one of `eos` (E,), by lvlm.num_beams beams. process: changes the scores of each step. Raises
        decoding.NotFinite."""

    def give_back(self) -> None:
        """Let go of memory that is kept for the next batch: it has run out, and the next batches are smaller."""

    def score(self, prepared: Any, counts: Sequence[int]) -> list[float]:
        """Return the log-prob of each target, of so many tokens, after its prompt."""


class LocalLvlm(Backend):
    """The `Backend` around a loaded model of a family. Raises LeverError where no token ends the model's answers."""

    def __init__(self, family: Family, config: LvlmConfig, prompt: PromptConfig):
        self.family, self.config, self.prompt = family, config, prompt
        self.eos = torch.tensor(_end_tokens(family, config), device=family.device)
        self._lead, self._closing = _answer_turn(family, self.eos.tolist())
        self._most = self._budget = config.batch_tokens or family.batch_tokens
        self._process = None
        if config.repetition_penalty != 1:
            penalty = float(config.repetition_penalty)
            self._process = import_transformers().RepetitionPenaltyLogitsProcessor(penalty)

    @torch.inference_mode()
    def ask(self, prompts: Prompts, batches: Batches, answers: Answers = None, *, end: bool = False) -> Parts:
        """See `Backend`. A batch that does not fit into memory is halved, and those after it are cut as small. Raises
        LeverError for a prompt too long for the model's context or the device's memory, and an answer without tokens.
        """
        targets = None if answers is None else self._tokens(answers)
        if targets is not None and not all(targets):
            raise LeverError(f"question {prompts[targets.index([])].query.question_id}: cannot score an empty answer")
        use_device(self.family.device)  # kernels of ours and graphs take the current one
        self.family.vision.see([image for prompt in prompts for image in prompt.images])
        lengths, todo, ahead = self._lengths(prompts, targets), deque(batches), deque()
        closing = [self._closing] if end else []
        with ThreadPoolExecutor(1, "prepare", use_device, (self.family.device,)) as thread:
            while todo or ahead:
                while todo and len(ahead) < 2:  # the one that is asked now, and the next
                    batch, *rest = self._cut({i: lengths[i] for i in todo.popleft()}, self._budget)
                    todo.extendleft(reversed(rest))
                    tails = targets and [[*targets[i], *closing] for i in batch]
                    ahead.append((batch, thread.submit(self._prepare, [prompts[i] for i in batch], tails)))
                batch, prepared = ahead.popleft()
                asked = [prompts[i] for i in batch]
                try:
                    if targets is None:
                        found = self._write(asked, prepared.result())
                    else:
                        found = self._score(asked, prepared.result(), [len(targets[i]) + end for i in batch])
                except torch.OutOfMemoryError as error:
                    self.family.give_back()
                    self._halve(asked, lengths[batch[0]], error)
                    wait(other for _, other in ahead)
                    todo.extendleft([*reversed([other for other, _ in ahead]), batch])
                    ahead.clear()
                    continue
                finally:
                    del prepared
                yield batch, found

    @torch.inference_mode()
    def _prepare(self, prompts: list[Prompt], targets: list[list[int]] | None) -> Any:
        return self.family.prepare(prompts, targets)

    def _write(self, asked: list[Prompt], prepared: Any) -> list[str]:
        try:
            tokens = self.family.write(prepared, self.eos, self._process)
        except NotFinite as error:
            raise self._broken(asked[error.places[0]], "logits") from error
        return self.family.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def _score(self, asked: list[Prompt], prepared: Any, counts: list[int]) -> list[float]:
        sums = self.family.score(prepared, counts)
        for prompt, value in zip(asked, sums, strict=True):
            if not math.isfinite(value):
                raise self._broken(prompt, "log-probs")
        return [round(value, 6) for value in sums]

    def _tokens(self, answers: Sequence[str]) -> list[list[int]]:
        texts = [answer and f"{self._lead}{answer}" for answer in answers]
        return self.family.tokenizer(texts, add_special_tokens=False).input_ids if texts else []

    # ------------------------------------------------------------------ batches

    def batches(self, prompts: Sequence[Prompt], answers: Sequence[str] | None = None) -> list[list[int]]:
        """See `Backend`: the longest prompts first. Encodes the images that are new, each process its share.

        How many go into a batch depends on its longest only. So what is left of a list after some whole batches were
        done is cut as before.
        """
        self.family.vision.see_together([image for prompt in prompts for image in prompt.images])
        targets = None if answers is None else self._tokens(answers)
        return self._cut(self._lengths(prompts, targets), self._most)

    def _cut(self, lengths: dict[int, int], budget: int) -> list[list[int]]:
        """Return the keys of `lengths` in batches, the longest first: what may not fit into memory fails at once."""
        order, batches = sorted(lengths, key=lambda i: (-lengths[i], i)), []
        while order:
            size = max(1, min(self.config.batch_size, budget // lengths[order[0]]))
            batches.append(order[:size])
            order = order[size:]
        return batches

    def _halve(self, asked: list[Prompt], longest: int, error: Exception) -> None:
        """Cut what is asked from now on to half of what did not fit into memory."""
        if len(asked) == 1:
            raise LeverError(
                f"question {asked[0].query.question_id}: its prompt of {len(asked[0].images)} images, about {longest} "
                f"tokens, does not fit into the memory of {self.family.device}: fewer --shots, or "
                f"{self.family.leaner} ({first_line(error)})"
            ) from error
        self._budget = len(asked) // 2 * longest

    def _lengths(self, prompts: Sequence[Prompt], targets: Sequence[list[int]] | None) -> dict[int, int]:
        return dict(enumerate(map(self._length, prompts, targets or [None] * len(prompts))))

    def _length(self, prompt: Prompt, target: list[int] | None) -> int:
        """Return about how many tokens a prompt has: those of images, of its target and the end of the turn counted,
        those of texts guessed."""
        examples, around = (*prompt.icds, prompt.query), len(self.prompt.template)
        text = len(self.prompt.system) + sum(around + len(e.question) + len(e.answer) for e in examples)
        length = sum(map(self.family.vision.tokens, prompt.images)) + text // _CHARS_PER_TOKEN
        return length if target is None else length + len(target) + 1

    def _broken(self, prompt: Prompt, what: str) -> LeverError:
        """Return the error for a prompt to which the model gives numbers that are not finite."""
        dtype, mend = self.family.dtype, "its weights may be broken (lvlm.path)"
        if dtype != torch.float32:
            wider = "float32 or bfloat16" if dtype == torch.float16 else "float32"
            mend = f"set lvlm.dtype={wider}, or {mend}"
        return LeverError(
            f"question {prompt.query.question_id}: {self.config.path} in {str(dtype).removeprefix('torch.')} "
            f"gives its prompt {what} that are NaN or infinite: {mend}"
        )


# ---------------------------------------------------------------------- loading


def load_model(config: LvlmConfig, folder: Path, device: torch.device, dtype: torch.dtype):
    """Return the model of `lvlm.path`, whose files are in a folder. Raises LeverError where it cannot be loaded."""
    attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    try:
        loader = import_transformers().AutoModelForImageTextToText
        model = load_whole(loader, str(folder), dtype, trust_remote_code=False, **attention)
    except Exception as error:  # the library can fail in any way on a directory that is not such a model
        raise LeverError(
            f"cannot load the LVLM {config.path}: {first_line(error)} (--lvlm, lvlm.path: a cached hub id or a "
            "directory of a vision-language model of transformers)"
        ) from error
    return model.to(device)


def _end_tokens(family: Family, config: LvlmConfig) -> list[int]:
    """Return the tokens that end an answer (lvlm.eos)."""
    of_model = config.eos == "model"
    eos = family.model.generation_config.eos_token_id if of_model else family.tokenizer.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    if not eos or not all(type(token) is int for token in eos):
        raise LeverError(
            f"cannot load the LVLM {config.path}: no token ends its answers, eos_token_id is {shown(eos)}; fetch "
            "generation_config.json and tokenizer_config.json again, or --set "
            f"lvlm.eos={'tokenizer' if of_model else 'model'}"
        )
    return eos


def _answer_turn(family: Family, eos: list[int]) -> tuple[str, int]:
    """Return what the chat template writes between its generation prompt and an answer (a blank, where turns begin with
    `Assistant: `), and the token that ends the turn: of `eos`, or the tokenizer's."""
    tokenizer, answer, asked = family.tokenizer, "yes", [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    try:
        render = partial(family.processor.apply_chat_template, tokenize=False)
        before, whole = render(asked, add_generation_prompt=True), render(answered)
    except Exception:  # a template is a program, and need not know turns of the assistant
        before = whole = ""
    lead, found, tail = whole.removeprefix(before).partition(answer)
    if not (found and whole.startswith(before)) or lead.strip():
        lead = tail = ""
    after = tokenizer(tail.lstrip(), add_special_tokens=False).input_ids[:1]
    ends = [token for token in (tokenizer.eos_token_id, *eos) if token is not None]
    return lead, after[0] if after and after[0] in ends else ends[0]


def check_context(family: Family, prompts: Sequence[Prompt], lengths: Sequence[int]) -> None:
    """Raise LeverError for a prompt of so many tokens that the model's context has no room for it and an answer."""
    most = getattr(family.model.config.get_text_config(), "max_position_embeddings", None)
    room = math.inf if most is None else most - family.config.max_new_tokens
    for prompt, length in zip(prompts, lengths, strict=True):
        if length > room:
            raise LeverError(
                f"question {prompt.query.question_id}: its prompt of {len(prompt.images)} images has {length} tokens, "
                f"the context of {family.config.path} has room for {room}: fewer --shots, or {family.shorter}"
            )


def dtype_of(config: LvlmConfig, device: torch.device) -> torch.dtype:
    """Return the precision of the weights (lvlm.dtype) on a device."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.dtype)


# ---------------------------------------------------------------------- fingerprints


def local_fingerprint(config: LvlmConfig, prompt: PromptConfig, device: str) -> str:
    """Return a fingerprint of everything an answer depends on but the question: weights, precision, decoding, image
    budget, prompt style. Needs no model loaded."""
    left_out = {"path", "dtype", "family", *(key[-1] for key in keys_of("speed") if key[0] == "lvlm")}
    settings = {name: value for name, value in vars(config).items() if name not in left_out}
    if family_of(config, model_folder(config.path)) == "generic":
        settings["family"] = "generic"
    else:  # it takes no options, and of before there were any families all answers are of a fast path
        del settings["processor"]
    precision = str(dtype_of(config, resolve_device(device)))
    return fingerprint(CODE["answers"], CODE["vision"], _weights(config.path), settings, precision, wording(prompt))


def vision_fingerprint(config: LvlmConfig, device: str) -> str:
    """Return a fingerprint of everything an image's features depend on but the image: weights, precision, image
    budget."""
    precision = str(dtype_of(config, resolve_device(device)))
    return fingerprint(CODE["vision"], _weights(config.path), config.min_pixels, config.max_pixels, precision)


def _weights(path: str) -> list | str:
    folder = model_folder(path)
    files = sorted(f for kind in ("safetensors", "json", "jinja") for f in folder.glob(f"*.{kind}")) if folder else []
    return [list(pair) for pair in zip([file.name for file in files], content_digests(files), strict=True)] or path
