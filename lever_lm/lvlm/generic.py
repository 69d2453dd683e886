"""Any image-text-to-text model of `transformers` whose chat template takes several images: the library's own pixels,
`generate` and forward, in batches.

B prompts, L the longest one, N beams, V vocabulary. Nothing is encoded beforehand: an image goes through the vision
tower with every prompt that shows it, and a prompt's prefill is repeated for each beam.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.data import Image, image_size, open_image
from lever_lm.lvlm.decoding import NotFinite, Process, float32_logits
from lever_lm.lvlm.families import OTHER
from lever_lm.lvlm.generic_processor import PROBE, blank, load_generic_processor, processed, rendered, without_images
from lever_lm.lvlm.local import check_context, dtype_of, load_model
from lever_lm.lvlm.prompt import Prompt, holder
from lever_lm.utils.device import resolve_device
from lever_lm.utils.errors import LeverError
from lever_lm.utils.hub import fetch_model
from lever_lm.utils.transformers_compat import first_line

# What is kept of a model's generation config: ids of tokens. How to decode is said by the config of ours alone.
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "bad_words_ids")


class Sizes:
    """The tokens of images by their sizes; nothing is encoded. count: size in pixels → tokens."""

    def __init__(self, count: Callable[[tuple[int, int]], int]):
        self._count, self._size = lru_cache(None)(count), lru_cache(200_000)(image_size)

    def see(self, images: Sequence[Image]) -> None:
        """Do nothing."""

    def see_together(self, images: Sequence[Image]) -> None:
        """Do nothing."""

    def tokens(self, image: Image) -> int:
        """Return the tokens of an image among several."""
        return self._count(self._size(image))


class Generic:
    """The `local.Family` of a directory or hub id of any such model. What a family is given for features of images is
    not used: none are kept. Raises LeverError for a model that is no such one, before its weights are loaded."""

    shorter = "images of fewer tokens (lvlm.processor)"
    leaner = shorter
    batch_tokens = 65536

    def __init__(self, config: LvlmConfig, prompt: PromptConfig, device: str, *of_features: object):
        self.config, self.prompt, self.device = config, prompt, resolve_device(device)
        self.dtype = dtype_of(config, self.device)
        where = fetch_model(config.path, "--lvlm, lvlm.path")
        self.processor, self.options = load_generic_processor(config, prompt, where)
        self.model, self.tokenizer = load_model(config, where, self.device, self.dtype), self.processor.tokenizer
        own = self.model.generation_config
        self.model.generation_config = type(own)(**{name: getattr(own, name, None) for name in _KEPT})
        self.pad = self.tokenizer.pad_token_id if own.pad_token_id is None else own.pad_token_id
        self.vision = Sizes(self._tokens_of_size)
        self._head = head = self.model.get_output_embeddings()
        if self.dtype != torch.float32 and type(head) is torch.nn.Linear and head.bias is None:
            head.forward = lambda hidden: float32_logits(head, hidden)

    # ------------------------------------------------------------------ answers

    def write(self, prepared: dict[str, Tensor], eos: Tensor, process: Process | None) -> Tensor:
        """See `local.Family`."""
        made, beams = prepared, self.config.num_beams
        watch = Watch(made["input_ids"], made["attention_mask"], beams, eos, process)
        decoding = {"num_beams": beams, "length_penalty": self.config.length_penalty} if beams > 1 else {}
        ends = {"eos_token_id": eos.tolist(), "pad_token_id": self.pad, "max_new_tokens": self.config.max_new_tokens}
        with self._named():
            written = self.model.generate(**made, **decoding, **ends, do_sample=False, logits_processor=[watch])
        watch.check()
        return written[:, made["input_ids"].shape[1] :]

    def score(self, prepared: dict[str, Tensor], counts: Sequence[int]) -> list[float]:
        """See `local.Family`. Padding stands on the right, so that places are those of each prompt alone, and only the
        places before the targets' tokens go through the vocabulary-wide head."""
        made = prepared
        ids, ends = made["input_ids"], made["attention_mask"].sum(1, keepdim=True)
        place, starts = torch.arange(ids.shape[1], device=self.device), ends - torch.tensor(counts)[:, None].to(ends)
        rows, places = ((place < ends) & (place >= starts)).nonzero().T
        before = (rows, places - 1)
        alone = self._head and self._head.register_forward_pre_hook(lambda _, args: (args[0][before][None],))
        with alone or nullcontext(), self._named():
            logits = self.model(**made, use_cache=False).logits
        logits = logits[0] if alone else logits[before]
        of_tokens = -F.cross_entropy(logits.float(), ids[rows, places], reduction="none")
        return [float(part.sum()) for part in of_tokens.cpu().split(list(counts))]

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Raise LeverError where the model fails, but for a lack of memory: an option may not be the model's."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the library's and the model's, any
            given = ", ".join(f"lvlm.processor.{name}" for name in self.config.processor)
            mend = f"leave out {given}" if given else OTHER
            raise LeverError(
                f"{self.config.path} does not take what its processor makes ({first_line(error)}): {mend}"
            ) from error

    # ------------------------------------------------------------------ inputs

    def give_back(self) -> None:
        """See `local.Family`: nothing is kept."""

    def prepare(self, prompts: Sequence[Prompt], targets: Sequence[list[int]] | None = None) -> dict[str, Tensor]:
        """See `local.Family`. Prompts are padded on the left; each with its target, on the right."""
        texts = [self._text(prompt) for prompt in prompts]
        opened = {image: open_image(image) for image in dict.fromkeys(i for prompt in prompts for i in prompt.images)}
        images = [[opened[image] for image in prompt.images] for prompt in prompts]
        try:
            made = processed(self.processor, texts, images, self.options)
        except Exception as error:  # the library can fail in any way on what stands in a prompt
            if len(prompts) == 1:
                question = prompts[0].query.question_id
                found = f"the processor of {self.config.path} does not take its prompt: {first_line(error)}"
                raise LeverError(f"question {question}: {found}") from error
            for prompt in prompts:  # one of them is named
                self.prepare([prompt])
            raise
        mask, tails = made["attention_mask"], [()] * len(prompts) if targets is None else targets
        lengths = [length + len(tail) for length, tail in zip(mask.sum(1).tolist(), tails, strict=True)]
        check_context(self, prompts, lengths)
        if targets is not None:
            for name in [name for name, tensor in made.items() if getattr(tensor, "shape", ())[:2] == mask.shape]:
                padding = self.pad if name == "input_ids" else 0
                rows = self._followed(name, made[name], mask, targets)
                made[name] = pad_sequence(rows, batch_first=True, padding_value=padding)
        return dict(made.to(self.device, self.dtype))

    def _followed(self, name: str, tensor: Tensor, mask: Tensor, targets: Sequence[list[int]]) -> list[Tensor]:
        """Return the rows of a tensor of one number a token, without padding and with those of the targets behind: the
        targets' ids, and of all else what the prompt's last token has."""
        rows = [row[kept == 1] for row, kept in zip(tensor, mask, strict=True)]
        if name == "input_ids":
            return [torch.cat([row, row.new_tensor(target)]) for row, target in zip(rows, targets, strict=True)]
        return [torch.cat([row, row[-1:].expand(len(t), *row.shape[1:])]) for row, t in zip(rows, targets, strict=True)]

    def _text(self, prompt: Prompt) -> str:
        """Return a prompt in the chat template. Raises LeverError where its texts hold an image's placeholder."""
        text, shown = rendered(self.processor, prompt, self.prompt), len(prompt.images)
        for token, most in self._placeholders.items():
            if text.count(token) > most * shown:
                raise LeverError(f"{holder(prompt, token)}: {token} must not stand there")
        return text

    @cached_property
    def _placeholders(self) -> dict[str, int]:
        """The tokens that stand for images → how many of them the chat template writes for each."""
        names = [getattr(self.processor, "image_token", None)]
        if isinstance(number := getattr(self.model.config, "image_token_id", None), int):
            names.append(self.tokenizer.convert_ids_to_tokens(number))
        probe = rendered(self.processor, PROBE, self.prompt)
        return {name: probe.count(name) // len(PROBE.images) for name in names if name}

    def _tokens_of_size(self, size: tuple[int, int]) -> int:
        """Return the tokens that the processor makes of an image of a size, one of several in a prompt."""
        longer, shorter = (self._probe(images) for images in ([blank(size)] * len(PROBE.images), []))
        return -(-(longer - shorter) // len(PROBE.images))

    def _probe(self, images: list) -> int:
        """Return the length of the probe's prompt with these images."""
        text = rendered(self.processor, PROBE if images else without_images(PROBE), self.prompt)
        return processed(self.processor, [text], [images], self.options)["input_ids"].shape[1]


class Watch:
    """A LogitsProcessor that notes prompts whose scores are not finite, before `process` changes them. ids and mask
    (B, L): prompts; of padding `process` sees the prompt's last token instead."""

    def __init__(self, ids: Tensor, mask: Tensor, beams: int, eos: Tensor, process: Process | None):
        self.prompts = ids.where(mask == 1, ids[:, -1:]).repeat_interleave(beams, 0)
        self.sound = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.eos, self.process = eos, process

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """ids (B·N, ·) so far, scores (B·N, V) → scores."""
        written = ids[:, self.prompts.shape[1] :]
        sound = scores.amax(-1).isfinite() | torch.isin(written, self.eos).any(-1)  # NaN and +inf are above all else
        self.sound &= sound.view(len(self.sound), -1).all(-1)
        return scores if self.process is None else self.process(torch.cat([self.prompts, written], 1), scores)

    def check(self) -> None:
        """Raise NotFinite where a prompt had such scores."""
        if not self.sound.all():
            raise NotFinite((~self.sound).nonzero().flatten().tolist())
