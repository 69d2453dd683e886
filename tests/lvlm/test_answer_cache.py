"""The answer cache: what was asked once is never asked again, and what a killed job left is gone on with.

The backend here is a stand-in that counts: it is the thing outside the cache. The cache and its file are real.
"""

import contextlib
import dataclasses
import sqlite3
import threading
from types import SimpleNamespace

import pytest
from helpers import track
from lvlm_helpers import Counting, Stopped, no_model, opened

from lever_lm.lvlm import CachedLvlm, Prompt
from lever_lm.lvlm import answer_cache as cache
from lever_lm.lvlm.answer_cache import AnswerCache
from lever_lm.utils.distributed import Shards
from lever_lm.utils.errors import LeverError


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / "answers.sqlite"


@pytest.fixture
def prompts(numbered_prompts):
    return numbered_prompts


def with_query(prompt: Prompt, **changes) -> Prompt:
    return dataclasses.replace(prompt, query=dataclasses.replace(prompt.query, **changes))


def with_icd(prompt: Prompt, **changes) -> Prompt:
    return dataclasses.replace(prompt, icds=(dataclasses.replace(prompt.icds[0], **changes), *prompt.icds[1:]))


# ---------------------------------------------------------------------- once is enough


def test_what_was_asked_is_not_asked_again(file, prompts):
    backend = Counting()
    lvlm = opened(file, backend)
    first = lvlm.generate(prompts[:6])
    assert lvlm.asked == 6
    assert lvlm.known == 0
    assert lvlm.generate(prompts) == [*first, *(f"q{i} a, and more" for i in range(6, 10))]
    assert lvlm.asked == 10
    assert lvlm.known == 6
    assert sorted(backend.asked) == [f"q{i}" for i in range(10)]
    later = opened(file)  # a later process loads no model
    assert later.generate(prompts[::-1]) == lvlm.generate(prompts)[::-1]
    assert (later.asked, later.known) == (0, 10)


def test_the_same_prompt_twice_in_a_list_is_asked_once(file, prompts):
    backend = Counting()
    lvlm = opened(file, backend)
    answers = lvlm.generate([prompts[0], prompts[1], prompts[0], prompts[0]])
    assert backend.asked == ["q0", "q1"]
    assert answers == ["q0 a, and more", "q1 a, and more", "q0 a, and more", "q0 a, and more"]
    assert lvlm.asked == 2


def test_where_an_answer_is_cut_is_no_reason_to_ask_again(file, prompts):
    named = [with_query(prompts[0], question="Shorts")]
    assert opened(file, Counting()).answer(named) == ["Shorts a"]
    known = CachedLvlm(no_model, "model-1", AnswerCache(file), track, cut="classic")
    assert known.answer(named) == [""]


def test_the_batches_of_log_probs_know_the_answers(file, prompts):
    class Knowing(Counting):
        def batches(self, prompts, answers=None):
            seen.append(answers)
            return super().batches(prompts)

    seen = []
    lvlm = opened(file, Knowing())
    lvlm.generate(prompts[:2])
    lvlm.answer_log_prob(prompts[:2], ["yes", "no"])
    lvlm.answer_log_prob(prompts[:3], ["yes", "never", "no"])
    assert seen == [None, ["yes", "no"], ["never", "no"]]


# ---------------------------------------------------------------------- what makes a prompt another one


@pytest.mark.parametrize(
    "change",
    [
        lambda p: with_query(p, question="another"),
        lambda p: with_icd(p, question="another"),
        lambda p: with_icd(p, answers=("no",)),
        lambda p: with_query(p, image=p.icds[0].image),
        lambda p: with_icd(p, image=p.query.image),
        lambda p: dataclasses.replace(p, icds=()),
        lambda p: dataclasses.replace(p, icds=p.icds * 2),
        lambda p: dataclasses.replace(p, icds=p.icds[::-1]),
        lambda p: with_icd(p, image=None),
        lambda p: dataclasses.replace(p, bare=True),
    ],
    ids=["question", "icd question", "icd answer", "image", "icd image", "no icd", "twice", "order", "blind", "bare"],
)
def test_a_changed_prompt_is_asked_anew(file, prompts, change):
    prompt = dataclasses.replace(prompts[0], icds=(prompts[0].icds[0], prompts[1].icds[0]))
    opened(file, Counting()).generate([*prompts, prompt])
    backend = Counting()
    opened(file, backend).generate([change(prompt)])
    assert len(backend.asked) == 1


