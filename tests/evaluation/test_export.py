"""Sharing: what `lever export` writes, that it loads to equal logits, strictly, and a card that the hub understands."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import CHECKOUT, INFERENCE, RUN, files_in
from policies import logits, saved

from lever_lm import Retriever, load_policy
from lever_lm.config.schema import Config, DataConfig, FeatureConfig, LvlmConfig, to_dict
from lever_lm.evaluation import reproduction
from lever_lm.evaluation.export import export, markdown
from lever_lm.selectors.pointer.checkpoint import read_checkpoint, save_torch
from lever_lm.selectors.pointer.hub_format import KIT, setting_of
from lever_lm.utils.errors import LeverError, UsageError

NAMES = {"model.safetensors", "config.json", "README.md"}


@pytest.fixture
def shared(tmp_path) -> Path:
    """An exported folder."""
    export(saved(tmp_path / "grpo_epoch5.pt"), "named", tmp_path / "shared")
    return tmp_path / "shared"


def front_matter(folder: Path) -> dict:
    _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front)


# ---------------------------------------------------------------------- there and back


def test_the_files_are_those_and_the_same_bytes_each_time(tmp_path, shared):
    assert {path.name for path in shared.iterdir()} == NAMES
    export(tmp_path / "grpo_epoch5.pt", "named", tmp_path / "again" / "shared")
    for name in NAMES:
        assert (shared / name).read_bytes() == (tmp_path / "again/shared" / name).read_bytes()
    config = json.loads((shared / "config.json").read_text())
    assert (config["format"], config["format_version"]) == ("lever_lm/policy", 1)
    assert (config["phase"], config["epoch"], config["encoder"], config["seed"]) == ("grpo", 5, "clip@1", 5)
    content = read_checkpoint(shared)
    assert (content["phase"], content["epoch"]) == ("grpo", 4)


def test_the_card_is_one_that_the_hubs_client_reads(evaluated, lever):
    done = lever("export", RUN, "shared policy", "--json", "--license", "mit")
    assert done.status == 0, done.err
    assert done.json["evaluated"] is True
    from huggingface_hub import ModelCard

    card = ModelCard.load(evaluated / "shared policy" / "README.md", ignore_metadata_errors=False)
    assert card.data.license == "mit"
    assert card.data.library_name == "lever_lm"
    assert card.data.datasets == ["digits"]
    (metrics,) = (evaluated / INFERENCE).glob("*/metrics.json")
    rows = [row for row in json.loads(metrics.read_text())["results"] if row["method"] == "grpo"]
    assert [(r.metric_name, r.metric_value) for r in card.data.eval_results] == [
        (f"VQA accuracy, {row['shots']} shot{'s' * (row['shots'] > 1)}", round(row["accuracy"], 4)) for row in rows
    ]
    for row in rows:
        assert f"{row['accuracy']:.3f} [{row['ci'][0]:.3f}, {row['ci'][1]:.3f}]" in card.text
    assert "Official VQA accuracy on 24 queries" in card.text
    normalized = " | ".join(f"{row['normalized_accuracy']:.3f}" for row in rows)
    assert f"| **grpo, this policy**, answers always normalised | {normalized} |" in card.text
    assert "CC BY 4.0" in card.text
    assert "zero\\_shot" in card.text
    assert json.loads((evaluated / "shared policy/config.json").read_text())["results"] == rows


def test_the_card_has_the_evaluation_with_baselines_as_the_page_does(evaluated, lever):
    """`lever demo` evaluates with baselines in the run's folder, and a later `infer` without them in one of its own."""
    (folder,) = (evaluated / INFERENCE).glob("*/")
    shutil.copytree(folder, evaluated / INFERENCE, dirs_exist_ok=True)
    for path in folder.glob("*_random_*"):
        path.unlink()
    (folder / "metrics.json").write_text((folder / "metrics.json").read_text().replace('"shots": 2', '"shots": 3'))
    assert lever("export", RUN, "shared").status == 0
    rows = json.loads((evaluated / "shared/config.json").read_text())["results"]
    assert [row["shots"] for row in rows] == [1, 2]


