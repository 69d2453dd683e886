"""Data of the user's own in one line: `--data FILE`, its name below results/, its task and its settings."""

import json
import os
import shutil

import click
import pytest
import yaml
from helpers import files_in, run_here

from lever_lm.cli import completion
from lever_lm.config.load import Layer, layers
from lever_lm.config.schema import Config, to_dict
from lever_lm.training.own_results import SOURCE, folder_name, identity, keep_source, source_of


@pytest.fixture
def shown(lever):
    """The resolved config of a command line, and what set each value that is not the default."""

    def show(*words):
        done = lever("config", "show", *words, "--json")
        assert done.status == 0, done.err
        return done.json["config"], {key: note["from"] for key, note in done.json["changed"].items()}

    return show


def refused(done, *words):
    assert (done.status, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1, done.err
    assert all(word in done.err for word in words), done.err


# ---------------------------------------------------------------------- what it is resolved to


def test_a_table_has_the_name_of_its_file_a_task_and_the_settings_of_small_data(shown):
    config, origin = shown("--data", "photos/labels.csv")
    digits, _ = shown("--dataset", "digits")
    data = {key: value for key, value in config["data"].items() if value != to_dict(Config())["data"][key]}
    assert data == {"name": "labels", "file": "photos/labels.csv", "task": "short_answer"}
    assert (config["warmup"], config["rollout"]) == ("rce", to_dict(Config())["rollout"])
    assert config["features"]["encoder"] == "asset:tiny-clip"
    for section in ("features", "sampler", "policy", "rce", "grpo"):
        assert config[section] == digits[section], section
    assert {origin[key] for key in ("data.file", "data.name", "features.encoder", "rce.lr")} == {"--data"}
    assert origin["data.task"] == "configs/task/short_answer.yaml"
    assert "configs/dataset/digits.yaml" not in origin.values()


@pytest.mark.parametrize(
    "other", [("--lvlm", "qwen2.5_vl_3B"), ("--set", "lvlm.path=some/model"), ("--config", "own.yaml")], ids=" ".join
)
def test_with_an_lvlm_that_is_not_shipped_the_settings_are_the_usual_ones(shown, tmp_path, other):
    (tmp_path / "own.yaml").write_text("lvlm: {path: some/model}")
    config, _ = shown("--data", "labels.csv", *other)
    usual = to_dict(Config())
    for section in ("features", "sampler", "policy", "rce", "grpo"):
        assert config[section] == usual[section], section


def test_what_is_named_wins_over_what_a_table_brings(shown, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "data: {name: named, task: number}\nfeatures: {encoder: own/clip}\ngrpo: {lr: 0.5}"
    )
    config, _ = shown("--data", "labels.csv", "--config", "own.yaml", "--sampler", "rand_sampler")
    assert (config["data"]["name"], config["data"]["task"], config["data"]["file"]) == ("named", "number", "labels.csv")
    assert (config["features"]["encoder"], config["grpo"]["lr"]) == ("own/clip", 0.5)
    assert (config["sampler"]["name"], config["rce"]["lr"]) == ("rand_sampler", 3e-3)
    config, _ = shown("--data", "labels.csv", "--set", "data.name=set", "--config", "own.yaml")
    assert config["data"]["name"] == "set"
    config, origin = shown("--data", "labels.csv", "--recipe", "classic")
    assert (config["rce"]["lr"], origin["rce.lr"]) == (1e-4, "configs/recipe/classic.yaml")


@pytest.mark.parametrize("named", [("--config", "own.yaml"), ("--set", "data.file=labels.csv")], ids=" ".join)
def test_a_table_that_a_config_names_is_the_same(shown, tmp_path, named):
    (tmp_path / "own.yaml").write_text("data: {file: labels.csv}")
    config, _ = shown(*named)
    assert config == shown("--data", "labels.csv")[0]


def test_a_task_comes_over_the_lvlm_and_under_the_recipe_and_the_config(shown, tmp_path):
    (tmp_path / "own.yaml").write_text("data: {question: Which one}")
    classic = ("--data", "labels.csv", "--lvlm", "qwen2.5_vl_3B_classic")
    assert shown(*classic)[0]["lvlm"]["max_new_tokens"] == 5
    config, _ = shown(*classic, "--task", "caption", "--config", "own.yaml")
    assert (config["lvlm"]["max_new_tokens"], config["prompt"]["template"]) == (30, "{question} Caption: {answer}")
    assert (config["reward"]["mode"], config["data"]["question"]) == ("task", "Which one")
    assert shown(*classic, "--task", "caption", "--recipe", "infoscore")[0]["reward"]["mode"] == "infoscore"


def test_a_task_is_named_for_a_shipped_dataset_as_well(shown):
    config, origin = shown("--task", "choice")
    assert (config["data"]["task"], config["data"]["name"], config["reward"]["mode"]) == ("choice", "digits", "task")
    assert origin["data.task"] == "configs/task/choice.yaml"


def test_the_five_tasks_have_a_yaml_each(lever):
    refused(lever("train", "--task", "vqaa", "--json"), "--task", "'vqa'", "caption, choice, number, short_answer, vqa")


def test_a_shell_is_offered_the_tasks_and_the_tables_below_what_is_typed(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    for name in ("a.csv", "b.jsonl", "notes.txt", ".hidden.csv", "set/c.parquet", "odd;name.csv"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    context = click.Context(click.Command("x"))
    offered = {typed: [value for value, _ in completion.tables(context, typed)] for typed in ("", "b", "set/", "no/")}
    assert offered == {"": ["a.csv", "b.jsonl", "set/"], "b": ["b.jsonl"], "set/": ["set/c.parquet"], "no/": []}
    assert [value for value, _ in completion.named("task")(context, "c")] == ["caption", "choice"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--data", "x.csv", "--dataset", "digits"), ("--data x.csv", "--dataset digits")),
        (("--val", "v.csv"), ("--val v.csv", "--data")),
        (("--val", "v.csv", "--dataset", "digits"), ("--val v.csv", "--data")),
        (("--data", ""), ("--data", ".csv", "hub:")),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("command", ["train", "infer --dry-run", "doctor", "config show"])
def test_options_that_contradict_one_another_are_refused(lever, tmp_path, command, words, told):
    refused(lever(*command.split(), *words, "--json"), *told)
    assert not list(tmp_path.iterdir())


def test_an_evaluation_split_belongs_to_a_table_of_a_config_too(shown, tmp_path):
    (tmp_path / "own.yaml").write_text("data: {file: labels.csv}")
    config, origin = shown("--config", "own.yaml", "--val", "v.csv")
    assert (config["data"]["val_file"], origin["data.val_file"]) == ("v.csv", "--val")


@pytest.mark.parametrize("variable", ["OKVQA_PATH", "VQAV2_PATH"])
def test_the_folders_of_other_data_leave_a_table_alone(shown, monkeypatch, variable):
    plain = shown("--data", "labels.csv")
    monkeypatch.setenv(variable, "/elsewhere")
    assert shown("--data", "labels.csv") == plain


def test_the_folder_of_cocos_images_serves_a_table_too(shown, monkeypatch):
    monkeypatch.setenv("COCO_PATH", "/elsewhere")
    config, origin = shown("--data", "labels.csv")
    assert (config["data"]["coco_path"], origin["data.coco_path"]) == ("/elsewhere", "COCO_PATH")


# ---------------------------------------------------------------------- its folder below results/


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("a/labels.csv", "labels"),
        ("labels.v2.jsonl", "labels.v2"),
        ("Two words & more.TSV", "Two_words_more"),
        ("照片.parquet", "照片"),
        (".hidden.csv", "hidden"),
        ("photos.d/", "photos.d"),
        ("hub:OWNER/NAME", "NAME"),
        ("hub:OWNER/na.me/", "na.me"),
        ("hub:OWNER/NAME/data/train.csv", "NAME"),
        ("hub:OWNER", "data"),
        ("rows.json", "rows"),
        ("???.csv", "data"),
        ("x" * 300 + ".csv", "x" * 80),
    ],
)
def test_the_name_is_that_of_the_file_fit_for_a_folder(tmp_path, monkeypatch, file, name):
    monkeypatch.chdir(tmp_path)
    assert folder_name(file, tmp_path / "results") == name


def test_a_folder_is_named_whole_and_where_one_stands_by_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "tables.csv").mkdir()
    monkeypatch.chdir(tmp_path / "tables.csv")
    assert {folder_name(typed, tmp_path / "none") for typed in (".", "../tables.csv", "./")} == {"tables.csv"}


def test_the_same_file_has_one_name_however_it_is_spelt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").touch()
    (tmp_path / "link.csv").symlink_to("a.csv")
    (tmp_path / "folder").mkdir()
    spelt = ["a.csv", "./a.csv", "folder/../a.csv", str(tmp_path / "a.csv"), "link.csv"]
    assert {identity(one) for one in spelt} == {os.path.realpath(tmp_path / "a.csv")}
    keep_source(tmp_path / "results/a", "a.csv")
    assert {folder_name(one, tmp_path / "results") for one in spelt} == {"a"}


def test_a_link_into_a_store_of_files_without_endings_is_named_as_it_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0a1b").touch()
    (tmp_path / "train.parquet").symlink_to("0a1b")
    assert folder_name("train.parquet", tmp_path / "results") == "train"


def test_of_two_files_of_a_name_the_second_has_a_digest_behind_it_and_keeps_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results"
    keep_source(results / "labels", "a/labels.csv")
    other = folder_name("b/labels.csv", results)
    assert other.startswith("labels-")
    assert len(other) == len("labels-") + 8
    assert folder_name("b/labels.csv", results) == other != folder_name("c/labels.csv", results)
    assert folder_name("a/labels.csv", results) == "labels"
    keep_source(results / other, "b/labels.csv")
    (results / "labels" / SOURCE).unlink()
    (results / "labels").rmdir()
    assert folder_name("b/labels.csv", results) == other  # not the free name: its results are there
    assert folder_name("a/labels.csv", results) == "labels"


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"file": 3}', "not json"])
def test_a_folder_that_does_not_say_whose_it_is_is_anothers(tmp_path, content):
    (tmp_path / "labels").mkdir()
    if content is not None:
        (tmp_path / "labels" / SOURCE).write_text(content)
    assert source_of(tmp_path / "labels") is None
    assert folder_name("labels.csv", tmp_path).startswith("labels-")


