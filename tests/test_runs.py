"""Where files are, how they get there whole, and what makes two runs the same run."""

import json
import os
import stat

import pytest
import yaml
from safetensors import safe_open

from lever_lm.config import Config, to_dict
from lever_lm.errors import LeverError
from lever_lm.runs import (
    Layout,
    RunFolder,
    append_line,
    atomic_file,
    camel,
    environment,
    file_digest,
    inference_folder,
    lvlm_name,
    write_json,
    write_tensors,
    write_text,
)
from lever_lm.settings import build, dotted, merge


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


def test_the_samplers_name():
    assert [camel(n) for n in ("rand_sampler", "text_sim_sampler", "img_sim_sampler", "mix_sampler")] == [
        "RandSampler",
        "TextSimSampler",
        "ImgSimSampler",
        "MixSampler",
    ]


def test_inferences_of_a_run_named_by_path(tmp_path):
    assert inference_folder(tmp_path / "okvqa/model_cpk/v3_x") == tmp_path / "okvqa/inference/v3_x"
    assert inference_folder(tmp_path / "elsewhere") == tmp_path / "elsewhere/inference"


def test_the_files_of_a_run(tmp_path):
    run = RunFolder(tmp_path)
    names = [run.config, run.metrics, run.log, run.state, run.best, run.report, run.checkpoint("rce", 1)]
    assert [path.name for path in names] == [
        "config.yaml",
        "metrics.jsonl",
        "train.log",
        "state.pt",
        "best.json",
        "report.html",
        "rce_epoch1.pt",
    ]


# ---------------------------------------------------------------------- writing


def test_a_file_appears_whole_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "Grüße 阶段\n")
    assert path.read_bytes() == "Grüße 阶段\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existed", [False, True])
def test_a_write_that_breaks_off_changes_nothing_and_leaves_nothing(tmp_path, error, existed):
    path = tmp_path / "file.txt"
    if existed:
        path.write_text("before")

    def write():
        with atomic_file(path) as file:
            file.write(b"half")
            raise error("broken off")

    with pytest.raises(error, match="broken off"):
        write()
    assert [p.name for p in tmp_path.iterdir()] == (["file.txt"] if existed else [])
    assert not existed or path.read_text() == "before"


def test_nothing_is_at_the_name_before_all_is_written(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_file(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
        assert all(p.name.startswith(".tmp-") for p in tmp_path.iterdir())
    assert path.read_bytes() == b"half"


def test_a_full_disk_is_told_in_plain_words(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")

    def write():
        with atomic_file(path):
            raise OSError(28, "No space left on device")

    with pytest.raises(
        LeverError, match=r"cannot write .*file\.txt: No space left on device; what was there before is unch"
    ):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "before"


def test_a_place_that_cannot_be_written_is_told_in_plain_words(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(LeverError, match="cannot write"):
        write_text(tmp_path / "file" / "inner.txt", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(LeverError, match="cannot write"):
        write_text(tmp_path / "folder", "x")
    with pytest.raises(LeverError, match=r"cannot write .*absent"):
        append_line(tmp_path / "absent" / "log", "x")


def test_json_keeps_its_letters_and_takes_no_nan(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5, None], "a": "ü"})
    assert "ü" in path.read_text(encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": [1, 2.5, None], "a": "ü"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8"))["a"] == "ü"


def test_lines_are_appended(tmp_path):
    path = tmp_path / "log"
    append_line(path, "eins")
    append_line(path, "zwei ü")
    assert path.read_text(encoding="utf-8") == "eins\nzwei ü\n"


def test_tensors_come_back_with_their_header(tmp_path):
    import torch

    write_tensors(tmp_path / "t.safetensors", {"a": torch.arange(3.0)}, {"fingerprint": "f"})
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        assert file.metadata() == {"fingerprint": "f"}
        assert file.get_tensor("a").tolist() == [0.0, 1.0, 2.0]


def test_a_digest_is_of_the_content_alone(tmp_path):
    for name, content in (("a", b"x" * 3_000_000), ("b", b"x" * 3_000_000), ("c", b"x" * 2_999_999 + b"y")):
        (tmp_path / name).write_bytes(content)
    digests = [file_digest(tmp_path / name) for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 16
    (tmp_path / "d").write_bytes(b"abc")
    assert file_digest(tmp_path / "d") == "ba7816bf8f01cfea"  # SHA-256 of "abc", FIPS 180-2


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
    del content["grpo"]["lr"], content["infer"]
    run.config.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert run.differences(config()) == ["grpo.retired: 1 there, None here"]
    there = f"grpo.lr: {Config().grpo.lr} there, 0.5 here"
    assert run.differences(config(grpo={"lr": 0.5})) == [there, "grpo.retired: 1 there, None here"]


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
    run.metrics.write_text('{"epoch": 1}\n\n{"epoch": 2}\n', encoding="utf-8")
    assert run.rows() == [{"epoch": 1}, {"epoch": 2}]


def test_the_environment_names_versions_seed_and_inputs():
    import torch

    found = environment(Config(seed=9), {"rollouts": "abc"})
    assert torch.__version__.startswith(found["packages"]["torch"])  # some builds keep their +label out of the metadata
    assert (found["seed"], found["inputs"]) == (9, {"rollouts": "abc"})
    assert found["packages"]["datasets"]
    json.dumps(found)


def test_no_write_follows_the_umask_into_secrecy(tmp_path):
    before = os.umask(0o077)
    try:
        write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


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
