"""Rollouts: what a group holds, that its scores are what they say, and that nothing is made or asked twice."""

import dataclasses
import json
import math
from collections import Counter

import pytest
import torch
from helpers import small_digits, track
from lvlm_helpers import ByLists

from lever_lm.config.schema import PromptConfig
from lever_lm.lvlm import CachedLvlm, build_prompt, cut_answer
from lever_lm.lvlm.answer_cache import AnswerCache
from lever_lm.lvlm.backend import load_local
from lever_lm.lvlm.local import LocalLvlm, local_fingerprint
from lever_lm.tasks import TASKS
from lever_lm.tasks.vqa_metrics import normalize_answer, relevance, vqa_accuracy
from lever_lm.training.rollouts.file_format import group_report, load_groups
from lever_lm.training.rollouts.generate import _reference_probs, make_rollouts, online_rewards, rollout_stamp
from lever_lm.training.rollouts.propose import new_policy, propose, query_rows
from lever_lm.utils.errors import LeverError
from lever_lm.utils.fingerprint import changed

QUERIES = 12
# Field → (type, least, most) of every trajectory (golden/rl_data_schema.md); None allowed where marked.
TRAJECTORY = {
    "pointer": list,
    "pointer_global": list,
    "gen_method": str,
    "vqa_raw_generation": str,
    "vqa_pred_answer": str,
    "vqa_correct": int,
    "vqa_acc_score": float,
    "vqa_rel_token_f1": float,
    "vqa_rel_edit_sim": float,
    "vqa_rel_score": float,
    "vqa_eval_mode": str,
    "eval_split_used": str,
    "eval_failed": bool,
}
# Field → the kinds that carry a number in it; null on the others.
OF_KIND = {
    "beam_rank": {"beam"},
    "beam_score": {"beam"},
    "logprob_score": {"beam", "sample"},
    "temperature": {"sample"},
}


class Halting(LocalLvlm):
    """The real model; the process dies when batch `dies_at` is to be answered."""

    dies_at = None
    asked = 0

    def ask(self, prompts, batches, answers=None, *, end=False):
        for part in super().ask(prompts, batches, answers, end=end):
            if self.dies_at is not None and self.asked // self.config.batch_size + 1 == self.dies_at:
                raise KeyboardInterrupt
            self.asked += len(part[0])
            yield part


@pytest.fixture(scope="module")
def config(digits_config):
    rollout = dataclasses.replace(digits_config.rollout, num_queries=QUERIES, pool_size=32)
    return dataclasses.replace(digits_config, rollout=rollout)


@pytest.fixture
def make(digits, digits_features, config, tmp_path):
    """make(config changes, dies_at) → (report or None, model); file and cache are those of one results folder."""

    def run(changed=config, dies_at=None, path=tmp_path / "rl_data.json", said=None):
        model = Halting(load_local(changed.lvlm, changed.prompt, "cpu").family, changed.lvlm, changed.prompt)
        model.dies_at = dies_at
        stamp = local_fingerprint(changed.lvlm, changed.prompt, "cpu")
        asks = local_fingerprint(changed.lvlm, PromptConfig(), "cpu")
        lvlm = CachedLvlm(lambda prompts: model, stamp, AnswerCache(tmp_path / "answers.sqlite"), track, asks)
        say = (lambda text: None) if said is None else said.append
        return make_rollouts(changed, digits, digits_features, lvlm, path, say), model

    return run


@pytest.fixture(scope="module")
def made(digits, digits_features, config, tmp_path_factory):
    """A rollout file."""
    folder = tmp_path_factory.mktemp("rollouts")
    stamp = local_fingerprint(config.lvlm, config.prompt, "cpu")
    cache = AnswerCache(folder / "answers.sqlite")
    lvlm = CachedLvlm(lambda prompts: load_local(config.lvlm, config.prompt, "cpu"), stamp, cache, track)
    make_rollouts(config, digits, digits_features, lvlm, folder / "rl_data.json", lambda text: None)
    return folder / "rl_data.json"