@pytest.mark.parametrize("name", ["digits", "okvqa", "vqav2"])
def test_no_table_takes_the_name_of_a_shipped_dataset(tmp_path, name):
    assert folder_name(f"{name}.csv", tmp_path).startswith(f"{name}-")


def test_source_json_says_it_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keep_source(tmp_path / "labels", "labels.csv")
    assert json.loads((tmp_path / "labels" / SOURCE).read_text()) == {"file": os.path.realpath("labels.csv")}
    keep_source(tmp_path / "labels", "other.csv")
    assert source_of(tmp_path / "labels") == os.path.realpath("labels.csv")
    keep_source(tmp_path / "hub", "hub:OWNER/NAME/")
    assert source_of(tmp_path / "hub") == "hub:OWNER/NAME"


def test_the_name_in_the_config_goes_by_what_is_in_results(shown, tmp_path):
    keep_source(tmp_path / "results/labels", str(tmp_path / "elsewhere/labels.csv"))
    assert shown("--data", "labels.csv")[0]["data"]["name"].startswith("labels-")
    assert shown("--data", "elsewhere/labels.csv")[0]["data"]["name"] == "labels"
    assert shown("--data", "labels.csv", "--results", "other")[0]["data"]["name"] == "labels"


# ---------------------------------------------------------------------- on a run


