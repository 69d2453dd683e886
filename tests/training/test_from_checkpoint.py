"""A run is used as it was trained: by `infer`, `pick`, `Retriever`, an exported folder, `export` and the page alike."""

import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import yaml
from helpers import RUN, files_in, run_here, small_digits

from lever_lm.evaluation.retriever import Retriever
from lever_lm.training.run_dir import RunFolder
from lever_lm.utils.paths import asset_path

NAME = "mine"
OWN = RUN.with_name(NAME)
INFERENCE = Path("results/digits/inference") / NAME
# A setting that differs from the defaults of a command in everything that changes a choice or a prompt.
SETTING = ("--sampler", "text_sim_sampler", "--seed", "3", "--features", "query_img_icd_img_text")
SETTING += ("--set", "infer.pool_size=20", "--set", "prompt.order=first_pick_first", "--set", "lvlm.max_new_tokens=4")
FEW = ("--shots", "2", "--limit", "8", "--json")


@pytest.fixture(scope="module")
def home(trained_once, tmp_path_factory) -> Path:
    """A folder in which a run of that setting was trained, beside no other."""
    folder = tmp_path_factory.mktemp("as_trained")
    shutil.copytree(trained_once / "results/digits/cache", folder / "results/digits/cache")
    words = ["train", "--run-name", NAME, *SETTING, "--limit", "16", "--rce-epochs", "1", "--grpo-epochs", "2"]
    assert run_here(*words, cwd=folder).status == 0
    return folder


