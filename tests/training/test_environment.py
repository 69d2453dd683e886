"""What a run was made with, and a run made again: the same, or what differs."""

import json
import shutil

import pytest
import torch
import yaml
from helpers import RUN, SMALL, run_here

from lever_lm.config.schema import Config
from lever_lm.selectors.pointer.checkpoint import save_torch
from lever_lm.training.environment import (
    PACKAGES,
    compare,
    differences,
    environment,
    own_files,
    read_environment,
    record,
)
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.select_checkpoint import STRATEGIES
from lever_lm.utils.errors import LeverError

MADE_OF = {"data": "1234", "encoder": "clip@5678"}


def env(**changes) -> dict:
    return {**environment(Config(seed=9), {"rollouts": "abc"}, MADE_OF, {}), **changes}


# ---------------------------------------------------------------------- env.json


def test_the_environment_names_versions_machine_seed_inputs_and_what_these_were_made_of():
    found = env()
    assert torch.__version__.startswith(found["packages"]["torch"])  # some builds keep their +label out of the metadata
    assert set(found["packages"]) == set(PACKAGES)
    assert all(found["packages"].values())
    assert (found["seed"], found["inputs"], found["fingerprints"]) == (9, {"rollouts": "abc"}, MADE_OF)
    assert found["device"].startswith("cpu, ") or "NVIDIA" in found["device"]
    assert found["threads"] == torch.get_num_threads()
    json.dumps(found)


def test_a_checkout_names_its_revision_and_whether_files_in_it_were_changed(tmp_path, monkeypatch):
    import subprocess

    from lever_lm.training import environment as provenance

    package = tmp_path / "lever_lm"
    package.mkdir()
    monkeypatch.setattr(provenance, "PACKAGE", package)
    assert env()["git_revision"] is None
    (package / "a.py").write_text("")
    who = ("-c", "user.name=a", "-c", "user.email=b")
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    clean = env()["git_revision"]
    assert len(clean) == 40
    (package / "a.py").write_text("changed")
    assert env()["git_revision"] == f"{clean} with changes"


def test_a_run_that_goes_on_elsewhere_keeps_what_it_was_begun_with_and_says_what_changed(tmp_path):
    run, said = RunFolder(tmp_path), []
    record(run, env(), said.append)
    record(run, env(), said.append)
    assert (said, read_environment(run)) == ([], env())
    newer = {**env()["packages"], "torch": "99.0"}
    record(run, env(packages=newer), said.append)
    record(run, env(packages=newer), said.append)
    assert said == [
        "going on with another environment than before: packages.torch: "
        f"{env()['packages']['torch']!r} there, '99.0' here"
    ]
    content = read_environment(run)
    assert content.pop("resumed_with") == [env(packages=newer)]
    assert content == env()


def test_what_was_typed_is_no_difference_of_environments():
    typed = [env(command=f"lever train --grpo-epochs {count}", last_command=f"lever {count}") for count in (2, 3)]
    assert differences(*typed) == []
    assert differences(env(seed=1), env(seed=2)) != []


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"packages": 3, "resumed_with": {"a": 1}}', '{"resumed_with": [3]}', "[" * 9999]
)
def test_an_env_json_of_whatever_content_stops_no_run(tmp_path, content):
    run = RunFolder(tmp_path)
    run.environment.write_text(content)
    record(run, env(), lambda text: None)
    assert isinstance(read_environment(run), dict)


def test_what_an_older_env_json_does_not_say_is_not_known_to_differ():
    assert differences({"python": "3.11"}, {"python": "3.11", "device": "cpu"}) == []
    assert differences({"a": {"b": 1}}, {"a": {"b": 2, "c": 3}}) == ["a.b: 1 there, 2 here"]


# ---------------------------------------------------------------------- a run made again


