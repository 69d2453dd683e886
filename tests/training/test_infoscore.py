"""InfoScore: the search by hand and against exhaustion; its gains against plain forward passes; and its rollouts.

K pool, S shots. A hand-made table says what the reference answer's log-prob is after each sequence.
"""

import dataclasses
import itertools
import json
import random

import pytest
from helpers import ROLLOUTS, RUN, answers_in, track
from lvlm_helpers import plain_log_prob

from lever_lm.config.schema import RolloutConfig
from lever_lm.lvlm import CachedLvlm, build_prompt
from lever_lm.lvlm.answer_cache import AnswerCache
from lever_lm.lvlm.backend import load_local
from lever_lm.lvlm.local import local_fingerprint
from lever_lm.training.rollouts.file_format import load_groups
from lever_lm.training.rollouts.infoscore import add_infoscore, infoscore_calls, search
from lever_lm.training.rollouts.propose import propose_groups
from lever_lm.utils.errors import LeverError, UsageError

# ---------------------------------------------------------------------- the search, by hand


class Table:
    """Log-probs by (query, sequence), and what was asked, list by list."""

    def __init__(self, values):
        self.values, self.asked = values, []

    def __call__(self, pairs):
        self.asked.append([(query, tuple(sequence)) for query, sequence in pairs])
        return [self.values[query][tuple(sequence)] for query, sequence in pairs]


# Candidates 0, 1, 2. Alone 1 helps most, but with 0 before it 2 is best of all; the order matters.
ONE = {
    (): -5.0,
    (0,): -4.0,
    (1,): -3.0,
    (2,): -6.0,
    (0, 1): -2.5,
    (0, 2): -1.0,
    (1, 0): -2.0,
    (1, 2): -4.0,
    (2, 0): -3.5,
    (2, 1): -7.0,
}


@pytest.mark.parametrize(
    ("shots", "width", "found"),
    [
        (1, 1, [([1], 2.0)]),
        (1, 2, [([1], 2.0), ([0], 1.0)]),
        (1, 9, [([1], 2.0), ([0], 1.0), ([2], -1.0)]),
        (2, 1, [([1, 0], 3.0)]),  # greedy: it goes on from 1 only
        (2, 2, [([0, 2], 4.0), ([1, 0], 3.0)]),  # a second beam finds what is best of all
        (2, 9, [([0, 2], 4.0), ([1, 0], 3.0), ([0, 1], 2.5), ([2, 0], 1.5), ([1, 2], 1.0), ([2, 1], -2.0)]),
    ],
)
def test_the_best_sequences_with_their_gains_over_no_demonstration(shots, width, found):
    assert search(Table([ONE]), [[0, 1, 2]], shots, width) == [found]


def test_sequences_that_count_as_the_same_leave_the_better_order():
    found = search(Table([ONE]), [[0, 1, 2]], 2, 9, frozenset)
    assert found == [[([0, 2], 4.0), ([1, 0], 3.0), ([1, 2], 1.0)]]


def test_the_same_in_another_order_makes_room_for_a_different_one():
    assert search(Table([ONE]), [[0, 1, 2]], 2, 2, frozenset) == [[([0, 2], 4.0), ([1, 0], 3.0)]]
    close = {**ONE, (2, 0): -1.5}  # now second best of all, but the same ICDs as the best
    assert search(Table([close]), [[0, 1, 2]], 2, 3, frozenset)[0][:2] == [([0, 2], 4.0), ([1, 0], 3.0)]
    assert search(Table([close]), [[0, 1, 2]], 2, 3)[0][:2] == [([0, 2], 4.0), ([2, 0], 3.5)]


def test_what_is_asked_is_the_empty_prompt_and_every_step_of_every_beam_all_queries_at_once():
    other = {sequence: -value for sequence, value in ONE.items()}
    table = Table([ONE, other])
    found = search(table, [[0, 1, 2], [0, 2]], 2, 1)
    assert table.asked == [
        [(0, ()), (1, ())],
        [(0, (0,)), (0, (1,)), (0, (2,)), (1, (0,)), (1, (2,))],
        [(0, (1, 0)), (0, (1, 2)), (1, (2, 0))],
    ]
    # The second query never tries candidate 1. Nothing: 5; (2,): 6; (2, 0): 3.5, a loss.
    assert found == [[([1, 0], 3.0)], [([2, 0], -1.5)]]