def run_config(*names_and_sets, **names) -> dict:
    """The values of the run of a table with a task."""
    return to_dict(layers(names, None, ["data.file=a.csv", "data.name=a", *names_and_sets], {}).config())


def on_run(run: dict, **names) -> dict:
    return to_dict(layers(names, None, [], {}, run=Layer("the run", run)).config())


def test_the_task_of_a_run_given_again_changes_nothing():
    run = run_config("data.question=What is it?", "reward.mode=hard_only", task="caption")
    assert on_run(run, task="caption") == run


def test_another_task_than_the_runs_takes_its_place_with_what_came_with_it():
    run = run_config("data.scale=2", "lvlm.max_new_tokens=17", task="caption")
    found = on_run(run, task="number")
    assert found["data"] == {**run["data"], "task": "number", "question": ""}
    assert (found["prompt"], found["reward"]) == (to_dict(Config())["prompt"], run["reward"])
    assert found["lvlm"]["max_new_tokens"] == 17  # not of the task's YAML


def test_another_lvlm_answers_the_task_of_the_run():
    run = run_config(task="caption")
    found = on_run(run, lvlm="qwen3_vl_2B")
    assert (found["lvlm"]["path"], found["lvlm"]["max_new_tokens"]) == ("Qwen/Qwen3-VL-2B-Instruct", 30)
    assert on_run(run_config(), lvlm="qwen3_vl_2B")["lvlm"]["max_new_tokens"] == 5
    assert on_run(run, lvlm="qwen2.5_vl_3B_classic")["prompt"]["template"] == "{question} Caption: {answer}"
    run = run_config("lvlm.max_new_tokens=17", task="caption", lvlm="qwen3_vl_2B")
    assert on_run(run, lvlm="qwen3_vl_2B") == run