@pytest.fixture(scope="module")
def content(made):
    return json.loads(made.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def entries(content):
    return {int(key): entry for key, entry in content.items() if key != "_meta"}


@pytest.fixture(scope="module")
def trajectories(entries):
    return [(row, entry, t) for row, entry in entries.items() for t in entry["pointer_candidates"]]


# ---------------------------------------------------------------------- the file


def test_the_file_has_a_group_for_every_chosen_query(content, entries):
    assert list(entries) == query_rows(QUERIES, 2504, 0)
    assert all(key == str(int(key)) for key in content if key != "_meta")
    assert content["_meta"]["n_train"] == 2504


def test_a_query_is_described_as_the_schema_says(entries, digits):
    for row, entry in entries.items():
        example = digits.train_examples[row]
        assert entry["query"] == {
            "query_id": row,
            "question_id": example.question_id,
            "image_id": example.image_id,
            "question": example.question,
            "gt_answers_raw": list(example.raw_answers),
            "gt_answers_norm": [normalize_answer(answer) for answer in example.answers],
        }
        assert len(entry["query"]["gt_answers_raw"]) == 10


def test_a_pool_holds_distinct_training_rows_without_the_query_or_its_image(entries, digits):
    for row, entry in entries.items():
        pool = entry["candidate_pool_ids"]
        assert len(pool) == len(set(pool)) == 32
        assert all(type(i) is int and 0 <= i < 2504 for i in pool)
        assert row not in pool
        assert digits.train_examples[row].image_id not in {digits.train_examples[i].image_id for i in pool}


def test_every_trajectory_has_the_fields_and_ranges_of_the_schema(trajectories):
    for _, _, trajectory in trajectories:
        for name, kind in TRAJECTORY.items():
            found = type(trajectory[name])
            assert found is kind or (kind is float and found is int), (name, trajectory[name])
        assert trajectory["vqa_correct"] in (0, 1)
        for name in ("vqa_acc_score", "vqa_rel_token_f1", "vqa_rel_edit_sim", "vqa_rel_score"):
            assert 0 <= trajectory[name] <= 1
        assert trajectory["vqa_eval_mode"] == "vqaEval"
        assert trajectory["eval_split_used"] == "train"
        assert trajectory["eval_failed"] is False
        assert "pointer_pos" not in trajectory


def test_what_only_one_kind_has_is_null_on_the_others(trajectories):
    for _, _, trajectory in trajectories:
        kind = trajectory["gen_method"]
        for name, kinds in OF_KIND.items():
            assert (trajectory[name] is not None) == (kind in kinds), (kind, name)
        assert ("similarity_score" in trajectory) == (kind == "retrieval")
        if kind in ("beam", "sample"):
            assert trajectory["logprob_score"] <= 0
        if kind == "beam":
            assert 0 <= trajectory["beam_score"] <= 2
        if kind == "sample":
            assert trajectory["temperature"] in (1.0, 1.3)
        if kind == "retrieval":
            assert -1 <= trajectory["similarity_score"] <= 1


def test_pointers_are_two_distinct_positions_and_the_rows_they_mean(trajectories):
    for _, entry, trajectory in trajectories:
        assert len(trajectory["pointer"]) == len(set(trajectory["pointer"])) == 2
        assert all(0 <= position < 32 for position in trajectory["pointer"])
        pool = entry["candidate_pool_ids"]
        assert trajectory["pointer_global"] == [pool[position] for position in trajectory["pointer"]]


def test_a_group_has_12_to_15_rollouts_of_all_kinds(entries):
    for entry in entries.values():
        kinds = Counter(trajectory["gen_method"] for trajectory in entry["pointer_candidates"])
        assert 12 <= sum(kinds.values()) <= 15
        assert set(kinds) == {"beam", "sample", "retrieval", "random"}


def test_no_group_holds_the_same_demonstrations_twice_in_any_order(entries):
    for entry in entries.values():
        pairs = [frozenset(trajectory["pointer"]) for trajectory in entry["pointer_candidates"]]
        assert len(set(pairs)) == len(pairs)


def test_neither_order_nor_luck_decides_which_queries_get_a_group():
    few, many = query_rows(10, 2504, 0), query_rows(200, 2504, 0)
    assert few == sorted(few)
    assert len(set(many)) == 200
    assert set(few) < set(many) < set(range(2504))
    assert query_rows(10, 2504, 0) == few
    assert query_rows(10, 2504, 1) != few
    assert query_rows(10, 7, 0) == list(range(7))


def test_groups_of_fewer_queries_are_those_of_more_queries(make, config, entries, tmp_path):
    fewer = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, num_queries=5))
    make(fewer)
    small = json.loads((tmp_path / "rl_data.json").read_text(encoding="utf-8"))
    assert len(small) == 6
    assert all(entries[int(key)] == entry for key, entry in small.items() if key != "_meta")


