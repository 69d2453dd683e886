"""GRPO's options: the loss by hand, advantages by hand, and that training does with each option what it says.

B groups, G rollouts, S = 2 shots; the world is that of test_training: a rollout is worth how many good candidates it
holds.
"""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from test_loops import GRPO, POOL, QUERIES, RCE, Killed, assert_same_run, data, make, same_state, train, world

from lever_lm.config.schema import GrpoConfig
from lever_lm.training import grpo as training
from lever_lm.training.batches import to_tensors
from lever_lm.training.losses import (
    KL_ESTIMATES,
    SCHEDULES,
    group_mean,
    grpo_loss,
    kl_share,
    scheduled_lr,
    zero_grad_frac,
)
from lever_lm.training.rewards import ADVANTAGE_SCALES, group_advantage, normalize_group
from lever_lm.training.rollouts.file_format import Group, load_groups
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.select_checkpoint import STRATEGIES, choose, epochs_since_best, read_history
from lever_lm.training.validation import group_report
from lever_lm.utils.errors import LeverError, UsageError

NO_RCE = dataclasses.replace(RCE, epochs=0)
LN2 = math.log(2)


def value(tensor):
    return float(tensor.detach())


def options(**changes):
    return dataclasses.replace(GRPO, **changes)


# ---------------------------------------------------------------------- the clip


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "outside"),
    [
        (1.4, 2.0, -2.8, -2.8, 0.0),  # outside 1 + 0.2, inside 1 + 0.5
        (1.6, 2.0, -3.0, 0.0, 1.0),  # clipped at 1.5
        (1.6, -2.0, 3.2, 3.2, 1.0),  # too likely for its reward: not clipped
        (0.7, 2.0, -1.4, -1.4, 1.0),  # too unlikely for its reward: not clipped
        (0.7, -2.0, 1.6, 0.0, 1.0),  # clipped at 0.8: below, the range is as before
        (0.85, -2.0, 1.7, 1.7, 0.0),
    ],
)
def test_a_higher_upper_clip_leaves_the_lower_one_where_it_is(ratio, advantage, loss, gradient, outside):
    log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    terms = (log_probs, torch.zeros(1, 1), torch.tensor([[advantage]]))
    found, metrics = grpo_loss(*terms, kl_beta=0.0, clip_epsilon=0.2, clip_epsilon_high=0.5)
    found.backward()
    assert value(found) == pytest.approx(loss)
    assert float(log_probs.grad) == pytest.approx(gradient, abs=1e-6)
    assert value(metrics["clip_frac"]) == outside


def test_an_upper_clip_that_is_not_given_is_the_lower_one():
    torch.manual_seed(0)
    terms = (torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4))
    plain, same = grpo_loss(*terms, clip_epsilon=0.3), grpo_loss(*terms, clip_epsilon=0.3, clip_epsilon_high=0.3)
    assert value(plain[0]) == value(same[0])
    assert value(plain[0]) != value(grpo_loss(*terms, clip_epsilon=0.3, clip_epsilon_high=0.9)[0])


# ---------------------------------------------------------------------- the KL


@pytest.mark.parametrize(
    ("estimate", "kl", "gradient"),
    # d = log π_ref − log π = log(0.25 / 0.5) = −log 2; its derivative by log π is −1.
    [("k1", LN2, 1.0), ("k2", LN2**2 / 2, LN2), ("k3", 0.5 - 1 + LN2, 1 - 0.5)],
)
def test_kl_estimates_against_a_reference_by_hand(estimate, kl, gradient):
    log_probs = torch.tensor([[math.log(0.5)]], requires_grad=True)
    terms = (log_probs, torch.tensor([[-7.0]]), torch.zeros(1, 1))
    reference = torch.tensor([[math.log(0.25)]])
    loss, metrics = grpo_loss(*terms, kl_beta=2.0, kl_estimate=estimate, ref_log_probs=reference)
    loss.backward()
    assert value(metrics["kl"]) == pytest.approx(kl)
    assert value(loss) == pytest.approx(2 * kl)
    assert float(log_probs.grad) == pytest.approx(2 * gradient)


@pytest.mark.parametrize(
    ("estimate", "kl", "gradient"),
    # d = log π − log π_old = log(0.5 / 0.25) = log 2; its derivative by log π is 1.
    [("k1", -LN2, -1.0), ("k2", LN2**2 / 2, LN2), ("k3", 2 - 1 - LN2, 2 - 1.0)],
)
def test_kl_estimates_without_a_reference_are_those_of_the_ratio(estimate, kl, gradient):
    log_probs = torch.tensor([[math.log(0.5)]], requires_grad=True)
    terms = (log_probs, torch.tensor([[math.log(0.25)]]), torch.zeros(1, 1))
    loss, metrics = grpo_loss(*terms, kl_beta=2.0, kl_estimate=estimate)
    loss.backward()
    assert value(metrics["kl"]) == pytest.approx(kl)
    assert float(log_probs.grad) == pytest.approx(2 * gradient)


