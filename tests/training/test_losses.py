"""Losses against numbers worked out by hand. log_probs, rewards, mask: (B, G)."""

import json
import math

import pytest
import torch
from helpers import CHECKOUT

from lever_lm.training.losses import adapt_kl_beta, grpo_loss, rce_loss, rce_temperature

TABLES = json.loads((CHECKOUT / "tests/data" / "tables.json").read_text(encoding="utf-8"))


def value(tensor):
    return float(tensor.detach())


# ---------------------------------------------------------------------- RCE


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_rce_weighs_cross_entropies_by_the_softmax_of_the_rewards(temperature):
    weight = 1 / (1 + math.exp(-1 / temperature))  # of reward 1 against reward 0
    loss = rce_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([[1.0, 0.0]]), None, temperature)
    assert value(loss) == pytest.approx(weight * 1 + (1 - weight) * 2)


def test_rce_averages_over_queries_and_ignores_padding():
    log_probs = torch.tensor([[-1.0, -3.0, 1e6], [-4.0, torch.inf, torch.nan]])
    rewards = torch.tensor([[1.0, 1.0, 1e9], [0.0, torch.nan, torch.inf]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # Equal rewards weigh equally: (1 + 3) / 2 = 2; the second query has one rollout: 4.
    assert value(rce_loss(log_probs, rewards, mask, 1.0)) == pytest.approx((2 + 4) / 2)


def test_rce_leaves_out_a_query_without_a_rollout():
    log_probs = torch.tensor([[-1.0, -3.0], [-7.0, -7.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [False, False]])
    loss = rce_loss(log_probs, torch.zeros(2, 2), mask, 1.0)
    loss.backward()
    assert value(loss) == pytest.approx(2.0)
    assert log_probs.grad.tolist() == [[-0.5, -0.5], [0.0, 0.0]]


def test_rce_of_nothing_is_zero():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert value(rce_loss(torch.full((2, 3), -1.0), torch.ones(2, 3), mask, 1.0)) == 0.0


def test_rce_gradient_is_minus_the_weight_of_each_rollout():
    log_probs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    rewards = torch.tensor([[2.0, 0.0, 1.0]], requires_grad=True)
    rce_loss(log_probs, rewards.detach(), None, 0.5).backward()
    weights = [math.exp(4), 1.0, math.exp(2)]
    expected = [-w / sum(weights) for w in weights]
    assert log_probs.grad[0].tolist() == pytest.approx(expected)


# ---------------------------------------------------------------------- GRPO


def ratio_loss(ratio, advantage, **kwargs):
    log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, metrics = grpo_loss(log_probs, torch.zeros(1, 1), torch.tensor([[advantage]]), kl_beta=0.0, **kwargs)
    loss.backward()
    return value(loss), float(log_probs.grad), metrics


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # clipped at 1.2: no more to gain
        (0.5, 2.0, -1.0, -1.0),  # too unlikely for its reward: not clipped
        (1.5, -2.0, 3.0, 3.0),  # too likely for its reward: not clipped
        (0.5, -2.0, 1.6, 0.0),  # clipped at 0.8
    ],
)
def test_grpo_clips_only_what_has_gone_far_enough(ratio, advantage, loss, gradient):
    ours, slope, _ = ratio_loss(ratio, advantage)
    assert ours == pytest.approx(loss)
    assert slope == pytest.approx(gradient, abs=1e-6)


def test_grpo_without_clip_keeps_the_plain_ratio():
    loss, gradient, _ = ratio_loss(1.5, 2.0, clip=False)
    assert (loss, gradient) == (pytest.approx(-3.0), pytest.approx(-3.0))


def test_grpo_takes_the_clip_range_it_is_given():
    assert ratio_loss(1.5, 1.0, clip_epsilon=0.4)[0] == pytest.approx(-1.4)


def test_kl_without_reference_is_the_lineages_estimate_against_the_old_policy():
    _, metrics = grpo_loss(torch.tensor([[math.log(2.0)]]), torch.zeros(1, 1), torch.zeros(1, 1), kl_beta=0.5)
    assert value(metrics["kl"]) == pytest.approx(2 - 1 - math.log(2))
    assert value(metrics["kl_loss"]) == pytest.approx(0.5 * (1 - math.log(2)))


def test_kl_with_reference_is_k3_against_the_reference():
    log_probs, old = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.1)]])
    reference = torch.tensor([[math.log(0.25)]])
    loss, metrics = grpo_loss(log_probs, old, torch.zeros(1, 1), ref_log_probs=reference, kl_beta=2.0)
    kl = 0.5 - 1 - math.log(0.5)  # ratio reference / policy is 0.5
    assert value(metrics["kl"]) == pytest.approx(kl)
    assert value(loss) == pytest.approx(2 * kl)
    assert value(metrics["mean_ratio"]) == pytest.approx(5.0)  # still against the old policy


