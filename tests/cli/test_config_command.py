"""`lever config`, and what shells are offered: where each value comes from, what differs, what can go on."""

import os

import pytest
import yaml
from helpers import RUN, files_in, run_lever

from lever_lm.cli.config_command import flat
from lever_lm.config.schema import Config, FeatureConfig, all_keys, key_docs, to_dict
from lever_lm.config.values import build, configs_root
from lever_lm.training.select_checkpoint import STRATEGIES


def noted(out: str) -> dict[str, str]:
    """Key (without its section) → the comment behind its value."""
    lines = [line.strip().partition("  # ") for line in out.splitlines()]
    return {line.partition(":")[0]: note for line, _, note in lines if note}


@pytest.fixture
def a_run(tmp_path):
    """A folder with the config of a run, which is not that of a bare command."""
    (tmp_path / RUN).mkdir(parents=True)
    values = to_dict(build({"rce": {"epochs": 2, "lr": 0.5}, "data": {"name": "mine"}}))
    (tmp_path / RUN / "config.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


# ---------------------------------------------------------------------- show


def test_the_shown_config_reads_back_as_the_config_of_the_command(lever, tmp_path):
    odd = r"""data.train_path="a: '#\u202e\n\u4e2d" """
    words = ("--recipe", "classic", "--set", odd, "--set", "rollout.temperatures=[1, 2]")
    done = lever("config", "show", *words)
    assert done.status == 0
    assert "\u202e" not in done.out
    mine = tmp_path / "mine.yaml"
    mine.write_text(done.out, encoding="utf-8")
    again = lever("config", "show", str(mine), "--json").json
    planned = lever("train", "--dry-run", *words, "--json").json
    assert again["config"] == planned["config"]
    assert again["config"]["data"]["train_path"] == "a: '#\u202e\n\u4e2d"
    assert again["config"]["rollout"]["temperatures"] == [1.0, 2.0]


def test_each_value_says_what_set_it_last(lever, tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text("rce: {epochs: 3, lr: 0.5}\ngrpo: {kl_beta: 0.7, lr: 0.5}\nseed: 4\n")
    monkeypatch.setenv("RCE_EPOCHS", "6")
    monkeypatch.setenv("KL_BETA", "0.8")
    sets = ("--set", "grpo.patience=0", "--set", "grpo.kl_beta=0.9", "--set", "seed=5")
    given = ("--config", "own.yaml", *sets, "--seed", "9", "--limit", "7")
    told = noted(lever("config", "show", *given).out)
    assert told["epochs"] == "RCE_EPOCHS; default 5"  # the environment over --config; grpo.epochs is the default
    assert told["kl_beta"] == "--set; default 0.1"  # --set over the environment
    assert told["seed"] == "--seed; default 0"  # an option over --set
    assert told["lr"] == "own.yaml; default 0.0001"  # grpo.lr, the later one
    assert told["num_queries"] == "--limit; default 0"
    assert told["encoder"] == "configs/dataset/digits.yaml; default openai/clip-vit-large-patch14"
    assert "batch_tokens" not in told
    assert "patience" not in told  # it is set to its default
    changed = lever("config", "show", *given, "--json").json["changed"]
    assert changed["rce.epochs"] == {"from": "RCE_EPOCHS", "default": 5}
    assert changed["rollout.num_queries"] == {"from": "--limit", "default": 5000}
    assert "grpo.epochs" not in changed


def test_options_of_a_processor_are_one_value(lever, tmp_path):
    size = {"lvlm.processor": {"size": {"longest_edge": 512}}}
    sets = ("--set", "lvlm.processor.size.longest_edge=512")
    assert "  processor: {size: {longest_edge: 512}}  # --set; default {}\n" in lever("config", "show", *sets).out
    (tmp_path / "own.yaml").write_text(lever("config", "show", *sets).out)
    found = lever("config", "diff", "own.yaml", "--json").json["differences"]
    assert {key: pair["a"] for key, pair in found.items()} == size
    assert found["lvlm.processor"]["b"] == {}
    assert lever("config", "diff", "own.yaml", *sets, "--json").json["identical"]


def test_a_run_folder_shows_its_own_config_whatever_the_environment(lever, a_run, monkeypatch):
    monkeypatch.setenv("RCE_EPOCHS", "17")
    shown = lever("config", "show", str(RUN), "--json").json
    assert shown["config"] == yaml.safe_load((a_run / RUN / "config.yaml").read_text())
    assert shown["changed"]["rce.epochs"] == {"from": f"{RUN}/config.yaml", "default": 5}
    assert lever("config", "show", str(RUN), "--seed", "3", "--json").json["config"]["seed"] == 3
    values = shown["config"]  # a run of an older version lacks keys: these have their defaults
    del values["grpo"]["online"], values["keep"]
    (a_run / RUN / "config.yaml").write_text(yaml.safe_dump(values))
    shown = lever("config", "show", str(RUN), "--json").json["config"]
    assert (shown["grpo"]["online"], shown["keep"]) == (False, 0)


def test_docs_are_the_comments_of_the_dataclasses(lever):
    docs = key_docs()
    assert docs["grpo.top_k"].startswith("keep only the k best rollouts of a group")
    assert docs["keep"].startswith("checkpoints to keep")
    assert docs["reward"].startswith("How a scored rollout becomes a number")
    assert set(docs) <= {*all_keys(), *(key.split(".")[0] for key in all_keys())}
    out = lever("config", "show", "--docs").out
    lines = [line.strip() for line in out.splitlines()]
    assert lines[lines.index(f"# {docs['grpo.top_k']}") + 1].startswith("top_k: []")
    assert to_dict(build(yaml.safe_load(out))) == lever("config", "show", "--json").json["config"]


def test_what_cannot_be_shown_is_refused_in_one_line(lever, a_run):
    (a_run / "empty").mkdir()
    (a_run / "tagged.yaml").write_text("rce: !!python/object/apply:os.getcwd []\n")
    (a_run / RUN / "config.yaml").write_text("nonsense: 1\n")
    refused = {
        ("nowhere",): (2, "no config 'nowhere'", "classic, demo"),
        ("empty",): (1, "empty is no run folder", "config.yaml"),
        ("tagged.yaml",): (2, "tagged.yaml", "tag"),
        (str(RUN),): (1, "unknown config key 'nonsense'"),
        ("empty", "--dataset", "digits"): (2, "--dataset"),
        ("tagged.yaml", "--config", "x.yaml"): (2, "--config"),
    }
    for words, (status, *told) in refused.items():
        done = lever("config", "show", *words, "--json")
        assert (done.status, done.out, len(done.err.splitlines())) == (status, "", 1), done.err
        assert all(word in done.err for word in told), done.err


# ---------------------------------------------------------------------- diff


def test_two_runs_differ_where_their_configs_do(lever, a_run):
    values = yaml.safe_load((a_run / RUN / "config.yaml").read_text())
    other = a_run / "other"
    other.mkdir()
    (other / "config.yaml").write_text(yaml.safe_dump(values | {"seed": 7, "rce": values["rce"] | {"lr": 0.25}}))
    done = lever("config", "diff", str(RUN), "other")
    assert done.out.splitlines() == [
        f"{RUN} → other: 2 keys of {len(all_keys())} differ",
        f"rce.lr: {values['rce']['lr']} → 0.25",
        "seed: 0 → 7",
    ]
    (a_run / "single").mkdir()
    (a_run / "single/config.yaml").write_text(yaml.safe_dump(values | {"seed": 7}))
    assert f"single: 1 key of {len(all_keys())} differs\n" in lever("config", "diff", str(RUN), "single").out
    told = lever("config", "diff", str(RUN), "other", "--json").json
    assert told["differences"] == {"rce.lr": {"a": values["rce"]["lr"], "b": 0.25}, "seed": {"a": 0, "b": 7}}
    assert not told["identical"]
    same = lever("config", "diff", str(RUN), str(RUN))
    assert (same.status, same.out) == (0, f"{RUN} and {RUN}: no difference\n")


def test_a_recipe_differs_from_the_options_by_what_it_says(lever, tmp_path):
    recipe = flat(yaml.safe_load((configs_root() / "recipe/demo.yaml").read_text()))
    told = lever("config", "diff", "demo", "--json", "--seed", "4").json
    assert told["differences"].keys() == recipe.keys()  # the options complete both sides: their seed is the same
    assert all(told["differences"][key]["a"] == value for key, value in recipe.items())
    assert files_in(tmp_path) == {}


# ---------------------------------------------------------------------- completion


def offered(folder, line: str, shell: str = "bash") -> list[str]:
    """What a shell is offered after a line, by a process as shells start it."""
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_TYPER_COMPLETE_ARGS": line}
    asked |= {"_LEVER_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = run_lever(cwd=folder, **asked)
    assert done.err == ""
    return done.out.splitlines()


@pytest.fixture
def runs(tmp_path):
    """Two runs; a folder that is none; and one whose name a shell would run."""
    for name in ("first", "second", "x$(touch made)"):
        folder = tmp_path / "results/digits/model_cpk" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(Config())))
    (tmp_path / "results/digits/model_cpk/none").mkdir()
    return tmp_path


def test_a_shell_is_offered_what_is_there(runs):
    assert offered(runs, "lever train --set grpo.kl") == ["grpo.kl_beta=", "grpo.kl="]
    assert offered(runs, "lever best-ckpt results/digits/model_cpk/f") == ["results/digits/model_cpk/first"]


def test_every_shell_is_offered_the_same_and_nothing_that_it_would_run(runs):
    for shell in ("zsh", "fish"):
        text = "\n".join(offered(runs, "lever train --from-run ", shell))
        assert "model_cpk/first" in text
        assert "touch" not in text


def test_offers_within_this_process(runs, monkeypatch):
    import click

    from lever_lm.cli import completion

    monkeypatch.chdir(runs)
    context = click.Context(click.Command("x"))

    def values(find, typed=""):
        return [value for value, _ in find(context, typed)]

    assert values(completion.strategies) == list(STRATEGIES)
    assert values(completion.trackers) == ["tensorboard"]
    assert len({FeatureConfig(name=name).parts() for name in values(completion.features)}) == 18
    assert values(completion.features, "query_text_icd_t") == ["query_text_icd_text", "query_text_icd_text_ans"]
    assert values(completion.set_keys) == [f"{key}=" for key in all_keys()]
    assert dict(completion.set_keys(context, "grpo.top_k"))["grpo.top_k="] == key_docs()["grpo.top_k"]
    assert {"demo", "classic", "results/digits/model_cpk/first"} <= set(values(completion.configs))
    assert values(completion.run_names) == ["first", "second"]
    assert values(completion.named("nothing of this kind")) == []
    context.params = {"results": "elsewhere"}
    assert values(completion.run_names) == []
    context.params = {"results": object()}
    assert values(completion.run_names) == []  # nothing is said to who is typing
    for name in values(completion.named("dataset")):
        assert os.path.isfile(configs_root() / "dataset" / f"{name}.yaml")
