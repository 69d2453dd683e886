"""Losses against numbers worked out by hand. log_probs, rewards, mask: (B, G)."""

import json
import math

import pytest
import torch
from helpers import CHECKOUT

from lever_lm.training.losses import (
    KL_ESTIMATES,
    LOSSES,
    SCHEDULES,
    adapt_kl_beta,
    clip_loss,
    grpo_loss,
    kl_share,
    rce_loss,
    rce_temperature,
    reinforce_loss,
    scheduled_lr,
)
from lever_lm.training.rewards import group_advantage

TABLES = json.loads((CHECKOUT / "tests/data" / "tables.json").read_text(encoding="utf-8"))
LN2 = math.log(2)


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
    assert value(rce_loss(log_probs, torch.ones(2, 2), torch.zeros_like(mask), 1.0)) == 0.0


def test_rce_gradient_is_minus_the_weight_of_each_rollout():
    log_probs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    rce_loss(log_probs, torch.tensor([[2.0, 0.0, 1.0]]), None, 0.5).backward()
    weights = [math.exp(4), 1.0, math.exp(2)]
    assert log_probs.grad[0].tolist() == pytest.approx([-w / sum(weights) for w in weights])


# ---------------------------------------------------------------------- the clipped loss


@pytest.mark.parametrize(
    ("ratio", "advantage", "high", "loss", "gradient", "outside"),
    [
        (1.0, 2.0, None, -2.0, -2.0, 0.0),
        (1.1, 2.0, None, -2.2, -2.2, 0.0),
        (1.5, 2.0, None, -2.4, 0.0, 1.0),  # clipped at 1.2: no more to gain
        (0.5, 2.0, None, -1.0, -1.0, 1.0),  # too unlikely for its reward: not clipped
        (1.5, -2.0, None, 3.0, 3.0, 1.0),  # too likely for its reward: not clipped
        (0.5, -2.0, None, 1.6, 0.0, 1.0),  # clipped at 0.8
        (1.4, 2.0, 0.5, -2.8, -2.8, 0.0),  # outside 1 + 0.2, inside 1 + 0.5
        (1.6, 2.0, 0.5, -3.0, 0.0, 1.0),  # clipped at 1.5
        (0.7, -2.0, 0.5, 1.6, 0.0, 1.0),  # clipped at 0.8: below, the range is as before
        (0.85, -2.0, 0.5, 1.7, 1.7, 0.0),
    ],
)
def test_grpo_clips_only_what_has_gone_far_enough(ratio, advantage, high, loss, gradient, outside):
    log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    terms = (log_probs, torch.zeros(1, 1), torch.tensor([[advantage]]))
    found, stats = grpo_loss(*terms, kl_beta=0.0, clip_epsilon_high=high)
    found.backward()
    assert value(found) == pytest.approx(loss)
    assert float(log_probs.grad) == pytest.approx(gradient, abs=1e-6)
    assert value(stats["clip_frac"]) == outside


@pytest.mark.parametrize(("options", "loss"), [({"clip": False}, -3.0), ({"clip_epsilon": 0.4}, -2.8)])
def test_grpo_without_clip_keeps_the_plain_ratio(options, loss):
    terms = (torch.tensor([[math.log(1.5)]]), torch.zeros(1, 1), torch.tensor([[2.0]]))
    assert value(grpo_loss(*terms, kl_beta=0.0, **options)[0]) == pytest.approx(loss)


def test_grpo_averages_within_a_group_then_over_groups():
    ratios = torch.tensor([[1.1, 0.9, 1.0, 1.0], [1.0, 7.0, 7.0, 7.0], [7.0, 7.0, 7.0, 7.0]])
    advantages = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.5, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[True] * 4, [True] + [False] * 3, [False] * 4])
    loss, stats = grpo_loss(ratios.log(), torch.zeros(3, 4), advantages, mask, kl_beta=0.0)
    # First group (1.1 − 0.9 + 0 + 0) / 4 = 0.05, second 0.5; the third has no rollout and is no group.
    assert value(loss) == pytest.approx(-(0.05 + 0.5) / 2)
    assert value(stats["mean_ratio"]) == pytest.approx((1.0 + 1.0) / 2)


