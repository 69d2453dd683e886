"""Files appear whole, what killed writers left goes, and one process has a folder to itself."""

import contextlib
import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import RUN, SMALL, clean_environment
from safetensors import safe_open

from lever_lm.utils import locks
from lever_lm.utils.atomic_io import (
    TEMPORARY_PREFIX,
    _host,
    append_line,
    atomic_file,
    sweep,
    write_json,
    write_tensors,
    write_text,
)
from lever_lm.utils.errors import LeverError
from lever_lm.utils.locks import InUse, alone

# ---------------------------------------------------------------------- writing


def test_a_file_appears_whole_with_its_folders_whatever_the_umask(tmp_path):
    path, before = tmp_path / "a" / "b" / "file.txt", os.umask(0o077)
    try:
        write_text(path, "Grüße 阶段\n")
    finally:
        os.umask(before)
    assert path.read_bytes() == "Grüße 阶段\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (KeyboardInterrupt("broken off"), KeyboardInterrupt, "broken off"),
        (OSError(28, "No space left on device"), LeverError, r"file\.txt: No space left on device; .* unchanged"),
    ],
)
def test_a_write_that_breaks_off_changes_nothing_and_leaves_nothing(tmp_path, error, kind, words, existed):
    path = tmp_path / "file.txt"
    if existed:
        path.write_text("before")

    def write():
        with atomic_file(path) as file:
            file.write(b"half")
            file.flush()
            assert path.exists() == existed
            raise error

    with pytest.raises(kind, match=words):
        write()
    assert [p.name for p in tmp_path.iterdir()] == (["file.txt"] if existed else [])
    assert not existed or path.read_text() == "before"


def test_a_place_that_cannot_be_written_is_told_in_plain_words(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(LeverError, match="cannot write"):
        write_text(tmp_path / "file" / "inner.txt", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(LeverError, match="cannot write"):
        write_text(tmp_path / "folder", "x")
    with pytest.raises(LeverError, match=r"cannot write .*absent"):
        append_line(tmp_path / "absent" / "log", "x")


def test_json_keeps_its_letters_and_takes_no_nan(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5, None], "a": "ü"})
    assert "ü" in path.read_text(encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": [1, 2.5, None], "a": "ü"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8"))["a"] == "ü"


def test_lines_are_appended_and_tensors_come_back_with_their_header(tmp_path):
    for line in ("eins", "zwei ü"):
        append_line(tmp_path / "log", line)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "eins\nzwei ü\n"
    write_tensors(tmp_path / "t.safetensors", {"a": torch.arange(3.0)}, {"fingerprint": "f"})
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        assert file.metadata() == {"fingerprint": "f"}
        assert file.get_tensor("a").tolist() == [0.0, 1.0, 2.0]


def test_a_folder_is_on_disk_after_the_rename_and_a_file_before_it(tmp_path, monkeypatch):
    events = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(handle):
        events.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        real_sync(handle)

    def replace(source, target):
        events.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    write_text(tmp_path / "file", "text")
    assert events == ["file", "rename", "folder"]


# ---------------------------------------------------------------------- what killed processes leave


@pytest.fixture
def child():
    """Starts a Python process, which has run its code up to where it printed a line; all end with the test."""
    prefix = "import sys, os, time\nfrom pathlib import Path\n"
    prefix += "from lever_lm.utils.atomic_io import *\nfrom lever_lm.utils.locks import *\npath = Path(sys.argv[1])\n"
    with contextlib.ExitStack() as stack:

        def start(code: str, path: Path) -> subprocess.Popen:
            command = [sys.executable, "-c", prefix + code, str(path)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean_environment())
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout.readline() == "ready\n"
            return process

        yield start


WRITER = """
with atomic_file(path) as file:
    file.write(b"half")
    file.flush()
    print("ready", flush=True)
    time.sleep(60)
"""
HOLDER = """
with alone(path, "the folder", "another"):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_the_temporary_file_of_a_killed_writer_goes_with_the_next_write_and_that_of_a_living_one_stays(tmp_path, child):
    killed, living = child(WRITER, tmp_path / "a"), child(WRITER, tmp_path / "b")
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.glob(f"{TEMPORARY_PREFIX}*"))) == 2
    write_text(tmp_path / "c", "text")
    (left,) = tmp_path.glob(f"{TEMPORARY_PREFIX}*")
    assert f"-{living.pid}-" in left.name


def test_a_write_sweeps_away_no_other_of_its_process_but_those_of_one_of_its_number_and_of_other_hosts_after_a_day(
    tmp_path,
):
    host = _host()
    names = {f"{host}-{os.getpid()}-1-x": False, "node9-1-1-1-old": False, "node9-1-1-1-new": True, "odd": True}
    for name in names:
        (tmp_path / f"{TEMPORARY_PREFIX}{name}").touch()
    os.utime(tmp_path / f"{TEMPORARY_PREFIX}node9-1-1-1-old", (0, 0))
    with atomic_file(tmp_path / "outer") as file:
        file.write(b"outer")
        write_text(tmp_path / "inner", "inner")
        sweep(tmp_path)
    assert (tmp_path / "outer").read_bytes() == b"outer"
    stay = {f"{TEMPORARY_PREFIX}{name}" for name, stays in names.items() if stays}
    assert {path.name for path in tmp_path.iterdir()} == {"inner", "outer", *stay}


def no_locks(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_waits_for_the_end_of_a_write(tmp_path, stop, child):
    process = child(
        """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
