"""What is missing is said at once, before anything is loaded or made, with what mends it."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
from helpers import DATA, SMALL, answers_in, files_in, small_digits
from models import SPOILT, copied, edited
from models import TINY as TINY_QWEN
from official import build_official, image_path, read_official

from lever_lm.config.load import resolve
from lever_lm.config.schema import LvlmConfig
from lever_lm.data.encoder import FeatureEncoder
from lever_lm.lvlm.checks import check_device, memory_needed
from lever_lm.utils.checks import GIB
from lever_lm.utils.errors import LeverError
from lever_lm.utils.hub import parameter_count
from lever_lm.utils.paths import asset_path
from lever_lm.utils.transformers_compat import import_transformers

REAL = ("--dataset", "okvqa_local", "--lvlm", "qwen2.5_vl_3B")
TINY = ("--set", "lvlm.path=asset:tiny-qwen2.5-vl", "--set", "features.encoder=asset:tiny-clip")


@pytest.fixture(autouse=True)
def no_hub_cache(tmp_path_factory, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def official(tmp_path_factory, monkeypatch):
    folder = build_official(tmp_path_factory.mktemp("data"), train=12, val=6)
    monkeypatch.setenv("OKVQA_PATH", str(folder))
    monkeypatch.setenv("COCO_PATH", str(folder))
    return folder


def missing(done) -> dict[str, dict]:
    assert json.loads(done.out)["ok"] is (done.status == 0)
    return {check["what"]: check for check in done.json["checks"] if check["status"] == "missing"}


def test_nothing_is_missing_for_the_embedded_data(lever, tmp_path):
    done = lever("doctor", "--json")
    assert done.status == 0, done.err
    assert missing(done) == {}
    found = {check["what"]: check["found"] for check in done.json["checks"]}
    assert found["train examples"] == "2504 usable"
    assert found["val examples"] == "500 usable"
    assert files_in(tmp_path) == {}


def test_the_recall_of_the_pools_is_told_from_what_is_there(trained, lever):
    """Random pools need the data alone, others the features in the cache. As `infer` tells it of the same queries."""

    def told(*words):
        (found,) = (check for check in lever("doctor", *words, "--json").json["checks"] if check["what"] == "pools")
        assert found["status"] == "ok"
        return found["found"]

    result = lever("infer", "--shots", "1", "--json")
    shares = result.json["pool_recall"]
    assert list(shares) == ["64", "256"]
    assert 0.9 < shares["64"] < shares["256"]
    parts = f"{shares['64']:.1%} of those of 64 (rollout.pool_size), in {shares['256']:.1%} of those of 256"
    assert told() == f"a right answer is in {parts} (infer.pool_size)"
    assert f"pools: {told()}\n" in result.err
    assert "in 100.0% of those of the nearest 1,024 (infer.pool_size)" in told("--set", "infer.pool_size=0")
    shutil.rmtree(trained / "results/digits/cache")
    assert "not in results/digits/cache/features_tiny-clip.safetensors yet; `lever infer` tells" in told()
    assert "not in" in told("--sampler", "rand_sampler", "--set", "infer.pool_size=0")
    both = ("--set", "rollout.pool_size=1", "--set", "rollout.shots=1", "--set", "infer.pool_size=2504")
    assert told("--sampler", "rand_sampler", *both).endswith("in 100.0% of those of 2504 (infer.pool_size)")


def test_an_empty_machine_lacks_everything_and_each_line_says_what_mends_it(lever, tmp_path):
    done = lever("doctor", *REAL, "--json")
    assert done.status == 1
    assert done.err.splitlines()[-1].startswith("lever: 8 missing")
    lines = [check for check in done.json["checks"] if check["status"] == "missing"]
    assert len(lines) == 8
    words = ["OKVQA_PATH", "OKVQA_PATH", "COCO_PATH"] * 2
    words += ["hf download openai/clip-vit-large-patch14", "hf download Qwen/Qwen2.5-VL-3B-Instruct"]
    for line, word in zip(lines, words, strict=True):
        assert word in line["mend"], line
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("command", ["train", "rollout"])
def test_the_same_list_stands_before_a_long_command(lever, tmp_path, command):
    done = lever(command, *REAL)
    assert done.status == 1
    assert done.err.startswith("lever: 8 things are missing:\n  train data: ")
    assert "hf download Qwen/Qwen2.5-VL-3B-Instruct" in done.err
    assert files_in(tmp_path) == {}


def test_one_thing_missing_is_one_line(lever, official):
    (official / "mscoco_val2014_annotations.json").unlink()
    done = lever("rollout", *REAL, *TINY)
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert f"mscoco_val2014_annotations.json is not there → fetch it into {official}, or set OKVQA_PATH" in done.err


def test_examples_that_cannot_be_used_are_counted(lever, official):
    questions = read_official(official, "train")[0]
    image = image_path(official, "train", questions[0]["image_id"])
    image.unlink()
    gone = sum(question["image_id"] == questions[0]["image_id"] for question in questions)
    found = missing(lever("doctor", *REAL, *TINY, "--json"))
    assert set(found) == {"train examples"}
    told = found["train examples"]["found"]
    assert told.startswith(f"{12 - gone} usable, {gone} not, the first: question {questions[0]['question_id']}: image")
    assert "--skip-bad-examples" in found["train examples"]["mend"]
    done = lever("doctor", *REAL, *TINY, "--skip-bad-examples", "--json")
    assert done.status == 0
    assert "warning" in {check["status"] for check in done.json["checks"]}


def test_a_model_of_digits_before_other_data_is_noticed(lever, official):
    done = lever("doctor", *REAL, *TINY, "--json")
    said = {check["what"]: check for check in done.json["checks"] if "digits alone" in check["found"]}
    assert said.keys() == {"features.encoder", "lvlm.path"}
    assert {check["status"] for check in said.values()} == {"warning"}
    assert "openai/clip" in said["features.encoder"]["mend"]
    embedded = lever("doctor", "--json")
    assert not any("digits alone" in check["found"] for check in embedded.json["checks"])


def test_a_part_of_ok_vqa_is_noticed(lever, official):
    done = lever("doctor", *REAL, *TINY, "--json")
    assert done.status == 0
    told = [check for check in done.json["checks"] if check["what"] == "train examples"]
    assert told[0]["status"] == "warning"
    assert "the official split has 9009" in told[0]["found"]


def test_a_broken_model_directory_is_named_by_what_it_lacks(lever, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    found = missing(lever("doctor", "--set", f"lvlm.path={folder}", "--json"))
    assert "lacks config.json, one.safetensors" in found["lvlm.path"]["found"]


@pytest.mark.parametrize("name", ["a template without images", "no tokenizer"])  # each: test_qwen2_5_vl.py
def test_a_part_of_a_processor_that_is_missing_is_named_before_the_work(lever, tmp_path, name):
    spoil, words = SPOILT[name]
    spoil(copied(tmp_path / "model"))
    for command in ("doctor", "rollout"):
        done = lever(command, "--set", f"lvlm.path={tmp_path / 'model'}")
        assert done.status == 1
        (line,) = [line for line in (done.out + done.err).splitlines() if "lvlm.path: " in line]
        for word in (*words, "fetch", "again"):
            assert word in line
        assert "defect" not in done.err
    assert not (tmp_path / "results").exists()


def test_a_chat_template_in_the_tokenizers_config_alone_is_enough(lever, tmp_path):
    folder = copied(tmp_path / "model")
    edited(folder, "tokenizer_config.json", chat_template=(folder / "chat_template.jinja").read_text())
    (folder / "chat_template.jinja").unlink()
    assert lever("doctor", "--set", f"lvlm.path={folder}").status == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
def test_an_encoder_without_a_part_of_its_processor_is_named(lever, tmp_path, name):
    shutil.copytree(asset_path("asset:tiny-clip"), tmp_path / "clip")
    (tmp_path / "clip" / name).unlink()
    usual = {"processor_config.json": "preprocessor_config.json"}.get(name, name)
    found = missing(lever("doctor", "--set", f"features.encoder={tmp_path / 'clip'}", "--json"))
    assert f"lacks {usual}" in found["features.encoder"]["found"]
    with pytest.raises(LeverError, match=f"lacks {usual}: fetch these files again"):
        FeatureEncoder(str(tmp_path / "clip"), "cpu", 8)


def test_reference_answers_that_are_too_long_to_write_are_counted(lever, official):
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(asset_path(TINY_QWEN))
    answers = [
        given["answer"]
        for split in ("train", "val")
        for annotation in read_official(official, split)[1]
        for given in annotation["answers"]
    ]
    lengths = [len(tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers]
    longest = max(lengths)
    assert longest > 1

    def warning(most: int) -> list[dict]:
        done = lever("doctor", *REAL, *TINY, "--set", f"lvlm.max_new_tokens={most}", "--json")
        assert done.status == 0
        return [check for check in done.json["checks"] if check["what"] == "answer lengths"]

    for most in range(1, longest):
        longer = sum(length > most for length in lengths)
        (check,) = warning(most)
        assert check["status"] == "warning"
        assert f": {longer / len(answers):.1%}, {longer} of {len(answers)}, " in check["found"]
        assert f"--set lvlm.max_new_tokens={longest}" in check["mend"]
    assert warning(longest) == []


def test_results_that_cannot_be_written_are_named(lever, tmp_path):
    (tmp_path / "results").write_text("a file")
    assert "is not a folder" in missing(lever("doctor", "--json"))["results"]["found"]


def test_too_small_a_disk_is_named_before_the_work(lever, tmp_path):
    huge = ("--set", "rollout.num_queries=1000000000000")
    assert "GiB free, about" in missing(lever("doctor", *huge, "--json"))["disk"]["found"]
    done = lever("train", *huge)
    assert done.status == 1
    assert done.err.startswith("lever: disk: ")
    assert files_in(tmp_path) == {}


def test_what_is_to_be_downloaded_is_as_large_as_the_page_says(lever, official):
    """7 GiB of the model, 1.6 of CLIP."""
    for options, size in ((REAL, "8.6"), ((*REAL, *TINY[:2]), "1.6"), ((*REAL, *TINY[2:]), "7.0")):
        (disk,) = [check for check in lever("doctor", *options, "--json").json["checks"] if check["what"] == "disk"]
        assert f" and {size} to download" in disk["found"]


def test_a_gpu_that_is_not_there_is_named(lever):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "--device cpu" in missing(lever("doctor", "--device", "cuda", "--json"))["device"]["mend"]


@pytest.mark.parametrize(("free", "status"), [(1, "missing"), (12, "ok"), (4, "warning")])
def test_the_memory_of_the_gpu_is_set_against_the_models(tmp_path, monkeypatch, free, status):
    import torch

    (tmp_path / "config.json").write_text("{}")
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(5 * GIB)  # a hole: nothing is on the disk
    total = {"missing": 6, "ok": 16, "warning": 16}[status]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, total * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    config = resolve({}, None, [f"lvlm.path={tmp_path}", "device=cuda"], {})[0]
    assert config.lvlm == LvlmConfig(path=str(tmp_path))
    (check,) = check_device(config.device, config.lvlm)
    assert check.status == status
    assert "about 7.0 needed" in check.found


def sized(folder, shapes: dict[str, list[int]], dtype: str = "BF16"):
    """A model's folder whose weights are holes in two files: headers with these shapes, and nothing on the disk."""
    width = {"BF16": 2, "F32": 4}[dtype]
    (folder / "config.json").write_text("{}")
    for number, (name, shape) in enumerate(shapes.items()):
        size = math.prod(shape) * width
        entries = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}, "__metadata__": {"format": "pt"}}
        header = json.dumps(entries).encode()
        with open(folder / f"model-{number}.safetensors", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
    return folder


WEIGHTS = {"three": {"a": [3 << 20, 1 << 10], "b": [1 << 29]}, "seven": {"a": [7 << 20, 1 << 10]}}  # 3.5 and 7 · 2^30


@pytest.mark.parametrize(
    ("model", "stored", "settings", "expected"),
    [
        ("three", "BF16", {}, {"weights": 7, "the smallest batches": 2}),
        ("three", "BF16", {"dtype": "float32"}, {"weights": 14, "the smallest batches": 4}),
        ("three", "F32", {"dtype": "float16"}, {"weights": 7, "the smallest batches": 2}),
        (
            "seven",
            "BF16",
            {"bank_memory": 3.0},
            {"weights": 14, "the smallest batches": 2, "image features (lvlm.bank_memory)": 3},
        ),
        ("gemma3", "BF16", {"bank_memory": 3.0}, {"weights": 7, "the smallest batches": 2}),  # it keeps none
    ],
)
def test_memory_is_counted_from_the_shapes_and_the_precision_asked_for(tmp_path, model, stored, settings, expected):
    folder = sized(tmp_path, WEIGHTS.get(model, WEIGHTS["three"]), stored)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_vl" if model in WEIGHTS else model}))
    config = LvlmConfig(path=str(folder), **settings)
    assert memory_needed(config, folder, on_gpu=True) == {what: gib * GIB for what, gib in expected.items()}


def test_on_a_cpu_the_weights_are_float32(tmp_path):
    folder = sized(tmp_path, WEIGHTS["three"])
    assert memory_needed(LvlmConfig(), folder, on_gpu=False)["weights"] == 14 * GIB
    assert memory_needed(LvlmConfig(dtype="bfloat16"), folder, on_gpu=False)["weights"] == 7 * GIB


def test_the_shipped_models_weights_are_counted_as_the_library_does():
    folder = asset_path(TINY_QWEN)
    model = import_transformers().Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert parameter_count(folder) == sum(weight.numel() for weight in model.parameters())
    assert memory_needed(LvlmConfig(), folder, on_gpu=True) == {"weights": 2 * parameter_count(folder)}


# ---------------------------------------------------------------------- the plan


def test_a_plan_before_anything_is_there_is_an_upper_bound_and_writes_nothing(lever, tmp_path):
    plan = lever("train", "--limit", "24", "--dry-run", "--json").json
    rollouts = next(stage for stage in plan["stages"] if stage["name"] == "rollouts")
    assert rollouts["lvlm_calls"] == plan["lvlm_calls"] == 24 * 15
    assert not rollouts["exact"]
    assert plan["seconds"] is None  # no speed was measured
    assert plan["bytes"] > 0
    assert files_in(tmp_path) == {}


def test_with_features_the_calls_are_counted_and_those_known_left_out(warm, lever):
    def calls() -> int:
        plan = lever("rollout", "--limit", "8", "--seed", "7", "--dry-run", "--json").json
        assert (plan["seconds"] > 0) == (plan["lvlm_calls"] > 0)
        assert all(stage["exact"] for stage in plan["stages"])
        return plan["lvlm_calls"]

    before, planned, files = answers_in(warm), calls(), files_in(warm)
    assert files_in(warm) == files
    assert 0 < planned <= 8 * 15
    assert lever("rollout", "--limit", "8", "--seed", "7").status == 0
    assert answers_in(warm) - before == planned
    assert calls() == 0


def test_larger_pools_at_inference_cost_no_call_of_the_lvlm_in_the_plan_of_any_selector(trained, lever):
    """The oracle and the learnt ones rank a pool by answers and features that are there."""

    def calls(size):
        words = ("--against", "all", "--baselines", "--shots", "1,2", "--set", f"infer.pool_size={size}")
        return lever("infer", "--limit", "10", *words, "--dry-run", "--json").json["lvlm_calls"]

    # pseudo_answer asks once a query, from the whole split; no other asks while it chooses.
    assert calls(64) == calls(256) == calls(0)


def test_a_finished_run_leaves_nothing_to_do(trained, lever):
    plan = lever("train", *SMALL, "--dry-run", "--json").json
    states = {stage["name"]: stage["state"] for stage in plan["stages"]}
    assert states == {
        "features": "there",
        "rollouts": "there",
        "match": "2 of 2 epochs there",
        "grpo": "4 of 4 epochs there",
    }
    assert plan["lvlm_calls"] == plan["seconds"] == 0


@pytest.mark.parametrize(("free", "also"), [(1 << 40, []), (1 << 30, ["disk"])])
def test_a_plan_says_what_is_missing_and_ends_well(free, also, lever, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    done = lever("train", *REAL, "--dry-run", "--json")
    assert done.status == 0
    files = ["train data", "train data", "train images", "val data", "val data", "val images"]
    missing = [check["what"] for check in done.json["missing"]]
    assert missing == [*files, "features.encoder", "lvlm.path", *also]
    assert done.json["seconds"] is None


def test_rollouts_of_somebody_else_are_named_in_the_plan(warm, lever):
    path = warm / "results/digits/generated_data/rl_data_MixSampler_tiny-qwen2_5-vl.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"0": {"pointer_candidates": []}}')
    plan = lever("train", "--dry-run", "--json").json
    rollouts = next(stage for stage in plan["stages"] if stage["name"] == "rollouts")
    assert rollouts["state"].endswith("taken as it is")
    assert plan["lvlm_calls"] == 0


FEW = ("--set", "rollout.pool_size=6", "--rce-epochs", "1", "--grpo-epochs", "3", "--set", "policy.hidden_dim=8")
BY_PROB = ("rollout.gt_prob=true", "reward.mode=hard01_plus_gtprob")
ROUNDS = ("grpo.online=true", "grpo.online_every=2", "grpo.online_samples=2")


@pytest.mark.parametrize(
    "keys",
    [
        ("rollout.infoscore=2", "rollout.infoscore_candidates=3", "rollout.distinct_orders=true", *BY_PROB),
        (*ROUNDS, *BY_PROB),
    ],
    ids=" ".join,
)
def test_no_command_asks_more_than_its_plan_says(lever, tmp_path, keys):
    """Before anything is there, with the features of another run there, and of rollouts that are there."""
    root = small_digits(tmp_path / "world", 12, 4)
    data = ("--set", f"data.okvqa_path={root}", "--set", f"data.coco_path={root}")
    command = ["train", *data, *FEW, *(part for key in keys for part in ("--set", key)), "--json"]
    fresh = lever(*command, "--dry-run").json
    assert not all(stage["exact"] for stage in fresh["stages"])
    done = lever(*command)
    assert done.status == 0, done.err
    asked = answers_in(tmp_path)
    assert 0 < asked <= fresh["lvlm_calls"] <= 3 * asked
    assert lever(*command, "--dry-run").json["lvlm_calls"] == 0
    (rollouts,) = tmp_path.rglob("rl_data_*.json")
    own = [*command, "--rl-data", rollouts, "--run-name", "own"]
    assert lever(*own, "--dry-run").json["lvlm_calls"] == next(
        (stage["lvlm_calls"] for stage in fresh["stages"] if stage["name"] == "online rollouts"), 0
    )
    for path in tmp_path.rglob("answers_*"):
        path.unlink()
    with_features = lever(*command, "--run-name", "again", "--dry-run").json
    assert next(stage for stage in with_features["stages"] if stage["name"] == "features")["state"] == "there"
    again = lever(*command, "--run-name", "again")
    assert again.status == 0, again.err
    assert 0 < answers_in(tmp_path) <= with_features["lvlm_calls"] <= fresh["lvlm_calls"]


def test_a_plan_over_rollouts_and_features_of_ones_own_makes_neither(lever, tmp_path):
    files = ("--rl-data", DATA / "small_edge_cases.json", "--embeddings", DATA / "small_embeddings.safetensors")
    plan = lever("train", *files, "--dry-run", "--json").json
    stages = {stage["name"]: stage for stage in plan["stages"]}
    assert list(stages) == ["rollouts", "rce", "grpo"]
    assert stages["rollouts"]["path"] == str(DATA / "small_edge_cases.json")
    run = lever("train", *files, *FEW, "--run-name", "own", "--json").json["run"]
    repeated = lever("train", "--from-run", run, "--dry-run", "--json").json
    assert [stage["name"] for stage in repeated["stages"]] == ["rollouts", "rce", "grpo"]
    assert repeated["lvlm_calls"] == 0
    without = lever("train", *files[:2], "--dry-run", "--json").json
    assert [stage["name"] for stage in without["stages"]] == ["features", "rollouts", "match", "grpo"]
    assert plan["lvlm_calls"] == without["lvlm_calls"] == 0