def test_a_run_is_repeated_bit_for_bit_and_says_so(trained):
    done = run_here("train", "--from-run", RUN, cwd=trained)  # what it repeats was trained in another process
    assert done.status == 0, done.err
    assert done.out.splitlines()[-1] == f"repeated {RUN}: all metrics and weights of 6 epochs are identical"
    again = trained / f"{RUN}_repeat"
    assert yaml.safe_load((again / "config.yaml").read_text()) == yaml.safe_load(
        (trained / RUN / "config.yaml").read_text()
    )
    assert sorted(path.name for path in again.glob("*.pt")) == sorted(
        path.name for path in (trained / RUN).glob("*.pt")
    )


def test_a_repetition_with_a_change_says_what_was_changed_and_where_it_shows_first(trained, monkeypatch):
    monkeypatch.setenv("KL_BETA", "7")
    done = run_here("train", "--from-run", RUN, "--run-name", "faster", "--set", "grpo.lr=0.01", "--json", cwd=trained)
    assert done.status == 0, done.err
    found = done.json["repeated"]
    assert "KL_BETA" not in done.err  # the config of the run wins over the environment, which is not in effect
    assert (found["of"], found["epochs"], found["identical"]) == (str(RUN), 6, False)
    assert found["config"] == ["grpo.lr: 0.001 there, 0.01 here"]
    assert found["environment"] == []
    assert found["first_difference"].startswith("grpo epoch 1: ")
    assert f"differs from {RUN}: config: grpo.lr" in done.err


def test_changed_weights_are_found_where_all_metrics_agree(trained):
    shutil.copytree(trained / RUN, trained / "copy")
    original, copy = RunFolder(trained / RUN), RunFolder(trained / "copy")
    config = Config()
    assert compare(original, copy, config)["identical"] is True
    path = copy.checkpoint("grpo", 2)
    content = torch.load(path, weights_only=True)
    content["model_state_dict"]["query_proj.weight"][0, 0] += 1e-6
    save_torch(path, content)
    found = compare(original, copy, config)
    assert (found["identical"], found["first_difference"]) == (
        False,
        "grpo epoch 2: the weights query_proj.weight differ",
    )


def test_another_environment_is_named(trained):
    path = trained / RUN / "env.json"
    content = json.loads(path.read_text())
    content["packages"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    done = run_here("train", "--from-run", RUN, cwd=trained)
    assert done.status == 0, done.err
    assert f"differs from {RUN}: environment: packages.torch: '1.0' there" in done.out


def test_files_of_ones_own_are_found_again_or_asked_for(trained, tmp_path):
    rollouts = next(trained.rglob("rl_data_*.json"))
    own = {"rl_data": tmp_path / "mine.json", "embeddings": tmp_path / "mine.pt"}
    shutil.copy2(rollouts, own["rl_data"])
    torch.save(torch.randn(2504, 16), own["embeddings"])
    small = ("--rce-epochs", "1", "--grpo-epochs", "2")
    files = [str(word) for name, path in own.items() for word in (f"--{name.replace('_', '-')}", path)]
    assert run_here("train", *small, *files, "--run-dir", "mine", cwd=trained).status == 0
    assert own_files(RunFolder(trained / "mine")) == own
    done = run_here("train", "--from-run", "mine", "--run-dir", "again", cwd=trained)
    assert done.out.splitlines()[-1] == "repeated mine: all metrics and weights of 3 epochs are identical", done.err
    own["embeddings"].unlink()
    done = run_here("train", "--from-run", "mine", "--run-dir", "third", cwd=trained)
    assert done.status == 1
    assert "mine.pt' , which is not there: --embeddings FILE" in done.err.replace("',", "' ,")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--from-run", "nowhere"), 1, "nowhere is no run folder: it holds no config.yaml (--from-run)"),
        (("--from-run", RUN, "--dataset", "digits"), 2, "leave --dataset out"),
        (("--from-run", RUN, "--run-dir", RUN), 2, "cannot be repeated in itself"),
    ],
)
def test_what_cannot_be_repeated_is_refused(trained, words, status, message):
    done = run_here("train", *words, cwd=trained)
    assert done.status == status
    assert message in done.err
    assert done.err.count("\n") == 1


# ---------------------------------------------------------------------- --keep