def test_the_file_loads_as_groups(made, entries):
    groups = load_groups(made)
    assert [group.query_id for group in groups] == list(entries)
    for group in groups:
        entry = entries[group.query_id]
        assert group.pool == entry["candidate_pool_ids"]
        assert group.sequences == [t["pointer"] for t in entry["pointer_candidates"]]
        assert group.rewards == pytest.approx(
            [t["vqa_correct"] + t["vqa_acc_score"] for t in entry["pointer_candidates"]]
        )


# ---------------------------------------------------------------------- the scores


def test_answers_are_the_models_own(trajectories, digits, config):
    model = load_local(config.lvlm, config.prompt, "cpu")
    train = digits.train_examples
    prompts = [
        build_prompt([train[i] for i in t["pointer_global"]], train[row], config.prompt) for row, _, t in trajectories
    ]
    assert [t["vqa_raw_generation"] for _, _, t in trajectories] == model.generate(prompts)


def test_scores_are_the_vqa_accuracy_of_the_answers(trajectories, digits):
    for row, _, trajectory in trajectories:
        references = digits.train_examples[row].answers
        answer = cut_answer(trajectory["vqa_raw_generation"])
        assert trajectory["vqa_pred_answer"] == answer
        accuracy = vqa_accuracy(answer, references, always_normalize=True)
        assert trajectory["vqa_acc_score"] == pytest.approx(accuracy, abs=1e-6)
        assert trajectory["vqa_correct"] == (accuracy > 0)
        f1, edit = relevance(answer, references)
        assert trajectory["vqa_rel_token_f1"] == pytest.approx(f1, abs=1e-6)
        assert trajectory["vqa_rel_edit_sim"] == pytest.approx(edit, abs=1e-6)
        assert trajectory["vqa_rel_score"] == pytest.approx(max(f1, edit), abs=1e-6)
    assert len({trajectory["vqa_acc_score"] for _, _, trajectory in trajectories}) > 2


@pytest.fixture(scope="module")
def steps(config, digits_features):
    """steps(row, entry, trajectory, temperature) → log-probability of each pick under the initial policy."""
    policy = new_policy(config, 64).eval()
    queries, icds = digits_features.queries("train", config.features), digits_features.icds(config.features)

    @torch.no_grad()
    def of(row, entry, trajectory, temperature=1.0) -> list[float]:
        sequence = torch.tensor([trajectory["pointer"]])
        logits = policy.logits(queries[row][None], icds[entry["candidate_pool_ids"]][None], sequence)
        return (logits / temperature).log_softmax(-1).gather(-1, sequence[..., None]).flatten().tolist()

    return of


def test_policy_scores_are_those_of_the_initial_policy_and_beams_come_best_first(trajectories, steps):
    beams: dict[int, list] = {}
    for row, entry, trajectory in trajectories:
        if trajectory["gen_method"] == "beam":
            log_probs = steps(row, entry, trajectory)
            assert trajectory["logprob_score"] == pytest.approx(sum(log_probs), abs=2e-5)
            assert trajectory["beam_score"] == pytest.approx(sum(map(math.exp, log_probs)), abs=2e-5)
            beams.setdefault(row, []).append((trajectory["beam_rank"], -trajectory["logprob_score"]))
        elif trajectory["gen_method"] == "sample":
            log_probs = steps(row, entry, trajectory, trajectory["temperature"])
            assert trajectory["logprob_score"] == pytest.approx(sum(log_probs), abs=2e-5)
    assert all(ranked == sorted(ranked) and ranked[-1][1] == max(r[1] for r in ranked) for ranked in beams.values())