def test_clip_frac_is_the_share_of_real_rollouts_out_of_range():
    ratios = torch.tensor([[1.5, 0.7, 1.1, 1.0], [1.0, 1.0, 9.0, 9.0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    _, stats = grpo_loss(ratios.log(), torch.zeros(2, 4), torch.ones(2, 4), mask)
    assert value(stats["clip_frac"]) == pytest.approx((0.5 + 0.0) / 2)


def test_a_tied_group_leaves_the_policy_term_while_its_kl_still_counts():
    log_probs = torch.tensor([[0.3, -0.3]], requires_grad=True)
    loss, stats = grpo_loss(log_probs, torch.zeros(1, 2), torch.zeros(1, 2), kl_beta=1.0)
    loss.backward()
    kl = (math.exp(0.3) - 1 - 0.3 + math.exp(-0.3) - 1 + 0.3) / 2
    assert value(stats["ppo_loss"]) == 0.0
    assert value(loss) == pytest.approx(kl)
    assert log_probs.grad[0].tolist() == pytest.approx([(math.exp(0.3) - 1) / 2, (math.exp(-0.3) - 1) / 2])


def test_grpo_metrics_carry_no_gradient_and_add_up():
    log_probs = torch.tensor([[0.1, -0.2]], requires_grad=True)
    loss, stats = grpo_loss(log_probs, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), kl_beta=0.3)
    assert set(stats) == {"ppo_loss", "kl", "kl_loss", "mean_ratio", "clip_frac"}
    assert not any(metric.requires_grad for metric in stats.values())
    assert value(loss) == pytest.approx(value(stats["ppo_loss"]) + 0.3 * value(stats["kl"]))


# ---------------------------------------------------------------------- the KL


@pytest.mark.parametrize(
    ("estimate", "with_reference", "kl", "gradient"),
    [
        # d = log π_ref − log π = log(0.25 / 0.5) = −log 2; its derivative by log π is −1.
        ("k1", True, LN2, 1.0),
        ("k2", True, LN2**2 / 2, LN2),
        ("k3", True, 0.5 - 1 + LN2, 1 - 0.5),
        # d = log π − log π_old = log(0.5 / 0.25) = log 2; its derivative by log π is 1.
        ("k1", False, -LN2, -1.0),
        ("k2", False, LN2**2 / 2, LN2),
        ("k3", False, 2 - 1 - LN2, 2 - 1.0),
    ],
)
def test_kl_estimates_against_a_reference_by_hand(estimate, with_reference, kl, gradient):
    """Without a reference the KL is the lineage's against the old policy."""
    log_probs, other = torch.tensor([[math.log(0.5)]], requires_grad=True), torch.tensor([[math.log(0.25)]])
    old, reference = (torch.tensor([[math.log(0.1)]]), other) if with_reference else (other, None)
    terms = (log_probs, old, torch.zeros(1, 1))
    loss, stats = grpo_loss(*terms, kl_beta=2.0, kl_estimate=estimate, ref_log_probs=reference)
    loss.backward()
    assert value(stats["kl"]) == pytest.approx(kl)
    assert value(stats["kl_loss"]) == value(loss) == pytest.approx(2 * kl)
    assert float(log_probs.grad) == pytest.approx(2 * gradient)
    assert value(stats["mean_ratio"]) == pytest.approx(5.0 if with_reference else 2.0)  # to the old policy


def test_the_estimates_mean_what_they_estimate():
    """Over samples of π, k1 and k3 have the mean KL(π ‖ π_ref); near each other k2 has it too."""
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    for reference, estimates in (([0.2, 0.2, 0.6], ("k1", "k3")), ([0.49, 0.31, 0.2], ("k1", "k2", "k3"))):
        gap = torch.tensor(reference, dtype=torch.float64).log() - policy.log()
        exact = float((policy * -gap).sum())
        for estimate in estimates:
            assert float((policy * KL_ESTIMATES[estimate](gap)).sum()) == pytest.approx(exact, rel=0.02), estimate


def test_an_unknown_estimate_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'k4'; choose one of k1, k2, k3 \(grpo\.kl\)"):
        grpo_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), kl_estimate="k4")