def test_what_earlier_versions_asked_is_still_known(file, prompts):
    """The keys are those that 0.1 wrote."""
    lvlm = opened(file, Counting())
    lvlm.generate(prompts[:1])
    lvlm.answer_log_prob(prompts[:1], ["yes"], end=True)
    keys = [
        "70c65b276c2d790143ee7f5e6ec0a4ea051614ba69acbff78c3203f48d57417b",
        "02830793bc3d9732a0b606c9cade695fb7a50d11a21b1aa395c7f40ee06350b2",
    ]
    assert set(lvlm.cache.get(keys)) == set(keys)


def test_an_image_of_other_content_under_the_same_path_is_asked_anew(file, prompts, tmp_path):
    opened(file, Counting()).generate(prompts)
    (tmp_path / "icd3.jpg").write_bytes(b"repainted")
    backend = Counting()
    opened(file, backend).generate(prompts)
    assert backend.asked == ["q3"]


def test_the_same_content_under_another_path_is_known(file, prompts, tmp_path):
    answers = opened(file, Counting()).generate(prompts[:1])
    (tmp_path / "moved.jpg").write_bytes((tmp_path / "query0.jpg").read_bytes())
    assert opened(file).generate([with_query(prompts[0], image=str(tmp_path / "moved.jpg"))]) == answers


def test_another_model_or_setting_is_asked_anew(file, prompts):
    opened(file, Counting(), "model-1").generate(prompts)
    backend = Counting()
    opened(file, backend, "model-2").generate(prompts)
    assert len(backend.asked) == 10
    opened(file, None, "model-1").generate(prompts)  # and the old answers are still there


def test_the_references_of_a_query_are_no_part_of_its_prompt(file, prompts):
    answers = opened(file, Counting()).generate(prompts[:1])
    assert opened(file).generate([with_query(prompts[0], answers=("other",), raw_answers=("other",))]) == answers


def test_a_missing_image_is_named(file, prompts):
    with pytest.raises(LeverError, match=r"gone\.jpg"):
        opened(file, Counting()).generate([with_query(prompts[0], image="gone.jpg")])


# ---------------------------------------------------------------------- log-probs


def test_log_probs_are_kept_apart_from_answers_and_from_each_other(file, prompts):
    backend = Counting()
    lvlm = opened(file, backend)
    lvlm.generate(prompts[:2])
    assert lvlm.answer_log_prob(prompts[:2], ["yes", "never"]) == [-3.123456, -5.123456]
    assert lvlm.answer_log_prob(prompts[:1], ["never"]) == [-5.123456]
    assert backend.asked == ["q0", "q1", "q0", "q1", "q0"]
    assert lvlm.answer_log_prob(prompts[:1], ["yes"], end=True) == [-4.123456]
    later = opened(file)
    assert later.answer_log_prob([prompts[0]] * 2, ["never", "yes"]) == [-5.123456, -3.123456]
    assert later.answer_log_prob(prompts[:1], ["yes"], end=True) == [-4.123456]
    assert later.generate(prompts[:1]) == ["q0 a, and more"]


def test_every_log_prob_needs_its_answer(file, prompts):
    with pytest.raises(ValueError):
        opened(file, Counting()).answer_log_prob(prompts[:2], ["yes"])


# ---------------------------------------------------------------------- killed and gone on with


def test_batches_are_kept_whole_and_a_rerun_asks_the_rest_in_the_same_batches(file, prompts, tmp_path):
    whole = Counting(batch_size=2)
    expected = opened(tmp_path / "unbroken.sqlite", whole).generate(prompts)
    dying = Counting(batch_size=2, dies_at=3)
    broken_off = opened(file, dying)
    with pytest.raises(Stopped):
        broken_off.generate(prompts)
    assert broken_off.asked == 4
    rest = Counting(batch_size=2)
    gone_on = opened(file, rest)
    assert gone_on.generate(prompts) == expected
    assert gone_on.known == 4
    assert dying.work + rest.work == whole.work


def test_answers_are_stored_while_the_next_are_asked_and_no_more_than_one_batch_waits(file, prompts):
    class Asked(Counting):
        def generate(self, prompts):
            begun.release()
            return super().generate(prompts)

    begun, stored, lvlm = threading.Semaphore(0), [], opened(file, Asked(batch_size=2))
    put = lvlm.cache.put

    def waiting(items):
        for _ in range(2 if not stored else len(stored) < 4):  # of these themselves, and the ones after
            assert begun.acquire(timeout=60)
        put(items)
        stored.append(begun.acquire(blocking=False))

    lvlm.cache.put = waiting
    assert len(lvlm.generate(prompts[:10])) == 10
    assert len(stored) == 6, "five batches and the speed"
    assert not any(stored[:5]), "the third is not asked before the first is stored"


