"""The in-process LVLM against the library's own way: pixels, one prompt at a time, float32 on the CPU."""

import dataclasses
import json
import math
import random
import shutil
import threading

import PIL.Image
import pytest
import torch
from lvlm_helpers import local_lvlm, plain_answer, plain_inputs, plain_log_prob, plain_tokens, without_images
from models import SPOILT, TINY, copied, edited
from torch.nn import functional as F

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.lvlm import build_prompt
from lever_lm.lvlm.backend import load_local
from lever_lm.lvlm.decoding import beam_search, float32_logits, repeatable_attention
from lever_lm.lvlm.images import check_pixel_budget, fitted
from lever_lm.lvlm.local import LocalLvlm, local_fingerprint
from lever_lm.lvlm.processor import load_processor
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.paths import asset_path
from lever_lm.utils.transformers_compat import import_transformers

STYLES = ("interleaved", "dialogue")
PROMPTS = 18  # a setting: three of every number of shots


@pytest.fixture(scope="module")
def lvlm():
    return local_lvlm()


@pytest.fixture(scope="module")
def picks(digits):
    """(picks, query) pairs: the numbers of shots 0 to 5 mixed."""
    rng = random.Random(7)
    return [(rng.sample(digits.train_examples, i % 6), rng.choice(digits.val_examples)) for i in range(PROMPTS)]


@pytest.fixture(scope="module")
def prompts(picks):
    return [build_prompt(icds, query, PromptConfig()) for icds, query in picks]


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("style", STYLES)
def test_answers_are_those_of_plain_generate(prompts, style, beams):
    ours = local_lvlm(style, num_beams=beams)
    answers = ours.generate(prompts)
    assert answers == [plain_answer(ours, prompt, style, num_beams=beams) for prompt in prompts]
    assert len(set(answers)) >= 5, "prompts that all get the same answer prove nothing"


@pytest.mark.parametrize("style", STYLES)
def test_prompts_without_images_of_demonstrations_and_bare_ones_are_answered_as_by_plain_generate(prompts, style):
    ours = local_lvlm(style)
    some = [prompt for prompt in prompts if prompt.icds]
    mixed = [dataclasses.replace(p, icds=(*p.icds[1:], *without_images(p).icds[:1])) for p in some]
    changed = [*map(without_images, some), *mixed, *(dataclasses.replace(p, bare=True) for p in prompts)]
    assert ours.generate(changed) == [plain_answer(ours, prompt, style) for prompt in changed]
    assert ours.generate(changed) != ours.generate([*some, *some, *prompts])
    scored = ours.answer_log_prob(changed[:4], ["three"] * 4)
    assert scored == pytest.approx([plain_log_prob(ours, p, "three", style) for p in changed[:4]], abs=1e-4)
    for prompt, shown in (
        (some[0], len(some[0].icds) + 1),
        (without_images(some[0]), 1),
        (mixed[0], len(some[0].icds)),
    ):
        assert len(prompt.images) == shown
        counted = int((plain_inputs(ours, prompt, style)["input_ids"] == ours.family.image_token_id).sum())
        assert counted == sum(map(ours.family.vision.tokens, prompt.images))


@pytest.mark.parametrize("scored", [False, True])
def test_what_is_left_after_whole_batches_is_cut_as_before(prompts, scored):
    ours = local_lvlm(batch_tokens=700)
    answers = [("three", "a blue circle of paper " * (1 + i % 7))[i % 2] for i in range(len(prompts))]
    work = (prompts, answers) if scored else (prompts,)
    batches = ours.batches(*work)
    assert len(batches) >= 4
    for gone in ({0}, {1, 3}, set(range(len(batches) - 1))):
        left = [i for k, batch in enumerate(batches) if k not in gone for i in sorted(batch)]
        again = ours.batches(*([part[i] for i in left] for part in work))
        kept = [sorted(batch) for k, batch in enumerate(batches) if k not in gone]
        assert [sorted(left[i] for i in batch) for batch in again] == kept