@pytest.mark.parametrize("seed", range(3))
def test_a_search_wide_enough_is_exhaustive(seed):
    rng = random.Random(seed)
    candidates = [4, 7, 9, 11]
    every = [s for length in range(4) for s in itertools.permutations(candidates, length)]
    table = {sequence: -10 * rng.random() for sequence in every}
    found = search(Table([table]), [candidates], 3, 1000)[0]
    exhaustive = sorted(itertools.permutations(candidates, 3), key=lambda s: -table[s])
    assert [tuple(sequence) for sequence, _ in found] == exhaustive
    assert [gain for _, gain in found] == pytest.approx([table[s] - table[()] for s in exhaustive])


@pytest.mark.parametrize(("shots", "width"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2)])
def test_the_bound_on_calls_holds(digits_config, shots, width):
    every = [s for length in range(4) for s in itertools.permutations(range(6), length)]
    table = Table([{sequence: float(len(sequence)) for sequence in every}])
    search(table, [list(range(6))], shots, width)
    changes = {"shots": shots, "infoscore": width, "infoscore_candidates": 6}
    rollout = dataclasses.replace(digits_config.rollout, **changes)
    asked, bound = sum(map(len, table.asked)), infoscore_calls(dataclasses.replace(digits_config, rollout=rollout), 64)
    assert asked <= bound <= asked + (shots - 1) * shots * width  # no more than the repeats that are left out
    without = dataclasses.replace(rollout, infoscore=0)
    assert infoscore_calls(dataclasses.replace(digits_config, rollout=without), 64) == 0


# ---------------------------------------------------------------------- on the digits, by the tiny LVLM

QUERIES, POOL = 12, 16


@pytest.fixture(scope="module")
def config(digits_config):
    kinds = {"beam": 1, "sample": 1, "retrieval": 1, "random": 3, "temperatures": (1.0,)}
    rollout = dataclasses.replace(
        digits_config.rollout, num_queries=QUERIES, pool_size=POOL, shots=1, infoscore=2, **kinds
    )
    return dataclasses.replace(digits_config, rollout=rollout)


@pytest.fixture(scope="module")
def model(config):
    return load_local(config.lvlm, config.prompt, "cpu")


@pytest.fixture(scope="module")
def cached(config, model, tmp_path_factory):
    stamp = local_fingerprint(config.lvlm, config.prompt, "cpu")
    return CachedLvlm(
        lambda prompts: model, stamp, AnswerCache(tmp_path_factory.mktemp("infoscore") / "a.sqlite"), track
    )


@pytest.fixture(scope="module")
def searched(config, digits, digits_features, cached):
    """searched(config changes) → proposals with the best by InfoScore among them, and as they were before."""

    def run(**changes):
        changed = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **changes))
        before, after = (propose_groups(changed, digits, digits_features) for _ in range(2))
        add_infoscore(after, changed, digits.train_examples, cached)
        return after, before

    return run


@pytest.fixture(scope="module")
def single(searched):
    """One shot: (proposals, as they were before)."""
    return searched()


def test_gains_are_differences_of_the_reference_answers_log_prob(single, digits, config, model):
    proposals, train, style = single[0], digits.train_examples, config.prompt.style
    for query, pool, group in list(zip(proposals.queries, proposals.pools, proposals.groups, strict=True))[:4]:
        nothing = plain_log_prob(model, build_prompt([], query, config.prompt), query.answer, style)
        for trajectory in group[:2]:
            prompt = build_prompt([train[pool[i]] for i in trajectory["pointer"]], query, config.prompt)
            gain = plain_log_prob(model, prompt, query.answer, style) - nothing
            assert trajectory["infoscore"] == pytest.approx(gain, abs=2e-4)