def test_a_policy_that_was_overwritten_leaves_its_successor_no_results(trained, lever):
    """`lever demo` and `lever train --overwrite` leave files of the same names."""
    assert lever("infer", "--limit", "5", "--ckpt", RUN / "grpo_epoch4.pt", "--json").status == 0
    (metrics,) = (trained / INFERENCE).glob("*/metrics.json")
    demo = {**json.loads(metrics.read_text()), "setting": "of no policy"}
    (trained / INFERENCE / "metrics.json").write_text(json.dumps(demo))
    words = ("export", RUN, "shared", "--ckpt", "latest", "--json")
    assert lever(*words).json["evaluated"] is True
    content = torch.load(trained / RUN / "grpo_epoch4.pt", weights_only=True)
    other = torch.load(trained / RUN / "grpo_epoch3.pt", weights_only=True)
    save_torch(trained / RUN / "grpo_epoch4.pt", {**other, "epoch": content["epoch"]})
    assert lever(*words).json["evaluated"] is False
    assert "This checkpoint was not evaluated" in (trained / "shared/README.md").read_text()
    assert json.loads((trained / "shared/config.json").read_text())["results"] == []


@pytest.mark.parametrize(
    ("why", "told"),
    [
        ("best.json of the run, chosen when 2 of 4 epochs were there: `lever best-ckpt` again", "2 of 4 epochs"),
        (
            "best by val_loss; best.json names grpo_epoch9.pt, which is gone: `lever best-ckpt` again",
            "best by val_loss",
        ),
    ],
)
def test_advice_to_the_runs_owner_is_not_shared(tmp_path, why, told):
    export(saved(tmp_path / "grpo_epoch5.pt"), why, tmp_path / "shared")
    for name in ("config.json", "README.md"):
        text = (tmp_path / "shared" / name).read_text().replace("\\", "")
        assert told in text
        assert "again" not in text


def test_the_cards_five_lines_run_as_they_are_written(trained, lever, monkeypatch):
    assert lever("export", RUN, "shared").status == 0
    text = (trained / "shared/README.md").read_text()
    assert "This checkpoint was not evaluated" in text
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    from lever_lm.utils.paths import asset_path

    shutil.copy(next((asset_path("asset:digits") / "val2014").glob("*.jpg")), trained / "x.jpg")
    scope: dict = {}
    exec(lines.replace("OWNER/NAME", "shared"), scope)
    assert len(scope["picks"]) == 4
    assert scope["retriever"].config.sampler.name == "mix_sampler"
    done = lever("pick", "--ckpt", "shared", "--image", "x.jpg", "--question", "What is shown here?", "--json")
    assert [icd["question_id"] for icd in done.json["icds"]] == [p.example.question_id for p in scope["picks"]]


def test_infer_and_convert_take_the_folder(trained, lever):
    assert lever("export", RUN, "out/shared", "--ckpt", "latest").status == 0
    theirs = lever("infer", "--ckpt", "out/shared", "--limit", "5", "--json")
    assert theirs.json["folder"] == "results/digits/inference/out/shared"
    want = logits(load_policy(RUN / "grpo_epoch4.pt"))
    for made, words in (("shared_v2format.ckpt", ()), ("shared_v3format.pt", ("--to", "v3"))):
        assert lever("convert", "out/shared", *words).status == 0
        assert torch.equal(logits(load_policy(trained / made)), want)


def test_a_strangers_setting_names_no_server_and_no_file_here(trained, lever):
    """What is shared is used with keys of a short list: a stranger's folder cannot have images sent anywhere."""
    assert lever("export", RUN, "shared").status == 0
    path = trained / "shared/config.json"
    shared = json.loads(path.read_text())
    setting = shared["setting"]
    setting["lvlm"] |= {"server": "http://stranger.example/v1"}
    setting["data"] |= {"allow_remote": True, "coco_path": "/etc"}
    path.write_text(json.dumps({**shared, "setting": {**setting, "device": "cuda:9"}}))
    config = Retriever("shared").config
    assert (config.lvlm.server, config.data.allow_remote, config.device) == ("", False, "auto")
    assert config.data.coco_path == "asset:digits"
    setting["prompt"] = {"template": "no question"}
    path.write_text(json.dumps({**shared, "setting": setting}))
    with pytest.raises(UsageError, match=r"prompt\.template"):
        Retriever("shared")


