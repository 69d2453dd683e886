"""Pools: never the query or its image, the right shares, and the same whatever is asked around them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lever_lm.config.schema import SamplerConfig
from lever_lm.data import Example, StoredImage
from lever_lm.data.embeddings import Embeddings
from lever_lm.data.pools import (
    SAMPLERS,
    Candidates,
    candidate_counts,
    nearest,
    query_rng,
    sample_pools,
    similarity_rows,
)
from lever_lm.utils.errors import LeverError, UsageError

TRAIN = 60


def example(question_id, image_id, content=None):
    """A question about an image whose content is what `content` says, of its own where that says nothing."""
    image = StoredImage(f"content of {image_id}" if content is None else content, 0, None)
    return Example(question_id, image_id, f"q{question_id}?", ("a",), ("a",), image)


def examples(count, per_image=3):
    """Every `per_image` consecutive questions are about the same image."""
    return [example(i, i // per_image) for i in range(count)]


def embeddings(count, seed=0, dim=8):
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(count, dim, generator=generator), dim=-1) for _ in range(2))
    return Embeddings(image, text)


@pytest.fixture(scope="module")
def train():
    return examples(TRAIN), embeddings(TRAIN)


def pools(name, train, rows=None, *, size=16, seed=0):
    rows = list(range(TRAIN)) if rows is None else rows
    items, features = train
    part = Embeddings(features.image[rows], features.text[rows])
    return sample_pools(SamplerConfig(name), [items[r] for r in rows], items, (part, features), size=size, seed=seed)


def ranked(scores, rows):
    return sorted(rows, key=lambda row: -float(scores[row]))


# ---------------------------------------------------------------------- what every sampler keeps to


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_pool_holds_its_query_or_an_example_on_its_image(name, train):
    items, _ = train
    for query, pool in zip(items, pools(name, train), strict=True):
        assert len(pool) == len(set(pool)) == 16
        assert query.question_id not in [items[row].question_id for row in pool]
        assert query.image_id not in [items[row].image_id for row in pool]
        assert all(type(row) is int for row in pool)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_pool_does_not_depend_on_the_other_queries_or_their_order(name, train):
    every = pools(name, train)
    rows = [41, 3, 17]
    assert pools(name, train, rows) == [every[row] for row in rows]
    assert pools(name, train, rows[::-1]) == [every[row] for row in rows[::-1]]
    assert pools(name, train, [17]) == [every[17]]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_seed_decides_the_pool(name, train):
    assert pools(name, train, seed=1) == pools(name, train, seed=1)
    assert pools(name, train, seed=1) != pools(name, train, seed=2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_pool_is_smaller_only_where_fewer_examples_are_allowed(name, train):
    items, _ = train
    for query, pool in zip(items[:4], pools(name, train, [0, 1, 2, 3], size=64), strict=True):
        rows = [row for row, item in enumerate(items) if item.image_id != query.image_id]
        assert sorted(pool) == rows
        assert len(pool) == TRAIN - 3


def test_queries_of_another_split_may_have_any_training_example_but_their_image():
    items, features = examples(12), embeddings(12)
    query = example(999, 2)  # its image is that of rows 6–8
    (pool,) = sample_pools(SamplerConfig(), [query], items, None, size=64, seed=0)
    assert sorted(pool) == [0, 1, 2, 3, 4, 5, 9, 10, 11]
    assert len(features.image) == 12


def test_pools_that_take_long_are_followed_and_come_out_the_same(train):
    items, features = train
    seen = []

    def follow(work, what, total):
        seen.append((what, total, work.unit, work.after > 0, 0))
        for number, item in enumerate(work, 1):
            yield item
            seen[-1] = (*seen[-1][:-1], number)

    followed = sample_pools(
        SamplerConfig("mix_sampler"), items, items, (features, features), size=16, seed=0, track=follow
    )
    assert followed == pools("mix_sampler", train)
    assert seen == [(f"pools: {TRAIN} queries", TRAIN, "queries", True, TRAIN)]


def test_allowed_is_neither_the_question_nor_its_image():
    candidates = Candidates([example(5, 1), example(6, 1), example(7, 2), example(8, 3)])
    assert candidates.allowed(example(7, 1)).tolist() == [3]
    assert candidates.allowed(example(9, 9)).tolist() == [0, 1, 2, 3]


def test_equal_content_is_one_image_whatever_its_ids_say_and_so_is_an_equal_id():
    contents = [(1, "a"), (2, "a"), (2, "b"), (3, "b"), (4, "c"), (5, "d")]
    candidates = Candidates([example(10 + row, *image) for row, image in enumerate(contents)])
    assert candidates.allowed(example(99, 77, "c")).tolist() == [0, 1, 2, 3, 5], "the content alone"
    assert candidates.allowed(example(99, 4, "z")).tolist() == [0, 1, 2, 3, 5], "the id alone"
    assert candidates.allowed(example(99, 4, "d")).tolist() == [0, 1, 2, 3], "either"
    assert candidates.allowed(example(99, 77, "a")).tolist() == [4, 5], "by way of a second name of the image"
    assert candidates.allowed(example(14, 88, "z")).tolist() == [0, 1, 2, 3, 5], "the question itself"


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_pool_shows_the_querys_photograph_where_each_question_numbers_its_own(name, train):
    """As in a folder that numbers images by questions: three questions on each photograph, each under another id."""
    items, features = [example(i, 1000 + i, f"photograph {i // 3}") for i in range(TRAIN)], train[1]
    found = sample_pools(SamplerConfig(name), items, items, (features, features), size=16, seed=0)
    assert all(len(pool) == 16 for pool in found)
    assert not [q for q, pool in zip(items, found, strict=True) if q.image in [items[row].image for row in pool]]


# ---------------------------------------------------------------------- which examples


@pytest.mark.parametrize(("name", "part"), [("text_sim_sampler", "text"), ("img_sim_sampler", "image")])
def test_similarity_samplers_take_the_nearest(name, part, train):
    items, features = train
    matrix = getattr(features, part)
    for query, pool in zip(items, pools(name, train), strict=True):
        scores = matrix @ matrix[query.question_id]
        rows = [row for row, item in enumerate(items) if item.image_id != query.image_id]
        assert set(pool) == set(ranked(scores, rows)[:16])


def test_the_mixture_is_a_quarter_text_a_quarter_image_and_the_rest_at_random(train):
    items, features = train
    for query, pool in zip(items, pools("mix_sampler", train), strict=True):
        rows = [row for row, item in enumerate(items) if item.image_id != query.image_id]
        by_text = ranked(features.text @ features.text[query.question_id], rows)[:4]
        rest = [row for row in rows if row not in by_text]
        by_image = ranked(features.image @ features.image[query.question_id], rest)[:4]
        assert {*by_text, *by_image} <= set(pool)


@pytest.mark.parametrize(
    ("size", "shares"),
    [
        (1, [1, 0, 0]),
        (2, [1, 1, 0]),
        (3, [1, 1, 1]),
        (4, [2, 1, 1]),
        (5, [3, 1, 1]),
        (6, [3, 2, 1]),
        (7, [3, 2, 2]),
        (64, [32, 16, 16]),
    ],
)
def test_the_mixture_of_a_small_pool_has_of_each_source_as_far_as_they_go(train, size, shares):
    assert candidate_counts("mix_sampler", size) == shares
    items, features = train
    for query, pool in zip(items, pools("mix_sampler", train, size=size), strict=True):
        rows = [row for row, item in enumerate(items) if item.image_id != query.image_id]
        by_text = ranked(features.text @ features.text[query.question_id], rows)[: shares[1]]
        rest = [row for row in rows if row not in by_text]
        by_image = ranked(features.image @ features.image[query.question_id], rest)[: shares[2]]
        assert len(pool) == min(size, len(rows))
        assert {*by_text, *by_image} <= set(pool)


@pytest.mark.parametrize(("name", "shares"), [("rand", [7, 0, 0]), ("text_sim", [0, 7, 0]), ("img_sim", [0, 0, 7])])
def test_a_sampler_of_one_source_takes_all_from_it(name, shares):
    assert candidate_counts(f"{name}_sampler", 7) == shares


def test_the_random_part_is_drawn_evenly():
    items = examples(20, per_image=1)
    counts = np.zeros(20)
    for seed in range(400):
        counts[sample_pools(SamplerConfig(), items[:1], items, None, size=5, seed=seed)[0]] += 1
    # 400 pools of 5 from 19: 105 each on average, spread √(400 · 5/19 · 14/19) = 8.8.
    assert counts[0] == 0
    assert (abs(counts[1:] - 400 * 5 / 19) < 5 * 8.8).all()


def test_ties_are_broken_by_the_querys_seed():
    items = examples(41, per_image=1)
    same = Embeddings(F.normalize(torch.ones(41, 4), dim=-1), F.normalize(torch.ones(41, 4), dim=-1))
    first, second = (
        sample_pools(SamplerConfig("text_sim_sampler"), items, items, (same, same), size=8, seed=seed)
        for seed in (0, 1)
    )
    assert set(first[0]) != set(second[0])
    assert set(first[0]) != set(first[1])  # and not the same for every query
    taken = np.bincount([row for pool in first for row in pool], minlength=41)
    assert taken.max() < 30  # nobody is in everybody's pool


def test_nearest_is_best_first():
    scores = np.array([0.1, 0.9, 0.5, 0.7, 0.3], dtype=np.float32)
    rows = np.array([0, 1, 2, 4])
    assert nearest(scores, rows, 3, np.random.default_rng(0)) == [1, 2, 4]
    assert nearest(scores, rows, 9, np.random.default_rng(0)) == [1, 2, 4, 0]
    assert nearest(scores, rows, 2, np.random.default_rng(0), exclude=[1]) == [2, 4]


def test_nearest_agrees_with_sorting_on_many_rows():
    scores = np.random.default_rng(0).permutation(500).astype(np.float32) / 500
    found = nearest(scores, np.arange(500), 50, np.random.default_rng(1))
    assert found == np.argsort(-scores)[:50].tolist()


def test_similarities_sum_the_parts_that_are_named():
    queries, candidates = embeddings(3, seed=1), embeddings(5, seed=2)
    image, text = queries.image @ candidates.image.T, queries.text @ candidates.text.T
    np.testing.assert_allclose(np.stack([*similarity_rows(queries, candidates, frozenset({"img"}))]), image, atol=1e-6)
    np.testing.assert_allclose(np.stack([*similarity_rows(queries, candidates, frozenset({"text"}))]), text, atol=1e-6)
    np.testing.assert_allclose(
        np.stack([*similarity_rows(queries, candidates, frozenset({"img", "text"}))]), image + text, atol=1e-6
    )


def test_a_querys_generator_is_its_own():
    one, other = Example(1, 1, "", (), (), ""), Example(2, 1, "", (), (), "")
    assert query_rng(0, one).random() == query_rng(0, one).random()
    assert len({query_rng(0, one).random(), query_rng(0, other).random(), query_rng(1, one).random()}) == 3


# ---------------------------------------------------------------------- refusals


def test_an_unknown_sampler_is_refused_with_the_known_ones():
    items = examples(4)
    with pytest.raises(UsageError, match=r"unknown sampler 'best': one of rand_sampler, .*\(--sampler\)"):
        sample_pools(SamplerConfig("best"), items, items, None, size=2, seed=0)


def test_a_query_that_nothing_may_stand_before_is_refused_by_id():
    items = examples(3)
    with pytest.raises(LeverError, match="question 0: no training example is left to show before it"):
        sample_pools(SamplerConfig(), items[:1], items, None, size=2, seed=0)


def test_a_similarity_sampler_without_embeddings_is_refused():
    items = examples(9)
    with pytest.raises(ValueError, match="img_sim_sampler needs embeddings"):
        sample_pools(SamplerConfig("img_sim_sampler"), items, items, None, size=2, seed=0)
