"""The generic path: what is refused and why, options of processors, numbers that are not finite, lengths and memory."""

import dataclasses
import json
import math
import random
import re
import shutil

import PIL.Image
import pytest
import torch
from families import write_family
from models import TINY, edited, put, without

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.data import Example, open_image
from lever_lm.lvlm import build_prompt
from lever_lm.lvlm.backend import load_local
from lever_lm.lvlm.checks import check_lvlm
from lever_lm.lvlm.decoding import NotFinite
from lever_lm.lvlm.families import family_of
from lever_lm.lvlm.generic import Watch
from lever_lm.lvlm.local import local_fingerprint
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.paths import asset_path
from lever_lm.utils.transformers_compat import import_transformers

ONE_IMAGE = "{% for m in messages %}{% for p in m.content if p.type == 'image' %}"
ONE_IMAGE += "{% if loop.first %}<IMG_CONTEXT>{% endif %}{% endfor %}"
ONE_IMAGE += "{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
FIRST = "{% for m in messages %}{% for p in m.content if p.type == 'image' %}<IMG_CONTEXT>{% endfor %}"
FIRST += "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
BLIND = "{% for m in messages %}{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
OF_ONE_TEXT = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function from a family's name to its folder."""
    folder, found = tmp_path_factory.mktemp("models"), {}

    def of(name: str):
        if name not in found:
            found[name] = write_family(name, folder / name)
        return found[name]

    return of


@pytest.fixture
def spoilt(models, tmp_path):
    """A function that copies a tiny InternVL: its folder."""

    return lambda: shutil.copytree(models("internvl"), tmp_path / "spoilt")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Prompts of 0 to 3 shots with drawn images of several sizes."""
    rng, folder = random.Random(2), tmp_path_factory.mktemp("drawn")
    examples = []
    for number in range(12):
        size = (rng.randint(40, 120), rng.randint(40, 120))
        PIL.Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(folder / f"{number}.png")
        answers = (("three", "a blue circle")[number % 2],) * 10
        examples.append(Example(number, number, f"what is {number}?", answers, answers, str(folder / f"{number}.png")))
    return [build_prompt(rng.sample(examples[:8], i % 4), examples[8 + i % 4], PromptConfig()) for i in range(8)]


def load(folder, prompt: PromptConfig = PromptConfig(), **settings):
    config = LvlmConfig(**{"path": str(folder), "dtype": "float32", "batch_size": 8, **settings})
    return load_local(config, prompt, "cpu")


def refusal(folder, prompt: PromptConfig = PromptConfig(), **settings) -> str:
    """What is said of a model, by its loading and by the doctor, in one line and before its weights are read."""
    weights = folder / "model.safetensors"
    weights.write_bytes(b"not read")
    with pytest.raises(LeverError) as caught:
        load(folder, prompt, **settings)
    said = str(caught.value)
    assert "\n" not in said
    (check,) = check_lvlm(LvlmConfig(path=str(folder), **settings), prompt, scored=False, wait=0, say=print)
    assert check.status == "missing"
    assert f"{check.found}: {check.mend}" == said
    return said


# ---------------------------------------------------------------------- models that are refused


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "qwen3"}, ["spoilt: transformers 5", "no model of images and text for its model_type 'qwen3'"]),
        ({"model_type": "clip"}, ["no model of images and text for its model_type 'clip'", "lvlm.path"]),
        ({"model_type": "newest_vl"}, ["does not know its model_type 'newest_vl'", "pip install -U transformers"]),
        (
            {"model_type": "internvl_chat", "auto_map": {"AutoModel": "modeling.InternVLChat"}},
            ["model_type 'internvl_chat' needs code of its own (auto_map in config.json), which is never run", "-hf"],
        ),
        ({"model_type": None}, ["its config.json cannot be read, or names no model_type", "fetch it again"]),
    ],
)
def test_a_model_that_the_library_has_no_class_of_images_and_text_for_is_refused(spoilt, config, words):
    said = refusal(edited(spoilt(), "config.json", **config))
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama"}, "no model of images and text for its model_type 'llama'"),
        ({"model_type": "my_vlm", "auto_map": {"AutoModel": "mine.Mine"}}, "needs code of its own"),
    ],
)
def test_a_model_of_another_kind_is_not_said_to_lack_an_image_processor(tmp_path, config, words):
    """A text-only model as it is on a disk: whole, and without what no such model has."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((asset_path("asset:tiny-qwen2.5-vl") / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = refusal(tmp_path)
    assert words in said
    assert "lacks" not in said