# ---------------------------------------------------------------------- what is not told


def test_paths_of_this_machine_are_not_shared(tmp_path):
    (tmp_path / "clip-of-mine").mkdir()
    config = Config(
        data=DataConfig(name="okvqa", okvqa_path="/home/me/okvqa", coco_path="hub:some/images", file="/home/me/x.csv"),
        features=FeatureConfig(encoder=str(tmp_path / "clip-of-mine")),
        lvlm=LvlmConfig(path="Qwen/Qwen2.5-VL-3B-Instruct", server="http://me:8000/v1"),
    )
    setting = setting_of(to_dict(config))
    shared = {"name": "okvqa", "coco_path": "hub:some/images", "train_path": "", "task": "vqa", "file_prefix": ""}
    assert setting["data"].items() >= shared.items()
    assert "/home/me" not in str(setting)
    assert setting["features"]["encoder"] == "clip-of-mine"
    assert setting["lvlm"]["path"] == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert "server" not in setting["lvlm"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    export(saved(tmp_path / "grpo_epoch5.pt"), "named", tmp_path / "shared")
    for name in ("config.json", "README.md", "config.yaml"):
        assert str(tmp_path) not in (tmp_path / "shared" / name).read_text()
    shared = (tmp_path / "shared/config.yaml").read_text()
    assert "# Left out, as they name folders of one machine: data.file, data.okvqa_path.\n" in shared
    assert not re.search("/home/me|8000|allow_remote|device", shared)
    assert front_matter(tmp_path / "shared")["base_model"] == ["Qwen/Qwen2.5-VL-3B-Instruct"]
    assert "see the dataset's own terms" in (tmp_path / "shared/README.md").read_text()


@pytest.mark.parametrize("in_a_run", [False, True], ids=["alone", "in a run on features of one's own"])
def test_a_checkpoint_of_unknown_origin_claims_no_dataset(tmp_path, in_a_run):
    golden = CHECKOUT / "tests/data/checkpoints/rce_epoch2_plain_L1.pt"
    shutil.copy(golden, tmp_path / "rce_epoch2.pt")
    if in_a_run:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(Config())))
    export(tmp_path / "rce_epoch2.pt", "named", tmp_path / "shared")
    config = json.loads((tmp_path / "shared/config.json").read_text())
    assert {"encoder", "dataset"}.isdisjoint(config)
    assert {"data", "features"}.isdisjoint(config["setting"])
    assert config["setting"].get("infer") == ({"pool_size": 256} if in_a_run else None)
    assert bool(config["setting"]) == in_a_run
    assert "datasets" not in front_matter(tmp_path / "shared")
    text = (tmp_path / "shared/README.md").read_text()
    assert "Not recorded" in text
    assert ("learning rate" in text) == in_a_run
    assert not re.search("digits|tiny-clip|Qwen", text)
    assert torch.equal(logits(load_policy(tmp_path / "shared")), logits(load_policy(golden)))


def test_a_folder_whose_name_is_markup_makes_a_sound_card(tmp_path):
    name = "a_b `c` <img src=x> | --- [d](e)\n---\nlicense: mine: *f*"
    export(saved(tmp_path / "grpo_epoch5.pt"), "n|a\n# m", tmp_path / name)
    text = (tmp_path / name / "README.md").read_text()
    assert front_matter(tmp_path / name)["license"] == "apache-2.0"
    assert "<img" not in text.replace("\\<img", "")
    assert "\n# m" not in text
    assert markdown("a|b\n*c*") == "a\\|b\\\\n\\*c\\*"


# ---------------------------------------------------------------------- where to


