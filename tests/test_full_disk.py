"""A disk that fills up at any moment: one message, exit 1, nothing half-written, and the same command goes on."""

import resource
import subprocess
import sys

import pytest
from helpers import RUN, SMALL, clean_environment, run_lever

COMMAND = ("train", *SMALL)
# Bytes a file may have: from before the answer cache's first page to before a checkpoint.
LIMITS = (2_000, 20_000, 60_000, 100_000)


def run_limited(limit: int, cwd):
    """The command in a process whose files cannot grow beyond `limit`: writes fail as on a full disk."""
    return subprocess.run(
        [sys.executable, "-m", "lever_lm", *COMMAND],
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


@pytest.mark.parametrize("limit", LIMITS)
def test_a_full_disk_stops_with_one_message_and_leaves_nothing_half_written(warm, limit):
    done = run_limited(limit, warm)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("lever: cannot "), done.stderr
    assert done.stderr.count("\n") == 1
    assert str(RUN.parent.parent.name) in done.stderr  # the file is named
    assert "defect" not in done.stderr
    assert not list(warm.rglob(".tmp-*"))
    assert not any(path.stat().st_size == 0 for path in warm.rglob("*") if path.is_file())


def test_once_there_is_room_the_same_command_finishes(warm):
    assert run_limited(LIMITS[-1], warm).returncode == 1
    done = run_lever(*COMMAND, cwd=warm)
    assert done.status == 0, done.err
    assert (warm / RUN / "grpo_epoch4.pt").is_file()
