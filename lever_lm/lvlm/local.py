"""Qwen2.5-VL in this process: every distinct image through the vision tower once, prompts in batches.

B prompts, L prompt length, H hidden. What is the library's stays the library's: tokenizer, chat template, image
processor, vision tower, rotary positions, language model, cache. Ours is only what is shared between prompts.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lever_lm.compat import first_line, import_transformers, load_whole, resolve_device
from lever_lm.config import LvlmConfig, PromptConfig, fingerprint
from lever_lm.data import Image, open_image
from lever_lm.errors import LeverError
from lever_lm.hub import fetch_model, model_folder
from lever_lm.lvlm.decoding import Prefilled, beam_search, greedy
from lever_lm.lvlm.prompt import Prompt, cut_answer, to_messages

IMAGE_BATCH = 64


class LocalLvlm:
    """A Qwen2.5-VL directory or hub id. Raises LeverError when it cannot be loaded."""

    def __init__(self, config: LvlmConfig, prompt: PromptConfig, device: str = "auto"):
        transformers = import_transformers()
        self.config, self.prompt, self.device = config, prompt, resolve_device(device)
        where = str(fetch_model(config.path, "--lvlm, lvlm.path"))
        dtype = _dtype(config.dtype, self.device)
        attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
        try:
            self.processor = transformers.AutoProcessor.from_pretrained(where)
            model = load_whole(transformers.Qwen2_5_VLForConditionalGeneration, where, dtype, **attention)
        except Exception as error:  # a directory of anybody's making: the library can fail on it in any way
            raise LeverError(
                f"cannot load the LVLM {config.path}: {first_line(error)} (--lvlm, lvlm.path: a cached hub id or a "
                "directory of a Qwen2.5-VL)"
            ) from error
        self.model = model.to(self.device)
        self.tokenizer, self.image_processor = self.processor.tokenizer, self.processor.image_processor
        self.tokenizer.padding_side = "left"
        self.image_processor.size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
        eos = model.generation_config.eos_token_id
        self.eos = torch.tensor(eos if isinstance(eos, list) else [eos], device=self.device)
        pad = model.generation_config.pad_token_id
        self.pad = self.tokenizer.pad_token_id if pad is None else pad
        self.image_token = "<|image_pad|>"
        self.image_token_id = model.config.image_token_id
        self.bank: dict[Image, tuple[Tensor, Tensor]] = {}  # image → (features (T, H), grid (3,))

    # ------------------------------------------------------------------ answering

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """The answer to each prompt, cut as SPEC'd in prompt.cut_answer. Order in, order out."""
        return [cut_answer(text) for text in self.generate(prompts)]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """What the model writes after each prompt, uncut."""
        texts: list[str] = [""] * len(prompts)
        for batch in self.batches(prompts):
            prefilled = self._prefill([self._text(prompts[i]) for i in batch], [prompts[i].images for i in batch])
            if self.config.num_beams == 1:
                tokens = greedy(prefilled, self.config.max_new_tokens, self.eos, self.pad)
            else:
                tokens = beam_search(
                    prefilled,
                    self.config.num_beams,
                    self.config.max_new_tokens,
                    self.eos,
                    self.pad,
                    self.config.length_penalty,
                )
            for i, text in zip(batch, self.tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
                texts[i] = text
        return texts

    @torch.inference_mode()
    def answer_log_prob(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """log P(answer | prompt): the sum over the answer's tokens, the end-of-turn token not among them; rounded to
        6 decimals. Raises LeverError for an answer without tokens."""
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers")
        scores = [0.0] * len(prompts)
        for batch in self.batches(prompts):
            targets = [self.tokenizer(answers[i], add_special_tokens=False).input_ids for i in batch]
            for i, target in zip(batch, targets, strict=True):
                if not target:
                    raise LeverError(f"question {prompts[i].query.question_id}: cannot score an empty answer")
            texts = [self._text(prompts[i]) for i in batch]
            log_probs = self._score(texts, [prompts[i].images for i in batch], targets)
            for i, value in zip(batch, log_probs, strict=True):
                scores[i] = round(value, 6)
        return scores

    def batches(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Indices of the prompts, sorted by length, in batches: a function of the work list alone."""
        order = sorted(range(len(prompts)), key=lambda i: (self._length(prompts[i]), i))
        size = self.config.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _length(self, prompt: Prompt) -> int:
        """Images weigh most, text breaks their ties; exact lengths are not needed to sort."""
        text = sum(len(example.question) + len(example.answer) for example in (*prompt.icds, prompt.query))
        return 1_000_000 * len(prompt.images) + text

    # ------------------------------------------------------------------ one batch

    def _text(self, prompt: Prompt) -> str:
        messages = to_messages(prompt, self.prompt)
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _inputs(self, texts: list[str], images: list[list[Image]], targets: list[list[int]] | None = None):
        """Token ids (B, L) padded on the left, mask (B, L), embeddings (B, L, H), positions (3, B, L)."""
        self._fill_bank([path for paths in images for path in paths])
        rows = []
        for i, (text, paths) in enumerate(zip(texts, images, strict=True)):
            parts = text.split(self.image_token)
            if len(parts) != len(paths) + 1:
                raise LeverError(
                    f"a prompt about {paths[-1]} has {len(parts) - 1} image placeholders for {len(paths)} images: "
                    f"its questions or answers must not contain {self.image_token}"
                )
            counts = [len(self.bank[path][0]) for path in paths]
            expanded = parts[0] + "".join(
                self.image_token * count + part for count, part in zip(counts, parts[1:], strict=True)
            )
            ids = self.tokenizer(expanded, add_special_tokens=False).input_ids
            rows.append(ids + (targets[i] if targets else []))
        length = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (length - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.device)
        is_image = (ids == self.image_token_id) & mask.bool()
        features = torch.cat([self.bank[path][0] for paths in images for path in paths]).to(self.device)
        if int(is_image.sum()) != len(features):
            raise LeverError(f"{int(is_image.sum())} image tokens for {len(features)} image features in one batch")
        grids = torch.stack([self.bank[path][1] for paths in images for path in paths]).to(self.device)
        positions, _ = self.model.model.get_rope_index(
            ids, mm_token_type_ids=is_image.int(), image_grid_thw=grids, attention_mask=mask
        )
        embeddings = self.model.get_input_embeddings()(ids)
        embeddings = embeddings.masked_scatter(is_image[..., None], features.to(embeddings.dtype))
        return ids, mask, embeddings, positions

    def _prefill(self, texts: list[str], images: list[list[Image]]) -> Prefilled:
        _, mask, embeddings, positions = self._inputs(texts, images)
        decoder, head = self.model.model.language_model, self.model.lm_head
        out = decoder(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=True)
        cache = out.past_key_values

        def step(tokens: Tensor, position: Tensor, mask: Tensor) -> Tensor:
            out = decoder(
                inputs_embeds=self.model.get_input_embeddings()(tokens),
                attention_mask=mask,
                position_ids=position.expand(3, -1, -1),
                past_key_values=cache,
                use_cache=True,
            )
            return head(out.last_hidden_state[:, -1])

        following = positions.masked_fill(mask == 0, 0).amax((0, 2)) + 1
        return Prefilled(head(out.last_hidden_state[:, -1]), cache, mask, following, step)

    def _score(self, texts: list[str], images: list[list[Image]], targets: list[list[int]]) -> list[float]:
        ids, mask, embeddings, positions = self._inputs(texts, images, targets)
        decoder = self.model.model.language_model
        hidden = decoder(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        longest = max(map(len, targets))
        # Only the places before the answers' tokens go through the vocabulary-wide head.
        log_probs = self.model.lm_head(hidden[:, -longest - 1 : -1]).float().log_softmax(-1)
        of_tokens = log_probs.gather(-1, ids[:, -longest:, None]).squeeze(-1)
        return [float(row[longest - len(target) :].sum()) for row, target in zip(of_tokens, targets, strict=True)]

    # ------------------------------------------------------------------ images

    def _fill_bank(self, images: Sequence[Image]) -> None:
        new = [image for image in dict.fromkeys(images) if image not in self.bank]
        for start in range(0, len(new), IMAGE_BATCH):
            self._encode(new[start : start + IMAGE_BATCH])

    def _encode(self, images: list[Image]) -> None:
        from qwen_vl_utils import process_vision_info

        limits = {"min_pixels": self.config.min_pixels, "max_pixels": self.config.max_pixels}
        content = [{"type": "image", "image": open_image(image), **limits} for image in images]
        resized, _ = process_vision_info(
            [{"role": "user", "content": content}], image_patch_size=self.image_processor.patch_size
        )
        pixels = self.image_processor(images=resized, return_tensors="pt").to(self.device)
        grids = pixels["image_grid_thw"]
        output = self.model.get_image_features(pixels["pixel_values"].to(self.model.dtype), grids)
        features = output if isinstance(output, (tuple, list)) else output.pooler_output
        expected = [math.prod(grid.tolist()) // self.image_processor.merge_size**2 for grid in grids]
        if [len(feature) for feature in features] != expected:
            raise LeverError(
                f"the image {images[0]} and those after it: the vision tower gave {[len(f) for f in features]} tokens, "
                f"the grids promise {expected}"
            )
        for image, feature, grid in zip(images, features, grids, strict=True):
            self.bank[image] = (feature.clone(), grid)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def local_fingerprint(config: LvlmConfig, prompt: PromptConfig, device: str) -> str:
    """Changes with everything an answer depends on but the question: weights, precision, decoding, image budget,
    prompt style. Needs no model loaded."""
    folder = model_folder(config.path)
    files = sorted(f for kind in ("safetensors", "json", "jinja") for f in folder.glob(f"*.{kind}")) if folder else []
    weights = [[file.name, file.stat().st_size, _ends_digest(file)] for file in files] or config.path
    settings = {name: value for name, value in vars(config).items() if name not in ("path", "dtype", "batch_size")}
    return fingerprint(weights, settings, str(_dtype(config.dtype, resolve_device(device))), prompt)


def _ends_digest(path: Path, size: int = 1 << 20) -> str:
    """Digest of the first and last MiB: enough to tell weights apart, and a 7 GB file costs nothing."""
    with open(path, "rb") as file:
        head = file.read(size)
        file.seek(max(len(head), path.stat().st_size - size))
        return hashlib.sha256(head + file.read()).hexdigest()[:16]
