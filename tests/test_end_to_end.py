"""The whole way through the real entry point, in an empty folder: once unbroken, and killed on the way."""

import csv
import html
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import INFERENCE, ROLLOUTS, RUN, clean_environment, files_in, run_lever, small_digits

from lever_lm.utils.safe_torch_load import load_torch

LIMIT = ("--limit", "24")
EPOCHS = 30  # enough of them that a kill in the midst comes before the end
TRAIN = ("train", *LIMIT, "--rce-epochs", "2", "--set", "grpo.refresh_every=2", "--set", "lvlm.batch_size=16")
TRAIN = (*TRAIN, "--grpo-epochs", str(EPOCHS))
TIMES = ("epoch_time", "step_time")
COLUMNS = ["Epoch", "Train Loss", "Val Loss", "PPO Loss", "KL", "Adv Std", "Adv Max", "Beta"]
METHODS = ("zero_shot", "random", "text_sim", "img_sim", "img_text_sim", "rce", "grpo", "oracle")


def without_network() -> tuple[str, ...]:
    """A prefix that takes the network away where this machine allows it; the hub is off in any case."""
    unshare = shutil.which("unshare")
    allowed = unshare and subprocess.run([unshare, "-n", "true"], capture_output=True, check=False).returncode == 0
    return (unshare, "-n") if allowed else ()


def done_json(*arguments, cwd: Path, **extra) -> dict:
    done = run_lever(*arguments, "--json", cwd=cwd, **extra)
    assert done.status == 0, done.err
    return done.json


def metrics_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / RUN / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit the same checkpoints and metrics, times excepted."""
    names = {path.name for path in (one / RUN).glob("*_epoch*")}
    assert names == {path.name for path in (other / RUN).glob("*_epoch*")}
    assert metrics_of(one) == metrics_of(other)
    for name in sorted(names):
        a, b = load_torch(one / RUN / name), load_torch(other / RUN / name)
        key = "state_dict" if name.endswith(".ckpt") else "model_state_dict"
        assert a[key].keys() == b[key].keys()
        assert all(torch.equal(a[key][weight], b[key][weight]) for weight in a[key]), name
        for part in ("epoch", "phase", "kl_beta"):
            assert a.get(part) == b.get(part)
        times = [{k: v for k, v in content.get("metrics", {}).items() if k not in TIMES} for content in (a, b)]
        assert times[0] == times[1]


def checkpoints(folder: Path) -> dict[str, tuple[int, int]]:
    return {name: facts for name, facts in files_in(folder / RUN).items() if "_epoch" in name and name.endswith(".pt")}


# ---------------------------------------------------------------------- unbroken


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Path, dict]:
    """The user's commands one after the other in an empty folder, without network: (folder, answers)."""
    folder, off = tmp_path_factory.mktemp("chain"), {"prefix": without_network(), "HF_HUB_OFFLINE": "1"}
    answers = {
        "train": done_json(*TRAIN, cwd=folder, **off),
        "best-ckpt": done_json("best-ckpt", "--strategy", "val_loss", cwd=folder, **off),
        "convert": done_json("convert", cwd=folder, **off),
        "infer": done_json("infer", "--shots", "5", *LIMIT, cwd=folder, **off),
        "report": done_json("report", cwd=folder, **off),
    }
    return folder, answers


def test_the_commands_hand_on_from_one_to_the_next(chain):
    folder, answers = chain
    best = answers["best-ckpt"]
    assert answers["train"]["run"] == str(RUN)
    assert answers["train"]["recommended"]["strategy"] == "val_reward"
    assert Path(folder, answers["train"]["converted"]).is_file()
    assert best["checkpoint"] == str(RUN / f"grpo_epoch{best['epoch']}.pt")
    assert answers["convert"]["input"] == best["checkpoint"]
    assert answers["convert"]["output"] == str(RUN / f"grpo_epoch{best['epoch']}_v2format.ckpt")
    assert answers["infer"]["checkpoint"] == best["checkpoint"]
    assert [(row["method"], row["shots"], row["n"]) for row in answers["infer"]["results"]] == [("grpo", 5, 24)]
    assert Path(folder, answers["report"]["report"]).is_file()


def test_every_file_is_where_the_document_says(chain):
    folder, answers = chain
    run = {path.name for path in (folder / RUN).iterdir()}
    expected = {f"rce_epoch{i}.pt" for i in (1, 2)} | {f"grpo_epoch{i}.pt" for i in range(1, EPOCHS + 1)}
    expected |= {"config.yaml", "env.json", "metrics.jsonl", "train.log", "state.pt", "report.html", "best.json"}
    converted = {Path(answers[name][key]).name for name, key in (("train", "converted"), ("convert", "output"))}
    assert run == expected | converted
    assert (folder / ROLLOUTS).is_file()
    cache = {path.name for path in (folder / "results/digits/cache").iterdir()}
    vision = {name for name in cache if re.fullmatch(r"vision_tiny-qwen2_5-vl_[0-9a-f]+", name)}
    assert len(vision) == 1
    assert cache - vision == {"features_tiny-clip.safetensors", "answers_tiny-qwen2_5-vl.sqlite", "digests.json"}
    inferred = folder / INFERENCE / f"grpo_epoch{answers['best-ckpt']['epoch']}"
    assert {path.name for path in inferred.iterdir()} == {
        "icds.jsonl",
        "metrics.json",
        "predictions_grpo_5shot.json",
        "samples_grpo_5shot.jsonl",
    }
    assert [path for path in folder.rglob("*") if path.name.startswith(".tmp-")] == []
    assert {path.name for path in folder.iterdir()} == {"results"}


