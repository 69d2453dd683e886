"""Where files are, and what makes two runs the same run."""

import json
import os

import pytest
import yaml

from lever_lm.config.schema import Config, to_dict
from lever_lm.config.values import build, dotted, merge
from lever_lm.training.run_dir import Layout, RunFolder, inference_folder, lvlm_name
from lever_lm.utils.errors import LeverError


def config(**values):
    content = {}
    for key, value in values.items():
        content = merge(content, dotted(key.replace("__", "."), value))
    return build(content)


OKVQA = {
    "data__name": "okvqa",
    "lvlm__path": "Qwen/Qwen2.5-VL-3B-Instruct",
    "sampler__name": "rand_sampler",
    "features__encoder": "openai/clip-vit-large-patch14",
}

# ---------------------------------------------------------------------- places


def test_files_lie_where_users_expect_them():
    layout = Layout(config(**OKVQA))
    name = "RandSampler_Qwen2_5-VL-3B-Instruct"
    assert layout.rollouts.as_posix() == f"results/okvqa/generated_data/rl_data_{name}.json"
    assert layout.run.as_posix() == f"results/okvqa/model_cpk/v3_{name}"
    assert layout.inference.as_posix() == f"results/okvqa/inference/v3_{name}"
    assert layout.cache.as_posix() == "results/okvqa/cache"
    assert layout.features.parent == layout.answers.parent == layout.cache
    assert layout.features.name == "features_clip-vit-large-patch14.safetensors"
    assert layout.answers.name == "answers_Qwen2_5-VL-3B-Instruct.sqlite"
    checkpoint = RunFolder(layout.run).checkpoint("grpo", 25)
    assert checkpoint.as_posix() == f"results/okvqa/model_cpk/v3_{name}/grpo_epoch25.pt"


def test_a_named_run_has_its_own_folder_and_rollouts_and_shares_the_caches(tmp_path):
    plain, named = Layout(config(**OKVQA), tmp_path), Layout(config(**OKVQA), tmp_path, "mine")
    assert named.run == tmp_path / "okvqa/model_cpk/mine"
    assert named.inference == tmp_path / "okvqa/inference/mine"
    assert named.rollouts.name == "rl_data_RandSampler_Qwen2_5-VL-3B-Instruct_mine.json"
    assert (named.features, named.answers) == (plain.features, plain.answers)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen2_5-VL-3B-Instruct"),
        ("/models/Qwen2.5-VL-7B-Instruct/", "Qwen2_5-VL-7B-Instruct"),
        ("asset:tiny-qwen2.5-vl", "tiny-qwen2_5-vl"),
    ],
)
def test_the_lvlms_name(path, name):
    assert lvlm_name(path) == name


def test_inferences_of_a_run_named_by_path(tmp_path):
    assert inference_folder(tmp_path / "okvqa/model_cpk/v3_x") == tmp_path / "okvqa/inference/v3_x"
    assert inference_folder(tmp_path / "elsewhere") == tmp_path / "elsewhere/inference"


# ---------------------------------------------------------------------- runs


def test_opening_makes_a_run_and_the_same_config_goes_on(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.open(config(seed=3))
    assert yaml.safe_load(run.config.read_text(encoding="utf-8")) == to_dict(config(seed=3))
    run.state.touch()
    run.checkpoint("rce", 1).touch()
    run.open(config(seed=3))
    assert run.checkpoint("rce", 1).exists()


def test_another_config_is_refused_by_what_differs(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.open(config(seed=3))
    other = config(seed=4, grpo__kl_beta=0.05, rollout__temperatures=[2.0])
    assert run.differences(other) == [
        "rollout.temperatures: [1.0, 1.3] there, [2.0] here",
        "grpo.kl_beta: 0.1 there, 0.05 here",
        "seed: 3 there, 4 here",
    ]
    with pytest.raises(LeverError, match=r"another config: .*seed: 3 there, 4 here\. .*--run-name NAME.*--overwrite"):
        run.open(other)
    assert yaml.safe_load(run.config.read_text(encoding="utf-8"))["seed"] == 3


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cpu"},
        {"grpo__epochs": 70},
        {"infer__num_queries": 10},
        {"features__batch_size": 1},
        {"data__okvqa_path": "elsewhere"},
        {"data__coco_path": "elsewhere"},
    ],
    ids=str,
)
def test_what_does_not_change_the_run_is_free(tmp_path, change):
    run = RunFolder(tmp_path)
    run.open(config())
    run.open(config(**change))
    assert run.differences(config()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"rce__epochs": 6},
        {"rce__batch_size": 32},
        {"grpo__lr": 2e-4},
        {"grpo__top_k": [3]},
        {"policy__dropout": 0.1},
        {"reward__mode": "soft_only"},
        {"data__name": "other"},
        {"data__skip_bad_examples": True},
        {"features__name": "query_img_icd_img"},
        {"lvlm__num_beams": 3},
        {"prompt__style": "dialogue"},
        {"sampler__name": "mix_sampler"},
        {"rollout__pool_size": 32},
        {"infer__pool_size": 64},
        {"seed": 1},
    ],
    ids=str,
)
def test_what_changes_the_run_is_not_free(tmp_path, change):
    run = RunFolder(tmp_path)
    run.open(config())
    (difference,) = run.differences(config(**change))
    assert difference.startswith(next(iter(change)).replace("__", "."))


