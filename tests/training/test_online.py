"""Rounds of the policy's own rollouts: what they are, how they are mixed with the logged ones, that they teach, that a
killed run goes on; and on the digits, answered by the tiny LVLM, through the command line.

n queries, G rollouts, S = 2 shots. The world is that of worlds.py.
"""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ROLLOUTS, RUN, answers_in, track
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
    expected_reward,
    journal_in,
    make,
    without_times,
    world,
)

from lever_lm.lvlm import CachedLvlm, build_prompt, cut_answer
from lever_lm.lvlm.answer_cache import AnswerCache
from lever_lm.lvlm.backend import load_local
from lever_lm.lvlm.local import local_fingerprint
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.tasks.vqa_metrics import vqa_accuracy
from lever_lm.training.batches import GroupTensors, to_tensors
from lever_lm.training.finite_checks import At
from lever_lm.training.grpo import train_grpo
from lever_lm.training.rce import train_rce
from lever_lm.training.rewards import REWARD_MODES
from lever_lm.training.rollouts.file_format import load_groups
from lever_lm.training.rollouts.generate import make_rollouts, online_rewards
from lever_lm.training.rollouts.online import explore, mix
from lever_lm.utils.safe_torch_load import load_torch

ONLINE = dataclasses.replace(GRPO, online=True, online_every=2, online_samples=6)


class Reward:
    """The world's true reward of any sequence, and what was asked."""

    def __init__(self, worth, pools, die_at=None):
        self.worth, self.pools, self.die_at, self.asked = worth, pools, die_at, []

    def __call__(self, sequences):
        self.asked.append(sequences)
        if len(self.asked) == self.die_at:
            raise Killed
        queries = torch.arange(len(sequences))[:, None, None]
        return self.worth[self.pools[queries, sequences]].sum(-1)


def few(seed=0, rollouts=2):
    """Sets with few logged rollouts, and what every candidate is worth."""
    groups, features, worth = world(seed=seed)
    short = [dataclasses.replace(g, sequences=g.sequences[:rollouts], rewards=g.rewards[:rollouts]) for g in groups]
    return data(short, features), worth


def train(folder, grpo, *, rce=RCE, die_at=None, policy=None, seed=0, **shape):
    """What `lever train` does from the groups on → policy, rows, what was asked, epochs done at each asking."""
    sets, worth = few(seed)
    policy, initial = policy or make(**shape), make(**shape)
    journal = journal_in(folder, policy)
    reward, epochs = Reward(worth, sets[0].pools, die_at), []

    def answer(sequences):
        epochs.append(journal.done("grpo"))
        return reward(sequences)

    torch.manual_seed(0)
    train_rce(policy, *sets, rce, journal)
    train_grpo(policy, initial, *sets, grpo, journal, answer=answer if grpo.online else None)
    return policy, journal.rows, reward.asked, epochs


# ---------------------------------------------------------------------- mixing, by hand


def tiny(pool_mask=None):
    """Two queries with three and two logged rollouts."""
    return GroupTensors(
        queries=torch.eye(6),
        icds=torch.eye(6),
        rows=torch.tensor([4, 5]),
        pools=torch.tensor([[0, 1, 2], [1, 2, 3]]),
        pool_mask=pool_mask,
        sequences=torch.tensor([[[0, 1], [1, 2], [2, 0]], [[0, 2], [1, -1], [-1, -1]]]),
        mask=torch.tensor([[True, True, True], [True, True, False]]),
        rewards=torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]]),
    )


def round_of(samples):
    """A round of rollouts for the two queries."""
    return {
        "sequences": torch.arange(2 * samples * 2).view(2, samples, 2) % 3,
        "rewards": torch.arange(2.0 * samples).view(2, samples) / 10,
        "mask": torch.ones(2, samples, dtype=torch.bool),
    }


