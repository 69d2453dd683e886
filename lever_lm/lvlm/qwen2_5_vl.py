"""Qwen2.5-VL in this process: every distinct image through the vision tower once, prompts in batches.

B prompts, L prompt length, H hidden. What is the library's stays the library's: tokenizer, chat template, image
processor, vision tower, rotary positions, language model, cache. Ours is only what is shared between prompts.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lever_lm.config.schema import LvlmConfig, PromptConfig, keys_of
from lever_lm.lvlm.answer_cache import Track
from lever_lm.lvlm.decoding import NotFinite, Prefilled, beam_search, greedy
from lever_lm.lvlm.processor import load_processor
from lever_lm.lvlm.prompt import Prompt, cut_answer, holder, to_messages, wording
from lever_lm.lvlm.qwen_kernels import compile_parts, float32_logits, repeatable_attention, speed_up_vision
from lever_lm.lvlm.qwen_vision import Vision
from lever_lm.utils.device import resolve_device
from lever_lm.utils.distributed import Shards
from lever_lm.utils.errors import LeverError
from lever_lm.utils.fingerprint import CODE, fingerprint
from lever_lm.utils.hub import content_digests, fetch_model, model_folder
from lever_lm.utils.progress import untracked
from lever_lm.utils.terminal import shown
from lever_lm.utils.transformers_compat import first_line, import_transformers, load_whole

_CHARS_PER_TOKEN = 3  # of English, a few less than there are: good enough to sort and to budget by

_SCORED = 512  # tokens of answers that go through the vocabulary-wide head at once: 1 GiB of a vocabulary of 150,000


class LocalLvlm:
    """A Qwen2.5-VL directory or hub id. Image features go to `bank` and stay for the next command where it is given.
    Raises LeverError when the model cannot be loaded."""

    def __init__(
        self,
        config: LvlmConfig,
        prompt: PromptConfig,
        device: str = "auto",
        *,
        bank: Path | None = None,
        track: Track = untracked,
        shards: Shards = Shards(),
    ):
        transformers = import_transformers()
        self.config, self.prompt, self.device = config, prompt, resolve_device(device)
        where = fetch_model(config.path, "--lvlm, lvlm.path")
        self.processor = load_processor(config.path, where)
        self.dtype = _dtype(config.dtype, self.device)
        attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
        try:
            model = load_whole(transformers.Qwen2_5_VLForConditionalGeneration, str(where), self.dtype, **attention)
        except Exception as error:  # a directory of anybody's making: the library can fail on it in any way
            raise LeverError(
                f"cannot load the LVLM {config.path}: {first_line(error)} (--lvlm, lvlm.path: a cached hub id or a "
                "directory of a Qwen2.5-VL)"
            ) from error
        self.model = model.to(self.device)
        if self.device.type == "cuda" and self.dtype != torch.float32 and config.attention == "auto":
            speed_up_vision(self.model.model.visual)
        if config.compile and self.device.type == "cuda":
            compile_parts(self.model)
        self.tokenizer, image_processor = self.processor.tokenizer, self.processor.image_processor
        image_processor.size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
        eos = model.generation_config.eos_token_id if config.eos == "model" else self.tokenizer.eos_token_id
        eos = eos if isinstance(eos, list) else [eos]
        if not eos or not all(type(token) is int for token in eos):
            other = {"model": "tokenizer", "tokenizer": "model"}[config.eos]
            raise LeverError(
                f"cannot load the LVLM {config.path}: no token ends its answers, eos_token_id is {shown(eos)}; fetch "
                f"generation_config.json and tokenizer_config.json again, or --set lvlm.eos={other}"
            )
        self.eos = torch.tensor(eos, device=self.device)
        pad = model.generation_config.pad_token_id
        self.pad = self.tokenizer.pad_token_id if pad is None else pad
        self.image_token = "<|image_pad|>"
        self.image_token_id = model.config.image_token_id
        self.vision = Vision(self.model, image_processor, config, bank, track, shards)
        self._budget = config.batch_tokens
        self._process = None
        if config.repetition_penalty != 1:
            self._process = transformers.RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty))

    # ------------------------------------------------------------------ answering

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """The answer to each prompt, cut as in prompt.cut_answer. Order in, order out."""
        return [cut_answer(text, self.prompt.cut) for text in self.generate(prompts)]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """What the model writes after each prompt, uncut. Raises LeverError for a prompt that does not fit the model's
        context or the device's memory."""

        def write(batch: list[Prompt]) -> list[str]:
            prefilled = self._prefill(batch)
            try:
                if self.config.num_beams == 1:
                    tokens = greedy(prefilled, self.config.max_new_tokens, self.eos, self.pad, self._process)
                else:
                    decoding = (self.config.num_beams, self.config.max_new_tokens, self.eos, self.pad)
                    tokens = beam_search(prefilled, *decoding, self.config.length_penalty, self._process)
            except NotFinite as error:
                raise self._broken(batch[error.places[0]], "logits") from error
            return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

        return self._in_batches(prompts, None, list(prompts), write)

    @torch.inference_mode()
    def answer_log_prob(self, prompts: Sequence[Prompt], answers: Sequence[str], *, end: bool = False) -> list[float]:
        """log P(answer | prompt), rounded to 6 decimals: the sum over the answer's tokens, and with `end` also that of
        the token that ends the turn after them. Raises LeverError for an answer without tokens, and as `generate`."""
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers")
        targets = self._tokens(answers)
        for prompt, target in zip(prompts, targets, strict=True):
            if not target:
                raise LeverError(f"question {prompt.query.question_id}: cannot score an empty answer")
        closing = [self.tokenizer.eos_token_id] if end else []
        pairs = [(prompt, [*target, *closing]) for prompt, target in zip(prompts, targets, strict=True)]
        return self._in_batches(prompts, answers, pairs, self._score)

    def _tokens(self, answers: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(answers), add_special_tokens=False).input_ids if answers else []

    # ------------------------------------------------------------------ batches

    def batches(self, prompts: Sequence[Prompt], answers: Sequence[str] | None = None) -> list[list[int]]:
        """Indices of the prompts, or of the prompts with the answers that are scored after them, in batches, the
        longest first: a function of the work list alone. Encodes the images that are new, each process its share: all
        processes of a job call it together.

        How many go into a batch hangs on its longest only. So what is left of a list after some whole batches were done
        is cut as before.
        """
        self.vision.see_together([image for prompt in prompts for image in prompt.images])
        lengths = self._lengths(prompts, answers)
        order, cut = _longest_first(lengths), []
        while order:
            size = self._fitting(lengths[order[0]], self.config.batch_tokens)
            cut.append(order[:size])
            order = order[size:]
        return cut

    def _in_batches(self, prompts: Sequence[Prompt], answers: Sequence[str] | None, items: list, ask: Callable) -> list:
        """ask(batch) of all items, in the batches of their prompts and answers. Order in, order out. A batch that does
        not fit into memory is halved, and those after it are cut as small."""
        self.vision.see([image for prompt in prompts for image in prompt.images])
        lengths = self._lengths(prompts, answers)
        order, results = _longest_first(lengths), [None] * len(prompts)
        while order:
            longest = lengths[order[0]]
            batch = order[: self._fitting(longest, self._budget)]
            try:
                done = ask([items[i] for i in batch])
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    prompt = prompts[batch[0]]
                    raise LeverError(
                        f"question {prompt.query.question_id}: its prompt of {len(prompt.images)} images, about "
                        f"{longest} tokens, does not fit into the memory of {self.device}: fewer --shots, or a smaller "
                        f"lvlm.max_pixels or lvlm.bank_memory ({first_line(error)})"
                    ) from error
                self._budget = len(batch) // 2 * longest
                continue
            for i, result in zip(batch, done, strict=True):
                results[i] = result
            order = order[len(batch) :]
        return results

    def _lengths(self, prompts: Sequence[Prompt], answers: Sequence[str] | None) -> list[int]:
        """Tokens of each prompt, about; of its answer and the end of the turn exactly, where there is one to score."""
        lengths = list(map(self._length, prompts))
        if answers is None:
            return lengths
        return [length + len(target) + 1 for length, target in zip(lengths, self._tokens(answers), strict=True)]

    def _fitting(self, length: int, budget: int) -> int:
        """How many prompts of a length go into one batch."""
        return max(1, min(self.config.batch_size, budget // length))

    def _length(self, prompt: Prompt) -> int:
        """Tokens of a prompt, about: those of images counted, those of texts guessed."""
        examples, around = (*prompt.icds, prompt.query), len(self.prompt.template)
        text = len(self.prompt.system) + sum(around + len(e.question) + len(e.answer) for e in examples)
        return sum(map(self.vision.tokens, prompt.images)) + text // _CHARS_PER_TOKEN

    # ------------------------------------------------------------------ one batch

    def _token_ids(self, prompt: Prompt) -> list[int]:
        """The prompt in the model's own chat template, as many image tokens as its images have features."""
        text = self.processor.apply_chat_template(
            to_messages(prompt, self.prompt), tokenize=False, add_generation_prompt=True
        )
        short = self.tokenizer(text, add_special_tokens=False).input_ids
        if short.count(self.image_token_id) != len(prompt.images):
            raise LeverError(
                f"{holder(prompt, self.image_token)}: {self.image_token} must not stand there; "
                f"its prompt has {short.count(self.image_token_id)} image placeholders for {len(prompt.images)} images"
            )
        counts = iter(map(self.vision.tokens, prompt.images))
        ids: list[int] = []
        for token in short:
            ids += [token] * (next(counts) if token == self.image_token_id else 1)
        return ids

    def _inputs(self, prompts: Sequence[Prompt], targets: Sequence[Sequence[int]]):
        """Prompts, each followed by its target, padded on the right: ids and mask (B, L), lengths (B,), embeddings
        (B, L, H), positions (3, B, L)."""
        rows = [[*self._token_ids(prompt), *target] for prompt, target in zip(prompts, targets, strict=True)]
        self._check_context(prompts, rows)
        images = [image for prompt in prompts for image in prompt.images]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), self.pad)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        is_image = (ids == self.image_token_id) & mask
        positions, _ = self.model.model.get_rope_index(  # on the CPU, while the GPU has the batch before
            ids,
            mm_token_type_ids=is_image.int(),
            image_grid_thw=torch.tensor([self.vision.bank.grid(image) for image in images]),
            attention_mask=mask.long(),
        )
        features = torch.cat(self.vision.features(images))
        if int(is_image.sum()) != len(features):
            raise LeverError(f"{int(is_image.sum())} image tokens for {len(features)} image features in one batch")
        ids, mask, lengths, is_image, positions = (
            tensor.to(self.device) for tensor in (ids, mask.long(), lengths, is_image, positions)
        )
        embeddings = self.model.get_input_embeddings()(ids)
        embeddings = embeddings.masked_scatter(is_image[..., None], features.to(embeddings.dtype))
        return ids, mask, lengths, embeddings, positions

    def _check_context(self, prompts: Sequence[Prompt], rows: list[list[int]]) -> None:
        most = self.model.config.text_config.max_position_embeddings - self.config.max_new_tokens
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > most:
                raise LeverError(
                    f"question {prompt.query.question_id}: its prompt of {len(prompt.images)} images has {len(row)} "
                    f"tokens, the context of {self.config.path} has room for {most}: fewer --shots, or a smaller "
                    "lvlm.max_pixels"
                )

    def _prefill(self, prompts: Sequence[Prompt]) -> Prefilled:
        """Run the prompts through the language model. Padding stands on the right, where no token of a prompt looks:
        attention needs no mask but the causal one, and so takes its fast kernel."""
        ids, mask, lengths, embeddings, positions = self._inputs(prompts, [()] * len(prompts))
        decoder, head = self.model.model.language_model, self.model.lm_head
        out = decoder(inputs_embeds=embeddings, position_ids=positions, use_cache=True)
        cache = out.past_key_values

        def step(tokens: Tensor, position: Tensor, mask: Tensor) -> Tensor:
            with repeatable_attention():
                out = decoder(
                    inputs_embeds=self.model.get_input_embeddings()(tokens),
                    attention_mask=mask,
                    position_ids=position.expand(3, -1, -1),
                    past_key_values=cache,
                    use_cache=True,
                )
            return float32_logits(head, out.last_hidden_state[:, -1])

        last = out.last_hidden_state[torch.arange(len(prompts), device=self.device), lengths - 1]
        following = positions.masked_fill(mask == 0, 0).amax((0, 2)) + 1
        return Prefilled(float32_logits(head, last), cache, mask, following, step, ids.where(mask == 1, ids[:, :1]))

    def _score(self, pairs: list[tuple[Prompt, list[int]]]) -> list[float]:
        """Log-prob of each target after its prompt."""
        targets = [target for _, target in pairs]
        ids, _, lengths, embeddings, positions = self._inputs([prompt for prompt, _ in pairs], targets)
        decoder = self.model.model.language_model
        hidden = decoder(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state
        # Only the places before the answers' tokens go through the vocabulary-wide head, some at a time.
        counts = [len(target) for target in targets]
        place = torch.arange(ids.shape[1], device=self.device)
        ends = lengths[:, None]
        rows, places = (
            ((place < ends) & (place >= ends - torch.tensor(counts, device=self.device)[:, None])).nonzero().T
        )
        before, wanted = hidden[rows, places - 1].split(_SCORED), ids[rows, places].split(_SCORED)
        head, loss = self.model.lm_head, torch.nn.functional.cross_entropy
        of_tokens = [-loss(float32_logits(head, h), w, reduction="none") for h, w in zip(before, wanted, strict=True)]
        sums = [float(part.sum()) for part in torch.cat(of_tokens).cpu().split(counts)]
        for (prompt, _), value in zip(pairs, sums, strict=True):
            if not math.isfinite(value):
                raise self._broken(prompt, "log-probs")
        return [round(value, 6) for value in sums]

    def _broken(self, prompt: Prompt, what: str) -> LeverError:
        """What to say where the model gives a prompt numbers that are not finite."""
        mend = "its weights may be broken (lvlm.path)"
        if self.dtype != torch.float32:
            wider = "float32 or bfloat16" if self.dtype == torch.float16 else "float32"
            mend = f"set lvlm.dtype={wider}, or {mend}"
        return LeverError(
            f"question {prompt.query.question_id}: {self.config.path} in {str(self.dtype).removeprefix('torch.')} "
            f"gives its prompt {what} that are NaN or infinite: {mend}"
        )


def _longest_first(lengths: list[int]) -> list[int]:
    """The order of prompts by their lengths: what may not fit into memory fails at once."""
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def local_fingerprint(config: LvlmConfig, prompt: PromptConfig, device: str) -> str:
    """Changes with everything an answer depends on but the question: weights, precision, decoding, image budget,
    prompt style. Needs no model loaded."""
    left_out = {"path", "dtype", *(key[-1] for key in keys_of("speed") if key[0] == "lvlm")}
    settings = {name: value for name, value in vars(config).items() if name not in left_out}
    precision = str(_dtype(config.dtype, resolve_device(device)))
    return fingerprint(CODE["answers"], CODE["vision"], _weights(config.path), settings, precision, wording(prompt))


def vision_fingerprint(config: LvlmConfig, device: str) -> str:
    """Changes with everything an image's features depend on but the image: weights, precision, image budget."""
    limits = (config.min_pixels, config.max_pixels)
    precision = str(_dtype(config.dtype, resolve_device(device)))
    return fingerprint(CODE["vision"], _weights(config.path), *limits, precision)


def _weights(path: str) -> list | str:
    folder = model_folder(path)
    files = sorted(f for kind in ("safetensors", "json", "jinja") for f in folder.glob(f"*.{kind}")) if folder else []
    return [list(pair) for pair in zip([file.name for file in files], content_digests(files), strict=True)] or path
