"""Disks that fill up, turn read-only, fail or lose files, and a clock that jumps: one message that names the file, the
last good state intact; with room and permission again the same command ends as if nothing had been."""

import contextlib
import itertools
import json
import shutil
from pathlib import Path

import pytest
from helpers import RUN
from lab import Fault
from remains import broken, differences, doubled, left_overs

DISK = "64m"  # a few more than a command wants to see free before it begins
BLOCKS = range(4096, 1 << 20, 4096)  # where the blocks of the disk end
slow = pytest.mark.slow


@pytest.fixture
def place(lab, bench, tmp_path):
    """A folder in which a command can begin, as it was before the unbroken run: name of the command → folder."""

    def of(command: str) -> Path:
        shutil.copytree(bench(command).start, tmp_path / command)
        return tmp_path / command

    return of


@pytest.fixture
def disk(lab, place):
    """The same with its results on a disk of their own, of 64 MB: name → the folder, as this process sees it."""
    if not lab.mounts:
        pytest.skip("neither root nor a user namespace: no disk can be mounted")
    mounted = []

    def of(command: str, size: str = DISK) -> Path:
        folder = place(command)
        before = folder.with_name(f"{folder.name}.before")
        (folder / "results").mkdir(exist_ok=True)
        shutil.copytree(folder / "results", before)
        lab.shell("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder / "results")
        mounted.append(folder / "results")
        lab.shell("cp", "-r", f"{before}/.", folder / "results")
        return folder

    yield of
    for folder in mounted:
        lab.shell("umount", folder)


def fill(folder: Path, room: int = 0) -> Path:
    """Take all the room that a disk has but so many bytes, as another job would."""
    filler = folder / "of_another_job"
    with open(filler, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
        file.truncate(max(file.tell() - room, 0))
    return filler


def assert_refused(done, *words: str, status: int = 1) -> None:
    """One message with these words in it, and no traceback."""
    assert done.status == status, (done.status, done.err)
    ours = [line for line in done.err.splitlines() if line.startswith("lever: ")]
    assert len(ours) == 1, done.err
    assert done.err.splitlines()[-1] == ours[0], done.err
    assert "defect" not in done.err
    for word in words:
        assert word in ours[0], ours[0]


def assert_goes_on(lab, bench, command: str, folder: Path) -> None:
    """The same command finishes, and all is as in the unbroken run."""
    done = lab.run(bench(command).command, folder)
    assert done.status == 0, done.err
    seen = lab.seen(folder)
    assert differences(bench(command).reference, seen) == []
    assert doubled(seen) == left_overs(seen) == []


def run_until_full(lab, command: list[str], folder: Path, when: Fault, room: int = 0, **options):
    """The command, on a disk that another job fills up but for `room` bytes when it stops at an event; then the other
    job's file is gone."""
    fillers = []
    done = lab.run(
        command,
        folder,
        when,
        meanwhile=lambda: fillers.append(fill(lab.seen(folder / "results"), room)),
        **options,
    )
    fillers.pop().unlink()
    return done


# ---------------------------------------------------------------------- full

# command, the file about to be written when the disk is full, the how manieth time, and which file the message names
FULL = [
    pytest.param(
        "train", "/vision_", 0, "/cache/", marks=slow
    ),  # written behind the caller's back: the answer cache may be the first to fail
    ("train", "answers_tiny-qwen2_5-vl.sqlite-journal", 4, "answers_tiny-qwen2_5-vl.sqlite"),
    ("train", "/state.pt", 2, "state.pt"),
    pytest.param("train", "/grpo_epoch1.pt", 0, "grpo_epoch1.pt", marks=slow),
    pytest.param("train", "answers_tiny-qwen2_5-vl.sqlite", 0, "answers_tiny-qwen2_5-vl.sqlite", marks=slow),
    pytest.param("train", "features_", 0, "features_tiny-clip.safetensors", marks=slow),
    pytest.param("train", "rl_data_", -1, "rl_data_MixSampler_tiny-qwen2_5-vl.json", marks=slow),
    pytest.param("train", "config.yaml", 0, "config.yaml", marks=slow),
    pytest.param("infer", "predictions_random_2shot.json", 0, "predictions_random_2shot.json", marks=slow),
    pytest.param("infer", "/metrics.json", 0, "metrics.json", marks=slow),
    pytest.param("demo", "report.html", 0, "report.html", marks=slow),
]


@pytest.mark.parametrize(("command", "file", "nth", "named"), FULL)
def test_a_disk_that_fills_up_stops_with_one_message_and_room_mends_it(lab, bench, disk, command, file, nth, named):
    folder = disk(command)
    done = run_until_full(lab, bench(command).command, folder, bench(command).fault("stop", "open", file, nth))
    assert_refused(done, named, "cannot ")
    assert broken(lab.seen(folder)) == []
    assert not list(lab.seen(folder).rglob(".tmp-*"))
    assert_goes_on(lab, bench, command, folder)


@slow
@pytest.mark.parametrize("room", [8_000, 64_000, 300_000, 1_000_000])
def test_wherever_the_room_ends_a_larger_disk_mends_it(lab, bench, disk, room):
    folder = disk("train")
    done = run_until_full(lab, bench("train").command, folder, bench("train").fault("stop", "open", "answers_"), room)
    assert_refused(done, "cannot ", "results/digits")
    assert broken(lab.seen(folder)) == []
    assert_goes_on(lab, bench, "train", folder)


@slow
def test_a_run_whose_older_checkpoint_does_not_fit_is_sound_without_it(lab, bench, disk):
    folder = disk("train")
    when = bench("train").fault("stop", "open", "_v2format.ckpt")
    done = run_until_full(lab, bench("train").command, folder, when)
    assert done.status == 0, done.err
    assert "not converted: cannot write" in done.out
    assert_goes_on(lab, bench, "train", folder)


@slow
def test_a_line_of_metrics_that_a_full_disk_cuts_is_made_whole(lab, bench, disk, tmp_path):
    command, there = [*bench("train").command, "--grpo-epochs", "18"], 6  # epochs of the run that goes on
    reference, folder = tmp_path / "reference", disk("train")
    shutil.copytree(bench("train").reference, reference)
    assert lab.run(command, reference).status == 0
    (metrics,) = reference.rglob("metrics.jsonl")
    ends = list(itertools.accumulate(map(len, metrics.read_bytes().splitlines(keepends=True))))
    cuts = [(row, at) for row in range(there, len(ends)) for at in BLOCKS if ends[row - 1] + 30 < at < ends[row] - 30]
    row, at = cuts[0]  # a row that lies across two blocks of the disk, by more than the times in others may differ
    shutil.copytree(bench("train").reference / "results", lab.seen(folder / "results"), dirs_exist_ok=True)
    fault = Fault("stop", row - there + 1, kind="open", path="metrics.jsonl")
    assert_refused(run_until_full(lab, command, folder, fault), "metrics.jsonl", "No space left")
    (cut,) = lab.seen(folder).rglob("metrics.jsonl")
    assert cut.stat().st_size == at
    assert lab.run(command, folder).status == 0
    assert differences(reference, lab.seen(folder)) == []


@slow
def test_a_message_that_does_not_fit_on_the_disk_changes_nothing_but_itself(lab, bench, disk):
    folder, when = disk("train"), bench("train").fault("stop", "open", "grpo_epoch1.pt")
    assert run_until_full(lab, bench("train").command, folder, when, err=Path("/dev/full")).status == 1
    assert_goes_on(lab, bench, "train", folder)


# ---------------------------------------------------------------------- read-only, no permission


def test_a_read_only_disk_stops_with_one_message(lab, bench, disk):
    folder = disk("train")
    lab.shell("mount", "-o", "remount,ro", folder / "results")
    assert_refused(lab.run(bench("train").command, folder), "results/digits", "Read-only file system")
    lab.shell("mount", "-o", "remount,rw", folder / "results")
    assert_goes_on(lab, bench, "train", folder)


@pytest.mark.parametrize("name", ["results", pytest.param("results/digits", marks=slow)])
def test_a_folder_without_permission_stops_with_one_message(lab, bench, place, name):
    folder = place("train")
    (folder / name).mkdir(parents=True)
    (folder / name).chmod(0o555)
    done = lab.run(bench("train").command, folder, unprivileged=True)
    assert_refused(done, "results/digits", "Permission denied")
    (folder / name).chmod(0o755)
    assert_goes_on(lab, bench, "train", folder)


def test_a_colleagues_results_folder_that_may_only_be_read_is_read(lab, trained, tmp_path):
    best = trained / RUN / "best.json"
    shutil.copytree(trained / "results/digits/cache", trained / "own/digits/cache")
    whole = [*(trained / "results").rglob("*"), trained / "results"]
    for path in whole:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        for words, said in (
            (("pick", "--no-answer"), "chosen from a pool of 256"),
            (("status",), "finished"),
            (("report", "--output", "page.html"), "report: page.html"),
            (("best-ckpt",), f"warning: the choice is not kept: cannot write {RUN / 'best.json'}: Permission denied"),
            (("export", "exported"), "exported: exported"),
            (("convert", "--output", "here.ckpt"), "→ here.ckpt"),
            (("config", "show", str(RUN)), "mix_sampler"),
            (("infer", "--limit", "4", "--shots", "1", "--ckpt", str(RUN), "--results", "own"), "own/digits/inference"),
        ):
            done = lab.run(list(words), tmp_path, unprivileged=True)
            assert done.status == 0, (words, done.err)
            assert said in done.out
        refused = lab.run(["report"], tmp_path, unprivileged=True)
        assert_refused(refused, "report.html", "--output FILE")
        refused = lab.run(["infer", "--limit", "4"], tmp_path, unprivileged=True)
        assert_refused(refused, "may not be written to", "--results DIR of your own (and --ckpt RUN_DIR")
    finally:
        for path in reversed(whole):
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert not best.exists()


UNREADABLE = ["generated_data/rl_data_*.json", "cache/features_*", "cache/answers_*"]
UNREADABLE += ["**/config.yaml", "**/metrics.jsonl", "**/train.log"]


@pytest.mark.parametrize(
    "pattern",
    ["**/state.pt", *(pytest.param(pattern, marks=slow) for pattern in UNREADABLE)],
)
def test_a_file_that_must_not_be_read_is_named_or_made_again(lab, bench, place, pattern):
    folder = place("train")
    shutil.copytree(bench("train").reference, folder, dirs_exist_ok=True)
    (file,) = (folder / "results/digits").glob(pattern)
    file.chmod(0)
    done = lab.run(bench("train").command, folder, unprivileged=True)
    if done.status:
        assert_refused(done, file.name)
        file.chmod(0o644)
    assert_goes_on(lab, bench, "train", folder)


@slow
def test_an_image_that_must_not_be_read_or_vanishes_is_named(lab, bench, place, tmp_path):
    folder, data = place("rollout"), tmp_path / "data"
    shutil.copytree(lab.folder / "data", data)
    command = [argument.replace(str(lab.folder / "data"), str(data)) for argument in bench("rollout").command]
    image, other = sorted(data.rglob("*.jpg"))[:2]
    image.chmod(0)
    assert_refused(lab.run(command, folder, unprivileged=True), image.name)
    image.chmod(0o644)
    assert_refused(lab.run(command, folder, Fault("stop", 1), meanwhile=other.unlink), other.name)
    shutil.copy2(lab.folder / "data" / other.relative_to(data), other)
    assert lab.run(command, folder).status == 0


# ---------------------------------------------------------------------- failing

FAILING = [
    ("sync", "metrics.jsonl", "EIO", "metrics.jsonl"),
    pytest.param("rename", "grpo_epoch2.pt", "EIO", "grpo_epoch2.pt", marks=slow),
    pytest.param("sync", "/state.pt", "EIO", "state.pt", marks=slow),
    pytest.param("sync", "answers_tiny-qwen2_5-vl.sqlite", "EIO", "answers_tiny-qwen2_5-vl.sqlite", marks=slow),
    pytest.param("write", "vl.sqlite-journal", "EROFS", "answers_tiny-qwen2_5-vl.sqlite", marks=slow),
    pytest.param("open", "train.log", "EROFS", "train.log", marks=slow),
    pytest.param("mkdir", "model_cpk", "EACCES", "model_cpk", marks=slow),
]


@pytest.mark.parametrize(("kind", "file", "error", "named"), FAILING)
def test_a_disk_that_fails_stops_with_one_message(lab, bench, place, kind, file, error, named):
    nth = 0 if kind == "mkdir" else -1  # a folder that is there is no error
    folder, fault = place("train"), bench("train").fault(error, kind, file, nth, sticky=True)
    assert_refused(lab.run(bench("train").command, folder, fault), named)
    assert broken(folder) == []
    assert_goes_on(lab, bench, "train", folder)


# ---------------------------------------------------------------------- vanishing

# what vanishes when the how manieth file of a name is about to be opened
VANISHING = [
    ("model_cpk", "/state.pt", 2),
    pytest.param("cache/answers_*", "answers_tiny-qwen2_5-vl.sqlite-journal", 3, marks=slow),
    pytest.param("model_cpk", "metrics.jsonl", 3, marks=slow),
    pytest.param("model_cpk/*/state.pt", "/grpo_epoch1.pt", 0, marks=slow),
    pytest.param("cache", "/vision_", 0, marks=slow),
    pytest.param("generated_data", "config.yaml", 0, marks=slow),
]


@pytest.mark.parametrize(("pattern", "file", "nth"), VANISHING)
def test_what_vanishes_is_named_or_made_again(lab, bench, place, pattern, file, nth):
    folder, fault = place("train"), bench("train").fault("stop", "open", file, nth)

    def vanish():
        for path in (folder / "results/digits").glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    done = lab.run(bench("train").command, folder, fault, meanwhile=vanish)
    if done.status:
        assert_refused(done, "results/digits")
    assert broken(folder) == []
    again = lab.run(bench("train").command, folder)
    if again.status:  # checkpoints without the state that they belong to
        assert_refused(again, "--overwrite")
        assert lab.run([*bench("train").command, "--overwrite"], folder).status == 0
    assert differences(bench("train").reference, folder) == []


# ---------------------------------------------------------------------- the clock


@pytest.mark.parametrize("clock", ["*:60", pytest.param("20:3600", marks=slow), pytest.param("9:31536000", marks=slow)])
def test_a_clock_that_jumps_back_changes_nothing(lab, bench, place, clock):
    folder = place("train")
    done = lab.run(bench("train").command, folder, Fault(clock=clock))
    assert done.status == 0, done.err
    assert differences(bench("train").reference, folder) == []
    for line in next(folder.rglob("metrics.jsonl")).read_text().splitlines():
        assert 0 < json.loads(line)["epoch_time"] < 60


def test_a_command_killed_and_run_again_in_an_earlier_year_ends_as_if_it_had_not_been(lab, bench, place):
    folder, fault = place("train"), bench("train").fault("kill", "rename", "/state.pt", 2)
    assert lab.run(bench("train").command, folder, fault).status == -9
    done = lab.run(bench("train").command, folder, Fault(clock="0:31536000"))
    assert done.status == 0, done.err
    assert differences(bench("train").reference, folder) == []
