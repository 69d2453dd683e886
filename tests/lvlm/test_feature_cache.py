"""Image features: made once, kept within bounds, found again; images decoded ahead; batches that do not fit, halved."""

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lever_lm import lvlm as lvlm_package
from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.lvlm import build_prompt, qwen2_5_vl, qwen_vision
from lever_lm.lvlm.backend import load_local
from lever_lm.lvlm.feature_cache import FeatureCache
from lever_lm.lvlm.local import LocalLvlm, vision_fingerprint
from lever_lm.lvlm.preprocess import CHUNK, chunked_patches, patches
from lever_lm.lvlm.qwen_kernels import _align
from lever_lm.utils.atomic_io import TEMPORARY_PREFIX
from lever_lm.utils.distributed import Shards
from lever_lm.utils.errors import LeverError
from lever_lm.utils.progress import untracked
from lever_lm.utils.transformers_compat import import_transformers

TINY = "asset:tiny-qwen2.5-vl"
MIB = 1 << 20
SMALL = {"path": TINY, "dtype": "float32"}


def make(bank=None, **settings) -> LocalLvlm:
    return load_local(LvlmConfig(**{**SMALL, **settings}), PromptConfig(), "cpu", folder=bank)


def towers(lvlm: LocalLvlm) -> list[int]:
    """How many images each call of the vision tower has had from now on."""
    seen: list[int] = []
    lvlm.family.model.model.visual.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(len(kwargs.get("grid_thw", args[-1]))), with_kwargs=True
    )
    return seen


@pytest.fixture(scope="module")
def prompts(digits):
    rng = random.Random(3)
    picks = [rng.sample(digits.train_examples, 1 + i % 5) for i in range(25)]
    return [build_prompt(icds, query, PromptConfig()) for query, *icds in picks]


@pytest.fixture(scope="module")
def expected(prompts):
    return make().generate(prompts)


@pytest.fixture
def images(digits):
    return list(dict.fromkeys(example.image for example in digits.train_examples[:100]))[:40]


def features(count: int, width: int = 4) -> list[torch.Tensor]:
    return [torch.full((i % 3 + 1, width), float(i)) for i in range(count)]


def written(folder, *added) -> None:
    bank = FeatureCache(folder, memory=MIB, disk=MIB)
    bank.add(*added)
    bank.flush()


# ---------------------------------------------------------------------- the bank


def test_what_one_bank_wrote_another_finds(tmp_path, images):
    made, grids = features(8), [(1, 2 * (i % 3) + 2, 2) for i in range(8)]
    written(tmp_path, images[:8], made, grids)
    found = FeatureCache(tmp_path, memory=MIB, disk=MIB)
    assert len(found) == 8
    assert found.missing(images[:10]) == images[8:10]
    for image, feature, grid in zip(images[:8], made, grids, strict=True):
        assert torch.equal(found.get(image, "cpu"), feature)
        assert found.grid(image) == grid


def test_memory_keeps_what_was_asked_for_last_and_the_disk_the_rest(tmp_path, images):
    size = 4 * 4 * 3  # bytes of the largest feature
    bank = FeatureCache(tmp_path, memory=2 * size, disk=MIB)
    made = [torch.full((3, 4), float(i)) for i in range(4)]
    for image, feature in zip(images[:4], made, strict=True):
        bank.add([image], [feature], [(1, 2, 6)])
        assert bank.in_memory <= 2 * size
    bank.flush()
    for image, feature in zip(images[:4], made, strict=True):
        assert torch.equal(bank.get(image, "cpu"), feature)
        assert bank.in_memory <= 2 * size
    alone = FeatureCache(None, memory=2 * size, disk=0)
    for image, feature in zip(images[:3], made, strict=False):
        alone.add([image], [feature], [(1, 2, 6)])
        alone.get(images[0], "cpu")
    assert [alone.get(image, "cpu") is None for image in images[:3]] == [False, True, False]


@pytest.mark.parametrize("disk", [0, 100])
def test_without_room_on_disk_nothing_is_written_and_the_image_is_known_all_the_same(tmp_path, images, disk):
    bank = FeatureCache(tmp_path / "bank", memory=0, disk=disk)
    bank.add(images[:4], features(4, width=64), [(1, 2, 2)] * 4)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert bank.missing(images[:4]) == []
    assert bank.get(images[0], "cpu") is None


