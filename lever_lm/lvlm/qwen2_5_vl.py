"""Qwen2-VL and Qwen2.5-VL: every distinct image through the vision tower once, its features shared between prompts.

B prompts, L prompt length, H hidden. What is the library's stays the library's: chat template, vision tower, rotary
positions, language model, cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.lvlm.decoding import Prefilled, Process, beam_search, float32_logits, greedy, repeatable_attention
from lever_lm.lvlm.local import check_context, dtype_of, load_model
from lever_lm.lvlm.processor import load_processor
from lever_lm.lvlm.prompt import Prompt, holder, to_messages
from lever_lm.lvlm.qwen_kernels import compile_parts, speed_up_vision
from lever_lm.lvlm.qwen_vision import Vision
from lever_lm.utils.device import resolve_device
from lever_lm.utils.distributed import Shards
from lever_lm.utils.errors import LeverError
from lever_lm.utils.hub import fetch_model
from lever_lm.utils.progress import Track

IMAGE_TOKEN = "<|image_pad|>"
_SCORED = 512  # tokens of answers that go through the vocabulary-wide head at once: 1 GiB of a vocabulary of 150,000


@dataclass
class Inputs:
    """Prompts, each followed by its target, padded on the right: ids and mask (B, L), lengths (B,), embeddings
    (B, L, H), positions (3, B, L). more: what else the language model is given of the images."""

    ids: Tensor
    mask: Tensor
    lengths: Tensor
    embeddings: Tensor
    positions: Tensor
    more: dict


class Qwen2_5_VL:
    """The `local.Family` of a directory or hub id of a Qwen2-VL or Qwen2.5-VL. `folder`: of the image features on
    disk."""

    shorter = "a smaller lvlm.max_pixels"
    leaner = "a smaller lvlm.max_pixels or lvlm.bank_memory"

    def __init__(
        self, config: LvlmConfig, prompt: PromptConfig, device: str, folder: Path | None, track: Track, shards: Shards
    ):
        self.config, self.prompt, self.device = config, prompt, resolve_device(device)
        self.dtype = dtype_of(config, self.device)
        where = fetch_model(config.path, "--lvlm, lvlm.path")
        self.processor = load_processor(config.path, where)
        self.model = load_model(config, where, self.device, self.dtype)
        if self.device.type == "cuda" and self.dtype != torch.float32 and config.attention == "auto":
            speed_up_vision(self.model.model.visual)
        if config.compile and self.device.type == "cuda":
            compile_parts(self.model)
        self.tokenizer, image_processor = self.processor.tokenizer, self.processor.image_processor
        image_processor.size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
        pad = self.model.generation_config.pad_token_id
        self.pad = self.tokenizer.pad_token_id if pad is None else pad
        self.image_token_id = self.model.config.image_token_id
        self.vision = Vision(self.model, image_processor, config, folder, track, shards)

    def write(self, prepared: Inputs, eos: Tensor, process: Process | None) -> Tensor:
        """See `local.Family`."""
        prefilled, common = self.prefill(prepared), (self.config.max_new_tokens, eos, self.pad)
        if self.config.num_beams == 1:
            return greedy(prefilled, *common, process)
        return beam_search(prefilled, self.config.num_beams, *common, self.config.length_penalty, process)

    def prefill(self, given: Inputs) -> Prefilled:
        """Run prompts through the language model. Padding stands on the right, where no token of a prompt looks:
        attention needs no mask but the causal one, and so takes its fast kernel."""
        decoder, head = self.model.model.language_model, self.model.lm_head
        out = decoder(inputs_embeds=given.embeddings, position_ids=given.positions, use_cache=True, **given.more)
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

        ids, mask = given.ids, given.mask
        last = out.last_hidden_state[torch.arange(len(given.ids), device=self.device), given.lengths - 1]
        following = given.positions.masked_fill(mask == 0, 0).amax((0, 2)) + 1
        return Prefilled(float32_logits(head, last), cache, mask, following, step, ids.where(mask == 1, ids[:, :1]))

    def score(self, prepared: Inputs, counts: Sequence[int]) -> list[float]:
        """See `local.Family`. Only the places before the targets' tokens go through the vocabulary-wide head, some at a
        time."""
        given = prepared
        decoder, shown = self.model.model.language_model, {"inputs_embeds": given.embeddings, **given.more}
        hidden = decoder(position_ids=given.positions, use_cache=False, **shown).last_hidden_state
        ids = given.ids
        place = torch.arange(ids.shape[1], device=self.device)
        ends = given.lengths[:, None]
        starts = ends - torch.tensor(counts, device=self.device)[:, None]
        rows, places = ((place < ends) & (place >= starts)).nonzero().T
        before, wanted = hidden[rows, places - 1].split(_SCORED), ids[rows, places].split(_SCORED)
        head, loss = self.model.lm_head, torch.nn.functional.cross_entropy
        of_tokens = [-loss(float32_logits(head, h), w, reduction="none") for h, w in zip(before, wanted, strict=True)]
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
        ids, mask, lengths, is_image, positions = (
            tensor.to(self.device) for tensor in (ids, mask.long(), lengths, is_image, positions)
        )
        embeddings, more = self.model.get_input_embeddings()(ids), {}
        if images:
            shown, more = self._shown(torch.cat(features).to(embeddings.dtype), is_image)
            embeddings = embeddings.masked_scatter(is_image[..., None], shown)
        return Inputs(ids, mask, lengths, embeddings, positions, more)

    def _shown(self, features: Tensor, is_image: Tensor) -> tuple[Tensor, dict]:
        """Return what of the features (ΣT, ·) stands at the places of the images, (ΣT, H), and what else the language
        model is given. is_image: (B, L)."""
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
