"""The losses of warm-ups beside RCE against literal transcriptions, and the groups of answer match."""

import math
import random

import pytest
import torch

from lever_lm.tasks import TASKS
from lever_lm.training.batches import GroupTensors
from lever_lm.training.losses import epr_loss, match_loss
from lever_lm.training.sequence_model import shown_rows
from lever_lm.training.warmup import MatchGroups

CASES = 200


def random_group(rng, rewards):
    size = rng.randrange(1, 14)
    return [rng.uniform(-4, 4) for _ in range(size)], [rng.choice(rewards) for _ in range(size)]


def padded(rows, filler):
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


def test_match_loss_is_minus_the_log_of_the_expected_score_of_a_pick():
    rng = random.Random(0)
    for _ in range(CASES):
        groups = [random_group(rng, [0.0, 0.0, 0.3, 1.0]) for _ in range(3)]
        expected = []
        for logits, scores in groups:
            total = sum(map(math.exp, logits))
            share = sum(math.exp(logit) / total * score for logit, score in zip(logits, scores, strict=True))
            expected += [-math.log(share)] if share else []
        mask = padded([[True] * len(logits) for logits, _ in groups], False)
        log_probs = padded([logits for logits, _ in groups], 7.0).masked_fill(~mask, -torch.inf).log_softmax(-1)
        found = match_loss(log_probs.masked_fill(~mask, 3.0), padded([s for _, s in groups], 1.0), mask)
        assert float(found) == pytest.approx(sum(expected) / len(expected) if expected else 0.0, abs=1e-5)


def literal_epr(scores, rewards, others):
    if max(rewards) == min(rewards):
        return None
    order = sorted(range(len(scores)), key=lambda i: -rewards[i])
    positives = [i for i in order[:5] if rewards[i] > min(rewards)]
    worst = sorted(range(len(scores)), key=lambda i: rewards[i])[:5]
    negatives = [scores[i] for i in worst if rewards[i] < max(rewards) and i not in positives]
    against = sum(map(math.exp, [*negatives, *others]))
    each = [-math.log(math.exp(scores[i]) / (math.exp(scores[i]) + against)) for i in positives]
    return sum(each) / len(each)


def test_epr_loss_is_its_formula():
    rng = random.Random(1)
    for _ in range(CASES):
        groups = [random_group(rng, [0.0, 0.3, 0.6, 1.0]) for _ in range(3)]
        others = [[rng.uniform(-2, 2) for _ in range(4)] for _ in groups]
        expected = [literal_epr(*group, other) for group, other in zip(groups, others, strict=True)]
        known = [value for value in expected if value is not None]
        mask = padded([[True] * len(scores) for scores, _ in groups], False)
        tensors = padded([s for s, _ in groups], 9.0), padded([r for _, r in groups], 2.0), mask
        found = epr_loss(*tensors, torch.tensor(others))
        assert float(found) == pytest.approx(sum(known) / len(known) if known else 0.0, abs=1e-5)


@pytest.mark.parametrize("loss", [match_loss, epr_loss])
def test_a_group_that_says_nothing_has_no_gradient_and_is_not_nan(loss):
    scores = torch.zeros(2, 3, requires_grad=True)
    rewards = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    loss(scores, rewards, torch.ones(2, 3, dtype=torch.bool)).backward()
    assert scores.grad[0].tolist() == [0, 0, 0]
    assert scores.grad.isfinite().all()
    assert scores.grad[1, 0] < 0


def test_the_groups_of_answer_match_are_every_candidate_alone_by_the_score_of_its_answer(
    digits_config, digits, digits_features
):
    groups = MatchGroups(digits_config, digits, digits_features)
    rows = [3, 40, 77, 200]
    one, other, again = groups.draw(rows, 1), groups.draw(rows, 2), groups.draw(rows, 1)
    assert one.pools.tolist() == again.pools.tolist() != other.pools.tolist()
    assert one.pools.shape[1] == digits_config.infer.pool_size > digits_config.rollout.pool_size
    for place, row in enumerate(one.rows.tolist()):
        query = digits.train_examples[row]
        for candidate, sequence, reward in zip(
            one.pools[place].tolist(), one.sequences[place].tolist(), one.rewards[place].tolist(), strict=True
        ):
            shown = digits.train_examples[candidate]
            assert shown.image_id != query.image_id
            assert one.pools[place, sequence[0]] == candidate
            assert reward == pytest.approx(TASKS["vqa"].score(shown.answer, query))
        assert one.rewards[place].max() > 0
    counts = [int((groups.all([row], 0).rewards > 0).sum()) for row in rows]
    share, mean = sum(map(bool, counts)) / len(rows), sum(counts) / sum(map(bool, counts))
    assert groups.density(rows) == (
        f"matches: {share:.0%} of the training queries have one in their pool, {mean:.1f} on average"
    )


def test_the_rows_that_a_rollout_shows_are_those_of_its_places():
    data = GroupTensors(
        queries=torch.zeros(9, 2),
        icds=torch.zeros(9, 2),
        rows=torch.tensor([0]),
        pools=torch.tensor([[5, 7, 8]]),
        pool_mask=None,
        sequences=torch.tensor([[[2, 0], [1, -1]]]),
        mask=torch.ones(1, 2, dtype=torch.bool),
        rewards=torch.zeros(1, 2),
    )
    assert shown_rows(data).tolist() == [[[8, 5], [7, -1]]]
