"""The user's way from an empty folder to a report: as the document has it, killed in the midst, and again.

Commands run in this process, in which nothing can reach a network; the one that is killed has a process of its own.
"""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import INFERENCE, ROLLOUTS, RUN, clean_environment, files_in, run_here
from remains import content

from lever_lm.utils.file_hashes import DIGESTS
from lever_lm.utils.safe_torch_load import load_torch

LIMIT = ("--limit", "24")
EPOCHS = 9  # enough of them that a kill after the third comes before the end
TRAIN = ("train", *LIMIT, "--rce-epochs", "2", "--set", "grpo.refresh_every=2", "--grpo-epochs", str(EPOCHS))
TIMES = ("epoch_time", "step_time")
COLUMNS = "Epoch Train Loss Val Loss PPO Loss KL Adv Std Adv Max Beta"
METHODS = ("zero_shot", "random", "text_sim", "img_sim", "img_text_sim", "answer_match", "grpo", "oracle")


@pytest.fixture(scope="module", autouse=True)
def _no_network():
    def refuse(*arguments):
        raise OSError("a test without network")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(socket.socket, "connect", refuse)
        yield


def done_json(*arguments, cwd: Path) -> dict:
    done = run_here(*arguments, "--json", cwd=cwd)
    assert done.status == 0, done.err
    return done.json


def metrics_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / RUN / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit the same checkpoints and metrics, times excepted."""
    assert checkpoints(one).keys() == checkpoints(other).keys()
    for name in (*checkpoints(one), "metrics.jsonl"):
        assert content(one / RUN / name) == content(other / RUN / name), name


def checkpoints(folder: Path) -> dict[str, tuple[int, int]]:
    return {name: facts for name, facts in files_in(folder / RUN).items() if re.fullmatch(r".*_epoch\d+\.pt", name)}


def temporary(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".tmp-")]


# ---------------------------------------------------------------------- unbroken


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Path, dict]:
    """The user's commands one after the other in an empty folder: (folder, answers)."""
    DIGESTS.__init__()  # as in a process of its own: those that another test has read are not written again
    folder = tmp_path_factory.mktemp("chain")
    answers = {
        "train": done_json(*TRAIN, cwd=folder),
        "best-ckpt": done_json("best-ckpt", "--strategy", "val_loss", cwd=folder),
        "convert": done_json("convert", cwd=folder),
        "infer": done_json("infer", "--shots", "5", *LIMIT, cwd=folder),
        "report": done_json("report", cwd=folder),
    }
    return folder, answers


