"""GRPO on small synthetic groups: it learns, does with each option what it says, and a killed run ends where it would
have.

B groups, G rollouts, S = 2 shots.
"""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from worlds import (
    GRPO,
    POOL,
    QUERIES,
    RCE,
    TRAIN,
    Killed,
    Mortal,
    assert_same_run,
    data,
    die_at_a_new_row,
    expected_reward,
    make,
    same_state,
    train,
    until_it_ends,
    with_groups,
    world,
)

from lever_lm.config.schema import Config, GrpoConfig
from lever_lm.training import grpo as training
from lever_lm.training.batches import to_tensors
from lever_lm.training.finite_checks import At
from lever_lm.training.grpo import best_rollouts
from lever_lm.training.losses import LOSSES, SCHEDULES, group_mean
from lever_lm.training.reference_policy import FrozenPolicy, snapshot
from lever_lm.training.rewards import group_advantage
from lever_lm.training.rollouts.file_format import Group
from lever_lm.training.select_checkpoint import epochs_since_best
from lever_lm.training.stages import check_names
from lever_lm.utils.errors import UsageError
from lever_lm.utils.safe_torch_load import load_torch

NO_RCE = dataclasses.replace(RCE, epochs=0)


def value(tensor):
    return float(tensor.detach())


def options(**changes):
    return dataclasses.replace(GRPO, **changes)


# ---------------------------------------------------------------------- learning


def test_what_training_learns_holds_for_other_queries(tmp_path):
    sets, worth = data(), world()[2]
    warm, _ = train(tmp_path / "rce", RCE, None)
    start = [expected_reward(policy, part, worth) for policy, part in zip((warm, make()), sets, strict=True)]
    policy, rows = train(tmp_path / "grpo", RCE, options(epochs=20))
    assert expected_reward(policy, sets[0], worth) > start[0] + 0.2
    assert expected_reward(policy, sets[1], worth) > start[1] + 0.05
    assert rows[-1]["val_reward"] > rows[0]["val_reward"]


def test_every_epoch_has_a_row_with_the_tables_columns_and_ours(tmp_path):
    _, rows = train(tmp_path)
    assert [(row["phase"], row["epoch"]) for row in rows] == [
        *(("rce", i) for i in range(1, 4)),
        *(("grpo", i) for i in range(1, 7)),
    ]
    common = {"train_loss", "val_loss", "val_reward", "entropy", "grad_norm", "step_time", "epoch_time"}
    grpo = {"ppo_loss", "kl", "adv_std", "adv_max", "beta", "reward", "reward_std", "frac_reward_zero_std", "clip_frac"}
    for row in rows:
        assert row.keys() >= common | (grpo if row["phase"] == "grpo" else {"temperature"})
    read = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert read == rows
    for row in rows:
        content = load_torch(tmp_path / f"{row['phase']}_epoch{row['epoch']}.pt")
        assert (content["epoch"], content["phase"]) == (row["epoch"] - 1, row["phase"])


# ---------------------------------------------------------------------- the old and the reference policy