@pytest.mark.parametrize("beams", [1, 3])
def test_the_batch_size_changes_no_answer(prompts, beams):
    one, other = local_lvlm(batch_size=1, num_beams=beams), local_lvlm(batch_size=24, num_beams=beams)
    assert one.generate(prompts) == other.generate(prompts)


def test_the_next_batch_is_prepared_while_the_model_has_the_one_before(prompts):
    ours = local_lvlm(batch_size=4)
    prepare, write, begun, written = ours.family.prepare, ours.family.write, threading.Semaphore(0), []

    def noted(*work):
        begun.release()
        return prepare(*work)

    def waiting(*work):
        for _ in range((2, 1, 0)[len(written)]):  # of the batch itself, and the one after it
            assert begun.acquire(timeout=60)
        written.append(write(*work))
        return written[-1]

    ours.family.prepare, ours.family.write = noted, waiting
    few = prompts[:12]
    assert [len(rows) for rows, _ in ours.ask(few, ours.batches(few))] == [4, 4, 4]


def test_batches_hold_every_prompt_once_and_no_more_than_the_batch_size(lvlm, prompts):
    batches = lvlm.batches(prompts)
    assert sorted(i for batch in batches for i in batch) == list(range(len(prompts)))
    assert max(map(len, batches)) == 8
    shots = [len(prompts[i].icds) for batch in batches for i in batch]
    assert shots == sorted(shots, reverse=True), "prompts of one length belong together, the longest first"


def test_a_larger_image_budget_gives_more_image_tokens_and_the_library_agrees(prompts):
    small, large = local_lvlm(), local_lvlm(min_pixels=56 * 56 * 4, max_pixels=56 * 56 * 16)
    prompt = prompts[1]
    assert large.generate([prompt]) == [plain_answer(large, prompt)]
    small.generate([prompt])
    path = prompt.images[-1]
    assert len(large.family.vision.cache.get(path, "cpu")) > len(small.family.vision.cache.get(path, "cpu"))


# ---------------------------------------------------------------------- log-probs


@pytest.mark.parametrize("style", STYLES)
def test_log_prob_is_the_summed_log_softmax_of_a_plain_forward(prompts, style):
    ours, chosen = local_lvlm(style), prompts[:16]
    answers = [("three", "twenty one", "1", "a blue circle of paper")[i % 4] for i in range(len(chosen))]
    of_kind = {}
    for end in (False, True):
        targets = [f"{answer}<|im_end|>" if end else answer for answer in answers]
        plain = [plain_log_prob(ours, p, t, style) for p, t in zip(chosen, targets, strict=True)]
        of_kind[end] = ours.answer_log_prob(chosen, answers, end=end)
        assert of_kind[end] == pytest.approx(plain, abs=1e-4)
        assert all(score < 0 and round(score, 6) == score for score in of_kind[end])
    assert all(whole < part for whole, part in zip(of_kind[True], of_kind[False], strict=True))
    with pytest.raises(LeverError, match=f"question {prompts[0].query.question_id}"):
        ours.answer_log_prob(prompts[:1], [""])


def test_answers_that_end_exclude_one_another_and_beginnings_do_not(prompts):
    """Of a model that goes on after its answer: every beginning of what it writes is probable, and one end of it is."""
    ours = local_lvlm()
    weights = 5 * ours.family.model.lm_head.weight.detach()  # sure of what it goes on with
    weights[ours.eos] *= -1
    ours.family.model.lm_head.weight = torch.nn.Parameter(weights)
    sums = []
    for prompt, written in zip(prompts[:12], ours.generate(prompts[:12]), strict=True):
        tokens = ours.family.tokenizer(written).input_ids
        answers = [ours.family.tokenizer.decode(tokens[:count]) for count in range(1, len(tokens) + 1)]
        scores = [ours.answer_log_prob([prompt] * len(answers), answers, end=end) for end in (False, True)]
        sums.append([sum(map(math.exp, of_answers)) for of_answers in scores])
    assert max(begun for begun, _ in sums) > 1.2
    assert all(0 < ended <= 1 for _, ended in sums)