def test_the_estimates_mean_what_they_estimate():
    """Over samples of π, k1 and k3 have the mean KL(π ‖ π_ref); near each other k2 has it too."""
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    for reference, estimates in (([0.2, 0.2, 0.6], ("k1", "k3")), ([0.49, 0.31, 0.2], ("k1", "k2", "k3"))):
        gap = torch.tensor(reference, dtype=torch.float64).log() - policy.log()
        exact = float((policy * -gap).sum())
        for estimate in estimates:
            assert float((policy * KL_ESTIMATES[estimate](gap)).sum()) == pytest.approx(exact, rel=0.02), estimate


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("estimate", KL_ESTIMATES)
def test_the_gradient_of_the_whole_loss_is_right(estimate, with_reference):
    torch.manual_seed(3)
    log_probs, old, reference, advantages = (torch.randn(3, 5, dtype=torch.float64) for _ in range(4))
    mask = torch.tensor([[True] * 5, [True, True, False, True, False], [False] * 5])
    weights = torch.tensor([0.3, 2.0, 1.0], dtype=torch.float64)

    def loss(log_probs):
        how = {"kl_estimate": estimate, "ref_log_probs": reference if with_reference else None}
        return grpo_loss(log_probs, old, advantages, mask, clip_epsilon_high=0.4, weights=weights, **how)[0]

    assert torch.autograd.gradcheck(loss, (log_probs.requires_grad_(),))


def test_an_unknown_estimate_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown KL estimate 'k4'; choose one of k1, k2, k3 \(grpo\.kl\)"):
        grpo_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), kl_estimate="k4")


# ---------------------------------------------------------------------- weights of groups


def test_weights_make_every_mean_a_weighted_one():
    ratios = torch.tensor([[1.1, 0.9], [1.5, 1.0], [7.0, 7.0]])
    advantages = torch.tensor([[1.0, -1.0], [2.0, 1.0], [9.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    weights = torch.tensor([3.0, 1.0, 50.0])  # the last group has no rollout, and so no weight either
    loss, metrics = grpo_loss(ratios.log(), torch.zeros(3, 2), advantages, mask, kl_beta=0.5, weights=weights)
    # Within the groups (1.1 − 0.9) / 2 = 0.1, and 1.2 · 2 = 2.4 where the ratio is clipped.
    policy = -(3 * 0.1 + 2.4) / 4
    kls = [(sum(r - 1 - math.log(r) for r in group)) / len(group) for group in ([1.1, 0.9], [1.5])]
    assert value(metrics["ppo_loss"]) == pytest.approx(policy)
    assert value(metrics["kl"]) == pytest.approx((3 * kls[0] + kls[1]) / 4, rel=1e-4)
    assert value(metrics["mean_ratio"]) == pytest.approx((3 * 1.0 + 1.5) / 4)
    assert value(metrics["clip_frac"]) == pytest.approx((3 * 0.0 + 1.0) / 4)
    assert value(loss) == pytest.approx(policy + 0.5 * value(metrics["kl"]))


@pytest.mark.parametrize("weight", [1.0, 0.25, 7.0])
def test_equal_weights_are_no_weights(weight):
    torch.manual_seed(1)
    terms, mask = (torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 5)), torch.rand(4, 5) > 0.3
    plain, weighted = (grpo_loss(*terms, mask, weights=w) for w in (None, torch.full((4,), weight)))
    assert value(plain[0]) == pytest.approx(value(weighted[0]), rel=1e-5)
    for name, metric in plain[1].items():
        assert value(metric) == pytest.approx(value(weighted[1][name]), rel=1e-5), name


def test_a_group_of_weight_zero_gets_no_gradient():
    log_probs = torch.tensor([[0.1, -0.1], [0.2, 0.0]], requires_grad=True)
    terms = (log_probs, torch.zeros(2, 2), torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
    loss, _ = grpo_loss(*terms, weights=torch.tensor([1.0, 0.0]))
    loss.backward()
    alone, _ = grpo_loss(log_probs[:1], torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]))
    assert value(loss) == pytest.approx(value(alone))
    assert log_probs.grad[1].tolist() == [0.0, 0.0]
    assert (log_probs.grad[0] != 0).all()


def test_weights_that_are_all_zero_give_zero_and_no_nan():
    log_probs = torch.tensor([[0.1, -0.1]], requires_grad=True)
    loss, metrics = grpo_loss(log_probs, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), weights=torch.zeros(1))
    loss.backward()
    assert value(loss) == 0.0
    assert log_probs.grad.tolist() == [[0.0, 0.0]]
    assert all(value(metric) == 0.0 for metric in metrics.values())


# ---------------------------------------------------------------------- what the epoch is judged by


