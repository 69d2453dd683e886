"""The answer files of the processes of a job: one command after a kill goes on with them."""

import sqlite3
from pathlib import Path

import pytest
from lvlm_helpers import Counting, opened

from lever_lm.lvlm.answer_cache import AnswerCache
from lever_lm.utils.distributed import Shards
from lever_lm.utils.errors import LeverError


def left_by(path: Path, rank: int, items: dict[str, str]) -> Path:
    """The file of one process of a killed job of 16."""
    cache = AnswerCache(path, Shards(rank, 16))
    cache.put(items)
    cache.close()
    return path.with_name(f"answers.rank{rank}.sqlite")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / "answers.sqlite"


def test_what_a_killed_job_left_is_gone_on_with_by_one_process(file, numbered_prompts):
    prompts = numbered_prompts
    backend = Counting()
    answers = opened(file, backend).generate(prompts)
    with sqlite3.connect(file) as db:
        rows = dict(db.execute("SELECT key, value FROM answers WHERE key NOT LIKE 'speed:%'"))
    db.close()
    file.unlink()
    left_by(file, 0, dict(list(rows.items())[:3]))
    left_by(file, 11, dict(list(rows.items())[3:6]))
    again = Counting()
    lvlm = opened(file, again)
    assert lvlm.generate(prompts) == answers
    assert (lvlm.asked, lvlm.known) == (4, 6)
    assert [path.name for path in file.parent.iterdir()] == ["answers.sqlite"]


def test_of_several_processes_only_the_leader_opens_the_main_file(file):
    left = left_by(file, 1, {"key": "value"})
    assert not file.exists()
    assert left.is_file()


def test_the_file_of_a_job_that_runs_is_left_to_it(file):
    running = AnswerCache(file, Shards(1, 2))
    running.put({"one": "1"})
    ended = left_by(file, 5, {"five": "5"})
    cache = AnswerCache(file)
    cache.collect()
    assert cache.get(["one", "five"]) == {"five": "5"}
    assert not ended.exists()
    running.put({"two": "2"})
    running.close()
    cache.collect()
    assert cache.get(["one", "two"]) == {"one": "1", "two": "2"}
    assert [path.name for path in file.parent.iterdir()] == ["answers.sqlite"]


def test_other_files_beside_the_cache_are_not_touched(file):
    file.parent.mkdir()
    others = [
        file.parent / name for name in ("answers.rank1.sqlite.bak", "answers.rank-1.sqlite", "other.rank1.sqlite")
    ]
    for other in others:
        other.write_text("somebody's")
    AnswerCache(file).collect()
    assert all(other.read_text() == "somebody's" for other in others)


def test_a_process_killed_before_its_first_answer_leaves_nothing(file):
    file.parent.mkdir()
    (file.parent / "answers.rank3.sqlite").touch()
    (file.parent / "answers.rank3.sqlite-journal").touch()
    AnswerCache(file).collect()
    assert [path.name for path in file.parent.iterdir()] == ["answers.sqlite"]


def test_a_broken_file_of_a_process_is_named_and_nothing_is_lost(file):
    left_by(file, 0, {"key": "value"})
    broken = file.parent / "answers.rank1.sqlite"
    broken.write_text("something else entirely, long enough for a header of a hundred bytes" * 3)
    cache = AnswerCache(file)
    with pytest.raises(LeverError, match=r"answers\.rank1\.sqlite.*delete it"):
        cache.collect()
    broken.unlink()
    cache.collect()
    assert cache.get(["key"]) == {"key": "value"}
