"""Rewards against the lineage's table, advantages by hand. Groups: (B, G)."""

import json
import math

import pytest
import torch
from helpers import CHECKOUT
from hypothesis import given
from hypothesis import strategies as st

from lever_lm.training.rewards import (
    ADVANTAGE_SCALES,
    REWARD_MODES,
    group_advantage,
    group_mean_std,
    normalize_group,
    reward,
    tied_groups,
)

TABLES = json.loads((CHECKOUT / "tests/data" / "tables.json").read_text(encoding="utf-8"))
ROWS = [dict(zip(TABLES["reward"]["columns"], row, strict=True)) for row in TABLES["reward"]["rows"]]
ARGUMENTS = {
    "vqa_correct": "correct",
    "vqa_acc_score": "accuracy",
    "vqa_gt_prob": "gt_prob",
    "vqa_rel_score": "relevance",
}


def arguments(row):
    return {ARGUMENTS.get(name, name): value for name, value in row.items() if name not in ("reward_mode", "reward")}


# ---------------------------------------------------------------------- rewards


OURS = {"infoscore", "task"}  # the lineage has no such modes


@pytest.mark.parametrize("mode", sorted({*REWARD_MODES, "legacy"} - OURS))
def test_golden_rewards(mode):
    rows = [row for row in ROWS if row["reward_mode"] == mode]
    wrong = [
        (row, found)
        for row in rows
        if (found := reward(mode, **arguments(row))) != pytest.approx(row["reward"], abs=1e-9)
    ]
    assert len(rows) >= 100
    assert not wrong, f"{len(wrong)} of {len(rows)}, the first: {wrong[0]}"


@pytest.mark.parametrize(
    "row", [row for row in ROWS if isinstance(row["reward"], dict)], ids=lambda r: r["reward_mode"]
)
def test_golden_errors(row):
    assert row["reward"] == {"error": "ValueError"}
    with pytest.raises(ValueError, match=f"unknown reward mode '{row['reward_mode']}'; choose one of hard_plus_soft"):
        reward(row["reward_mode"], **arguments(row))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("hard_plus_soft", 2.0 * 1 + 3.0 * 0.6),
        ("hard_plus_soft_v2", 5.0),  # 4 + 1.8, cut to 5
        ("separated", 5.0),
        ("hard_only", 2.0),
        ("soft_only", 3.0 * 0.6),
        ("hard01_plus_gtprob", 2.0 + 3.0 * 0.5),
        ("hard01_plus_gtprob_separated", 5.0),
        ("hard_plus_gtprob_plus_rel", 2.0 + 3.0 * 0.5),
        ("task", 3.0 * 0.6),
    ],
)
def test_rewards_by_hand(mode, expected):
    scores = {"correct": 1, "accuracy": 0.6, "gt_prob": 0.5, "relevance": 0.4}
    assert reward(mode, **scores, hard_weight=2.0, soft_weight=3.0, rel_weight=0.2) == pytest.approx(expected)


def test_relevance_counts_for_wrong_answers_only():
    assert reward("hard_plus_gtprob_plus_rel", correct=0, gt_prob=0.0, relevance=0.5) == pytest.approx(0.05)
    assert reward("hard_plus_gtprob_plus_rel", correct=1, gt_prob=0.0, relevance=0.5) == 1.0


@pytest.mark.parametrize(("weight", "expected"), [(100.0, 5.0), (-100.0, -5.0)])
def test_rewards_are_cut_to_plus_minus_five(weight, expected):
    assert reward("hard_only", correct=1, hard_weight=weight) == expected


@pytest.mark.parametrize("mode", [*REWARD_MODES, "legacy"])
def test_missing_scores_count_as_zero(mode):
    assert reward(mode) == 0.0


def test_legacy_prefers_correctness_then_accuracy_then_nothing():
    assert reward("legacy", correct=0, accuracy=0.9, correctness_mode="pm1") == -1.0
    assert reward("legacy", accuracy=0.9, correctness_mode="pm1") == pytest.approx(0.8)
    assert reward("legacy", correctness_mode="pm1") == 0.0


