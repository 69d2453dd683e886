"""N-shot inference: which ICDs every method shows, which checkpoint is taken, and that the written numbers hold."""

import dataclasses
import json
import random
import shutil

import numpy as np
import pytest
import torch
import yaml
from helpers import INFERENCE, RUN, files_in, track

from lever_lm.cli.display import show_results
from lever_lm.cli.options import parse_shots
from lever_lm.config.schema import to_dict
from lever_lm.data.pools import SAMPLERS
from lever_lm.evaluation.evaluate import BASELINES, Evaluation, compare, is_result
from lever_lm.lvlm import load_lvlm
from lever_lm.selectors.pointer.checkpoint import save_torch, to_v2, v3_content
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.tasks.vqa import vqa_accuracy
from lever_lm.training.find_checkpoint import find_checkpoint, latest_checkpoint, load_for
from lever_lm.training.run_dir import RunFolder
from lever_lm.utils.console import Screen
from lever_lm.utils.errors import LeverError, UsageError

QUERIES = 40


@pytest.fixture(scope="module")
def config(digits_config):
    infer = dataclasses.replace(digits_config.infer, num_queries=QUERIES)
    return dataclasses.replace(digits_config, infer=infer)


@pytest.fixture(scope="module")
def evaluation(config, digits, digits_features):
    return Evaluation(config, digits, digits_features)


@pytest.fixture(scope="module")
def policy(config):
    torch.manual_seed(3)
    return PointerSelector(d_model=64, **vars(config.policy)).eval()


@pytest.fixture(scope="module")
def lvlm(config, tmp_path_factory):
    cache = tmp_path_factory.mktemp("answers") / "answers.sqlite"
    return load_lvlm(config.lvlm, config.prompt, device="cpu", cache=cache, track=track)


# ---------------------------------------------------------------------- shots


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("5", [5]), ("1,2,4", [1, 2, 4]), ("1-5", [1, 2, 3, 4, 5]), ("4,1,4", [1, 4]), ("1-2, 8", [1, 2, 8])],
)
def test_shots_are_a_number_a_list_or_a_range(text, numbers):
    assert parse_shots(text) == numbers


@pytest.mark.parametrize("text", ["0", "0-3", "x", "", "1,,2", "-1", "2.5", "5-", "3-1", "5,3-1", "²"])
def test_other_shots_are_a_usage_error(text):
    with pytest.raises(UsageError, match="--shots"):
        parse_shots(text)


# ---------------------------------------------------------------------- queries and pools


def test_fewer_queries_are_a_subset_of_more(config, digits, digits_features, evaluation):
    fewer = dataclasses.replace(config, infer=dataclasses.replace(config.infer, num_queries=15))
    small = Evaluation(fewer, digits, digits_features)
    assert len(small.queries) == 15
    assert len(evaluation.queries) == QUERIES
    assert set(small.rows) < set(evaluation.rows)
    pools = dict(zip(evaluation.rows, evaluation.pools, strict=True))
    assert small.pools == [pools[row] for row in small.rows]


def test_no_number_of_queries_means_all_of_them(digits_config, digits, digits_features):
    assert Evaluation(digits_config, digits, digits_features).rows == list(range(500))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_evaluation_pools_come_from_the_training_split_without_the_querys_image(
    config, digits, digits_features, sampler
):
    other = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, name=sampler))
    evaluation = Evaluation(other, digits, digits_features)
    for query, pool in zip(evaluation.queries, evaluation.pools, strict=True):
        assert len(set(pool)) == 64
        assert query.image_id not in {digits.train_examples[i].image_id for i in pool}


# ---------------------------------------------------------------------- baselines


def embeddings(features, split, parts):
    return [getattr(getattr(features, split), {"img": "image", "text": "text"}[part]) for part in parts]


