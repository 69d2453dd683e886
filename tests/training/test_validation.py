"""What an epoch is judged by: validation and group statistics by hand, and the warnings that they raise."""

import dataclasses
import json
import math

import pytest
import torch
from worlds import DIM, GRPO, POOL, RCE, TRAIN, data, make, train, with_groups, world

from lever_lm.training import validation
from lever_lm.training.batches import to_tensors
from lever_lm.training.finite_checks import At
from lever_lm.training.rewards import group_advantage
from lever_lm.training.rollouts.file_format import Group
from lever_lm.training.validation import group_report, group_statistics, validate

AT = At("rce", 1)


def crowded(count=40):
    """Groups whose pools name each of 12 examples many times over."""
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(12, DIM, generator=generator)
    pools = [torch.randperm(12, generator=generator)[:POOL].tolist() for _ in range(count)]
    groups = [Group(i % 12, pool, [[0, 1], [2, 3], [5, 4]], [1.0, i % 3, 0.5]) for i, pool in enumerate(pools)]
    return to_tensors(groups, features, features)


def two_groups():
    """Two groups of other sizes, and the features."""
    groups, features, _ = world()
    short = dataclasses.replace(groups[1], sequences=groups[1].sequences[:3], rewards=[2.0, 1.0, 0.5])
    return [groups[0], short], features


def test_validation_by_hand():
    policy, (groups, features) = make().eval(), two_groups()
    found = validate(policy, to_tensors(groups, features, features), 0.5, AT)
    losses, rewards, tops, entropies = [], [], [], []
    for group in groups:
        query, candidates = features[group.query_id][None], features[group.pool][None]
        with torch.no_grad():
            log_probs = policy.log_prob(query, candidates, torch.tensor([group.sequences]))[0].tolist()
            first = policy.logits(query, candidates, torch.tensor([[0]]))[0, 0].softmax(-1).tolist()
        weights = [math.exp(value) for value in log_probs]
        rewards.append(sum(w * r for w, r in zip(weights, group.rewards, strict=True)) / sum(weights))
        tops.append(group.rewards[log_probs.index(max(log_probs))])
        shares = [math.exp(r / 0.5) for r in group.rewards]
        losses.append(-sum(s * v for s, v in zip(shares, log_probs, strict=True)) / sum(shares))
        entropies.append(-sum(p * math.log(p) for p in first))
    assert found == {
        "val_loss": pytest.approx(sum(losses) / 2, rel=1e-5),
        "val_reward": pytest.approx(sum(rewards) / 2, rel=1e-5),
        "val_top_reward": pytest.approx(sum(tops) / 2),
        "entropy": pytest.approx(sum(entropies) / 2, rel=1e-4),
    }


def test_validation_does_not_depend_on_padding_or_dropout():
    groups, features = two_groups()
    policy = make(dropout=0.5, attn_dropout=0.5).train()
    together = validate(policy, to_tensors(groups, features, features), 0.5, AT)
    alone = [validate(policy, to_tensors([group], features, features), 0.5, AT) for group in groups]
    for name, value in together.items():
        assert value == pytest.approx((alone[0][name] + alone[1][name]) / 2, rel=1e-4), name


@pytest.mark.parametrize("state_update", ["none", "gate"])
def test_validation_is_the_same_where_features_are_projected_once(monkeypatch, state_update):
    sets, policy = crowded(), make(state_update=state_update)
    found = validate(policy, sets, 0.5, AT)
    made = []
    monkeypatch.setattr(validation, "projected", lambda *both: made.append(both) or both)
    assert validate(policy, sets, 0.5, AT) == {name: pytest.approx(value, rel=1e-5) for name, value in found.items()}
    assert made  # there they were projected once
    made.clear()
    validate(policy, data()[1], 0.5, AT)
    assert not made  # each example stands in one pool: it would be projected once in any case


def test_group_statistics_by_hand():
    features = torch.eye(4)
    groups = [
        Group(0, [0, 1, 2], [[0], [1], [2]], [0.0, 1.0, 2.0]),  # std 1, advantages −1, 0, 1
        Group(1, [0, 1, 2], [[0], [1]], [0.5, 0.5]),  # tied
    ]
    sets = to_tensors(groups, features, features)
    found = group_statistics(sets.rewards, sets.mask, group_advantage(sets.rewards, sets.mask))
    assert found == {
        "adv_std": pytest.approx(0.5),
        "adv_max": pytest.approx(0.5),
        "reward": pytest.approx(4.0 / 5),
        "reward_std": pytest.approx(0.5),
        "frac_reward_zero_std": 0.5,
        "groups_skipped": 1,
    }


# ---------------------------------------------------------------------- warnings


def warnings_of(folder, sets=None, shape=None, **options):
    """The warnings of a training with these options of GRPO, and its rows of GRPO."""
    said: list[str] = []
    grpo = dataclasses.replace(GRPO, **{"epochs": 2, **options})
    tell = {"say": said.append, "answer": lambda sequences: torch.ones(sequences.shape[:2])}
    _, rows = train(folder, dataclasses.replace(RCE, epochs=1), grpo, sets=sets, **tell, **(shape or {}))
    return [line for line in said if line.startswith("warning: ")], [row for row in rows if row["phase"] == "grpo"]


def rewarded(rewards, others=None):
    """Sets in which three of four groups get these 8 rewards, and every fourth the others."""
    return with_groups(
        lambda group: dataclasses.replace(group, rewards=rewards if group.query_id % 4 else others or rewards)
    )