def test_an_option_that_an_older_version_lacked_had_its_default_and_one_that_it_had_counts(tmp_path):
    run = RunFolder(tmp_path)
    content = to_dict(config())
    content["grpo"]["retired"] = 1
    del content["grpo"]["lr"], content["infer"]["num_queries"]
    run.config.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert run.differences(config()) == ["grpo.retired: '1' there, None here"]
    there = f"grpo.lr: {Config().grpo.lr} there, 0.5 here"
    assert run.differences(config(grpo={"lr": 0.5})) == [there, "grpo.retired: '1' there, None here"]


def test_a_run_that_stored_no_pool_of_inference_had_that_of_its_rollouts(tmp_path):
    run = RunFolder(tmp_path)
    content = to_dict(config(rollout__pool_size=40))
    del content["infer"]
    run.config.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert run.values()["infer"] == {"pool_size": 40}
    assert run.differences(config(rollout__pool_size=40)) == ["infer.pool_size: 40 there, 256 here"]
    assert run.differences(config(rollout__pool_size=40, infer__pool_size=40)) == []


def test_overwriting_removes_the_old_run_and_nothing_else(tmp_path):
    run = RunFolder(tmp_path)
    run.open(config(seed=3))
    ours = ["rce_epoch1.pt", "grpo_epoch2.pt", "grpo_epoch2_v2format.ckpt", "metrics.jsonl", "train.log", "state.pt"]
    ours += ["best.json", "report.html", "env.json"]
    for name in [*ours, "notes.txt"]:
        (tmp_path / name).touch()
    run.open(config(seed=4), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "notes.txt"]
    assert run.differences(config(seed=4)) == []


def test_temporary_files_of_a_killed_run_are_removed(tmp_path):
    run = RunFolder(tmp_path)
    (tmp_path / ".tmp-abc").touch()
    os.utime(tmp_path / ".tmp-abc", (0, 0))
    run.open(config())
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("content", [b"a: [1", b"\x80\xff", b"!!python/object/apply:os.getcwd []"])
def test_a_broken_config_is_refused_with_the_way_out(tmp_path, content):
    run = RunFolder(tmp_path)
    run.config.write_bytes(content)
    with pytest.raises(LeverError, match=r"(?s)cannot read .*config\.yaml: .*--overwrite starts over"):
        run.open(config())
    run.open(config(), overwrite=True)
    assert run.differences(config()) == []


def test_rows_are_those_of_the_metrics(tmp_path):
    run = RunFolder(tmp_path)
    assert run.rows() == []
    rows = [{"epoch": 1, "phase": "rce"}, {"epoch": 2, "phase": "rce"}]
    run.metrics.write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    assert run.rows() == rows


def test_checkpoints_of_somebody_else_are_not_mixed_with_a_run(tmp_path):
    run = RunFolder(tmp_path / "v3_RandSampler_Qwen2_5-VL-3B-Instruct")
    run.path.mkdir()
    run.checkpoint("grpo", 25).write_bytes(b"theirs")
    with pytest.raises(LeverError, match=r"no state\.pt.*grpo_epoch25\.pt.*--run-name.*--overwrite"):
        run.open(Config())
    assert run.checkpoint("grpo", 25).read_bytes() == b"theirs"
    assert not run.config.exists()
    run.open(Config(), overwrite=True)
    assert not run.checkpoint("grpo", 25).exists()
