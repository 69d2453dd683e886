"""Numbers that are not finite, put in on purpose at one query, rollout and step: the run stops and names just these.

The world is that of test_training: 24 queries, 18 of them trained on, pools of 6, two shots, 8 rollouts each.
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
from lvlm_helpers import local_lvlm
from test_loops import GRPO, RCE, assert_same_run, data, journal_in, make, same_state, train, world

from lever_lm.config.schema import DataConfig, FeatureConfig, GrpoConfig, PromptConfig, RceConfig
from lever_lm.data import load_dataset
from lever_lm.data.embeddings import ClipEncoder, compute_features
from lever_lm.evaluation.evaluate import Evaluation
from lever_lm.lvlm import build_prompt
from lever_lm.lvlm.decoding import NotFinite, Prefilled, beam_search, greedy
from lever_lm.selectors.pointer.checkpoint import save_torch
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training import grpo as training
from lever_lm.training.batches import to_tensors
from lever_lm.training.finite_checks import At, Pass, not_finite
from lever_lm.training.grpo import train_grpo, train_rce, update
from lever_lm.training.losses import rce_loss
from lever_lm.training.nan_debug import backward, detecting
from lever_lm.training.reference_policy import Anchor
from lever_lm.training.rollouts.file_format import Group, load_groups
from lever_lm.training.rollouts.online import explore
from lever_lm.training.validation import validate
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


# ---------------------------------------------------------------------- the cause of a loss and of a gradient


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("query", [0, 11])
def test_a_logit_is_named_by_query_rollout_and_decoding_step(tmp_path, query, value, step):
    policy = poisoned(query, value=value, step=step)
    text = message(train, tmp_path, **only("rce"), policy=policy)
    # all rollouts of a query share their first step
    of = f"query {query}, rollout 3" if step == 2 else f"query {query}, rollouts 0, 1, 2 and 5 more"
    assert text.startswith(
        f"RCE epoch 1, step 1: the loss is not finite: the logits of {of} are not, from decoding step {step} on. "
    )
    assert NOTHING_WRITTEN in text
    assert "lower rce.lr" in text
    assert re.search(ANOTHER_RUN, text)


def test_a_logit_within_grpo_is_named_with_its_epoch_and_step(tmp_path):
    options = only("grpo", batch_size=1, dropout="both")  # with `both` the old policy is asked step by step
    policy = poisoned(4, after=30)
    policy.dropout = 0.1
    text = message(train, tmp_path, **options, policy=policy)
    found = re.match(
        r"GRPO epoch (\d), step \d+: the loss is not finite: the logits of query 4, rollout 3 are not, from decoding "
        r"step 2 on\. .*lower grpo\.lr",
        text,
    )
    done = [row["epoch"] for row in journal_in(tmp_path, policy).rows]
    assert len(done) >= 1
    assert int(found[1]) == done[-1] + 1


def test_several_rollouts_are_listed_and_the_rest_counted(tmp_path):
    sets = data()
    sets[0].rewards[1, :2] = math.nan
    sets[0].rewards[3:9, 5] = math.inf
    text = message(train, tmp_path, **only("rce"), sets=sets)
    assert "the reward of query " in text
    named = re.search(r"the reward of (.*) is (nan|inf)\.", text)[1]
    assert named.endswith("; and 4 more queries")
    assert len(re.findall(r"query \d+, rollouts? ", named)) == 3


@pytest.mark.parametrize("phase", ["rce", "grpo"])
def test_weights_are_named_by_parameter_and_batch(tmp_path, phase):
    policy = make()
    with torch.no_grad():
        policy.query_proj.weight[2, 3] = math.nan
    text = message(train, tmp_path, **only(phase), policy=policy)
    assert text.startswith(f"{phase.upper()} epoch 1")
    assert "the weights query_proj.weight of the policy are not" in text
    assert re.search(r"query \d+, \d+, \d+ and 15 more\)", text)


def test_a_step_that_is_too_large_is_found_at_the_next(tmp_path):
    text = message(train, tmp_path / "next", **only("rce", batch_size=4, lr=1e36))
    assert re.match(r"RCE epoch 1, step 2: the (loss|gradient) is not finite: .*query \d", text)
    text = message(train, tmp_path / "itself", **only("rce", batch_size=4, lr=1e38))
    assert re.match(r"RCE epoch 1, step 1: the step of the optimizer overflows: .*query \d", text)


def test_features_that_break_after_they_were_checked_are_named(tmp_path):
    sets = data()
    sets[0].queries[7, 0] = math.nan
    assert "the feature of query 7 is not (lost are all its rollouts)" in message(
        train, tmp_path / "q", **only("rce"), sets=sets
    )
    sets = data()
    features = sets[0].icds.clone()
    features[sets[0].pools[5, 2]] = math.inf
    broken = dataclasses.replace(sets[0], icds=features)
    text = message(train, tmp_path / "c", **only("rce"), sets=(broken, sets[1]))
    assert "the feature of candidate 2 of the pool of query 5 is not (lost are all its rollouts)" in text


def test_a_ratio_that_overflows_is_named(tmp_path, monkeypatch):
    def shifted(self, index, noise, real=Anchor.log_probs):
        values = real(self, index, noise).clone()
        values[(index == 6).nonzero().flatten(), 2] -= 1000
        return values

    monkeypatch.setattr(Anchor, "log_probs", shifted)
    text = message(train, tmp_path, **only("grpo", reference="old"))
    what = "the ratio to the old policy of query 6, rollout 2 is inf"
    assert re.match(rf"GRPO epoch 1, step 1: the (loss|gradient) is not finite: {what}.*grpo\.refresh_every", text)


def test_a_kl_estimate_that_overflows_is_named(tmp_path, monkeypatch):
    made = []

    class Shifted(Anchor):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

        def log_probs(self, index, noise):
            values = super().log_probs(index, noise).clone()
            if self is made[1]:  # the reference, not the old policy
                values[(index == 9).nonzero().flatten(), 4] += 200
            return values

    monkeypatch.setattr(training, "Anchor", Shifted)
    text = message(train, tmp_path, **only("grpo"))
    assert "the loss is not finite: the KL estimate k3 of query 9, rollout 4 is inf" in text
    assert "grpo.kl=k1" in text


def test_rewards_too_large_for_the_temperature_are_named(tmp_path):
    sets = data()
    sets[0].rewards[2, 1] = 3e38
    text = message(train, tmp_path, **only("rce", temperature_start=0.5, temperature_end=0.5), sets=sets)
    assert "the reward over temperature of query 2, rollout 1 is inf" in text
    assert "rce.normalize=zscore" in text


def test_rewards_whose_spread_overflows_are_named_before_any_step(tmp_path):
    sets = data()
    sets[0].rewards[2, 1] = 1e30  # finite, yet its square is not: all advantages would be 0
    text = message(train, tmp_path, **only("grpo"), sets=sets)
    assert text.startswith("GRPO epoch 1: the spread of rewards in the group of query 2, rollouts 0, 1")


@pytest.mark.parametrize("phase", ["rce", "grpo"])
def test_a_gradient_is_named_by_query_and_rollout(tmp_path, phase):
    policy = poisoned(13, value="gradient", rollout=6)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    text = message(train, tmp_path, **only(phase), policy=policy)
    assert text.startswith(
        f"{phase.upper()} epoch 1, step 1: the gradient is not finite: that of query 13, rollout 6 overflows"
    )
    assert same_state(policy.state_dict(), before)


def test_a_gradient_whose_norm_overflows_is_named_by_its_largest_query(tmp_path):
    text = message(train, tmp_path, **only("rce"), policy=make(temperature=1e-25))
    assert re.match(r"RCE epoch 1, step 1: the gradient is not finite: that of query \d+, rollouts", text)


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
        log_probs = policy.log_prob(batch.query, batch.candidates, batch.sequences)
        seen = Pass(At("rce", 1, "step 1"), policy, batch, batch.mask, log_probs, dict)
        return update(optimizer, rce_loss(log_probs, batch.rewards, batch.mask, 0.5) * spoil, 1.0, seen)

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
    assert lever(*command, "--set", "grpo.lr=1e36").err == done.err
    changed = lever(*command, "--set", "grpo.lr=1e-4")
    assert changed.status == 1
    assert "--run-name" in changed.err
    assert lever(*command, "--set", "grpo.lr=1e-4", "--run-name", "calm").status == 0
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


# ---------------------------------------------------------------------- validation, anchors, online rollouts


@pytest.mark.parametrize("phase", ["rce", "grpo"])
def test_validation_names_query_and_rollout(tmp_path, phase):
    text = message(train, tmp_path, **only(phase), policy=poisoned(20))
    assert text.startswith(
        f"{phase.upper()} epoch 1, validation: the val_loss is not finite: the logits of query 20, rollout 3 are not, "
        "from decoding step 2 on"
    )
    assert not list(tmp_path.glob("*.pt"))


def test_validation_behind_projected_features_names_the_weights_and_no_feature():
    policy, (_, sets) = make(), data()
    crowded = dataclasses.replace(sets, icds=sets.icds[: sets.pools.numel() // 4], pools=sets.pools % 6)
    with torch.no_grad():
        policy.input_proj.weight[0, 0] = math.nan
    assert "the weights input_proj.weight of" in message(validate, policy, crowded, 0.5, At("rce", 2, "validation"))


def test_a_log_prob_of_a_policy_that_stays_is_named(tmp_path):
    text = message(train, tmp_path, **only("grpo"), policy=poisoned(8))
    assert text.startswith("GRPO epoch 1, old policy: the log-prob is not finite: the logits of query 8, rollout 3 ")


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
    assert "the logits of query 2, rollout 3 are not, from decoding step 2 on" in text


# ---------------------------------------------------------------------- features and rewards on their way in


@pytest.mark.parametrize(
    ("value", "words"),
    [(1e30, "reaches 1e.30, more than 1e.15"), (-1e16, "reaches 1e.16"), (1e300, "reaches 1e.300"), (math.nan, "NaN")],
)
def test_features_of_absurd_size_are_refused_by_row(value, words):
    groups, features, _ = world()
    features = features.double()
    features[9, 2] = value
    assert re.search(
        f"the query feature of row 9 .*{words}.*--embeddings", message(to_tensors, groups, features, features)
    )


def test_features_without_a_dimension_are_refused():
    groups, features, _ = world()
    assert "expected (N, D) with D > 0" in message(to_tensors, groups, features[:, :0], features[:, :0])


def test_features_of_zeros_train_and_stay_finite(tmp_path):
    groups, features, _ = world()
    features[::3] = 0
    policy, rows = train(tmp_path, sets=data(groups, features))
    assert not_finite(policy.state_dict()) is None
    assert not_finite(rows) is None


@pytest.mark.parametrize("value", [1e39, -1e300, math.inf, math.nan])
def test_rewards_beyond_float32_are_refused_by_query_and_rollout(value):
    groups, features, _ = world()
    groups[3] = dataclasses.replace(groups[3], rewards=[0.0] * 6 + [value, 0.0])
    assert message(to_tensors, groups, features, features).startswith("query 3, rollout 6: its reward")


@pytest.mark.parametrize("value", ["1e400", "-1e400", "NaN", "Infinity", "9" * 400])
def test_a_score_that_no_float_holds_is_named_with_file_query_and_trajectory(tmp_path, value):
    path = tmp_path / "rollouts.json"
    path.write_text(
        '{"7": {"candidate_pool_ids": [1, 2], "pointer_candidates": [{"pointer": [0], "pointer_global": [1], '
        f'"vqa_correct": 1}}, {{"pointer": [1], "pointer_global": [2], "vqa_acc_score": {value}}}]}}}}'
    )
    text = message(load_groups, path)
    assert str(path) in text
    assert "trajectory 1" in text or "finite" in text


@pytest.mark.parametrize("value", [math.nan, 0.0])
@pytest.mark.parametrize("part", ["image", "text"])
def test_an_encoder_that_gives_no_unit_vector_is_named_with_the_question(tmp_path, monkeypatch, part, value):
    folder = str(small_digits(tmp_path / "digits"))
    few = load_dataset(DataConfig(okvqa_path=folder, coco_path=folder))
    whole = ClipEncoder._unit
    calls = []

    def broken(output):
        rows = whole(output)
        calls.append(rows)
        if len(calls) == (1 if part == "image" else 2):
            rows[0] = value
        return rows

    monkeypatch.setattr(ClipEncoder, "_unit", staticmethod(broken))
    path = tmp_path / "features.safetensors"
    text = message(compute_features, few, FeatureConfig(encoder="asset:tiny-clip"), path, "cpu", track)
    named = int(re.match(r"question (\d+): asset:tiny-clip gives its", text)[1])
    assert named in {example.question_id for example in few.train_examples}
    assert f"{part}" in text
    assert ("zero" if value == 0 else "NaN or infinite") in text
    assert not path.exists()


# ---------------------------------------------------------------------- choosing


def overflowing(features):
    policy = PointerSelector(d_model=features, hidden_dim=32, dropout=0.0, attn_dropout=0.0)
    with torch.no_grad():
        policy.query_proj.weight.fill_(1e38)
    return policy


def test_finite_weights_whose_logits_overflow_choose_nothing(digits, digits_config, digits_features):
    evaluation = Evaluation(digits_config, digits, digits_features)
    policy = overflowing(digits_features.train.image.shape[1])
    assert not_finite(policy.state_dict()) is None
    text = message(evaluation.choose, policy, 2, "here/grpo_epoch1.pt")
    first = evaluation.queries[0].question_id
    assert text.startswith(f"here/grpo_epoch1.pt, question {first}: the logits of pick 1 are NaN or infinite")


def test_infer_names_the_checkpoint_that_chooses_nothing(lever, trained):
    path = trained / RUN / "grpo_epoch3.pt"
    content = load_torch(path)
    content["model_state_dict"]["query_proj.weight"].fill_(1e38)
    save_torch(path, content)
    done = lever("infer", "--ckpt", path, "--limit", "8", "--shots", "1")
    assert done.status == 1
    assert re.search(r"grpo_epoch3\.pt, question \d+: the logits of pick 1 are NaN or infinite", done.err)


# ---------------------------------------------------------------------- the LVLM


class Cache:
    """What beam search asks of a cache, for a model without memory."""

    def batch_repeat_interleave(self, times):
        self.times = times

    def reorder_cache(self, rows):
        self.rows = rows


def scripted(*steps):
    """Prompts whose logits of each new token are given: steps of (B, V)."""
    left = [torch.tensor(step) for step in steps]
    batch = len(left[0])

    def step(tokens, positions, mask):
        logits = left.pop(0)
        return logits.repeat_interleave(len(tokens) // batch, 0)

    mask, position = torch.ones(batch, 1, dtype=torch.long), torch.ones(batch, dtype=torch.long)
    return Prefilled(left.pop(0), Cache(), mask, position, step)


FINE, END = [0.0, 1.0, 0.5, -9.0], [0.0, -1.0, -2.0, 9.0]  # token 3 ends
EOS = torch.tensor([3])
BAD = [[math.nan, 0.0, 0.0, 0.0], [0.0, 0.0, math.nan, 0.0], [0.0, math.inf, 0.0, 0.0], [-math.inf] * 4]


def decode(beams, prefilled, tokens):
    return greedy(prefilled, tokens, EOS, 0) if beams == 1 else beam_search(prefilled, beams, tokens, EOS, 0, 1.0)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("when", [0, 1, 2])
@pytest.mark.parametrize("beams", [1, 2])
def test_decoding_stops_at_logits_that_are_not_finite_and_names_the_prompt(beams, when, bad):
    steps = [[FINE, FINE, FINE] for _ in range(3)]
    assert decode(beams, scripted(*steps), 3).shape == (3, 3)
    steps[when] = [FINE, bad, FINE]
    with pytest.raises(NotFinite) as caught:
        decode(beams, scripted(*steps), 3)
    assert caught.value.places == [1]


@pytest.mark.parametrize("bad", BAD)
def test_what_comes_after_the_end_of_a_prompt_does_not_count(bad):
    tokens = decode(1, scripted([FINE, END], [FINE, bad], [FINE, bad]), 3)
    assert tokens.tolist() == [[1, 1, 1], [3, 0, 0]]


def test_a_token_that_cannot_come_is_no_fault():
    assert decode(1, scripted([[0.0, -math.inf, 1.0, -math.inf]]), 1).tolist() == [[2]]


@pytest.fixture(scope="module")
def prompts(digits):
    return [
        build_prompt(digits.train_examples[i : i + i % 3], digits.val_examples[i], PromptConfig()) for i in range(5)
    ]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_generation_that_is_not_finite_names_the_question(monkeypatch, prompts, beams, dtype):
    ours = local_lvlm(num_beams=beams, dtype=dtype)
    inner, broken = ours.family.prefill, prompts[2]

    def prefill(batch):
        prefilled = inner(batch)
        prefilled.logits[batch.index(broken)] = math.nan
        return prefilled

    monkeypatch.setattr(ours.family, "prefill", prefill)
    text = message(ours.generate, prompts)
    assert text.startswith(
        f"question {broken.query.question_id}: asset:tiny-qwen2.5-vl in {dtype} gives its prompt logits"
    )
    assert ("lvlm.family.dtype=float32" in text) == (dtype != "float32")


def test_a_log_prob_that_is_not_finite_names_the_question(monkeypatch, prompts):
    ours = local_lvlm()
    head, query = ours.family.model.lm_head.forward, prompts[3].query.question_id

    def forward(hidden):
        logits = head(hidden)
        logits[0, 5] = math.nan  # of one token of the whole vocabulary
        return logits

    monkeypatch.setattr(ours.family.model.lm_head, "forward", forward)
    assert f"question {query}: " in message(ours.answer_log_prob, prompts[3:4], ["7"])


def test_image_features_that_are_not_finite_name_the_image_and_stay_off_the_disk(monkeypatch, tmp_path, prompts):
    from lever_lm.config.schema import LvlmConfig
    from lever_lm.lvlm.backend import load_local

    config = LvlmConfig(path="asset:tiny-qwen2.5-vl", dtype="float32")
    ours = load_local(config, PromptConfig(), "cpu", folder=tmp_path / "bank")
    tower = ours.family.vision._tower

    def broken(*args):
        features = tower(*args)
        features[0][0, 3] = math.nan
        return features

    monkeypatch.setattr(ours.family.vision, "_tower", broken)
    text = message(ours.generate, prompts[:1])
    assert text.startswith(f"the image {prompts[0].images[0]}: the vision tower of asset:tiny-qwen2.5-vl gives it NaN")
    assert not list(tmp_path.rglob("*.safetensors"))


# ---------------------------------------------------------------------- --detect-anomaly


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_run_that_is_looked_at_is_bit_for_bit_the_run_that_is_not(tmp_path, dropout):
    shape = {"dropout": dropout, "attn_dropout": dropout, "state_update": "gate"}
    grpo = dataclasses.replace(GRPO, dropout="both")
    train(tmp_path / "plain", RCE, grpo, **shape)
    policy, said = make(**shape), []
    with detecting(policy, said.append):
        assert torch.is_anomaly_enabled()
        train(tmp_path / "looked", RCE, grpo, policy=policy, **shape)
    assert len(said) == 1
    assert not torch.is_anomaly_enabled()
    assert not any(module._forward_hooks for module in policy.modules())
    assert_same_run(tmp_path / "plain", tmp_path / "looked")


def test_the_first_module_whose_output_is_not_finite_is_named(tmp_path):
    policy = make()
    with torch.no_grad():
        policy.cross_attn_layers[0].out_proj.bias[1] = math.nan

    def looked_at():
        with detecting(policy, lambda line: None):
            train(tmp_path, **only("rce"), policy=policy)

    text = message(looked_at)
    assert text.startswith(
        "RCE epoch 1, step 1: the loss is not finite: the weights cross_attn_layers.0.out_proj.bias of"
    )
    assert "The first module whose output is not finite: cross_attn_layers.0.out_proj (" in text
    assert text.endswith("of finite input")


def test_the_operation_whose_gradient_is_nan_is_named_with_its_line(tmp_path, monkeypatch):
    def shifted(self, index, noise, real=Anchor.log_probs):
        return real(self, index, noise) - 1000 * (index == 6)[:, None]

    monkeypatch.setattr(Anchor, "log_probs", shifted)
    options = only("grpo", reference="old", kl_beta=0.0)
    sets = data()
    sets[0].rewards[6] = torch.tensor([1.0, 1.0, 0, 0, 0, 0, 0, 0])
    plain = message(train, tmp_path / "plain", **options, sets=sets)
    policy = make()

    def looked_at():
        with detecting(policy, lambda line: None):
            train(tmp_path / "looked", **options, sets=sets, policy=policy)

    found = re.search(r" \(in the backward pass first (\w+) of losses\.py, line \d+, grpo_loss\)", message(looked_at))
    assert found
    assert message(looked_at).replace(found[0], "") == plain


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
@how(max_examples=60)
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