@pytest.mark.parametrize(
    ("name", "parts"), [("text_sim", ["text"]), ("img_sim", ["img"]), ("img_text_sim", ["img", "text"])]
)
def test_a_similarity_baseline_is_brute_force_over_the_whole_training_split(
    evaluation, digits, digits_features, name, parts
):
    picks = evaluation.baseline(name, 4)
    train = digits.train_examples
    for row, query, chosen in zip(evaluation.rows, evaluation.queries, picks, strict=True):
        pairs = zip(embeddings(digits_features, "val", parts), embeddings(digits_features, "train", parts), strict=True)
        scores = sum(of_train @ of_val[row] for of_val, of_train in pairs).tolist()
        allowed = [i for i, example in enumerate(train) if example.image_id != query.image_id]
        best = sorted((scores[i] for i in allowed), reverse=True)[:4]
        # Repeated questions tie, so the scores are compared and not the rows.
        assert [scores[i] for i in chosen] == pytest.approx(best, abs=1e-5)
        assert len(set(chosen)) == 4


def test_random_draws_from_the_whole_training_split_and_never_the_own_image(evaluation, digits):
    picks = evaluation.baseline("random", 4)
    for query, chosen in zip(evaluation.queries, picks, strict=True):
        assert len(set(chosen)) == 4
        assert query.image_id not in {digits.train_examples[i].image_id for i in chosen}
    drawn = [i for chosen in picks for i in chosen]
    assert len(set(drawn)) > 0.9 * len(drawn)
    assert min(drawn) < 250
    assert max(drawn) > 2254
    assert picks == evaluation.baseline("random", 4), "drawn by the query's seed"


@pytest.mark.parametrize("renumbered", [False, True])
def test_no_baseline_shows_the_querys_own_image_even_where_it_is_a_training_image(
    config, digits, digits_features, renumbered
):
    asked = digits.train_examples
    if renumbered:
        asked = tuple(dataclasses.replace(e, question_id=10**6 + i, image_id=10**6 + i) for i, e in enumerate(asked))
    train_queries = dataclasses.replace(digits, val_examples=asked)
    features = dataclasses.replace(digits_features, val=digits_features.train)
    evaluation = Evaluation(config, train_queries, features)
    for name in ("random", "text_sim", "img_sim", "img_text_sim", "oracle"):
        for query, chosen in zip(evaluation.queries, evaluation.baseline(name, 4), strict=True):
            assert query.image not in {digits.train_examples[i].image for i in chosen}, name


def test_the_oracle_ranks_the_pool_by_the_accuracy_of_its_own_answers(evaluation, digits):
    right = 0
    for query, pool, chosen in zip(evaluation.queries, evaluation.pools, evaluation.baseline("oracle", 4), strict=True):
        assert set(chosen) <= set(pool)
        answers = {i: digits.train_examples[i].answer for i in pool}
        scores = {i: vqa_accuracy(answer, query.answers, always_normalize=True) for i, answer in answers.items()}
        assert [scores[i] for i in chosen] == sorted(scores.values(), reverse=True)[:4]
        right += scores[chosen[0]] > 0
    assert right > 0.9 * QUERIES


def test_zero_shot_shows_nothing(evaluation):
    assert evaluation.baseline("zero_shot", 4) == [[] for _ in range(QUERIES)]


@pytest.mark.parametrize("name", BASELINES)
def test_fewer_shots_show_the_first_of_more_shots(evaluation, name):
    one, four = evaluation.baseline(name, 1), evaluation.baseline(name, 4)
    assert one == [chosen[:1] for chosen in four]


# ---------------------------------------------------------------------- the policy's choices


def test_the_policy_picks_distinct_rows_of_each_pool_and_fewer_shots_are_its_first(evaluation, policy):
    one, four = evaluation.choose(policy, 1), evaluation.choose(policy, 4)
    assert one == [chosen[:1] for chosen in four]
    for pool, chosen in zip(evaluation.pools, four, strict=True):
        assert len(set(chosen)) == 4
        assert set(chosen) <= set(pool)


def test_choices_are_the_greedy_picks_of_each_query_alone(evaluation, policy, digits_features, config):
    queries, icds = digits_features.queries("val", config.features), digits_features.icds(config.features)
    alone = []
    for row, pool in zip(evaluation.rows, evaluation.pools, strict=True):
        picked = policy.select(queries[row][None], icds[pool][None], 3)[0].tolist()
        alone.append([pool[i] for i in picked])
    assert evaluation.choose(policy, 3) == alone


def test_pools_of_different_sizes_are_chosen_from_alike(evaluation, policy):
    full, kept = evaluation.choose(policy, 2), list(evaluation.pools)
    cut = [pool if i % 2 else pool[:9] for i, pool in enumerate(kept)]
    evaluation.pools = cut
    try:
        mixed = evaluation.choose(policy, 2)
    finally:
        evaluation.pools = kept
    assert all(set(chosen) <= set(pool) for chosen, pool in zip(mixed, cut, strict=True))
    assert mixed[1::2] == full[1::2]