# ---------------------------------------------------------------------- REINFORCE


def test_reinforce_is_the_advantage_times_the_log_prob_with_neither_ratio_nor_clip():
    log_probs = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]], requires_grad=True)
    old, advantages = torch.full((2, 2), -20.0), torch.tensor([[1.0, -1.0], [0.5, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    loss, stats = reinforce_loss(log_probs, old, advantages, mask, kl_beta=0.5, ref_log_probs=log_probs.detach() + LN2)
    loss.backward()
    # Policy: −((−1 + 2) / 2 + 0.5 · −3) / 2 = 0.5. KL: d = log 2 everywhere, k3 = 2 − 1 − log 2, slope −(2 − 1).
    assert value(stats["ppo_loss"]) == pytest.approx(0.5)
    assert value(stats["kl"]) == pytest.approx(1 - LN2)
    assert value(loss) == pytest.approx(0.5 + 0.5 * (1 - LN2))
    assert log_probs.grad.tolist() == [[-0.25 - 0.125, 0.25 - 0.125], [-0.25 - 0.25, 0.0]]
    assert value(stats["zero_grad_frac"]) == 0.0


# ---------------------------------------------------------------------- every loss of the table


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_the_whole_loss_is_right(name, with_reference):
    torch.manual_seed(3)
    log_probs, old, reference, advantages = (torch.randn(3, 5, dtype=torch.float64) for _ in range(4))
    mask = torch.tensor([[True] * 5, [True, True, False, True, False], [False] * 5])
    options = {"weights": torch.tensor([0.3, 2.0, 1.0], dtype=torch.float64), "clip_epsilon_high": 0.4}
    options |= {"kl_beta": 0.1, "ref_log_probs": reference if with_reference else None}
    for estimate in KL_ESTIMATES:
        how = {**options, "kl_estimate": estimate}
        inputs = (log_probs.clone().requires_grad_(),)
        assert torch.autograd.gradcheck(lambda x, how=how: LOSSES[name](x, old, advantages, mask, **how)[0], inputs)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_reaches_neither_loss_nor_gradient(name):
    log_probs = torch.tensor([[0.1, 500.0]], requires_grad=True)
    old, advantages = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[1.0, 9.0]])
    options = {"mask": torch.tensor([[True, False]]), "ref_log_probs": torch.tensor([[0.1, torch.nan]])}
    loss, stats = LOSSES[name](log_probs, old, advantages, **options, kl_beta=0.1, kl_estimate="k3")
    loss.backward()
    alone = torch.tensor([[0.1]], requires_grad=True)
    options = {"mask": torch.tensor([[True]]), "ref_log_probs": torch.tensor([[0.1]])}
    expected, _ = LOSSES[name](alone, old[:, :1], advantages[:, :1], **options, kl_beta=0.1, kl_estimate="k3")
    expected.backward()
    assert value(loss) == pytest.approx(value(expected))
    assert log_probs.grad[0].tolist() == [pytest.approx(float(alone.grad)), 0.0]
    assert all(math.isfinite(value(metric)) for metric in stats.values())


@pytest.mark.parametrize("name", LOSSES)
def test_weights_make_every_mean_a_weighted_one(name):
    torch.manual_seed(1)
    log_probs, old, advantages = (torch.randn(3, 4) for _ in range(3))
    mask = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])  # the last counts with no weight

    def found(weights, at=slice(None)):
        terms = (log_probs[at], old[at], advantages[at], mask[at])
        loss, stats = LOSSES[name](*terms, weights=weights, kl_beta=0.5, kl_estimate="k3")
        stats.pop("kl_share")  # a ratio of two means
        return {"loss": value(loss), **{key: value(stat) for key, stat in stats.items()}}

    first, second = found(None, slice(0, 1)), found(None, slice(1, 2))
    weighted = {key: (3 * first[key] + second[key]) / 4 for key in first}
    assert found(torch.tensor([3.0, 1.0, 50.0])) == pytest.approx(weighted, rel=1e-4)
    assert found(torch.full((3,), 7.0)) == pytest.approx(found(None), rel=1e-5)
    assert set(found(torch.zeros(3)).values()) == {0.0}