def test_retrieval_takes_the_most_similar_pairs_that_no_beam_took(entries, digits_features, config):
    queries, icds = digits_features.queries("train", config.features), digits_features.icds(config.features)
    for row, entry in entries.items():
        similar = icds[entry["candidate_pool_ids"]] @ queries[row]
        order = sorted(range(len(similar)), key=lambda i: -float(similar[i]))
        proposed = {kind: [] for kind in ("beam", "retrieval", "sample", "random")}
        for trajectory in entry["pointer_candidates"]:
            proposed[trajectory["gen_method"]].append(set(trajectory["pointer"]))
            if trajectory["gen_method"] == "retrieval":
                mean = float(similar[trajectory["pointer"]].mean())
                assert trajectory["similarity_score"] == pytest.approx(mean, abs=1e-5)
        pairs = [set(order[start : start + 2]) for start in range(0, len(order), 2)]
        assert proposed["retrieval"] == [pair for pair in pairs if pair not in proposed["beam"]][:2]


def test_the_windows_of_retrieval_reach_the_least_similar_candidates(digits, config):
    similar = torch.tensor([0.1, 0.9, 0.3, 0.7])
    candidates = torch.stack([similar, 1 - similar], -1)
    kinds = dataclasses.replace(config.rollout, beam=0, sample=0, random=0, retrieval=9)
    policy = new_policy(config, 2).eval()
    group = propose(kinds, digits.train_examples[0], policy, torch.tensor([1.0, 0.0]), candidates, 0)
    assert [trajectory["pointer"] for trajectory in group] == [[1, 3], [2, 0]]


# ---------------------------------------------------------------------- where an answer is cut


class Dressed(ByLists):
    """An LVLM that sees the same thing everywhere."""

    def generate(self, prompts):
        return ["Shorts Question: what"] * len(prompts)


def test_an_answer_is_cut_by_the_rule_of_the_config_and_asked_once(digits, digits_features, config, tmp_path):
    def cut(rule, backend):
        prompt = dataclasses.replace(config.prompt, cut=rule)
        lvlm = CachedLvlm(lambda prompts: backend, "dressed", AnswerCache(tmp_path / "answers.sqlite"), track)
        few = dataclasses.replace(config, prompt=prompt, rollout=dataclasses.replace(config.rollout, num_queries=3))
        make_rollouts(few, digits, digits_features, lvlm, tmp_path / "rl_data.json", said.append)
        entries = json.loads((tmp_path / "rl_data.json").read_text(encoding="utf-8"))
        found = [t for key, e in entries.items() if key != "_meta" for t in e["pointer_candidates"]]
        return {(t["vqa_raw_generation"], t["vqa_pred_answer"]) for t in found}

    said = []
    assert cut("turn", Dressed()) == {("Shorts Question: what", "Shorts")}
    assert cut("classic", None) == {("Shorts Question: what", "")}
    assert "is made again: the prompt has changed;" in said[0]


# ---------------------------------------------------------------------- the probability of the references