def test_more_shots_than_the_pool_holds_are_refused(evaluation, policy):
    with pytest.raises(LeverError, match=r"--shots.*rollout\.pool_size"):
        evaluation.choose(policy, 65)


@pytest.mark.parametrize("stop", [False, True])
def test_how_sure_the_policy_was_is_what_its_log_prob_says(evaluation, digits_features, config, stop):
    torch.manual_seed(0)
    policy = PointerSelector(d_model=64, hidden_dim=32, state_update="gru", stop=stop).eval()
    queries, icds = digits_features.queries("val", config.features), digits_features.icds(config.features)
    kept = list(evaluation.pools)
    evaluation.pools = [pool if i % 2 else pool[:9] for i, pool in enumerate(kept)]
    try:
        picks = evaluation.choose(policy, 3)
        told = evaluation.explain(policy, picks)
        pools = list(evaluation.pools)
    finally:
        evaluation.pools = kept
    policy.requires_grad_(False)
    for row, pool, chosen, why in zip(evaluation.rows, pools, picks, told, strict=True):
        places = torch.tensor([[[pool.index(icd) for icd in chosen]]])
        one = queries[row][None], icds[pool][None]
        expected = policy.log_prob(*one, places).exp().item()
        assert np.prod(why["probabilities"]) == pytest.approx(expected, rel=1e-3, abs=1e-5)
        first = policy.steps(*one, places)[0][0, 0, : len(pool)]
        best = first.topk(8).indices.tolist()
        assert [icd for icd, _ in why["considered"]] == [
            evaluation.data.train_examples[pool[place]].question_id for place in best
        ]
        assert why["considered"][0][1] == why["probabilities"][0]


# ---------------------------------------------------------------------- answers, scores, files


@pytest.fixture(scope="module")
def evaluated(evaluation, policy, lvlm, tmp_path_factory):
    """(folder, outcomes, choices) of three methods at one and three shots."""
    choices = {name: evaluation.baseline(name, 3) for name in ("zero_shot", "img_text_sim")}
    choices["grpo"] = evaluation.choose(policy, 3)
    outcomes = evaluation.run(choices, [1, 3], lvlm)
    folder = tmp_path_factory.mktemp("inference") / "results"
    evaluation.write(folder, outcomes, choices, "grpo", {"checkpoint": "x.pt"})
    return folder, outcomes, choices


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_zero_shot_is_answered_once_and_the_others_at_every_number_of_shots(evaluated):
    jobs = [(outcome.method, outcome.shots) for outcome in evaluated[1]]
    assert jobs == [("zero_shot", 0), ("img_text_sim", 1), ("img_text_sim", 3), ("grpo", 1), ("grpo", 3)]


def test_answers_are_those_to_the_prompts_of_the_choices(evaluated, evaluation, lvlm, digits, config):
    from lever_lm.lvlm import build_prompt, cut_answer

    _, outcomes, choices = evaluated
    for outcome in outcomes:
        prompts = [
            build_prompt([digits.train_examples[i] for i in picks[: outcome.shots]], query, config.prompt)
            for query, picks in zip(evaluation.queries, choices[outcome.method], strict=True)
        ]
        assert outcome.predictions == list(map(cut_answer, lvlm.backend.generate(prompts)))


def test_prompts_already_answered_are_not_asked_again(evaluated, evaluation, lvlm):
    asked = lvlm.asked
    again = evaluation.run(evaluated[2], [1, 3], lvlm)
    assert again == evaluated[1]
    assert lvlm.asked == asked


def test_predictions_are_an_official_result_file(evaluated, evaluation):
    folder, outcomes, _ = evaluated
    for outcome in outcomes:
        rows = json.loads((folder / f"predictions_{outcome.method}_{outcome.shots}shot.json").read_text())
        assert [set(row) for row in rows] == [{"question_id", "answer"}] * QUERIES
        assert sorted(row["question_id"] for row in rows) == sorted(q.question_id for q in evaluation.queries)
        assert all(type(row["question_id"]) is int and type(row["answer"]) is str for row in rows)


