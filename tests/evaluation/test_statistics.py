"""Intervals and tests against closed forms and enumeration. Everything is seeded: nothing here can flake."""

import itertools
import math
import time

import numpy as np
import pytest

from lever_lm.evaluation import statistics
from lever_lm.evaluation.statistics import bootstrap_interval, holm, interval_over_seeds, paired_test


def test_scores_without_spread_have_an_interval_of_no_width():
    assert bootstrap_interval([0.6] * 7) == (pytest.approx(0.6), pytest.approx(0.6))


def test_the_interval_of_many_coin_flips_is_the_normal_one():
    # Mean 0.5, standard error √(0.25 / 1000) = 0.01581; ± 1.96 of it.
    low, high = bootstrap_interval([0.0, 1.0] * 500)
    half = 1.96 * math.sqrt(0.25 / 1000)
    assert low == pytest.approx(0.5 - half, abs=0.003)
    assert high == pytest.approx(0.5 + half, abs=0.003)


def test_the_interval_of_two_scores_is_that_of_their_four_resamples():
    # Means 0, ½, ½, 1 with probability ¼ each: the outer 2.5 % lie at the ends.
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    # Within the middle 40 % there is only ½.
    assert bootstrap_interval([0.0, 1.0], level=0.4) == (0.5, 0.5)


def test_twelve_answers_say_little():
    # Sums of twelve fair coins: at most 3 with a probability of 7 %, at most 2 with one of 2 %.
    assert bootstrap_interval([0.0, 1.0] * 6) == (0.25, 0.75)


def test_another_seed_gives_another_interval():
    values = list(np.random.default_rng(1).random(40))
    assert bootstrap_interval(values) == bootstrap_interval(values, seed=0) != bootstrap_interval(values, seed=1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.normal(0, 1, 60), seed=seed)
        hits += low <= 0 <= high
    assert 178 <= hits <= 199  # 95 % of 200 is 190, its spread 3.1


def test_no_scores_and_scores_of_other_queries_are_refused():
    with pytest.raises(ValueError, match="no scores"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="must be the same queries"):
        paired_test([1, 2, 3], [1, 2])


def test_equal_scores_do_not_differ():
    scores = [0.0, 0.3, 1.0]
    assert paired_test(scores, scores) == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


def test_difference_and_interval_are_those_of_the_gaps():
    ours, theirs = [1.0, 0.6, 0.3, 0.0], [0.0, 0.6, 0.0, 0.3]
    found = paired_test(ours, theirs, seed=3)
    assert found["difference"] == pytest.approx((1.0 + 0.0 + 0.3 - 0.3) / 4)
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert (found["low"], found["high"]) == pytest.approx(bootstrap_interval(gaps, seed=3))


@pytest.mark.parametrize(
    "gaps", [[1.0] * 5, [0.9, 0.3, -0.3, 0.6, 0.0, 1.0, -0.1, 0.2], [1.0, -1.0, 0.5], [-0.3, -0.6, -1.0, -0.2]]
)
def test_the_p_value_is_that_of_all_sign_flips(gaps):
    flips = [abs(np.mean(np.array(signs) * gaps)) for signs in itertools.product([-1, 1], repeat=len(gaps))]
    exact = np.mean([flip >= abs(np.mean(gaps)) - 1e-12 for flip in flips])
    found = paired_test(gaps, [0.0] * len(gaps))["p"]
    assert found == pytest.approx(exact, abs=4 * math.sqrt(0.25 / 2000))


def test_a_clear_difference_is_as_significant_as_the_flips_allow():
    found = paired_test([1.0] * 40, [0.0] * 40)
    assert found["p"] == pytest.approx(1 / 2001)
    assert (found["low"], found["high"]) == (1.0, 1.0)


def test_swapping_the_methods_turns_the_difference_and_keeps_the_p_value():
    rng = np.random.default_rng(2)
    a, b = rng.random(30), rng.random(30)
    one, other = paired_test(a, b), paired_test(b, a)
    assert one["difference"] == pytest.approx(-other["difference"])
    assert one["p"] == other["p"]
    assert one["low"] < one["difference"] < one["high"]


# ---------------------------------------------------------------------- many tests


def lists_of_p_values():
    """250 lists of up to 30, a third of them with many ties and values at the ends."""
    rng = np.random.default_rng(0)
    for case in range(250):
        values = rng.random(rng.integers(1, 31)) ** rng.integers(1, 6)
        yield list(np.round(values, 1) if case % 3 == 0 else values)


