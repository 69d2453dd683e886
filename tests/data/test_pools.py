"""Pools: never the query or its image, the right shares, and the same whatever is asked around them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lever_lm.config.schema import SamplerConfig
from lever_lm.data import Example, StoredImage
from lever_lm.data.embeddings import Embeddings
from lever_lm.data.pools import NEAREST, SAMPLERS, Candidates, nearest, pool_bound, sample_pools, similarity_rows
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


def pools(name, train, rows=None, *, size=16, seed=0, **options):
    rows = list(range(len(train[0]))) if rows is None else rows
    items, features = train
    queries = [items[row] for row in rows]
    return sample_pools(
        SamplerConfig(name), queries, items, (features.take(rows), features), size=size, seed=seed, **options
    )


def others(items, query):
    """Rows of the examples about another image, in order."""
    return [row for row, item in enumerate(items) if item.image_id != query.image_id]


def ranked(scores, rows):
    return sorted(rows, key=lambda row: -float(scores[row]))


# ---------------------------------------------------------------------- what every sampler keeps to


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_pool_holds_its_query_or_an_example_on_its_image(name, train):
    for query, pool in zip(train[0], pools(name, train), strict=True):
        assert len(pool) == len(set(pool)) == 16
        assert set(pool) <= set(others(train[0], query))
        assert all(type(row) is int for row in pool)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_pool_depends_on_its_query_and_the_seed_alone(name, train):
    every = pools(name, train, seed=1)
    assert every != pools(name, train, seed=2)
    for rows in ([41, 3, 17], [17, 3, 41], [17]):
        assert pools(name, train, rows, seed=1) == [every[row] for row in rows]


@pytest.mark.parametrize("name", SAMPLERS)
def test_similarities_come_in_chunks_of_queries(name, train, monkeypatch):
    every = pools(name, train)
    monkeypatch.setattr("lever_lm.data.pools._CHUNK", 7)
    assert pools(name, train) == every


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_pool_is_smaller_only_where_fewer_examples_are_allowed(name, train):
    for query, pool in zip(train[0], pools(name, train, size=64), strict=True):
        assert sorted(pool) == others(train[0], query)
        assert len(pool) == TRAIN - 3


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
    items = [example(i, 1000 + i, f"photograph {i // 3}") for i in range(TRAIN)]
    found = pools(name, (items, train[1]))
    assert all(len(pool) == 16 for pool in found)
    assert not [q for q, pool in zip(items, found, strict=True) if q.image in [items[row].image for row in pool]]


# ---------------------------------------------------------------------- which examples


@pytest.mark.parametrize(("name", "part"), [("text_sim_sampler", "text"), ("img_sim_sampler", "image")])
def test_similarity_samplers_take_the_nearest(name, part, train):
    matrix = getattr(train[1], part)
    for query, pool in zip(train[0], pools(name, train), strict=True):
        assert set(pool) == set(ranked(matrix @ matrix[query.question_id], others(train[0], query))[:16])


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_whole_split_is_the_nearest_by_image_and_text_up_to_a_bound_whatever_the_sampler(name, train, monkeypatch):
    items, features = train
    assert pool_bound(0) == NEAREST == 1024
    for query, pool in zip(items, pools(name, train, size=0), strict=True):
        assert sorted(pool) == others(items, query), "all of them where there are fewer"
    monkeypatch.setattr("lever_lm.data.pools.NEAREST", 7)
    similar = features.image @ features.image.T + features.text @ features.text.T
    for query, pool in zip(items, pools(name, train, size=0), strict=True):
        assert set(pool) == set(ranked(similar[query.question_id], others(items, query))[:7])


def test_random_pools_need_no_features_and_by_ids_no_image(train):
    items, drawn = train[0], pools("rand_sampler", train)
    assert sample_pools(SamplerConfig("rand_sampler"), items, items, None, size=16, seed=0) == drawn
    gone = [replace(item, image="/gone.jpg") for item in items]
    candidates = Candidates(gone, by_content=False)
    assert (
        sample_pools(SamplerConfig("rand_sampler"), gone, gone, None, size=16, seed=0, candidates=candidates) == drawn
    )
    with pytest.raises(LeverError, match=r"/gone\.jpg"):
        Candidates(gone)


@pytest.mark.parametrize(
    ("size", "text", "image"),
    [(1, 0, 0), (2, 1, 0), (3, 1, 1), (4, 1, 1), (5, 1, 1), (6, 2, 1), (7, 2, 2), (16, 4, 4)],
)
def test_the_mixture_has_a_quarter_by_text_a_quarter_by_image_and_the_rest_at_random(train, size, text, image):
    items, features = train
    drawn, at_random = 0, []
    for query, pool in zip(items, pools("mix_sampler", train, size=size), strict=True):
        rows = others(items, query)
        by_text = ranked(features.text @ features.text[query.question_id], rows)
        rest = [row for row in rows if row not in by_text[:text]]
        by_image = ranked(features.image @ features.image[query.question_id], rest)
        similar = {*by_text[:text], *by_image[:image]}
        assert len(pool) == size
        assert similar <= set(pool)
        drawn += by_text[text] in pool
        at_random += set(pool) - similar
    assert drawn < TRAIN / 2, "the next by text is there only by chance"
    assert len(at_random) == TRAIN * (size - text - image)


def test_the_random_part_is_drawn_evenly():
    items, features, counts = examples(20, per_image=1), embeddings(20), np.zeros(20)
    for seed in range(400):
        counts[pools("rand_sampler", (items, features), [0], size=5, seed=seed)[0]] += 1
    # 400 pools of 5 from 19: 105 each on average, spread √(400 · 5/19 · 14/19) = 8.8.
    assert counts[0] == 0
    assert (abs(counts[1:] - 400 * 5 / 19) < 5 * 8.8).all()


def test_ties_are_broken_by_the_querys_seed():
    ones = F.normalize(torch.ones(41, 4), dim=-1)
    same = examples(41, per_image=1), Embeddings(ones, ones)
    first, second = (pools("text_sim_sampler", same, size=8, seed=seed) for seed in (0, 1))
    assert set(first[0]) != set(second[0])
    assert set(first[0]) != set(first[1])  # and not the same for every query
    taken = np.bincount([row for pool in first for row in pool], minlength=41)
    assert taken.max() < 30  # no row is in every pool


def test_nearest_is_best_first():
    scores = np.array([0.1, 0.9, 0.5, 0.7, 0.3], dtype=np.float32)
    rows = np.array([0, 1, 2, 4])
    assert nearest(scores, rows, 3, np.random.default_rng(0)) == [1, 2, 4]
    assert nearest(scores, rows, 9, np.random.default_rng(0)) == [1, 2, 4, 0]
    assert nearest(scores, rows, 2, np.random.default_rng(0), exclude=[1]) == [2, 4]


@pytest.mark.parametrize("pairs", [["ii"], ["tt"], ["ii", "tt"], ["ii", "it"], ["ti"]])
def test_similarities_sum_the_cosines_that_are_named(pairs):
    queries, candidates = embeddings(3, seed=1), embeddings(5, seed=2)
    names = {"i": "img", "t": "text"}
    ours, theirs = ({"i": one.image, "t": one.text} for one in (queries, candidates))
    found = np.stack([*similarity_rows(queries, candidates, [(names[a], names[b]) for a, b in pairs])])
    np.testing.assert_allclose(found, sum(ours[a] @ theirs[b].T for a, b in pairs), atol=1e-6)


def test_an_unknown_sampler_is_refused_with_the_known_ones(train):
    with pytest.raises(UsageError, match=r"one of rand_sampler, .*\(--sampler\)"):
        pools("best", train)


def test_a_query_that_nothing_may_stand_before_is_refused_by_id():
    with pytest.raises(LeverError, match="question 0"):
        pools("rand_sampler", (examples(3), embeddings(3)), [0])
