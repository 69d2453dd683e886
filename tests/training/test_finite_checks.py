"""Numbers that are not finite, put in on purpose at one query, rollout and step: the run stops and names just these.

The world is that of worlds.py: 24 queries, 18 of them trained on, pools of 6, two shots, 8 rollouts each.
"""

import dataclasses
import json
import math
import re
import shutil

import pytest
import torch
from helpers import RUN, small_digits, track
from hypothesis import event, given
from hypothesis import settings as how
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from worlds import GRPO, RCE, assert_same_run, data, journal_in, make, same_state, train, world

from lever_lm.config.schema import DataConfig, FeatureConfig, GrpoConfig, RceConfig
from lever_lm.data import load_dataset
from lever_lm.data.embeddings import compute_features
from lever_lm.data.encoder import FeatureEncoder
from lever_lm.evaluation.evaluate import Evaluation
from lever_lm.selectors.learned import choose
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training import grpo as training
from lever_lm.training.batches import to_tensors
from lever_lm.training.finite_checks import At, not_finite
from lever_lm.training.grpo import train_grpo
from lever_lm.training.losses import rce_loss
from lever_lm.training.nan_debug import backward, detecting
from lever_lm.training.optimizer_step import optimizer_step
from lever_lm.training.rce import train_rce
from lever_lm.training.reference_policy import FrozenPolicy
from lever_lm.training.rollouts.file_format import Group, load_groups
from lever_lm.training.rollouts.online import explore
from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_torch_load import load_torch

NOTHING_WRITTEN = "Nothing of this epoch was written, the checkpoints before it are sound"
ANOTHER_RUN = r"\(--run-name NAME\) or from the start \(--overwrite\)"


class Poisoned(PointerSelector):
    """From its call number `after` on, the logits of one query's one rollout at one decoding step (from 1) become
    `value`; with NaN gradients only where value is "gradient"."""

    query, sequence, step, value, after, calls = None, None, 2, math.nan, 0, 0

    def project(self, queries, icds):
        return self, queries, icds

    def steps(self, query, candidates, sequences, pool_mask=None, *, noise=None):
        self.calls += 1
        steps = super().steps(query, candidates, sequences, pool_mask, noise=noise)
        here = (query == self.query).all(-1)[:, None] & (sequences == self.sequence).all(-1)  # (B, G)
        if self.calls <= self.after or not here.any():
            return steps
        logits = steps[self.step - 1].clone()
        if self.step == 1:
            here = here.any(-1, keepdim=True)
        if self.value == "gradient":
            logits[here] = logits[here] + (0 * logits[here]).sqrt()  # + 0, but d√0 is infinite
        else:
            logits[here] = self.value
        steps[self.step - 1] = logits
        return steps


def poisoned(query, rollout=3, **where):
    policy, (groups, features, _) = make(kind=Poisoned), world()
    policy.query, policy.sequence = features[query], torch.tensor(groups[query].sequences[rollout])
    for name, value in where.items():
        setattr(policy, name, value)
    return policy


def only(phase, **options):
    """The configs of a run of one phase, with all queries in one batch."""
    options = {"batch_size": 24, **options}
    if phase == "rce":
        return {"rce": dataclasses.replace(RCE, **options), "grpo": None}
    return {"rce": dataclasses.replace(RCE, epochs=0), "grpo": dataclasses.replace(GRPO, **options)}