def test_an_independent_scoring_of_the_predictions_gives_the_written_accuracy(evaluated):
    from lever_lm.utils.paths import asset_path

    folder, _, _ = evaluated
    annotations = json.loads((asset_path("asset:digits") / "mscoco_val2014_annotations.json").read_text())
    references = {
        annotation["question_id"]: [answer["answer"] for answer in annotation["answers"]]
        for annotation in annotations["annotations"]
    }
    for result in json.loads((folder / "metrics.json").read_text())["results"]:
        rows = json.loads((folder / f"predictions_{result['method']}_{result['shots']}shot.json").read_text())
        scores = [vqa_accuracy(row["answer"], references[row["question_id"]]) for row in rows]
        assert result["accuracy"] == pytest.approx(np.mean(scores), abs=1e-9)
        assert result["ci"][0] <= result["accuracy"] <= result["ci"][1]
        assert result["n"] == QUERIES


def test_samples_say_what_was_shown_and_add_up_to_the_metrics(evaluated, evaluation, digits):
    folder, _, choices = evaluated
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["checkpoint"] == "x.pt"
    for result in metrics["results"]:
        rows = read_lines(folder / f"samples_{result['method']}_{result['shots']}shot.jsonl")
        assert np.mean([row["accuracy"] for row in rows]) == pytest.approx(result["accuracy"], abs=1e-6)
        for row, query, picks in zip(rows, evaluation.queries, choices[result["method"]], strict=True):
            assert row["question_id"] == query.question_id
            assert row["question"] == query.question
            assert row["references"] == list(query.answers)
            shown = picks[: result["shots"]]
            assert row["icds"] == [digits.train_examples[i].question_id for i in shown]


def test_icds_of_our_method_are_written_in_pick_order(evaluated, evaluation, digits):
    folder, _, choices = evaluated
    assert read_lines(folder / "icds.jsonl") == [
        {"question_id": query.question_id, "icds": [digits.train_examples[i].question_id for i in picks]}
        for query, picks in zip(evaluation.queries, choices["grpo"], strict=True)
    ]


def test_accuracy_against_raw_answers_is_labelled_apart(evaluated, evaluation):
    for outcome in evaluated[1]:
        raw = [vqa_accuracy(a, q.raw_answers) for a, q in zip(outcome.predictions, evaluation.queries, strict=True)]
        assert outcome.summary()["raw_accuracy"] == pytest.approx(np.mean(raw))


class Shouting:
    """An LVLM that knows every answer and writes it in capitals."""

    def answer(self, prompts, what):
        return [prompt.query.answer.upper() for prompt in prompts]


def test_the_official_accuracy_is_the_headline_and_the_always_normalised_one_beside_it(evaluation, tmp_path):
    choices = {"zero_shot": evaluation.baseline("zero_shot", 1)}
    outcomes = evaluation.run(choices, [1], Shouting())
    agreed = [len(set(query.answers)) == 1 for query in evaluation.queries]
    assert outcomes[0].scores == [0.0 if same else 1.0 for same in agreed]
    assert outcomes[0].normalized_scores == [1.0] * QUERIES
    (row,) = evaluation.write(tmp_path, outcomes, choices, "zero_shot", {})["results"]
    assert (row["accuracy"], row["normalized_accuracy"]) == (pytest.approx(1 - np.mean(agreed)), 1.0)
    assert 0.1 < row["accuracy"] < 0.9


def test_results_without_the_always_normalised_accuracy_are_results_still():
    row = {"method": "grpo", "shots": 1, "accuracy": 0.5, "raw_accuracy": 0.5, "n": 8, "ci": [0.4, 0.6]}
    assert is_result(row)
    assert is_result({**row, "normalized_accuracy": 0.5})
    assert not is_result({**row, "normalized_accuracy": "0.5"})


def test_the_terminal_labels_both_accuracies(capsys):
    row = {"method": "grpo", "shots": 1, "accuracy": 0.5, "ci": [0.4, 0.6], "raw_accuracy": 0.5, "n": 8}
    show_results(Screen(), [{**row, "normalized_accuracy": 0.75}, {**row, "shots": 2, "raw_accuracy": 0.25}], [])
    seen = capsys.readouterr().out
    assert "Official VQA accuracy on 8 queries" in seen
    assert "grpo at 1 shot: 0.500 official, 0.750 with answers always normalised\n" in seen
    assert "grpo at 2 shots: 0.500 official, 0.250 official against `raw_answer`\n" in seen