def test_the_best_come_first_in_place_of_the_same_found_otherwise(single, config):
    proposals, before = single
    for group, old in zip(proposals.groups, before.groups, strict=True):
        assert [t["gen_method"] for t in group[:2]] == ["infoscore"] * 2
        assert [set(t) for t in group[:2]] == [{"pointer", "gen_method", "infoscore"}] * 2
        assert group[0]["infoscore"] >= group[1]["infoscore"]
        best = [t["pointer"] for t in group[:2]]
        assert group[2:] == [t for t in old if t["pointer"] not in best]
        assert len({t["pointer"][0] for t in group}) == len(group)
    assert any(len(group) < len(old) + 2 for group, old in zip(proposals.groups, before.groups, strict=True))


def test_no_candidate_of_the_pool_gains_more_than_the_best(single, digits, config, cached):
    proposals, train = single[0], digits.train_examples
    for query, pool, group in zip(proposals.queries, proposals.pools, proposals.groups, strict=True):
        prompts = [build_prompt(icds, query, config.prompt) for icds in ([], *([train[i]] for i in pool))]
        nothing, *scores = cached.answer_log_prob(prompts, [query.answer] * (POOL + 1))
        gains = sorted((score - nothing for score in scores), reverse=True)
        assert [t["infoscore"] for t in group[:2]] == pytest.approx(gains[:2], abs=2e-6)
        assert gains[0] > gains[-1] + 0.1, "candidates that are all alike prove nothing"


def test_fewer_candidates_are_a_part_of_the_pool_drawn_by_the_seed(searched, single):
    few, again = searched(infoscore=3, infoscore_candidates=3)[0], searched(infoscore=3, infoscore_candidates=3)[0]
    tried = [{t["pointer"][0] for t in group[:3]} for group in few.groups]
    assert few.groups == again.groups
    assert all(len(places) == 3 for places in tried)
    assert len({frozenset(places) for places in tried}) > 1
    for group, whole in zip(few.groups, single[0].groups, strict=True):
        assert group[0]["infoscore"] <= whole[0]["infoscore"]


def test_orders_count_as_one_or_as_two(searched):
    for distinct in (False, True):
        limits = {"shots": 2, "infoscore": 6, "infoscore_candidates": 3, "distinct_orders": distinct, "num_queries": 3}
        proposals, _ = searched(**limits)
        for group in proposals.groups:
            best = [tuple(t["pointer"]) for t in group if t["gen_method"] == "infoscore"]
            # Of 3 candidates there are 3 pairs, and 6 with their orders.
            assert len(best) == len(set(best)) == (6 if distinct else 3)
            assert len(set(map(frozenset, best))) == 3
            others = {tuple(t["pointer"]) for t in group if t["gen_method"] != "infoscore"}
            assert not others & set(best)
            if not distinct:
                assert not set(map(frozenset, others)) & set(map(frozenset, best))


def test_orders_of_other_kinds_are_kept_only_where_asked(config, digits, digits_features):
    kept = {}
    for distinct in (False, True):
        limits = {"shots": 2, "pool_size": 2, "random": 40, "distinct_orders": distinct, "num_queries": 4}
        changed = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **limits))
        groups = propose_groups(changed, digits, digits_features).groups
        kept[distinct] = [sorted(t["pointer"] for t in group) for group in groups]
    assert kept[True] == [[[0, 1], [1, 0]]] * 4
    assert all(group in ([[0, 1]], [[1, 0]]) for group in kept[False])


@pytest.mark.parametrize("tried", [1, 2])
def test_fewer_candidates_than_shots_are_refused_with_both_keys(searched, tried):
    with pytest.raises(LeverError, match=rf"rollout\.infoscore_candidates {tried} are too few .* rollout\.shots 3"):
        searched(shots=3, infoscore_candidates=tried, num_queries=2)


@pytest.mark.parametrize("key", ["infoscore", "infoscore_candidates"])
def test_a_negative_number_is_refused_with_its_key(key):
    with pytest.raises(UsageError, match=rf"rollout\.{key} must not be negative"):
        RolloutConfig(**{key: -1})


# ---------------------------------------------------------------------- through the command line

SMALL = ["--limit", "8", "--set", "rollout.pool_size=16", "--set", "rollout.temperatures=[1.0]"]
SEARCH = ["--set", "rollout.infoscore=1", "--set", "rollout.infoscore_candidates=6"]
NO_OTHERS = [part for kind in ("beam", "sample", "retrieval", "random") for part in ("--set", f"rollout.{kind}=0")]