def test_the_kit_is_of_the_evaluation_on_the_card_and_evaluates_to_the_same_numbers(evaluated, lever):
    assert lever("export", RUN, "shared").status == 0
    assert lever("export", RUN, "again").status == 0
    assert {path.name for path in (evaluated / "shared").iterdir()} == NAMES | set(KIT)
    for name in KIT:
        assert (evaluated / "shared" / name).read_bytes() == (evaluated / "again" / name).read_bytes()
        assert f"| `{name}` |" in (evaluated / "shared/README.md").read_text()
    picks = [json.loads(line) for line in (evaluated / "shared/picks.jsonl").read_text().splitlines()]
    samples = next((evaluated / INFERENCE).glob("*/samples_grpo_2shot.jsonl"))
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [(one["question_id"], one["icds"]) for one in picks] == [(row["question_id"], row["icds"]) for row in rows]
    assert all(one["in_prompt_order"] == one["icds"][::-1] for one in picks)
    done = lever("infer", "--icds", "shared/picks.jsonl", "--limit", "24", "--shots", "1,2", "--json")
    assert done.status == 0, done.err
    ours = json.loads((evaluated / "shared/config.json").read_text())["results"]
    assert [row["accuracy"] for row in done.json["results"]] == [row["accuracy"] for row in ours]


def test_the_prompts_are_those_of_the_first_ten_queries_as_pick_prints_them(evaluated, lever):
    assert lever("export", RUN, "shared").status == 0
    parts = re.split(r"^=== (.*) ===\n", (evaluated / "shared/prompts.txt").read_text(), flags=re.MULTILINE)[1:]
    picks = [json.loads(line) for line in (evaluated / "shared/picks.jsonl").read_text().splitlines()][:10]
    assert parts[::2] == [
        f"question {one['question_id']}; ICDs in the order of the prompt: {', '.join(map(str, one['in_prompt_order']))}"
        for one in picks
    ]
    retriever = Retriever(RUN)
    examples = {example.question_id: example for example in retriever.examples}
    queries = {example.question_id: example for example in retriever.stages.data.val_examples}
    for one, text in zip(picks, parts[1::2], strict=True):
        shown = [examples[icd] for icd in one["icds"]]
        assert text.strip() == retriever.prompt(queries[one["question_id"]], picks=shown, form="text").strip()


def test_the_configs_of_run_and_export_are_one(trained, lever):
    assert lever("export", RUN, "shared").status == 0
    found = lever("config", "diff", "shared/config.yaml", RUN).out
    assert found.splitlines()[1:] == ["infer.num_queries: 0 → 24"], "what belongs to one command is left out"
    again = lever("train", "--config", "shared/config.yaml", "--run-name", "again", "--dry-run", "--json")
    assert again.status == 0, again.err


def test_what_the_kit_lacks_is_said_and_an_earlier_one_is_gone(evaluated, lever, monkeypatch):
    assert lever("export", RUN, "shared").status == 0
    monkeypatch.setattr(reproduction, "model_folder", lambda path: None)
    done = lever("export", RUN, "shared", "--json")
    assert list(done.json["left_out"]) == ["prompts.txt"]
    assert "left out: prompts.txt: the processor of asset:tiny-qwen2.5-vl is not on this machine" in done.err
    assert {path.name for path in (evaluated / "shared").iterdir()} == NAMES | {"picks.jsonl", "config.yaml"}
    monkeypatch.undo()
    monkeypatch.chdir(evaluated)
    recorded = json.loads((evaluated / RUN / "env.json").read_text())
    recorded["fingerprints"]["data"] = "0" * 16
    (evaluated / RUN / "env.json").write_text(json.dumps(recorded))
    assert (
        "those of the run '0000000000000000'"
        in lever("export", RUN, "shared", "--json").json["left_out"]["prompts.txt"]
    )
    samples = next((evaluated / INFERENCE).glob("*/samples_grpo_2shot.jsonl"))
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[1:]))
    done = lever("export", RUN, "shared", "--json")
    assert done.json["left_out"].keys() == {"picks.jsonl", "prompts.txt"}
    assert "run `lever infer` again" in done.json["left_out"]["picks.jsonl"]
    samples.unlink()
    assert "cannot read" in lever("export", RUN, "shared", "--json").json["left_out"]["picks.jsonl"]
    assert {path.name for path in (evaluated / "shared").iterdir()} == NAMES | {"config.yaml"}