@pytest.mark.parametrize(("dropout", "state_update"), [("both", "none"), ("both", "gate"), ("off", "gate")])
def test_a_fixed_policy_gives_its_log_probs_under_the_noise_of_the_other(dropout, state_update):
    sets, shape = data()[0], {"state_update": state_update, "dropout": 0.4, "attn_dropout": 0.2}
    policy, other = make(**shape), make(seed=1, **shape).train()
    index = torch.tensor([3, 17, 4])
    batch = sets.batch(index)
    noise = other.draw_noise(batch.query, batch.candidates)
    found = FrozenPolicy(other, snapshot(policy), sets, dropout, At("grpo", 1)).log_probs(index, noise)
    assert not found.requires_grad
    expected = policy.train(dropout == "both").log_prob(*batch.inputs, noise=noise if dropout == "both" else None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert other.training


def test_grpo_starts_at_its_own_anchor(tmp_path):
    _, rows = train(tmp_path, RCE, options(epochs=1, batch_size=QUERIES))
    assert rows[-1]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert (rows[-1]["mean_ratio"], rows[-1]["clip_frac"]) == (pytest.approx(1.0, abs=1e-5), 0.0)


def test_refreshing_the_old_policy_brings_the_ratio_back_to_one(tmp_path):
    grpo = options(epochs=6, batch_size=QUERIES, refresh_every=3)
    _, rows = train(tmp_path, dataclasses.replace(RCE, epochs=1), grpo)
    ratios = [row["mean_ratio"] for row in rows if row["phase"] == "grpo"]
    assert [abs(ratio - 1) > 1e-4 for ratio in ratios] == [False, True, True, False, True, True]
    assert (ratios[0], ratios[3]) == (pytest.approx(1.0, abs=1e-5), pytest.approx(1.0, abs=1e-5))


def test_dropout_in_new_log_probs_only_moves_the_ratios_of_unchanged_weights(tmp_path):
    rows = {}
    for mode in ("off", "new_only"):
        grpo = options(epochs=1, batch_size=QUERIES, dropout=mode)
        _, rows[mode] = train(tmp_path / mode, NO_RCE, grpo, dropout=0.5)
    assert rows["off"][0]["clip_frac"] == 0.0
    assert rows["new_only"][0]["clip_frac"] > 0.3


# ---------------------------------------------------------------------- one step of training is the loss by hand


@pytest.fixture(scope="module")
def after_rce(tmp_path_factory):
    """The policy after RCE."""
    return train(tmp_path_factory.mktemp("rce"), RCE, None)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_epsilon_high": 0.6},
        {"clip_epsilon": 0.05},
        {"kl": "k1"},
        {"kl": "k2", "kl_beta": 0.7},
        {"reference": "old", "kl_beta": 0.7},
        {"advantage_scale": "batch"},
        {"advantage_scale": "none"},
        {"advantage": "rank"},
        {"entropy_beta": 0.5},
        {"loss": "reinforce"},
    ],
    ids=lambda changes: "-".join(map(str, itertools.chain(*changes.items()))) or "default",
)
def test_an_epoch_of_one_step_is_the_loss_by_hand(tmp_path, after_rce, changes):
    """Anchored before RCE, so that ratios and KL differ from 1 and 0."""
    sets, chosen = data(), options(**changes)
    _, rows = train(tmp_path, RCE, options(epochs=1, batch_size=QUERIES, anchor="init", **changes), sets=sets)
    row, batch = rows[-1], sets[0].batch(torch.arange(len(sets[0])))
    with torch.no_grad():
        now, entropy = after_rce.eval().evaluate(*batch.inputs)
        start = make().eval().log_prob(*batch.inputs)
    how = {"method": chosen.advantage, "scale": chosen.advantage_scale, "min_std": 0.1}
    advantages = group_advantage(batch.rewards, batch.mask, **how)
    loss, stats = LOSSES[chosen.loss](
        *(now, start, advantages, batch.mask),
        clip_epsilon=chosen.clip_epsilon,
        clip_epsilon_high=chosen.clip_epsilon_high or None,
        kl_beta=chosen.kl_beta,
        kl_estimate=chosen.kl,
        ref_log_probs=start if chosen.reference == "start" else None,
    )
    loss = value(loss) - chosen.entropy_beta * value(group_mean(entropy, batch.mask))
    assert row["train_loss"] == pytest.approx(loss, rel=1e-4)
    for name, stat in stats.items():
        assert row[name] == pytest.approx(value(stat), rel=1e-4, abs=1e-6), name
    if changes:
        usual = group_advantage(batch.rewards, batch.mask)
        plain, _ = LOSSES["clip"](now, start, usual, batch.mask, kl_beta=0.1, ref_log_probs=start)
        assert row["train_loss"] != pytest.approx(value(plain), rel=1e-3), "the option changes nothing here"


def test_beta_adapts_within_the_run_only_where_asked(tmp_path):
    far = {"anchor": "init", "reference": "old", "refresh_every": 0, "epochs": 3}
    for adaptive in (False, True):
        _, rows = train(tmp_path / str(adaptive), RCE, options(adaptive_kl=adaptive, **far))
        betas = [row["beta"] for row in rows if row["phase"] == "grpo"]
        assert (betas == [0.1] * 3) is not adaptive


# ---------------------------------------------------------------------- what is learnt from