# ---------------------------------------------------------------------- what the epoch is judged by


def test_the_rollouts_without_gradient_by_hand():
    ratios = torch.tensor([[1.0, 1.3, 0.7, 1.3], [0.7, 1.0, 9.0, 9.0]])
    advantages = torch.tensor([[0.0, 1.0, -1.0, -1.0], [1.0, 2.0, 0.0, 0.0]])
    terms = (ratios.log(), torch.zeros(2, 4), advantages, torch.tensor([[True] * 4, [True, True, False, False]]))
    # Idle: advantage 0; clipped up with A > 0; clipped down with A < 0. Not: up with A < 0, and all of group 2.
    options = [{}, {"clip_epsilon_high": 0.5}, {"weights": torch.tensor([3.0, 1.0])}]
    found = [value(clip_loss(*terms, **how)[1]["zero_grad_frac"]) for how in options]
    assert found == pytest.approx([(3 / 4 + 0) / 2, (2 / 4 + 0) / 2, 3 * 0.75 / 4])


@pytest.mark.parametrize("high", [None, 0.05, 0.6])
def test_the_rollouts_without_gradient_are_those_autograd_gives_none(high):
    torch.manual_seed(0)
    log_probs = (0.4 * torch.randn(6, 7)).requires_grad_()
    old, mask = 0.1 * torch.randn(6, 7), torch.rand(6, 7) > 0.2
    mask[:, 0] = True
    advantages = group_advantage(torch.randint(0, 3, (6, 7)).float(), mask)
    advantages[0] = 0
    loss, stats = clip_loss(log_probs, old, advantages, mask, kl_beta=0.0, clip_epsilon_high=high)
    loss.backward()
    idle = [float((row[real] == 0).float().mean()) for row, real in zip(log_probs.grad, mask, strict=True)]
    assert value(stats["zero_grad_frac"]) == pytest.approx(sum(idle) / 6)
    assert 0.2 < sum(idle) / 6 < 0.9


def test_the_share_of_kl_by_hand():
    advantages = torch.tensor([[1.0, -1.0, 9.0], [0.0, 0.5, 9.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    # Sizes of the advantages: 1 and 0.25 in the groups, 0.625 over them.
    assert value(kl_share(torch.tensor(0.3), advantages, mask)) == pytest.approx(0.3 / 0.925)
    assert value(kl_share(torch.tensor(-0.3), advantages, mask)) == pytest.approx(0.3 / 0.925)  # k1 can be negative
    weighted = kl_share(torch.tensor(0.3), advantages, mask, torch.tensor([3.0, 1.0]))
    assert value(weighted) == pytest.approx(0.3 / (0.3 + 3.25 / 4))
    assert value(kl_share(torch.tensor(0.3), torch.zeros(2, 3), mask)) == pytest.approx(1.0)
    assert value(kl_share(torch.tensor(0.0), torch.zeros(2, 3), mask)) == 0.0


# ---------------------------------------------------------------------- schedules


@pytest.mark.parametrize("row", TABLES["temperature_schedule"], ids=lambda r: f"{r['step']}-of-{r['total']}")
def test_golden_temperature_schedule(row):
    found = rce_temperature(row["step"], row["total"], row["start"], row["end"])
    assert found == pytest.approx(row["value"], abs=1e-9)


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


def test_the_rate_rises_over_the_warm_up_and_then_falls_by_its_schedule():
    rates = [scheduled_lr(0.8, step, 14, schedule="linear", warmup_steps=4) for step in range(14)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, *(0.8 * (1 - i / 10) for i in range(10))])
    half = math.sqrt(0.5)
    rates = [scheduled_lr(2.0, step, 4, schedule="cosine") for step in range(5)]
    assert rates == pytest.approx([2.0, 1 + half, 1.0, 1 - half, 0.0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warm_up_longer_than_the_run_only_rises(schedule):
    rates = [scheduled_lr(1.0, step, 3, schedule=schedule, warmup_steps=10) for step in range(3)]
    assert rates == pytest.approx([0.1, 0.2, 0.3])