@pytest.mark.parametrize("end", [True, False])
def test_gt_prob_is_the_weighted_probability_of_the_distinct_references(make, digits, config, tmp_path, end):
    rollout = dataclasses.replace(config.rollout, num_queries=2, random=3, beam=0, sample=0, gt_prob=True)
    _, model = make(dataclasses.replace(config, rollout=dataclasses.replace(rollout, gt_prob_end=end)))
    content, train = json.loads((tmp_path / "rl_data.json").read_text(encoding="utf-8")), digits.train_examples
    found = [(int(key), t) for key, entry in content.items() if key != "_meta" for t in entry["pointer_candidates"]]
    assert len(found) >= 6
    for row, trajectory in found:
        prompt = build_prompt([train[i] for i in trajectory["pointer_global"]], train[row], config.prompt)
        counts = Counter(train[row].answers)
        scores = model.answer_log_prob([prompt] * len(counts), list(counts), end=end)
        expected = sum(min(n / 3, 1) * math.exp(s) for n, s in zip(counts.values(), scores, strict=True))
        assert trajectory["vqa_gt_prob"] == pytest.approx(expected, abs=1e-4)
        assert not end or trajectory["vqa_gt_prob"] <= 1


def test_a_reference_is_one_answer_whichever_way_it_was_typed(digits, config):
    class Certain:
        """An LVLM that is sure of every answer."""

        def generate(self, prompts, what):
            return ["caf\xe9"] * len(prompts)

        def answer_log_prob(self, prompts, answers, what, *, end):
            asked.append((answers, end))
            return [0.0] * len(answers)

    asked, query = [], dataclasses.replace(digits.train_examples[0], answers=("cafe\u0301", "caf\xe9") * 5)
    scored = dataclasses.replace(config, reward=dataclasses.replace(config.reward, mode="hard01_plus_gtprob"))
    rows, pools = torch.tensor([0]), torch.tensor([[1, 2]])
    data = dataclasses.replace(digits, train_examples=(query, *digits.train_examples[1:3]))
    rewards = online_rewards(scored, data, rows, pools, Certain())
    rewards(torch.tensor([[[0, 1]]]))
    assert asked == [(["caf\xe9"], True)]


# ---------------------------------------------------------------------- the report


def test_the_group_report_counts_by_hand(tmp_path):
    scores = {"3": [1.0, 1.0], "5": [0.0, 0.0, 0.0], "8": [0.3, 0.6, 0.0], "9": [0.3, 1.0]}
    content = {
        key: {"pointer_candidates": [{"vqa_acc_score": score} for score in group]} for key, group in scores.items()
    }
    path = tmp_path / "rl_data.json"
    path.write_text(json.dumps({"_meta": {"fingerprint": "x"}, **content}))
    assert group_report(path) == {
        "groups": 4,
        "rollouts": 10,
        "accuracy": pytest.approx(4.2 / 10),
        "tied": 2,
        "all_right": 2,
        "all_wrong": 1,
    }


# ---------------------------------------------------------------------- not twice


def test_pools_and_proposals_are_followed_as_the_answers_are(digits, digits_features, config, tmp_path):
    followed = []

    def follow(items, what, total):
        followed.append((what.split(":")[0], total))
        return items

    stamp = local_fingerprint(config.lvlm, config.prompt, "cpu")
    cache = AnswerCache(tmp_path / "answers.sqlite")
    lvlm = CachedLvlm(lambda prompts: load_local(config.lvlm, config.prompt, "cpu"), stamp, cache, follow)
    make_rollouts(config, digits, digits_features, lvlm, tmp_path / "rl_data.json", lambda text: None)
    assert followed[:2] == [("pools", QUERIES), ("proposals", QUERIES)]
    assert followed[-1][0] == "rollouts"


def test_unchanged_inputs_make_nothing_again(make, tmp_path):
    first, _ = make()
    path = tmp_path / "rl_data.json"
    written = path.stat().st_mtime_ns
    again, model = make()
    assert again == first == group_report(path)
    assert again["groups"] == QUERIES
    assert path.stat().st_mtime_ns == written
    assert model.asked == 0


def test_a_killed_job_goes_on_and_asks_nothing_twice(make, made, config, tmp_path):
    small = dataclasses.replace(config, lvlm=dataclasses.replace(config.lvlm, batch_size=20))
    with pytest.raises(KeyboardInterrupt):
        make(small, dies_at=4)
    assert not (tmp_path / "rl_data.json").exists()
    report, model = make(small)
    assert model.asked == report["rollouts"] - 3 * 20
    content, unbroken = (json.loads(p.read_text(encoding="utf-8")) for p in (tmp_path / "rl_data.json", made))
    assert content == unbroken


