"""Every family against the library's own way, written anew: one prompt at a time, in float32 on the CPU."""

import copy
import dataclasses
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, write_family
from lvlm_helpers import local_lvlm, without_images

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.data import Example, open_image
from lever_lm.lvlm import build_prompt
from lever_lm.lvlm.backend import load_local
from lever_lm.lvlm.generic import Generic
from lever_lm.lvlm.local import LocalLvlm
from lever_lm.lvlm.qwen3_vl import Qwen3VL
from lever_lm.utils.transformers_compat import import_transformers

PROMPTS, FEWER = 60, 12
SHORT = {"max_new_tokens": 4}
OWN = {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}  # over the generation config's
QWEN = [name for name in FAMILIES if name.startswith("qwen") and name != "qwen3_5"]  # the fast path's
SPOKEN = ("smolvlm", "idefics2", "idefics3", "llava", "llava_next")  # an answer begins after `Assistant: `
FURTHER = ("qwen3_5", "idefics2", "llava_next", "mistral3", "aya_vision", "paddleocr_vl")  # never with all prompts
ALL = [pytest.param(name, PROMPTS, marks=pytest.mark.slow) for name in FAMILIES if name not in FURTHER]
ANSWERS = ("three", "a blue circle of paper", "1")


@pytest.fixture(scope="module")
def prompts(digits, tmp_path_factory):
    """Prompts of 0 to 4 shots, with digits cut and resized to many sizes."""
    rng, folder, examples = random.Random(11), tmp_path_factory.mktemp("pictures"), []
    for number in range(20):
        digit = rng.choice(digits.train_examples)
        picture = open_image(digit.image).resize([rng.randint(30, 130) for _ in "wh"])
        if number % 3 == 0:
            picture = picture.crop((0, 0, picture.width // 2 + 15, picture.height))
        picture.save(folder / f"{number}.png")
        answers = (ANSWERS[number % 3],) * 10
        asked = f"{digit.question} ({number})"
        examples.append(Example(number, number, asked, answers, answers, str(folder / f"{number}.png")))
    picks = [(rng.sample(examples[:15], i % 5), examples[15 + rng.randrange(5)]) for i in range(PROMPTS)]
    return [build_prompt(icds, query, PromptConfig()) for icds, query in picks]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function from a family's name to its folder."""
    folder, found = tmp_path_factory.mktemp("families"), {}
    return lambda name: found.setdefault(name, folder / name if name in found else write_family(name, folder / name))


def style_of(name: str) -> str:
    """Templates of LLaVA put the images of a turn first."""
    return "dialogue" if "llava" in name else "interleaved"


def load(name: str, folder, **settings):
    config = LvlmConfig(**{"path": str(folder), "dtype": "float32", "batch_size": 8, **SHORT, **settings})
    return load_local(config, PromptConfig(style=style_of(name)), "cpu")


def changed(ours: LocalLvlm, **settings) -> LocalLvlm:
    """The same loaded model with other settings of how it is asked."""
    config, family = dataclasses.replace(ours.config, **settings), copy.copy(ours.family)
    family.config = config
    return LocalLvlm(family, config, ours.prompt)


# ---------------------------------------------------------------------- the library's own way


def resized(picture, name: str):
    """A picture as qwen_vl_utils resizes it for a Qwen, which is how the fast path does."""
    import_transformers()
    from qwen_vl_utils import fetch_image

    budget = {"min_pixels": LvlmConfig.min_pixels, "max_pixels": LvlmConfig.max_pixels}
    return fetch_image({"image": picture, **budget}, 16 if "qwen3" in name else 14)


def conversation(prompt, name: str) -> list[dict]:
    """A conversation with its images in it, as a user of the library would write it."""
    style, show = style_of(name), resized if name in QWEN else lambda picture, _: picture
    user, turns = [], [{"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]}]
    for example in (*prompt.icds, prompt.query):
        shown = [] if example.image is None else [{"type": "image", "image": show(open_image(example.image), name)}]
        text, last = f"Question: {example.question} Short answer:", example is prompt.query
        if style == "interleaved" and not last:
            user += [*shown, {"type": "text", "text": f"{text} {example.answer}\n"}]
            continue
        turns.append({"role": "user", "content": [*user, *shown, {"type": "text", "text": text}]})
        if not last:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": example.answer}]})
    return turns


@pytest.fixture(scope="module")
def plain(made, prompts):
    """A function from a family's name to the library's model of it, its processor, and the inputs of the first prompts,
    FEWER or so many."""
    library, found = import_transformers(), {}

    def of(name: str, count: int = FEWER):
        if name not in found:
            folder = made(name)
            processor = library.AutoProcessor.from_pretrained(folder)
            model = library.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
            found[name] = SimpleNamespace(model=model, processor=processor, inputs=[])
        one = found[name]
        one.inputs += [plain_inputs(one.processor, prompt, name) for prompt in prompts[len(one.inputs) : count]]
        return one

    return of


def plain_inputs(processor, prompt, name: str) -> dict:
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template([conversation(prompt, name)], **options)


@torch.inference_mode()
def written(plain, inputs, beams: int, **settings) -> str:
    options = {**SHORT, **OWN, "num_beams": beams, **settings}
    tokens = plain.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return plain.processor.tokenizer.decode(tokens, skip_special_tokens=True)


@torch.inference_mode()
def log_probs(plain, inputs, answer: str, ends: str) -> tuple[float, float]:
    """The summed log-softmax of an answer's tokens in one forward pass, without and with the token that ends it."""
    tokenizer = plain.processor.tokenizer
    target = torch.tensor([tokenizer(answer + ends, add_special_tokens=False).input_ids])
    grown = dict(inputs, input_ids=torch.cat([inputs["input_ids"], target], 1))
    for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in grown:
            grown[name] = torch.cat([grown[name], torch.full_like(target, name == "attention_mask")], 1)
    logits = plain.model(**grown).logits[0, -target.shape[1] - 1 : -1]
    found = logits.log_softmax(-1).gather(-1, target.T)[:, 0]
    return float(found[:-1].sum()), float(found.sum())


# ---------------------------------------------------------------------- every family


@pytest.mark.parametrize(("name", "count"), [*((name, FEWER) for name in FAMILIES), *ALL])
def test_answers_and_log_probs_are_the_librarys_own(name, count, made, plain, prompts):
    library, greedy = plain(name, count), load(name, made(name))
    beams = changed(greedy, num_beams=3)
    assert isinstance(greedy.family, Generic) == (name not in QWEN)
    asked, inputs = prompts[:count], library.inputs[:count]
    answers = greedy.generate(asked)
    assert answers == [written(library, one, 1) for one in inputs]
    assert len(set(answers)) > count / 2, "prompts that all get the same answer prove nothing"
    searched = beams.generate(asked)
    assert searched == [written(library, one, 3) for one in inputs]
    assert searched != answers

    rel = 1e-5 if name == "qwen3_5" else 1e-6  # its linear attention sums in chunks, which padding moves
    texts, close = [ANSWERS[i % 3] for i in range(count)], partial(pytest.approx, rel=rel, abs=1e-5)
    ends = {"gemma3": "<end_of_turn>", "idefics2": "<end_of_utterance>"}.get(name, greedy.family.tokenizer.eos_token)
    lead = " " if name in SPOKEN else ""
    found = [log_probs(library, one, lead + text, ends) for one, text in zip(inputs, texts, strict=True)]
    for end in (False, True):
        assert greedy.answer_log_prob(asked, texts, end=end) == close([pair[end] for pair in found])

    some = slice(0, 5)  # one of each number of shots
    one_by_one = changed(greedy, batch_size=1)
    assert one_by_one.generate(asked[some]) == answers[some]
    assert changed(beams, batch_size=1).generate(asked[some]) == searched[some]
    assert one_by_one.answer_log_prob(asked[some], texts[some], end=True) == close([pair[1] for pair in found[some]])


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_with_fewer_images_than_examples_or_none_share_a_batch_with_others(name, made, plain, prompts):
    ours, library = load(name, made(name)), plain(name)
    blind = without_images(prompts[4])
    none = dataclasses.replace(blind, query=dataclasses.replace(blind.query, image=None))
    mixed = [none, prompts[4], blind, *prompts[:3]]
    found = [written(library, plain_inputs(library.processor, prompt, name), 1) for prompt in mixed]
    assert ours.generate(mixed) == found
    assert ours.generate([none]) == found[:1]


@pytest.mark.parametrize("name", ["gemma3", "idefics3", "llava_onevision"])
def test_answers_depend_on_the_images_and_on_their_order(name, made, prompts):
    ours = load(name, made(name))
    some = [prompt for prompt in prompts if len(prompt.icds) == 4]
    turned = [
        dataclasses.replace(
            prompt,
            icds=tuple(
                dataclasses.replace(e, image=o.image) for e, o in zip(prompt.icds, prompt.icds[::-1], strict=True)
            ),
        )
        for prompt in some
    ]
    pairs = list(zip(ours.generate(some), ours.generate(turned), strict=True))
    assert sum(a != b for a, b in pairs) > len(pairs) / 2


@pytest.mark.parametrize(("name", "beams", "penalty"), [("llava", 1, 1.5), ("gemma3", 3, 1.2)])
def test_a_repetition_penalty_is_that_of_plain_generate_and_knows_no_padding(
    name, beams, penalty, made, plain, prompts
):
    usual, library = load(name, made(name), num_beams=beams), plain(name)
    ours = changed(usual, repetition_penalty=penalty)
    answers = ours.generate(prompts[:FEWER])
    assert answers == [written(library, one, beams, repetition_penalty=penalty) for one in library.inputs[:FEWER]]
    assert answers != usual.generate(prompts[:FEWER])


def test_a_length_penalty_is_that_of_plain_generate(made, plain, prompts):
    library, asked = plain("idefics2", 20), slice(0, 20)
    ours = load("idefics2", made("idefics2"), num_beams=3)
    short, long = (changed(ours, length_penalty=penalty).generate(prompts[asked]) for penalty in (-3.0, 3.0))
    assert short == [written(library, one, 3, length_penalty=-3.0) for one in library.inputs[asked]]
    assert short != long


# ---------------------------------------------------------------------- the fast path


def test_the_generic_path_answers_as_a_fast_one(digits):
    """Of images that need no resizing: the fast path resizes by PIL, as qwen_vl_utils does, the processor by torch."""
    rng = random.Random(3)
    picks = [(rng.sample(digits.train_examples, i % 5), rng.choice(digits.val_examples)) for i in range(FEWER)]
    prompts = [build_prompt(icds, query, PromptConfig()) for icds, query in picks]
    for beams in (1, 3):
        fast, generic = local_lvlm(num_beams=beams), local_lvlm(num_beams=beams, family="generic")
        assert fast.generate(prompts) == generic.generate(prompts)
    for end in (False, True):
        scores = fast.answer_log_prob(prompts, ["three"] * len(prompts), end=end)
        assert generic.answer_log_prob(prompts, ["three"] * len(prompts), end=end) == pytest.approx(scores, abs=2e-5)
    assert fast.family.vision.tokens(prompts[0].images[0]) + 2 == generic.family.vision.tokens(prompts[0].images[0])


def test_deeper_features_are_a_part_of_what_qwen3_vl_is_shown(made, prompts, monkeypatch):
    ours, asked = load("qwen3_vl", made("qwen3_vl")), prompts[:FEWER]
    answers, shown = ours.generate(asked), Qwen3VL._shown
    monkeypatch.setattr(Qwen3VL, "_shown", lambda *args: (shown(*args)[0], {}))
    assert sum(a != b for a, b in zip(ours.generate(asked), answers, strict=True)) > FEWER / 2
