"""`--tracker tensorboard`: every epoch once, whatever happened, read back with TensorBoard's own reader."""

import importlib.util
import itertools
import signal
import subprocess
import sys
import time

import pytest
from helpers import INFERENCE, RUN, SMALL, clean_environment, files_in

from lever_lm.config.schema import Config
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.tensorboard import TRACKERS, TensorBoard, check_tracker
from lever_lm.utils.errors import LeverError, UsageError

EVENTS = RUN / "tensorboard"


def read(folder):
    """What TensorBoard reads from a folder of events: tag → [(step, value)], and the text of the config."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("config")]
    return scalars, texts


def expected(folder):
    """The same from the rows of the run, in single precision."""
    found = {}
    for row in RunFolder(folder).rows():
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "epoch":
                found.setdefault(f"{row['phase']}/{name}", []).append((row["epoch"], pytest.approx(value, rel=1e-6)))
    return found


def row(phase, epoch, **values):
    return {"phase": phase, "epoch": epoch, "val_loss": 1.5, "warnings": {"ties": "half of them"}, **values}


@pytest.fixture
def run(tmp_path):
    """A run folder with a config."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.config.write_text("seed: 0\nname: '```<b>\u202e'\n", encoding="utf-8")
    return folder


def test_every_number_of_every_row_is_a_scalar_and_the_config_is_a_text(run):
    board = TensorBoard(run)
    board.begin([])
    rows = [row("rce", 1, temperature=2), row("grpo", 1, kl=0.25), row("grpo", 2, kl=1e300)]
    for one in rows:
        board.add(one)
    scalars, texts = read(run.events)
    assert scalars["rce/val_loss"] == [(1, 1.5)]
    assert scalars["rce/temperature"] == [(1, 2.0)]
    assert scalars["grpo/val_loss"] == [(1, 1.5), (2, 1.5)]
    assert scalars["grpo/kl"] == [(1, 0.25), (2, float("inf"))]  # more than single precision holds
    assert len(scalars) == 4  # no text, no number of an epoch
    (text,) = texts
    assert text.splitlines() == ["    seed: 0", "    name: '```<b>\\u202e'"]  # code: no markup of a stranger's


def test_going_on_replaces_what_was_there_and_leaves_strangers_alone(run):
    first = TensorBoard(run)
    first.begin([])
    first.add(row("rce", 1, val_loss=9.0))
    stranger = run.events / "events.out.tfevents.1.elsewhere"
    stranger.write_bytes(first.path.read_bytes())
    with first.path.open("ab") as file:
        file.write(b"cut short")
    second = TensorBoard(run)
    second.begin([row("rce", 1), row("rce", 2)])
    second.add(row("rce", 3))
    assert [path.stat().st_size > 0 for path in run.event_files()] == [False, True]
    assert stranger.is_file()
    stranger.unlink()
    theirs = run.path / "somebody's"
    theirs.write_text("own")
    (run.events / "events.out.tfevents.0.lever").symlink_to(theirs)
    assert read(run.events)[0]["rce/val_loss"] == [(1, 1.5), (2, 1.5), (3, 1.5)]
    third = TensorBoard(run)
    third.begin([row("rce", 1)])
    assert run.event_files() == [second.path, third.path]
    assert theirs.read_text() == "own"


def test_accuracies_outlive_a_run_that_goes_on_and_are_there_once(run):
    first = TensorBoard(run)
    first.begin([row("rce", 1)])
    measured = [{"method": "grpo", "shots": shots, "accuracy": 0.25 * shots} for shots in (1, 2)]
    first.results(measured)
    for broken in (b"", b"cut short", b"\xff" * 40, b"\x09" + bytes(11) + b"accuracy/" + bytes(4)):
        with first.path.open("ab") as file:
            file.write(broken)
        first = TensorBoard(run)
        first.begin([row("rce", 1), row("rce", 2)])
        scalars, _ = read(run.events)
        assert scalars["accuracy/grpo"] == [(1, 0.25), (2, 0.5)]
        assert len(scalars["rce/val_loss"]) == 2
    first.results([*measured, {"method": "rce", "shots": 1, "accuracy": 0.5}])
    first.results([{"method": "grpo", "shots": 2, "accuracy": 0.75}])  # measured anew, and other than before
    scalars, _ = read(run.events)
    assert scalars["accuracy/grpo"] == [(1, 0.25), (2, 0.5), (2, 0.75)]
    assert scalars["accuracy/rce"] == [(1, 0.5)]
    TensorBoard(run).begin([])
    assert read(run.events)[0]["accuracy/grpo"] == [(1, 0.25), (2, 0.75)]