with interrupts_wait():
    print("ready", flush=True)
    time.sleep(0.3)
    path.write_text("whole")
time.sleep(60)
""",
        tmp_path / "file",
    )
    process.send_signal(stop)
    assert process.wait(timeout=30) == -stop
    assert (tmp_path / "file").read_text() == "whole"


# ---------------------------------------------------------------------- one process at a time


def test_a_second_process_is_refused_with_pid_and_host_of_the_first(tmp_path, child):
    lock = tmp_path / "run" / ".lock"
    first = child(HOLDER, lock)
    expected = rf"^RUN is in use by process {first.pid} on {socket.gethostname()}.*or LEAVE$"
    with pytest.raises(InUse, match=expected), alone(lock, "RUN", "LEAVE"):
        pytest.fail("two are in")
    first.kill()
    first.wait()


def test_the_lock_of_a_killed_process_is_taken_over_and_said(tmp_path, child):
    lock = tmp_path / ".lock"
    first = child(HOLDER, lock)
    first.kill()
    first.wait()
    assert lock.is_file()
    with alone(lock, "RUN", "LEAVE") as left_by:
        assert (left_by["pid"], left_by["host"]) == (first.pid, socket.gethostname())
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_had_forked_does_not_keep_its_lock(tmp_path, child):
    fork = """    if forked := os.fork():
        (path.parent / "forked").write_text(str(forked))
    else:
        time.sleep(60)
"""
    code = HOLDER.replace("    print(", f"{fork}    print(")
    first = child(code, tmp_path / ".lock")
    first.kill()
    first.wait()
    with alone(tmp_path / ".lock", "RUN", "LEAVE"):
        os.kill(int((tmp_path / "forked").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"pid": [1]}', b"[" * 5000])
def test_a_lock_file_of_whatever_content_that_nobody_holds_is_no_lock_and_who_has_it_is_not_let_in_twice(
    tmp_path, content
):
    lock = tmp_path / ".lock"
    lock.write_bytes(content)
    with alone(lock, "RUN", "LEAVE") as left_by:
        assert left_by is None
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        with pytest.raises(InUse, match=f"process {os.getpid()} on"), alone(lock, "RUN", "LEAVE"):
            pytest.fail("two are in")
    assert not lock.exists()


def test_those_who_wait_come_in_one_after_another(tmp_path, child):
    counter = """
import random
print("ready", flush=True)
for _ in range(20):
    with alone(path / ".lock", "the counter", "none", wait=True):
        count = path / "count"
        before = int(count.read_text()) if count.exists() else 0
        time.sleep(random.random() / 500)
        count.write_text(str(before + 1))
"""
    processes = [child(counter, tmp_path) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("count", "60")]


@pytest.mark.parametrize(
    ("pid", "host", "lets_in"),
    [
        ("own", None, False),
        (1, None, False),  # not ours to signal, perhaps, and there
        (2**22 + 1, None, True),  # beyond the largest pid
        (2**62, None, True),
        (1, "another-host", False),
    ],
)
def test_where_a_disk_has_no_locks_the_pid_decides(tmp_path, monkeypatch, pid, host, lets_in):
    monkeypatch.setattr(locks.fcntl, "lockf", no_locks)
    lock, pid = tmp_path / ".lock", os.getpid() if pid == "own" else pid
    lock.write_text(json.dumps({"pid": pid, "host": host or socket.gethostname()}))
    if lets_in:
        with alone(lock, "RUN", "LEAVE") as left_by:
            assert left_by["pid"] == pid
        assert not lock.exists()
    else:
        refused = pytest.raises(InUse, match=f"process {pid} on {host or socket.gethostname()}")
        with refused, alone(lock, "RUN", "LEAVE"):
            pytest.fail("two are in")
        assert lock.exists()


def test_a_lock_that_cannot_be_made_is_told_in_plain_words(tmp_path):
    (tmp_path / "file").write_text("")
    refused = pytest.raises(LeverError, match=r"^cannot lock .*file/\.lock: ")
    with refused, alone(tmp_path / "file" / ".lock", "RUN", "LEAVE"):
        pytest.fail("a folder that is a file")


# ---------------------------------------------------------------------- the command line


def test_a_second_training_in_a_run_folder_is_refused(tmp_path, lever, child):
    """How a stop ends a command is tried in test_crashes.py, and on a terminal in test_console.py."""
    first = child(HOLDER, tmp_path / RUN / ".lock")
    second = lever("train", *SMALL)
    assert (second.status, second.out) == (1, "")
    expected = f"lever: {RUN} is in use by process {first.pid} on {socket.gethostname()} (lever "
    assert second.err.startswith(expected), second.err
    assert second.err.count("\n") == 1
    assert [path.name for path in (tmp_path / RUN).iterdir()] == [".lock"]


def test_a_command_that_is_refused_at_once_leaves_no_folder(lever, tmp_path):
    assert lever("train", "--rl-data", "nowhere.json", "--embeddings", "nowhere.pt").status == 1
    assert list(tmp_path.iterdir()) == []