def test_legacy_quality_is_the_log_prob_where_asked_for_else_the_beam_score():
    scores = {"alpha": 1.0, "beta": 0.0, "beam_score": 0.5, "logprob_score": -2.0}
    assert reward("legacy", **scores) == 0.5
    assert reward("legacy", **scores, use_logprob=True) == 2.0
    assert reward("legacy", alpha=1.0, beta=0.0, beam_score=0.5, use_logprob=True) == 0.5


# ---------------------------------------------------------------------- within a group


@pytest.mark.parametrize("row", TABLES["group_normalise"], ids=range(len(TABLES["group_normalise"])))
def test_golden_group_normalisation(row):
    rewards = torch.tensor([row["rewards"]])
    mask = torch.ones_like(rewards, dtype=torch.bool)

    def close(found, expected):
        torch.testing.assert_close(found[0], torch.tensor(expected), rtol=1e-4, atol=1e-5)

    close(normalize_group(rewards, mask, method="zscore"), row["z_score_clamp"])
    close(normalize_group(rewards, mask, method="zscore", clip=100.0), row["z_score"])
    assert normalize_group(rewards, mask) is rewards
    if len(set(row["rewards"])) == len(row["rewards"]):  # the lineage ranks equals in no particular order
        close(normalize_group(rewards, mask, method="rank"), row["rank_normalize"])
    if len(row["rewards"]) > 1:  # its z-score of a single rollout is NaN, ours 0
        # Near-equal rewards are blown up by the lineage; without our floor they agree.
        advantage = group_advantage(rewards, min_std=0.0)
        close(advantage, row["group_relative_advantage_util"])


def test_advantage_by_hand():
    # Mean 1, squares 1 + 0 + 1 over n − 1 = 2: std 1.
    assert group_advantage(torch.tensor([[0.0, 1.0, 2.0]]))[0].tolist() == pytest.approx([-1.0, 0.0, 1.0])


def test_advantage_of_a_padded_group_is_that_of_its_real_rollouts():
    rewards = torch.tensor([[0.0, 1.0, 2.0, 99.0], [3.0, 3.0, 0.0, torch.nan]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, False]])
    # Second group: mean 2, squares 1 + 1 + 4 over 2: std √3.
    found = group_advantage(rewards, mask)
    root = math.sqrt(3)
    assert found[0].tolist() == pytest.approx([-1.0, 0.0, 1.0, 0.0])
    assert found[1].tolist() == pytest.approx([1 / root, 1 / root, -2 / root, 0.0])


def test_the_floor_under_the_spread_keeps_near_ties_small():
    # Mean 0.01, std 0.0141: under the floor of 0.1.
    found = group_advantage(torch.tensor([[0.0, 0.02]]))
    assert found[0].tolist() == pytest.approx([-0.1, 0.1])
    assert group_advantage(torch.tensor([[0.0, 0.02]]), min_std=0.5)[0].tolist() == pytest.approx([-0.02, 0.02])


def test_advantages_are_clipped():
    rewards = torch.tensor([[0.0] * 99 + [1.0]])  # the one stands (0.99 / 0.1) = 9.9 over the floor
    found = group_advantage(rewards)
    assert float(found.max()) == 5.0
    assert float(group_advantage(rewards, clip=2.0).max()) == 2.0


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
    near, far = torch.tensor([[0.0, 0.02], [0.0, 0.02]]), torch.tensor([[0.0, 0.0], [0.0, 40.0]])
    assert group_advantage(near, scale="batch", min_std=0.1)[0].tolist() == pytest.approx([-0.1, 0.1])
    assert group_advantage(far, scale="batch", clip=0.5)[1].tolist() == [-0.5, 0.5]