def test_the_rollouts_without_gradient_by_hand():
    ratios = torch.tensor([[1.0, 1.3, 0.7, 1.3], [0.7, 1.0, 9.0, 9.0]])
    advantages = torch.tensor([[0.0, 1.0, -1.0, -1.0], [1.0, 2.0, 0.0, 0.0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    # Idle: advantage 0; clipped up with A > 0; clipped down with A < 0. Not: up with A < 0, and all of group 2.
    found = zero_grad_frac(ratios.log(), torch.zeros(2, 4), advantages, mask)
    assert value(found) == pytest.approx((3 / 4 + 0) / 2)
    wider = zero_grad_frac(ratios.log(), torch.zeros(2, 4), advantages, mask, clip_epsilon_high=0.5)
    assert value(wider) == pytest.approx((2 / 4 + 0) / 2)
    weighted = zero_grad_frac(ratios.log(), torch.zeros(2, 4), advantages, mask, weights=torch.tensor([3.0, 1.0]))
    assert value(weighted) == pytest.approx(3 * 0.75 / 4)


@pytest.mark.parametrize("high", [None, 0.05, 0.6])
@pytest.mark.parametrize("seed", range(5))
def test_the_rollouts_without_gradient_are_those_autograd_gives_none(seed, high):
    torch.manual_seed(seed)
    log_probs = (0.4 * torch.randn(6, 7)).requires_grad_()
    old, mask = 0.1 * torch.randn(6, 7), torch.rand(6, 7) > 0.2
    mask[:, 0] = True
    advantages = group_advantage(torch.randint(0, 3, (6, 7)).float(), mask)
    advantages[0] = 0
    clip = {"clip_epsilon": 0.2, "clip_epsilon_high": high}
    grpo_loss(log_probs, old, advantages, mask, kl_beta=0.0, **clip)[0].backward()
    idle = [float((row[real] == 0).float().mean()) for row, real in zip(log_probs.grad, mask, strict=True)]
    found = value(zero_grad_frac(log_probs, old, advantages, mask, **clip))
    assert found == pytest.approx(sum(idle) / 6)
    assert 0.2 < found < 0.9


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


# ---------------------------------------------------------------------- the learning rate


def test_the_rate_rises_over_the_warm_up_and_then_falls_by_its_schedule():
    rates = [scheduled_lr(0.8, step, 14, schedule="linear", warmup_steps=4) for step in range(14)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:] == pytest.approx([0.8 * (1 - i / 10) for i in range(10)])


@pytest.mark.parametrize(("schedule", "half"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_a_schedule_runs_from_the_full_rate_to_its_end(schedule, half):
    rates = [scheduled_lr(2.0, step, 10, schedule=schedule) for step in (0, 5, 10)]
    assert rates == pytest.approx([2.0, 2.0 * half, 2.0 if schedule == "constant" else 0.0])


def test_the_cosine_falls_late_at_first_and_then_fast():
    rates = [scheduled_lr(1.0, step, 4, schedule="cosine") for step in range(5)]
    root = math.sqrt(0.5)
    assert rates == pytest.approx([1.0, (1 + root) / 2, 0.5, (1 - root) / 2, 0.0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warm_up_longer_than_the_run_only_rises(schedule):
    rates = [scheduled_lr(1.0, step, 3, schedule=schedule, warmup_steps=10) for step in range(3)]
    assert rates == pytest.approx([0.1, 0.2, 0.3])


# ---------------------------------------------------------------------- advantages

REWARDS = torch.tensor([[0.0, 1.0, 2.0], [3.0, 5.0, 99.0], [4.0, 4.0, 4.0]])
REAL = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])


def test_scaled_by_the_group_the_advantage_is_in_its_own_spread():
    found = group_advantage(REWARDS, REAL, scale="group")
    half = 1 / math.sqrt(2)
    assert found.flatten().tolist() == pytest.approx([-1.0, 0.0, 1.0, -half, half, 0.0, 0.0, 0.0, 0.0])


def test_scaled_by_the_batch_all_groups_share_one_spread():
    # Real rewards 0 1 2 3 5 4 4 4: mean 23 / 8; squares sum to 87, less 23² / 8, over 7.
    spread = math.sqrt((87 - 23**2 / 8) / 7)
    expected = [-1 / spread, 0.0, 1 / spread, -1 / spread, 1 / spread, 0.0, 0.0, 0.0, 0.0]
    assert group_advantage(REWARDS, REAL, scale="batch").flatten().tolist() == pytest.approx(expected)


def test_scaled_by_nothing_it_is_the_distance_to_the_mean_as_in_dr_grpo():
    found = group_advantage(REWARDS, REAL, scale="none")
    assert found.tolist() == [[-1.0, 0.0, 1.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    near = group_advantage(torch.tensor([[0.0, 0.02]]), scale="none", min_std=0.5)
    assert near[0].tolist() == pytest.approx([-0.01, 0.01])  # there is no floor where nothing is divided


def test_the_floor_and_the_clip_hold_for_the_spread_of_the_batch():
    rewards = torch.tensor([[0.0, 0.02], [0.0, 0.02]])
    assert group_advantage(rewards, scale="batch", min_std=0.1)[0].tolist() == pytest.approx([-0.1, 0.1])
    far = torch.tensor([[0.0, 0.0], [0.0, 40.0]])
    assert group_advantage(far, scale="batch", clip=0.5)[1].tolist() == [-0.5, 0.5]
    assert group_advantage(far, scale="none")[1].tolist() == [-5.0, 5.0]


def test_a_rank_has_no_scale():
    ranks = group_advantage(REWARDS, REAL, method="rank")
    assert ranks.tolist() == [[-1.0, 0.0, 1.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert all(
        torch.equal(group_advantage(REWARDS, REAL, method="rank", scale=scale), ranks) for scale in ADVANTAGE_SCALES
    )


def test_an_unknown_scale_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown advantage scale 'pool'; .*group, batch, none \(grpo\.advantage_sca"):
        group_advantage(torch.zeros(1, 2), scale="pool")


@pytest.mark.parametrize("scale", ADVANTAGE_SCALES)
@pytest.mark.parametrize("method", ["zscore", "rank"])
def test_large_tied_single_and_empty_groups_have_finite_advantages(method, scale):
    rewards = torch.tensor([[1e9, -1e9, 0.0], [1e9, 1e9, 1e9], [1e9, 0.0, 0.0], [0.1, 0.1, 0.1], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True] * 3, [True] * 3, [True, False, False], [True] * 3, [False] * 3])
    found = group_advantage(rewards, mask, method=method, scale=scale)
    assert torch.isfinite(found).all()
    assert found.abs().max() <= 5
    assert found[0, 0] > found[0, 2] > found[0, 1]
    assert found[1:].count_nonzero() == 0


# ---------------------------------------------------------------------- one step of training is the loss by hand


@pytest.fixture(scope="module")
def after_rce(tmp_path_factory):
    """The policy after RCE."""
    return train(tmp_path_factory.mktemp("rce"), RCE, None)[0]


def one_step(folder, after_rce, **changes):
    """The row of a GRPO epoch of a single step that starts at the initial policy's anchor, and grpo_loss's terms."""
    sets = data()
    grpo = options(epochs=1, batch_size=QUERIES, anchor="init", **changes)
    _, rows = train(folder, RCE, grpo, sets=sets)
    batch = sets[0].batch(torch.arange(len(sets[0])))
    with torch.no_grad():
        now, entropy = after_rce.eval().evaluate(batch.query, batch.candidates, batch.sequences)
        start = make().eval().log_prob(batch.query, batch.candidates, batch.sequences)
    return rows[-1], now, start, batch, entropy


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_epsilon_high": 0.6},
        {"clip_epsilon": 0.05},
        {"kl": "k1"},
        {"kl": "k2", "kl_beta": 0.7},
        {"advantage_scale": "batch"},
        {"advantage_scale": "none"},
        {"advantage": "rank"},
        {"entropy_beta": 0.5},
    ],
    ids=lambda changes: "-".join(map(str, itertools.chain(*changes.items()))) or "default",
)
def test_an_epoch_of_one_step_is_the_loss_by_hand(tmp_path, after_rce, changes):
    row, now, start, batch, entropy = one_step(tmp_path, after_rce, **changes)
    chosen = options(**changes)
    advantages = group_advantage(
        batch.rewards, batch.mask, method=chosen.advantage, scale=chosen.advantage_scale, min_std=0.1
    )
    clip = {"clip_epsilon": chosen.clip_epsilon, "clip_epsilon_high": chosen.clip_epsilon_high or None}
    how = {"kl_beta": chosen.kl_beta, "kl_estimate": chosen.kl, "ref_log_probs": start}
    loss, metrics = grpo_loss(now, start, advantages, batch.mask, **clip, **how)
    loss = value(loss) - chosen.entropy_beta * value(group_mean(entropy, batch.mask))
    assert row["train_loss"] == pytest.approx(loss, rel=1e-4)
    for name, metric in metrics.items():
        assert row[name] == pytest.approx(value(metric), rel=1e-4, abs=1e-6), name
    assert row["zero_grad_frac"] == pytest.approx(value(zero_grad_frac(now, start, advantages, batch.mask, **clip)))
    assert row["kl_share"] == pytest.approx(value(kl_share(metrics["kl_loss"], advantages, batch.mask)), rel=1e-4)
    if changes:
        usual = group_advantage(batch.rewards, batch.mask)
        plain, _ = grpo_loss(now, start, usual, batch.mask, kl_beta=0.1, ref_log_probs=start)
        assert row["train_loss"] != pytest.approx(value(plain), rel=1e-3), "the option changes nothing here"


# ---------------------------------------------------------------------- schedule, patience, entropy


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rows_hold_the_rate_of_each_epochs_last_step(tmp_path, schedule):
    grpo = options(epochs=4, schedule=schedule, warmup_steps=2)
    _, rows = train(tmp_path, NO_RCE, grpo)
    # 18 queries in batches of 8: 3 steps an epoch, 12 in all, of which 2 are the warm-up.
    done = [(step - 2) / 10 for step in (2, 5, 8, 11)]
    share = {"constant": lambda d: 1.0, "linear": lambda d: 1 - d, "cosine": lambda d: math.cos(math.pi * d / 2) ** 2}
    assert [row["lr"] for row in rows] == pytest.approx([GRPO.lr * share[schedule](d) for d in done])


def test_a_warm_up_step_moves_the_weights_by_its_own_share(tmp_path):
    grpo = options(epochs=1, batch_size=QUERIES, schedule="linear")
    start, moved = make().state_dict(), []
    for warmup in (0, 10):
        policy, rows = train(tmp_path / str(warmup), NO_RCE, dataclasses.replace(grpo, warmup_steps=warmup))
        moved.append(max(float((policy.state_dict()[n] - start[n]).abs().max()) for n in start))
        assert rows[0]["lr"] == pytest.approx(GRPO.lr / max(warmup, 1))
    assert moved[0] == pytest.approx(10 * moved[1], rel=0.05)  # Adam's first step is as long as the rate


@pytest.mark.parametrize(
    ("schedule", "first", "then", "told"),
    [
        ("linear", 4, 8, "from 0.00025 at the end of epoch 4 to 0.0015 in epoch 5"),  # 1/12, then 12/24
        ("linear", 4, 3, None),
        ("cosine", 4, 8, "from 5.11e-05 at the end of epoch 4 to 0.0015 in epoch 5"),
        ("constant", 4, 8, None),
    ],
)
def test_a_rate_that_jumps_because_epochs_were_raised_is_told_before_it_does(tmp_path, schedule, first, then, told):
    train(tmp_path, NO_RCE, options(epochs=first, schedule=schedule))
    said = []
    _, rows = train(tmp_path, NO_RCE, options(epochs=then, schedule=schedule), say=said.append)
    log = (tmp_path / "train.log").read_text().splitlines()
    notes = [line for line in log if line.startswith("grpo.schedule=")]
    assert notes == [row["note"] for row in rows if "note" in row]
    if told is None:
        assert not notes
        return
    (note,) = notes
    assert note.startswith(f"grpo.schedule={schedule} runs over 8 epochs now")
    assert note.endswith(told)
    assert said.index(note) < min(i for i, line in enumerate(said) if line.split()[0] == "5")
    assert log.index(note) == next(i for i, line in enumerate(log) if line.split()[0] == "5") - 1
    assert rows[4]["note"] == note
    again = []
    train(tmp_path, NO_RCE, options(epochs=then, schedule=schedule), say=again.append)
    assert not any("grpo.schedule" in line for line in again)
    assert (tmp_path / "train.log").read_text().splitlines() == log, "it is kept where it was"


def test_a_schedule_that_runs_over_fewer_epochs_than_before_is_told_too(tmp_path):
    def die_after_two(line):
        if line.split()[0] == "2":
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path, NO_RCE, options(epochs=8, schedule="linear"), say=die_after_two)
    said = []
    train(tmp_path, NO_RCE, options(epochs=4, schedule="linear"), say=said.append)
    # 6 of 24 steps are done, of 12 from now on: 1 − 5/24 of the rate, then 1 − 6/12.
    assert any("at the end of epoch 2 to 0.0015 in epoch 3" in line for line in said)


def test_a_run_with_a_schedule_killed_after_every_epoch_ends_bit_for_bit_where_an_unbroken_one_does(tmp_path):
    changes = {"schedule": "cosine", "warmup_steps": 4, "entropy_beta": 0.1, "kl": "k2", "clip_epsilon_high": 0.4}
    grpo = options(epochs=4, advantage_scale="batch", freeze_backbone=True, **changes)
    train(tmp_path / "whole", RCE, grpo)

    def die_at_a_new_row(line):
        if line.split()[0].isdigit():
            raise Killed

    kills = 0
    while True:
        try:
            train(tmp_path / "broken", RCE, grpo, say=die_at_a_new_row)
            break
        except Killed:
            kills += 1
    assert kills == RCE.epochs + 4
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def flat_validation():
    """Sets whose validation rewards cannot rise: all rollouts of a query are worth the same."""
    groups, features, _ = world()
    tied = [dataclasses.replace(group, rewards=[1.0] * 8) for group in groups[QUERIES * 3 // 4 :]]
    return data([*groups[: QUERIES * 3 // 4], *tied], features)


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_stops_the_run_and_says_so_now_and_when_run_again(tmp_path, patience):
    grpo, said = options(epochs=6, patience=patience), []
    _, rows = train(tmp_path, RCE, grpo, sets=flat_validation(), say=said.append)
    # The first epoch stays the best.
    assert [row["epoch"] for row in rows if row["phase"] == "grpo"] == list(range(1, patience + 2))
    notice = f"stopped early: val_reward has not risen for {patience} epochs (grpo.patience)"
    assert said[-1] == notice
    assert said.count(notice) == 1
    before, again = {path.name: path.read_bytes() for path in tmp_path.iterdir()}, []
    _, after = train(tmp_path, RCE, grpo, sets=flat_validation(), say=again.append)
    assert after == rows
    assert again[-1] == notice
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_patience_or_while_it_gets_better_all_epochs_are_trained(tmp_path):
    for name, patience, sets in (("never", 0, flat_validation()), ("better", 3, data())):
        said = []
        _, rows = train(tmp_path / name, RCE, options(patience=patience), sets=sets, say=said.append)
        assert sum(row["phase"] == "grpo" for row in rows) == GRPO.epochs
        assert not [line for line in said if "stopped early" in line]
    assert epochs_since_best(rows) < 3


@pytest.mark.parametrize(
    ("values", "since"), [([], 0), ([1.0], 0), ([1.0, 2.0], 0), ([2.0, 1.0, 1.5], 2), ([1.0, 2.0, 2.0, 2.0], 2)]
)
def test_epochs_since_the_best_count_from_the_first_of_equals_and_in_grpo_only(values, since):
    rows = [{"phase": "rce", "val_reward": 9.0}, *({"phase": "grpo", "val_reward": v} for v in values)]
    assert epochs_since_best(rows) == since


@pytest.mark.parametrize("seed", [0, 1])
def test_a_bonus_for_entropy_keeps_the_policy_undecided(tmp_path, seed):
    sets = data()
    batch, finals = sets[0].batch(torch.arange(len(sets[0]))), []
    for bonus in (0.0, 1.0):
        grpo = options(epochs=12, entropy_beta=bonus)
        policy, _ = train(tmp_path / str(bonus), RCE, grpo, policy=make(seed=seed), sets=sets)
        with torch.no_grad():
            entropy = policy.eval().evaluate(batch.query, batch.candidates, batch.sequences)[1]
        finals.append(float(entropy.mean()))
    assert finals[0] + 0.08 < finals[1] < math.log(POOL)


# ---------------------------------------------------------------------- the frozen backbone


@pytest.mark.parametrize("changes", [{}, {"dropout": "both"}, {"batch_size": 5, "refresh_every": 1}], ids=str)
def test_features_projected_once_give_what_projecting_in_every_step_gives(tmp_path, monkeypatch, changes):
    grpo = options(freeze_backbone=True, epochs=4, **changes)
    cached, rows = train(tmp_path / "cached", RCE, grpo)
    monkeypatch.setattr(training, "projected", lambda policy, sets: (policy, sets))
    plain, plain_rows = train(tmp_path / "plain", RCE, grpo)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(cached.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name)
    for row, other in zip(rows, plain_rows, strict=True):
        for name in row.keys() - {"phase", "epoch_time", "step_time"}:
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


def test_the_frozen_projections_do_not_move_and_the_checkpoints_hold_them(tmp_path, after_rce):
    policy, _ = train(tmp_path, RCE, options(freeze_backbone=True, weight_decay=0.1))
    held = torch.load(tmp_path / "grpo_epoch6.pt", weights_only=True)["model_state_dict"]
    before, after = after_rce.state_dict(), policy.state_dict()
    for name in before:
        frozen = name in ("input_proj.weight", "query_proj.weight", "cand_proj.weight")
        assert torch.equal(before[name], after[name]) == frozen, name
    assert same_state(held, dict(after))


# ---------------------------------------------------------------------- alarms


def warnings_of(folder, grpo, sets=None, rce=RCE, **shape):
    """What a training says as warnings."""
    said: list[str] = []
    _, rows = train(folder, rce, grpo, sets=sets, say=said.append, **shape)
    return [line for line in said if line.startswith("warning: ")], [row for row in rows if row["phase"] == "grpo"]


def rewarded(rewards, others=None):
    """Sets in which three of four groups get these 8 rewards, and every fourth the others."""
    groups, features, _ = world()
    pairs = [rewards if i % 4 or others is None else others for i in range(len(groups))]
    changed = [dataclasses.replace(group, rewards=own) for group, own in zip(groups, pairs, strict=True)]
    return data(changed, features)


DISTINCT = [i / 4 for i in range(8)]


def test_groups_that_are_all_tied_raise_one_alarm_that_names_the_way_out(tmp_path):
    found, rows = warnings_of(tmp_path, options(kl_beta=0.0), rewarded([1.0] * 8))
    assert [row["zero_grad_frac"] for row in rows] == [1.0] * 6
    assert len(found) == 1
    assert found[0].startswith("warning: grpo epoch 1: the rewards of every group are equal")
    assert "a finer reward.mode" in found[0]


def test_ties_that_the_best_rollouts_make_are_laid_on_top_k(tmp_path):
    rewards = [2.0, 2.0, 2.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    found, rows = warnings_of(tmp_path / "three", options(top_k=(3,), kl_beta=0.0), rewarded(rewards))
    assert rows[0]["frac_reward_zero_std"] == 1.0
    assert len(found) == 1
    assert "every group" in found[0]
    assert "grpo.top_k=[] keeps all rollouts" in found[0]
    most, _ = warnings_of(tmp_path / "most", options(top_k=(3,)), rewarded(rewards, DISTINCT))
    assert len(most) == 1
    assert "in groups of equal rewards: grpo.top_k=[] keeps all rollouts" in most[0]
    assert warnings_of(tmp_path / "all", options(lr=3e-4), rewarded(rewards))[0] == []


def test_mostly_tied_groups_are_told_from_all_tied_ones(tmp_path):
    found, rows = warnings_of(tmp_path, options(), rewarded([1.0] * 8, DISTINCT))
    assert 0.5 < rows[0]["frac_reward_zero_std"] < 1
    assert len(found) == 1
    assert f"{rows[0]['zero_grad_frac']:.0%} of the rollouts have no gradient, most of them in groups of" in found[0]
    assert "rollout.temperatures" in found[0]
    assert "reward.mode" in found[0]


def test_a_loss_that_is_nearly_all_kl_raises_the_alarm_of_its_cause(tmp_path):
    heavy, rows = warnings_of(tmp_path, options(kl_beta=60.0, anchor="init", refresh_every=1, lr=1e-4, epochs=3))
    assert rows[0]["kl_share"] > 0.9
    share = f"{rows[0]['kl_share']:.0%}"
    about_kl = [line for line in heavy if "is KL" in line]
    assert about_kl == [f"warning: grpo epoch 1: {share} of the loss is KL, not reward: lower grpo.kl_beta"]


def test_the_lineages_dropout_and_rising_beta_raise_it_too_and_dropout_is_named(tmp_path):
    classic = {"dropout": "new_only", "adaptive_kl": True, "refresh_every": 0, "reference": "old", "lr": 1e-4}
    # The world is small: with one step an epoch and query, β needs some hundred steps to its ceiling.
    grpo = options(epochs=3, batch_size=1, **classic)
    found, rows = warnings_of(tmp_path, grpo, dropout=0.5, attn_dropout=0.1)
    assert rows[-1]["beta"] > 5
    assert rows[-1]["kl_share"] > 0.9
    about_kl = [line for line in found if "is KL" in line]
    assert len(about_kl) == 1
    assert "grpo.dropout=both" in about_kl[0]


def test_an_old_policy_that_never_comes_along_clips_and_the_option_is_named(tmp_path):
    stale, rows = warnings_of(tmp_path / "never", options(refresh_every=0, lr=2e-2, epochs=10, kl_beta=0.0))
    assert max(row["zero_grad_frac"] for row in rows) > 0.5
    assert len(stale) == 1
    assert "of the ratios lie outside the clip range" in stale[0]
    assert stale[0].endswith("of the rollouts have no gradient: set grpo.refresh_every=5")
    late, _ = warnings_of(tmp_path / "late", options(refresh_every=9, lr=2e-2, epochs=10, kl_beta=0.0))
    assert len(late) == 1
    assert late[0].endswith("lower grpo.refresh_every or grpo.lr")
    wild, _ = warnings_of(tmp_path / "wild", options(refresh_every=1, lr=0.5, epochs=3, batch_size=2, kl_beta=0.0))
    assert [line for line in wild if line.endswith(": lower grpo.lr")] == wild[:1]


def test_a_kl_that_is_no_penalty_is_named(tmp_path):
    found, rows = warnings_of(tmp_path, options(kl="k1", kl_beta=1.0, epochs=6))
    assert min(row["kl"] for row in rows) < 0
    assert any("grpo.kl=k3" in line for line in found)
    with pytest.raises(UsageError, match=r"grpo\.kl=k1"):
        options(kl="k1", adaptive_kl=True)


def test_a_warning_is_kept_in_the_metrics_and_the_log_and_a_resumed_run_writes_the_same(tmp_path):
    for name, epochs in (("once", (4,)), ("twice", (2, 4))):
        for count in epochs:
            warnings_of(tmp_path / name, options(epochs=count), rewarded([1.0] * 8))
    once, twice = ((tmp_path / name / "train.log").read_text() for name in ("once", "twice"))
    assert once == twice
    assert once.count("warning: grpo epoch 1: the rewards of every group are equal") == 1
    rows = [json.loads(line) for line in (tmp_path / "once" / "metrics.jsonl").read_text().splitlines()]
    assert all("equal" in row["warnings"]["tied"] for row in rows if row["phase"] == "grpo")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_grad_norm", 0.0),
        ("advantage_clip", -1.0),
        ("advantage_min_std", -0.1),
        ("clip_epsilon", 1.0),
        ("warmup_steps", -1),
        ("patience", -1),
        ("entropy_beta", -0.1),
        ("clip_epsilon_high", -0.1),
        ("online_samples", 1),
        ("online_every", 0),
        ("online_ratio", 0.0),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(option, value):
    with pytest.raises(UsageError, match=rf"grpo\.{option} .*{value}"):
        options(**{option: value})


def test_a_warm_up_longer_than_the_training_is_said(tmp_path):
    said = []
    train(tmp_path, RCE, options(epochs=2, warmup_steps=100), say=said.append)
    assert any("grpo.warmup_steps 100 outlast all" in line for line in said)


def test_different_alarms_are_each_raised_once(tmp_path):
    found, _ = warnings_of(tmp_path, options(kl_beta=60.0, anchor="init", lr=1e-4), rewarded([1.0] * 8))
    assert sorted("KL" in line for line in found) == [False, True]


def test_a_healthy_run_raises_none(tmp_path):
    found, rows = warnings_of(tmp_path, options(epochs=10, lr=3e-4))
    assert found == []
    assert rows[-1]["val_reward"] > rows[0]["val_reward"]
    assert max(row["zero_grad_frac"] for row in rows) < 0.5


def test_every_epoch_says_what_it_had_to_learn_from(tmp_path):
    said: list[str] = []
    _, rows = train(tmp_path, RCE, options(epochs=2), say=said.append)
    row = rows[-1]
    sentence = (
        f"groups skipped {row['groups_skipped']} of 18, rollouts without gradient {100 * row['zero_grad_frac']:.0f}%, "
        f"clipped {100 * row['clip_frac']:.0f}%, entropy {row['entropy']:.2f}, gradient norm {row['grad_norm']:.2g}, "
        f"val_reward {row['val_reward']:.4f}"
    )
    assert group_report(row, 18).strip() == sentence
    assert [line for line in said if "groups skipped" in line][-1] == group_report(row, 18)
    assert sum("groups skipped" in line for line in said) == 2


# ---------------------------------------------------------------------- the choice of an epoch


def test_the_reward_of_the_top_rollout_chooses_its_own_epoch(tmp_path):
    values = {"val_reward": [0.2, 0.9, 0.5], "val_top_reward": [0.7, 0.3, 0.8]}
    rows = [
        {"phase": "grpo", "epoch": i + 1, "val_loss": 1.0 - i, **{name: values[name][i] for name in values}}
        for i in range(3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = RunFolder(tmp_path)
    answers = {name: choose(read_history(run, None), name, run) for name in ("val_loss", *values)}
    assert {name: answer["epoch"] for name, answer in answers.items()} == {
        "val_loss": 3,
        "val_reward": 2,
        "val_top_reward": 3,
    }
    assert answers["val_top_reward"]["why"] == "largest validation reward of the top-ranked rollout"
    assert answers["val_reward"]["others"].keys() == STRATEGIES.keys() - {"val_reward"}
    assert answers["val_reward"]["others"]["val_top_reward"] == 3


def test_the_command_takes_that_strategy(lever, tmp_path):
    _, rows = train(tmp_path / "run", NO_RCE, GRPO)
    done = lever("best-ckpt", tmp_path / "run", "--strategy", "val_top_reward", "--json")
    tops = [row["val_top_reward"] for row in rows]
    assert done.status == 0, done.err
    assert done.json["epoch"] == tops.index(max(tops)) + 1
    assert done.json["exists"]


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["vqa_acc_score", "infoscore"])
def test_a_score_that_is_not_finite_is_refused_with_its_query_and_trajectory(tmp_path, field, number):
    good = {"pointer": [0, 1], "pointer_global": [4, 5], "vqa_acc_score": 0.5}
    content = {"7": {"candidate_pool_ids": [4, 5, 6], "pointer_candidates": [good, {**good, field: 123454321}]}}
    path = tmp_path / "rl_data.json"
    path.write_text(json.dumps(content).replace("123454321", number))
    with pytest.raises(LeverError, match=rf"rl_data\.json, query 7, trajectory 1: {field} is -?(nan|inf), expected a"):
        load_groups(path)


def broken(what):
    groups, features, _ = world()
    few = [[dataclasses.replace(g, sequences=g.sequences[:1], rewards=g.rewards[:1]) for g in groups], features]
    odd = {
        "groups of one": few[0],
        "all tied": [dataclasses.replace(g, rewards=[0.3] * 8) for g in groups],
        "rewards of 1e9": [dataclasses.replace(g, rewards=[(-1.0) ** i * 1e9 for i in range(8)]) for g in groups],
        "a single candidate for two shots": [Group(g.query_id, g.pool[:1], [[0, 0]] * 2, [0.0, 1.0]) for g in groups],
        "one position twice": [dataclasses.replace(g, sequences=[[1, 1], *g.sequences[1:]]) for g in groups],
        "the same sequence many times": [dataclasses.replace(g, sequences=[[2, 3]] * 8) for g in groups],
    }
    return data(odd[what], features)


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize(
    "what",
    [
        "groups of one",
        "all tied",
        "rewards of 1e9",
        "a single candidate for two shots",
        "one position twice",
        "the same sequence many times",
    ],
)
def test_odd_groups_never_make_a_weight_nan(tmp_path, what, scale):
    grpo = options(epochs=3, advantage_scale=scale, entropy_beta=0.01)
    policy, rows = train(tmp_path, dataclasses.replace(RCE, epochs=2), grpo, sets=broken(what))
    assert all(torch.isfinite(tensor).all() for tensor in policy.state_dict().values())
    assert len(rows) == 5
    assert all(math.isfinite(number) for row in rows for number in row.values() if isinstance(number, float))


def test_normalised_rewards_of_1e9_stay_finite():
    rewards = torch.tensor([[1e9, -1e9, 0.0], [1e9, 1e9, 1e9]])
    for method in ("none", "zscore", "rank"):
        assert torch.isfinite(normalize_group(rewards, torch.ones(2, 3, dtype=torch.bool), method=method)).all()


def rollout_file(path, correct):
    """A file with a query for every number in `correct`: how its two rollouts were answered."""
    path.write_text(
        json.dumps(
            {
                str(query): {
                    "candidate_pool_ids": [8, 9],
                    "pointer_candidates": [
                        {"pointer": [i], "pointer_global": [8 + i], "vqa_correct": c, "vqa_acc_score": c / 2}
                        for i, c in enumerate(pair)
                    ],
                }
                for query, pair in enumerate(correct)
            }
        )
    )
    return path


@pytest.mark.parametrize(
    ("correct", "flags", "left"),
    [
        ([(1, 0)] * 4 + [(0, 0)], ["--set", "reward.require_positive=true"], "4 training and 0 validation"),
        ([(0, 0)] * 4 + [(1, 0)], ["--set", "reward.require_positive=true"], "0 training and 1 validation"),
        ([(1, 0)], [], "0 training and 1 validation"),
    ],
)
def test_an_empty_split_is_refused_with_what_is_left_and_what_to_relax(lever, tmp_path, correct, flags, left):
    torch.save(torch.randn(10, 8), tmp_path / "features.pt")
    file = rollout_file(tmp_path / "rl_data.json", correct)
    done = lever("train", "--rl-data", file, "--embeddings", tmp_path / "features.pt", *flags)
    assert done.status == 1
    assert f"rl_data.json: {left} groups are left after filtering; both are needed" in done.err
    assert "reward.require_positive" in done.err
    assert not list(tmp_path.rglob("*_epoch*.pt"))


@pytest.mark.parametrize(
    "changes",
    [{"schedule": "step"}, {"kl": "k4"}, {"advantage_scale": "pool"}, {"patience": -1}, {"entropy_beta": -0.1}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_config_that_cannot_be_is_refused_with_its_key(changes):
    with pytest.raises(UsageError, match=f"grpo.{next(iter(changes))}"):
        GrpoConfig(**changes)


def test_a_padded_group_learns_what_it_learns_alone(tmp_path):
    groups, features, _ = world()
    short = [dataclasses.replace(g, sequences=g.sequences[:3], rewards=g.rewards[:3]) for g in groups]
    wide = to_tensors(short, features, features)
    padded = dataclasses.replace(
        wide,
        sequences=torch.cat([wide.sequences, torch.full((QUERIES, 4, 2), -1)], 1),
        mask=torch.cat([wide.mask, torch.zeros(QUERIES, 4, dtype=torch.bool)], 1),
        rewards=torch.cat([wide.rewards, torch.full((QUERIES, 4), 1e9)], 1),
    )
    grpo = options(epochs=2, advantage_scale="batch", entropy_beta=0.1, kl="k2", clip_epsilon_high=0.5)
    one, other = (train(tmp_path / str(len(s.mask[0])), RCE, grpo, sets=(s, wide))[0] for s in (wide, padded))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=1e-5, msg=name)
