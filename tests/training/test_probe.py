"""A probe of each query before the rest is asked: which rollouts it takes, what is asked in all, and what the file says
then. The LVLM is a fake whose answers are right, wrong, or right after some demonstrations, by query."""

import dataclasses
import json
from collections import Counter

import pytest
from helpers import track
from lvlm_helpers import ByLists

from lever_lm.config.schema import RolloutConfig
from lever_lm.lvlm import CachedLvlm
from lever_lm.lvlm.answer_cache import AnswerCache
from lever_lm.tasks import TASKS
from lever_lm.training.rollouts.file_format import load_groups
from lever_lm.training.rollouts.generate import make_rollouts, rollout_stamp
from lever_lm.training.rollouts.propose import evenly
from lever_lm.utils.errors import UsageError
from lever_lm.utils.fingerprint import fingerprint

QUERIES, PROBE = 12, 4


class Knowing(ByLists):
    """An LVLM that knows some queries by heart, never knows others, and answers those of an even id rightly where the
    last demonstration is of an even id, too. Dies once it has answered `dies_after` batches."""

    def __init__(self, dies_after=None):
        self.asked: list[tuple] = []
        self.dies_after, self.batch = dies_after, 0

    def batches(self, prompts, answers=None):
        return [list(range(start, min(start + 16, len(prompts)))) for start in range(0, len(prompts), 16)]

    def generate(self, prompts):
        if self.batch == self.dies_after:
            raise KeyboardInterrupt
        self.batch += 1
        self.asked += [(p.query.question_id, *(icd.question_id for icd in p.icds)) for p in prompts]
        return [p.query.answer if self.right(p) else "no such thing" for p in prompts]

    def answer_log_prob(self, prompts, answers, *, end=False):
        return [-1.0] * len(prompts)

    @staticmethod
    def right(prompt):
        kind = prompt.query.question_id % 4
        return kind == 1 or (kind in (0, 2) and prompt.icds[-1].question_id % 2 == 0)


@pytest.fixture
def make(digits, digits_features, digits_config, tmp_path):
    """make(rollout options, the fake, a name) → (entries of the file, its meta, the lines said). All share one answer
    cache where `cache` is the same name."""

    def run(changes, model, name="rl_data", cache=None):
        options = {"num_queries": QUERIES, "pool_size": 16, **changes}
        config = dataclasses.replace(digits_config, rollout=dataclasses.replace(digits_config.rollout, **options))
        lvlm = CachedLvlm(lambda prompts: model, "knowing", AnswerCache(tmp_path / f"{cache or name}.sqlite"), track)
        said = []
        make_rollouts(config, digits, digits_features, lvlm, tmp_path / f"{name}.json", said.append)
        content = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        meta = content.pop("_meta")
        return content, meta, said

    return run


def scores(rollouts):
    return [t["vqa_acc_score"] for t in rollouts]


def test_places_are_evenly_apart():
    assert evenly(15, 4) == [1, 5, 9, 13]
    assert evenly(15, 8) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert evenly(15, 3) == [2, 7, 12]
    assert evenly(7, 2) == [1, 5]
    assert evenly(5, 5) == evenly(5, 9) == [0, 1, 2, 3, 4]


def test_only_groups_whose_probe_differs_are_asked_in_full(make):
    full, _, _ = make({}, Knowing(), "full")
    model = Knowing()
    probed, meta, said = make({"probe": PROBE}, model, "probed")
    assert list(probed) == list(full)
    expected = {}
    for row, entry in full.items():
        rollouts = entry["pointer_candidates"]
        first = [rollouts[place] for place in evenly(len(rollouts), PROBE)]
        expected[row] = rollouts if max(scores(first)) > min(scores(first)) else first
    assert {row: entry["pointer_candidates"] for row, entry in probed.items()} == expected
    sizes = Counter(len(rollouts) for rollouts in expected.values())
    tied = sizes[PROBE]
    assert 3 <= tied <= QUERIES - 3
    assert f"probes: {tied} of {QUERIES} groups tied in {PROBE}, not asked further (rollout.probe)" in said
    assert len(model.asked) == len(set(model.asked)) == sum(map(len, expected.values()))
    assert meta["lvlm_calls"] == len(model.asked)


def test_a_probe_is_of_several_kinds(make):
    content, _, _ = make({"probe": PROBE}, Knowing())
    tied = [e["pointer_candidates"] for e in content.values() if len(e["pointer_candidates"]) == PROBE]
    assert tied
    assert all({t["gen_method"] for t in group} >= {"sample", "random"} for group in tied)
    assert all(sum(t["gen_method"] == "beam" for t in group) <= 1 for group in tied)


