"""Both loops on small synthetic groups: they learn, stop on what is broken, and a killed run ends where it would have.

S = 2 shots; a candidate is good or bad by one coordinate of its features, and a rollout is worth how many good ones it
holds.
"""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from lever_lm.config.schema import GrpoConfig, RceConfig
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training import validation as judging
from lever_lm.training.batches import to_tensors
from lever_lm.training.finite_checks import At
from lever_lm.training.grpo import best_rollouts, train_grpo, train_rce
from lever_lm.training.losses import rce_loss
from lever_lm.training.reference_policy import Anchor, snapshot
from lever_lm.training.rewards import group_advantage
from lever_lm.training.rollouts.file_format import Group
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.run_state import Journal
from lever_lm.training.validation import group_statistics, validate
from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_torch_load import load_torch

QUERIES, POOL, DIM = 24, 6, 8
RCE = RceConfig(epochs=3, lr=3e-3, batch_size=8)
GRPO = GrpoConfig(epochs=6, lr=3e-3, batch_size=8, refresh_every=2)
AT = At("rce", 1)
TIMES = ("epoch_time", "step_time")


def world(seed=0, rollouts=8):
    """Groups over random features: a candidate is worth its first coordinate's sign, which cosine does not see."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(QUERIES * POOL, DIM, generator=generator)
    worth = (features[:, 0] > 0).float()
    every = list(itertools.permutations(range(POOL), 2))
    groups = []
    for query in range(QUERIES):
        pool = list(range(query * POOL, (query + 1) * POOL))
        chosen = torch.randperm(len(every), generator=generator)[:rollouts].tolist()
        sequences = [list(every[i]) for i in chosen]
        rewards = [float(worth[pool[a]] + worth[pool[b]]) for a, b in sequences]
        groups.append(Group(query, pool, sequences, rewards))
    return groups, features, worth


def data(groups=None, features=None):
    made, made_features, _ = world()
    groups, features = groups or made, made_features if features is None else features
    return to_tensors(groups[: QUERIES * 3 // 4], features, features), to_tensors(
        groups[QUERIES * 3 // 4 :], features, features
    )


def make(seed=0, kind=PointerSelector, **kwargs):
    torch.manual_seed(seed)
    return kind(**{"d_model": DIM, "hidden_dim": 16, "dropout": 0.0, "attn_dropout": 0.0, **kwargs})


def journal_in(folder, policy, say=lambda line: None):
    folder.mkdir(exist_ok=True)
    journal = Journal(RunFolder(folder), {"policy": policy.shape}, {"rollouts": "r"}, say)
    journal.resume()
    return journal


def train(folder, rce=RCE, grpo=GRPO, policy=None, sets=None, say=lambda line: None, **shape):
    """One process: what `lever train` does from the groups on."""
    initial = make(**shape)
    policy = policy or make(**shape)
    journal = journal_in(folder, policy, say)
    torch.manual_seed(0)
    training, validation = sets or data()
    train_rce(policy, training, validation, rce, journal)
    if grpo is not None:
        train_grpo(policy, initial, training, validation, grpo, journal)
    return policy, journal.rows


@torch.no_grad()
def expected_reward(policy, sets):
    """Exact expected reward of the sampling policy, over all ordered pairs of each pool."""
    worth = world()[2]
    policy.eval()
    batch = sets.batch(torch.arange(len(sets)))
    pairs = torch.tensor(list(itertools.permutations(range(POOL), 2)))
    sequences = pairs.unsqueeze(0).expand(len(sets), -1, -1)
    probability = policy.log_prob(batch.query, batch.candidates, sequences).exp()
    return float((probability * worth[sets.pools][:, pairs].sum(-1)).sum(-1).mean())


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_times(metrics):
    return {name: value for name, value in metrics.items() if name not in TIMES}


# ---------------------------------------------------------------------- learning


def test_rce_lowers_its_loss_and_raises_the_rewarded_sequences(tmp_path):
    groups, features, _ = world()
    groups = [dataclasses.replace(group, rewards=[5.0, *[0.0] * 7]) for group in groups]
    sets = data(groups, features)
    batch = sets[0].batch(torch.arange(len(sets[0])))

    def probabilities(policy):
        with torch.no_grad():
            return policy.eval().log_prob(batch.query, batch.candidates, batch.sequences).exp().mean(0)

    before = probabilities(make())
    policy, rows = train(tmp_path, dataclasses.replace(RCE, epochs=30), None, sets=sets)
    after = probabilities(policy)
    losses = [row["train_loss"] for row in rows]
    assert losses[-1] < losses[0] - 1
    assert after[0] > 3 * before[0]
    assert after[0] > 3 * after[1:].max()


def test_grpo_raises_the_expected_reward(tmp_path):
    sets = data()
    warm, _ = train(tmp_path / "rce", RCE, None)
    after_rce = expected_reward(warm, sets[0])
    policy, _ = train(tmp_path / "grpo", RCE, dataclasses.replace(GRPO, epochs=20))
    assert expected_reward(policy, sets[0]) > after_rce + 0.2


def test_what_training_learns_holds_for_other_queries(tmp_path):
    sets = data()
    start = expected_reward(make(), sets[1])
    policy, rows = train(tmp_path, dataclasses.replace(RCE, epochs=10), dataclasses.replace(GRPO, epochs=20))
    assert expected_reward(policy, sets[1]) > start + 0.1
    assert rows[-1]["val_reward"] > rows[0]["val_reward"]


def test_the_rce_temperature_falls_from_start_to_end(tmp_path):
    _, rows = train(tmp_path, RCE, None)
    # 18 queries in batches of 8: 3 steps an epoch, 9 in all; an epoch's row has its last step's.
    expected = [2.0 - 1.5 * step / 8 for step in (2, 5, 8)]
    assert [row["temperature"] for row in rows] == pytest.approx(expected)


# ---------------------------------------------------------------------- rows


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


def test_validation_by_hand():
    policy = make().eval()
    groups, features, _ = world()
    groups = [
        groups[0],
        dataclasses.replace(groups[1], sequences=groups[1].sequences[:3], rewards=groups[1].rewards[:3]),
    ]
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
    groups, features, _ = world()
    short = dataclasses.replace(groups[3], sequences=groups[3].sequences[:2], rewards=groups[3].rewards[:2])
    policy = make(dropout=0.5, attn_dropout=0.5).train()
    together = validate(policy, to_tensors([groups[2], short], features, features), 0.5, AT)
    alone = [validate(policy, to_tensors([group], features, features), 0.5, AT) for group in (groups[2], short)]
    for name, value in together.items():
        assert value == pytest.approx((alone[0][name] + alone[1][name]) / 2, rel=1e-4), name


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


def crowded(count=40):
    """Groups whose pools name each of 12 examples many times over."""
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(12, DIM, generator=generator)
    pools = [torch.randperm(12, generator=generator)[:POOL].tolist() for _ in range(count)]
    groups = [Group(i % 12, pool, [[0, 1], [2, 3], [5, 4]], [1.0, i % 3, 0.5]) for i, pool in enumerate(pools)]
    return to_tensors(groups, features, features)


@pytest.mark.parametrize("state_update", ["none", "gate"])
def test_validation_is_the_same_where_features_are_projected_once(monkeypatch, state_update):
    sets, policy = crowded(), make(state_update=state_update)
    found = validate(policy, sets, 0.5, AT)
    made = []
    monkeypatch.setattr(judging, "projected", lambda *both: made.append(both) or both)
    assert validate(policy, sets, 0.5, AT) == {name: pytest.approx(value, rel=1e-5) for name, value in found.items()}
    assert made  # there they were projected once
    made.clear()
    validate(policy, data()[1], 0.5, AT)
    assert not made  # each example stands in one pool: it would be projected once in any case


@pytest.mark.parametrize("state_update", ["none", "gate"])
@pytest.mark.parametrize("dropout", ["both", "off", "new_only"])
def test_a_fixed_policy_gives_its_log_probs_under_the_noise_of_the_other(state_update, dropout):
    sets, shape = crowded(), {"state_update": state_update, "dropout": 0.4, "attn_dropout": 0.2}
    policy, other = make(**shape), make(seed=1, **shape).train()
    index = torch.tensor([3, 17, 4])
    batch = sets.batch(index)
    noise = other.draw_noise(batch.query, batch.candidates)
    anchor = Anchor(other, snapshot(policy), sets, dropout, AT)
    found = anchor.log_probs(index, noise)
    assert not found.requires_grad
    expected = policy.train(dropout == "both").log_prob(
        batch.query, batch.candidates, batch.sequences, noise=noise if dropout == "both" else None
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert other.training


# ---------------------------------------------------------------------- killed and resumed


class Killed(BaseException):
    """What a signal would do."""


class Mortal(PointerSelector):
    """A policy whose process is killed in the middle of an epoch, at a given call of steps."""

    left = math.inf

    def steps(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise Killed
        return super().steps(*args, **kwargs)


def assert_same_run(one, other):
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in other.iterdir())
    for name in [n for n in names if "_epoch" in n]:
        a, b = load_torch(one / name), load_torch(other / name)
        assert same_state(a.pop("model_state_dict"), b.pop("model_state_dict")), name
        assert {**a, "metrics": without_times(a["metrics"])} == {**b, "metrics": without_times(b["metrics"])}, name
    rows = [
        [without_times(json.loads(line)) for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (one, other)
    ]
    assert rows[0] == rows[1]
    assert (one / "train.log").read_text(encoding="utf-8") == (other / "train.log").read_text(encoding="utf-8")


VARIANTS = {
    "plain": ({}, {}),
    "dropout-both": ({"dropout": "both"}, {"dropout": 0.3, "attn_dropout": 0.1}),
    "adaptive-gate": ({"adaptive_kl": True, "reference": "old"}, {"state_update": "gate"}),
    "classic": ({"dropout": "new_only", "anchor": "init", "top_k": (3, 5)}, {"dropout": 0.5, "attn_dropout": 0.1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_after_every_epoch_ends_bit_for_bit_where_an_unbroken_one_does(tmp_path, variant):
    options, shape = VARIANTS[variant]
    grpo = dataclasses.replace(GRPO, **options)
    train(tmp_path / "whole", RCE, grpo, **shape)
    kills = 0

    def die_at_a_new_row(line):
        if line.split()[0].isdigit():
            raise Killed

    while True:
        try:
            train(tmp_path / "broken", RCE, grpo, say=die_at_a_new_row, **shape)
            break
        except Killed:
            kills += 1
    assert kills == RCE.epochs + GRPO.epochs
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("calls", [1, 4, 9, 14, 17, 22, 30])
def test_a_run_killed_within_an_epoch_ends_bit_for_bit_where_an_unbroken_one_does(tmp_path, calls):
    shape = {"dropout": 0.3, "attn_dropout": 0.1}
    grpo = dataclasses.replace(GRPO, dropout="both")
    train(tmp_path / "whole", RCE, grpo, **shape)
    policy = make(kind=Mortal, **shape)
    policy.left = calls
    with pytest.raises(Killed):
        train(tmp_path / "broken", RCE, grpo, policy=policy, **shape)
    train(tmp_path / "broken", RCE, grpo, **shape)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_raising_the_grpo_epochs_continues_bit_for_bit(tmp_path):
    train(tmp_path / "whole")
    for epochs in range(GRPO.epochs + 1):
        train(tmp_path / "raised", RCE, dataclasses.replace(GRPO, epochs=epochs))
    assert_same_run(tmp_path / "whole", tmp_path / "raised")


def test_a_finished_run_is_left_as_it_is(tmp_path):
    train(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    train(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_another_seed_is_another_run(tmp_path):
    one, _ = train(tmp_path / "one", RCE, None)
    other, _ = train(tmp_path / "other", RCE, None, policy=make(seed=1))
    assert not same_state(one.state_dict(), other.state_dict())


# ---------------------------------------------------------------------- what is learnt from


def test_tied_groups_give_no_policy_gradient(tmp_path):
    groups, features, _ = world()
    tied = [dataclasses.replace(group, rewards=[1.0] * len(group.rewards)) for group in groups]
    policy = make()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    grpo = dataclasses.replace(GRPO, kl_beta=0.0, epochs=2)
    _, rows = train(tmp_path, dataclasses.replace(RCE, epochs=0), grpo, policy=policy, sets=data(tied, features))
    assert same_state(policy.state_dict(), before)
    assert [row["ppo_loss"] for row in rows] == [0.0, 0.0]
    assert [row["frac_reward_zero_std"] for row in rows] == [1.0, 1.0]
    assert [row["adv_std"] for row in rows] == [0.0, 0.0]


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
    grpo = dataclasses.replace(GRPO, epochs=3, top_k=(3, 5))
    _, rows = train(tmp_path, dataclasses.replace(RCE, epochs=0), grpo, sets=sets)
    ranked = sets[0].rewards.sort(-1, descending=True).values
    means = [float(ranked[:, :k].mean()) for k in (3, 5, 5)]
    assert [row["reward"] for row in rows] == pytest.approx(means)
    assert means[0] > means[1] > float(sets[0].rewards.mean())


def one_step(tmp_path, **options):
    """The row of a first GRPO epoch that is a single step, and the policies before and after RCE."""
    sets = data()
    warm, _ = train(tmp_path / "rce", RCE, None, sets=sets)
    grpo = dataclasses.replace(GRPO, epochs=1, batch_size=QUERIES, **options)
    _, rows = train(tmp_path / "grpo", RCE, grpo, sets=sets)
    batch = sets[0].batch(torch.arange(len(sets[0])))
    with torch.no_grad():
        now, start = (p.eval().log_prob(batch.query, batch.candidates, batch.sequences) for p in (warm, make()))
    return rows[-1], now, start


def test_grpo_starts_at_its_own_anchor(tmp_path):
    row, _, _ = one_step(tmp_path)
    assert row["kl"] == pytest.approx(0.0, abs=1e-6)
    assert (row["mean_ratio"], row["clip_frac"]) == (pytest.approx(1.0, abs=1e-5), 0.0)


def test_anchored_at_the_initial_policy_it_is_pulled_back_there(tmp_path):
    row, now, start = one_step(tmp_path, anchor="init")
    ratio = (now - start).exp()
    gap = start - now
    assert row["mean_ratio"] == pytest.approx(float(ratio.mean()), rel=1e-4)
    assert row["kl"] == pytest.approx(float((gap.exp() - 1 - gap).mean()), rel=1e-4)
    assert row["clip_frac"] == pytest.approx(float(((ratio - 1).abs() > 0.2).float().mean()))
    assert row["kl"] > 0.01


def test_against_the_old_policy_the_kl_is_the_lineages(tmp_path):
    row, now, start = one_step(tmp_path, anchor="init", reference="old")
    gap = now - start
    assert row["kl"] == pytest.approx(float((gap.exp() - 1 - gap).mean()), rel=1e-4)


def test_refreshing_the_old_policy_brings_the_ratio_back_to_one(tmp_path):
    grpo = dataclasses.replace(GRPO, epochs=6, batch_size=QUERIES, refresh_every=3)
    _, rows = train(tmp_path, dataclasses.replace(RCE, epochs=1), grpo)
    ratios = [row["mean_ratio"] for row in rows if row["phase"] == "grpo"]
    for epoch in (1, 4):
        assert ratios[epoch - 1] == pytest.approx(1.0, abs=1e-5)
    for epoch in (2, 3, 5, 6):
        assert abs(ratios[epoch - 1] - 1) > 1e-4


def test_dropout_in_new_log_probs_only_moves_the_ratios_of_unchanged_weights(tmp_path):
    shape = {"dropout": 0.5}
    rows = {}
    for mode in ("off", "new_only"):
        grpo = dataclasses.replace(GRPO, epochs=1, batch_size=QUERIES, dropout=mode)
        _, rows[mode] = train(tmp_path / mode, dataclasses.replace(RCE, epochs=0), grpo, **shape)
    assert rows["off"][0]["clip_frac"] == 0.0
    assert rows["new_only"][0]["clip_frac"] > 0.3


def test_beta_adapts_within_the_run_only_where_asked(tmp_path):
    far = {"anchor": "init", "reference": "old", "refresh_every": 0}
    betas = {}
    for adaptive in (False, True):
        grpo = dataclasses.replace(GRPO, adaptive_kl=adaptive, **far)
        _, rows = train(tmp_path / str(adaptive), dataclasses.replace(RCE, epochs=6), grpo)
        betas[adaptive] = [row["beta"] for row in rows if row["phase"] == "grpo"]
    assert betas[False] == [0.1] * 6
    assert betas[True][0] != 0.1


def test_a_frozen_backbone_keeps_its_weights_while_the_attention_learns(tmp_path):
    warm, _ = train(tmp_path / "rce", RCE, None)
    policy, _ = train(tmp_path / "grpo", RCE, dataclasses.replace(GRPO, freeze_backbone=True))
    before, after = warm.state_dict(), policy.state_dict()
    frozen = {"input_proj.weight", "query_proj.weight", "cand_proj.weight"}
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["cross_attn_layers.0.in_proj_weight"], after["cross_attn_layers.0.in_proj_weight"])
    assert not torch.equal(before["attn_norms.0.weight"], after["attn_norms.0.weight"])


def test_normalised_rewards_are_what_rce_weighs_by(tmp_path):
    sets = data()
    rce = dataclasses.replace(RCE, epochs=1, batch_size=QUERIES, normalize="rank")
    _, rows = train(tmp_path, rce, None, sets=sets)
    batch = sets[0].batch(torch.arange(len(sets[0])))
    ranks = group_advantage(batch.rewards, batch.mask, method="rank")
    with torch.no_grad():
        log_probs = make().eval().log_prob(batch.query, batch.candidates, batch.sequences)
        expected = rce_loss(log_probs, ranks, batch.mask, 0.5)
    assert rows[0]["train_loss"] == pytest.approx(float(expected), rel=1e-4)


# ---------------------------------------------------------------------- what is broken


def broken_sets(what):
    """Training groups whose third query is broken past the checks that reading makes."""
    training, validation = data()
    if what == "reward":
        rewards = training.rewards.clone()
        rewards[2, 1] = math.nan
        return dataclasses.replace(training, rewards=rewards), validation
    features = training.icds.clone()
    features[training.pools[2, 0]] = math.inf
    return dataclasses.replace(training, icds=features), validation


@pytest.mark.parametrize("what", ["reward", "feature"])
@pytest.mark.parametrize("phase", ["rce", "grpo"])
def test_what_is_not_finite_stops_training_and_is_named(tmp_path, what, phase):
    rce = dataclasses.replace(RCE, batch_size=QUERIES, epochs=1 if phase == "rce" else 0)
    grpo = dataclasses.replace(GRPO, batch_size=QUERIES) if phase == "grpo" else None
    policy = make()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    sets = broken_sets(what)
    named = f"the {what} of " + ("query 2, rollout 1" if what == "reward" else "candidate 0 of the pool of query 2 ")
    with pytest.raises(LeverError, match=rf"{phase.upper()} epoch 1.*: {named}"):
        train(tmp_path, rce, grpo, policy=policy, sets=sets)
    assert same_state(policy.state_dict(), before)
    assert not list(tmp_path.glob("*.pt"))


def test_the_query_with_the_broken_reward_is_the_one_named(tmp_path):
    with pytest.raises(
        LeverError, match=r"RCE epoch 1, step \d+: the loss is not finite: the reward of query 2, rollout 1 is nan\."
    ):
        train(tmp_path, dataclasses.replace(RCE, batch_size=1), None, sets=broken_sets("reward"))


def test_a_group_that_keeps_a_single_rollout_does_no_harm(tmp_path):
    groups, features, _ = world()
    groups[0] = dataclasses.replace(groups[0], sequences=groups[0].sequences[:1], rewards=groups[0].rewards[:1])
    policy, rows = train(tmp_path, sets=data(groups, features))
    assert all(torch.isfinite(tensor).all() for tensor in policy.state_dict().values())
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
