"""The learnt selectors on the command line: trained, killed, gone on with, set against one another, looked at."""

import json
import shutil
import sqlite3

import pytest
import torch
import yaml
from helpers import done, files_in, run_here, small_digits

from lever_lm.selectors import SELECTORS
from lever_lm.training.rollouts.file_format import read_rollouts, split_ids
from lever_lm.training.rollouts.propose import query_rows
from lever_lm.training.run_dir import RunFolder
from lever_lm.utils.safe_torch_load import load_torch

TRAIN, VAL = 60, 10
RUNS = "results/small/model_cpk"
WORLD = ("--set", "data.name=small", "--set", "data.okvqa_path=world", "--set", "rollout.pool_size=12")
WORLD += ("--set", "infer.pool_size=12", "--limit", "10")
TINY = ("--set", "policy.hidden_dim=16")
EPOCHS = {"answer_match": 3, "epr": 2, "lever_lm": 2, "fixed_set": 1}
OWN = {
    "epr": ("--set", "rollout.random=4", "--set", "rollout.retrieval=3"),
    "lever_lm": ("--set", "rollout.shots=2", "--set", "rollout.infoscore=3"),
}
MATCH = ("--set", "warmup=match", "--rce-epochs", "2", "--grpo-epochs", "2", "--run-name", "both")


def train(name: str, *options, epochs: int | None = None) -> tuple:
    """The command that trains a selector in the small world; `main` is the run of RCE and GRPO."""
    if name == "main":
        rce = ("--set", "warmup=rce", "--rce-epochs", 1)
        return ("train", *WORLD, *TINY, *rce, "--grpo-epochs", 2, "--run-name", "main", *options)
    count = EPOCHS[name] if epochs is None else epochs
    return ("train", "--selector", name, *WORLD, *TINY, *OWN.get(name, ()), "--rce-epochs", count, *options)


@pytest.fixture(scope="module")
def arena_once(tmp_path_factory):
    """A folder in which all selectors have been trained, and nothing evaluated."""
    folder = tmp_path_factory.mktemp("arena")
    small_digits(folder / "world", TRAIN, VAL)
    for name in ("main", *EPOCHS):
        done(train(name), folder)
    return folder


@pytest.fixture
def arena(arena_once, tmp_path):
    """A copy of the test's own."""
    shutil.copytree(arena_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


def known_answers(folder) -> int:
    (path,) = folder.rglob("answers_*.sqlite")
    with sqlite3.connect(path) as db:
        return db.execute("SELECT count(*) FROM answers WHERE key NOT LIKE 'speed:%'").fetchone()[0]


def rollouts(folder, name):
    return folder / f"results/small/generated_data/rl_data_MixSampler_tiny-qwen2_5-vl_{name}.json"


def weights(folder, run, epoch):
    return load_torch(folder / RUNS / run / f"rce_epoch{epoch}.pt")["model_state_dict"]


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("name", EPOCHS)
def test_a_learnt_selector_leaves_a_run_of_its_name(arena_once, name):
    run, count = arena_once / RUNS / name, EPOCHS[name]
    there = {path.name for path in run.iterdir()}
    checkpoints = {f"rce_epoch{epoch}.pt" for epoch in range(1, count + 1)}
    assert {"config.yaml", "env.json", "metrics.jsonl", "state.pt", "train.log", *checkpoints} <= there
    assert not {path for path in there if path.startswith("grpo")}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["epoch"]) for row in rows] == [("rce", epoch + 1) for epoch in range(count)]
    assert all(isinstance(row[key], float) for row in rows for key in ("train_loss", "val_loss", "val_reward"))
    assert sum(line.split()[:1] == [str(count)] for line in (run / "train.log").read_text().splitlines()) == 1
    own = load_torch(run / "rce_epoch1.pt")["config"]
    assert own["warmup"] == yaml.safe_load((run / "config.yaml").read_text())["warmup"]
    assert any(path.endswith("_v2format.ckpt") for path in there) == (name == "answer_match")