def test_a_dataset_takes_the_place_of_the_table_of_a_run():
    run = run_config(task="number")
    found = on_run(run, dataset="digits")
    assert found["data"] == to_dict(layers({"dataset": "digits"}, None, [], {}).config())["data"]
    run = run_config("data.name=digits")
    assert on_run(run, dataset="digits")["data"]["file"] == ""


@pytest.fixture
def a_run(tmp_path):
    """The folder of a run on a.csv, with its config: a name of its own for a column, and a task."""
    run = tmp_path / "results/a/model_cpk/mine"
    run.mkdir(parents=True)
    values = run_config("data.columns={question: ask}", "data.scale=2", task="number", lvlm="tiny_qwen2.5_vl")
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    keep_source(tmp_path / "results/a", str(tmp_path / "a.csv"))
    return run


def planned(lever, *words) -> dict:
    done = lever("convert", *words, "--dry-run", "--json")
    assert done.status == 0, done.err
    return done.json


@pytest.mark.parametrize(
    "words",
    [
        ("--run-name", "mine"),
        ("--run-name", "mine", "--data", "./a.csv"),
        ("--run-name", "mine", "--task", "number"),
        ("--run-name", "mine", "--data", "a.csv", "--task", "number"),
    ],
    ids=" ".join,
)
def test_a_run_brings_its_table(lever, a_run, words):
    found = planned(lever, *words)
    assert found["paths"]["run"] == "results/a/model_cpk/mine"
    values = yaml.safe_load((a_run / "config.yaml").read_text())
    assert {**found["config"]["data"], "file": "a.csv"} == values["data"]
    assert found["config"]["reward"] == values["reward"]