@pytest.mark.parametrize("samples", [2, 5])
def test_stacked_groups_are_padded_to_the_larger_size(samples):
    one = tiny(torch.tensor([[True] * 3, [True, True, False]]))
    fresh = round_of(samples)
    both, size = one.stacked(one.with_rollouts(**fresh)), max(3, samples)
    assert len(both) == 4
    assert both.rows.tolist() == [4, 5, 4, 5]
    assert both.pools.tolist() == one.pools.tolist() * 2
    assert both.pool_mask.tolist() == one.pool_mask.tolist() * 2
    assert both.sequences.shape == (4, size, 2)
    assert both.mask.shape == both.rewards.shape == (4, size)
    assert both.mask.sum(-1).tolist() == [3, 2, samples, samples]
    assert both.rewards[:2, :3].tolist() == one.rewards.tolist()
    assert both.rewards[2:, :samples].tolist() == fresh["rewards"].tolist()
    assert both.sequences[:2, :3].tolist() == one.sequences.tolist()
    assert both.sequences[2:, :samples].tolist() == fresh["sequences"].tolist()
    for rows, real in ((slice(0, 2), 3), (slice(2, 4), samples)):
        assert (both.sequences[rows, real:] == -1).all()
        assert not both.mask[rows, real:].any()
        assert (both.rewards[rows, real:] == 0).all()
    assert one.stacked(one).batch(torch.tensor([0, 2])).query_ids == [4, 4]
    assert tiny().stacked(tiny()).pool_mask is None


@pytest.mark.parametrize("ratio", [0.25, 0.9])
def test_online_groups_have_the_share_of_the_weight_that_was_asked_for(ratio):
    one = tiny()
    both, weights = mix(one, round_of(4), ratio)
    assert weights.tolist() == pytest.approx([1 - ratio, 1 - ratio, ratio, ratio])
    assert both.rewards[2:].tolist() == round_of(4)["rewards"].tolist()
    assert float(weights[2:].sum() / weights.sum()) == pytest.approx(ratio)


def test_at_ratio_one_the_logged_rollouts_are_left_out():
    own, weights = mix(tiny(), round_of(4), 1.0)
    assert len(own) == 2
    assert own.rewards.tolist() == round_of(4)["rewards"].tolist()
    assert weights.tolist() == [1.0, 1.0]
    one = tiny()
    same, weights = mix(one, None, 0.5)
    assert same is one
    assert weights.tolist() == [1.0, 1.0]


# ---------------------------------------------------------------------- a round


def test_a_round_holds_samples_of_the_policy_and_their_rewards():
    sets, worth = few()
    policy, reward, said = make().train(), Reward(worth, sets[0].pools), []
    torch.manual_seed(0)
    found = explore(policy, sets[0], 200, reward, said.append, At("grpo", 1))
    sequences = found["sequences"]
    assert sequences.shape == (TRAIN, 200, 2)
    assert found["mask"].all()
    assert reward.asked[0] is sequences
    assert torch.equal(found["rewards"], Reward(worth, sets[0].pools)(sequences))
    assert (sequences[..., 0] != sequences[..., 1]).all()
    mean = float(found["rewards"].mean())
    tied = sum(len(set(row)) == 1 for row in found["rewards"].tolist()) / TRAIN
    assert said == [f"online: 3600 rollouts of the policy, mean reward {mean:.4f}, {tied:.0%} of groups tied"]
    # Drawn as log_prob says, dropout off whatever mode the policy was in.
    batch = sets[0].batch(torch.arange(TRAIN))
    pairs = torch.tensor(list(itertools.permutations(range(POOL), 2)))
    with torch.no_grad():
        log_probs = policy.eval().log_prob(batch.query, batch.candidates, pairs.expand(TRAIN, -1, -1))
    drawn = (sequences[:, :, None] == pairs).all(-1).float().mean(1)
    assert float((drawn - log_probs.exp()).abs().max()) < 0.15
    assert float((drawn - log_probs.exp()).abs().mean()) < 0.02