def message(call, *args, **kwargs):
    with pytest.raises(LeverError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


def both_messages(folder, policy, **options):
    """The message with which a training of `policy()` stops as it comes, and under --detect-anomaly: the first begins
    the second."""
    plain = message(train, folder / "plain", policy=policy(), **options)
    looked_at = policy()

    def train_looked_at():
        with detecting(looked_at, lambda line: None):
            train(folder / "looked", policy=looked_at, **options)

    more = message(train_looked_at)
    assert re.sub(r" \(first in \w+.*?\)", "", more).startswith(plain)
    assert not list(folder.rglob("*.pt"))
    return plain, more


# ---------------------------------------------------------------------- what is named


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("query", "step"), [(0, 1), (11, 2)])
def test_a_log_prob_is_named_by_query_and_rollout_and_the_decoding_step_where_it_is_looked_for(
    tmp_path, query, value, step
):
    # all rollouts of a query share their first step
    of = f"query {query}, rollout 3" if step == 2 else f"query {query}, rollouts 0, 1, 2 and 5 more"
    found = both_messages(tmp_path, **only("rce"), policy=lambda: poisoned(query, value=value, step=step))
    assert found[0].startswith(f"RCE epoch 1, step 1: the loss is not finite: the log-prob of {of} is nan. ")
    assert NOTHING_WRITTEN in found[0]
    assert re.search(ANOTHER_RUN, found[0])
    assert "lower rce.lr" in found[0]
    assert f"The logits of {of} are not finite, from decoding step {step} on" in found[1]


def test_a_log_prob_within_grpo_is_named_with_its_epoch_and_step(tmp_path):
    options = only("grpo", batch_size=1, dropout="both")  # with `both` the old policy is asked step by step
    policy = poisoned(4, after=30)
    policy.dropout = 0.1
    text = message(train, tmp_path, **options, policy=policy)
    found = re.match(
        r"GRPO epoch (\d), step \d+: the loss is not finite: the log-prob of query 4, rollout 3 is nan.*grpo\.lr", text
    )
    done = [row["epoch"] for row in journal_in(tmp_path, policy).rows]
    assert len(done) >= 1
    assert int(found[1]) == done[-1] + 1


def test_several_rollouts_are_listed_and_the_rest_counted(tmp_path):
    sets = data()
    sets[0].rewards[1, :2] = math.nan
    sets[0].rewards[3:9, 5] = math.inf
    text = message(train, tmp_path, **only("rce"), sets=sets)
    named = re.search(r"the reward of (.*) is (nan|inf)\.", text)[1]
    assert named.endswith(" and 4 more queries")
    assert len(re.findall(r"query \d+, rollouts? ", named)) == 3


@pytest.mark.parametrize("phase", ["rce", "grpo"])
def test_weights_are_named_by_the_batch_and_the_module_where_it_is_looked_for(tmp_path, phase):
    def policy():
        broken = make()
        with torch.no_grad():
            broken.query_proj.weight[2, 3] = math.nan
        return broken

    found = both_messages(tmp_path, **only(phase), policy=policy)
    assert re.match(rf"{phase.upper()} epoch 1, .*the log-prob of query \d+, rollouts 0, 1, 2 and 5 more; ", found[0])
    assert " and 15 more queries is nan" in found[0]
    assert "The first module whose output is not finite: query_proj (Linear), of finite input" in found[1]


def test_a_step_that_is_too_large_is_found_at_the_next(tmp_path):
    text = message(train, tmp_path / "next", **only("rce", batch_size=4, lr=1e36))
    assert re.match(r"RCE epoch 1, step 2: the (loss|gradient) is not finite: .*query \d", text)
    text = message(train, tmp_path / "itself", **only("rce", batch_size=4, lr=1e38))
    assert re.match(r"RCE epoch 1, step 1: the step of the optimizer overflows: .*query \d", text)


@pytest.mark.parametrize(("which", "shift", "query", "rollout"), [(0, -1000, 6, 2), (1, 200, 9, 4)])
def test_a_ratio_or_a_kl_that_overflows_is_named(tmp_path, monkeypatch, which, shift, query, rollout):
    made = []

    class Shifted(FrozenPolicy):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

        def log_probs(self, index, noise):
            values = super().log_probs(index, noise).clone()
            if self is made[which]:  # the old policy, or the reference
                values[(index == query).nonzero().flatten(), rollout] += shift
            return values

    monkeypatch.setattr(training, "FrozenPolicy", Shifted)
    text = message(train, tmp_path, **only("grpo"))
    of = rf"the gradient of the loss by the log-prob of query {query}, rollout {rollout} is (nan|-?inf)"
    assert re.match(rf"GRPO epoch 1, step 1: the (loss|gradient) is not finite: {of}", text)
    assert "grpo.refresh_every" in text
    assert "grpo.kl=k1" in text