def test_paired_tests_compare_at_the_same_number_of_shots(evaluated):
    outcomes = evaluated[1]
    ours = next(outcome for outcome in outcomes if (outcome.method, outcome.shots) == ("grpo", 3))
    tests = compare(ours, outcomes)
    assert [(test["against"], test["shots"]) for test in tests] == [("zero_shot", 3), ("img_text_sim", 3)]
    for test in tests:
        other = next(o for o in outcomes if o.method == test["against"] and o.shots in (0, 3))
        assert test["difference"] == pytest.approx(np.mean(ours.scores) - np.mean(other.scores))


# ---------------------------------------------------------------------- which checkpoint


@pytest.fixture
def run(trained):
    return RunFolder(trained / RUN)


def put_best(run, name: str, strategy: str = "val_loss", folder: str = "elsewhere") -> None:
    run.best.write_text(json.dumps({"checkpoint": f"{folder}/{name}", "strategy": strategy}))


def grpo_rows(run) -> list[dict]:
    return [row for row in run.rows() if row["phase"] == "grpo"]


def test_a_named_checkpoint_wins_over_everything(run):
    put_best(run, "grpo_epoch2.pt")
    named = run.checkpoint("rce", 1)
    environ = {"LEVER_LM_CHECKPOINT_PATH": str(run.checkpoint("grpo", 3))}
    assert find_checkpoint(run, str(named), environ) == (named, "named by --ckpt")


def test_the_environment_wins_over_best_json_but_not_over_a_flag(run):
    put_best(run, "grpo_epoch2.pt")
    environ = {"LEVER_LM_CHECKPOINT_PATH": str(run.checkpoint("grpo", 3))}
    path, why = find_checkpoint(run, None, environ)
    assert path == run.checkpoint("grpo", 3)
    assert "LEVER_LM_CHECKPOINT_PATH" in why
    assert find_checkpoint(run, "best", environ)[0] == run.checkpoint("grpo", 2)
    assert find_checkpoint(run, "latest", environ)[0] == run.checkpoint("grpo", 4)


def test_an_empty_variable_is_none(run):
    put_best(run, "grpo_epoch2.pt")
    assert find_checkpoint(run, None, {"LEVER_LM_CHECKPOINT_PATH": " "})[0] == run.checkpoint("grpo", 2)


def test_best_json_names_the_checkpoint_also_in_a_moved_folder(run):
    put_best(run, "grpo_epoch2.pt", "adv_std", folder="where/it/was")
    path, why = find_checkpoint(run, None, {})
    assert path == run.checkpoint("grpo", 2)
    assert "best.json" in why
    assert "adv_std" in why


def test_without_best_json_the_largest_val_reward_is_best(run):
    rows = grpo_rows(run)
    best = max(rows, key=lambda row: row["val_reward"])
    path, why = find_checkpoint(run, None, {})
    assert path == run.checkpoint("grpo", best["epoch"])
    assert "val_reward" in why


def test_where_val_reward_was_not_logged_the_least_val_loss_is_best(run):
    rows = [{k: v for k, v in row.items() if k != "val_reward"} for row in run.rows()]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    best = min((row for row in rows if row["phase"] == "grpo"), key=lambda row: row["val_loss"])
    path, why = find_checkpoint(run, None, {})
    assert path == run.checkpoint("grpo", best["epoch"])
    assert "val_loss" in why


def test_a_best_json_whose_checkpoint_is_gone_is_passed_over_and_said(run):
    put_best(run, "grpo_epoch77.pt")
    best = max(grpo_rows(run), key=lambda row: row["val_reward"])
    path, why = find_checkpoint(run, None, {})
    assert path == run.checkpoint("grpo", best["epoch"])
    assert "best.json names grpo_epoch77.pt, which is gone: `lever best-ckpt` chooses again" in why


@pytest.mark.parametrize("content", ["not json", "[]", '{"epoch": 3}', '{"checkpoint": 3, "strategy": "kl"}', ""])
def test_a_broken_best_json_is_named(run, content):
    run.best.write_text(content)
    with pytest.raises(LeverError, match=r"best\.json.*lever best-ckpt"):
        find_checkpoint(run, None, {})