def test_a_file_that_cannot_be_written_stops_the_job(tmp_path, images):
    (tmp_path / "bank").write_text("a file where the folder should be")
    with pytest.raises(LeverError, match="cannot write"):
        written(tmp_path / "bank", images[:4], features(4), [(1, 2, 2)] * 4)


@pytest.mark.parametrize("breakage", ["cut", torch.nan, -torch.inf])
def test_what_is_broken_on_disk_is_made_again(tmp_path, prompts, expected, breakage):
    make(tmp_path).generate(prompts)
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as old:
            header, there = old.metadata(), {name: old.get_tensor(name) for name in old.keys()}  # noqa: SIM118
        if breakage == "cut":
            file.write_bytes(file.read_bytes()[:20])
        else:
            for tensor in there.values():
                tensor[-1, 1] = breakage
            save_file(there, file, header)
    assert make(tmp_path).generate(prompts) == expected


BROKEN = {
    "no grids": ({"a": torch.zeros(2)}, None),
    "of other images": ({"a" * 16: torch.zeros(4, 5)}, json.dumps({"b" * 16: [1, 4, 4]})),
    "nested": ({}, "[" * 100_000),
    "a number": ({}, "3"),
    "rows": ({"a" * 16: torch.zeros(3, 5)}, json.dumps({"a" * 16: [1, 4, 4]})),
    "flat": ({"a" * 16: torch.zeros(4)}, json.dumps({"a" * 16: [1, 4, 4]})),
    "integers": ({"a" * 16: torch.zeros(4, 5, dtype=torch.int64)}, json.dumps({"a" * 16: [1, 4, 4]})),
    "widths": (
        {"a" * 16: torch.zeros(4, 5), "b" * 16: torch.zeros(4, 6)},
        json.dumps({"a" * 16: [1, 4, 4], "b" * 16: [1, 4, 4]}),
    ),
    "a huge grid": ({"a" * 16: torch.zeros(4, 5)}, json.dumps({"a" * 16: [10**9, 10**9, 10**9]})),
    "negative": ({"a" * 16: torch.zeros(4, 5)}, json.dumps({"a" * 16: [1, -4, -4]})),
    "infinite": ({"a" * 16: torch.zeros(4, 5)}, '{"aaaaaaaaaaaaaaaa": [1, 4, 1e999]}'),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_not_what_it_says_is_thrown_out(tmp_path, kind):
    tensors, grids = BROKEN[kind]
    good, bad = tmp_path / f"{'1' * 16}.safetensors", tmp_path / f"{'2' * 16}.safetensors"
    save_file({"c" * 16: torch.zeros(4, 5)}, good, metadata={"grids": json.dumps({"c" * 16: [1, 4, 4]})})
    save_file(tensors, bad, metadata=grids and {"grids": grids})
    assert len(FeatureCache(tmp_path, memory=MIB, disk=MIB)) == 1
    assert (good.exists(), bad.exists()) == (True, False)


def test_what_vanishes_while_it_is_used_is_made_again(tmp_path, prompts, expected):
    lvlm = make(tmp_path, bank_memory=1e-9)
    lvlm.batches(prompts)
    shutil.rmtree(tmp_path)
    assert lvlm.generate(prompts) == expected


def test_what_is_not_ours_stays_in_the_folder(tmp_path, images):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "notes").mkdir()
    (tmp_path / f"{TEMPORARY_PREFIX}left").touch()
    os.utime(tmp_path / f"{TEMPORARY_PREFIX}left", (0, 0))
    assert len(FeatureCache(tmp_path, memory=MIB, disk=MIB)) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "notes"}


def test_two_jobs_whose_chunks_begin_alike_keep_each_other_s_files(tmp_path, images):
    jobs = [FeatureCache(tmp_path, memory=0, disk=MIB) for _ in range(2)]
    for job, count in zip(jobs, (4, 1), strict=True):
        job.add(images[:count], features(count), [(1, 2, 2)] * count)
        job.flush()
    assert torch.equal(jobs[0].get(images[2], "cpu"), features(4)[2])


def test_the_bound_on_disk_is_that_of_all_processes(tmp_path, images):
    size = 3 * 4 * 4
    banks = [FeatureCache(tmp_path, memory=MIB, disk=4 * size, processes=2) for _ in range(2)]
    for bank, part in zip(banks, (images[:4], images[4:8]), strict=True):
        for image in part:
            bank.add([image], [torch.ones(3, 4)], [(1, 2, 6)])
        bank.flush()
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


# ---------------------------------------------------------------------- the model with its bank