def test_code_that_comes_with_a_model_is_not_run_where_the_library_has_its_class(spoilt, prompts):
    folder = edited(spoilt(), "config.json", auto_map={"AutoModelForImageTextToText": "modeling.Mine"})
    put(folder, "modeling.py", "raise SystemExit('run')")
    assert load(folder).generate(prompts[:1])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, ["it has no chat template, as base models have none", "chat_template.jinja"]),
        (BLIND, ["its chat template shows no image"]),
        (ONE_IMAGE, ["its chat template shows one image only", "--set prompt.style=dialogue"]),
        (ONE_IMAGE.replace("loop.first", "loop.first and m == messages[1]"), ["shows one image only: name another"]),
        (OF_ONE_TEXT, ["its chat template takes messages of one text, not of parts"]),
        ("{{ raise_exception('not so') }}", ["its chat template fails: not so"]),
        (NO_SYSTEM + "{% generation", ["its chat template fails"]),
        (FIRST, ["puts the images of a turn before all its texts", "--set prompt.style=dialogue"]),
        (FIRST.replace("p.text", "p.text[:9]"), ["its chat template leaves the system text out"]),
    ],
)
def test_a_chat_template_that_is_not_for_several_images_is_refused(spoilt, template, words):
    folder = spoilt()
    if template is None:
        (folder / "chat_template.jinja").unlink()
    else:
        put(folder, "chat_template.jinja", template)
    said = refusal(folder)
    assert said.startswith(f"cannot load the LVLM {folder}: ")
    assert all(word in said for word in words), said


def test_a_chat_template_that_leaves_texts_of_a_turn_out_is_refused(spoilt):
    shows = "{% for p in m.content if p.type == 'image' %}<IMG_CONTEXT>{% endfor %}{{ m.content[-1].text }}"
    said = refusal(put(spoilt(), "chat_template.jinja", f"{{% for m in messages %}}{shows}{{% endfor %}}"))
    assert "its chat template leaves texts of a turn out: --set prompt.style=dialogue" in said


def test_a_template_that_shows_images_first_is_for_dialogues(models, prompts):
    with pytest.raises(LeverError, match=r"--set prompt\.style=dialogue"):
        load(models("llava"))
    assert load(models("llava"), PromptConfig(style="dialogue")).generate(prompts[:2])


@pytest.mark.parametrize(
    ("before", "words"),
    [(NO_SYSTEM, "refuses a system turn: System role not supported"), ("{% set messages = messages[1:] %}", "leaves")],
)
def test_a_template_without_a_system_turn_is_named_and_works_without_a_system_text(spoilt, prompts, before, words):
    folder = spoilt()
    template = (folder / "chat_template.jinja").read_text()
    if "raise" not in before:
        before = before.replace("messages[1:]", "messages[1:] if messages[0].role == 'system' else messages")
    put(folder, "chat_template.jinja", before + template)
    for style in ("interleaved", "dialogue"):
        with pytest.raises(LeverError, match=r"--set prompt\.system=") as caught:
            load(folder, PromptConfig(style=style))
        assert words in str(caught.value)
        silent = load(folder, PromptConfig(style=style, system=""))
        assert silent.generate(prompts)
        assert silent.family._text(prompts[0]).startswith("<|im_start|>user\n")


def test_a_processor_of_one_image_is_refused(spoilt, monkeypatch):
    library = import_transformers()
    call = library.InternVLProcessor.__call__

    def of_one(self, images=None, **options):
        if max(map(len, images)) > 1:
            raise ValueError("one image at a time, please")
        return call(self, images=images, **options)

    monkeypatch.setattr(library.InternVLProcessor, "__call__", of_one)
    said = refusal(spoilt())
    assert "its processor fails on a prompt of three images: one image at a time, please" in said


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json"])
def test_missing_files_of_the_processor_are_named(spoilt, name):
    with pytest.raises(LeverError, match=f"lacks {name.replace('processor_config', 'preprocessor_config')}: fetch"):
        load(without(name)(spoilt()))


def test_a_processor_that_the_library_does_not_know_is_refused(spoilt):
    said = refusal(edited(spoilt(), "processor_config.json", processor_class="NoSuchProcessor"))
    assert "cannot load the processor of the LVLM" in said
    assert "fetch its processor's files again" in said


def test_a_package_that_a_processor_needs_is_named(models, monkeypatch):
    folder = models("smolvlm")
    monkeypatch.setattr(import_transformers().models.smolvlm.processing_smolvlm, "num2words", None)
    with pytest.raises(LeverError, match=r"Package `num2words` is required .*pip install num2words.*: install it, or"):
        load(folder)


