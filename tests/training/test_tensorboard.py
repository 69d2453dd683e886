"""`--tracker tensorboard`: every epoch once, whatever happened, read back with TensorBoard's own reader."""

import importlib.util

import pytest
from helpers import DATA, INFERENCE, RUN, SMALL, files_in

from lever_lm.config.schema import Config
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.tensorboard import TensorBoard, check_tracker
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
    assert text.splitlines() == ["    seed: 0", "    name: '```<b>\\u202e'"]  # code, no markup


def test_going_on_writes_all_rows_afresh_and_leaves_other_files_alone(run):
    first = TensorBoard(run)
    first.begin([row("rce", 1)])
    first.add(row("rce", 2, epoch_time=5.0))
    first.results([{"method": "grpo", "shots": 1, "accuracy": 0.5}])
    own = run.path / "notes"
    own.write_text("own")
    (run.events / "events.out.tfevents.0.lever").symlink_to(own)
    run.config.write_text("seed: 1\n")
    second = TensorBoard(run)
    second.begin([row("rce", 1, val_loss=9.0), row("rce", 2), row("rce", 3)])
    second.add(row("grpo", 1))
    second.results([{"method": "grpo", "shots": shots, "accuracy": 0.1 + shots / 2} for shots in (1, 2)])
    scalars, texts = read(run.events)
    assert scalars["rce/val_loss"] == [(1, 9.0), (2, 1.5), (3, 1.5)]
    assert scalars["grpo/val_loss"] == [(1, 1.5)]
    assert scalars["accuracy/grpo"] == [(1, pytest.approx(0.6)), (2, pytest.approx(1.1))]
    assert texts == ["    seed: 1\n"]
    assert run.event_files() == [second.path]
    assert own.read_text() == "own"


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


def test_no_tracker_is_none():
    assert check_tracker(None) is None
    with pytest.raises(UsageError):
        check_tracker("")


def test_a_killed_run_goes_on_with_every_epoch_once(lever, tmp_path, monkeypatch):
    own = ("--rl-data", DATA / "small_edge_cases.json", "--embeddings", DATA / "small_embeddings.safetensors")
    words = ("train", *own, "--rce-epochs", "1", "--tracker", "tensorboard")

    def killed(self, row):
        if row["phase"] == "grpo" and row["epoch"] == 2:
            raise KeyboardInterrupt
        add(self, row)

    add = TensorBoard.add
    with monkeypatch.context() as patched:
        patched.setattr(TensorBoard, "add", killed)
        assert lever(*words, "--grpo-epochs", "5").status == 130
    went_on = lever(*words, "--grpo-epochs", "3")
    assert went_on.status == 0, went_on.err
    assert f"tracker: tensorboard --logdir {RUN}" in went_on.out
    scalars, texts = read(tmp_path / EVENTS)
    assert scalars == expected(tmp_path / RUN)
    assert [step for step, _ in scalars["grpo/val_loss"]] == [1, 2, 3]
    assert "      epochs: 3" in texts[-1].splitlines()
    assert "tensorboard" not in (tmp_path / RUN / "config.yaml").read_text()  # no part of what the run is


def test_overwriting_a_run_removes_its_events_and_no_others(run):
    TensorBoard(run).begin([])
    run.open(Config(), overwrite=True)
    assert not run.events.exists()
    TensorBoard(run).begin([])
    (run.events / "events.out.tfevents.1.elsewhere").write_text("")
    run.open(Config(), overwrite=True)
    assert [path.name for path in run.events.iterdir()] == ["events.out.tfevents.1.elsewhere"]


def test_the_demo_tracks_its_accuracies_too(lever, warm):
    words = ("demo", *SMALL[:2], "--rce-epochs", "1", "--grpo-epochs", "1", "--shots", "1,2")
    done = lever(*words, "--tracker", "tensorboard", "--json")
    assert done.status == 0, done.err
    scalars = read(warm / RUN.with_name("demo") / "tensorboard")[0]
    for result in done.json["table"]:
        assert (result["shots"], pytest.approx(result["accuracy"])) in scalars[f"accuracy/{result['method']}"]
    assert [step for step, _ in scalars["accuracy/grpo"]] == [1, 2]
    assert not (warm / INFERENCE.with_name("demo") / "tensorboard").exists()
