"""What is shipped: small, loadable by the libraries' own means, in the official layout."""

import json
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from lever_lm.config.load import resolve
from lever_lm.data import load_dataset
from lever_lm.lvlm import build_prompt, cut_answer
from lever_lm.lvlm.backend import load_local
from lever_lm.tasks import TASKS
from lever_lm.utils.paths import PACKAGE, asset_path
from lever_lm.utils.transformers_compat import import_transformers

ASSETS = PACKAGE / "assets"
MEGABYTE = 2**20


def test_nothing_shipped_is_code():
    suffixes = {path.suffix for path in ASSETS.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jpg", ".safetensors", ".jinja", ".md"}


@pytest.mark.parametrize(("asset", "kind"), [("tiny-qwen2.5-vl", "Qwen2_5_VL"), ("tiny-qwen3-vl", "Qwen3VL")])
def test_the_tiny_lvlms_are_qwens_with_their_own_processors(asset, kind):
    transformers = import_transformers()
    folder = asset_path(f"asset:{asset}")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2 * MEGABYTE
    made = getattr(transformers, f"{kind}ForConditionalGeneration")
    model, info = made.from_pretrained(folder, output_loading_info=True)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(processor).__name__ == f"{kind}Processor"
    assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())
    vocabulary = processor.tokenizer.get_vocab()
    assert vocabulary["<|image_pad|>"] == model.config.image_token_id
    assert vocabulary["<|im_end|>"] == model.generation_config.eos_token_id
    assert len(processor.tokenizer) <= model.config.get_text_config().vocab_size


def test_the_tiny_clip_is_a_clip_model_with_its_own_processor():
    transformers = import_transformers()
    folder = asset_path("asset:tiny-clip")
    model, info = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())
    assert len(processor.tokenizer) <= model.config.text_config.vocab_size


def test_the_chat_template_writes_the_qwen_form():
    processor = import_transformers().AutoProcessor.from_pretrained(asset_path("asset:tiny-qwen2.5-vl"))
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "Seven."},
        {"role": "user", "content": "Sure?"},
    ]
    assert processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
        "<|im_start|>assistant\nSeven.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    finished = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=False)
    assert finished.endswith("Sure?<|im_end|>\n")


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_digits_files_have_the_official_schema(split):
    folder = ASSETS / "digits"
    questions = json.loads((folder / f"OpenEnded_mscoco_{split}2014_questions.json").read_text())
    annotations = json.loads((folder / f"mscoco_{split}2014_annotations.json").read_text())
    assert set(questions) == {"info", "license", "data_type", "data_subtype", "task_type", "questions"}
    assert {"info", "license", "data_type", "data_subtype", "annotations"} <= set(annotations)
    assert questions["task_type"] == "Open-Ended"
    assert questions["data_type"] == annotations["data_type"] == "mscoco"
    assert questions["data_subtype"] == annotations["data_subtype"] == f"{split}2014"
    asked = {question["question_id"]: question for question in questions["questions"]}
    answered = {annotation["question_id"]: annotation for annotation in annotations["annotations"]}
    assert len(asked) == len(questions["questions"]) == len(annotations["annotations"])
    assert asked.keys() == answered.keys()
    for number, question in asked.items():
        annotation = answered[number]
        assert set(question) == {"image_id", "question", "question_id"}
        assert annotation["image_id"] == question["image_id"]
        assert set(annotation) >= {"question_type", "answer_type", "answers", "image_id", "question_id"}
        assert annotation["question_type"] in annotations["question_types"]
        assert [answer["answer_id"] for answer in annotation["answers"]] == list(range(1, 11))
        for answer in annotation["answers"]:
            assert set(answer) == {"answer_id", "answer", "raw_answer", "answer_confidence"}
            assert answer["answer"].strip()
            assert answer["answer_confidence"] in ("yes", "maybe", "no")


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_image_of_the_digits_is_there_readable_and_asked_about(split):
    folder = ASSETS / "digits"
    questions = json.loads((folder / f"OpenEnded_mscoco_{split}2014_questions.json").read_text())["questions"]
    wanted = {f"COCO_{split}2014_{question['image_id']:012d}.jpg" for question in questions}
    assert {path.name for path in (folder / f"{split}2014").iterdir()} == wanted
    for name in sorted(wanted)[::25]:
        with Image.open(folder / f"{split}2014" / name) as image:
            image.load()
            assert image.format == "JPEG"


def test_the_two_splits_share_no_question_and_no_image(digits):
    for key in ("question_id", "image_id"):
        train, val = ({getattr(e, key) for e in examples} for examples in (digits.train_examples, digits.val_examples))
        assert not train & val
    assert len(digits.val_examples) >= 400, "the demo's table is about 400 queries or more"
    shared = Counter(example.image_id for example in digits.train_examples)
    assert max(shared.values()) > 1, "some questions share an image, as in OK-VQA"


def test_the_source_of_the_digits_is_attributed():
    text = (ASSETS / "digits" / "ATTRIBUTION.md").read_text()
    assert "UCI" in text
    assert "CC BY 4.0" in text or "Creative Commons Attribution 4.0" in text


def test_each_model_has_fewer_than_a_million_parameters():
    for name in ("tiny-clip", "tiny-qwen2.5-vl"):
        with safe_open(asset_path(f"asset:{name}") / "model.safetensors", "pt") as weights:
            assert 100_000 < sum(math.prod(weights.get_slice(key).get_shape()) for key in list(weights.keys())) < 1e6


