"""RCE on small synthetic groups: it learns, by the weights and the temperature that it names."""

import dataclasses

import pytest
import torch
from worlds import QUERIES, RCE, data, make, same_state, train, with_groups

from lever_lm.training.losses import rce_loss
from lever_lm.training.rewards import group_advantage


def test_rce_lowers_its_loss_and_raises_the_rewarded_sequences(tmp_path):
    sets = with_groups(lambda group: dataclasses.replace(group, rewards=[5.0, *[0.0] * 7]))
    batch = sets[0].batch(torch.arange(len(sets[0])))

    def probabilities(policy):
        with torch.no_grad():
            return policy.eval().log_prob(*batch.inputs).exp().mean(0)

    before = probabilities(make())
    policy, rows = train(tmp_path, dataclasses.replace(RCE, epochs=30), None, sets=sets)
    after = probabilities(policy)
    losses = [row["train_loss"] for row in rows]
    assert losses[-1] < losses[0] - 1
    assert after[0] > 3 * before[0]
    assert after[0] > 3 * after[1:].max()


def test_the_rce_temperature_falls_from_start_to_end(tmp_path):
    _, rows = train(tmp_path, RCE, None)
    # 18 queries in batches of 8: 3 steps an epoch, 9 in all; an epoch's row has its last step's.
    assert [row["temperature"] for row in rows] == pytest.approx([2.0 - 1.5 * step / 8 for step in (2, 5, 8)])


def test_normalised_rewards_are_what_rce_weighs_by(tmp_path):
    sets = data()
    rce = dataclasses.replace(RCE, epochs=1, batch_size=QUERIES, normalize="rank")
    _, rows = train(tmp_path, rce, None, sets=sets)
    batch = sets[0].batch(torch.arange(len(sets[0])))
    ranks = group_advantage(batch.rewards, batch.mask, method="rank")
    with torch.no_grad():
        expected = rce_loss(make().eval().log_prob(*batch.inputs), ranks, batch.mask, 0.5)
    assert rows[0]["train_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_another_seed_is_another_run(tmp_path):
    one, other = (train(tmp_path / str(seed), RCE, None, policy=make(seed=seed))[0] for seed in (0, 1))
    assert not same_state(one.state_dict(), other.state_dict())