def test_batches_of_log_probs_count_the_answers(prompts):
    """64 short prompts and one long answer: the batch of that one is padded to it, and so holds fewer."""
    ours, short = local_lvlm(batch_size=64, batch_tokens=2000), [prompts[0]] * 40
    answers = ["three"] * 39 + ["a blue circle of paper " * 12]
    shapes, inputs = [], ours.family.prepare
    ours.family.prepare = lambda *work: (found := inputs(*work), shapes.append(found.ids.shape))[0]
    scored = []
    ours.family.model.lm_head.register_forward_pre_hook(lambda _, args: scored.append(args[0].shape[:-1].numel()))
    ours.answer_log_prob(short, answers)
    assert max(rows * width for rows, width in shapes) <= 2000 * 1.3, "a guess of the text's length is a third off"
    assert [rows for rows, _ in shapes] == [len(batch) for batch in ours.batches(short, answers)]
    assert sum(scored) == sum(len(ours.family.tokenizer(answer).input_ids) for answer in answers)
    alone = len(ours.batches(short))
    assert len(shapes) > alone


# ---------------------------------------------------------------------- images


def test_every_distinct_image_is_encoded_once(prompts):
    ours, encoded = local_lvlm(), []
    ours.family.model.model.visual.register_forward_hook(
        lambda module, args, kwargs, output: encoded.append(len(kwargs.get("grid_thw", args[-1]))), with_kwargs=True
    )
    distinct = {path for prompt in prompts for path in prompt.images}
    shown = sum(len(prompt.images) for prompt in prompts)
    ours.generate(prompts)
    ours.generate(prompts[:10])
    ours.answer_log_prob(prompts[:10], ["three"] * 10)
    assert sum(encoded) == len(ours.family.vision.cache) == len(distinct) < shown


def picture(width: int, height: int):
    return PIL.Image.frombytes("RGB", (width, height), random.Random(3).randbytes(3 * width * height))


@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [
        ((600, 20), 12544, (448, 28)),
        ((20, 600), 12544, (28, 448)),
        ((3000, 20), 12544, (448, 28)),
        ((300, 20), 784, (28, 28)),
    ],
)
def test_a_thin_image_has_a_row_of_tokens_within_the_budget(size, most, expected):
    config = LvlmConfig(min_pixels=784, max_pixels=most)
    shown = fitted(picture(*size), config)
    assert shown.size == expected
    assert fitted(shown, config).size == expected, "a server that resizes again changes nothing"


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (2000, 1500), (600, 20), (1, 150), (30, 30), (61, 47)])
def test_any_other_image_is_resized_as_the_library_does(size):
    import_transformers()
    from qwen_vl_utils import fetch_image

    config = LvlmConfig()
    limits = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    expected = fetch_image({"image": picture(*size), **limits})
    found = fitted(picture(*size), config)
    assert (found.size, found.tobytes()) == (expected.size, expected.tobytes())


def test_a_budget_below_one_token_is_refused():
    with pytest.raises(UsageError, match=r"lvlm\.max_pixels must be 784 or more, one token, found 783"):
        check_pixel_budget(LvlmConfig(min_pixels=1, max_pixels=783))


@pytest.mark.parametrize("job", ["generate", "answer_log_prob"])
@pytest.mark.parametrize("field", ["question", "answers"])
def test_a_text_that_holds_an_image_placeholder_is_refused_by_its_own_question(lvlm, prompts, job, field):
    prompt = next(prompt for prompt in prompts if len(prompt.icds) == 2)
    text = "what is <|image_pad|> here?"
    spoilt = dataclasses.replace(
        prompt.icds[1], question_id=424242, **{field: text if field == "question" else (text,)}
    )
    prompt = dataclasses.replace(prompt, icds=(prompt.icds[0], spoilt))
    with pytest.raises(LeverError, match=r"question 424242: <\|image_pad\|> must not stand there"):
        getattr(lvlm, job)([prompt], *([["three"]] if job == "answer_log_prob" else []))