def test_the_stamp_names_what_a_rollout_file_depends_on_and_nothing_else(digits, config):
    class Model:
        model = "tiny"

    here = rollout_stamp(config, digits, "features", Model())
    for part, change, named in (
        ("seed", 1, ["seed"]),
        ("sampler", {"name": "rand_sampler"}, ["sampler"]),
        ("rollout", {"temperatures": (1.0, 2.0)}, ["rollout setting"]),
        ("prompt", {"style": "dialogue"}, ["prompt"]),
        ("policy", {"hidden_dim": 32}, ["policy"]),
        ("features", {"name": "query_img_icd_img"}, ["features"]),
        ("grpo", {"epochs": 7}, []),
        ("reward", {"mode": "hard_only"}, []),
        ("lvlm", {"batch_size": 5}, []),
    ):
        value = dataclasses.replace(getattr(config, part), **change) if isinstance(change, dict) else change
        there = rollout_stamp(dataclasses.replace(config, **{part: value}), digits, "features", Model())
        assert changed(there, here) == named
        assert (there["fingerprint"] == here["fingerprint"]) == (not named)
    assert changed(rollout_stamp(config, digits, "others", Model()), here) == ["features"]
    Model.model = "other"
    assert changed(rollout_stamp(config, digits, "features", Model()), here) == ["LVLM"]


@pytest.mark.parametrize(
    "text", ["my notes", '{"7": {"pointer_candidates": []}}', '{"7": {}, "_meta": {"source": "Lever-Plus"}}']
)
def test_a_file_that_lever_rollout_did_not_make_is_refused_and_left_alone(make, tmp_path, text):
    path = tmp_path / "rl_data.json"
    path.write_text(text)
    with pytest.raises(LeverError, match=r"rl_data\.json"):
        make()
    assert path.read_text() == text


def test_more_shots_than_there_are_candidates_are_refused(make, config):
    rollout = dataclasses.replace(config.rollout, shots=2600, pool_size=2600)
    with pytest.raises(LeverError, match=r"rollout\.shots"):
        make(dataclasses.replace(config, rollout=rollout))


# ---------------------------------------------------------------------- P(reference answers)


class Halves:
    """An LVLM by which every answer has the probability 1/2."""

    def answer_log_prob(self, prompts, answers, what, *, end):
        self.asked = list(answers)
        return [math.log(0.5)] * len(answers)


def test_blank_answers_are_no_references(digits):
    example = dataclasses.replace(digits.train_examples[0], answers=("", "one", "one", "uno", " ", "") + ("two",) * 4)
    model = Halves()
    prompt = build_prompt([], example, PromptConfig())
    assert _reference_probs([prompt], TASKS[digits.task], model, True) == [pytest.approx(0.5 * (2 / 3 + 1 / 3 + 1))]
    assert model.asked == ["one", "uno", "two"]


def test_a_blank_annotator_does_not_stop_rollouts_with_reference_probabilities(lever, tmp_path):
    root = small_digits(tmp_path / "world", 12, 4)
    path = root / "mscoco_train2014_annotations.json"
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        entry["answers"][9] |= {"answer": "", "raw_answer": ""}
    path.write_text(json.dumps(content))
    data = ("--set", f"data.okvqa_path={root}", "--set", f"data.coco_path={root}", "--set", "rollout.pool_size=4")
    scored = ("rollout.gt_prob=true", "rollout.infoscore=1", "rollout.infoscore_candidates=2")
    done = lever("rollout", *data, *(word for key in scored for word in ("--set", key)), "--json")
    assert done.status == 0, done.err
    entries = [v for k, v in json.loads((tmp_path / done.json["path"]).read_text()).items() if k != "_meta"]
    assert len(entries) == 12
    assert all(0 < t["vqa_gt_prob"] < 10 for entry in entries for t in entry["pointer_candidates"])
