"""The same set for every query: what it is scored by, and what a query may not see of it."""

import dataclasses

import pytest
import torch

from lever_lm.selectors.fixed_set import FixedSet, presence_scores, split_of
from lever_lm.utils.errors import LeverError


def test_an_examples_score_is_its_mean_gain_over_the_group_drawn_toward_nothing():
    rows = torch.tensor([[[0, 1], [1, 2]], [[0, 2], [3, -1]]])
    rewards = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    mask = torch.tensor([[True, True], [True, True]])
    # gains of the groups: ±.5 and ±1
    expected = [(0.5 + 1) / (2 + 4), 0 / (2 + 4), (-0.5 + 1) / (2 + 4), -1 / (1 + 4), 0.0]
    assert presence_scores(rows, rewards, mask, 5).tolist() == pytest.approx(expected)
    assert presence_scores(rows, rewards, mask, 5, prior=0.0).tolist()[:4] == pytest.approx([0.75, 0, 0.25, -1])


def test_padded_rollouts_count_for_nothing():
    rows = torch.tensor([[[0], [1], [0]]])
    scores = presence_scores(rows, torch.tensor([[1.0, 0.0, 9.0]]), torch.tensor([[True, True, False]]), 2, prior=0.0)
    assert scores.tolist() == pytest.approx([0.5, -0.5])


def test_every_query_gets_the_best_that_it_may_be_shown(digits_problem):
    fixed = FixedSet(len(digits_problem.train))
    fixed.scores[[7, 3, 9, 20]] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    first = digits_problem.queries[0]
    twin = dataclasses.replace(digits_problem.train[7], image_id=first.image_id)
    train = (*digits_problem.train[:7], twin, *digits_problem.train[8:])
    picks = list(fixed.choose(dataclasses.replace(digits_problem, train=train), 3))
    assert picks[0] == [3, 9, 20]
    assert all(chosen == [7, 3, 9] for chosen in picks[1:])
    assert fixed.shape == {"vocabulary": len(train)}


def test_another_training_split_is_refused_whatever_its_size(digits_problem):
    train = digits_problem.train
    fixed = FixedSet(len(train))
    fixed.split = split_of(train)
    assert len(list(fixed.choose(digits_problem, 2))) == 20
    for others, told in ((train[:-1], "there are 2503 here"), ((train[1], train[0], *train[2:]), "in another order")):
        with pytest.raises(LeverError, match=rf"{told}.*--dataset"):
            next(fixed.choose(dataclasses.replace(digits_problem, train=others), 2))