def test_pruned_runs_keep_the_latest_and_the_best_of_every_strategy_and_go_on_as_others_do(trained, warm_copy):
    pruned = run_here("train", *SMALL, "--keep", "1", cwd=warm_copy)
    assert pruned.status == 0, pruned.err
    run, whole = RunFolder(warm_copy / RUN), RunFolder(trained / RUN)
    best = {
        json.loads(run_here("best-ckpt", "--strategy", strategy, "--json", cwd=warm_copy).out)["epoch"]
        for strategy in STRATEGIES
    } - {None}  # no epoch may have a KL in range
    kept = {int(path.stem.removeprefix("grpo_epoch")) for path in run.path.glob("grpo_epoch*.pt")}
    assert kept == best | {4}
    assert run.checkpoint("rce", 2).is_file()
    more = ("--limit", "24", "--rce-epochs", "2", "--grpo-epochs", "12")
    for folder, keep in ((warm_copy, ("--keep", "2")), (trained, ())):
        done = run_here("train", *more, *keep, cwd=folder)
        assert done.status == 0, done.err
    left = {path.name for path in run.path.glob("*_epoch*.pt")}
    assert len(left) < 14 == len(list(whole.path.glob("*_epoch*.pt")))
    assert {"grpo_epoch11.pt", "grpo_epoch12.pt"} <= left
    assert compare(whole, run, Config())["identical"] is True


def test_a_finished_run_is_pruned_too_and_the_choice_is_spared_or_said_to_be_gone(trained):
    run = RunFolder(trained / RUN)
    chosen = run_here("best-ckpt", "--strategy", "ppo_loss", "--json", cwd=trained).json
    more = ("--limit", "24", "--rce-epochs", "2", "--grpo-epochs", "12")
    assert run_here("train", *more, cwd=trained).status == 0
    everything = set(run.checkpoints())
    assert run_here("train", *more, "--keep", "1", cwd=trained).status == 0
    assert set(run.checkpoints()) < everything
    assert {("rce", 2), ("grpo", 12)} <= set(run.checkpoints())
    path = trained / chosen["checkpoint"]
    assert path.is_file()
    path.unlink()
    for command in (("infer", "--shots", "1", "--limit", "4"), ("convert",)):
        done = run_here(*command, cwd=trained)
        assert done.status == 0, done.err
        assert f"best.json names {path.name}, which is gone: `lever best-ckpt` chooses again" in done.out


@pytest.fixture
def warm_copy(trained_once, tmp_path_factory):
    """A second folder of the test's own with the caches of features and answers."""
    folder = tmp_path_factory.mktemp("warm")
    shutil.copytree(trained_once / "results/digits/cache", folder / "results/digits/cache")
    return folder


def test_a_negative_number_to_keep_is_refused(tmp_path):
    assert run_here("train", "--keep", "0", cwd=tmp_path).status == 2
    done = run_here("train", "--set", "keep=-1", cwd=tmp_path)
    assert (done.status, done.err) == (2, "lever: keep must not be negative, found -1 (--keep)\n")


def test_own_files_are_refused_where_env_json_names_anything_else(tmp_path):
    run = RunFolder(tmp_path)
    run.environment.write_text(json.dumps({"sources": {"rl_data": 3, "config": "/etc/passwd"}}))
    assert own_files(run) == {}
    run.environment.write_text(json.dumps({"sources": {"rl_data": "gone.json"}}))
    with pytest.raises(LeverError, match=r"was trained on 'gone.json', which is not there: --rl-data FILE$"):
        own_files(run)


def test_the_same_seed_is_the_same_run_with_any_number_of_image_workers(trained, features_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")  # with the features, and no answer yet
    (folder / "results/digits/cache").mkdir(parents=True)
    shutil.copy2(features_file, folder / "results/digits/cache")
    done = run_here("train", *SMALL, "--set", "lvlm.workers=2", "--set", "lvlm.bank_disk=0", cwd=folder)
    assert done.status == 0, done.err
    one, other = (next(path.rglob("rl_data_*.json")) for path in (trained, folder))
    assert one.read_bytes() == other.read_bytes()
    found = compare(RunFolder(trained / RUN), RunFolder(folder / RUN), Config())
    assert (found["identical"], found["epochs"]) == (True, 6)