@pytest.fixture
def copied(chain, tmp_path) -> Path:
    """A folder of the test's own with what the chain left."""
    shutil.copytree(chain[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_the_commands_hand_on_from_one_to_the_next(chain):
    folder, answers = chain
    best = answers["best-ckpt"]
    assert (answers["train"]["run"], answers["train"]["recommended"]["strategy"]) == (str(RUN), "val_reward")
    assert Path(folder, answers["train"]["converted"]).is_file()
    assert best["checkpoint"] == answers["convert"]["input"] == str(RUN / f"grpo_epoch{best['epoch']}.pt")
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
    written = {"icds.jsonl", "metrics.json", "predictions_grpo_5shot.json", "samples_grpo_5shot.jsonl"}
    assert {path.name for path in inferred.iterdir()} == written
    assert temporary(folder) == []
    assert {path.name for path in folder.iterdir()} == {"results"}


def test_checkpoints_are_the_lineages_v3_files(chain):
    folder, _ = chain
    rows = [json.loads(line) for line in (folder / RUN / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        content = load_torch(folder / RUN / f"{row['phase']}_epoch{row['epoch']}.pt")
        assert {"epoch", "phase", "model_state_dict", "kl_beta", "metrics", "config", "format"} <= set(content)
        assert (content["epoch"], content["phase"]) == (row["epoch"] - 1, row["phase"])
        assert content["metrics"] == {name: value for name, value in row.items() if name not in ("phase", "epoch")}


def test_the_log_holds_the_table_that_existing_scripts_parse(chain):
    folder, _ = chain
    lines = (folder / RUN / "train.log").read_text(encoding="utf-8").splitlines()
    table = lines[lines.index("阶段3：GRPO训练") + 1 :]
    assert table[0].split() == COLUMNS.split()
    rows = list(csv.reader([",".join(line.split()) for line in table[2:]]))
    logged = [row for row in metrics_of(folder) if row["phase"] == "grpo"]
    assert [int(row[0]) for row in rows] == list(range(1, EPOCHS + 1))
    for cells, row in zip(rows, logged, strict=True):
        assert float(cells[1]) == pytest.approx(row["train_loss"], abs=1e-5)
        assert float(cells[4]) == pytest.approx(row["kl"], abs=1e-5)


def test_more_epochs_go_on_from_the_last_one(chain, copied, lever):
    before = checkpoints(copied)
    done = lever(*TRAIN, "--grpo-epochs", str(EPOCHS + 2))
    assert done.status == 0, done.err
    assert f"going on after grpo epoch {EPOCHS}" in done.out
    after = checkpoints(copied)
    assert set(after) - set(before) == {f"grpo_epoch{EPOCHS + 1}.pt", f"grpo_epoch{EPOCHS + 2}.pt"}
    assert {name: after[name] for name in before} == before
    assert [row["epoch"] for row in metrics_of(copied)] == [1, 2, *range(1, EPOCHS + 3)]
    assert metrics_of(copied)[:-2] == metrics_of(chain[0])


# ---------------------------------------------------------------------- killed


def test_killed_during_training_it_goes_on_to_the_same_run(chain, digits_folder, lever):
    """Killed by the system, without a chance to clean up; at every file event: test_crashes.py."""
    shutil.copytree(chain[0] / ROLLOUTS.parent, digits_folder / ROLLOUTS.parent)
    command = [sys.executable, "-m", "lever_lm", *TRAIN, "--quiet"]
    process = subprocess.Popen(command, cwd=digits_folder, env=clean_environment(), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (digits_folder / RUN / "grpo_epoch3.pt").exists():
            assert process.poll() is None, "the command ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        running = lever("status", "--json").json
    finally:
        process.kill()
        assert process.wait(timeout=30) == -signal.SIGKILL
    assert (running["state"], running["phase"], running["process"]["pid"]) == ("running", "grpo", process.pid)
    killed = lever("status", "--json").json
    assert (killed["state"], killed["command"]) == ("killed", f"lever {' '.join(TRAIN)} --quiet")
    finished = checkpoints(digits_folder)
    assert "grpo_epoch3.pt" in finished
    assert f"grpo_epoch{EPOCHS}.pt" not in finished
    (digits_folder / RUN / ".tmp-left").write_bytes(b"half a checkpoint")
    os.utime(digits_folder / RUN / ".tmp-left", (0, 0))
    done = lever(*TRAIN)
    assert done.status == 0, done.err
    assert "going on after" in done.out
    after = checkpoints(digits_folder)
    assert {name: after[name] for name in finished} == finished, "finished checkpoints are not rewritten"
    assert_same_run(chain[0], digits_folder)
    assert temporary(digits_folder) == []


@pytest.mark.parametrize("lost", ["metrics.jsonl", "train.log", f"grpo_epoch{EPOCHS}.pt", "half a row"])
def test_what_a_kill_between_two_files_left_out_is_made_up_for(chain, copied, lost, lever):
    run = copied / RUN
    log = (run / "train.log").read_text(encoding="utf-8")
    if lost == "half a row":
        text = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(text[: text.rindex('"kl"')])
    else:
        (run / lost).unlink()
    done = lever(*TRAIN)
    assert done.status == 0, done.err
    assert_same_run(chain[0], copied)
    assert (run / "train.log").read_text(encoding="utf-8") == log


# ---------------------------------------------------------------------- demo


def test_demo_ends_in_the_table_of_the_spec_and_a_report(warm):
    few = ("--limit", "24", "--rce-epochs", "1", "--grpo-epochs", "2")
    result = done_json("demo", *few, "--shots", "1", cwd=warm)
    jobs = [(row["method"], row["shots"]) for row in result["table"]]
    assert sorted(jobs) == sorted([("zero_shot", 0), *((name, 1) for name in METHODS[1:])])
    for row in result["table"]:
        assert row["n"] == 24
        low, high = row["ci"]
        assert 0 <= low <= row["accuracy"] <= high <= 1
    accuracy = {(row["method"], row["shots"]): row["accuracy"] for row in result["table"]}
    assert accuracy["oracle", 1] >= 0.8 > accuracy["random", 1]
    page = (warm / result["report"]).read_text(encoding="utf-8")
    assert all(word in page for word in (*METHODS, "data:image/jpeg;base64,"))
    assert not any(word in page for word in ("<script", "http://", "https://"))
    assert result["report"] == "results/digits/model_cpk/demo/report.html"
    assert (warm / "results/digits/model_cpk/demo/grpo_epoch1.pt").is_file()