@pytest.mark.parametrize("bounds", [{"bank_memory": 1e-7}, {"bank_memory": 1e-7, "bank_disk": 0.0}, {"bank_disk": 0.0}])
def test_answers_do_not_depend_on_what_the_bank_has_room_for(tmp_path, prompts, expected, bounds):
    lvlm = make(tmp_path, **bounds)
    assert lvlm.generate(prompts) == expected
    assert lvlm.family.vision.cache.in_memory <= max(lvlm.config.bank_memory, 4) * (1 << 30)


def test_a_second_command_encodes_no_image_again(tmp_path, prompts, expected):
    make(tmp_path).generate(prompts)
    again = make(tmp_path)
    seen = towers(again)
    assert again.generate(prompts) == expected
    assert seen == []
    assert not list(tmp_path.glob(f"{TEMPORARY_PREFIX}*"))


def test_a_killed_command_goes_on_with_the_images_that_are_left(tmp_path, prompts, expected):
    distinct = list(dict.fromkeys(image for prompt in prompts for image in prompt.images))
    make(tmp_path).family.vision.see(distinct[:50])
    again = make(tmp_path)
    seen = towers(again)
    assert again.generate(prompts) == expected
    assert sum(seen) == len(distinct) - 50


@dataclass(frozen=True)
class Threads(Shards):
    """Ranks that are threads of this process."""

    barrier: threading.Barrier = field(default=None, compare=False)

    def wait(self) -> None:
        self.barrier.wait(timeout=60)


@pytest.mark.parametrize("disk", [1.0, 0.0])
def test_processes_of_a_job_share_the_images(tmp_path, prompts, disk):
    barrier = threading.Barrier(2)
    config, count = LvlmConfig(**SMALL, bank_disk=disk), len({image for prompt in prompts for image in prompt.images})
    ranks = [
        load_local(config, PromptConfig(), "cpu", folder=tmp_path, shards=Threads(rank, 2, barrier=barrier))
        for rank in range(2)
    ]
    counts = [towers(lvlm) for lvlm in ranks]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda lvlm: lvlm.batches(prompts), ranks)
    assert first == second
    if disk:
        assert sum(map(sum, counts)) == count
        assert [n for seen in counts for n in seen].count(CHUNK) == count // CHUNK, "whole chunks, as one process has"
        assert abs(len(counts[0]) - len(counts[1])) <= 1
    else:
        assert [sum(seen) for seen in counts] == [count, count]


def test_the_folder_s_name_follows_what_features_depend_on():
    config = LvlmConfig(path=TINY)
    stamps = {
        vision_fingerprint(changed, "cpu")
        for changed in (
            config,
            dataclasses.replace(config, max_pixels=56 * 56 * 16),
            dataclasses.replace(config, dtype="bfloat16"),
        )
    }
    assert len(stamps) == 3
    for name, value in {"batch_size": 3, "num_beams": 3, "bank_memory": 1.0, "workers": 2}.items():
        assert vision_fingerprint(dataclasses.replace(config, **{name: value}), "cpu") in stamps


# ---------------------------------------------------------------------- decoding ahead


