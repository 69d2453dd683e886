"""Killed at any moment and run again, a command ends as if nothing had been: the same tensors, the same rows, no answer
asked twice, nothing left over. What the system cannot show, a power failure, is read off the order of the syncs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CHECKOUT, clean_environment
from lab import Fault, events
from remains import asked_again, broken, differences, doubled, left_overs

# ---------------------------------------------------------------------- kills

slow = pytest.mark.slow
# command, what is done when, at which event of which file, the how manieth of them
MOMENTS = [
    pytest.param("rollout", "kill before", "write", "features_", 0, marks=slow),
    pytest.param("rollout", "torn", "write", "/vision_", 0, marks=slow),
    pytest.param("rollout", "kill before", "unlink", "answers_tiny-qwen2_5-vl.sqlite-journal", 3, marks=slow),
    pytest.param("rollout", "kill after", "unlink", "answers_tiny-qwen2_5-vl.sqlite-journal", 3, marks=slow),
    pytest.param("rollout", "torn", "write", "answers_tiny-qwen2_5-vl.sqlite", 5, marks=slow),
    pytest.param("rollout", "kill before", "rename", "rl_data_", 0, marks=slow),
    pytest.param("train", "term before", "open", "config.yaml", 0, marks=slow),
    ("train", "kill before", "unlink", "answers_tiny-qwen2_5-vl.sqlite-journal", 3),  # within a commit
    ("train", "kill after", "rename", "state.pt", 2),  # the epoch's checkpoint is not there yet
    ("train", "torn", "write", "/grpo_epoch1.pt", 0),
    ("train", "torn", "write", "metrics.jsonl", -2),
    pytest.param("train", "kill before", "sync", "train.log", -1, marks=slow),
    ("train", "int before", "sync", "grpo_epoch2.pt", 0),
    pytest.param("infer", "kill after", "rename", "predictions_random_2shot.json", 0, marks=slow),
    ("demo", "kill after", "rename", "predictions_random_2shot.json", 0),
    pytest.param("infer", "term after", "rename", "/metrics.json", 0, marks=slow),
    pytest.param("demo", "torn", "write", "_v2format.ckpt", 0, marks=slow),
    pytest.param("demo", "kill before", "rename", "report.html", 0, marks=slow),
    pytest.param("online", "kill before", "unlink", "answers_tiny-qwen2_5-vl.sqlite-journal", -3, marks=slow),
]


@pytest.mark.parametrize(("command", "deed", "kind", "file", "nth"), MOMENTS)
def test_a_command_killed_at_a_file_event_ends_as_if_it_had_not_been(bench, command, deed, kind, file, nth):
    do, _, when = deed.partition(" ")
    trial = bench(command).attempt([bench(command).fault(do, kind, file, nth, when=when or "before")])
    assert trial.kills == 1
    assert trial.problems == {}


@slow
def test_a_command_killed_again_and_again_ends_as_if_it_had_not_been(bench):
    places = [("rename", "features_"), ("unlink", "-journal", 2)]
    faults = [bench("train").fault("kill", *place) for place in places]
    trial = bench("train").attempt([*faults, Fault("kill", 60), Fault("kill", 90)])
    assert trial.kills == 4
    assert trial.problems == {}


@pytest.mark.parametrize("do", [pytest.param("int", marks=slow), "term"])
def test_a_signal_from_outside_ends_in_one_line_and_the_command_goes_on_later(bench, do):
    (at,) = [e.number for e in bench("train").events if e.kind == "rename" and "/grpo_epoch1.pt" in e.new]
    trial = bench("train").attempt([Fault(do, at, seconds=0.0)])
    assert trial.kills == 1
    assert trial.problems == {}


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(tmp_path):
    command = [sys.executable, CHECKOUT / "tests/soak.py", "--kills", "100", "--results", tmp_path / "soak.md"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 lost" in done.stdout


# ---------------------------------------------------------------------- the order on disk


@pytest.mark.parametrize("command", ["train", pytest.param("infer", marks=slow), "demo"])
def test_every_file_is_synced_before_it_gets_its_name_and_its_folder_after(bench, command):
    found = bench(command).events
    renames = [event for event in found if event.kind == "rename"]
    assert len(renames) > 10
    for event in renames:
        before = [e.kind for e in found if e.path == event.path and e.number < event.number and e.kind != "chmod"]
        after = [e for e in found if e.number > event.number]
        assert before[-1] == "sync", event
        folder = str(Path(event.new).parent)
        of_folder = [e for e in after if (e.kind, e.path) == ("sync", folder) or str(Path(e.new).parent) == folder]
        assert of_folder, event
        assert of_folder[0].kind == "sync", event


@pytest.mark.parametrize("file", ["metrics.jsonl", "train.log"])
def test_every_line_that_is_added_is_synced_before_anything_else_is_written(bench, file):
    found = bench("train").events
    lines = [i for i, event in enumerate(found) if event.kind == "write" and event.path.endswith(file)]
    assert len(lines) > 4
    assert all((found[i + 1].kind, found[i + 1].path) == ("sync", found[i].path) for i in lines)


def test_the_state_of_an_epoch_is_on_disk_before_its_checkpoint_and_its_row(bench):
    found = bench("train").events
    for epoch, (phase, number) in enumerate([("rce", 1), ("rce", 2), ("grpo", 1), ("grpo", 2)]):
        state = [e.number for e in found if e.new.endswith("/state.pt")][epoch]
        (checkpoint,) = [e.number for e in found if e.new.endswith(f"/{phase}_epoch{number}.pt")]
        row = [e.number for e in found if e.kind == "write" and e.path.endswith("metrics.jsonl")][epoch]
        assert state < checkpoint < row


# ---------------------------------------------------------------------- that the harness sees what it should


def test_the_injector_tears_a_write_in_half_and_kills(bench, tmp_path):
    shutil.copytree(bench("train").start, tmp_path / "torn")
    fault = bench("train").fault("torn", "write", "metrics.jsonl", -1)
    done = bench("train").lab.run(bench("train").command, tmp_path / "torn", fault)
    (metrics,) = (tmp_path / "torn").rglob("metrics.jsonl")
    (whole,) = bench("train").reference.rglob("metrics.jsonl")
    assert done.status == -9
    assert events(tmp_path / "torn")[-1].path == str(metrics)
    last = metrics.read_text().splitlines()[-1]
    assert len(metrics.read_text().splitlines()) == len(whole.read_text().splitlines())
    assert not metrics.read_text().endswith("\n")
    assert len(last) > 20


@pytest.mark.parametrize("kind", ["lost", "doubled", "left over", "half-written"])
def test_a_fault_of_each_kind_is_found(bench, tmp_path, kind):
    shutil.copytree(bench("train").reference, tmp_path / "run")
    (run,) = (tmp_path / "run/results/digits/model_cpk").iterdir()
    find = {
        "lost": lambda: differences(bench("train").reference, tmp_path / "run"),
        "doubled": lambda: doubled(tmp_path / "run"),
        "left over": lambda: left_overs(tmp_path / "run"),
        "half-written": lambda: broken(tmp_path / "run"),
    }[kind]
    assert find() == []
    if kind == "lost":
        (run / "rce_epoch1.pt").unlink()
    elif kind == "doubled":
        with open(run / "metrics.jsonl", "r+") as file:
            line = file.readline()
            file.seek(0, 2)
            file.write(line)
    elif kind == "left over":
        (run / ".tmp-abc").touch()
    else:
        (run / "rce_epoch1.pt").write_bytes((run / "rce_epoch1.pt").read_bytes()[:-1000])
    assert len(find()) == 1


@pytest.mark.parametrize(
    ("lines", "again", "beyond"),
    [
        ("1 0 a\n1 1 b\n1 2 c\n2 0 b\n2 0 c\n2 1 d\n", 2, 0),  # the two batches that process 1 was killed with
        ("1 0 a\n1 1 b\n1 2 c\n2 0 a\n2 0 c\n", 2, 1),  # a was answered, and is asked once more
        ("1 0 a\n1 1 a\n", 1, 1),  # twice in one process
    ],
)
def test_prompts_asked_again_are_told_from_those_of_the_batches_of_the_kill(tmp_path, lines, again, beyond):
    (tmp_path / "asked").write_text(lines)
    assert asked_again(tmp_path / "asked") == (again, beyond)