def test_no_more_is_asked_once_an_answer_cannot_be_stored(file, prompts):
    class Ending(Counting):
        ended = False

        def ask(self, *work, **options):
            try:
                yield from super().ask(*work, **options)
            finally:
                self.ended = True

    backend = Ending(batch_size=2)
    lvlm = opened(file, backend)
    lvlm.cache.put = lambda items: 1 / 0
    with pytest.raises(ZeroDivisionError):
        lvlm.generate(prompts)
    assert backend.ended, "while the error, and what it holds, is still there"
    assert len(backend.work) <= 2


def test_what_came_back_before_a_batch_broke_off_is_kept(file, prompts):
    class Dropping(Counting):
        """Answers the first of a batch last, and not at all."""

        def ask(self, prompts, batches, answers=None, *, end=False):
            for batch, found in super().ask(prompts, batches, answers, end=end):
                yield batch[1:], found[1:]
                raise LeverError("no line")

    broken_off = opened(file, Dropping())
    with pytest.raises(LeverError, match="no line"):
        broken_off.generate(prompts[:3])
    with pytest.raises(LeverError, match="no line"):
        broken_off.answer_log_prob(prompts[:3], ["yes"] * 3)
    assert broken_off.asked == 4
    rest = Counting()
    gone_on = opened(file, rest)
    assert gone_on.generate(prompts[:3]) == [f"q{i} a, and more" for i in range(3)]
    assert gone_on.answer_log_prob(prompts[:3], ["yes"] * 3) == [-3.123456] * 3
    assert rest.asked == ["q0", "q0"]


def test_progress_counts_the_prompts_that_are_left(file, prompts):
    opened(file, Counting()).generate(prompts[:2])
    seen = []

    def track(items, what, total):
        sizes = []
        for item in items:
            sizes.append(items.size(item))
            yield item
        if total > 1:  # not the loading of the model
            seen.append((what, total, items.known, sizes))

    opened(file, Counting(batch_size=4), track=track).generate(prompts, "rollouts")
    left = len(prompts) - 2
    assert seen == [(f"rollouts: {left} prompts to ask, 2 known", left, 2, [4, left - 4])]


# ---------------------------------------------------------------------- the file


def test_more_prompts_than_one_query_of_sqlite_takes(file, prompts):
    many = [with_query(prompts[0], question=f"number {i:05}") for i in range(1234)]
    answers = opened(file, Counting(batch_size=100)).generate(many)
    assert opened(file).generate(many) == answers
    assert answers[777] == "number 00777 a, and more"


def of_another_kind(file) -> None:
    with contextlib.closing(sqlite3.connect(file)) as other:
        other.execute("CREATE TABLE answers (id INTEGER)")
        other.commit()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_text("something else entirely, long enough for a header of a hundred bytes" * 3),
        lambda file: file.write_bytes(file.read_bytes()[:4096] + b"\xff" * 40_000),
        lambda file: file.unlink() or of_another_kind(file),
        lambda file: file.unlink() or file.mkdir(),
    ],
    ids=["no database", "damaged", "of another kind", "a folder"],
)
def test_a_file_that_cannot_be_used_is_named(file, prompts, spoil):
    many = [with_query(prompts[0], question=f"number {i:05}") for i in range(400)]
    opened(file, Counting(batch_size=100)).generate(many)
    spoil(file)
    with pytest.raises(LeverError, match=r"answers\.sqlite.*delete it"):
        opened(file, Counting()).generate(many)
    assert file.exists()


def test_answers_outlast_a_power_failure_by_the_setting_that_is_named(tmp_path):
    with contextlib.closing(cache._open(tmp_path / "answers.sqlite")) as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (3,)  # EXTRA


class Pair(Shards):
    """Two processes of which this one does all."""

    def wait(self):
        pass

    def from_leader(self, make):
        return make()

    def share(self, items):
        return items


def test_a_speed_is_kept_for_one_process_and_told_for_as_many_as_there_are(tmp_path, numbered_prompts, monkeypatch):
    path, clock = tmp_path / "answers.sqlite", iter([0.0, 5.0])
    monkeypatch.setattr("lever_lm.lvlm.cached.time", SimpleNamespace(monotonic=lambda: next(clock)))
    job = CachedLvlm(lambda prompts: Counting(), "model-1", AnswerCache(path, Pair(world=2)), track)
    job.generate(numbered_prompts)  # 10 prompts in 5 seconds
    assert job.speed == pytest.approx(2.0)
    assert opened(path).speed == pytest.approx(1.0)