@pytest.mark.parametrize("workers", [0, 2])
def test_patches_come_in_order_from_any_number_of_workers(images, workers):
    lvlm = make()
    work = (lvlm.family.processor.image_processor, lvlm.config, torch.float32)
    parts = list(chunked_patches(images, *work, workers=workers, pin=False))
    assert [image for chunk, _, _ in parts for image in chunk] == images
    assert max(len(chunk) for chunk, _, _ in parts) == CHUNK < len(images)
    for chunk, pixels, grids in parts:
        there = patches(chunk, *work)
        assert torch.equal(pixels, there[0])
        assert torch.equal(grids, there[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_encoding_images_draws_nothing_from_the_generator_that_a_policy_trains_with(images, workers):
    lvlm = make(workers=workers)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    lvlm.family.vision.see(images)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_and_those_before_it_are_kept(tmp_path, images, workers):
    broken = tmp_path / "broken.jpg"
    with open(images[0], "rb") as file:
        broken.write_bytes(file.read()[:60])
    lvlm = make(tmp_path / "bank", workers=workers)
    with pytest.raises(LeverError, match=r"broken\.jpg") as caught:
        lvlm.family.vision.see([*images, str(broken)])
    assert "worker" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(FeatureCache(tmp_path / "bank", memory=MIB, disk=MIB)) == len(images) // CHUNK * CHUNK


class Deadly:
    """An image processor that kills the process it runs in."""

    patch_size, merge_size = 14, 2

    def __call__(self, **_):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_message(images):
    import_transformers()  # qwen_vl_utils needs torchvision
    made = chunked_patches(images, Deadly(), LvlmConfig(**SMALL), torch.float32, workers=2, pin=False)
    with pytest.raises(LeverError, match=r"shm-size.*lvlm\.workers=0") as caught:
        list(made)
    assert "\n" not in str(caught.value)


class Endless:
    """An image processor that never comes to an end. `patch_size`, `merge_size`: of no use."""

    patch_size, merge_size = 14, 2

    def __call__(self, **_):
        time.sleep(600)


@pytest.mark.skipif(sys.platform != "linux", reason="children are listed by the kernel")
def test_workers_end_with_the_process_that_is_killed(images):
    """As the system does where memory runs out."""
    code = """if True:
        import sys
        from test_feature_cache import *

        import_transformers()  # qwen_vl_utils needs torchvision
        next(chunked_patches(sys.argv[1:], Endless(), LvlmConfig(**SMALL), torch.float32, workers=2, pin=False))
    """
    where = {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code, *images], env={**os.environ, **where})
    try:
        workers = until(lambda: children(parent.pid))
        assert workers, "none was started"
    finally:
        parent.kill()
        parent.wait(30)
    assert until(lambda: not any(running(worker) for worker in workers))


def until(found, seconds: float = 100.0):
    deadline = time.monotonic() + seconds
    while not (value := found()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------------- what does not fit


def cramped(tokens: int = 10**9, images: int = 10**9) -> LocalLvlm:
    """A model on a device with room for so many tokens of prompts at a time, and so many images; `tried` are the
    tokens of each batch."""
    lvlm = make()
    family, lvlm.tried = lvlm.family, []
    tower, make_inputs, inner = family.model.get_image_features, family.prepare, family.prefill

    def get_image_features(pixels, grids):
        if len(grids) > images:
            raise torch.OutOfMemoryError("no room for images")
        return tower(pixels, grids)

    def prepare(prompts, targets=None):
        given = make_inputs(prompts, targets)
        given.tokens = len(prompts) * max(lvlm._length(prompt, None) for prompt in prompts)
        return given

    def prefill(given):
        lvlm.tried.append(given.tokens)
        if given.tokens > tokens:
            raise torch.OutOfMemoryError("no room for prompts")
        return inner(given)

    family.model.get_image_features, family.prepare, family.prefill = get_image_features, prepare, prefill
    return lvlm


def test_a_batch_that_does_not_fit_is_halved_and_those_after_it_are_cut_as_small(prompts, expected):
    lvlm = cramped(tokens=1000)
    assert lvlm.generate(prompts) == expected
    failed = [tokens for tokens in lvlm.tried if tokens > 1000]
    assert 1 < len(failed) < 6
    assert lvlm.tried[: len(failed)] == failed == sorted(failed, reverse=True)
    tried = len(lvlm.tried)
    assert lvlm.generate(prompts) == expected
    assert max(lvlm.tried[tried:]) <= 1000, "what does not fit was learnt"


def test_images_that_do_not_fit_together_go_one_by_one(prompts, expected):
    assert cramped(images=3).generate(prompts) == expected


def test_a_prompt_that_does_not_fit_alone_is_named(prompts):
    with pytest.raises(LeverError, match=r"question \d+: its prompt of 5 images.*--shots") as caught:
        cramped(tokens=0).generate(prompts)
    assert "\n" not in str(caught.value)


def test_an_image_that_does_not_fit_alone_is_named(prompts):
    with pytest.raises(LeverError, match=r"the image .*lvlm\.max_pixels"):
        cramped(images=0).generate(prompts)


def test_more_images_than_the_context_has_room_for_are_refused_by_number(digits):
    icds = (digits.train_examples * 3)[:400]
    prompt = build_prompt(icds, digits.val_examples[0], PromptConfig())
    with pytest.raises(LeverError, match=r"401 images.*room for \d+.*--shots"):
        make().generate([prompt])


# ---------------------------------------------------------------------- budgets


def test_the_budget_of_tokens_is_the_familys_unless_it_is_set(prompts):
    lvlm = make(batch_size=1000)
    assert lvlm.family.batch_tokens == 65536
    assert len(lvlm.batches(prompts)) == 1
    lvlm.family.batch_tokens = 600
    few = LocalLvlm(lvlm.family, lvlm.config, lvlm.prompt).batches(prompts)
    assert few == make(batch_size=1000, batch_tokens=600).batches(prompts)
    assert len(few) > 1


def test_batches_stay_within_the_budget_of_tokens(prompts):
    lvlm = make(batch_tokens=600)
    for batch in lvlm.batches(prompts):
        ids = [len(lvlm.family.token_ids(prompts[i])) for i in batch]
        assert len(batch) == 1 or len(batch) * max(ids) <= 600 * 1.3, "a guess of the text's length is a third off"


# ---------------------------------------------------------------------- the vision tower's fast ways


def test_padding_the_inner_width_changes_nothing():
    mlp = make().family.model.model.visual.blocks[0].mlp
    x = torch.randn(7, mlp.gate_proj.in_features)
    for layer in (mlp.gate_proj, mlp.up_proj):  # an inner width that is not a multiple of eight
        layer.weight = torch.nn.Parameter(layer.weight[:121])
        layer.bias, layer.out_features = torch.nn.Parameter(layer.bias[:121]), 121
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :121])
    with torch.no_grad():
        before = mlp(x)
        _align(mlp)
        assert mlp.gate_proj.weight.shape[0] == 128 == mlp.down_proj.weight.shape[1]
        assert torch.allclose(mlp(x), before, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_answers_are_those_of_the_cpu(prompts, expected, tmp_path):
    config = LvlmConfig(path=TINY, dtype="float32", workers=2)
    assert load_local(config, PromptConfig(), "cuda", folder=tmp_path).generate(prompts) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_one_kernel_gives_the_tower_s_features(images):
    fast = load_local(LvlmConfig(path=TINY, dtype="bfloat16"), PromptConfig(), "cuda")
    slow = load_local(LvlmConfig(path=TINY, dtype="bfloat16", attention="sdpa"), PromptConfig(), "cuda")
    for lvlm in (fast, slow):
        lvlm.family.vision.see(images)
    for image in images:
        a, b = (lvlm.family.vision.cache.get(image, "cuda").float() for lvlm in (fast, slow))
        assert float((a - b).norm() / b.norm()) < 0.02


@pytest.mark.parametrize("other", [False, True])
def test_expected_images_are_decoded_before_the_model_is_there_and_once(images, monkeypatch, other):
    """Others than those that are asked about in the end are dropped, and their processes ended."""
    before = set(multiprocessing.active_children())
    begun, begin, plain = [], qwen_vision.chunked_patches, make()
    plain.family.vision.see(images)

    def counted(images, *work, **more):
        begun.append(list(images))
        return begin(images, *work, **more)

    def load_model(*work):
        assert len(begun) == 1, "the weights are loaded meanwhile"
        return loading(*work)

    loading = qwen2_5_vl.load_model
    monkeypatch.setattr(qwen_vision, "chunked_patches", counted)
    monkeypatch.setattr(qwen2_5_vl, "load_model", load_model)
    expected = images[:5] if other else images
    lvlm = load_local(LvlmConfig(**{**SMALL, "workers": 2}), PromptConfig(), "cpu", ahead=expected)
    seen = towers(lvlm)
    lvlm.family.vision.see_together(images)
    assert begun == ([expected, images] if other else [images])
    assert sum(seen) == len(images)
    for image in images:
        assert torch.equal(*(one.family.vision.cache.get(image, "cpu") for one in (lvlm, plain)))
    assert set(multiprocessing.active_children()) <= before


def test_a_model_is_told_of_the_images_that_it_is_asked_about_first(prompts, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(lvlm_package, "load_local", lambda *a, ahead, **k: told.append(ahead) or make())
    config = LvlmConfig(**SMALL)
    job = lvlm_package.load_lvlm(
        config, PromptConfig(), device="cpu", cache=tmp_path / "answers.sqlite", track=untracked
    )
    job.generate(prompts[:2])
    job.generate(prompts[2:4])
    assert told == [[image for prompt in prompts[:2] for image in prompt.images]]


def test_workers_are_none_on_a_cpu_unless_asked_for(images, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    started = []
    monkeypatch.setattr(
        "lever_lm.lvlm.qwen_vision.chunked_patches", lambda *a, workers, **k: started.append(workers) or ()
    )
    make().family.vision.see(images)
    make(workers=3).family.vision.see(images)
    assert started == [0, 3]