def test_a_round_of_an_untrained_policy_with_stop_has_shorter_sequences_too():
    sets, _ = few()
    policy = make(stop=True)
    torch.manual_seed(0)
    found = explore(
        policy, sets[0], 20, lambda sequences: (sequences >= 0).sum(-1).float(), lambda line: None, At("grpo", 1)
    )
    lengths = found["rewards"].flatten().tolist()
    assert set(lengths) == {1.0, 2.0}
    assert (found["sequences"][..., 0] >= 0).all()


@pytest.mark.parametrize(("every", "rounds"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (9, [0])])
def test_rounds_come_at_the_first_epoch_and_every_so_many_after(tmp_path, every, rounds):
    grpo = dataclasses.replace(ONLINE, epochs=5, online_every=every)
    _, _, asked, epochs = train(tmp_path, grpo)
    assert epochs == rounds  # epochs finished when the policy was asked
    assert [tuple(sequences.shape) for sequences in asked] == [(TRAIN, 6, 2)] * len(rounds)


def test_the_rows_count_logged_and_online_groups(tmp_path):
    for ratio, rollouts in ((0.5, 2 + 6), (1.0, 6)):
        _, rows, asked, _ = train(tmp_path / str(ratio), dataclasses.replace(ONLINE, epochs=1, online_ratio=ratio))
        sets, worth = few()
        online = Reward(worth, sets[0].pools)(asked[0]).sum()
        total = online + (sets[0].rewards.sum() if ratio < 1 else 0)
        assert rows[-1]["reward"] == pytest.approx(float(total) / (TRAIN * rollouts), rel=1e-5)


def test_the_old_policy_is_that_of_the_round(tmp_path):
    """With a round, and a single step, each epoch the ratios are 1 although the old policy is never refreshed."""
    grpo = dataclasses.replace(ONLINE, epochs=4, refresh_every=0, batch_size=2 * QUERIES)
    for every, moved in ((1, [False] * 4), (2, [False, True, False, True])):
        _, rows, _, _ = train(tmp_path / str(every), dataclasses.replace(grpo, online_every=every))
        ratios = [row["mean_ratio"] for row in rows if row["phase"] == "grpo"]
        assert [abs(ratio - 1) > 1e-4 for ratio in ratios] == moved


def test_where_few_rollouts_are_logged_the_own_ones_teach_more(tmp_path):
    sets, worth = few()
    start = expected_reward(make(), sets[0], worth)
    reached = {}
    for online in (False, True):
        grpo = dataclasses.replace(ONLINE, epochs=12, online=online)
        policy, *_ = train(tmp_path / str(online), grpo, rce=dataclasses.replace(RCE, epochs=0))
        reached[online] = expected_reward(policy, sets[0], worth)
    # Measured: 0.09 to 0.15 above the logged rollouts alone, 0.18 to 0.24 above the start.
    assert reached[True] > reached[False] + 0.04
    assert reached[True] > start + 0.1


@pytest.mark.parametrize(("batch_size", "seed"), [(1, 2), (8, 1)])
def test_the_ratio_says_whom_to_believe_whatever_the_batch_size(tmp_path, batch_size, seed):
    """Logged rewards that say the opposite of the online ones."""
    groups, features, worth = world(seed=seed)
    sets = data([dataclasses.replace(g, rewards=[2 - r for r in g.rewards]) for g in groups], features)
    reached = []
    for ratio in (0.1, 0.9):
        policy, journal = make(), journal_in(tmp_path / str(ratio), make())
        how = {"batch_size": batch_size, "lr": 3e-3 if batch_size > 1 else 1e-3}
        grpo = dataclasses.replace(ONLINE, epochs=6, online_ratio=ratio, **how)
        torch.manual_seed(0)
        train_grpo(policy, make(), *sets, grpo, journal, answer=Reward(worth, sets[0].pools))
        reached.append(expected_reward(policy, sets[0], worth))
    assert reached[1] > reached[0] + 0.04


# ---------------------------------------------------------------------- killed and resumed

