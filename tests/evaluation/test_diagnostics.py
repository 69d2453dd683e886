"""The numbers of `lever diagnose` that are counts, by hand."""

import math

import pytest

from lever_lm.evaluation import diagnostics as count
from lever_lm.evaluation.statistics import holm, interval_over_seeds


def says(text, answer):
    return text.lower() == answer.lower()


def test_the_majority_is_the_commonest_answer_and_of_equals_the_first():
    assert count.majority(["b", "a", "a"]) == "a"
    assert count.majority(["b", "a"]) == "b"
    assert count.majority([]) == ""


def test_copies_are_predictions_that_are_shown_answers():
    predictions, shown = ["Two", "three", "four"], [["one", "two"], ["one", "two"], []]
    assert count.copies(predictions, shown, says) == [True, False, False]


def test_copies_by_place_count_every_place_where_the_prediction_stands():
    predictions, shown = ["a", "b", "c"], [["a", "a"], ["b", "x"], ["x", "c"]]
    assert count.copies_by_place(predictions, shown, says) == [2 / 3, 2 / 3]
    assert count.copies_by_place(["a", "b"], [["a"], ["x", "b"]], says) == [1 / 2, 1.0]
    assert count.copies_by_place(["a"], [[]], says) == []


def test_the_entropy_of_one_set_for_all_queries_is_that_of_its_size_and_of_own_examples_the_largest():
    same, largest = count.entropy_of_picks([[1, 2], [2, 1], [1, 2]])
    assert same == pytest.approx(math.log(2))
    assert largest == pytest.approx(math.log(6))
    own, largest = count.entropy_of_picks([[1, 2], [3, 4]])
    assert own == pytest.approx(largest)
    assert count.entropy_of_picks([[], []]) == (0.0, 0.0)


def test_the_most_picked_rows_come_by_their_number_of_queries():
    assert count.most_picked([[5, 2], [5, 9], [9, 5], [2, 1]], 3) == [5, 2, 9]


def test_the_spread_over_orders_is_that_of_the_accuracy_and_of_a_querys_score():
    spread, of_query = count.spread_over_orders([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    assert spread == pytest.approx(math.sqrt((2 * (0.5 - 2 / 3) ** 2 + (1 - 2 / 3) ** 2) / 2))
    assert of_query == pytest.approx(math.sqrt(1 / 3))
    assert count.spread_over_orders([[1.0, 0.0]]) == (0.0, 0.0)


def test_holm_is_a_step_down():
    # sorted .01 .02 .03 .9: 4·.01, 3·.02, 2·.03, 1·.9
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([0.4, 0.01, 0.011]) == pytest.approx([0.4, 0.03, 0.03])
    assert holm([]) == []


def test_seeds_and_queries_both_widen_the_interval():
    same = interval_over_seeds([[1.0, 0.0] * 50] * 3)
    assert same["mean"] == 0.5
    assert same["seed_std"] == 0.0
    other = interval_over_seeds([[1.0, 0.0] * 50, [1.0, 1.0] * 50, [0.0, 0.0] * 50])
    assert other["seed_std"] == pytest.approx(0.5)
    assert other["high"] - other["low"] > 2 * (same["high"] - same["low"])
    single = interval_over_seeds([[1.0, 0.0, 1.0, 1.0]])
    assert (single["mean"], single["seed_std"]) == (0.75, 0.0)
    with pytest.raises(ValueError, match="same queries"):
        interval_over_seeds([])