def test_the_latest_is_by_number_and_grpo_comes_after_rce(run):
    shutil.copy(run.checkpoint("grpo", 4), run.checkpoint("grpo", 10))
    assert latest_checkpoint(run) == run.checkpoint("grpo", 10)
    for path in run.path.glob("grpo_*"):
        path.unlink()
    assert latest_checkpoint(run) == run.checkpoint("rce", 2)
    for path in run.path.glob("rce_*"):
        path.unlink()
    with pytest.raises(LeverError, match="lever train"):
        latest_checkpoint(run)


def test_a_missing_checkpoint_says_who_named_it(run):
    with pytest.raises(LeverError, match=r"gone\.pt.*--ckpt"):
        find_checkpoint(run, "gone.pt", {})
    with pytest.raises(LeverError, match=r"gone\.pt.*LEVER_LM_CHECKPOINT_PATH"):
        find_checkpoint(run, None, {"LEVER_LM_CHECKPOINT_PATH": "gone.pt"})


# ---------------------------------------------------------------------- the checkpoint and its features


def saved(path, policy, **own):
    save_torch(path, v3_content(policy, epoch=0, phase="grpo", kl_beta=0.1, metrics={}, config=own))
    return path


def test_features_of_the_checkpoints_own_encoder_are_taken(tmp_path, policy, config, digits_features):
    own = {"encoder": digits_features.encoder, "features": digits_features.name}
    assert load_for(saved(tmp_path / "a.pt", policy, **own), config).shape == policy.shape


def test_features_of_another_encoder_or_setting_are_refused(tmp_path, policy, config, digits_features):
    path = saved(tmp_path / "a.pt", policy, encoder="other@0123", features=digits_features.name)
    with pytest.raises(LeverError, match=r"other@0123.*tiny-clip"):
        load_for(path, config)
    path = saved(tmp_path / "b.pt", policy, encoder=digits_features.encoder, features="query_img_icd_img")
    with pytest.raises(LeverError, match=r"query_img_icd_img.*query_img_text_icd_img_text"):
        load_for(path, config)


def test_features_of_another_width_are_refused(evaluation):
    with pytest.raises(LeverError, match="96 dimensions, these have 64"):
        evaluation.choose(PointerSelector(d_model=96, hidden_dim=32), 1)


def test_both_formats_of_a_checkpoint_pick_the_same(trained, evaluation, config):
    from lever_lm.utils.safe_torch_load import load_torch

    path = trained / RUN / "grpo_epoch3.pt"
    converted = path.with_name("grpo_epoch3_v2format.ckpt")
    save_torch(converted, to_v2(load_torch(path), path)[0])
    picks = [evaluation.choose(load_for(file, config), 5) for file in (path, converted)]
    assert picks[0] == picks[1]
    other = trained / RUN / "rce_epoch1.pt"
    assert picks[0] != evaluation.choose(load_for(other, config), 5)


# ---------------------------------------------------------------------- the command


def test_infer_writes_below_its_checkpoints_name_and_says_which_and_why(trained, lever):
    done = lever("infer", "--shots", "1,2", "--limit", 24, "--ckpt", RUN / "grpo_epoch2.pt", "--baselines", "--json")
    assert done.status == 0, done.err
    assert f"checkpoint: {RUN / 'grpo_epoch2.pt'} (named by --ckpt)" in done.err
    folder = trained / INFERENCE / "grpo_epoch2"
    result = done.json
    assert result["folder"] == str(INFERENCE / "grpo_epoch2")
    assert result["checkpoint"] == str(RUN / "grpo_epoch2.pt")
    jobs = {(row["method"], row["shots"]) for row in result["results"]}
    others = [name for name in BASELINES if name != "zero_shot"]
    assert jobs == {("zero_shot", 0)} | {(name, k) for name in (*others, "grpo") for k in (1, 2)}
    assert {test["against"] for test in result["tests"]} == set(BASELINES)
    assert json.loads((folder / "metrics.json").read_text())["results"] == result["results"]
    again = lever("infer", "--shots", "1,2", "--limit", 24, "--ckpt", RUN / "grpo_epoch2.pt", "--baselines", "--json")
    assert again.json == result
    assert "inference" in done.err
    assert "inference:" not in again.err, "every prompt was answered before"