def test_holm_is_its_formula_taken_literally():
    for values in lists_of_p_values():
        ranked, m = sorted(values), len(values)
        adjusted = [min(1.0, max((m - i) * ranked[i] for i in range(k + 1))) for k in range(m)]
        of = dict(zip(ranked, adjusted, strict=True))  # of equal ones the last, whose adjusted value is the largest
        assert holm(values) == pytest.approx([of[p] for p in values])
    assert holm([]) == []


def test_holm_rejects_what_stepping_down_rejects():
    for values in lists_of_p_values():
        for alpha in (0.01, 0.05, 0.2):
            rejected, left = set(), sorted(range(len(values)), key=values.__getitem__)
            while left and values[left[0]] * len(left) <= alpha:
                rejected.add(left.pop(0))
            assert {i for i, p in enumerate(holm(values)) if p <= alpha} == rejected


def test_holm_of_tests_that_are_all_null_rarely_finds_one():
    rng = np.random.default_rng(0)
    found = np.mean([min(holm(rng.random(20))) <= 0.05 for _ in range(2000)])
    assert found == pytest.approx(0.05, abs=0.015)  # unadjusted it would be 64 %


# ---------------------------------------------------------------------- several seeds


def slow_means(scores, seed):
    """The means of the resamples, with a loop over everything that is summed."""
    rng, total = np.random.default_rng(seed), len(scores) * len(scores[0])
    drawn = rng.integers(0, len(scores), (statistics.RESAMPLES, len(scores), 1))[..., 0]
    for rows in drawn:
        columns = rng.integers(0, len(scores[0]), len(scores[0]))
        yield sum(scores[row][column] for row in rows for column in columns) / total


def test_an_interval_over_seeds_is_that_of_means_summed_one_by_one(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 40)
    rng = np.random.default_rng(0)
    for case in range(200):
        scores = rng.random((rng.integers(1, 6), rng.integers(1, 13)))
        found, means = interval_over_seeds(scores, seed=case), list(slow_means(scores.tolist(), case))
        by_seed = [sum(row) / len(row) for row in scores.tolist()]
        middle = sum(by_seed) / len(by_seed)
        spread = math.sqrt(sum((one - middle) ** 2 for one in by_seed) / (len(by_seed) - 1)) if by_seed[1:] else 0.0
        expected = [middle, *np.quantile(means, [0.025, 0.975]), spread]
        assert [found[name] for name in ("mean", "low", "high", "seed_std")] == pytest.approx(expected)


def test_an_interval_of_two_seeds_and_queries_is_that_of_their_sixteen_resamples():
    scores, twice = [[0.0, 0.2], [0.5, 1.0]], [(0, 0), (0, 1), (1, 0), (1, 1)]
    means = [np.mean([scores[s][q] for s in rows for q in columns]) for rows in twice for columns in twice]
    found = interval_over_seeds(scores, level=0.6)
    low, high = np.quantile(means, [0.2, 0.8], method="inverted_cdf")
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))


def test_equal_seeds_add_nothing_to_the_interval_of_the_queries():
    scores = np.random.default_rng(0).random(300)
    found = interval_over_seeds([scores] * 4)
    assert (found["low"], found["high"]) == pytest.approx(bootstrap_interval(scores, seed=1), abs=0.004)
    assert found["seed_std"] == pytest.approx(0)


def coverage(seeds, noise, monkeypatch):
    """How often the interval holds the truth, 0, where seeds differ by 1 and queries by `noise`."""
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    rng, hits = np.random.default_rng(0), 0
    for case in range(250):
        scores = rng.normal(0, 1, (seeds, 1)) + rng.normal(0, noise, 30)
        found = interval_over_seeds(scores, seed=case)
        hits += found["low"] - 1e-9 <= 0 <= found["high"] + 1e-9
    return hits / 250


def test_three_seeds_that_differ_more_than_queries_make_an_interval_that_is_too_narrow(monkeypatch):
    # All three lie on one side of the truth with a probability of 2 / 2³.
    assert coverage(3, 0.0, monkeypatch) == pytest.approx(0.75, abs=0.06)
    assert coverage(3, 20.0, monkeypatch) == pytest.approx(0.94, abs=0.03)


def test_scores_over_seeds_must_be_of_the_same_queries():
    for scores in ([], [[]], [0.5], [[0.5, 1.0], [0.5]]):
        with pytest.raises(ValueError):
            interval_over_seeds(scores)


def test_an_interval_over_five_seeds_of_a_whole_split_takes_less_than_a_second():
    scores = np.random.default_rng(0).random((5, 5046))
    interval_over_seeds(scores[:, :10])
    began = time.process_time()
    interval_over_seeds(scores)
    assert time.process_time() - began < 1