def test_epochs_before_have_the_times_at_which_they_would_have_ended(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [row("rce", epoch, epoch_time=took) for epoch, took in ((1, 5.0), (2, 30.0), (3, float("nan")), (4, 60.0))]
    TensorBoard(run).begin(rows)
    events = EventAccumulator(str(run.events))
    events.Reload()
    times = [event.wall_time for event in events.Scalars("rce/val_loss")]
    assert times[-1] == pytest.approx(time.time(), abs=60)
    assert [after - before for before, after in itertools.pairwise(times)] == pytest.approx([30.0, 0.0, 60.0])
    assert events.FirstEventTimestamp() == pytest.approx(times[0] - 5.0)


def test_an_open_tensorboard_forgets_the_file_before(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    TensorBoard(run).begin([row("rce", 1, val_loss=9.0), row("rce", 2, val_loss=9.0)])
    events = EventAccumulator(str(run.events))
    events.Reload()
    TensorBoard(run).begin([row("rce", 1), row("rce", 2)])
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("rce/val_loss")] == [(1, 1.5), (2, 1.5)]


def test_a_disk_that_takes_no_more_is_said_as_such(run):
    board = TensorBoard(run)
    board.begin([])
    board.path.unlink()
    board.path.symlink_to("/dev/full")
    with pytest.raises(LeverError, match=r"cannot write .*tfevents.*: No space left on device"):
        board.add(row("rce", 1))


def test_trackers_are_refused_before_anything_costly(lever, tmp_path, monkeypatch):
    done = lever("train", "--tracker", "wandb")
    assert (done.status, done.err) == (2, "lever: unknown tracker 'wandb': one of tensorboard (--tracker)\n")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    for command in ("train", "demo"):
        done = lever(command, "--tracker", "tensorboard")
        assert done.status == 1
        assert "pip install 'lever-lm[tensorboard]'" in done.err
        assert len(done.err.splitlines()) == 1
    assert files_in(tmp_path) == {}
    with pytest.raises(LeverError, match="tensorboard"):
        check_tracker("tensorboard")


def test_no_tracker_is_none_and_the_names_are_those_of_packages():
    assert check_tracker(None) is None
    for name in TRACKERS:
        assert importlib.util.find_spec(name), f"{name} is in the extra `dev`"
        check_tracker(name)
    with pytest.raises(UsageError, match="tensorboard"):
        check_tracker("")


def train(folder, *more):
    command = [sys.executable, "-W", "error", "-m", "lever_lm", "train", *SMALL[:4], *more]
    return subprocess.Popen(command, cwd=folder, env=clean_environment(), stdout=subprocess.PIPE, text=True)


def test_a_killed_run_goes_on_with_every_epoch_once(lever, warm):
    process = train(warm, "--grpo-epochs", "5000", "--tracker", "tensorboard")
    try:
        deadline = time.monotonic() + 60
        while not (warm / RUN / "grpo_epoch3.pt").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    done = len(RunFolder(warm / RUN).rows())
    more = ("--grpo-epochs", str(done + 2), "--tracker", "tensorboard")
    went_on = lever("train", *SMALL[:4], *more)
    assert went_on.status == 0, went_on.err
    assert f"tracker: tensorboard --logdir {RUN}" in went_on.out
    assert read(warm / EVENTS)[0] == expected(warm / RUN)
    (config,) = read(warm / EVENTS)[1]
    assert f"      epochs: {done + 2}" in config.splitlines()
    assert "tensorboard" not in (warm / RUN / "config.yaml").read_text()  # no part of what the run is


def test_overwriting_a_run_removes_its_events_and_no_others(run):
    TensorBoard(run).begin([])
    run.open(Config(), overwrite=True)
    assert not run.events.exists()
    TensorBoard(run).begin([])
    (run.events / "events.out.tfevents.1.elsewhere").write_text("")
    run.open(Config(), overwrite=True)
    assert [path.name for path in run.events.iterdir()] == ["events.out.tfevents.1.elsewhere"]


def test_the_demo_tracks_its_accuracies_too(lever, warm):
    done = lever("demo", "--limit", "24", "--rce-epochs", "1", "--grpo-epochs", "1", "--shots", "1,2", "--tracker",
                 "tensorboard", "--json")  # fmt: skip
    assert done.status == 0, done.err
    scalars = read(warm / RUN.with_name("demo") / "tensorboard")[0]
    for result in done.json["table"]:
        assert (result["shots"], pytest.approx(result["accuracy"])) in scalars[f"accuracy/{result['method']}"]
    assert [step for step, _ in scalars["accuracy/grpo"]] == [1, 2]
    assert not (warm / INFERENCE.with_name("demo") / "tensorboard").exists()
