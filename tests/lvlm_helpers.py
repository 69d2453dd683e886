"""What the tests of several packages need of an LVLM: a backend that counts, and the library's own way to answer."""

from dataclasses import replace

import pytest
import torch
from helpers import track
from models import TINY

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.data import Example, forget_digests
from lever_lm.lvlm import CachedLvlm, Prompt
from lever_lm.lvlm.answer_cache import AnswerCache
from lever_lm.lvlm.backend import load_local
from lever_lm.lvlm.local import LocalLvlm
from lever_lm.utils.transformers_compat import import_transformers


def example(number: int, question: str, answer: str) -> Example:
    return Example(number, number, question, (answer,) * 10, (answer,) * 10, f"{number}.jpg")


FIRST = example(1, "what digit is it?", "three")
SECOND = example(2, "is it even?", "no")
QUERY = example(9, "which comes next?", "secret")
VISION = "<|vision_start|><|image_pad|><|vision_end|>"


# ---------------------------------------------------------------------- a backend that counts


class Stopped(Exception):
    """The backend died."""


class ByLists:
    """A backend that is asked batch by batch, through `generate` and `answer_log_prob`."""

    def batches(self, prompts, answers=None):
        return [list(range(len(prompts)))]

    def ask(self, prompts, batches, answers=None, *, end=False):
        for batch in batches:
            asked = [prompts[i] for i in batch]
            if answers is None:
                yield batch, self.generate(asked)
            else:
                yield batch, self.answer_log_prob(asked, [answers[i] for i in batch], end=end)


class Counting(ByLists):
    """Answers with the question and how often it was asked; dies at batch `dies_at`."""

    def __init__(self, batch_size: int = 4, dies_at: int | None = None):
        self.batch_size, self.dies_at = batch_size, dies_at
        self.work: list[list[str]] = []  # the questions of each batch

    def batches(self, prompts, answers=None):
        order = sorted(range(len(prompts)), key=lambda i: prompts[i].query.question)
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def generate(self, prompts):
        self._note(prompts)
        return [f"{prompt.query.question} {prompt.query.answer}, and more" for prompt in prompts]

    def answer_log_prob(self, prompts, answers, *, end=False):
        self._note(prompts)
        return [-float(len(answer) + end) - 0.123456 for answer in answers]

    def _note(self, prompts):
        if self.dies_at is not None and len(self.work) + 1 == self.dies_at:
            raise Stopped
        self.work.append([prompt.query.question for prompt in prompts])

    @property
    def asked(self) -> list[str]:
        return [question for batch in self.work for question in batch]


def no_model(prompts):
    raise AssertionError("everything is known: the model must not be loaded")


def opened(path, backend=None, fingerprint="model-1", track=track) -> CachedLvlm:
    """The cache as a new process would open it."""
    forget_digests()
    return CachedLvlm((lambda prompts: backend) if backend else no_model, fingerprint, AnswerCache(path), track)


@pytest.fixture
def numbered_prompts(tmp_path):
    """Ten prompts of one demonstration each, on images of their own."""
    made = []
    for i in range(10):
        paths = [tmp_path / f"{kind}{i}.jpg" for kind in ("icd", "query")]
        for path in paths:
            path.write_bytes(path.name.encode())
        icd = Example(i, i, f"shown {i}?", ("yes",), ("yes",), str(paths[0]))
        made.append(Prompt((icd,), Example(100 + i, 100 + i, f"q{i}", ("a",), ("a",), str(paths[1]))))
    return made


# ---------------------------------------------------------------------- the shipped model, and the library's way


def local_lvlm(style: str = "interleaved", path: str = TINY, **settings) -> LocalLvlm:
    config = LvlmConfig(**{"path": str(path), "dtype": "float32", "batch_size": 8, **settings})
    return load_local(config, PromptConfig(style=style), "cpu")


def conversation(prompt, style: str) -> list[dict]:
    """The conversation of a prompt, images in it, as a user of the library would write it."""
    texts = [f"Question: {example.question} Short answer:" for example in prompt.icds]
    texts.append(prompt.query.question if prompt.bare else f"Question: {prompt.query.question} Short answer:")
    pictures = [
        [] if example.image is None else [{"type": "image", "image": f"file://{example.image}"}]
        for example in (*prompt.icds, prompt.query)
    ]
    system = {"role": "system", "content": [{"type": "text", "text": PromptConfig.system}]}
    if style == "interleaved":
        content = []
        for picture, text, icd in zip(pictures[:-1], texts[:-1], prompt.icds, strict=True):
            content += [*picture, {"type": "text", "text": f"{text} {icd.answer}\n"}]
        return [
            system,
            {"role": "user", "content": [*content, *pictures[-1], {"type": "text", "text": texts[-1]}]},
        ]
    turns = [system]
    for picture, text, icd in zip(pictures, texts, (*prompt.icds, None), strict=True):
        turns.append({"role": "user", "content": [*picture, {"type": "text", "text": text}]})
        if icd is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": icd.answer}]})
    return turns


def without_images(prompt: Prompt) -> Prompt:
    """The prompt with the images of its demonstrations left out."""
    return replace(prompt, icds=tuple(replace(icd, image=None) for icd in prompt.icds))


def plain_inputs(lvlm: LocalLvlm, prompt, style: str):
    """Tokens and pixels of one prompt."""
    import_transformers()
    from qwen_vl_utils import process_vision_info

    messages = conversation(prompt, style)
    for turn in messages:
        for part in turn["content"]:
            if part["type"] == "image":
                part |= {"min_pixels": lvlm.config.min_pixels, "max_pixels": lvlm.config.max_pixels}
    text = lvlm.family.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, _ = process_vision_info(messages, image_patch_size=lvlm.family.processor.image_processor.patch_size)
    return lvlm.family.processor(text=[text], images=images, return_tensors="pt")


@torch.inference_mode()
def plain_tokens(lvlm: LocalLvlm, prompt, style: str = "interleaved", **settings) -> list[int]:
    inputs = plain_inputs(lvlm, prompt, style)
    settings = {"max_new_tokens": 5, "num_beams": 1, "do_sample": False, **settings}
    return lvlm.family.model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()


def plain_answer(lvlm: LocalLvlm, prompt, style: str = "interleaved", **settings) -> str:
    return lvlm.family.tokenizer.decode(plain_tokens(lvlm, prompt, style, **settings), skip_special_tokens=True)


@torch.inference_mode()
def plain_log_prob(lvlm: LocalLvlm, prompt, answer: str, style: str) -> float:
    """Summed log-softmax of the answer's tokens in one forward pass over pixels."""
    inputs = plain_inputs(lvlm, prompt, style)
    target = torch.tensor([lvlm.family.tokenizer(answer, add_special_tokens=False).input_ids])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], target], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == lvlm.family.image_token_id).int()
    logits = lvlm.family.model(**inputs).logits[0, -target.shape[1] - 1 : -1]
    return float(logits.float().log_softmax(-1).gather(-1, target.T).sum())
