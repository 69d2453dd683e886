"""Lever-LM: a language model over the training examples."""

import dataclasses

import pytest
import torch

from lever_lm.selectors.fixed_set import split_of
from lever_lm.selectors.lever_lm import LeverLM
from lever_lm.utils.errors import LeverError


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LeverLM(d_model=6, vocabulary=9, hidden_dim=16, num_layers=2, num_heads=2).eval()


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    return torch.randn(3, 6), torch.randn(9, 6)


def test_its_loss_is_the_sum_over_steps_of_what_it_gives_each_example(model, inputs):
    query, icds = inputs
    sequences = torch.tensor([[1, 5], [8, 0], [2, 3]])
    total = 0.0
    for row, sequence in enumerate(sequences.tolist()):
        for step, wanted in enumerate(sequence):
            before = torch.tensor([sequence[:step]], dtype=torch.long)
            total -= float(model.logits(query[row : row + 1], icds, before)[0, -1].log_softmax(-1)[wanted].detach())
    assert float(model.loss(query, icds, sequences).detach()) == pytest.approx(total / 3, rel=1e-5)


def test_its_vocabulary_is_read_and_written_by_the_same_vectors(model, inputs):
    query, icds = inputs
    shown = torch.tensor([[4], [4], [4]])
    vectors = model.gpt.wte.weight
    first = model.query_vector + model.query_proj(query)
    second = vectors[4] + model.icd_proj(icds[4])
    hidden = model.gpt(inputs_embeds=torch.stack([first, second.expand_as(first)], 1)).last_hidden_state
    torch.testing.assert_close(model.logits(query, icds, shown), hidden @ vectors.T)


def test_it_picks_the_likeliest_example_that_may_be_shown_and_is_not_shown_yet(model, inputs):
    query, icds = inputs
    allowed = torch.ones(3, 9, dtype=torch.bool)
    best = model.logits(query, icds, torch.zeros(3, 0, dtype=torch.long))[:, 0].argmax(-1)
    allowed[0, best[0]] = False
    picks = model.select(query, icds, 4, allowed)
    assert picks[0, 0] != best[0]
    assert picks[1:, 0].tolist() == best[1:].tolist()
    assert all(len(set(row)) == 4 for row in picks.tolist())
    for row, chosen in enumerate(picks.tolist()):
        last = model.logits(query[row : row + 1], icds, torch.tensor([chosen[:3]]))[0, -1]
        free = [i for i in range(9) if allowed[row, i] and i not in chosen[:3]]
        assert chosen[3] == max(free, key=lambda i: float(last[i].detach()))


def test_it_is_refused_where_it_cannot_choose(digits_problem):
    width, total = digits_problem.features[1].shape[1], 12
    few = dataclasses.replace(
        digits_problem,
        train=digits_problem.train[:total],
        features=(digits_problem.features[0], torch.ones(total, width)),
    )
    model = LeverLM(d_model=width, vocabulary=total, hidden_dim=16, num_layers=1, num_heads=2).eval()
    model.split = split_of(few.train)
    assert all(len(set(picks)) == 11 for picks in model.choose(few, 11))
    with pytest.raises(LeverError, match="12 training examples, not 13: lower --shots"):
        next(model.choose(few, 13))
    with pytest.raises(LeverError, match=r"in another order.*--dataset"):
        next(model.choose(dataclasses.replace(few, train=few.train[::-1]), 2))