def test_a_probe_of_whole_groups_leaves_the_file_as_it_is(make):
    full, _, _ = make({}, Knowing(), "full")
    model = Knowing()
    probed, _, _ = make({"probe": 50}, model, "probed")
    assert probed == full
    assert len(model.asked) == sum(len(entry["pointer_candidates"]) for entry in full.values())


@pytest.mark.parametrize("dies_after", [1, 3, 5])
def test_a_job_killed_in_the_probe_or_after_it_goes_on_and_asks_nothing_twice(make, dies_after):
    unbroken, meta, _ = make({"probe": PROBE}, Knowing(), "unbroken")
    killed, again = Knowing(dies_after), Knowing()
    with pytest.raises(KeyboardInterrupt):
        make({"probe": PROBE}, killed, "killed")
    content, here, _ = make({"probe": PROBE}, again, "killed")
    assert content == unbroken
    assert here["lvlm_calls"] == meta["lvlm_calls"] == len(killed.asked) + len(again.asked)
    assert not set(killed.asked) & set(again.asked)


def test_with_the_rest_asked_for_later_only_the_rest_is_asked(make):
    first, everything = Knowing(), Knowing()
    make({"probe": PROBE}, first, cache="shared")
    full, _, said = make({}, everything, cache="shared")
    assert any("is made again: the rollout setting has changed" in line for line in said)
    assert not set(first.asked) & set(everything.asked)
    total = sum(len(entry["pointer_candidates"]) for entry in full.values())
    assert len(first.asked) + len(everything.asked) == total


def test_reference_probabilities_are_asked_for_rollouts_that_are_kept_alone(make, digits):
    content, meta, _ = make({"probe": PROBE, "gt_prob": True}, Knowing())
    rollouts = [(entry["query"], t) for entry in content.values() for t in entry["pointer_candidates"]]
    assert all(t["vqa_gt_prob"] > 0 for _, t in rollouts)
    references = sum(len(TASKS["vqa"].references(digits.train_examples[query["query_id"]])) for query, _ in rollouts)
    assert meta["lvlm_calls"] == len(rollouts) + references


def test_groups_of_a_probe_are_read_as_shorter_groups(make, tmp_path):
    content, _, _ = make({"probe": PROBE}, Knowing())
    groups = {group.query_id: group for group in load_groups(tmp_path / "rl_data.json")}
    assert {row: len(group.rewards) for row, group in groups.items()} == {
        int(row): len(entry["pointer_candidates"]) for row, entry in content.items()
    }


def test_without_a_probe_a_file_is_stamped_as_before_there_was_one(digits, digits_config):
    class Model:
        model = "tiny"

    old = {name: value for name, value in vars(digits_config.rollout).items() if name != "probe"}
    assert rollout_stamp(digits_config, digits, "", Model())["rollout setting"] == fingerprint(old)
    probing = dataclasses.replace(digits_config, rollout=dataclasses.replace(digits_config.rollout, probe=3))
    assert rollout_stamp(probing, digits, "", Model())["rollout setting"] != fingerprint(old)


def test_equal_prompts_of_two_rollouts_are_asked_once(make):
    model = Knowing()
    content, meta, _ = make({"pool_size": 2, "distinct_orders": True, "random": 8}, model)
    assert all(len(entry["pointer_candidates"]) == 2 for entry in content.values())
    assert len(model.asked) == len(set(model.asked)) == meta["lvlm_calls"] == 2 * QUERIES


def test_a_probe_of_one_or_before_a_search_is_refused():
    with pytest.raises(UsageError, match=r"rollout\.probe .* 2 or more"):
        RolloutConfig(probe=1)
    with pytest.raises(UsageError, match=r"rollout\.infoscore .* rollout\.probe"):
        RolloutConfig(probe=3, infoscore=2)
    assert RolloutConfig().probe == 0


def test_the_plan_of_a_probe_is_a_bound(lever, digits_folder):
    command = ["rollout", "--limit", "8", "--json"]
    whole, bound = (
        lever(*command, *more, "--dry-run").json["stages"][-1] for more in ((), ("--set", "rollout.probe=3"))
    )
    assert whole["lvlm_calls"] == bound["lvlm_calls"]
    assert whole["exact"]
    assert not bound["exact"]
    done = lever(*command, "--set", "rollout.probe=3")
    assert done.status == 0, done.err
    assert done.json["rollouts"] <= bound["lvlm_calls"]
    planned = lever(*command, "--set", "rollout.probe=3", "--dry-run").json["stages"][-1]
    assert (planned["state"], planned["lvlm_calls"]) == ("there", 0)