# ---------------------------------------------------------------------- decoding


def flatten(lvlm: LocalLvlm) -> LocalLvlm:
    """The same model unsure of everything: noise on its last layer makes beams part and end at different lengths."""
    torch.manual_seed(0)
    head = lvlm.family.model.lm_head.weight
    with torch.no_grad():
        lvlm.family.model.lm_head.weight = torch.nn.Parameter(0.3 * head + 0.3 * head.std() * torch.randn_like(head))
    return lvlm


@pytest.fixture(scope="module")
def several_ends(tmp_path_factory, prompts):
    """A copy of the model whose generation config names a dozen further end tokens, its most frequent inner ones."""
    folder = tmp_path_factory.mktemp("model") / "several-ends"
    shutil.copytree(asset_path(TINY), folder)
    unsure = flatten(local_lvlm())
    counts: dict[int, int] = {}
    for prompt in prompts:
        for token in plain_tokens(unsure, prompt)[1:4]:
            counts[token] = counts.get(token, 0) + 1
    frequent = sorted(counts.keys() - set(unsure.eos.tolist()), key=lambda token: -counts[token])[:12]
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["eos_token_id"] = [*unsure.eos.tolist(), *frequent]
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("beams", [1, 3])
def test_several_end_tokens_end_an_answer(several_ends, prompts, beams):
    usual, ours = flatten(local_lvlm(num_beams=beams)), flatten(local_lvlm(path=several_ends, num_beams=beams))
    assert len(ours.eos) >= 3
    answers = ours.generate(prompts)
    assert answers == [plain_answer(ours, prompt, num_beams=beams) for prompt in prompts]
    assert answers != usual.generate(prompts), "the further end tokens never came up"


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@torch.inference_mode()
def test_beam_search_is_that_of_generate_under_every_length_penalty(several_ends, prompts, penalty):
    ours = flatten(local_lvlm(path=several_ends))
    chosen = prompts[:12]
    ours.batches(chosen)
    prefilled = ours.family.prefill(ours.family.prepare(chosen))
    found = beam_search(prefilled, 3, 6, ours.eos, ours.family.pad, penalty).tolist()
    for row, prompt in zip(found, chosen, strict=True):
        plain = plain_tokens(ours, prompt, num_beams=3, max_new_tokens=6, length_penalty=penalty)
        assert row == plain + [ours.family.pad] * (6 - len(plain))


def test_length_penalty_of_the_config_is_used(several_ends, prompts):
    short, long = (flatten(local_lvlm(path=several_ends, num_beams=3, length_penalty=p)) for p in (-2.0, 3.0))
    answers = short.generate(prompts)
    assert answers == [plain_answer(short, prompt, num_beams=3, length_penalty=-2.0) for prompt in prompts]
    assert answers != long.generate(prompts)


@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.5), (3, 1.05)])
def test_a_repetition_penalty_is_that_of_plain_generate(prompts, beams, penalty):
    ours, unpunished = (
        flatten(local_lvlm(num_beams=beams, repetition_penalty=penalty)),
        flatten(local_lvlm(num_beams=beams)),
    )
    answers = ours.generate(prompts)
    assert answers == [plain_answer(ours, prompt, num_beams=beams, repetition_penalty=penalty) for prompt in prompts]
    assert answers != unpunished.generate(prompts)


