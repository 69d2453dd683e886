"""Digests of contents: read once, and again whenever a file may have changed."""

import hashlib
import json
import os
import time

import pytest

from lever_lm.utils import file_hashes as digests
from lever_lm.utils.atomic_io import file_digest
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
    kept = tmp_path / "cache" / "digests.json"
    kept.parent.mkdir()
    expected, other = [file_digest(file) for file in files], kept_in(kept)
    known = kept_in(kept)
    assert known.of(files) == known.of(map(str, files)) == expected
    assert sorted(reads) == ["a", "b", "c"]
    written = kept.stat().st_mtime_ns
    assert kept_in(kept).of(reversed(files)) == other.of(files)[::-1] == expected[::-1]
    assert len(reads) == 3
    assert kept.stat().st_mtime_ns == written, "nothing new is not written"


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


def test_a_file_that_cannot_be_written_is_done_without_and_no_folder_is_made_for_it_but_in_a_job(tmp_path, files):
    (tmp_path / "cache" / "digests.json").mkdir(parents=True)
    for folder in ("cache", "none"):
        assert kept_in(tmp_path / folder / "digests.json").of(files[:1]) == [file_digest(files[0])]
    assert [path.name for path in (tmp_path / "cache").rglob("*")] == ["digests.json"]
    assert not (tmp_path / "none").exists()
    known = Digests()
    known.keep_in(tmp_path / "job" / "digests.json", make_folder=True)
    known.of(files[:1])
    assert (tmp_path / "job" / "digests.json").is_file()


def test_what_was_read_before_the_folder_was_there_is_written_later(tmp_path, files):
    known = kept_in(tmp_path / "cache" / "digests.json")
    known.of(files[:2])
    (tmp_path / "cache").mkdir()
    known.of(files[:1])
    assert len(json.loads((tmp_path / "cache" / "digests.json").read_text())) == 2


def test_a_digest_is_the_beginning_of_the_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_digest(tmp_path / "abc") == "ba7816bf8f01cfea"  # FIPS 180-2
    (tmp_path / "large").write_bytes(b"x" * 3_000_000)
    assert file_digest(tmp_path / "large") == hashlib.sha256(b"x" * 3_000_000).hexdigest()[:16]


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
    known.keep_in(None, track)
    for _ in range(2):
        assert known.of(files) == list(map(file_digest, files))
    assert seen == [("digests", 2, "files", 1)]