@pytest.fixture
def there(home, tmp_path):
    """Commands in a folder of the test's own with that run."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    return lambda *words: run_here(*words, cwd=tmp_path)


def done_json(done) -> dict:
    assert done.status == 0, done.err
    return done.json


def samples(folder: Path) -> dict[int, dict]:
    (path,) = folder.glob("samples_*_2shot.jsonl")
    return {row["question_id"]: row for row in map(json.loads, path.read_text().splitlines())}


# ---------------------------------------------------------------------- one setting for all


def test_infer_pick_and_retriever_agree_query_by_query_under_the_runs_own_setting(there, tmp_path):
    result = done_json(there("infer", "--run-name", NAME, *FEW))
    rows = samples(tmp_path / result["folder"])
    assert result["changed"] == {}
    retriever = Retriever(tmp_path / OWN)
    config = retriever.config
    assert (config.sampler.name, config.infer.pool_size, config.seed) == ("text_sim_sampler", 20, 3)
    assert (config.prompt.order, config.features.name) == ("first_pick_first", "query_img_icd_img_text")
    assert config.lvlm.max_new_tokens == 4
    by_id = {query.question_id: query for query in retriever.stages.data.val_examples}
    queries = [by_id[number] for number in rows]
    picks = retriever.pick(queries, shots=2)
    assert [[p.example.question_id for p in one] for one in picks] == [row["icds"] for row in rows.values()]
    assert retriever.answer(queries, picks=picks) == [row["answer"] for row in rows.values()]
    for number in list(rows)[:2]:
        told = done_json(there("pick", "--run-name", NAME, "--example", number, "--shots", "2", "--json"))
        assert [icd["question_id"] for icd in told["icds"]] == rows[number]["icds"]
        assert told["answer"] == rows[number]["answer"]
        assert (told["pool"]["size"], told["pool"]["sampler"]) == (20, "text_sim_sampler")
        assert told["changed"] == {}


def test_a_checkpoint_is_used_as_its_run_was_trained_however_it_is_named(there, tmp_path, monkeypatch):
    ours = samples(tmp_path / done_json(there("infer", "--run-name", NAME, "--ckpt", "latest", *FEW))["folder"])
    path, first = OWN / "grpo_epoch2.pt", next(iter(ours))
    RunFolder(tmp_path / OWN).best.write_text(json.dumps({"checkpoint": path.name, "strategy": "kl"}))
    for words in (("--ckpt", path), ("--ckpt", OWN), ()):
        if not words:
            monkeypatch.setenv("LEVER_LM_CHECKPOINT_PATH", str(path))
        result = done_json(there("infer", *words, *FEW))
        assert result["folder"] == str(INFERENCE / "grpo_epoch2")
        assert samples(tmp_path / result["folder"]) == ours
        told = done_json(there("pick", *words, "--example", first, "--shots", "2", "--no-answer", "--json"))
        assert [icd["question_id"] for icd in told["icds"]] == ours[first]["icds"]


def test_without_a_name_pick_uses_the_newest_run_as_it_was_trained(there):
    told = done_json(there("pick", "--no-answer", "--json"))
    assert told["pool"]["sampler"] == "text_sim_sampler"
    assert f"in the newest run: {RUN.name} has no checkpoint" in told["why"]


def test_an_exported_folder_is_used_under_its_setting_by_the_commands_of_its_card(there, tmp_path):
    ours = done_json(there("infer", "--run-name", NAME, "--ckpt", "latest", "--shots", "4", "--limit", "20", "--json"))
    assert there("export", OWN, "shared", "--ckpt", "latest").status == 0
    shutil.copy(asset_path("asset:digits") / "val2014/COCO_val2014_000000000011.jpg", tmp_path / "x.jpg")
    text = re.sub(r"\s+", " ", (tmp_path / "shared/README.md").read_text())
    pick, infer = re.findall(r"`lever ((?:pick|infer) --ckpt OWNER/NAME [^`]+)`", text)
    question = "What is shown here?"
    words = [word.replace("OWNER/NAME", "shared").replace('"…"', question) for word in pick.split()]
    told = done_json(there(*words, "--json"))
    want = Retriever(tmp_path / OWN / "grpo_epoch2.pt").pick(tmp_path / "x.jpg", question, shots=4)
    assert [icd["question_id"] for icd in told["icds"]] == [one.example.question_id for one in want]
    assert told["pool"]["size"] == 20
    theirs = done_json(there(*infer.replace("OWNER/NAME", "shared").split(), "--limit", "20", "--json"))
    own = {row["method"]: row["accuracy"] for row in theirs["results"]}["policy"]
    assert own == ours["results"][0]["accuracy"]
    assert theirs["changed"] == {}
    other = done_json(there("infer", "--ckpt", "shared", "--seed", "4", *FEW))
    assert other["changed"] == {"seed": {"run": 3, "here": 4}}
    assert other["folder"] != theirs["folder"]


def test_a_run_is_found_by_its_name_whatever_its_dataset(there, tmp_path):
    shutil.move(tmp_path / "results/digits/model_cpk", tmp_path / "results/other/model_cpk")
    config = tmp_path / "results/other/model_cpk" / NAME / "config.yaml"
    config.write_text(config.read_text().replace("name: digits", "name: other"))
    result = done_json(there("infer", "--run-name", NAME, *FEW))
    assert result["folder"].startswith(f"results/other/inference/{NAME}/")
    assert done_json(there("status", "--run-name", NAME, "--json"))["run"] == f"results/other/model_cpk/{NAME}"
    assert done_json(there("best-ckpt", "--run-name", NAME, "--json"))["checkpoint"].startswith("results/other/")
    shutil.copytree(tmp_path / "results/other", tmp_path / "results/third")
    refused = there("infer", "--run-name", NAME)
    assert refused.status == 2
    assert "is a run of 2 datasets" in refused.err


def test_a_run_and_an_exported_folder_of_0_1_keep_the_pools_that_they_were_measured_with(there, tmp_path):
    """0.1 had one size, rollout.pool_size, and stored no other."""
    path = tmp_path / OWN / "config.yaml"
    config = yaml.safe_load(path.read_text())
    assert config["rollout"]["pool_size"] == 64
    assert config["infer"].pop("pool_size") == 20
    config["rollout"]["pool_size"] = 12
    path.write_text(yaml.safe_dump(config))
    assert there("export", OWN, "shared", "--ckpt", "latest").status == 0
    shared = json.loads((tmp_path / "shared/config.json").read_text())
    assert shared["setting"].pop("infer") == {"pool_size": 12}
    shared["setting"]["rollout"] = {"pool_size": 12}
    (tmp_path / "shared/config.json").write_text(json.dumps(shared))
    for words in (("--run-name", NAME), ("--ckpt", "shared")):
        told = done_json(there("pick", *words, "--no-answer", "--json"))
        assert (told["pool"]["size"], told["changed"]) == (12, {})
        result = done_json(there("infer", *words, *FEW))
        assert (result["changed"], list(result["pool_recall"])) == (
            {},
            ["12"] if "shared" not in words else ["64", "12"],
        )
    done = there("infer", "--run-name", NAME, "--set", "infer.pool_size=256", *FEW)
    assert done_json(done)["changed"] == {"infer.pool_size": {"run": 12, "here": 256}}
    assert "infer.pool_size: 12 in the run, 256 here" in done.err
    assert "_changed_" in done.json["folder"]


def test_training_that_goes_on_leaves_the_pools_of_inference_as_they_are(there, tmp_path):
    path = tmp_path / OWN / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["rollout"]["pool_size"], words = 64, ("train", "--run-name", NAME, *SETTING[:6], *SETTING[8:])
    words += ("--limit", "16", "--rce-epochs", "1", "--grpo-epochs", "3")
    for stored in (20, None):  # by this version, and by 0.1
        config["infer"] = {"num_queries": 16} | ({"pool_size": stored} if stored else {})
        path.write_text(yaml.safe_dump(config))
        assert done_json(there(*words, "--dry-run", "--json"))["config"]["infer"]["pool_size"] == (stored or 64)
        refused = there(*words, "--set", "infer.pool_size=30")
        assert refused.status == 1
        assert f"infer.pool_size: {stored or 64} there, 30 here" in refused.err
    assert there(*words).status == 0
    assert yaml.safe_load(path.read_text())["infer"]["pool_size"] == 64


def test_a_checkpoint_of_lever_plus_goes_by_the_commands_options(there, tmp_path):
    (tmp_path / OWN / "config.yaml").unlink()
    words = ("--ckpt", OWN / "grpo_epoch2.pt", "--features", "query_img_icd_img_text", "--no-answer", "--json")
    assert done_json(there("pick", *words))["pool"]["sampler"] == "mix_sampler"


def test_features_of_the_users_own_say_nothing_of_a_dataset(tmp_path):
    from lever_lm.training.find_checkpoint import values_of

    run = RunFolder(tmp_path)
    run.config.write_text("seed: 4\ndevice: cuda:1\ninfer: {num_queries: 8}\n")
    assert values_of(run) == {"seed": 4}
    run.environment.write_text(json.dumps({"sources": {"rl_data": "a.json", "embeddings": "b.pt"}}))
    assert values_of(run) == {}


# ---------------------------------------------------------------------- what is changed on purpose


def test_what_is_changed_is_named_and_stands_apart(there, tmp_path):
    own = done_json(there("infer", "--run-name", NAME, *FEW))
    folder = tmp_path / own["folder"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    words = ("infer", "--run-name", NAME, "--sampler", "mix_sampler", "--set", "prompt.order=first_pick_last", *FEW)
    done = there(*words)
    changed = {
        "sampler.name": {"run": "text_sim_sampler", "here": "mix_sampler"},
        "prompt.order": {"run": "first_pick_first", "here": "first_pick_last"},
    }
    assert done_json(done)["changed"] == changed
    assert "sampler.name: text_sim_sampler in the run, mix_sampler here" in done.err
    assert "prompt.order: first_pick_first in the run, first_pick_last here" in done.err
    assert json.loads((tmp_path / done.json["folder"] / "metrics.json").read_text())["changed"] == changed
    assert (tmp_path / done.json["folder"]).parent == folder.parent
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    picked = there("pick", "--run-name", NAME, "--seed", "4", "--no-answer", "--json")
    assert picked.json["changed"] == {"seed": {"run": 3, "here": 4}}
    assert "seed: 3 in the run, 4 here" in picked.err


def test_what_the_run_has_already_changes_nothing(there, tmp_path):
    (tmp_path / "same.yaml").write_text("infer: {pool_size: 20}\n")
    named = ("--dataset", "digits", "--lvlm", "tiny_qwen2.5_vl", "--sampler", "text_sim_sampler", "--recipe", "demo")
    keys = ("--device", "cpu", "--set", "lvlm.batch_size=3", "--config", "same.yaml")
    keys += ("--set", f"lvlm.path={asset_path('asset:tiny-qwen2.5-vl')}")
    for words in (named, keys):
        plan = done_json(there("infer", "--run-name", NAME, *words, "--dry-run", "--json"))
        config = plan["config"]
        assert (config["sampler"]["name"], config["infer"]["pool_size"]) == ("text_sim_sampler", 20)
        assert (config["seed"], config["lvlm"]["max_new_tokens"]) == (3, 4)
        assert plan["paths"]["inference"].rpartition("/")[0] == str(INFERENCE)
        assert "changed" not in plan["paths"]["inference"]


def test_another_dataset_or_lvlm_brings_its_section_whole_and_leaves_the_rest():
    from lever_lm.config.load import Layer, combined, layers

    run = Layer(
        "the run",
        {
            "data": {"name": "mine", "okvqa_path": "/m", "train_path": "/t", "file_prefix": "v2_"},
            "features": {"encoder": "some/clip"},
            "sampler": {"name": "text_sim_sampler"},
            "lvlm": {"path": "some/lvlm", "max_pixels": 5000, "num_beams": 3},
            "prompt": {"order": "first_pick_first"},
        },
    )
    names = {"dataset": "digits", "lvlm": "qwen2.5_vl_3B_classic"}
    made = combined(layers(names, None, [], {}, run=run).found)
    assert made["data"]["okvqa_path"] == "asset:digits"
    assert (made["data"]["train_path"], made["data"]["file_prefix"]) == ("", "")
    assert made["features"] == {"encoder": "some/clip"}
    assert made["sampler"] == {"name": "text_sim_sampler"}
    assert made["lvlm"]["max_pixels"] != 5000
    assert (made["prompt"]["order"], made["prompt"]["separator"]) == ("first_pick_first", "")
    assert "policy" not in made


def test_the_environment_says_where_a_runs_files_are_and_no_more(there, tmp_path, monkeypatch):
    folder = small_digits(tmp_path / "moved", train=30, val=6)
    path = tmp_path / OWN / "config.yaml"
    values = yaml.safe_load(path.read_text())
    values["data"] |= {"okvqa_path": "/gone", "coco_path": "/gone"}
    path.write_text(yaml.safe_dump(values))
    for name, text in (("OKVQA_PATH", folder), ("COCO_PATH", folder), ("NUM_LAYERS", "4")):
        monkeypatch.setenv(name, str(text))
    plan = there("infer", "--run-name", NAME, "--dry-run", "--json")
    assert plan.json["config"]["data"]["okvqa_path"] == str(folder)
    assert plan.json["config"]["policy"]["num_layers"] == 1
    assert "NUM_LAYERS" not in plan.err
    assert f"from the environment: OKVQA_PATH={folder}" in plan.err


def test_the_folders_of_a_run_are_taken_where_they_still_are(there, tmp_path, monkeypatch):
    own, other = (small_digits(tmp_path / name, train=30, val=6) for name in ("own", "other"))
    path = tmp_path / OWN / "config.yaml"
    values = yaml.safe_load(path.read_text())
    values["data"] |= {"okvqa_path": str(own), "coco_path": str(own)}
    path.write_text(yaml.safe_dump(values))
    monkeypatch.setenv("OKVQA_PATH", str(other))
    monkeypatch.setenv("COCO_PATH", str(own))
    plan = there("infer", "--run-name", NAME, "--dry-run", "--json")
    assert plan.json["config"]["data"]["okvqa_path"] == str(own)
    assert f"passed over: OKVQA_PATH={other} (the folders are named by the run)" in plan.err
    assert "COCO_PATH" not in plan.err
    assert Retriever(tmp_path / OWN).config.data.okvqa_path == str(own)
    plan = there("infer", "--run-name", NAME, "--set", f"data.okvqa_path={other}", "--dry-run", "--json")
    assert plan.json["config"]["data"]["okvqa_path"] == str(other)


def test_a_config_that_comes_through_a_pipe_is_read_once(there, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("seed: 5\n",))
    writer.start()
    plan = done_json(there("infer", "--run-name", NAME, "--config", "pipe", "--dry-run", "--json"))
    writer.join()
    assert plan["config"]["seed"] == 5
    assert plan["config"]["sampler"]["name"] == "text_sim_sampler"


# ---------------------------------------------------------------------- which results are the run's


def test_export_and_the_page_take_results_of_the_runs_own_setting_alone(there, tmp_path):
    words = ("--run-name", NAME, "--ckpt", "latest", "--shots", "1", "--limit", "12", "--json")
    assert there("infer", *words, "--seed", "9", "--baselines").status == 0
    assert done_json(there("export", OWN, "one", "--ckpt", "latest", "--json"))["evaluated"] is False
    done = there("report", OWN)
    assert done.status == 0
    assert "left out: grpo_epoch2_changed_" in done.err + done.out
    assert 'id="accuracy"' not in (tmp_path / OWN / "report.html").read_text()
    own = done_json(there("infer", *words))
    assert done_json(there("export", OWN, "two", "--ckpt", "latest", "--json"))["evaluated"] is True
    (row,) = json.loads((tmp_path / "two/config.json").read_text())["results"]
    assert row["accuracy"] == own["results"][0]["accuracy"]
    assert there("report", OWN).status == 0
    assert 'id="accuracy"' in (tmp_path / OWN / "report.html").read_text()


def test_results_that_do_not_say_their_setting_are_left_out(there, tmp_path):
    own = done_json(there("infer", "--run-name", NAME, "--ckpt", "latest", "--shots", "1", "--limit", "12", "--json"))
    path = tmp_path / own["folder"] / "metrics.json"
    content = json.loads(path.read_text())
    del content["changed"]
    path.write_text(json.dumps(content))
    assert done_json(there("export", OWN, "shared", "--ckpt", "latest", "--json"))["evaluated"] is False


def test_a_dry_run_names_the_folder_that_infer_writes(there, tmp_path):
    changed = ("--ckpt", OWN / "rce_epoch1.pt", "--set", "prompt.order=first_pick_last")
    for words in (changed, ("--icds", "icds.jsonl", "--limit", "5")):
        if "--icds" in words:
            source = next((tmp_path / INFERENCE).glob("rce*/icds.jsonl"))
            shutil.copy(source, tmp_path / "icds.jsonl")
        options = ("infer", "--run-name", NAME, "--shots", "1", "--limit", "5", *words, "--json")
        before = files_in(tmp_path)
        plan = done_json(there(*options, "--dry-run"))
        assert files_in(tmp_path) == before
        done = done_json(there(*options))
        assert plan["paths"]["inference"] == done["folder"]
        (stage,) = [stage for stage in plan["stages"] if stage["name"] == "inference"]
        assert stage["path"] == done["folder"]


# ---------------------------------------------------------------------- two data sets under one name


@pytest.fixture
def two(tmp_path, trained_once):
    """Two data sets under one data.name, and a run on the first."""
    for name, val in (("A", 6), ("B", 9)):
        folder = small_digits(tmp_path / name, train=40 if name == "A" else 50, val=val)
        content = {
            "data": {"name": "mine", "okvqa_path": str(folder), "coco_path": str(folder)},
            "features": {"encoder": "asset:tiny-clip"},
            "lvlm": {"path": "asset:tiny-qwen2.5-vl"},
            "rollout": {"num_queries": 8, "pool_size": 8},
            "rce": {"epochs": 1},
            "grpo": {"epochs": 1},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "results/mine/cache").mkdir(parents=True)
    answers = "answers_tiny-qwen2_5-vl.sqlite"
    shutil.copy(trained_once / "results/digits/cache" / answers, tmp_path / "results/mine/cache")
    run = lambda *words: run_here(*words, cwd=tmp_path)  # noqa: E731
    assert run("train", "--config", "A.yaml").status == 0
    return run


def test_results_on_other_data_of_the_same_name_stand_apart_and_are_said(two, tmp_path):
    own = done_json(two("infer", "--config", "A.yaml", "--shots", "1", "--json"))
    before = (tmp_path / own["folder"] / "metrics.json").read_bytes()
    done = two("infer", "--config", "B.yaml", "--shots", "1", "--json")
    assert list(done_json(done)["changed"]) == ["data"]
    assert " in the run, " in done.err
    assert done.json["folder"] != own["folder"]
    assert (tmp_path / own["folder"] / "metrics.json").read_bytes() == before
    assert "features_tiny-clip.safetensors is made again: the training data" in done.err


def test_results_that_are_replaced_are_said(there):
    words = ("infer", "--run-name", NAME, "--shots", "1", "--json")
    assert there(*words, "--limit", "12").status == 0
    done = there(*words, "--limit", "10")
    assert "1 results of other queries, other data, another policy or version are replaced" in done.err
