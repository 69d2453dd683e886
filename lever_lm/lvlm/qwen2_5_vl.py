"""Qwen2-VL and Qwen2.5-VL: every distinct image through the vision tower once, its features shared between prompts.

B prompts, L prompt length, H hidden. What is the library's stays the library's: chat template, vision tower, rotary
positions, language model, and off the fast path of a GPU its cache.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.data import Image
from lever_lm.lvlm.decoding import Prefilled, Process, beam_search, float32_logits, greedy, repeatable_attention
from lever_lm.lvlm.local import check_context, dtype_of, load_model
from lever_lm.lvlm.packed import Packed
from lever_lm.lvlm.processor import load_processor
from lever_lm.lvlm.prompt import Prompt, holder, to_messages
from lever_lm.lvlm.qwen_kernels import has_fast_kernels, load_kernels, speed_up
from lever_lm.lvlm.qwen_vision import Vision
from lever_lm.utils.device import resolve_device, use_device
from lever_lm.utils.distributed import Shards
from lever_lm.utils.errors import LeverError
from lever_lm.utils.hub import fetch_model
from lever_lm.utils.progress import Track
from lever_lm.utils.transformers_compat import first_line

IMAGE_TOKEN = "<|image_pad|>"
_SCORED = 512  # tokens of answers that go through the vocabulary-wide head at once: 1 GiB of a vocabulary of 150,000


@dataclass
class Inputs:
    """Prompts, each followed by its target: ids and mask (B, L), padded on the right; following (B,), the position
    after each. As the language model is given them: embeddings (B, L, H) with the padding, or (1, T, H) of the prompts
    alone, positions (3, …) of the same; starts, ends (B,): where each prompt begins and ends in the one or the other;
    more: what else it is given of the images."""

    ids: Tensor
    mask: Tensor
    following: Tensor
    starts: Tensor
    ends: Tensor
    embeddings: Tensor
    positions: Tensor
    more: dict


class Qwen2_5_VL:
    """The `local.Family` of a directory or hub id of a Qwen2-VL or Qwen2.5-VL. folder: of the image features on disk;
    ahead: images that are asked about first, decoded while the weights are loaded."""

    shorter = "a smaller lvlm.max_pixels"
    leaner = "a smaller lvlm.max_pixels or lvlm.bank_memory"

    def __init__(
        self,
        config: LvlmConfig,
        prompt: PromptConfig,
        device: str,
        folder: Path | None,
        track: Track,
        shards: Shards,
        ahead: Sequence[Image] = (),
    ):
        self.config, self.prompt, self.device = config, prompt, resolve_device(device)
        self.dtype = dtype_of(config, self.device)
        where = fetch_model(config.path, "--lvlm, lvlm.path")
        self.processor = load_processor(config.path, where)
        self.tokenizer, image_processor = self.processor.tokenizer, self.processor.image_processor
        image_processor.size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
        self.vision = Vision(image_processor, config, folder, track, shards, self.device, self.dtype)
        self.vision.expect(ahead)
        use_device(self.device)
        fast = self.dtype != torch.float32 and config.attention == "auto" and has_fast_kernels(self.device)
        with ThreadPoolExecutor(1, "kernels", use_device, (self.device,)) as thread:
            kernels = thread.submit(load_kernels(self.device, self.dtype, config.compile)) if fast else None
            self.model = load_model(config, where, self.device, self.dtype)
        self.packed, self.batch_tokens = None, 65536
        if kernels:
            speed_up(self.model, config.compile, kernels.result(), track)
            if not getattr(self.model.config.text_config, "use_sliding_window", False):
                self.packed = self._packed_model()
                self.batch_tokens *= 2  # 3 % faster, for 6 GiB more of the 3B model
        pad = self.model.generation_config.pad_token_id
        self.pad = self.tokenizer.pad_token_id if pad is None else pad
        self.image_token_id = self.model.config.image_token_id
        self.vision.give_tower(self.model)

    def _packed_model(self) -> Packed:
        config = self.config
        try:
            return Packed(self.model, config.batch_size, config.num_beams, config.max_new_tokens)
        except torch.OutOfMemoryError as error:
            raise LeverError(
                f"the answers to {config.batch_size} prompts do not fit into the memory of {self.device} beside "
                f"{config.path}: a smaller lvlm.batch_size, lvlm.num_beams or lvlm.max_new_tokens ({first_line(error)})"
            ) from error

    def write(self, prepared: Inputs, eos: Tensor, process: Process | None) -> Tensor:
        """See `local.Family`."""
        prefilled, common = self.prefill(prepared), (self.config.max_new_tokens, eos, self.pad)
        if self.config.num_beams == 1:
            return greedy(prefilled, *common, process)
        return beam_search(prefilled, self.config.num_beams, *common, self.config.length_penalty, process)

    def give_back(self) -> None:
        """See `local.Family`."""
        if self.packed:
            self.packed.give_back()

    def prefill(self, given: Inputs) -> Prefilled:
        """Run prompts through the language model: packed, or with padding on the right, where no token of a prompt
        looks, so that attention needs no mask but the causal one and takes its fast kernel."""
        hidden, cache, step = (self._packed if self.packed else self._padded)(given, given.ends - 1)
        ids, mask, logits = given.ids, given.mask, float32_logits(self.model.lm_head, hidden)
        return Prefilled(logits, cache, mask, given.following, step, ids.where(mask == 1, ids[:, :1]))

    def _packed(self, given: Inputs, places: Tensor, keep: bool = True) -> tuple[Tensor, Packed, Callable]:
        """Return the last hidden states (n, H) of some places, the cache of keys, and what makes a step on it."""
        shown = given.embeddings, given.positions, given.ends, given.ids.shape[1], given.more
        return self.packed.hidden(*shown, places, keep), self.packed, self.packed.step

    def _padded(self, given: Inputs, places: Tensor, keep: bool = True) -> tuple[Tensor, Any, Callable]:
        decoder, head, shown = self.model.model.language_model, self.model.lm_head, {"position_ids": given.positions}
        out = decoder(inputs_embeds=given.embeddings, use_cache=keep, **shown, **given.more)

        def step(tokens: Tensor, position: Tensor, mask: Tensor) -> Tensor:
            with repeatable_attention():
                out_of_step = decoder(
                    inputs_embeds=self.model.get_input_embeddings()(tokens),
                    attention_mask=mask,
                    position_ids=position.expand(3, -1, -1),
                    past_key_values=out.past_key_values,
                    use_cache=True,
                )
            return float32_logits(head, out_of_step.last_hidden_state[:, -1])

        return out.last_hidden_state.flatten(0, 1)[places], out.past_key_values, step

    def score(self, prepared: Inputs, counts: Sequence[int]) -> list[float]:
        """See `local.Family`. Only the places before the targets' tokens go through the vocabulary-wide head, some at a
        time."""
        given = prepared
        counted = torch.tensor(counts, device=self.device)
        place, lengths = torch.arange(given.ids.shape[1], device=self.device), (given.ends - given.starts)[:, None]
        rows, targets = ((place < lengths) & (place >= lengths - counted[:, None])).nonzero().T
        before, wanted = given.starts[rows] + targets - 1, given.ids[rows, targets].split(_SCORED)
        hidden, *_ = (self._packed if self.packed else self._padded)(given, before, keep=False)
        pairs = zip(hidden.split(_SCORED), wanted, strict=True)
        head, loss = self.model.lm_head, torch.nn.functional.cross_entropy
        of_tokens = [-loss(float32_logits(head, h), w, reduction="none") for h, w in pairs]
        return [float(part.sum()) for part in torch.cat(of_tokens).cpu().split(list(counts))]

    def prepare(self, prompts: Sequence[Prompt], targets: Sequence[Sequence[int]] | None = None) -> Inputs:
        """See `local.Family`."""
        targets = targets or [()] * len(prompts)
        rows = [[*self.token_ids(prompt), *target] for prompt, target in zip(prompts, targets, strict=True)]
        check_context(self, prompts, list(map(len, rows)))
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
            image_grid_thw=torch.tensor([self.vision.cache.grid(image) for image in images]) if images else None,
            attention_mask=mask.long(),
        )
        features = self.vision.features(images)
        if int(is_image.sum()) != sum(map(len, features)):
            raise LeverError(f"{int(is_image.sum())} image tokens for {sum(map(len, features))} features in one batch")
        following = positions.masked_fill(~mask, 0).amax((0, 2)) + 1
        starts, shown = torch.arange(len(ids)) * ids.shape[1], (ids, is_image, positions)
        if self.packed:
            starts = lengths.cumsum(0) - lengths
            shown = (ids[mask][None], is_image[mask][None], positions[:, mask][:, None])
        ends = starts + lengths
        ids, mask, following, starts, ends = map(self._moved, (ids, mask.long(), following, starts, ends))
        shown_ids, is_image, positions = map(self._moved, shown)
        embeddings, more = self.model.get_input_embeddings()(shown_ids), {}
        if images:
            seen, more = self._shown(torch.cat(features).to(embeddings.dtype), is_image)
            embeddings = embeddings.masked_scatter(is_image[..., None], seen)
        return Inputs(ids, mask, following, starts, ends, embeddings, positions, more)

    def _moved(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device; the GPU fetches it when it has come so far."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _shown(self, features: Tensor, is_image: Tensor) -> tuple[Tensor, dict]:
        """Return what of the features (ΣT, ·) stands at the places of the images, (ΣT, H), and what else the language
        model is given. is_image: (B, L) or (1, T)."""
        return features, {}

    def token_ids(self, prompt: Prompt) -> list[int]:
        """Return the prompt in the model's own chat template, with as many image tokens as its images have features."""
        text = self.processor.apply_chat_template(
            to_messages(prompt, self.prompt), tokenize=False, add_generation_prompt=True
        )
        short = self.tokenizer(text, add_special_tokens=False).input_ids
        if short.count(self.image_token_id) != len(prompt.images):
            raise LeverError(
                f"{holder(prompt, IMAGE_TOKEN)}: {IMAGE_TOKEN} must not stand there; "
                f"its prompt has {short.count(self.image_token_id)} image placeholders for {len(prompt.images)} images"
            )
        counts = iter(map(self.vision.tokens, prompt.images))
        ids: list[int] = []
        for token in short:
            ids += [token] * (next(counts) if token == self.image_token_id else 1)
        return ids