def test_grpo_averages_within_a_group_then_over_groups():
    ratios = torch.tensor([[1.1, 0.9, 1.0, 1.0], [1.0, 7.0, 7.0, 7.0], [7.0, 7.0, 7.0, 7.0]])
    advantages = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.5, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[True] * 4, [True] + [False] * 3, [False] * 4])
    loss, metrics = grpo_loss(ratios.log(), torch.zeros(3, 4), advantages, mask, kl_beta=0.0)
    # First group (1.1 − 0.9 + 0 + 0) / 4 = 0.05, second 0.5; the third has no rollout and is no group.
    assert value(loss) == pytest.approx(-(0.05 + 0.5) / 2)
    assert value(metrics["mean_ratio"]) == pytest.approx((1.0 + 1.0) / 2)


def test_clip_frac_is_the_share_of_real_rollouts_out_of_range():
    ratios = torch.tensor([[1.5, 0.7, 1.1, 1.0], [1.0, 1.0, 9.0, 9.0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    _, metrics = grpo_loss(ratios.log(), torch.zeros(2, 4), torch.ones(2, 4), mask)
    assert value(metrics["clip_frac"]) == pytest.approx((0.5 + 0.0) / 2)


def test_a_tied_group_leaves_the_policy_term_while_its_kl_still_counts():
    log_probs = torch.tensor([[0.3, -0.3]], requires_grad=True)
    loss, metrics = grpo_loss(log_probs, torch.zeros(1, 2), torch.zeros(1, 2), kl_beta=1.0)
    loss.backward()
    kl = (math.exp(0.3) - 1 - 0.3 + math.exp(-0.3) - 1 + 0.3) / 2
    assert value(metrics["ppo_loss"]) == 0.0
    assert value(loss) == pytest.approx(kl)
    assert log_probs.grad[0].tolist() == pytest.approx([(math.exp(0.3) - 1) / 2, (math.exp(-0.3) - 1) / 2])


def test_padding_reaches_neither_loss_nor_gradient():
    log_probs = torch.tensor([[0.1, 500.0]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    loss, metrics = grpo_loss(
        log_probs,
        torch.tensor([[0.0, -torch.inf]]),
        torch.tensor([[1.0, 9.0]]),
        mask,
        ref_log_probs=torch.tensor([[0.1, torch.nan]]),
    )
    loss.backward()
    assert value(loss) == pytest.approx(-math.exp(0.1))
    assert log_probs.grad[0].tolist() == [pytest.approx(-math.exp(0.1)), 0.0]
    assert all(math.isfinite(value(metric)) for metric in metrics.values())


def test_grpo_metrics_carry_no_gradient_and_add_up():
    log_probs = torch.tensor([[0.1, -0.2]], requires_grad=True)
    loss, metrics = grpo_loss(log_probs, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), kl_beta=0.3)
    assert set(metrics) == {"ppo_loss", "kl", "kl_loss", "mean_ratio", "clip_frac"}
    assert not any(metric.requires_grad for metric in metrics.values())
    assert value(loss) == pytest.approx(value(metrics["ppo_loss"]) + 0.3 * value(metrics["kl"]))


# ---------------------------------------------------------------------- schedules


@pytest.mark.parametrize("row", TABLES["temperature_schedule"], ids=lambda r: f"{r['step']}-of-{r['total']}")
def test_golden_temperature_schedule(row):
    found = rce_temperature(row["step"], row["total"], row["start"], row["end"])
    assert found == pytest.approx(row["value"], abs=1e-9)


def test_temperature_falls_in_a_straight_line():
    assert [rce_temperature(step, 4) for step in range(4)] == pytest.approx([2.0, 1.5, 1.0, 0.5])


@pytest.mark.parametrize("row", TABLES["adaptive_kl_beta"], ids=lambda r: f"{r['kl']}-{r['beta']}")
def test_golden_adaptive_beta(row):
    found = adapt_kl_beta(row["beta"], row["kl"], low=row["kl_min"], high=row["kl_max"], factor=row["factor"])
    assert found == pytest.approx(row["value"], rel=1e-9)


def test_adaptive_beta_is_unmoved_by_nan():
    row = TABLES["adaptive_kl_beta_nan"]
    assert adapt_kl_beta(row["beta"], float(row["kl"])) == row["value"]


@pytest.mark.parametrize(
    ("beta", "kl", "expected"),
    [(0.1, 0.2, 0.15), (0.15, 0.005, 0.1), (0.1, 0.05, 0.1), (9.0, 1.0, 10.0), (0.001, 0.0, 0.001)],
)
def test_adaptive_beta_by_hand(beta, kl, expected):
    assert adapt_kl_beta(beta, kl) == pytest.approx(expected)