def test_a_context_too_small_for_a_prompt_names_its_question(spoilt, prompts):
    folder = spoilt()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 60
    ours = load(edited(folder, "config.json", **config))
    longest = max(prompts, key=lambda prompt: len(prompt.icds))
    for job in (ours.generate, lambda work: ours.answer_log_prob(work, ["three"])):
        with pytest.raises(LeverError, match=r"question \d+: its prompt of 4 images has \d+ tokens, the context of"):
            job([longest])


@pytest.mark.parametrize("token", ["<start_of_image>", "<image_soft_token>"])
@pytest.mark.parametrize("job", ["generate", "answer_log_prob"])
def test_a_text_that_holds_a_placeholder_is_refused_by_its_own_question(models, prompts, token, job):
    prompt = next(prompt for prompt in prompts if len(prompt.icds) == 2)
    icd = dataclasses.replace(prompt.icds[1], question_id=424242, question=f"what is {token}?")
    prompt = dataclasses.replace(prompt, icds=(prompt.icds[0], icd))
    with pytest.raises(LeverError, match=f"question 424242: {token} must not stand there"):
        getattr(load(models("gemma3")), job)([prompt], *([["three"]] if job == "answer_log_prob" else []))


def test_what_a_processor_does_not_take_names_the_question_among_others(models, prompts):
    """A token of videos, for which there are none: the library refuses the whole batch."""
    icd = dataclasses.replace(prompts[1].icds[0], question="what is <video>?")
    query = dataclasses.replace(prompts[1].query, question_id=77)
    with pytest.raises(LeverError, match=r"question 77: the processor of .*internvl does not take its prompt: "):
        load(models("internvl")).generate([prompts[0], dataclasses.replace(prompts[1], icds=(icd,), query=query)])


# ---------------------------------------------------------------------- options of the processor


def tokens(ours, prompt) -> int:
    return int(ours.family.prepare([prompt])["attention_mask"].sum())


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("internvl", "max_patches", 1),
        ("internvl", "crop_to_patches", False),
        ("aya_vision", "max_patches", 1),
        ("idefics3", "do_image_splitting", False),
        ("smolvlm", "size", {"longest_edge": 56}),
        ("mistral3", "size", {"longest_edge": 56}),
        ("paddleocr_vl", "max_pixels", 28 * 28),
    ],
)
def test_an_option_of_the_processor_makes_fewer_tokens(models, prompts, name, option, value):
    style = PromptConfig(style="dialogue")
    plain, bounded = load(models(name), style), load(models(name), style, processor={option: value})
    prompt = prompts[3]
    assert tokens(bounded, prompt) < tokens(plain, prompt)
    assert len(bounded.generate(prompts[:4])) == 4
    image = prompt.images[0]
    assert bounded.family.vision.tokens(image) < plain.family.vision.tokens(image)


def test_image_splitting_of_idefics2_counts_its_own_tokens(models, prompts):
    """Its processor counts by the image processor's own setting, whatever the call says."""
    whole, split = (load(models("idefics2"), processor={"do_image_splitting": on}) for on in (False, True))
    assert tokens(split, prompts[0]) > tokens(whole, prompts[0])
    assert split.generate(prompts[:4]) != whole.generate(prompts[:4])


@pytest.mark.parametrize(
    ("name", "option", "words"),
    [
        ("internvl", "max_patchs", ["no option 'max_patchs' (lvlm.processor)", "it has max_patches, min_patches"]),
        ("internvl", "do_image_splitting", ["no option 'do_image_splitting'"]),
        ("llava", "tiles", ["no option 'tiles'", "crop_size", "size"]),
        ("internvl", "device", ["no option 'device'"]),
    ],
)
def test_an_option_that_the_processor_does_not_know_is_refused_with_those_near_it(models, name, option, words):
    with pytest.raises(LeverError) as caught:
        load(models(name), PromptConfig(style="dialogue"), processor={option: 1})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_value_that_an_option_does_not_take_is_refused(models):
    with pytest.raises(LeverError, match=r"another value of lvlm\.processor\.max_patches=lots"):
        load(models("internvl"), processor={"max_patches": "lots"})


@pytest.mark.parametrize("job", ["generate", "answer_log_prob"])
def test_an_option_that_the_model_does_not_know_of_is_named(models, prompts, job):
    """LLaVA-NeXT has its pinpoints in the model's config as well."""
    ours = load(models("llava_next"), PromptConfig(style="dialogue"), processor={"image_grid_pinpoints": [[56, 56]]})
    with pytest.raises(
        LeverError, match=r"does not take what its processor makes .*lvlm\.processor\.image_grid_pinpoints"
    ):
        getattr(ours, job)(prompts[:2], *([["three"] * 2] if job == "answer_log_prob" else []))