def test_another_table_takes_the_place_of_a_runs_and_is_asked_as_that_was(lever, a_run):
    command = ("report", str(a_run), "--data", "b.csv", "--val", "v.csv", "--dry-run", "--json")
    found = lever(*command).json["config"]["data"]
    changed = {"file": "b.csv", "val_file": "v.csv", "name": "b"}
    assert found == {**to_dict(Config())["data"], **changed, "task": "number", "scale": 2.0}
    assert lever(*command, "--task", "caption").json["config"]["data"]["task"] == "caption"
    values = to_dict(layers({"dataset": "digits", "lvlm": "tiny_qwen2.5_vl"}, None, [], {}).config())
    (a_run / "config.yaml").write_text(yaml.safe_dump(values))
    found = lever(*command)
    assert found.json["config"]["data"] == {**to_dict(Config())["data"], **changed, "task": "short_answer"}
    assert "task: short_answer (--task names another)" in found.err
    values["data"]["task"] = "caption"  # as a shared policy says it, without the file that it learnt from
    (a_run / "config.yaml").write_text(yaml.safe_dump(values))
    assert lever(*command).json["config"]["data"]["task"] == "caption"


def test_a_split_of_its_own_is_given_to_the_table_of_a_run(lever, a_run):
    found = planned(lever, "--run-name", "mine", "--val", "v.csv")["config"]["data"]
    assert (found["file"], found["val_file"], found["columns"]) == ("a.csv", "v.csv", {"question": "ask"})
    (a_run / "config.yaml").write_text(yaml.safe_dump(to_dict(Config())))
    refused(lever("convert", "--run-name", "mine", "--val", "v.csv", "--json"), "--val v.csv", "--data")


@pytest.mark.parametrize("words", [("--data", "a.csv"), ("--val", "v.csv"), ("--task", "number")], ids=" ".join)
def test_a_run_that_is_repeated_or_shown_is_of_its_own_data(lever, a_run, words):
    (a_run / "env.json").write_text("{}")
    refused(lever("train", "--from-run", str(a_run), *words, "--json"), words[0], "brings its own config")
    refused(lever("config", "show", str(a_run), *words, "--json"), words[0], "brings its own config")


def test_a_run_of_a_table_is_trained_by_the_default_warm_up_and_its_rollouts_are_of_the_table(lever):
    plan = lever("train", "--data", "a.csv", "--dry-run", "--json")
    assert plan.status == 0, plan.err
    assert plan.json["config"]["warmup"] == "rce"
    assert [stage["name"] for stage in plan.json["stages"]] == ["features", "rollouts", "rce", "grpo"]


# ---------------------------------------------------------------------- the whole way

SMALL = ("--rce-epochs", "1", "--grpo-epochs", "2")
QUESTION = "How do you say this number in Spanish?"


def write_table(folder, examples) -> None:
    """photos/ and labels.csv."""
    (folder / "photos").mkdir(parents=True)
    rows = ["image,question,answer"]
    for number, example in enumerate(examples):
        shutil.copy(example.image, folder / f"photos/{number}.jpg")
        rows.append(f"photos/{number}.jpg,{QUESTION},{example.answer}")
    (folder / "labels.csv").write_text("\n".join(rows))


@pytest.fixture(scope="module")
def own_once(tmp_path_factory, digits):
    """A folder with photos/ and labels.csv, 60 rows of the digits; another one of that name; a run on the first."""
    folder = tmp_path_factory.mktemp("own")
    examples = [example for example in digits.train_examples if example.question == QUESTION]
    write_table(folder, examples[:60])
    write_table(folder / "other", examples[60:80])
    done = run_here("train", "--data", "labels.csv", *SMALL, "--json", cwd=folder)
    assert done.status == 0, done.err
    (folder / "said.txt").write_text(done.err)
    return folder


@pytest.fixture
def own(own_once, tmp_path):
    """A copy of it, with the run's results where they were made for the copy."""
    shutil.copytree(own_once, tmp_path, dirs_exist_ok=True)
    (tmp_path / "results/labels" / SOURCE).write_text(json.dumps({"file": str(tmp_path / "labels.csv")}))
    return tmp_path


def well(folder, *words) -> dict:
    done = run_here(*words, "--json", cwd=folder)
    assert done.status == 0, done.err
    return done.json


