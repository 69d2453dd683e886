"""Digests of contents: read once, and again whenever a file may have changed."""

import json
import os
import time

import pytest

from lever_lm.utils import file_hashes as digests
from lever_lm.utils.atomic_io import file_digest
from lever_lm.utils.distributed import Shards
from lever_lm.utils.file_hashes import Digests


@pytest.fixture
def reads(monkeypatch):
    """The files that are read, in order."""
    read = []

    def counted(path):
        read.append(os.path.basename(path))
        return file_digest(path)

    monkeypatch.setattr(digests, "file_digest", counted)
    return read


@pytest.fixture
def later(monkeypatch):
    """Moves the clock on."""
    real = time.time_ns
    ahead = {"ns": 0}
    monkeypatch.setattr(time, "time_ns", lambda: real() + ahead["ns"])

    def move(seconds: float):
        ahead["ns"] += int(seconds * 1e9)

    return move


def test_a_settled_file_is_read_once_and_known_to_the_next_process(tmp_path, reads, later):
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_text(file.name)
    later(10)
    known = Digests()
    (tmp_path / "cache").mkdir()
    known.keep_in(tmp_path / "cache" / "digests.json")
    expected = [file_digest(file) for file in files]
    assert known.of(files) == known.of(map(str, files)) == expected
    assert sorted(reads) == ["a", "b", "c"]
    known.save()
    other = Digests()
    other.keep_in(tmp_path / "cache" / "digests.json")
    assert other.of(reversed(files)) == expected[::-1]
    assert len(reads) == 3


@pytest.mark.parametrize("change", ["content", "content, size and date as they were", "another file in its place"])
def test_a_changed_file_is_read_again(tmp_path, reads, later, change):
    file = tmp_path / "a"
    file.write_text("before")
    later(10)
    known = Digests()
    before = known.of([file])
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    if change == "content":
        file.write_text("afterwards")
    elif change.startswith("another"):
        (tmp_path / "b").write_text("behind")
        os.utime(tmp_path / "b", ns=times)
        os.replace(tmp_path / "b", file)
    else:
        file.write_text("behind")
        os.utime(file, ns=times)
    assert known.of([file]) == [file_digest(file)] != before


def test_a_file_that_was_written_a_moment_ago_is_not_trusted_to_stay(tmp_path, reads, later):
    file = tmp_path / "a"
    file.write_text("1")
    known = Digests()
    known.of([file])
    known.of([file])
    assert len(reads) == 2
    later(10)
    known.of([file])
    known.of([file])
    assert len(reads) == 3


def test_where_the_clock_was_set_back_nothing_is_trusted(tmp_path, reads, later):
    file = tmp_path / "a"
    file.write_text("1")
    later(-3600)
    known = Digests()
    assert known.of([file]) == known.of([file])
    assert len(reads) == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        '{"a": 1}',
        '{"a": [1, 2, 3, "x"]}',
        '{"a": [1, 2, 3, 4]}',
        '{"a": [1, 2, 1e400, "0123456789abcdef"]}',
    ],
)
def test_a_file_of_whatever_content_is_done_without(tmp_path, content):
    (tmp_path / "digests.json").write_text(content)
    file = tmp_path / "a"
    file.write_text("1")
    known = Digests()
    known.keep_in(tmp_path / "digests.json")
    assert known.of([file]) == [file_digest(file)]


def test_a_file_that_cannot_be_written_is_done_without(tmp_path, later):
    (tmp_path / "a").write_text("")
    (tmp_path / "cache" / "digests.json").mkdir(parents=True)
    later(10)
    known = Digests()
    known.keep_in(tmp_path / "cache" / "digests.json")
    assert known.of([tmp_path / "a"]) == [file_digest(tmp_path / "a")]
    known.save()
    assert [path.name for path in (tmp_path / "cache").rglob("*")] == ["digests.json"]


def test_no_folder_is_made_for_the_digests_alone(tmp_path, later):
    (tmp_path / "a").write_text("")
    later(10)
    known = Digests()
    known.keep_in(tmp_path / "cache" / "digests.json")
    known.of([tmp_path / "a"])
    known.save()
    assert not (tmp_path / "cache").exists()


def test_nothing_new_is_not_written(tmp_path, later):
    file, kept = tmp_path / "a", tmp_path / "digests.json"
    file.write_text("1")
    later(10)
    for _ in range(2):
        known = Digests()
        known.keep_in(kept)
        known.of([file])
        known.save()
        written = kept.stat().st_mtime_ns
    assert kept.stat().st_mtime_ns == written
    (entry,) = json.loads(kept.read_text()).values()
    assert entry[3] == file_digest(file)


def test_a_missing_file_is_an_error_and_so_is_a_pipe(tmp_path):
    with pytest.raises(FileNotFoundError):
        Digests().of([tmp_path / "nowhere"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        Digests().of([tmp_path / "pipe"])


def test_what_is_read_is_followed_and_what_is_known_is_counted(tmp_path, later):
    files = [tmp_path / name for name in "abcde"]
    for file in files:
        file.write_text(file.name)
    later(10)
    seen = []

    def track(items, what, total):
        seen.append((what, total, items.unit, items.known))
        return items

    known = Digests()
    known.of(files[:1])
    with known.kept(Shards(), track):
        assert known.of(files[:3]) == list(map(file_digest, files[:3]))
        known.of(files[:3])
    known.of(files)
    assert seen == [("digests", 2, "files", 1)]