def test_scaled_by_nothing_it_is_the_distance_to_the_mean_as_in_dr_grpo():
    found = group_advantage(REWARDS, REAL, scale="none")
    assert found.tolist() == [[-1.0, 0.0, 1.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    near = group_advantage(torch.tensor([[0.0, 0.02]]), scale="none", min_std=0.5)
    assert near[0].tolist() == pytest.approx([-0.01, 0.01])  # there is no floor where nothing is divided
    assert group_advantage(torch.tensor([[0.0, 40.0]]), scale="none")[0].tolist() == [-5.0, 5.0]


@pytest.mark.parametrize("scale", ADVANTAGE_SCALES)
def test_a_rank_has_no_scale(scale):
    ranks = group_advantage(REWARDS, REAL, method="rank", scale=scale)
    assert ranks.tolist() == [[-1.0, 0.0, 1.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("scale", ADVANTAGE_SCALES)
@pytest.mark.parametrize("method", ["zscore", "rank"])
def test_a_group_of_one_a_tied_group_and_an_empty_group_have_no_advantage(method, scale):
    rewards = torch.tensor([[1e9, -1e9, 0.0], [1e9, 1e9, 1e9], [2.0, 0.0, 0.0], [0.1, 0.1, 0.1], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True] * 3, [True] * 3, [True, False, False], [True] * 3, [False] * 3])
    found = group_advantage(rewards, mask, method=method, scale=scale)
    assert torch.isfinite(found).all()
    assert 5 >= found[0, 0] > found[0, 2] > found[0, 1] >= -5
    assert found[1:].count_nonzero() == 0


def test_rank_runs_from_one_to_minus_one_and_equals_share_theirs():
    found = group_advantage(torch.tensor([[5.0, 1.0, 3.0], [2.0, 0.0, 2.0]]), method="rank")
    # The two best of the second group share ranks 0 and 1: 1 − 2 · 0.5 / 2 = 0.5.
    assert found.tolist() == [[1.0, -1.0, 0.0], [0.5, -1.0, 0.5]]


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=8), st.integers(0, 4))
def test_padding_a_group_never_changes_its_advantages(rewards, padding):
    plain = torch.tensor([rewards])
    padded = torch.tensor([[*rewards, *[7.0] * padding]])
    mask = torch.tensor([[True] * len(rewards) + [False] * padding])
    for method in ("zscore", "rank"):
        found = group_advantage(padded, mask, method=method)
        torch.testing.assert_close(
            found[:, : len(rewards)], group_advantage(plain, method=method), rtol=1e-4, atol=1e-4
        )
        assert (found[:, len(rewards) :] == 0).all()
        assert torch.isfinite(found).all()
        assert abs(float(found.sum())) < 1e-3 or float(found.abs().max()) >= 5


def test_mean_and_spread_of_the_real_rollouts():
    mean, std = group_mean_std(
        torch.tensor([[1.0, 3.0, 50.0], [4.0, 50.0, 50.0]]),
        torch.tensor([[True, True, False], [True, False, False]]),
    )
    assert mean.tolist() == [[2.0], [4.0]]
    assert std[:, 0].tolist() == pytest.approx([math.sqrt(2), 0.0])


def test_tied_groups():
    rewards = torch.tensor([[1.0, 1.0, 5.0], [1.0, 1.0, 5.0], [1.0, 5.0, 5.0]])
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    assert tied_groups(rewards, mask).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("function", "option", "key"),
    [
        (group_advantage, "method", "grpo.advantage"),
        (group_advantage, "scale", "grpo.advantage_scale"),
        (normalize_group, "method", "rce.normalize"),
    ],
)
def test_an_unknown_method_is_refused_with_the_known_ones_and_the_key(function, option, key):
    with pytest.raises(ValueError, match=rf"'best'.*\({key}\)"):
        function(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), **{option: "best"})


@pytest.mark.parametrize("scores", [{"accuracy": float("nan")}, {"gt_prob": float("inf"), "soft_weight": 0.0}])
def test_a_reward_that_is_no_number_is_refused_and_not_clipped_to_the_best(scores):
    with pytest.raises(ValueError, match="the reward is NaN"):
        reward("hard_plus_soft" if "accuracy" in scores else "hard01_plus_gtprob", correct=1, **scores)