def test_rewards_too_large_for_the_temperature_are_named(tmp_path):
    sets = data()
    sets[0].rewards[2, 1] = 3e38
    text = message(train, tmp_path, **only("rce", temperature_start=0.5, temperature_end=0.5), sets=sets)
    assert "the loss is not finite: the gradient of the loss by the log-prob of query 2, rollouts 0, 1" in text
    assert "rce.normalize=zscore" in text


def test_rewards_whose_spread_overflows_are_named_before_any_step(tmp_path):
    sets = data()
    sets[0].rewards[2, 1] = 1e30  # finite, yet its square is not: all advantages would be 0
    text = message(train, tmp_path, **only("grpo"), sets=sets)
    assert text.startswith("GRPO epoch 1: the spread of rewards in the group of query 2, rollouts 0, 1")


@pytest.mark.parametrize("phase", ["rce", "grpo"])
def test_a_gradient_is_named_by_the_batch(tmp_path, phase):
    policy, before = poisoned(13, value="gradient", rollout=6), make().state_dict()
    text = message(train, tmp_path, policy=policy, **only(phase))
    assert re.match(rf"{phase.upper()} epoch 1, step 1: the gradient is not finite: .*query \d+, rollouts 0", text)
    assert same_state(policy.state_dict(), before)


def test_a_gradient_whose_norm_overflows_is_named_by_the_batch(tmp_path):
    text = message(train, tmp_path, policy=make(temperature=1e-25), **only("rce"))
    assert re.match(r"RCE epoch 1, step 1: the gradient is not finite: .*query \d+, rollouts", text)


def test_rollouts_are_named_by_their_place_in_the_file(tmp_path):
    trajectories = [
        {"pointer": [i, i + 1], "pointer_global": [i, i + 1], "vqa_acc_score": i / 10, "vqa_correct": 0}
        for i in range(5)
    ]
    trajectories[1]["eval_failed"] = True
    content = {"3": {"candidate_pool_ids": list(range(6)), "pointer_candidates": trajectories}}
    path = tmp_path / "rollouts.json"
    path.write_text(json.dumps(content))
    features = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    sets = to_tensors(load_groups(path), features, features)
    assert sets.numbers.tolist() == [[0, 2, 3, 4]]
    sets.rewards[0, 2] = math.nan
    text = message(train, tmp_path / "run", **only("rce"), sets=(sets, sets))
    assert "the reward of query 3, rollout 3 is nan" in text


# ---------------------------------------------------------------------- nothing is poisoned, the run can go on


def test_neither_weights_nor_moments_change_where_a_step_stops():
    policy, sets = make(), data()[0]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)

    def step(spoil):
        batch = sets.batch(torch.arange(len(sets)))
        log_probs = policy.log_prob(*batch.inputs)
        loss = rce_loss(log_probs, batch.rewards, batch.mask, 0.5) * spoil
        return optimizer_step(optimizer, loss, 1.0, At("rce", 1, "step 1"), batch, log_probs)

    step(1.0)
    weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    moments = [{name: value.clone() for name, value in state.items()} for state in optimizer.state.values()]
    for spoil in (math.nan, math.inf):
        message(step, spoil)
    assert same_state(policy.state_dict(), weights)
    assert all(same_state(now, then) for now, then in zip(optimizer.state.values(), moments, strict=True))
    assert math.isfinite(step(1.0))


def test_a_run_that_diverges_keeps_what_was_before_and_stops_there_again_until_the_rate_is_lower(tmp_path):
    wild = dataclasses.replace(GRPO, lr=1e36, schedule="constant")
    first = message(train, tmp_path / "run", RCE, wild)
    assert re.match(r"GRPO epoch 1, (step \d|validation): the .* is not finite: .*query \d+", first)
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert files == ["metrics.jsonl", "rce_epoch1.pt", "rce_epoch2.pt", "rce_epoch3.pt", "state.pt", "train.log"]
    for path in (tmp_path / "run").glob("*.pt"):
        assert not_finite(load_torch(path)) is None, path
    assert load_torch(tmp_path / "run/state.pt")["epoch"] == RCE.epochs
    assert message(train, tmp_path / "run", RCE, wild) == first
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == files
    train(tmp_path / "calm", RCE, GRPO)
    train(tmp_path / "run", RCE, GRPO)
    assert_same_run(tmp_path / "calm", tmp_path / "run")


