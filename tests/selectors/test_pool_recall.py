"""The recall of pools: by hand, for both sizes, and blank where nothing can be right."""

from dataclasses import replace

import pytest

from lever_lm.data import Example
from lever_lm.selectors.pool_recall import LOOKED_AT, pool_recall, pool_recalls, recall_in_words
from lever_lm.tasks import TASKS

TASK = TASKS["vqa"]


def example(number, *answers):
    return Example(number, number, "What?", answers, answers, f"{number}.jpg")


def test_recall_is_the_share_of_queries_with_a_right_answer_in_their_pool():
    train = [example(0, "cat"), example(1, "dog"), example(2, "Two dogs."), example(3)]
    queries = [
        example(10, "dog", "hound"),
        example(11, "cat", "kitten"),
        example(12, "2 dogs", "2 dogs"),
        example(13, "bird"),
    ]
    assert pool_recall(TASK, queries, train, [[0, 1], [1, 2, 3], [2], [0, 1, 2, 3]]) == 0.5
    assert pool_recall(TASK, queries, train, [[0, 1], [0], [2], [3]]) == 0.75


def sized(config, rollout, infer):
    return replace(
        config, rollout=replace(config.rollout, pool_size=rollout), infer=replace(config.infer, pool_size=infer)
    )


def test_both_sizes_are_told_each_once_over_the_queries_that_have_references(digits_config, digits, digits_features):
    queries, train = list(digits.val_examples), digits.train_examples
    embeddings = (digits_features.val, digits_features.train)
    every = pool_recalls(sized(digits_config, 2, 32), queries, train, TASK, embeddings)
    assert list(every) == [2, 32]
    assert 0 < every[2] < every[32] < 1
    alike = pool_recalls(sized(digits_config, 2, 2), queries, train, TASK, embeddings)
    assert alike == {2: every[2]}
    blank = [replace(query, answers=(" ",) if i % 2 else ()) for i, query in enumerate(queries)]
    assert pool_recalls(digits_config, blank, train, TASK, embeddings) == {}
    some = [query if i < 50 else blank[i] for i, query in enumerate(queries)]
    fewer = (digits_features.val.take(slice(50)), digits_features.train)
    config = sized(digits_config, 2, 32)
    assert pool_recalls(config, some, train, TASK, embeddings) == pool_recalls(config, queries[:50], train, TASK, fewer)


def test_of_many_queries_some_are_looked_at_evenly_spaced(digits_config, digits, digits_features, monkeypatch):
    assert LOOKED_AT == 1000
    monkeypatch.setattr("lever_lm.selectors.pool_recall.LOOKED_AT", 50)
    embeddings = (digits_features.val, digits_features.train)
    config = sized(digits_config, 2, 32)
    found = pool_recalls(config, digits.val_examples, digits.train_examples, TASK, embeddings)
    rows = [int(i * 499 / 49) for i in range(50)]
    asked, chosen = [digits.val_examples[row] for row in rows], (digits_features.val.take(rows), digits_features.train)
    assert found == pool_recalls(config, asked, digits.train_examples, TASK, chosen)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((64, 256), "64.0% of those of 64 (rollout.pool_size), in 99.0% of those of 256 (infer.pool_size)"),
        ((64, 64), "64.0% of those of 64 (rollout.pool_size, infer.pool_size)"),
        (
            (64, 0),
            "64.0% of those of 64 (rollout.pool_size), in 100.0% of those of the nearest 1,024 (infer.pool_size)",
        ),
    ],
)
def test_the_phrase_names_the_option_of_each_size(digits_config, sizes, said):
    found = recall_in_words(sized(digits_config, *sizes), {64: 0.64, 256: 0.99, 0: 1.0})
    assert found == f"a right answer is in {said}"