def test_training_on_a_table_says_its_task_and_keeps_whose_results_these_are(own_once):
    assert "task: short_answer (--task names another)\n" in (own_once / "said.txt").read_text()
    assert source_of(own_once / "results/labels") == str((own_once / "labels.csv").resolve())
    assert [path.name for path in (own_once / "results").iterdir()] == ["labels"]
    (config,) = own_once.glob("results/labels/model_cpk/*/config.yaml")
    data = yaml.safe_load(config.read_text())["data"]
    assert (data["file"], data["name"], data["task"]) == ("labels.csv", "labels", "short_answer")


def test_a_run_on_a_table_is_used_by_every_command(own):
    (name,) = (path.name for path in own.glob("results/labels/model_cpk/*"))
    by_data = well(own, "infer", "--data", "./labels.csv", "--shots", "1,2")
    assert {(row["shots"], row["n"]) for row in by_data["results"]} == {(1, 12), (2, 12)}
    assert 0 < by_data["results"][-1]["accuracy"] <= 1
    by_name = well(own, "infer", "--run-name", name, "--shots", "1,2")
    assert by_name["results"] == by_data["results"]
    assert well(own, "report", "--data", "labels.csv")["report"].startswith("results/labels/")
    assert len(well(own, "pick", "--data", "labels.csv", "--shots", "2")["icds"]) == 2
    assert well(own, "status", "--data", "labels.csv")["phases"]
    assert [path.name for path in (own / "results").iterdir()] == ["labels"]


def test_a_second_file_of_the_name_has_results_of_its_own(own):
    plan = well(own, "rollout", "--data", "other/labels.csv", "--dry-run")
    assert sorted(path.name for path in (own / "results").iterdir()) == ["labels"]
    well(own, "rollout", "--data", "other/labels.csv", "--limit", "8")
    other = plan["config"]["data"]["name"]
    assert sorted(path.name for path in (own / "results").iterdir()) == ["labels", other]
    assert other.startswith("labels-")
    assert source_of(own / "results" / other) == str(own / "other/labels.csv")


def test_a_look_at_a_table_writes_nothing(own):
    shutil.rmtree(own / "results")
    before = files_in(own)
    found = well(own, "doctor", "--data", "labels.csv")
    assert found["data"]["files"] == ["labels.csv"]
    assert found["data"]["rows"] == 60
    assert found["data"]["columns"] == {"image": "image", "question": "question", "answer": "answer"}
    assert (found["data"]["task"], len(found["data"]["first"]), found["data"]["odd"]) == ("short_answer", 5, [])
    said = run_here("doctor", "--data", "labels.csv", cwd=own).out.splitlines()
    assert "   data  labels.csv, 60 rows" in said
    assert "columns  image: image, question: question, answer: answer" in said
    assert "   task  short_answer: its answers are a few words, of fewer than ten people" in said
    assert len([line for line in said if line.startswith("  row ")]) == 5
    said = run_here("doctor", "--data", "labels.csv", "--task", "number", cwd=own).out
    assert "number, but its answers are a few words, of fewer than ten people: --task short_answer\n" in said
    well(own, "train", "--data", "labels.csv", "--dry-run")
    assert files_in(own) == before


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("nowhere.csv", None, ("nowhere.csv is not there", "--data")),
        ("empty.csv", "", ("empty.csv", "columns")),
        ("wrong.csv", "a,b\n1,2\n", ("wrong.csv", "a, b")),
        ("notes.txt", "x", ("notes.txt", "'.txt'", "--data")),
    ],
)
def test_a_table_that_cannot_be_read_is_one_missing_line_with_its_mend(lever, tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_text(content)
    done = lever("doctor", "--data", name)
    assert done.status == 1
    missing = [line for line in done.out.splitlines() if line.startswith("missing")]
    assert len(missing) == 1, done.out
    assert " → " in missing[0]
    assert all(word in missing[0] for word in told), missing
    trained = lever("train", "--data", name, "--json")
    assert (trained.status, trained.out) == (1, "")
    assert "Traceback" not in trained.err
    assert not (tmp_path / "results").exists()