VARIANTS = {
    "dropout": ({"dropout": "both", "online_ratio": 1.0}, {"dropout": 0.3, "attn_dropout": 0.1}),
    "stop-frozen": ({"freeze_backbone": True, "refresh_every": 0}, {"stop": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_within_an_online_epoch_ends_bit_for_bit_where_an_unbroken_one_does(tmp_path, variant):
    changes, shape = VARIANTS[variant]
    grpo = dataclasses.replace(ONLINE, epochs=4, **changes)
    rce = dataclasses.replace(RCE, epochs=1)
    _, _, _, rounds = train(tmp_path / "whole", grpo, rce=rce, **shape)
    assert rounds == [0, 2]
    killed = 0
    for calls in (6, 16):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        policy = make(kind=Mortal, **shape)
        policy.left = calls
        try:
            train(tmp_path / "broken", grpo, rce=rce, policy=policy, **shape)
        except Killed:
            killed += 1
        train(tmp_path / "broken", grpo, rce=rce, **shape)
        assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert killed >= 1


@pytest.mark.parametrize("die_at", [1, 2])
def test_a_run_killed_while_it_is_answered_ends_bit_for_bit_where_an_unbroken_one_does(tmp_path, die_at):
    grpo = dataclasses.replace(ONLINE, epochs=4)
    _, _, asked, _ = train(tmp_path / "whole", grpo)
    with pytest.raises(Killed):
        train(tmp_path / "broken", grpo, die_at=die_at)
    _, _, again, rounds = train(tmp_path / "broken", grpo)
    assert rounds == [0, 2][die_at - 1 :]
    assert all(torch.equal(*pair) for pair in zip(again, asked[die_at - 1 :], strict=True))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_raising_the_epochs_goes_on_with_the_round_that_is_there(tmp_path):
    grpo = dataclasses.replace(ONLINE, epochs=5, online_every=3)
    train(tmp_path / "whole", grpo)
    rounds = [train(tmp_path / "raised", dataclasses.replace(grpo, epochs=epochs))[3] for epochs in (1, 2, 5)]
    assert rounds == [[0], [], [3]]
    assert_same_run(tmp_path / "whole", tmp_path / "raised")


# ---------------------------------------------------------------------- answered by the LVLM


@pytest.fixture(scope="module")
def logged(digits, digits_config, digits_features, tmp_path_factory):
    """(config, rollout file, LVLM behind the cache that made it): 5 queries over pools of 16."""
    kinds = {"beam": 1, "sample": 1, "retrieval": 1, "random": 2}
    rollout = dataclasses.replace(digits_config.rollout, num_queries=5, pool_size=16, gt_prob=True, **kinds)
    config = dataclasses.replace(digits_config, rollout=rollout)
    folder = tmp_path_factory.mktemp("online")
    stamp = local_fingerprint(config.lvlm, config.prompt, "cpu")
    cache = AnswerCache(folder / "answers.sqlite")
    lvlm = CachedLvlm(lambda prompts: load_local(config.lvlm, config.prompt, "cpu"), stamp, cache, track)
    make_rollouts(config, digits, digits_features, lvlm, folder / "rl_data.json", lambda text: None)
    return config, folder / "rl_data.json", lvlm


def answering(logged, digits, groups, **reward):
    """online_rewards for the queries of these groups, under a config of these reward settings."""
    config, _, lvlm = logged
    config = dataclasses.replace(config, reward=dataclasses.replace(config.reward, **reward))
    rows, pools = torch.tensor([g.query_id for g in groups]), torch.tensor([g.pool for g in groups])
    return online_rewards(config, digits, rows, pools, lvlm)


@pytest.mark.parametrize("mode", [*sorted(REWARD_MODES.keys() - {"infoscore"}), "legacy"])
def test_a_sequence_gets_online_the_reward_it_has_in_the_rollout_file(logged, digits, mode):
    weights = {"hard_weight": 0.7, "soft_weight": 1.3, "rel_weight": 0.4}
    groups = load_groups(logged[1], reward_mode=mode, **weights)
    tensors = to_tensors(groups, torch.zeros(2504, 4), torch.zeros(2504, 4))
    found = answering(logged, digits, groups, mode=mode, **weights)(tensors.sequences)
    assert found.shape == tensors.rewards.shape
    assert torch.equal(found[tensors.mask], tensors.rewards[tensors.mask])
    assert len(set(tensors.rewards[tensors.mask].tolist())) > 1


def test_what_the_rollouts_asked_is_not_asked_again_and_what_is_new_is(logged, digits):
    groups = load_groups(logged[1])
    tensors, before = to_tensors(groups, torch.zeros(2504, 4), torch.zeros(2504, 4)), logged[2].asked
    answer = answering(logged, digits, groups)
    answer(tensors.sequences)
    assert logged[2].asked == before
    answer(tensors.sequences.flip(-1))  # the other order is another prompt
    assert before < logged[2].asked <= before + int(tensors.mask.sum())


class Shouting:
    """An LVLM that knows every answer and writes it in capitals."""

    def generate(self, prompts, what="answers"):
        return [prompt.query.answer.upper() for prompt in prompts]


def test_a_reward_does_not_hang_on_how_an_answer_is_written(logged, digits):
    """Also where all ten annotators agree, where the official evaluator compares the strings as they are."""
    config, train = logged[0], digits.train_examples
    agreed = [row for row, query in enumerate(train) if len(set(query.answers)) == 1][:3]
    disagreed = [row for row, query in enumerate(train) if query.answers.count(query.answer) in range(4, 10)][:3]
    rows, pools = torch.tensor(agreed + disagreed), torch.tensor([[2000, 2001]] * 6)
    answer = online_rewards(config, digits, rows, pools, Shouting())
    assert answer(torch.tensor([[[0, 1]]] * 6)).flatten().tolist() == [2.0] * 6  # right, and all of the accuracy


def test_a_shorter_sequence_is_a_shorter_prompt(logged, digits):
    config, path, lvlm = logged
    groups, train, expected = load_groups(path), digits.train_examples, []
    for group in groups:
        query = train[group.query_id]
        prompts = [
            build_prompt([train[group.pool[i]] for i in picks], query, config.prompt) for picks in ([3], [5, 2], [7])
        ]
        answers = [cut_answer(text) for text in lvlm.generate(prompts)]
        expected.append([vqa_accuracy(answer, query.answers, always_normalize=True) for answer in answers])
    asked = lvlm.asked
    sequences = torch.tensor([[[3, -1], [5, 2], [7, -1]]]).expand(len(groups), -1, -1)
    found = answering(logged, digits, groups, mode="soft_only")(sequences)
    assert lvlm.asked == asked, "those very prompts were answered above"
    assert found.tolist() == [pytest.approx(row, abs=1e-6) for row in expected]


# ---------------------------------------------------------------------- through the command line

KINDS = ("beam=1", "sample=1", "retrieval=1", "random=2", "pool_size=16", "temperatures=[1.0]")
QUICK = [part for kind in KINDS for part in ("--set", f"rollout.{kind}")]
QUICK += ["--limit", "8", "--rce-epochs", "1", "--grpo-epochs", "3"]
ROUNDS = [part for key in ("online=true", "online_every=2", "online_samples=2") for part in ("--set", f"grpo.{key}")]


def rows_in(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [without_times(row) for row in rows]


def test_online_training_on_the_digits_is_planned_done_and_not_asked_twice(lever, digits_folder):
    command = ["train", *QUICK, *ROUNDS, "--json"]
    plan = {stage["name"]: stage for stage in lever(*command, "--dry-run").json["stages"]}
    # Rounds at epochs 1 and 3, two samples for each of the 6 training queries.
    assert plan["online rollouts"]["lvlm_calls"] == 2 * 2 * 6
    assert plan["online rollouts"]["state"] == "2 rounds"
    assert not plan["online rollouts"]["exact"]
    assert not list(digits_folder.rglob("answers_*"))

    done = lever(*command)
    assert done.status == 0, done.err
    asked = answers_in(digits_folder)
    logged = plan["rollouts"]["lvlm_calls"]
    assert logged < asked <= logged + 24
    assert "online rollouts: " in done.err
    rows = rows_in(digits_folder / RUN)
    assert [row["epoch"] for row in rows if row["phase"] == "grpo"] == [1, 2, 3]

    finished = {stage["name"] for stage in lever(*command, "--dry-run").json["stages"]}
    assert "online rollouts" not in finished
    again = lever(*command)
    assert again.status == 0
    assert "prompts to ask" not in again.err

    # Rollouts of this dataset under another name: online too. Features of one's own name no examples.
    shutil.copy2(digits_folder / ROLLOUTS, digits_folder / "own.json")
    own = lever(*command, "--rl-data", "own.json", "--run-name", "own")
    assert own.status == 0, own.err
    assert rows_in(digits_folder / RUN.with_name("own")) == rows
    assert answers_in(digits_folder) == asked


def test_features_of_ones_own_cannot_be_asked_about(lever, tmp_path):
    entry = {
        "candidate_pool_ids": [8, 9],
        "pointer_candidates": [
            {"pointer": [i], "pointer_global": [8 + i], "vqa_correct": i, "vqa_acc_score": i} for i in range(2)
        ],
    }
    (tmp_path / "own.json").write_text(json.dumps({str(query): entry for query in range(6)}))
    torch.save(torch.randn(10, 8), tmp_path / "own.pt")
    command = ["train", "--rl-data", "own.json", "--embeddings", "own.pt", "--grpo-epochs", "2"]
    refused = lever(*command, *ROUNDS)
    assert refused.status == 2
    assert "own.pt" in refused.err
    assert "leave --embeddings out" in refused.err
    assert "grpo.online=false" in refused.err
    assert not (tmp_path / "results").exists()


def test_a_policy_that_may_stop_trains_and_infers_and_is_not_converted(
    lever, digits_folder, digits_config, digits_features
):
    stop = ["--set", "policy.stop=true"]
    trained = lever("train", *QUICK, *stop, "--json")
    assert trained.status == 0, trained.err
    assert trained.json["converted"] is None
    assert "not converted: " in trained.err
    assert "stop=True" in trained.err
    lengths = {
        len(trajectory["pointer"])
        for key, entry in json.loads((digits_folder / ROLLOUTS).read_text()).items()
        if key != "_meta"
        for trajectory in entry["pointer_candidates"]
    }
    assert lengths == {1, 2}

    refused = lever("convert", *stop)
    assert refused.status == 1
    assert "stop=True" in refused.err
    assert not list(digits_folder.rglob("*v2format*"))

    # What the untrained stop is worth to a policy is chance: here it is made as good as a middling candidate.
    path = Path(trained.json["recommended"]["checkpoint"])
    content = load_torch(path)
    policy = PointerSelector(**content["config"]["policy"])
    policy.load_state_dict(content["model_state_dict"])
    queries, icds = digits_features.queries("val", digits_config.features), digits_features.icds(digits_config.features)
    with torch.no_grad():
        state, candidates = policy.eval().encode(queries[:50], icds[:16].expand(50, -1, -1))
    units = torch.nn.functional.normalize(candidates, dim=-1)
    middling = torch.nn.functional.normalize(units.mean((0, 1)), dim=-1)
    toward = torch.nn.functional.normalize(state.mean(0), dim=-1)
    content["model_state_dict"]["stop_embedding"] = middling + toward
    torch.save(content, "stopping.pt")
    inferred = lever(
        "infer", *QUICK[:-4], *stop, "--ckpt", "stopping.pt", "--shots", "4", "--set", "infer.pool_size=16", "--json"
    )
    assert inferred.status == 0, inferred.err
    lines = (Path(inferred.json["folder"]) / "icds.jsonl").read_text().splitlines()
    picks = [json.loads(line)["icds"] for line in lines]
    assert 1 <= min(map(len, picks)) < 4
    assert inferred.json["results"][0]["n"] == 8
