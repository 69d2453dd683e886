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
    return lambda seconds: monkeypatch.setattr(time, "time_ns", lambda: real() + int(seconds * 1e9))


@pytest.fixture
def files(tmp_path, later):
    """Files `a`, `b`, `c`, written 10 seconds ago."""
    made = [tmp_path / name for name in "abc"]
    for file in made:
        file.write_text(f"before {file.name}")
    later(10)
    return made


def kept_in(file) -> Digests:
    known = Digests()
    known.keep_in(file)
    return known


def test_a_settled_file_is_read_once_and_known_to_the_next_process(tmp_path, reads, files):
    (tmp_path / "cache").mkdir()
    known = kept_in(tmp_path / "cache" / "digests.json")
    expected = [file_digest(file) for file in files]
    assert known.of(files) == known.of(map(str, files)) == expected
    assert sorted(reads) == ["a", "b", "c"]
    known.save()
    assert kept_in(tmp_path / "cache" / "digests.json").of(reversed(files)) == expected[::-1]
    assert len(reads) == 3


@pytest.mark.parametrize("change", ["content", "content, size and date as they were", "another file in its place"])
def test_a_changed_file_is_read_again(tmp_path, files, change):
    file, known = files[0], Digests()
    before = known.of([file])
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    if change == "content":
        file.write_text("afterwards")
    elif change.startswith("another"):
        os.utime(files[1], ns=times)
        os.replace(files[1], file)
    else:
        file.write_text("behind a")
        os.utime(file, ns=times)
    assert known.of([file]) == [file_digest(file)] != before


@pytest.mark.parametrize(("seconds", "read"), [(0, 2), (-3600, 2), (10, 1)])
def test_a_file_that_was_written_a_moment_ago_or_in_the_future_is_not_trusted(tmp_path, reads, later, seconds, read):
    (tmp_path / "a").write_text("1")
    later(seconds)
    known = Digests()
    assert known.of([tmp_path / "a"]) == known.of([tmp_path / "a"])
    assert len(reads) == read


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "3", '{"a": 1}', '{"a": [1, 2, 3, "x"]}', '{"a": [1, 2, 3, 4]}'),
        '{"a": [1, 2, 1e400, "0123456789abcdef"]}',
    ],
)
def test_a_file_of_whatever_content_is_done_without(tmp_path, files, content):
    (tmp_path / "digests.json").write_text(content)
    assert kept_in(tmp_path / "digests.json").of(files[:1]) == [file_digest(files[0])]


def test_a_file_that_cannot_be_written_is_done_without_and_no_folder_is_made_for_it(tmp_path, files):
    (tmp_path / "cache" / "digests.json").mkdir(parents=True)
    for folder in ("cache", "none"):
        known = kept_in(tmp_path / folder / "digests.json")
        assert known.of(files[:1]) == [file_digest(files[0])]
        known.save()
    assert [path.name for path in (tmp_path / "cache").rglob("*")] == ["digests.json"]
    assert not (tmp_path / "none").exists()


def test_nothing_new_is_not_written(tmp_path, files):
    kept, written = tmp_path / "digests.json", []
    for _ in range(2):
        known = kept_in(kept)
        known.of(files[:1])
        known.save()
        written.append(kept.stat().st_mtime_ns)
    assert written[0] == written[1]
    (entry,) = json.loads(kept.read_text()).values()
    assert entry[3] == file_digest(files[0])


def test_a_missing_file_is_an_error_and_so_is_a_pipe(tmp_path):
    with pytest.raises(FileNotFoundError):
        Digests().of([tmp_path / "nowhere"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        Digests().of([tmp_path / "pipe"])


def test_what_is_read_is_followed_and_what_is_known_is_counted(tmp_path, files):
    seen = []

    def track(items, what, total):
        seen.append((what, total, items.unit, items.known))
        return items

    known = Digests()
    known.of(files[:1])
    with known.kept(Shards(), track):
        assert known.of(files) == list(map(file_digest, files))
        known.of(files)
    known.of([*files, __file__])
    assert seen == [("digests", 2, "files", 1)]
