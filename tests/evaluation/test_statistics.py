"""Intervals and tests against closed forms and enumeration. Everything is seeded: nothing here can flake."""

import itertools
import math

import numpy as np
import pytest

from lever_lm.evaluation.statistics import bootstrap_interval, paired_test


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
