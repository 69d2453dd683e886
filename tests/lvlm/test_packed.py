"""Prompts packed one behind the other, as on a GPU, against the padded way: attention written out, in float32."""

import gc
import json
import random
import weakref

import pytest
import torch
from families import write_family
from lvlm_helpers import local_lvlm, plain_answer

from lever_lm.config.schema import PromptConfig
from lever_lm.lvlm import build_prompt, packed, qwen2_5_vl
from lever_lm.lvlm.local import LocalLvlm
from lever_lm.lvlm.packed import Packed
from lever_lm.utils.errors import LeverError


@pytest.fixture(autouse=True)
def _attention(monkeypatch):
    """Softmax of products, sequence by sequence, as a CPU has no kernel for several; and room for keys that grows."""

    def attention(query, key, value, ends, longest, *, scale, is_causal=False, used=None):
        assert all(int(e.diff().max()) <= most for e, most in zip(ends, longest, strict=True))
        out, log_sums = torch.zeros_like(query), torch.full((query.shape[1], len(query)), torch.inf)
        repeats = query.shape[1] // key.shape[1]
        spans = zip(*(zip(e[:-1].tolist(), e[1:].tolist(), strict=True) for e in ends), strict=True)
        for i, ((a, b), (c, d)) in enumerate(spans):
            d = d if used is None else c + int(used[i])
            if c == d:
                continue
            keys, values = (t[c:d].repeat_interleave(repeats, 1) for t in (key, value))
            scores = torch.einsum("qhd,khd->hqk", query[a:b], keys) * scale
            if is_causal:
                scores = scores.masked_fill(torch.ones(b - a, d - c, dtype=torch.bool).triu(1), -torch.inf)
            out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
            log_sums[:, a:b] = scores.logsumexp(-1)
        return out, log_sums

    monkeypatch.setattr(packed, "attention", attention)
    monkeypatch.setattr(packed, "_ROUND", 64)


@pytest.fixture(scope="module")
def prompts(digits):
    """Of 0 to 5 shots."""
    rng, train = random.Random(3), digits.train_examples
    return [build_prompt(rng.sample(train, i % 6), digits.val_examples[i], PromptConfig()) for i in range(18)]


def packs(**settings) -> LocalLvlm:
    """The shipped model, as if it were on a GPU."""
    lvlm = local_lvlm(**settings)
    config, family = lvlm.config, lvlm.family
    family.packed = Packed(family.model, config.batch_size, config.num_beams, config.max_new_tokens)
    return lvlm


SETTINGS = [{}, {"num_beams": 3}, {"num_beams": 3, "length_penalty": -2.0}, {"repetition_penalty": 20.0}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_packed_prompts_have_the_answers_of_the_library(prompts, settings):
    ours, padded = packs(**settings), local_lvlm(**settings)
    assert ours.generate(prompts) == padded.generate(prompts)
    for prompt in prompts[:6]:
        assert ours.generate([prompt]) == [plain_answer(padded, prompt, **settings)]


@pytest.mark.parametrize("end", [False, True])
def test_packed_prompts_have_the_log_probs_of_the_padded(prompts, end):
    answers = [("three", "no", "a rather long answer")[i % 3] for i in range(len(prompts))]
    found, expected = (lvlm.answer_log_prob(prompts, answers, end=end) for lvlm in (packs(), local_lvlm()))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-5)


