"""The fast ways of a Qwen on a GPU: what stands in place of the library's layers, and what is compiled."""

import sys
import threading

import pytest
import torch
from lvlm_helpers import TINY, local_lvlm
from torch.nn import functional as F

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.lvlm import build_prompt, local, qwen2_5_vl, qwen_kernels
from lever_lm.lvlm.backend import load_local

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def close(found: torch.Tensor, exact: torch.Tensor, library: torch.Tensor) -> None:
    """Not further from what is exact than the library's own."""
    ours, theirs = (float((x.double() - exact).norm() / exact.norm()) for x in (found, library))
    assert ours <= theirs * 1.01, (ours, theirs)


@on_a_gpu
@pytest.mark.parametrize("shape", [(1, 2), (31, 301), (5, 4096)])
def test_on_a_gpu_the_gate_is_multiplied_in_one_pass(shape):
    from lever_lm.lvlm.triton_kernels import silu_mul

    torch.manual_seed(0)
    gate, up = torch.randn(2, *shape, dtype=torch.bfloat16, device="cuda")
    exact, library = F.silu(gate.double()) * up.double(), F.silu(gate) * up
    found = silu_mul(gate, up)
    assert found is gate
    close(found, exact, library)


@on_a_gpu
@pytest.mark.parametrize(("heads", "size"), [(16, 128), (2, 128), (16, 80), (3, 12)])
def test_on_a_gpu_positions_are_rotated_in_one_pass(heads, size):
    from lever_lm.lvlm.triton_kernels import rotated

    torch.manual_seed(0)
    x = torch.randn(57, 3, heads, size, dtype=torch.bfloat16, device="cuda")[:, 1]  # its tokens do not lie side by side
    angles = torch.randn(57, size // 2, device="cuda").repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()

    def of_the_library(x, cos, sin):
        half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * cos[:, None] + half * sin[:, None]

    exact = of_the_library(x.double(), cos.double(), sin.double())
    close(rotated(x, cos, sin), exact, of_the_library(x.float(), cos, sin).bfloat16())


@on_a_gpu
@pytest.mark.parametrize("num_beams", [1, 3])
def test_on_a_gpu_fused_kernels_give_the_answers_of_the_eager_way(digits, num_beams):
    """Half precision rounds both in its own way: the log-probs are as near each other as the library's are."""
    train, queries = digits.train_examples, digits.val_examples[:40]
    prompts = [build_prompt(train[i : i + i % 5], query, PromptConfig()) for i, query in enumerate(queries)]
    found = []
    for fuse in (True, False):
        config = LvlmConfig(path=TINY, dtype="bfloat16", num_beams=num_beams, compile=fuse)
        lvlm = load_local(config, PromptConfig(), "cuda")
        found.append((lvlm.generate(prompts), lvlm.answer_log_prob(prompts, ["three"] * len(prompts))))
    (answers, scores), (others, expected) = found
    assert sum(a == b for a, b in zip(answers, others, strict=True)) >= 0.95 * len(prompts)
    assert scores == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_before_ampere_go_the_padded_way(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert qwen_kernels.has_fast_kernels(torch.device("cuda", 1)) == fast
    assert not qwen_kernels.has_fast_kernels(torch.device("cpu"))


def test_the_device_of_a_model_is_the_current_one_where_it_is_loaded_and_asked(digits, monkeypatch):
    """With --device cuda:1 Triton and graphs would else be on the first."""
    told = []
    for module in (qwen2_5_vl, local):
        monkeypatch.setattr(module, "use_device", lambda device: told.append((device, threading.current_thread())))
    lvlm, here = local_lvlm(), threading.main_thread()
    assert (lvlm.family.device, here) in told
    told.clear()
    lvlm.generate([build_prompt([], digits.val_examples[0], PromptConfig())])
    assert told[0] == (lvlm.family.device, here)


def test_norms_are_those_of_the_library():
    model = local_lvlm().family.model
    norms = [part for part in model.modules() if hasattr(part, "variance_epsilon")]
    hidden = [torch.randn(3, 5, *norm.weight.shape) for norm in norms]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    with torch.inference_mode():
        wanted = [norm(x) for norm, x in zip(norms, hidden, strict=True)]
        for norm, x, expected in zip(norms, hidden, wanted, strict=True):
            norm.__class__ = qwen_kernels._RMSNorm
            assert torch.allclose(norm(x), expected, atol=1e-6)
    assert len(norms) > 4


def test_what_cannot_be_compiled_is_said_and_left_out(monkeypatch):
    """As on a machine without Triton, which this one may be, or without a C compiler."""
    monkeypatch.setitem(sys.modules, "lever_lm.lvlm.triton_kernels", None)
    monkeypatch.setattr(qwen_kernels, "_varlen", lambda *work, **more: None)  # a kernel of a GPU
    cpu = torch.device("cpu")
    assert qwen_kernels.load_kernels(cpu, torch.float32, False)() is None
    lacking = qwen_kernels.load_kernels(cpu, torch.float32, True)()
    assert isinstance(lacking, ImportError)
    said, model = [], local_lvlm().family.model
    mlp = type(model.model.language_model.layers[0].mlp)
    for error in (RuntimeError("Failed to find C compiler.\nmore of it"), None):
        qwen_kernels.speed_up(model, error is not None, error, lambda items, what, total: said.append(what) or items)
    assert type(model.model.language_model.layers[0].mlp) is mlp
    assert said == [
        "no fused kernels, so the model is a little slower: Failed to find C compiler. "
        "(they need Triton and a C compiler; lvlm.compile=false does without)"
    ]