def test_a_run_is_no_place_to_export_to(trained, lever):
    before = files_in(trained / RUN)
    done = lever("export", RUN, RUN, "--overwrite")
    assert (done.status, files_in(trained / RUN)) == (1, before)
    assert "is the folder of a run: choose another DIR" in done.err


def test_a_folder_with_further_files_loads_as_before(trained, lever):
    assert lever("export", RUN, "shared").status == 0
    (trained / "shared/config.yaml").write_text("lvlm: {server: 'http://elsewhere.example'}\n")
    for name in ("picks.jsonl", "prompts.txt", "more.pt"):
        (trained / "shared" / name).write_bytes(b"\0 no such thing")
    assert Retriever("shared").config.lvlm.server == ""
    named = json.loads((trained / "shared/config.json").read_text())
    assert torch.equal(
        logits(load_policy(trained / "shared")), logits(load_policy(RUN / f"{named['phase']}_epoch{named['epoch']}.pt"))
    )


def test_what_is_there_is_not_overwritten_unasked(trained, lever):
    (trained / "own").mkdir()
    (trained / "own/config.json").write_text('{"architectures": []}')
    before = files_in(trained / "own")
    done = lever("export", RUN, "own")
    assert (done.status, files_in(trained / "own")) == (1, before)
    assert "holds no earlier export: choose another DIR, or write into it with --overwrite" in done.err
    assert lever("export", RUN, "own", "--overwrite").status == 0
    (trained / "own/.gitattributes").write_text("*.safetensors filter=lfs\n")
    assert lever("export", RUN, "own", "--ckpt", "latest").status == 0, "an earlier export is replaced"
    assert (trained / "own/.gitattributes").is_file()
    (trained / "own/config.json").unlink()  # as an export that was killed leaves it
    with pytest.raises(LeverError, match=r"config\.json: No such file"):
        load_policy(trained / "own")
    assert lever("export", RUN, "own").status == 0
    load_policy(trained / "own")


def test_arguments_of_export(trained, lever, monkeypatch):
    monkeypatch.setenv("LEVER_LM_CHECKPOINT_PATH", str(RUN / "grpo_epoch1.pt"))
    assert lever("export", "alone", "--json").json["why"] == "named by LEVER_LM_CHECKPOINT_PATH"
    for words in ((RUN, "shared"), ("shared", "--run-name", RUN.name)):
        assert lever("export", *words, "--json").json["why"] == "best by val_reward"
    monkeypatch.delenv("LEVER_LM_CHECKPOINT_PATH")
    assert {path.name for path in (trained / "alone").iterdir()} == NAMES | {"config.yaml"}
    for ckpt, epoch in (("latest", 4), (RUN / "grpo_epoch1.pt", 1)):
        done = lever("export", RUN, "alone", "--overwrite", "--json", "--ckpt", ckpt)
        assert done.json["checkpoint"] == f"{RUN}/grpo_epoch{epoch}.pt"
    for words, status, said in (
        ((), 2, "takes [RUN_DIR] DIR"),
        (("a", "b", "c"), 2, "takes [RUN_DIR] DIR"),
        (("gone", "out"), 1, "no run folder gone"),
        ((RUN, RUN / "config.yaml"), 1, "is a file: choose another DIR"),
        ((RUN, "out", "--license", "do: what\nyou want"), 2, "--license takes a name"),
        ((RUN, "out", "--ckpt", "alone"), 1, "is an exported policy already"),
    ):
        done = lever("export", *words)
        assert (done.status, done.err.count("lever: ")) == (status, 1)
        assert said in done.err
    assert not (trained / "out").exists()