@torch.inference_mode()
def test_each_step_has_the_logits_of_the_padded_way(prompts):
    """Rows that go on from other rows, prompts of other lengths in the same place, and fewer of them."""
    ours, padded = packs(num_beams=2, max_new_tokens=4), local_lvlm(num_beams=2, max_new_tokens=4)
    for some in (prompts[:8], prompts[8:13], prompts[5:6]):
        states = []
        for lvlm in (ours, padded):
            lvlm.family.vision.see([image for prompt in some for image in prompt.images])
            states.append(lvlm.family.prefill(lvlm.family.prepare(some)))
        assert torch.allclose(states[0].logits, states[1].logits, atol=1e-4)
        rows = 2 * len(some)
        order = torch.tensor([i + (i % 2 == 0) * (i // 2 % 2) for i in range(rows)])
        for t in range(3):
            tokens = (torch.arange(rows)[:, None] * 7 + t) % 50 + 10
            found = []
            for state in states:
                if t == 0:
                    state.cache.batch_repeat_interleave(2)
                else:
                    state.cache.reorder_cache(order)
                mask = torch.cat([state.mask, state.mask.new_ones(len(some), t + 1)], 1).repeat_interleave(2, 0)
                position = state.position.repeat_interleave(2, 0)[:, None] + t
                found.append(state.step(tokens, position, mask))
            assert torch.allclose(*found, atol=1e-4)
    assert ours.family.packed.past.shape[2] % 64 == 0


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_other_qwens_are_packed_alike(prompts, family, tmp_path):
    settings = {"path": write_family(family, tmp_path / family), "num_beams": 3, "max_new_tokens": 4}
    assert packs(**settings).generate(prompts) == local_lvlm(**settings).generate(prompts)
    scores = [
        lvlm.answer_log_prob(prompts, ["three"] * len(prompts)) for lvlm in (packs(**settings), local_lvlm(**settings))
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("scored", [False, True])
def test_what_a_batch_that_does_not_fit_has_taken_is_given_back(prompts, monkeypatch, scored):
    lvlm, left, attend = packs(num_beams=2, batch_size=20), [2], packed.attention
    ask = (
        (lambda: lvlm.answer_log_prob(prompts, ["three"] * len(prompts))) if scored else lambda: lvlm.generate(prompts)
    )
    expected, rooms = ask(), []

    def full(query, *rest, **more):
        rooms.append(lvlm.family.packed.past.shape[2])
        if len(query) > 1000 and left[0]:
            left[0] -= 1
            if not left[0]:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return attend(query, *rest, **more)

    monkeypatch.setattr(packed, "attention", full)
    assert ask() == expected
    assert not left[0]
    if not scored:
        assert 0 < rooms[-1] < max(rooms)
    places = lvlm.family.packed._places
    assert (places.asked, places._whole) == (None, None)


@pytest.mark.parametrize("window", [False, True])
def test_on_a_gpu_a_model_is_packed_unless_its_attention_has_a_window(tmp_path, monkeypatch, window):
    folder = write_family("qwen2_5_vl", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["use_sliding_window"] = window
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(qwen2_5_vl, "has_fast_kernels", lambda device: True)
    monkeypatch.setattr(qwen2_5_vl, "load_kernels", lambda *work: lambda: None)
    monkeypatch.setattr(qwen2_5_vl, "speed_up", lambda *work: None)
    family = local_lvlm(path=folder, dtype="bfloat16").family
    assert (family.packed is None) == window
    assert family.batch_tokens == (65536 if window else 131072)
    monkeypatch.setattr(qwen2_5_vl, "Packed", no_room)
    if not window:
        with pytest.raises(LeverError, match=r"the answers to 8 prompts do not fit .*lvlm\.batch_size"):
            local_lvlm(path=folder, dtype="bfloat16")


def no_room(*work):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_model_s_memory_is_free_once_nobody_has_it(prompts):
    """Hooks and graphs of a GPU hold no circle, which would keep gigabytes until the garbage is collected."""
    lvlm = packs()
    lvlm.generate(prompts[:2])
    gc.collect()
    gc.disable()
    try:
        weights = weakref.ref(lvlm.family.model.lm_head.weight)
        del lvlm
        assert weights() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("fails", [1, 2])
def test_a_batch_whose_keys_do_not_fit_is_halved(prompts, monkeypatch, fails):
    expected, lvlm, left = local_lvlm(num_beams=2).generate(prompts), packs(num_beams=2), [fails]
    lvlm.generate(prompts[-1:])  # there is some room before
    make = lvlm.family.packed._room

    def full(tokens):
        if tokens > 500 and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return make(tokens)

    monkeypatch.setattr(lvlm.family.packed, "_room", full)
    assert lvlm.generate(prompts) == expected
    assert not left[0]
    assert lvlm.generate(prompts) == expected