def test_the_command_says_how_to_go_on_with_a_lower_rate(lever, tmp_path):
    groups, features, _ = world()
    content = {
        str(group.query_id): {
            "candidate_pool_ids": group.pool,
            "pointer_candidates": [
                {
                    "pointer": s,
                    "pointer_global": [group.pool[i] for i in s],
                    "vqa_correct": int(r > 0),
                    "vqa_acc_score": r,
                }
                for s, r in zip(group.sequences, group.rewards, strict=True)
            ],
        }
        for group in groups
    }
    (tmp_path / "rl.json").write_text(json.dumps(content))
    torch.save(features, tmp_path / "f.pt")
    command = ("train", "--rl-data", "rl.json", "--embeddings", "f.pt", "--rce-epochs", "1", "--grpo-epochs", "2")
    done = lever(*command, "--set", "grpo.lr=1e36")
    assert done.status == 1
    assert "Traceback" not in done.err
    assert re.search(rf"GRPO epoch 1, .*query \d+.*lower grpo\.lr, as another run {ANOTHER_RUN}", done.err)
    folder = next((tmp_path / "results").rglob("rce_epoch1.pt")).parent
    assert not list(folder.glob("grpo_*"))
    assert lever(*command, "--set", "grpo.lr=1e-4").status == 1  # another run needs a place of its own
    assert lever(*command, "--set", "grpo.lr=1e-4", "--overwrite").status == 0


@pytest.mark.parametrize("part", ["weight", "optimizer", "extra"])
def test_no_epoch_is_committed_with_a_weight_or_moment_that_is_not_finite(tmp_path, part):
    policy = make()
    optimizer = torch.optim.AdamW(policy.parameters())
    policy.query_proj.weight.sum().backward()
    optimizer.step()
    journal, extra = journal_in(tmp_path, policy), {"old": {"w": torch.ones(2)}}
    before = sorted(path.name for path in tmp_path.iterdir())
    broken = {
        "weight": policy.query_proj.weight.data,
        "optimizer": optimizer.state[policy.query_proj.weight]["exp_avg_sq"],
        "extra": extra["old"]["w"],
    }[part]
    broken.view(-1)[0] = math.inf
    text = message(journal.commit, {"phase": "rce", "epoch": 4, "val_loss": 1.0}, policy, optimizer, extra)
    assert text.startswith(f"RCE epoch 4: {part}.")
    assert "is not finite, after its last step. " + NOTHING_WRITTEN in text
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_finite_numbers_whose_sum_overflows_are_finite():
    assert not_finite({"weight": torch.full((2,), 3e38)}) is None


# ---------------------------------------------------------------------- validation, frozen policies, online rollouts


@pytest.mark.parametrize("phase", ["rce", "grpo"])
def test_validation_names_query_and_rollout(tmp_path, phase):
    found = both_messages(tmp_path, **only(phase), policy=lambda: poisoned(20))
    assert found[0].startswith(
        f"{phase.upper()} epoch 1, validation: the val_loss is not finite: the log-prob of query 20, rollout 3 is nan"
    )
    assert "from decoding step 2 on" in found[1]


def test_a_log_prob_of_a_frozen_policy_is_named(tmp_path):
    found = both_messages(tmp_path, **only("grpo"), policy=lambda: poisoned(8))
    assert found[0].startswith("GRPO epoch 1, old policy: the log-prob of query 8, rollout 3 is nan")
    assert "from decoding step 2 on" in found[1]


def test_an_online_reward_is_named(tmp_path):
    policy, sets = make(), data()[0]

    def answer(sequences):
        rewards = torch.zeros(sequences.shape[:2])
        rewards[5, 1] = math.nan
        return rewards

    text = message(explore, policy, sets, 4, answer, lambda line: None, At("grpo", 3, "online rollouts"))
    assert text.startswith("GRPO epoch 3, online rollouts: the reward of query 5, online rollout 1 is nan")