TIED, DISTINCT, TOP_TIED = [1.0] * 8, [i / 4 for i in range(8)], [2.0, 2.0, 2.0, 0.0, 1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("rewards", "others", "options", "why", "mend"),
    [
        (TIED, None, {}, "the rewards of every group are equal", "a finer reward.mode"),
        (TIED, None, {"online": True}, "the rewards of every group are equal", "raise grpo.online_samples"),
        (TOP_TIED, None, {"top_k": (3,)}, "the rewards of every group are equal", "grpo.top_k=[]"),
        (TOP_TIED, DISTINCT, {"top_k": (3,)}, "most of them in groups of equal rewards", "grpo.top_k=[]"),
        (TIED, DISTINCT, {}, "most of them in groups of equal rewards", "rollout.temperatures"),
    ],
)
def test_ties_raise_one_warning_that_names_the_way_out(tmp_path, rewards, others, options, why, mend):
    found, rows = warnings_of(tmp_path, rewarded(rewards, others), kl_beta=0.0, **options)
    assert len(found) == 1
    assert found[0].startswith("warning: grpo epoch 1: ")
    assert why in found[0]
    assert mend in found[0]
    tied = rows[0]["frac_reward_zero_std"]
    assert (tied == 1.0) == ("every group" in why)
    assert tied > 0.5


def test_a_loss_that_is_nearly_all_kl_raises_the_alarm_of_its_cause(tmp_path):
    found, rows = warnings_of(tmp_path, rewarded(TIED), kl_beta=60.0, anchor="init", refresh_every=1, lr=1e-4)
    assert rows[0]["kl_share"] > 0.9
    assert sorted("is KL" in line for line in found) == [False, True]  # each kind once
    assert any(line.endswith("lower grpo.kl_beta") for line in found)


def test_the_lineages_dropout_and_rising_beta_raise_it_too_and_dropout_is_named(tmp_path):
    classic = {"dropout": "new_only", "adaptive_kl": True, "refresh_every": 0, "reference": "old", "lr": 1e-4}
    shape = {"dropout": 0.5, "attn_dropout": 0.1}
    # The world is small: with one step an epoch and query, β needs some hundred steps to its ceiling.
    found, rows = warnings_of(tmp_path, shape=shape, epochs=3, batch_size=1, **classic)
    assert rows[-1]["beta"] > 5
    assert rows[-1]["kl_share"] > 0.9
    assert sum("is KL" in line and "grpo.dropout=both" in line for line in found) == 1


@pytest.mark.parametrize(
    ("options", "mend"),
    [
        ({"refresh_every": 0, "lr": 2e-2, "epochs": 10}, "set grpo.refresh_every=5"),
        ({"refresh_every": 9, "lr": 2e-2, "epochs": 9}, "lower grpo.refresh_every or grpo.lr"),
        ({"refresh_every": 1, "lr": 0.5, "batch_size": 2}, "lower grpo.lr"),
    ],
)
def test_an_old_policy_that_never_comes_along_clips_and_the_option_is_named(tmp_path, options, mend):
    found, rows = warnings_of(tmp_path, kl_beta=0.0, **options)
    assert max(row["zero_grad_frac"] for row in rows) > 0.5
    assert "of the ratios lie outside the clip range" in found[0]
    assert found[0].endswith(f": {mend}")


def test_a_kl_that_is_no_penalty_is_named(tmp_path):
    found, rows = warnings_of(tmp_path, kl="k1", kl_beta=1.0, epochs=6)
    assert min(row["kl"] for row in rows) < 0
    assert any("grpo.kl=k3" in line for line in found)


def test_a_warning_is_kept_in_the_metrics_and_the_log_and_a_resumed_run_writes_the_same(tmp_path):
    for name, epochs in (("once", (3,)), ("twice", (1, 3))):
        for count in epochs:
            warnings_of(tmp_path / name, rewarded(TIED), epochs=count)
    once, twice = ((tmp_path / name / "train.log").read_text() for name in ("once", "twice"))
    assert once == twice
    assert once.count("warning: grpo epoch 1: the rewards of every group are equal") == 1
    rows = [json.loads(line) for line in (tmp_path / "once" / "metrics.jsonl").read_text().splitlines()]
    assert all("equal" in row["warnings"]["tied"] for row in rows if row["phase"] == "grpo")


def test_a_healthy_run_raises_none(tmp_path):
    found, rows = warnings_of(tmp_path, epochs=10, lr=3e-4)
    assert found == []
    assert rows[-1]["val_reward"] > rows[0]["val_reward"]
    assert max(row["zero_grad_frac"] for row in rows) < 0.5


def test_every_epoch_says_what_it_had_to_learn_from(tmp_path):
    said: list[str] = []
    _, rows = train(tmp_path, RCE, dataclasses.replace(GRPO, epochs=2), say=said.append)
    row = rows[-1]
    sentence = (
        f"groups skipped {row['groups_skipped']} of {TRAIN}, rollouts without gradient "
        f"{100 * row['zero_grad_frac']:.0f}%, clipped {100 * row['clip_frac']:.0f}%, entropy {row['entropy']:.2f}, "
        f"gradient norm {row['grad_norm']:.2g}, val_reward {row['val_reward']:.4f}"
    )
    assert group_report(row, TRAIN).strip() == sentence
    assert [line for line in said if "groups skipped" in line][-1] == group_report(row, TRAIN)
    assert sum("groups skipped" in line for line in said) == 2
