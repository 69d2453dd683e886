"""A command that is refused changes nothing: every byte below the folder is as it was before, but for digests."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import RUN, SMALL, files_in, run_here, small_digits

from lever_lm.selectors.pointer.checkpoint import save_torch
from lever_lm.utils.safe_torch_load import load_torch


def bytes_in(folder: Path) -> dict[str, bytes]:
    """All but the digests, which any command may add to."""
    return {name: (folder / name).read_bytes() for name in files_in(folder) if not name.endswith("/digests.json")}


@pytest.fixture(scope="module")
def prepared(trained_once, tmp_path_factory):
    """A folder with a trained run, and files that commands refuse: one for all of them, as they change nothing."""
    folder = tmp_path_factory.mktemp("prepared")
    shutil.copytree(trained_once, folder, dirs_exist_ok=True)
    (folder / "bad.yaml").write_text("grpo: {epochz: 3}\n")
    (folder / "bad.json").write_text("{")
    (folder / "file").write_text("")
    (folder / "taken").mkdir()
    (folder / "taken/notes.txt").write_text("mine")
    other = small_digits(folder / "other", train=70, val=6)
    content = {"data": {"okvqa_path": str(other), "coco_path": str(other)}}
    (folder / "other.yaml").write_text(yaml.safe_dump(content))
    return folder, bytes_in(folder)


REFUSED = [
    ("train", *SMALL, "--config", "other.yaml"),  # other data
    ("train", *SMALL, "--config", "other.yaml", "--set", "rollout.num_queries=24"),
    ("train", *SMALL, "--seed", "4"),  # another config
    ("train", *SMALL, "--sampler", "rand_sampler", "--run-name", RUN.name),
    ("train", *SMALL, "--no-resume"),
    ("train", *SMALL[:4], "--set", "grpo.epochs=010"),
    ("train", *SMALL, "--config", "bad.yaml"),
    ("train", *SMALL, "--config", "gone.yaml"),
    ("train", *SMALL, "--rl-data", "bad.json"),
    ("train", *SMALL, "--rl-data", "gone.json"),
    ("train", *SMALL, "--rl-data", "gone.json", "--overwrite"),
    ("train", *SMALL, "--rl-data", "bad.json", "--embeddings", "gone.pt", "--overwrite"),
    ("train", *SMALL, "--embeddings", "gone.pt"),
    ("train", *SMALL, "--set", "features.encoder=gone", "--overwrite"),
    ("train", *SMALL, "--set", "reward.mode=gtprob_plus_soft", "--overwrite"),
    ("train", "--from-run", RUN, "--run-name", RUN.name),
    ("demo", "--run-name", RUN.name, "--limit", "24"),
    ("demo", "--run-name", RUN.name, "--shots", "299"),
    ("rollout", "--limit", "24", "--set", "lvlm.path=gone"),
    ("rollout", "--limit", "24", "--set", "data.okvqa_path=gone"),
    ("infer", "--ckpt", "gone.pt"),
    ("infer", "--ckpt", "bad.json"),
    ("infer", "--shots", "299"),
    ("infer", "--icds", "bad.json"),
    ("infer", "--icds", "gone.json"),
    ("infer", "--run-name", "none"),
    ("infer", "--features", "query_img_icd_img"),
    ("infer", "--set", "lvlm.path=gone"),
    ("pick", "--image", "bad.json", "--question", "why?"),
    ("convert", "bad.json"),
    ("convert", RUN / "grpo_epoch4.pt", "--output", RUN / "grpo_epoch4.pt"),
    ("convert", RUN / "grpo_epoch4.pt", "--output", "file/x.ckpt"),
    ("convert", "--to", "v4"),
    ("export", RUN, "taken"),
    ("export", RUN, "file"),
    ("export", RUN, "new", "--license", "my own"),
    ("export", "none", "new"),
    ("best-ckpt", "--strategy", "best"),
    ("best-ckpt", "--log", "bad.json"),
    ("best-ckpt", "none"),
    ("report", "none"),
    ("report", "--png", "file"),
    ("report", RUN, RUN),
    ("report", "--output", "file/page.html"),
    ("status", "--run-name", "none"),
    ("doctor", "--set", "data.okvqa_path=gone"),
    ("rollout", "--limit", "24", "--set", "rollout.infoscore=1", "--set", "rollout.infoscore_candidates=1"),
]


@pytest.mark.parametrize("words", REFUSED, ids=lambda words: " ".join(map(str, words)))
def test_a_refused_command_changes_nothing(prepared, words):
    folder, before = prepared
    done = run_here(*words, cwd=folder)
    assert done.status in (1, 2), done.err
    assert bytes_in(folder) == before


@pytest.mark.parametrize("broken", ["inputs", "weights", "rows"])
def test_a_run_that_cannot_go_on_stays_as_it_was(trained, broken):
    state = load_torch(trained / RUN / "state.pt")
    if broken == "inputs":
        state["inputs"]["rollouts"] = "others"
    elif broken == "rows":
        state["rows"] = []
    else:
        state["policy"].popitem()
    save_torch(trained / RUN / "state.pt", state)
    config = yaml.safe_load((trained / RUN / "config.yaml").read_text())
    before = bytes_in(trained)
    words = ("train", *SMALL[:4], "--grpo-epochs", "6")  # goes on otherwise
    assert config["grpo"]["epochs"] == 4
    done = run_here(*words, cwd=trained)
    assert done.status == 1, done.err
    assert bytes_in(trained) == before


def test_other_rollouts_leave_the_run_as_it_was(trained):
    (path,) = (trained / "results/digits/generated_data").glob("*.json")
    content = json.loads(path.read_text())
    key = next(key for key in content if key != "_meta")
    del content[key]
    (trained / "fewer.json").write_text(json.dumps(content))
    before = bytes_in(trained)
    done = run_here("train", *SMALL, "--rl-data", "fewer.json", cwd=trained)
    assert done.status == 1
    assert "the rollouts of the run" in done.err
    assert bytes_in(trained) == before