def test_the_tokenizers_own_token_alone_ends_an_answer(several_ends, prompts):
    ours = flatten(local_lvlm(path=several_ends, num_beams=3, eos="tokenizer"))
    assert ours.eos.tolist() == [ours.family.tokenizer.eos_token_id]
    end = {"eos_token_id": ours.family.tokenizer.eos_token_id}
    assert ours.generate(prompts) == [plain_answer(ours, prompt, num_beams=3, **end) for prompt in prompts]


@pytest.mark.parametrize("answer", ["10,000", "12:30 pm"])
def test_five_new_tokens_are_too_few_for_numbers(lvlm, answer):
    """Each digit, comma and colon is a token of its own, in Qwen's tokenizer and in the shipped one of its kind."""
    tokens = lvlm.family.tokenizer(answer).input_ids
    assert len(tokens) > LvlmConfig.max_new_tokens
    assert [lvlm.family.tokenizer.decode(token) for token in tokens[:5]] == list(answer[:5])


# ---------------------------------------------------------------------- loading


def broken(folder, name: str):
    copied(folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:200])
    return folder


@pytest.mark.parametrize("path", ["no/such-model", "asset:digits", "asset:tiny-clip"])
def test_a_model_that_is_nowhere_or_of_another_kind_is_named(path):
    with pytest.raises(LeverError, match=path) as caught:
        local_lvlm(path=path)
    assert "--lvlm" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_model_is_named(tmp_path, name):
    with pytest.raises(LeverError, match="damaged") as caught:
        local_lvlm(path=broken(tmp_path / "damaged", name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SPOILT)
def test_a_model_without_a_part_of_its_processor_is_refused_with_the_files_to_fetch(tmp_path, name):
    spoil, words = SPOILT[name]
    with pytest.raises(LeverError, match="damaged") as caught:
        local_lvlm(path=spoil(copied(tmp_path / "damaged")))
    for word in (*words, "fetch", "again", "lvlm.path"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_chat_template_in_the_tokenizers_config_alone_is_used(tmp_path, lvlm, prompts):
    folder = copied(tmp_path / "elsewhere")
    moved = folder / "chat_template.jinja"
    edited(folder, "tokenizer_config.json", chat_template=moved.read_text())
    moved.unlink()
    assert local_lvlm(path=folder).generate(prompts[:12]) == lvlm.generate(prompts[:12])


# ---------------------------------------------------------------------- fingerprint


def test_the_fingerprint_follows_everything_an_answer_depends_on(tmp_path):
    config, prompt = LvlmConfig(path=TINY), PromptConfig()
    changed = [
        (dataclasses.replace(config, num_beams=3), prompt),
        (dataclasses.replace(config, length_penalty=0.5), prompt),
        (dataclasses.replace(config, repetition_penalty=1.05), prompt),
        (dataclasses.replace(config, eos="tokenizer"), prompt),
        (dataclasses.replace(config, max_new_tokens=7), prompt),
        (dataclasses.replace(config, max_pixels=56 * 56 * 16), prompt),
        (dataclasses.replace(config, dtype="bfloat16"), prompt),
        (config, PromptConfig(style="dialogue")),
        (config, PromptConfig(system="Be brief.")),
    ]
    for name in ("model.safetensors", "chat_template.jinja", "generation_config.json"):
        folder = tmp_path / name
        shutil.copytree(asset_path(TINY), folder)
        content = bytearray((folder / name).read_bytes())
        content[-2] ^= 1
        (folder / name).write_bytes(content)
        changed.append((dataclasses.replace(config, path=str(folder)), prompt))
    stamps = [local_fingerprint(*pair, "cpu") for pair in [(config, prompt), *changed]]
    assert len(set(stamps)) == len(stamps)


def test_the_fingerprint_leaves_out_what_changes_no_answer(tmp_path):
    config, prompt = LvlmConfig(path=TINY), PromptConfig()
    moved = tmp_path / "elsewhere"
    shutil.copytree(asset_path(TINY), moved)
    same = [
        config,
        dataclasses.replace(config, batch_size=3),
        dataclasses.replace(config, dtype="float32"),
        dataclasses.replace(config, path=str(moved)),
    ]
    stamps = {local_fingerprint(one, prompt, "cpu") for one in same}
    assert {local_fingerprint(config, PromptConfig(cut="classic"), "cpu")} == stamps, "answers are kept uncut"


def test_what_picks_a_token_is_compared_in_float32():
    head = torch.nn.Linear(2, 3, bias=False, dtype=torch.bfloat16)
    head.weight.data = torch.tensor([[256, 0.25], [256, 0.5], [0, 0]], dtype=torch.bfloat16)
    hidden = torch.ones(1, 2, dtype=torch.bfloat16)
    assert head(hidden)[0, :2].tolist() == [256, 256]  # in bfloat16 the two largest are equal, and the first would win
    logits = float32_logits(head, hidden)
    assert logits.dtype == torch.float32
    assert logits[0].tolist() == [256.25, 256.5, 0]
    assert float32_logits(head.float(), hidden.float()).tolist() == logits.tolist()
    nested = float32_logits(head.bfloat16(), hidden.expand(4, 5, 2))
    assert nested.shape == (4, 5, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_decoding_step_repeats_itself():
    """The shapes of the 3B model: 32 prompts of up to 2,000 tokens, one new token each, padding masked."""
    torch.manual_seed(0)
    shape = {"dtype": torch.bfloat16, "device": "cuda"}
    query, key, value = torch.randn(32, 16, 1, 128, **shape), *torch.randn(2, 32, 16, 2000, 128, **shape)
    mask = (torch.arange(2000, device="cuda") < torch.randint(1500, 2000, (32, 1), device="cuda"))[:, None, None]
    head = torch.nn.Linear(2048, 151936, bias=False, **shape)
    with torch.inference_mode():
        with repeatable_attention():
            first, *others = [
                float32_logits(head, F.scaled_dot_product_attention(query, key, value, mask).flatten(1))
                for _ in range(12)
            ]
        wide = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), mask)
        exact = wide.flatten(1) @ head.weight.double().T
    assert all(torch.equal(first, other) for other in others)
    assert float((first - exact).norm() / exact.norm()) < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_beams", [1, 3])
def test_on_a_gpu_answers_in_bfloat16_repeat_themselves(picks, num_beams):
    lvlm = load_local(LvlmConfig(path=TINY, dtype="bfloat16", num_beams=num_beams), PromptConfig(), "cuda")
    prompts = [build_prompt(icds, query, PromptConfig()) for icds, query in picks]
    first = lvlm.generate(prompts)
    assert [lvlm.generate(prompts) for _ in range(5)] == [first] * 5


@pytest.mark.parametrize("end", [None, [], "x", ["x"]])
def test_a_model_whose_answers_no_token_ends_is_refused_with_the_file_to_fetch(tmp_path, end):
    folder = edited(copied(tmp_path / "damaged"), "generation_config.json", eos_token_id=end)
    with pytest.raises(LeverError, match=r"damaged: no token ends its answers, .*generation_config\.json .*lvlm\.eos"):
        local_lvlm(path=folder)
    assert local_lvlm(path=folder, eos="tokenizer").eos.tolist()


def test_a_processor_is_loaded_once_while_its_files_are_the_same(tmp_path):
    """It is checked before any work and loaded with the model; whose image sizes are set is one's own."""
    folder = copied(tmp_path / "model")
    first, second = (load_processor("model", folder) for _ in range(2))
    assert first.tokenizer is second.tokenizer
    first.image_processor.size = {"shortest_edge": 1, "longest_edge": 2}
    assert second.image_processor.size != first.image_processor.size
    edited(folder, "tokenizer_config.json", extra="changed")
    assert load_processor("model", folder).tokenizer is not first.tokenizer
    (folder / "tokenizer.json").unlink()
    with pytest.raises(LeverError, match="cannot load the processor"):
        load_processor("model", folder)