def test_checkpoints_are_the_lineages_v3_files(chain):
    folder, _ = chain
    rows = [json.loads(line) for line in (folder / RUN / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        content = load_torch(folder / RUN / f"{row['phase']}_epoch{row['epoch']}.pt")
        assert {"epoch", "phase", "model_state_dict", "kl_beta", "metrics", "config", "format"} <= set(content)
        assert content["epoch"] == row["epoch"] - 1
        assert content["phase"] == row["phase"]
        assert content["metrics"] == {name: value for name, value in row.items() if name not in ("phase", "epoch")}


def test_the_run_says_with_what_it_was_made(chain):
    folder, _ = chain
    facts = json.loads((folder / RUN / "env.json").read_text())
    assert facts["seed"] == 0
    assert facts["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert set(facts["inputs"]) == {"rollouts", "features"}


def test_the_log_holds_the_table_that_existing_scripts_parse(chain):
    folder, _ = chain
    lines = (folder / RUN / "train.log").read_text(encoding="utf-8").splitlines()
    table = lines[lines.index("阶段3：GRPO训练") + 1 :]
    assert table[0].split() == [
        "Epoch",
        "Train",
        "Loss",
        "Val",
        "Loss",
        "PPO",
        "Loss",
        "KL",
        "Adv",
        "Std",
        "Adv",
        "Max",
        "Beta",
    ]
    rows = list(csv.reader([",".join(line.split()) for line in table[2:]]))
    logged = [row for row in metrics_of(folder) if row["phase"] == "grpo"]
    assert [int(row[0]) for row in rows] == list(range(1, EPOCHS + 1))
    for cells, row in zip(rows, logged, strict=True):
        assert float(cells[1]) == pytest.approx(row["train_loss"], abs=1e-5)
        assert float(cells[4]) == pytest.approx(row["kl"], abs=1e-5)


def test_more_epochs_go_on_from_the_last_one(chain, tmp_path):
    folder, _ = chain
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    before = checkpoints(tmp_path)
    done = run_lever(*TRAIN, "--grpo-epochs", str(EPOCHS + 2), cwd=tmp_path)
    assert done.status == 0, done.err
    assert f"going on after grpo epoch {EPOCHS}" in done.out
    after = checkpoints(tmp_path)
    assert set(after) - set(before) == {f"grpo_epoch{EPOCHS + 1}.pt", f"grpo_epoch{EPOCHS + 2}.pt"}
    assert {name: after[name] for name in before} == before
    assert [row["epoch"] for row in metrics_of(tmp_path)] == [1, 2, *range(1, EPOCHS + 3)]
    assert metrics_of(tmp_path)[:-2] == metrics_of(folder)


# ---------------------------------------------------------------------- the same numbers, and others


@pytest.fixture
def cached(chain, tmp_path) -> Path:
    """An empty folder but for the features of the digits."""
    features = tmp_path / "results/digits/cache/features_tiny-clip.safetensors"
    features.parent.mkdir(parents=True)
    shutil.copy2(chain[0] / "results/digits/cache/features_tiny-clip.safetensors", features)
    return tmp_path


def test_another_seed_gives_other_numbers(chain, cached):
    done_json(*TRAIN, "--seed", "1", cwd=cached)
    ours, others = (json.loads((folder / ROLLOUTS).read_text()) for folder in (chain[0], cached))
    assert set(ours) != set(others)
    first, second = metrics_of(chain[0]), metrics_of(cached)
    assert [row["epoch"] for row in first] == [row["epoch"] for row in second]
    assert all(a["val_reward"] != b["val_reward"] for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------------- killed


def killed_when(ready, folder: Path, *arguments: str) -> None:
    """Start the command and kill it, without a chance to clean up, as soon as `ready()` holds."""
    command = [sys.executable, "-m", "lever_lm", *arguments]
    process = subprocess.Popen(
        command, cwd=folder, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not ready():
            assert process.poll() is None, "the command ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        status = process.wait(timeout=30)
    assert status == -signal.SIGKILL


def answers_known(folder: Path) -> int:
    import sqlite3

    path = folder / "results/digits/cache/answers_tiny-qwen2_5-vl.sqlite"
    if not path.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            return database.execute("SELECT count(*) FROM answers").fetchone()[0]
    except sqlite3.OperationalError:
        return 0  # the table is being made


def test_killed_during_rollouts_it_goes_on_to_the_same_run(chain, cached):
    total = answers_known(chain[0])  # the chain's inference asked some of its own
    killed_when(lambda: answers_known(cached) > 0, cached, *TRAIN)
    known = answers_known(cached)
    assert 0 < known < total
    assert not (cached / ROLLOUTS).exists()
    done = run_lever(*TRAIN, cwd=cached)
    assert done.status == 0, done.err
    assert re.search(rf"\b{known}\b.*known", done.out), "what was answered is not asked again"
    assert (cached / ROLLOUTS).read_bytes() == (chain[0] / ROLLOUTS).read_bytes()
    convert_as_the_chain_did(chain, cached)
    assert_same_run(chain[0], cached)
    assert [path for path in cached.rglob("*") if path.name.startswith(".tmp-")] == []


def convert_as_the_chain_did(chain, folder: Path) -> None:
    """The chain also converted the checkpoint of its best.json."""
    done_json("convert", chain[1]["convert"]["input"], cwd=folder)


@pytest.mark.parametrize("moment", ["rce_epoch2.pt", "grpo_epoch3.pt"])
def test_killed_during_training_it_goes_on_to_the_same_run(chain, cached, moment):
    shutil.copytree(chain[0] / ROLLOUTS.parent, cached / ROLLOUTS.parent)
    killed_when((cached / RUN / moment).exists, cached, *TRAIN)
    finished = checkpoints(cached)
    assert moment in finished
    assert f"grpo_epoch{EPOCHS}.pt" not in finished
    left = cached / RUN / ".tmp-left"
    left.write_bytes(b"half a checkpoint")
    done = run_lever(*TRAIN, cwd=cached)
    assert done.status == 0, done.err
    assert "going on after" in done.out
    after = checkpoints(cached)
    assert {name: after[name] for name in finished} == finished, "finished checkpoints are not rewritten"
    convert_as_the_chain_did(chain, cached)
    assert_same_run(chain[0], cached)
    assert [path for path in cached.rglob("*") if path.name.startswith(".tmp-")] == []


@pytest.mark.parametrize("lost", ["metrics.jsonl", "train.log", f"grpo_epoch{EPOCHS}.pt", "half a row"])
def test_what_a_kill_between_two_files_left_out_is_made_up_for(chain, tmp_path, lost, lever):
    shutil.copytree(chain[0] / "results", tmp_path / "results")
    run = tmp_path / RUN
    log = (run / "train.log").read_text(encoding="utf-8")
    if lost == "half a row":
        text = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(text[: text.rindex('"kl"')])
    else:
        (run / lost).unlink()
    done = lever(*TRAIN)
    assert done.status == 0, done.err
    assert_same_run(chain[0], tmp_path)
    assert (run / "train.log").read_text(encoding="utf-8") == log


# ---------------------------------------------------------------------- demo


def test_demo_ends_in_the_table_of_the_spec_and_a_report(cached):
    prefix = without_network()
    result = done_json("demo", "--limit", "40", "--shots", "1,2", cwd=cached, prefix=prefix, HF_HUB_OFFLINE="1")
    jobs = [(row["method"], row["shots"]) for row in result["table"]]
    assert set(jobs) == {("zero_shot", 0)} | {(name, k) for name in METHODS[1:] for k in (1, 2)}
    assert len(jobs) == len(set(jobs))
    for row in result["table"]:
        assert row["n"] == 40
        low, high = row["ci"]
        assert 0 <= low <= row["accuracy"] <= high <= 1
    accuracy = {(row["method"], row["shots"]): row["accuracy"] for row in result["table"]}
    assert accuracy["oracle", 1] >= 0.8 > accuracy["random", 1]
    page = (cached / result["report"]).read_text(encoding="utf-8")
    assert all(name in page for name in METHODS)
    assert "data:image/jpeg;base64," in page
    assert "<script" not in page
    assert not any(address in page for address in ("http://", "https://"))
    run = cached / "results/digits/model_cpk/demo"
    assert (run / "grpo_epoch1.pt").is_file()
    assert result["report"] == "results/digits/model_cpk/demo/report.html"


def test_html_in_a_question_is_shown_as_text_in_the_report(lever, tmp_path):
    evil = '<script>alert("x")</script> & <b>what</b>?'
    world = small_digits(tmp_path / "world", train=40, val=4)
    for split in ("train", "val"):
        path = world / f"OpenEnded_mscoco_{split}2014_questions.json"
        content = json.loads(path.read_text())
        for question in content["questions"]:
            question["question"] = evil
        path.write_text(json.dumps(content))
    sets = [f"data.okvqa_path={world}", f"data.coco_path={world}", "rollout.pool_size=8", "data.name=<i>evil"]
    options = [*(f"--set={item}" for item in sets[:3]), "--limit", "5"]
    options += ["--set=reward.mode=hard01_plus_gtprob", "--set=rollout.gt_prob=true"]  # all its answers are wrong
    assert lever("train", *options, "--rce-epochs", "1", "--grpo-epochs", "1").status == 0
    assert lever("infer", "--shots", "1", *options).status == 0
    page = (tmp_path / lever("report", *options, "--json").json["report"]).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>what</b>" not in page
    assert html.escape("<b>what</b>?") in page