def test_nothing_is_drawn_from_a_policy_whose_logits_are_not_finite(tmp_path):
    text = message(explore, poisoned(2), data()[0], 4, None, lambda line: None, At("grpo", 3, "online rollouts"))
    assert text.startswith("GRPO epoch 3, online rollouts: the log-prob of query 2, rollout 3 is nan")


# ---------------------------------------------------------------------- features and rewards on their way in


def test_features_of_zeros_train_and_stay_finite(tmp_path):
    groups, features, _ = world()
    features[::3] = 0
    policy, rows = train(tmp_path, sets=data(groups, features))
    assert not_finite(policy.state_dict()) is None
    assert not_finite(rows) is None


@pytest.mark.parametrize(("part", "value"), [("image", math.nan), ("text", 0.0)])
def test_an_encoder_that_gives_no_unit_vector_is_named_with_the_question(tmp_path, monkeypatch, part, value):
    folder = str(small_digits(tmp_path / "digits"))
    few = load_dataset(DataConfig(okvqa_path=folder, coco_path=folder))
    whole = getattr(FeatureEncoder, f"{part}s")

    def broken(self, items, *told):
        rows = whole(self, items, *told).clone()
        rows[0] = value
        return rows

    monkeypatch.setattr(FeatureEncoder, f"{part}s", broken)
    path = tmp_path / "features.safetensors"
    text = message(compute_features, few, FeatureConfig(encoder="asset:tiny-clip"), path, "cpu", track)
    named = int(re.match(r"question (\d+): asset:tiny-clip gives its", text)[1])
    assert named in {example.question_id for example in few.train_examples}
    assert f"{part}" in text
    assert ("zero" if value == 0 else "NaN or infinite") in text
    assert not path.exists()


# ---------------------------------------------------------------------- choosing


def test_finite_weights_whose_logits_overflow_choose_nothing(digits, digits_config, digits_features):
    problem = Evaluation(digits_config, digits, digits_features).problem
    policy = make(d_model=digits_features.train.image.shape[1])
    with torch.no_grad():
        policy.query_proj.weight.fill_(1e38)
    assert not_finite(policy.state_dict()) is None
    text = message(choose, policy, problem, 2, "here/grpo_epoch1.pt")
    assert re.match(r"here/grpo_epoch1\.pt, question \d+: the logits of pick 1 are NaN or infinite", text)


# ---------------------------------------------------------------------- --detect-anomaly


def test_a_run_that_is_looked_at_is_bit_for_bit_the_run_that_is_not(tmp_path):
    shape = {"dropout": 0.3, "attn_dropout": 0.3, "state_update": "gate"}
    rce, grpo = dataclasses.replace(RCE, epochs=1), dataclasses.replace(GRPO, dropout="both", epochs=2)
    train(tmp_path / "plain", rce, grpo, **shape)
    policy, said = make(**shape), []
    with detecting(policy, said.append):
        assert torch.is_anomaly_enabled()
        train(tmp_path / "looked", rce, grpo, policy=policy, **shape)
    assert len(said) == 1
    assert not torch.is_anomaly_enabled()
    assert not any(module._forward_hooks for module in policy.modules())
    assert_same_run(tmp_path / "plain", tmp_path / "looked")


def test_the_operation_whose_gradient_is_nan_is_named_with_its_line(tmp_path, monkeypatch):
    def shifted(self, index, noise, real=FrozenPolicy.log_probs):
        return real(self, index, noise) - 1000 * (index == 6)[:, None]

    monkeypatch.setattr(FrozenPolicy, "log_probs", shifted)
    sets = data()
    sets[0].rewards[6] = torch.tensor([1.0, 1.0, 0, 0, 0, 0, 0, 0])
    found = both_messages(tmp_path, make, **only("grpo", reference="old", kl_beta=0.0), sets=sets)
    assert re.search(r" \(first in \w+ of [\w/]*losses\.py, line \d+, \w+\)", found[1])