def is_smudged(split, image) -> bool:
    """Pale and blurred: the grey values of clean digits scatter by 70 and more."""
    path = ASSETS / f"digits/{split}2014/COCO_{split}2014_{image:012d}.jpg"
    return np.asarray(Image.open(path).convert("L"), dtype=float).std() < 65


@pytest.mark.parametrize("split", ["train", "val"])
def test_two_of_five_images_are_smudged(digits, split):
    rows = digits.train_examples if split == "train" else digits.val_examples
    smudged = [is_smudged(split, image) for image in sorted({row.image_id for row in rows})]
    assert np.mean(smudged) == pytest.approx(0.4, abs=0.01)


def test_the_tutorials_query_is_smudged_and_its_picks_are_not():
    assert is_smudged("val", 10)
    assert [is_smudged("train", image) for image in (1227, 556, 93, 684)] == [False] * 4


# ---------------------------------------------------------------------- digits_sets


def sets_split(split) -> dict[int, tuple[str, list[str]]]:
    """question_id → (style, the ten answers) of digits_sets."""
    content = json.loads((ASSETS / f"digits_sets/mscoco_{split}2014_annotations.json").read_text())["annotations"]
    return {a["question_id"]: (a["question_type"], [answer["answer"] for answer in a["answers"]]) for a in content}


def sets_code() -> tuple[dict[str, str], dict[int, tuple[str, str]]]:
    """The first syllable of each style, which most of all its answers have; and question_id → (style, second syllable)
    of the evaluation, whose labels are right."""
    written, asked = defaultdict(Counter), {}
    for style, answers in (*sets_split("train").values(), *sets_split("val").values()):
        written[style].update(answer.split()[0] for answer in answers)
    for number, (style, answers) in sets_split("val").items():
        asked[number] = (style, Counter(answers).most_common(1)[0][0].split()[1])
    return {style: counts.most_common(1)[0][0] for style, counts in written.items()}, asked


def test_the_sister_world_is_at_most_6_mb_and_asks_about_the_images_of_digits(digits):
    folders = ("digits_sets", "tiny-clip-sets", "tiny-qwen2.5-vl-sets")
    sizes = [path.stat().st_size for name in folders for path in (ASSETS / name).iterdir()]
    assert sum(sizes) <= 6 * MEGABYTE
    data = load_dataset(resolve({"dataset": "digits_sets"}, None, [], {})[0].data)
    assert (len(data.train_examples), len(data.val_examples)) == (800, 500)
    for ours, theirs in ((data.train_examples, digits.train_examples), (data.val_examples, digits.val_examples)):
        assert {e.image for e in ours} <= {e.image for e in theirs}


def test_no_training_example_of_the_sister_world_shares_style_and_digit_with_another_or_with_a_query():
    firsts, asked = sets_code()
    assert len(set(firsts.values())) == len(firsts) == 100
    assert len({second for _, second in asked.values()}) == 10
    options = []
    for style, answers in sets_split("train").values():
        # Where most annotators are misled, two others give the right word; a slip is seldom made by two alike.
        given = [(count, word.split()) for word, count in Counter(answers).items() if count > 1]
        options.append((style, [second for _, (first, second) in sorted(given) if first == firsts[style]]))
    taken = set(asked.values())
    for style, seconds in sorted(options, key=lambda option: len(option[1])):  # what can be one digit only comes first
        free = [second for second in seconds if (style, second) not in taken]
        assert free
        taken.add((style, free[0]))
    assert len(options) == 800


def test_the_sister_world_answers_a_pair_and_nothing_less():
    """One demonstration of the style and one of the digit are right for most of 40 queries, either alone for few."""
    config = resolve({"dataset": "digits_sets"}, None, [], {})[0]
    data, (firsts, asked), styles = load_dataset(config.data), sets_code(), sets_split("train")
    of_style, of_digit = {}, {}
    for example in data.train_examples:
        style, (first, second) = styles[example.question_id][0], example.answer.split()
        if example.answers.count(example.answer) > 8:  # no annotator was misled
            assert first == firsts[style]
            of_style[style] = of_digit[second] = example
    queries = [query for query in data.val_examples if asked[query.question_id][0] in of_style][:40]
    shown = {"pair": [], "style": [], "digit": []}
    for query in queries:
        style, second = asked[query.question_id]
        pair = (of_style[style], of_digit[second])
        for name, icds in (("pair", pair), ("style", pair[:1]), ("digit", pair[1:])):
            shown[name].append(build_prompt(icds, query, config.prompt))
    lvlm, right = load_local(config.lvlm, config.prompt, "cpu"), {}
    for name, prompts in shown.items():
        scores = zip(map(cut_answer, lvlm.generate(prompts)), queries, strict=True)
        right[name] = np.mean([TASKS["vqa"].score(text, query) for text, query in scores])
    assert right["pair"] > 0.9
    assert max(right["style"], right["digit"]) < 0.1


def test_a_dataset_that_brings_its_own_lvlm_is_answered_by_it_unless_another_is_named(lever):
    for options, path in (((), "asset:tiny-qwen2.5-vl-sets"), (("--lvlm", "tiny_qwen2.5_vl"), "asset:tiny-qwen2.5-vl")):
        shown = lever("config", "show", "--json", "--dataset", "digits_sets", *options)
        assert shown.json["config"]["lvlm"]["path"] == path