def planned_calls(lever, *arguments):
    done = lever("rollout", *arguments, "--dry-run", "--json")
    return next(stage for stage in done.json["stages"] if stage["name"] == "rollouts")


def entries_in(folder):
    content = json.loads((folder / ROLLOUTS).read_text())
    return {int(key): entry["pointer_candidates"] for key, entry in content.items() if key != "_meta"}


def test_a_rollout_file_with_infoscores_is_planned_made_and_loaded(lever, digits_folder):
    plan = planned_calls(lever, *SMALL, *SEARCH)
    assert not plan["exact"]
    done = lever("rollout", *SMALL, *SEARCH)
    assert done.status == 0, done.err
    assert answers_in(digits_folder) <= plan["lvlm_calls"]
    entries = entries_in(digits_folder)
    for trajectories in entries.values():
        first, *others = trajectories
        assert first["gen_method"] == "infoscore"
        assert len(first["pointer"]) == len(set(first["pointer"])) == 2
        assert not any("infoscore" in t or t["gen_method"] == "infoscore" for t in others)
        assert {"vqa_acc_score", "vqa_raw_generation", "pointer_global"} <= first.keys()
    groups = load_groups(digits_folder / ROLLOUTS, reward_mode="infoscore")
    assert [group.rewards[0] for group in groups] == [
        pytest.approx(max(-5, min(5, trajectories[0]["infoscore"]))) for trajectories in entries.values()
    ]
    assert planned_calls(lever, *SMALL, *SEARCH)["state"] == "there"
    before = answers_in(digits_folder)
    assert "prompts to ask" not in lever("rollout", *SMALL, *SEARCH).err
    assert answers_in(digits_folder) == before


def test_rce_learns_from_what_infoscore_found_alone(lever, digits_folder):
    command = ["train", *SMALL, *NO_OTHERS, *SEARCH, "--set", "reward.mode=infoscore", "--json"]
    done = lever(*command, "--set", "warmup=rce", "--rce-epochs", "2", "--grpo-epochs", "0")
    assert done.status == 0, done.err
    assert done.json["recommended"]["phase"] == "rce"
    assert [len(group) for group in entries_in(digits_folder).values()] == [1] * 8
    first, second = map(json.loads, (digits_folder / RUN / "metrics.jsonl").read_text().splitlines())
    # One sequence a query is plain imitation: its own cross-entropy falls.
    assert second["train_loss"] < first["train_loss"]


def test_under_infoscore_only_rollouts_that_have_one_are_learnt_from(tmp_path):
    def rollout(*picks, **scores):
        scores = {"vqa_correct": 1, "vqa_acc_score": 1.0, **scores}
        return {"pointer": list(picks), "pointer_global": list(picks), "vqa_eval_mode": "vqaEval", **scores}

    scored = {
        "candidate_pool_ids": [0, 1, 2],
        "pointer_candidates": [rollout(0, 1, infoscore=-0.5), rollout(1, 2), rollout(2, 0, infoscore=1.5)],
    }
    unscored = {"candidate_pool_ids": [0, 1, 2], "pointer_candidates": [rollout(0, 1, infoscore=None), rollout(1, 2)]}
    path = tmp_path / "rl.json"
    path.write_text(json.dumps({"7": scored, "8": unscored}), encoding="utf-8")
    (group,) = load_groups(path, reward_mode="infoscore")
    assert (group.query_id, group.sequences, group.rewards) == (7, [[0, 1], [2, 0]], [-0.5, 1.5])
    assert [len(group.rewards) for group in load_groups(path)] == [3, 2]


def test_a_reward_by_infoscore_needs_rollouts_that_have_it(lever):
    done = lever("train", "--set", "reward.mode=infoscore")
    assert done.status == 2
    assert "rollout.infoscore=5" in done.err
    done = lever("train", "--recipe", "infoscore", "--grpo-epochs", "1", "--set", "grpo.online=true")
    assert done.status == 2
    assert "grpo.online" in done.err