def test_options_are_for_the_generic_path_in_this_process_alone():
    with pytest.raises(LeverError, match=r"lvlm\.processor\.max_pixels is taken by the generic path.*family=generic"):
        load(TINY, processor={"max_pixels": 3136})
    assert load(TINY, family="generic", processor={"max_pixels": 3136})
    with pytest.raises(UsageError, match=r"lvlm\.processor is of a model in this process"):
        LvlmConfig(server="http://a/v1", processor={"max_pixels": 3136})


@pytest.mark.parametrize("setting", [{"max_pixels": 50_000}, {"min_pixels": 784}])
def test_a_budget_of_pixels_is_refused_where_a_processor_has_none(models, setting):
    name = next(iter(setting))
    with pytest.raises(
        LeverError, match=f"no budget of pixels, found lvlm.{name}: leave it out, .*lvlm.processor: .*size"
    ):
        load(models("internvl"), **setting)


def test_a_budget_of_pixels_is_that_of_processors_that_have_one(models, prompts):
    shown = [image for prompt in prompts for image in prompt.images]
    image = max(shown, key=lambda image: math.prod(open_image(image).size))
    own, bounded = load(models("paddleocr_vl")), load(models("paddleocr_vl"), max_pixels=4000)
    assert bounded.family.vision.tokens(image) < own.family.vision.tokens(image)
    assert own.family.options == {}, "Qwen's defaults are no other model's"
    small, large = (load(TINY, family="generic", min_pixels=784, max_pixels=28 * 28 * most) for most in (4, 16))
    assert 4 + 2 >= small.family.vision.tokens(image) < large.family.vision.tokens(image) <= 16 + 2


def test_the_generic_path_names_the_model_types_of_others(models):
    with pytest.raises(LeverError, match=r"lvlm.family=qwen3_vl does not know the model_type 'internvl'.*auto"):
        load(models("internvl"), family="qwen3_vl")
    of = {name: family_of(LvlmConfig(), models(name)) for name in ("qwen2_vl", "qwen3_vl", "gemma3")}
    assert of == {"qwen2_vl": "qwen2_5_vl", "qwen3_vl": "qwen3_vl", "gemma3": "generic"}


# ---------------------------------------------------------------------- fingerprints


def test_family_and_options_are_in_the_fingerprint_where_they_change_an_answer(models, tmp_path):
    def stamp(path, **settings):
        return local_fingerprint(LvlmConfig(path=str(path), **settings), PromptConfig(), "cpu")

    assert stamp(TINY) == stamp(TINY, family="qwen2_5_vl")
    folder = models("internvl")
    assert stamp(folder) == stamp(folder, family="generic")
    different = [
        stamp(TINY),
        stamp(TINY, family="generic"),
        stamp(TINY, family="generic", processor={"max_pixels": 3136}),
        stamp(folder),
        stamp(folder, processor={"max_patches": 1}),
        stamp(folder, processor={"max_patches": 2}),
        stamp(folder, processor={"size": {"height": 56, "width": 56}}),
    ]
    assert len(set(different)) == len(different)