def test_an_rce_checkpoint_is_called_rce(trained, lever):
    done = lever("infer", "--shots", "1", "--limit", 5, "--ckpt", RUN / "rce_epoch2.pt", "--json")
    assert [row["method"] for row in done.json["results"]] == ["rce"]


def test_a_checkpoint_of_another_encoder_stops_infer_before_anything_is_written(trained, lever):
    from lever_lm.utils.safe_torch_load import load_torch

    content = load_torch(trained / RUN / "grpo_epoch1.pt")
    content["config"]["encoder"] = "clip-vit-large-patch14@hub"
    save_torch(trained / "other.pt", content)
    before = files_in(trained)
    done = lever("infer", "--shots", "1", "--limit", 5, "--ckpt", "other.pt")
    assert done.status == 1
    assert "clip-vit-large-patch14" in done.err
    assert files_in(trained) == before


def test_the_run_folder_holds_the_config_that_was_resolved(trained, digits_config):
    there = yaml.safe_load((trained / RUN / "config.yaml").read_text())
    expected = to_dict(digits_config)
    expected["rollout"]["num_queries"] = expected["infer"]["num_queries"] = expected["reward"]["max_groups"] = 24
    expected["rce"]["epochs"], expected["grpo"]["epochs"] = 2, 4
    assert there == expected


def test_choices_do_not_depend_on_pythons_own_random_state(evaluation):
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    first = evaluation.baseline("random", 2)
    np.random.seed(2)
    torch.manual_seed(2)
    assert evaluation.baseline("random", 2) == first


def test_a_choice_among_fewer_epochs_than_there_are_now_is_said_to_be_stale(trained, lever):
    assert lever("best-ckpt", "--strategy", "val_reward").status == 0
    path, why = find_checkpoint(RunFolder(trained / RUN), None, {})
    assert "best.json" in why
    assert "again" not in why
    best = json.loads((trained / RUN / "best.json").read_text())
    (trained / RUN / "best.json").write_text(json.dumps({**best, "rows": best["rows"] - 1}))
    assert find_checkpoint(RunFolder(trained / RUN), None, {})[0] == path
    assert "`lever best-ckpt` again" in find_checkpoint(RunFolder(trained / RUN), None, {})[1]


def test_a_choice_of_an_epoch_that_broke_is_said_to_be_one(trained, lever):
    assert lever("best-ckpt", "--strategy", "val_reward").status == 0
    run = RunFolder(trained / RUN)
    epoch = json.loads(run.best.read_text())["epoch"]
    rows = [{**row, "kl": float("nan")} if row["epoch"] == epoch else row for row in run.rows()]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path, why = find_checkpoint(run, None, {})
    assert path == run.checkpoint("grpo", epoch)
    assert "an epoch that broke" in why
    run.best.unlink()
    assert find_checkpoint(run, None, {})[0] != path


def test_results_of_the_same_setting_add_up_and_others_replace_them(trained, lever):
    def rows(*options):
        done = lever("infer", "--ckpt", "latest", "--json", *options)
        assert done.status == 0, done.err
        content = json.loads((trained / done.json["folder"] / "metrics.json").read_text())
        return [(row["method"], row["shots"], row["n"]) for row in content["results"]]

    assert rows("--shots", "1", "--limit", "12") == [("grpo", 1, 12)]
    assert rows("--shots", "2", "--limit", "12") == [("grpo", 1, 12), ("grpo", 2, 12)]
    assert rows("--shots", "1,2", "--limit", "12") == [("grpo", 1, 12), ("grpo", 2, 12)]
    assert rows("--shots", "2", "--limit", "10") == [("grpo", 2, 10)]
    assert rows("--shots", "1", "--limit", "10", "--set", "prompt.cut=classic") == [("grpo", 1, 10)]


def test_inferences_lie_under_the_name_of_their_checkpoints_own_run(trained, lever):
    (trained / RUN).rename(trained / RUN.parent / "mine")
    done = lever("infer", "--ckpt", RUN.parent / "mine" / "grpo_epoch1.pt", "--shots", "1", "--limit", "5", "--json")
    assert done.json["folder"] == "results/digits/inference/mine/grpo_epoch1"
