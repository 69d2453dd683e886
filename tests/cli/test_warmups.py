"""Warm-ups of `lever train` on a small world: answer match, and it before RCE; and validation by answers."""

import functools
import json
import shutil

import pytest
import torch
from helpers import done, run_here, small_digits

from lever_lm.config.load import resolve
from lever_lm.lvlm import build_prompt
from lever_lm.selectors.pointer.checkpoint import load_policy
from lever_lm.tasks import TASKS
from lever_lm.training.pipeline import Pipeline
from lever_lm.training.rollouts.file_format import read_rollouts, split_ids
from lever_lm.training.run_dir import RunFolder
from lever_lm.utils.console import Screen
from lever_lm.utils.safe_torch_load import load_torch

RUN = "results/small/model_cpk/run"
ROLLOUTS = "results/small/generated_data/rl_data_MixSampler_tiny-qwen2_5-vl_run.json"
WORLD = ("data.name=small", "data.okvqa_path=world", "rollout.pool_size=12", "rollout.num_queries=10")
SETS = ("--dataset", "digits", *(word for item in (*WORLD, "policy.hidden_dim=16") for word in ("--set", item)))
EPOCHS = ("--rce-epochs", "3", "--grpo-epochs", "2")
CHAIN = ("train", *SETS, *EPOCHS, "--run-name", "run", "--set", "warmup=match+rce")
ANSWERED = ("train", *SETS, *EPOCHS, "--run-name", "run", "--validate-on", "answers")


@pytest.fixture(scope="module")
def world_once(tmp_path_factory):
    """A folder with data, features and rollouts, and nothing trained."""
    folder = tmp_path_factory.mktemp("warmups")
    small_digits(folder / "world", 60, 10)
    done(("rollout", *SETS, "--run-name", "run"), folder)
    return folder