@pytest.mark.parametrize("name", EPOCHS)
def test_a_checkpoint_says_how_many_prompts_were_put_for_it(arena_once, name):
    own = load_torch(arena_once / RUNS / name / "rce_epoch1.pt")["config"]
    if name == "answer_match":
        assert own["lvlm_calls"] == 0
        assert not rollouts(arena_once, name).exists()
        return
    content = read_rollouts(rollouts(arena_once, name))
    shown = {
        (key, *one["pointer"]) for key, entry in content.items() if key.isdigit() for one in entry["pointer_candidates"]
    }
    assert own["lvlm_calls"] == content["_meta"]["lvlm_calls"]
    if name == "lever_lm":  # the search has asked, too
        assert own["lvlm_calls"] > len(shown)
    else:
        assert own["lvlm_calls"] == len(shown)


@pytest.mark.parametrize("name", ["answer_match", "epr", "lever_lm"])
def test_a_run_that_is_killed_goes_on_to_the_same_weights(arena, name, monkeypatch):
    whole = weights(arena, name, EPOCHS[name])
    shutil.rmtree(arena / RUNS / name)
    published = RunFolder.checkpoint

    def dies(self, phase, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return published(self, phase, epoch)

    monkeypatch.setattr(RunFolder, "checkpoint", dies)
    killed = run_here(*train(name), cwd=arena)
    assert killed.status != 0
    monkeypatch.setattr(RunFolder, "checkpoint", published)
    assert [row["epoch"] for row in RunFolder(arena / RUNS / name).rows()] == [1]
    assert "going on after rce epoch" in done(train(name), arena).err
    same(weights(arena, name, EPOCHS[name]), whole)


@pytest.mark.parametrize("name", ["answer_match", "epr", "lever_lm"])
def test_another_number_of_epochs_is_another_run(arena, name):
    before = files_in(arena / RUNS / name)
    refused = run_here(*train(name, epochs=EPOCHS[name] + 1), cwd=arena)
    assert refused.status == 1
    assert f"rce.epochs: {EPOCHS[name]} there, {EPOCHS[name] + 1} here" in refused.err
    assert files_in(arena / RUNS / name) == before
    done(train(name, "--run-name", "longer", epochs=EPOCHS[name] + 1), arena)
    same(weights(arena, name, 1), weights(arena, "longer", 1))


def test_a_fixed_set_is_one_epoch(arena):
    before = files_in(arena)
    refused = run_here(*train("fixed_set", epochs=3), cwd=arena)
    assert refused.status == 2
    assert "--rce-epochs 1" in refused.err
    assert files_in(arena) == before


@pytest.mark.parametrize("name", EPOCHS)
def test_a_run_is_repeated(arena, name):
    command = ("train", "--from-run", f"{RUNS}/{name}", "--run-name", "again")
    repeated = done(command, arena).json["repeated"]
    assert repeated["identical"]
    assert repeated["epochs"] == EPOCHS[name]
    same(weights(arena, "again", EPOCHS[name]), weights(arena, name, EPOCHS[name]))


# ---------------------------------------------------------------------- answer match before GRPO


def test_answer_match_alone_asks_nothing_and_loads_no_lvlm(arena, monkeypatch):
    for path in arena.rglob("answers_*.sqlite"):
        path.unlink()
    shutil.rmtree(arena / RUNS / "answer_match")
    done(train("answer_match", "--set", "lvlm.path=gone/model"), arena)
    assert not list(arena.rglob("answers_model*"))
    assert not rollouts(arena, "answer_match").exists()


def test_answer_match_learns_from_no_rollouts(arena):
    given = ("--rl-data", rollouts(arena, "main"), "--run-name", "given")
    refused = run_here(*train("answer_match", *given), cwd=arena)
    assert refused.status == 2
    assert "--rl-data" in refused.err
    assert not (arena / RUNS / "given").exists()


def test_answer_match_then_grpo_goes_on_and_is_validated_on_queries_that_it_did_not_learn_from(arena, monkeypatch):
    from lever_lm.training.warmup import MatchGroups

    drawn, draw = [], MatchGroups.draw
    monkeypatch.setattr(
        MatchGroups, "draw", lambda self, rows, epoch: drawn.append((epoch, rows)) or draw(self, rows, epoch)
    )
    command = ("train", *WORLD[:-2], "--set", "rollout.num_queries=10", *TINY, *MATCH)
    done(command, arena)
    run = RunFolder(arena / RUNS / "both")
    assert [(row["phase"], row["epoch"]) for row in run.rows()] == [("rce", 1), ("rce", 2), ("grpo", 1), ("grpo", 2)]
    learnt = {row for epoch, rows in drawn if epoch for row in rows}
    held_out = split_ids(query_rows(10, TRAIN, 0))[1]
    assert held_out
    assert not held_out & learnt
    assert learnt | held_out == set(range(TRAIN))
    assert {load_torch(run.checkpoint("rce", epoch))["config"]["lvlm_calls"] for epoch in (1, 2)} == {0}
    last = load_torch(run.checkpoint("grpo", 2))
    assert last["config"]["lvlm_calls"] == read_rollouts(rollouts(arena, "both"))["_meta"]["lvlm_calls"] > 0
    shutil.copytree(run.path, arena / "kept")
    shutil.rmtree(run.path)
    done([*command[:-3], "0", *command[-2:]], arena)  # the warm-up alone, which is then given GRPO
    assert len(run.rows()) == 2
    assert "going on after rce epoch 2" in done(command, arena).err
    same(load_torch(run.checkpoint("grpo", 2))["model_state_dict"], last["model_state_dict"])


# ---------------------------------------------------------------------- the table


def table(folder, *options):
    return done(("infer", "--run-name", "main", "--limit", "8", "--shots", "1,2", *options), folder)


def test_all_selectors_stand_in_one_table_and_nothing_is_asked_twice(arena):
    first = table(arena, "--against", "all")
    known = known_answers(arena)
    again = table(arena, "--against", "all")
    assert known_answers(arena) == known
    rows = first.json["arena"]

    def without_seconds(found):
        return [{name: value for name, value in row.items() if name != "seconds"} for row in found]

    assert without_seconds(rows) == without_seconds(again.json["arena"])
    assert {row["method"] for row in rows} == set(SELECTORS) - {"policy", "icds"}
    kept = json.loads((arena / first.json["folder"] / "metrics.json").read_text())
    assert without_seconds(kept["arena"]) == without_seconds(rows)
    calls = {row["method"]: row["train_calls"] for row in rows}
    for name in ("epr", "lever_lm", "fixed_set", "main"):
        meta = read_rollouts(rollouts(arena, name))["_meta"]
        for method in ("rce", "grpo") if name == "main" else (name,):
            assert calls[method] == meta["lvlm_calls"] > 0
    assert all(calls[name] == 0 for name in calls if name not in ("epr", "lever_lm", "fixed_set", "rce", "grpo"))
    assert {row["method"]: row["query_calls"] for row in rows if row["query_calls"]} == {"pseudo_answer": 1}
    pools = {row["method"] for row in rows if row["chooses_from"] == "pools of 12"}
    assert pools == {"answer_match", "epr", "rce", "grpo", "oracle"}
    others = {row["chooses_from"] for row in rows if row["method"] not in {*pools, "zero_shot"}}
    assert others == {f"all {TRAIN}"}
    most = {row["method"]: row["accuracy"] for row in rows if row["shots"] in (0, 2)}
    assert list(dict.fromkeys(row["method"] for row in rows)) == sorted(most, key=lambda name: (-most[name], name))
    simple = max(most[name] for name in most if SELECTORS[name].simple and name != "zero_shot")
    tested = [row for row in rows if row["shots"] == 2 and "difference" in row]
    assert tested
    assert all(row["difference"] == pytest.approx(row["accuracy"] - simple) for row in tested)
    assert all(row["p"] <= row["p_holm"] <= 1 for row in tested)
    accuracies = {(row["method"], row["shots"]): row["accuracy"] for row in first.json["results"]}
    assert accuracies == {(row["method"], row["shots"]): row["accuracy"] for row in rows}


def test_names_alone_baselines_beside_them_and_neither(arena):
    plain = table(arena)
    assert "arena" not in plain.json
    assert {row["method"] for row in plain.json["results"]} == {"grpo"}
    named = table(arena, "--against", "epr,dpp")
    assert {row["method"] for row in named.json["arena"]} == {"grpo", "epr", "dpp"}
    both = table(arena, "--against", "epr,random", "--baselines")
    assert {row["method"] for row in both.json["results"]} >= {"grpo", "epr", "random", "zero_shot", "oracle"}
    assert {row["method"] for row in both.json["arena"]} >= {"grpo", "epr", "random"}


def test_choices_of_ones_own_stand_beside_the_selectors(arena):
    first = table(arena, "--against", "epr")
    shutil.copy2(arena / first.json["folder"] / "samples_epr_2shot.jsonl", arena / "own.jsonl")
    found = table(arena, "--icds", "own.jsonl", "--against", "epr,mmr")
    rows = {(row["method"], row["shots"]): row for row in found.json["arena"]}
    assert rows["icds", 2]["accuracy"] == rows["epr", 2]["accuracy"]
    assert rows["icds", 2]["chooses_from"] == "a file"
    assert {row["accuracy"] for row in first.json["arena"] if row["method"] == "epr" and row["shots"] == 2} == {
        rows["epr", 2]["accuracy"]
    }


def test_a_selector_that_was_named_and_never_trained_is_refused_and_of_all_it_is_left_out(arena):
    shutil.rmtree(arena / RUNS / "epr")
    refused = run_here("infer", "--run-name", "main", "--limit", "8", "--against", "epr", cwd=arena)
    assert refused.status == 1
    assert "lever train --selector epr" in refused.err
    found = table(arena, "--against", "all")
    assert "left out: epr" in found.err
    assert "epr" not in {row["method"] for row in found.json["arena"]}


# ---------------------------------------------------------------------- each of them alone


@pytest.mark.parametrize("name", EPOCHS)
def test_every_command_on_a_run_takes_a_learnt_selector(arena, name, monkeypatch):
    of_run = ("--run-name", name)
    found = done(("infer", *of_run, "--limit", "6", "--shots", "2"), arena).json
    assert {row["method"] for row in found["results"]} == {name}
    status = done(("status", *of_run), arena).json
    assert (status["state"], status["command"]) == ("finished", None)
    assert status["phases"]["rce"] == {"done": EPOCHS[name], "of": EPOCHS[name]}
    spoken = run_here("status", *of_run, cwd=arena).out
    assert f"{status['warmup'].upper()} {EPOCHS[name]} of {EPOCHS[name]} epochs" in spoken
    best = done(("best-ckpt", *of_run, "--strategy", "val_reward"), arena).json
    assert best["checkpoint"] == found["checkpoint"]
    done(("doctor", *of_run), arena)
    assert "<html" in (arena / done(("report", *of_run), arena).json["report"]).read_text()
    picked = done(("pick", *of_run, "--shots", "3"), arena).json
    sure = [icd["probability"] for icd in picked["icds"]]
    from_pool = name in ("answer_match", "epr")
    assert all(isinstance(one, float) if from_pool else one is None for one in sure)
    assert len(sure) == 3
    assert picked["pool"]["size"] == 12 if from_pool else picked["pool"]["size"] >= TRAIN - 1
    assert ("a pool of 12" if from_pool else "all ") in run_here("pick", *of_run, "--no-answer", cwd=arena).out


@pytest.mark.parametrize("name", EPOCHS)
def test_an_exported_selector_answers_as_its_run_does(arena, name):
    of_run = done(("infer", "--run-name", name, "--limit", "6", "--shots", "2"), arena).json["results"]
    done(("export", f"{RUNS}/{name}", "shared"), arena)
    world = ("--set", "data.okvqa_path=world", "--limit", "6")
    shared = done(("infer", "--ckpt", "shared", *world, "--shots", "2"), arena).json["results"]
    assert [row["accuracy"] for row in shared] == [row["accuracy"] for row in of_run]


@pytest.mark.parametrize("name", EPOCHS)
def test_a_plan_counts_what_a_selector_asks(arena_once, tmp_path, name):
    shutil.copytree(arena_once / "world", tmp_path / "world")
    (tmp_path / "results/small/cache").mkdir(parents=True)
    for path in (arena_once / "results/small/cache").glob("features*"):
        shutil.copy2(path, tmp_path / "results/small/cache")
    before = files_in(tmp_path)
    plan = done((*train(name), "--dry-run"), tmp_path).json
    assert files_in(tmp_path) == before
    asked = load_torch(arena_once / RUNS / name / "rce_epoch1.pt")["config"]["lvlm_calls"]
    stages = {stage["name"]: stage for stage in plan["stages"]}
    assert ("rollouts" in stages) == ("rollouts" in plan["paths"]) == (name != "answer_match")
    if name == "lever_lm":
        assert plan["lvlm_calls"] >= asked
        assert not stages["rollouts"]["exact"]
    else:
        assert plan["lvlm_calls"] == asked
    if name == "epr":
        assert asked == 10 * (4 + 3)
    warmup = plan["config"]["warmup"]
    assert stages[warmup]["state"] == f"0 of {EPOCHS[name]} epochs there"


def test_a_plan_of_a_table_is_never_less_than_what_is_asked(arena):
    command = ("infer", "--run-name", "main", "--limit", "8", "--shots", "1,2", "--against", "all")
    before, there = known_answers(arena), files_in(arena)
    plan = done((*command, "--dry-run"), arena).json
    assert files_in(arena) == there
    done(command, arena)
    assert 0 < known_answers(arena) - before <= plan["lvlm_calls"]


# ---------------------------------------------------------------------- diagnosis


def test_a_diagnosis_on_the_command_line(arena):
    command = ("diagnose", "--run-name", "main", "--limit", "6", "--shots", "2", "--against", "epr,img_text_sim")
    first = done(command, arena)
    known = known_answers(arena)
    found = done(command, arena).json
    assert known_answers(arena) == known
    assert found == first.json
    assert (found["n"], found["shots"]) == (6, 2)
    assert list(found["methods"]) == ["grpo", "img_text_sim", "epr"]
    for rows in found["methods"].values():
        of = {row["key"]: row for row in rows}
        assert len(of) == 16
        for key in ("zero_shot", "images_removed", "reversed", "most_picked"):
            difference = of["picks"]["value"] - of[key]["value"]
            assert of[key]["test"]["difference"] == pytest.approx(difference)
    kept = json.loads((arena / found["folder"] / "diagnosis.json").read_text())
    assert kept["methods"] == found["methods"]
    spoken = run_here(*command, cwd=arena).out
    assert all(row["says"] in " ".join(spoken.split()) for row in found["methods"]["grpo"])


def test_a_diagnosis_of_one_shot_and_with_a_second_lvlm(arena):
    from lever_lm.utils.paths import asset_path

    shutil.copytree(asset_path("asset:tiny-qwen2.5-vl"), arena / "second")
    config = arena / RUNS / "fixed_set/config.yaml"
    config.write_text(config.read_text().replace("path: asset:tiny-qwen2.5-vl", "path: second"))
    command = ("diagnose", f"{RUNS}/fixed_set", "--limit", "5", "--shots", "1", "--lvlm", "tiny_qwen2.5_vl")
    (rows,) = done(command, arena).json["methods"].values()
    of = {row["key"]: row for row in rows}
    assert not {"reversed", "order_sensitivity"} & of.keys()
    assert of["other_lvlm"]["value"] == of["picks"]["value"]  # the first is a copy of it
    assert of["other_lvlm"]["parts"]["zero_shot"] == of["zero_shot"]["value"]
    assert of["other_lvlm"]["parts"]["lvlm"] == "tiny-qwen2_5-vl"


def test_a_plan_of_a_diagnosis_writes_nothing(arena):
    before = files_in(arena)
    plan = done(("diagnose", "--run-name", "main", "--dry-run"), arena).json
    assert plan["config"]["data"]["name"] == "small"
    assert files_in(arena) == before
