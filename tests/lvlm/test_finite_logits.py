"""Logits and features of the LVLM that are not finite, put in on purpose: the question or the image is named."""

import math

import pytest
import torch
from lvlm_helpers import local_lvlm

from lever_lm.config.schema import PromptConfig
from lever_lm.lvlm import build_prompt
from lever_lm.lvlm.decoding import NotFinite, Prefilled, beam_search, greedy
from lever_lm.utils.errors import LeverError


def message(call, *args):
    with pytest.raises(LeverError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Cache:
    """What beam search asks of a cache, for a model without memory."""

    def batch_repeat_interleave(self, times):
        self.times = times

    def reorder_cache(self, rows):
        self.rows = rows


def scripted(*steps):
    """Prompts whose logits of each new token are given: steps of (B, V)."""
    left = [torch.tensor(step) for step in steps]
    batch = len(left[0])

    def step(tokens, positions, mask):
        logits = left.pop(0)
        return logits.repeat_interleave(len(tokens) // batch, 0)

    mask, position = torch.ones(batch, 1, dtype=torch.long), torch.ones(batch, dtype=torch.long)
    return Prefilled(left.pop(0), Cache(), mask, position, step)


FINE, END = [0.0, 1.0, 0.5, -9.0], [0.0, -1.0, -2.0, 9.0]  # token 3 ends
EOS = torch.tensor([3])
BAD = [[math.nan, 0.0, 0.0, 0.0], [0.0, 0.0, math.nan, 0.0], [0.0, math.inf, 0.0, 0.0], [-math.inf] * 4]


def decode(beams, prefilled, tokens):
    return greedy(prefilled, tokens, EOS, 0) if beams == 1 else beam_search(prefilled, beams, tokens, EOS, 0, 1.0)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("beams", "when"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_decoding_stops_at_logits_that_are_not_finite_and_names_the_prompt(beams, when, bad):
    steps = [[FINE, FINE, FINE] for _ in range(3)]
    assert decode(beams, scripted(*steps), 3).shape == (3, 3)
    steps[when] = [FINE, bad, FINE]
    with pytest.raises(NotFinite) as caught:
        decode(beams, scripted(*steps), 3)
    assert caught.value.places == [1]


@pytest.mark.parametrize("bad", BAD)
def test_what_comes_after_the_end_of_a_prompt_does_not_count(bad):
    tokens = decode(1, scripted([FINE, END], [FINE, bad], [FINE, bad]), 3)
    assert tokens.tolist() == [[1, 1, 1], [3, 0, 0]]


def test_a_token_that_cannot_come_is_no_fault():
    assert decode(1, scripted([[0.0, -math.inf, 1.0, -math.inf]]), 1).tolist() == [[2]]


@pytest.fixture(scope="module")
def prompts(digits):
    return [
        build_prompt(digits.train_examples[i : i + i % 3], digits.val_examples[i], PromptConfig()) for i in range(5)
    ]


@pytest.mark.parametrize(("beams", "dtype"), [(1, "float32"), (3, "bfloat16")])
def test_a_generation_that_is_not_finite_names_the_question(monkeypatch, prompts, beams, dtype):
    ours = local_lvlm(num_beams=beams, dtype=dtype)
    prepare, inner, broken, rows = ours.family.prepare, ours.family.prefill, prompts[2], []

    def noted(batch, targets):
        rows[:] = batch
        return prepare(batch, targets)

    def prefill(given):
        prefilled = inner(given)
        prefilled.logits[rows.index(broken)] = math.nan
        return prefilled

    monkeypatch.setattr(ours.family, "prepare", noted)
    monkeypatch.setattr(ours.family, "prefill", prefill)
    text = message(ours.generate, prompts)
    assert text.startswith(
        f"question {broken.query.question_id}: asset:tiny-qwen2.5-vl in {dtype} gives its prompt logits"
    )
    assert ("lvlm.dtype=float32" in text) == (dtype != "float32")


def test_a_log_prob_that_is_not_finite_names_the_question(monkeypatch, prompts):
    ours = local_lvlm()
    head, query = ours.family.model.lm_head.forward, prompts[3].query.question_id

    def forward(hidden):
        logits = head(hidden)
        logits[0, 5] = math.nan  # of one token of the whole vocabulary
        return logits

    monkeypatch.setattr(ours.family.model.lm_head, "forward", forward)
    assert f"question {query}: " in message(ours.answer_log_prob, prompts[3:4], ["7"])


def test_image_features_that_are_not_finite_name_the_image_and_stay_off_the_disk(monkeypatch, tmp_path, prompts):
    from lever_lm.config.schema import LvlmConfig
    from lever_lm.lvlm.backend import load_local

    config = LvlmConfig(path="asset:tiny-qwen2.5-vl", dtype="float32")
    ours = load_local(config, PromptConfig(), "cpu", folder=tmp_path / "bank")
    tower = ours.family.vision._tower

    def broken(*args):
        features = tower(*args)
        features[0][0, 3] = math.nan
        return features

    monkeypatch.setattr(ours.family.vision, "_tower", broken)
    text = message(ours.generate, prompts[:1])
    assert text.startswith(f"the image {prompts[0].images[0]}: the vision tower of asset:tiny-qwen2.5-vl gives it NaN")
    assert not list(tmp_path.rglob("*.safetensors"))