def test_tied_groups_give_no_policy_gradient(tmp_path):
    policy, tied = make(), with_groups(lambda group: dataclasses.replace(group, rewards=[1.0] * 8))
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    _, rows = train(tmp_path, NO_RCE, options(kl_beta=0.0, epochs=2), policy=policy, sets=tied)
    assert same_state(policy.state_dict(), before)
    expected = {"ppo_loss": 0.0, "frac_reward_zero_std": 1.0, "adv_std": 0.0, "zero_grad_frac": 1.0}
    assert all(row[name] == number for row in rows for name, number in expected.items())


def test_the_best_rollouts_of_a_group():
    rewards = torch.tensor([[1.0, 3.0, 2.0, 3.0], [1.0, 1.0, 1.0, 9.0]])
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    assert best_rollouts(rewards, mask, None) is mask
    assert best_rollouts(rewards, mask, 1).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert best_rollouts(rewards, mask, 3).tolist() == [[False, True, True, True], [True, True, True, False]]
    assert best_rollouts(rewards, mask, 2).tolist() == [[False, True, False, True], [True, True, False, False]]
    assert torch.equal(best_rollouts(rewards, mask, 99), mask)


def test_top_k_names_the_rollouts_of_each_epoch_and_the_last_for_the_rest(tmp_path):
    sets = data()
    _, rows = train(tmp_path, NO_RCE, options(epochs=3, top_k=(3, 5)), sets=sets)
    ranked = sets[0].rewards.sort(-1, descending=True).values
    means = [float(ranked[:, :k].mean()) for k in (3, 5, 5)]
    assert [row["reward"] for row in rows] == pytest.approx(means)
    assert means[0] > means[1] > float(sets[0].rewards.mean())


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
    padded = dataclasses.replace(padded, numbers=None)
    grpo = options(epochs=2, advantage_scale="batch", entropy_beta=0.1, kl="k2", clip_epsilon_high=0.5)
    one, other = (train(tmp_path / str(len(s.mask[0])), RCE, grpo, sets=(s, wide))[0] for s in (wide, padded))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=1e-5, msg=name)