@pytest.fixture
def world(world_once, tmp_path):
    shutil.copytree(world_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


def rows_of(folder, run=RUN) -> list[dict]:
    rows = RunFolder(folder / run).rows()
    return [{key: value for key, value in row.items() if not key.endswith("_time")} for row in rows]


def logged(folder) -> tuple[dict, list[int], list[int]]:
    """The rollout file, and the rows of its queries that are learnt from and that are held out."""
    content = read_rollouts(folder / ROLLOUTS)
    return content, *map(sorted, split_ids([int(key) for key in content if key.isdigit()]))


def features_of(pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    features, config = pipeline.features, pipeline.config.features
    return features.queries("train", config), features.icds(config)


def same_weights(one, other) -> bool:
    one, other = (load_torch(path)["model_state_dict"] for path in (one, other))
    return all(torch.equal(one[name], other[name]) for name in one)


def test_matches_hold_out_the_queries_that_rollouts_from_elsewhere_hold_out(world):
    """Named by --rl-data, or found where `lever rollout` would have written them."""
    done(("rollout", *SETS, "--run-name", "run", "--seed", "5"), world)
    content = {key: value for key, value in read_rollouts(world / ROLLOUTS).items() if key != "_meta"}
    (world / ROLLOUTS).write_text(json.dumps(content))
    said = done(CHAIN, world)
    assert "is taken as it is" in said.err
    (world / ROLLOUTS).rename(world / "rl.json")
    (world / RUN).rename(world / "found")
    done((*CHAIN, "--rl-data", "rl.json"), world)
    assert same_weights(world / "found/rce_epoch2.pt", world / RUN / "rce_epoch2.pt")


def test_of_two_losses_each_has_its_epochs_and_the_run_says_which(world):
    said = done(CHAIN, world)
    run = world / RUN
    rows = rows_of(world)
    told = [(row["phase"], row["epoch"], row.get("warmup")) for row in rows]
    assert told == [("rce", 1, "match"), ("rce", 2, "match"), ("rce", 3, None), ("grpo", 1, None), ("grpo", 2, None)]
    assert {path.name for path in run.glob("rce_*.pt")} == {f"rce_epoch{epoch}.pt" for epoch in (1, 2, 3)}
    headings = ["阶段2：MATCH预热", "阶段2：RCE预热", "阶段3：GRPO训练"]
    for text in (said.err, (run / "train.log").read_text(encoding="utf-8")):
        assert [line for line in text.splitlines() if "阶段" in line] == headings
    assert rows[2]["temperature"] == 0.5  # RCE's only epoch is its last
    assert "MATCH+RCE 3 of 3 epochs, then GRPO 2 of 2 epochs" in run_here("status", RUN, cwd=world).out
    assert load_torch(run / "rce_epoch1.pt")["config"]["warmup"] == "match+rce"
    done(("report", RUN), world)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Warm-up: answer match, then RCE" in page


def test_the_reward_of_a_warm_up_is_that_of_the_logged_groups_as_grpos_is(world):
    done(("train", *SETS, "--rce-epochs", "1", "--grpo-epochs", "1", "--run-name", "run"), world)
    (first, *_), (content, _, held_out) = rows_of(world), logged(world)
    policy = load_policy(world / RUN / "rce_epoch1.pt")
    queries, icds = features_of(pipeline_in(world))
    expected = []
    for row in held_out:
        pool, rollouts = content[str(row)]["candidate_pool_ids"], content[str(row)]["pointer_candidates"]
        sequences = torch.tensor([[one["pointer"] for one in rollouts]])
        shares = policy.log_prob(queries[row][None], icds[pool][None], sequences)[0].softmax(-1)
        rewards = [one["vqa_correct"] + one["vqa_acc_score"] for one in rollouts]
        expected.append(sum(share * reward for share, reward in zip(shares.tolist(), rewards, strict=True)))
    assert first["val_reward"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def pipeline_in(folder) -> Pipeline:
    sets = [*WORLD, "policy.hidden_dim=16", f"data.okvqa_path={folder / 'world'}"]
    config, _ = resolve({"dataset": "digits", "lvlm": "tiny_qwen2.5_vl"}, None, sets, {})
    return Pipeline(config, Screen(quiet=True), results=folder / "results", run_name="run")


@pytest.fixture(scope="module")
def unbroken(world_once, tmp_path_factory):
    """A function from a command to a folder in which it has been run, its run set aside as `whole`."""

    @functools.cache
    def of(command):
        folder = tmp_path_factory.mktemp("unbroken")
        shutil.copytree(world_once, folder, dirs_exist_ok=True)
        done(command, folder)
        shutil.move(folder / RUN, folder / "whole")
        return folder

    return of


@pytest.mark.parametrize("command", [CHAIN, ANSWERED], ids=["match+rce", "validated by answers"])
@pytest.mark.parametrize("at", [("rce", 2), ("rce", 3), ("grpo", 1)], ids=str)
def test_a_killed_run_goes_on_to_the_same_weights_and_rows(unbroken, tmp_path, command, at, monkeypatch):
    world = shutil.copytree(unbroken(command), tmp_path, dirs_exist_ok=True)
    published = RunFolder.checkpoint

    def dies(self, phase, epoch):
        if (phase, epoch) == at:
            raise KeyboardInterrupt
        return published(self, phase, epoch)

    monkeypatch.setattr(RunFolder, "checkpoint", dies)
    assert run_here(*command, cwd=world).status != 0
    monkeypatch.undo()
    done(command, world)
    assert rows_of(world / "whole", "") == rows_of(world)
    names = [path.name for path in (world / "whole").glob("*_epoch?.pt")]
    assert len(names) == 5
    assert all(same_weights(world / "whole" / name, world / RUN / name) for name in names)
    logs = [(folder / "train.log").read_text(encoding="utf-8") for folder in (world / "whole", world / RUN)]
    assert logs[0] == logs[1]


def test_validation_by_answers_is_the_score_of_the_greedy_picks_and_chooses_and_is_counted(world):
    plan = done((*ANSWERED, "--dry-run"), world).json
    stages = {stage["name"]: stage for stage in plan["stages"]}
    found = done(ANSWERED, world).json
    rows, pipeline, (content, _, held_out) = rows_of(world), pipeline_in(world), logged(world)
    assert stages["validation"]["lvlm_calls"] == 5 * len(held_out) == 10
    train, prompt, features = pipeline.data.train_examples, pipeline.config.prompt, features_of(pipeline)
    for row in rows:
        policy, scores = load_policy(world / RUN / f"{row['phase']}_epoch{row['epoch']}.pt"), []
        for query in held_out:
            pool = content[str(query)]["candidate_pool_ids"]
            (places,) = policy.select(features[0][query][None], features[1][pool][None], 2).tolist()
            asked = build_prompt([train[pool[place]] for place in places], train[query], prompt)
            scores.append(TASKS["vqa"].score(pipeline.lvlm.answer([asked])[0], train[query]))
        assert row["val_accuracy"] == pytest.approx(sum(scores) / len(scores))
    grpo = [row for row in rows if row["phase"] == "grpo"]
    best = max(grpo, key=lambda row: row["val_accuracy"])["epoch"]
    assert found["recommended"]["strategy"] == "val_accuracy"
    assert found["recommended"]["epoch"] == best
    named = done(("best-ckpt", RUN, "--strategy", "val_accuracy"), world).json
    assert named["epoch"] == best
    calls = [load_torch(world / RUN / f"{name}.pt")["config"]["lvlm_calls"] for name in ("rce_epoch3", "grpo_epoch2")]
    assert calls == [10, content["_meta"]["lvlm_calls"] + 10]


def test_a_run_without_it_is_recommended_by_its_reward_and_the_strategy_names_the_option(world):
    found = done(("train", *SETS, *EPOCHS, "--run-name", "run"), world).json
    assert found["recommended"]["strategy"] == "val_reward"
    assert found["recommended"]["others"]["val_accuracy"] is None
    refused = run_here("best-ckpt", RUN, "--strategy", "val_accuracy", cwd=world)
    assert refused.status == 1
    assert "lever train --validate-on answers" in refused.err


def test_answer_match_alone_is_validated_by_answers_too(world):
    command = ("train", *SETS, "--selector", "answer_match", "--rce-epochs", "1", "--validate-on", "answers")
    done(command, world)
    (row,) = RunFolder(world / "results/small/model_cpk/answer_match").rows()
    assert 0 <= row["val_accuracy"] <= 1
    own = load_torch(world / "results/small/model_cpk/answer_match/rce_epoch1.pt")["config"]
    assert own["lvlm_calls"] == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--set", "warmup=match+rce", "--rce-epochs", "1"), "--rce-epochs 2"),
        (("--set", "warmup=rce+match"), "match+rce"),
        (("--set", "validate_on=both"), "rollouts, answers"),
        (("--set", "warmup=match+epr"), "--set rollout.shots=1"),
        (("--selector", "fixed_set", "--validate-on", "answers"), "--validate-on rollouts"),
    ],
)
def test_what_cannot_be_is_refused_with_the_option(options, said, tmp_path):
    refused = run_here("train", *options, cwd=tmp_path)
    assert refused.status == 2
    assert said in refused.err
    assert not (tmp_path / "results").exists()


def test_match_then_epr_is_a_run(world):
    shown_alone = ("--set", "rollout.shots=1", "--set", "warmup=match+epr")
    done(("train", *SETS, *shown_alone, "--rce-epochs", "2", "--grpo-epochs", "0", "--run-name", "epr"), world)
    rows = RunFolder(world / "results/small/model_cpk/epr").rows()
    assert [row["warmup"] for row in rows] == ["match", "epr"]
    made = done(("infer", "--run-name", "epr", "--limit", "2", "--shots", "1"), world).json
    assert [row["method"] for row in made["results"]] == ["epr"]


@pytest.mark.parametrize(
    ("named", "warmup"),
    [
        (("--dataset", "digits"), "match"),
        (("--dataset", "okvqa_local"), "rce"),
        (("--dataset", "vqav2_local"), "rce"),
        (("--recipe", "classic"), "rce"),
        (("--recipe", "infoscore"), "rce"),
        (("--recipe", "demo"), "match"),
        (("--selector", "epr"), "epr"),
        (("--selector", "lever_lm"), "lever_lm"),
        (("--recipe", "classic", "--set", "warmup=match"), "match"),
        (("--rl-data", "rl.json", "--embeddings", "features.pt"), "rce"),
        (("--set", "data.okvqa_path=elsewhere"), "rce"),
        (("--set", "data.okvqa_path=elsewhere", "--dataset", "digits"), "match"),
    ],
)
def test_the_digits_begin_with_answer_match_and_what_names_another_warm_up_has_it(named, warmup, tmp_path):
    (tmp_path / "rl.json").write_text("{}")
    torch.save(torch.zeros(2, 3), tmp_path / "features.pt")
    plan = done(("train", *named, "--dry-run"), tmp_path).json
    assert plan["config"]["warmup"] == warmup


def test_the_density_of_matches_is_said_first_and_names_the_option_where_it_would_pay(world):
    told = "of the training queries have one in their pool"
    matched = done(("train", *SETS, "--rce-epochs", "1", "--grpo-epochs", "1", "--run-name", "run"), world).err
    assert matched.index(told) < matched.index("rollouts: ")
    assert "warmup=match" not in matched
    by_rce = done(("train", *SETS, "--set", "warmup=rce", *EPOCHS, "--run-name", "rce"), world).err
    assert by_rce.index(told) < by_rce.index("阶段2")
    train, (content, learnt, _) = pipeline_in(world).data.train_examples, logged(world)
    counts = [
        sum(TASKS["vqa"].score(train[icd].answer, train[row]) > 0 for icd in content[str(row)]["candidate_pool_ids"])
        for row in learnt
    ]
    share = sum(map(bool, counts)) / len(counts)
    assert f"matches: {share:.0%} {told}, {sum(counts) / sum(map(bool, counts)):.1f} on average" in by_rce
    assert ("--set warmup=match" in by_rce) == (share >= 0.5)
