"""Prompts: the order of the picks, the conversation as the shipped chat template writes it, where an answer ends."""

import dataclasses

import pytest
from lvlm_helpers import FIRST, QUERY, SECOND, VISION

from lever_lm.config.schema import PromptConfig
from lever_lm.lvlm import build_prompt, cut_answer
from lever_lm.lvlm.prompt import to_messages, wording
from lever_lm.utils.paths import asset_path
from lever_lm.utils.transformers_compat import import_transformers

SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"


@pytest.fixture(scope="module")
def processor():
    return import_transformers().AutoProcessor.from_pretrained(asset_path("asset:tiny-qwen2.5-vl"))


def rendered(processor, picks, **settings) -> str:
    config = PromptConfig(system="Be brief.", **settings)
    messages = to_messages(build_prompt(picks, QUERY, config), config)
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_the_first_pick_stands_nearest_the_query_by_default():
    prompt = build_prompt([FIRST, SECOND], QUERY, PromptConfig())
    assert prompt.icds == (SECOND, FIRST)
    assert prompt.images == ["2.jpg", "1.jpg", "9.jpg"]


def test_first_pick_first_keeps_the_order_of_the_picks():
    prompt = build_prompt([FIRST, SECOND], QUERY, PromptConfig(order="first_pick_first"))
    assert prompt.icds == (FIRST, SECOND)
    assert prompt.images == ["1.jpg", "2.jpg", "9.jpg"]


def test_interleaved_is_one_user_turn(processor):
    assert rendered(processor, [FIRST, SECOND], style="interleaved") == (
        f"{SYSTEM}<|im_start|>user\n"
        f"{VISION}Question: is it even? Short answer: no\n"
        f"{VISION}Question: what digit is it? Short answer: three\n"
        f"{VISION}Question: which comes next? Short answer:<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_dialogue_is_one_turn_per_demonstration(processor):
    assert rendered(processor, [FIRST, SECOND], style="dialogue", order="first_pick_first") == (
        f"{SYSTEM}"
        f"<|im_start|>user\n{VISION}Question: what digit is it? Short answer:<|im_end|>\n"
        "<|im_start|>assistant\nthree<|im_end|>\n"
        f"<|im_start|>user\n{VISION}Question: is it even? Short answer:<|im_end|>\n"
        "<|im_start|>assistant\nno<|im_end|>\n"
        f"<|im_start|>user\n{VISION}Question: which comes next? Short answer:<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("style", ["interleaved", "dialogue"])
def test_without_demonstrations_only_the_question_is_asked(processor, style):
    assert rendered(processor, [], style=style) == (
        f"{SYSTEM}<|im_start|>user\n{VISION}Question: which comes next? Short answer:<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_demonstration_without_an_image_is_text_alone(processor):
    blind = dataclasses.replace(FIRST, image=None)
    assert build_prompt([blind, SECOND], QUERY, PromptConfig()).images == ["2.jpg", "9.jpg"]
    assert rendered(processor, [blind, SECOND]) == rendered(processor, [FIRST, SECOND]).replace(
        f"{VISION}Question: what digit", "Question: what digit"
    )
    assert "<|im_start|>user\nQuestion: what digit is it? Short answer:<|im_end|>" in rendered(
        processor, [blind, SECOND], style="dialogue"
    )


@pytest.mark.parametrize("style", ["interleaved", "dialogue"])
def test_a_bare_prompt_asks_the_question_alone(processor, style):
    config = PromptConfig(system="Be brief.", style=style)
    prompt = dataclasses.replace(build_prompt([], QUERY, config), bare=True)
    text = processor.apply_chat_template(to_messages(prompt, config), tokenize=False, add_generation_prompt=True)
    assert text == rendered(processor, [], style=style).replace(
        "Question: which comes next? Short answer:", "which comes next?"
    )


@pytest.mark.parametrize("style", ["interleaved", "dialogue"])
def test_without_a_system_text_there_is_no_system_turn_and_a_template_may_write_its_own(processor, style):
    """Qwen2.5-VL's does: an empty text gives what its default gives."""
    silent = PromptConfig(system="", style=style)
    prompt = build_prompt([FIRST], QUERY, silent)
    assert [turn["role"] for turn in to_messages(prompt, silent)][:1] == ["user"]
    text, usual = (
        processor.apply_chat_template(to_messages(prompt, config), tokenize=False, add_generation_prompt=True)
        for config in (silent, PromptConfig(style=style))
    )
    assert text == usual
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")


def test_answers_to_an_empty_system_turn_are_not_taken_for_those_without_one():
    before = {name: value for name, value in vars(PromptConfig(system="")).items() if name != "cut"}
    assert wording(PromptConfig(system="")) == {**before, "system": None}
    assert wording(PromptConfig()) == {**before, "system": PromptConfig.system}


def test_the_demonstrated_answer_is_the_commonest_of_the_annotators(processor):
    split = dataclasses.replace(FIRST, answers=("two", "four", "four", "two", "four", "one"))
    assert "Short answer: four\n" in rendered(processor, [split])


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("three", "three"),
        ("  three ", "three"),
        ("\n three", "three"),
        ("three\nfour", "three"),
        ("three, four", "three"),
        ("1,000", "1,000"),
        ("three Question: what", "three"),
        ("threeAnswer: four", "three"),
        ("three Short answer: four", "three"),
        ("three short Answer: four", "three"),
        ("question mark", "question mark"),
        ("Question: what", ""),
        ("hot dog.", "hot dog."),
        ("Shorts", "Shorts"),
        ("Shortstop", "Shortstop"),
        ("Short sleeve", "Short sleeve"),
        ("Answering machine", "Answering machine"),
        ("Questionnaire", "Questionnaire"),
        ("a Question", "a Question"),
        ("Answer: cat", "cat"),
        ("Answer: Shorts Question: what", "Shorts"),
        ("Short answer: 1,000", "1,000"),
        ("\nAnswer:\nShort answer: cat\ndog", "cat"),
        ("Answer: Question: what", ""),
        ("Answer:", ""),
        ("12:30 pm", "12:30 pm"),
        ("", ""),
    ],
)
def test_an_answer_ends_where_the_model_goes_on_with_something_else(written, answer):
    assert cut_answer(written) == answer


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("Shorts", ""),
        ("red Shorts", "red"),
        ("Answer: cat", ""),
        ("a Questionnaire", "a"),
        ("question: what", "question: what"),
        ("\n three, four", "three"),
        ("three\nfour", "three"),
    ],
)
def test_the_classic_rule_ends_an_answer_within_a_word(written, answer):
    assert cut_answer(written, "classic") == answer


def test_a_comma_ends_no_answer_where_answers_hold_one():
    assert cut_answer("red, white, and blue Question: what", "line") == "red, white, and blue"
    assert cut_answer("red, white", "turn") == "red"