def test_a_gradient_that_fails_otherwise_is_no_anomaly():
    with torch.autograd.set_detect_anomaly(True), pytest.raises(RuntimeError, match="does not require grad"):
        backward(torch.tensor(1.0), lambda: None)


def test_the_command_takes_the_flag_and_is_no_other_run_for_it(lever, trained):
    before = (trained / RUN / "state.pt").read_bytes()
    small = ("--limit", "24", "--rce-epochs", "2")
    again = lever("train", *small, "--grpo-epochs", "4", "--detect-anomaly")
    assert again.status == 0
    assert again.out.count("--detect-anomaly: ") + again.err.count("--detect-anomaly: ") == 1
    assert (trained / RUN / "state.pt").read_bytes() == before
    assert "detect_anomaly" not in (trained / RUN / "config.yaml").read_text(encoding="utf-8")
    assert "--detect-anomaly" in lever("demo", "--help").out


# ---------------------------------------------------------------------- whatever is drawn

NUMBERS = st.floats(-3, 3, width=32)
SCALES = st.sampled_from([0.0, 1e-44, 1e-20, 1e-6, 1.0, 1e6, 1e14, 1e19, 1e38])
RATES = st.sampled_from([1e-45, 1e-8, 1e-3, 1.0, 1e5, 1e15, 1e25, 1e38])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return tmp_path_factory.mktemp("drawn")


@given(
    features=arrays.arrays("float32", (6, 4), elements=NUMBERS),
    rewards=arrays.arrays("float32", (3, 3), elements=NUMBERS),
    scales=st.tuples(SCALES, SCALES),
    rates=st.tuples(RATES, RATES),
    options=st.fixed_dictionaries(
        {
            "normalize": st.sampled_from(["none", "zscore", "rank"]),
            "advantage": st.sampled_from(["zscore", "rank"]),
            "dropout": st.sampled_from(["off", "both"]),
            "kl": st.sampled_from(["k1", "k2", "k3"]),
            "max_grad_norm": st.sampled_from([1e-30, 1.0, 1e38]),
            "temperature": st.sampled_from([0.1, 0.1, 0.1, 1e-30, 1e30]),
            "state_update": st.sampled_from(["none", "gate", "gru"]),
        }
    ),
)
@how(max_examples=15)
def test_training_ends_finite_or_names_query_and_epoch(drawn, features, rewards, scales, rates, options):
    folder = drawn / "run"
    shutil.rmtree(folder, ignore_errors=True)
    features = torch.from_numpy(features) * scales[0]
    rewards = torch.from_numpy(rewards) * scales[1]
    groups = [Group(i, [3, 4, 5, i], [[0, 1], [2, 3], [1, 0]], rewards[i].tolist()) for i in range(3)]
    rce = RceConfig(epochs=1, lr=rates[0], batch_size=2, normalize=options["normalize"])
    grpo = GrpoConfig(epochs=2, lr=rates[1], batch_size=2, **{k: options[k] for k in ("advantage", "dropout", "kl")})
    rce, grpo = (dataclasses.replace(config, max_grad_norm=options["max_grad_norm"]) for config in (rce, grpo))
    shape = {"d_model": 4, "hidden_dim": 8, "temperature": options["temperature"], "dropout": 0.1}
    shape["state_update"] = options["state_update"]
    policy = make(**shape)
    try:
        sets = to_tensors(groups[:2], features, features), to_tensors(groups[2:], features, features)
        journal = journal_in(folder, policy)
        train_rce(policy, *sets, rce, journal)
        train_grpo(policy, make(**shape), *sets, grpo, journal)
    except LeverError as error:
        text = str(error)
        event(re.sub(r"[\d.]+|-?inf|nan|rollout.*", "", text)[:70])
        assert re.match(r"the (query|ICD) feature of row \d|query \d, rollout \d: its reward", text) or (
            re.match(r"(RCE|GRPO) epoch \d", text) and re.search(r"query \d", text)
        ), text
    for path in folder.glob("*.pt") if folder.exists() else ():
        assert not_finite(load_torch(path)) is None, path
    if (folder / "metrics.jsonl").exists():
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            assert not_finite(json.loads(line)) is None, line