ODD = {
    "groups of one": lambda g: dataclasses.replace(g, sequences=g.sequences[:1], rewards=g.rewards[:1]),
    "one group of one": lambda g: ODD["groups of one"](g) if g.query_id == 0 else g,
    "rewards of 1e9": lambda g: dataclasses.replace(g, rewards=[(-1.0) ** i * 1e9 for i in range(8)]),
    "a single candidate for two shots": lambda g: Group(g.query_id, g.pool[:1], [[0, 0]] * 2, [0.0, 1.0]),
    "one position twice": lambda g: dataclasses.replace(g, sequences=[[1, 1], *g.sequences[1:]]),
    "the same sequence many times": lambda g: dataclasses.replace(g, sequences=[[2, 3]] * 8),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_groups_never_make_a_weight_nan(tmp_path, what):
    grpo = options(epochs=2, advantage_scale="batch", entropy_beta=0.01)
    policy, rows = train(tmp_path, dataclasses.replace(RCE, epochs=1), grpo, sets=with_groups(ODD[what]))
    assert all(torch.isfinite(tensor).all() for tensor in policy.state_dict().values())
    assert len(rows) == 3
    assert all(math.isfinite(number) for row in rows for number in row.values() if isinstance(number, float))


# ---------------------------------------------------------------------- schedule, patience, entropy


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rows_hold_the_rate_of_each_epochs_last_step(tmp_path, schedule):
    _, rows = train(tmp_path, NO_RCE, options(epochs=4, schedule=schedule, warmup_steps=2))
    # 18 queries in batches of 8: 3 steps an epoch, 12 in all, of which 2 are the warm-up.
    done = [(step - 2) / 10 for step in (2, 5, 8, 11)]
    share = {"constant": lambda d: 1.0, "linear": lambda d: 1 - d, "cosine": lambda d: math.cos(math.pi * d / 2) ** 2}
    assert [row["lr"] for row in rows] == pytest.approx([GRPO.lr * share[schedule](d) for d in done])


def test_a_warm_up_step_moves_the_weights_by_its_own_share(tmp_path):
    start, moved, said = make().state_dict(), [], []
    for warmup in (0, 10):
        grpo = options(epochs=1, batch_size=QUERIES, schedule="linear", warmup_steps=warmup)
        policy, rows = train(tmp_path / str(warmup), NO_RCE, grpo, say=said.append)
        moved.append(max(float((policy.state_dict()[n] - start[n]).abs().max()) for n in start))
        assert rows[0]["lr"] == pytest.approx(GRPO.lr / max(warmup, 1))
    assert moved[0] == pytest.approx(10 * moved[1], rel=0.05)  # Adam's first step is as long as the rate
    assert sum("grpo.warmup_steps 10 outlast all 1 steps" in line for line in said) == 1


@pytest.mark.parametrize(
    ("schedule", "first", "then", "told"),
    [
        ("linear", 4, 8, "from 0.00025 at the end of epoch 4 to 0.0015 in epoch 5"),  # 1/12, then 12/24
        ("cosine", 4, 8, "from 5.11e-05 at the end of epoch 4 to 0.0015 in epoch 5"),
        ("linear", 4, 3, None),
        ("constant", 4, 8, None),
    ],
)
def test_a_rate_that_jumps_because_epochs_were_raised_is_told_before_it_does(tmp_path, schedule, first, then, told):
    train(tmp_path, NO_RCE, options(epochs=first, schedule=schedule))
    said = []
    train(tmp_path, NO_RCE, options(epochs=then, schedule=schedule), say=said.append)
    notes = [i for i, line in enumerate(said) if line.startswith("grpo.schedule=")]
    assert [said[i].endswith(told) for i in notes] == ([] if told is None else [True])
    assert not notes or notes[0] < min(i for i, line in enumerate(said) if line.split()[0] == "5")


def test_patience_stops_the_run_and_says_so_now_and_when_run_again(tmp_path):
    def flat(group):  # validation rewards that cannot rise
        return group if group.query_id < TRAIN else dataclasses.replace(group, rewards=[1.0] * 8)

    grpo, notice = options(patience=2), "stopped early: val_reward has not risen for 2 epochs (grpo.patience)"
    said, again = [], []
    _, rows = train(tmp_path, RCE, grpo, sets=with_groups(flat), say=said.append)
    # The first epoch stays the best.
    assert [row["epoch"] for row in rows if row["phase"] == "grpo"] == [1, 2, 3]
    assert said[-1] == notice
    assert said.count(notice) == 1
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    _, after = train(tmp_path, RCE, grpo, sets=with_groups(flat), say=again.append)
    assert after == rows
    assert again[-1] == notice
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_while_it_gets_better_all_epochs_are_trained(tmp_path):
    said = []
    _, rows = train(tmp_path, RCE, options(patience=3), say=said.append)
    assert sum(row["phase"] == "grpo" for row in rows) == GRPO.epochs
    assert not [line for line in said if "stopped early" in line]
    assert epochs_since_best(rows) < 3


@pytest.mark.parametrize(
    ("values", "since"), [([], 0), ([1.0], 0), ([1.0, 2.0], 0), ([2.0, 1.0, 1.5], 2), ([1.0, 2.0, 2.0, 2.0], 2)]
)
def test_epochs_since_the_best_count_from_the_first_of_equals_and_in_grpo_only(values, since):
    rows = [{"phase": "rce", "val_reward": 9.0}, *({"phase": "grpo", "val_reward": v} for v in values)]
    assert epochs_since_best(rows) == since


def test_a_bonus_for_entropy_keeps_the_policy_undecided(tmp_path):
    sets = data()
    batch, finals = sets[0].batch(torch.arange(len(sets[0]))), []
    for bonus in (0.0, 1.0):
        policy, _ = train(tmp_path / str(bonus), RCE, options(epochs=12, entropy_beta=bonus), sets=sets)
        with torch.no_grad():
            finals.append(float(policy.eval().evaluate(*batch.inputs)[1].mean()))
    assert finals[0] + 0.08 < finals[1] < math.log(POOL)


# ---------------------------------------------------------------------- the frozen backbone


@pytest.mark.parametrize("changes", [{"dropout": "both"}, {"batch_size": 5, "refresh_every": 1}], ids=str)
def test_features_projected_once_give_what_projecting_in_every_step_gives(tmp_path, monkeypatch, changes):
    grpo = options(freeze_backbone=True, epochs=3, **changes)
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


# ---------------------------------------------------------------------- killed and resumed

VARIANTS = {
    "dropout-both": ({"dropout": "both"}, {"dropout": 0.3, "attn_dropout": 0.1}),
    "adaptive-gate": ({"adaptive_kl": True, "reference": "old"}, {"state_update": "gate"}),
    "classic": ({"dropout": "new_only", "anchor": "init", "top_k": (3, 5)}, {"dropout": 0.5, "attn_dropout": 0.1}),
    "schedule": ({"schedule": "cosine", "warmup_steps": 4, "entropy_beta": 0.1, "freeze_backbone": True}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_after_every_epoch_ends_bit_for_bit_where_an_unbroken_one_does(tmp_path, variant):
    changes, shape = VARIANTS[variant]
    rce, grpo = dataclasses.replace(RCE, epochs=2), options(epochs=4, **changes)
    train(tmp_path / "whole", rce, grpo, **shape)
    assert until_it_ends(lambda: train(tmp_path / "broken", rce, grpo, say=die_at_a_new_row, **shape)) == 6
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("calls", [1, 9, 14, 17, 22])
def test_a_run_killed_within_an_epoch_ends_bit_for_bit_where_an_unbroken_one_does(tmp_path, calls):
    shape, grpo = {"dropout": 0.3, "attn_dropout": 0.1}, options(dropout="both", epochs=3)
    train(tmp_path / "whole", RCE, grpo, **shape)
    policy = make(kind=Mortal, **shape)
    policy.left = calls
    with pytest.raises(Killed):
        train(tmp_path / "broken", RCE, grpo, policy=policy, **shape)
    train(tmp_path / "broken", RCE, grpo, **shape)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_raising_the_grpo_epochs_continues_bit_for_bit_and_a_finished_run_is_left_as_it_is(tmp_path):
    train(tmp_path / "whole")
    for epochs in (0, 1, 3, GRPO.epochs):
        train(tmp_path / "raised", RCE, options(epochs=epochs))
    assert_same_run(tmp_path / "whole", tmp_path / "raised")
    before = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    train(tmp_path / "whole")
    assert {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()} == before


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_grad_norm", 0.0),
        ("advantage_clip", -1.0),
        ("advantage_min_std", -0.1),
        ("clip_epsilon", 1.0),
        ("clip_epsilon_high", -0.1),
        ("warmup_steps", -1),
        ("patience", -1),
        ("entropy_beta", -0.1),
        ("online_samples", 1),
        ("online_every", 0),
        ("online_ratio", 0.0),
        ("online_ratio", 1.5),
        ("schedule", "step"),
        ("kl", "k4"),
        ("advantage_scale", "pool"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(option, value):
    with pytest.raises(UsageError, match=rf"grpo\.{option} .*{value}"):
        GrpoConfig(**{option: value})


def test_a_loss_that_is_not_in_the_table_is_refused_with_those_that_are():
    with pytest.raises(UsageError, match=r"'ppo': one of clip, reinforce .*grpo\.loss"):
        check_names(Config(grpo=GrpoConfig(loss="ppo")))


def test_an_adaptive_beta_is_refused_with_a_kl_that_can_be_negative():
    with pytest.raises(UsageError, match=r"grpo\.kl=k1"):
        GrpoConfig(kl="k1", adaptive_kl=True)


def rollout_file(path, correct):
    """A file with a query for every pair in `correct`: how its two rollouts were answered."""
    content = {
        str(query): {
            "candidate_pool_ids": [8, 9],
            "pointer_candidates": [
                {"pointer": [i], "pointer_global": [8 + i], "vqa_correct": c, "vqa_acc_score": c / 2}
                for i, c in enumerate(pair)
            ],
        }
        for query, pair in enumerate(correct)
    }
    path.write_text(json.dumps(content))
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
    assert left in done.err
    assert "reward.require_positive" in done.err
    assert not list(tmp_path.rglob("*_epoch*.pt"))