# ---------------------------------------------------------------------- numbers, lengths, memory


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_name_the_question(models, prompts, beams, when, bad):
    ours = load(models("llava"), PromptConfig(style="dialogue"), num_beams=beams)
    place, calls = 3, []
    ours.generate(prompts)  # before
    longest_first = ours.batches(prompts)[0]

    def spoil(module, args, logits):
        calls.append(1)
        if len(calls) == when + 1:
            logits[place * (len(logits) // len(prompts)), -1, 5] = bad
        return logits

    ours.family.model.lm_head.register_forward_hook(spoil)
    with pytest.raises(LeverError) as caught:
        ours.generate(prompts)
    question = prompts[longest_first[place]].query.question_id
    assert str(caught.value).startswith(f"question {question}: {ours.config.path} in float32 gives its prompt logits")


def test_log_probs_that_are_not_finite_name_the_question(models, prompts):
    ours = load(models("internvl"))
    ours.family.model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(1, torch.tensor(0), math.nan)
    )
    with pytest.raises(LeverError, match=r"question \d+: .* gives its prompt log-probs that are NaN or infinite"):
        ours.answer_log_prob(prompts, ["three"] * len(prompts))


def test_a_penalty_sees_a_token_of_the_prompt_in_place_of_padding():
    """Where the padding is the token that ends an answer, that one would be punished."""
    ids, mask, seen = torch.tensor([[0, 0, 7], [4, 5, 6]]), torch.tensor([[0, 0, 1], [1, 1, 1]]), []
    watch = Watch(ids, mask, 2, torch.tensor([0]), lambda written, scores: seen.append(written.tolist()) or scores)
    written = torch.tensor([[1], [2], [3], [4]])
    watch(torch.cat([ids.repeat_interleave(2, 0), written], 1), torch.zeros(4, 9))
    assert seen == [[[7, 7, 7, 1], [7, 7, 7, 2], [4, 5, 6, 3], [4, 5, 6, 4]]]


def test_what_comes_after_the_end_of_an_answer_does_not_count():
    ids, scores = torch.tensor([[4, 5], [4, 6], [4, 7]]), torch.zeros(3, 9)
    watch = Watch(ids, torch.ones_like(ids), 1, torch.tensor([0]), None)
    scores[1, 3] = -math.inf  # a token that cannot come is no fault
    watch(ids, scores)
    watch.check()
    watch(torch.cat([ids, torch.tensor([[0], [1], [2]])], 1), scores.index_fill(0, torch.tensor([0, 2]), math.nan))
    with pytest.raises(NotFinite) as caught:
        watch.check()
    assert caught.value.places == [2]


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl", "idefics3", "llava_onevision", "gemma3"])
def test_prompts_are_as_long_as_they_are_taken_for(models, prompts, name):
    ours = load(models(name), PromptConfig(style="dialogue"), family="generic")
    for prompt in prompts:
        if len(prompt.images) > 1:  # LLaVA-OneVision shows one image alone in more tiles
            assert ours._length(prompt, None) == pytest.approx(tokens(ours, prompt), rel=0.35)
    counted = []
    ours.family.vision._count = lambda size: counted.append(size) or 3
    assert ours.family.vision.tokens(prompts[0].images[0]) == 3
    assert counted == [open_image(prompts[0].images[0]).size]


def test_a_size_is_counted_once(models, prompts, monkeypatch):
    ours = load(models("internvl"))
    calls, probe = [], ours.family._probe
    monkeypatch.setattr(ours.family, "_probe", lambda images: calls.append(1) or probe(images))
    ours.batches(prompts * 3)
    sizes = {open_image(image).size for prompt in prompts for image in prompt.images}
    assert len(calls) == 2 * len(sizes)


def test_a_batch_that_does_not_fit_into_memory_is_halved(models, prompts, monkeypatch):
    ours, sizes, room = load(models("internvl")), [], 2
    answers, write = ours.generate(prompts), type(ours.family).write

    def little(self, prepared, *args):
        sizes.append(len(prepared["input_ids"]))
        if sizes[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return write(self, prepared, *args)

    monkeypatch.setattr(type(ours.family), "write", little)
    assert ours.generate(prompts) == answers
    assert sizes[:3] == [8, 4, 2]
    room = 0
    with pytest.raises(LeverError, match=r"does not fit into the memory of cpu: fewer --shots, or .*lvlm\.processor"):
        ours.generate(prompts[:1])


def test_answers_in_half_precision_are_compared_in_float32(models, prompts):
    ours, seen = load(models("internvl"), dtype="bfloat16"), []
    ours.family.model.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits.dtype))
    assert len(ours.generate(prompts)) == len(prompts)
    ours.answer_log_prob(prompts, ["three"] * len(prompts))
    assert set(seen) == {torch.float32}


def test_only_the_places_before_an_answers_tokens_go_through_the_head(models, prompts):
    ours, scored = load(models("internvl")), []
    ours.family.model.lm_head.register_forward_hook(lambda *call: scored.append(call[-1].shape[:-1].numel()))
    answers = ["a blue circle of paper"] * len(prompts)
    ours.answer_log_prob(prompts, answers)
    assert sum(scored) == sum(len(ours.family.tokenizer(answer).input_ids) for answer in answers)


def test_beams_are_refused_where_the_library_mixes_up_their_images(models, monkeypatch):
    """As 5.17 does, unless all images of a prompt are in one row."""
    library = import_transformers()
    for kind in (library.InternVLForConditionalGeneration, library.Idefics3ForConditionalGeneration):
        monkeypatch.setattr(kind, "forward", lambda self, *args, **options: None)
    assert load(models("internvl"))
    assert load(models("idefics3"), num_beams=3)
    said = refusal(shutil.copytree(models("internvl"), models("internvl").with_name("beams")), num_beams=3)
    assert re.search(r"lvlm\.num_beams=3: .* mixes up the images .* shown: pip .*--set lvlm\.num_beams=1", said)
