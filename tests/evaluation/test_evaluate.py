"""N-shot inference: what the LVLM is asked, that the written numbers hold, and where `lever infer` puts them."""

import dataclasses
import json

import numpy as np
import pytest
import yaml
from helpers import INFERENCE, RUN, files_in

from lever_lm.config.schema import to_dict
from lever_lm.evaluation.evaluate import Evaluation, compare
from lever_lm.evaluation.results import write_results
from lever_lm.selectors import BASELINES
from lever_lm.selectors.pointer.checkpoint import save_torch
from lever_lm.tasks.vqa_metrics import vqa_accuracy
from lever_lm.utils.paths import asset_path
from lever_lm.utils.safe_torch_load import load_torch

QUERIES = 40


@pytest.fixture(scope="module")
def evaluation(digits_config, digits):
    infer = dataclasses.replace(digits_config.infer, num_queries=QUERIES)
    return Evaluation(dataclasses.replace(digits_config, infer=infer), digits, None)


def test_fewer_queries_are_a_subset_of_more(digits_config, digits, evaluation):
    fewer = dataclasses.replace(digits_config, infer=dataclasses.replace(digits_config.infer, num_queries=15))
    assert len(evaluation.queries) == QUERIES
    assert len(Evaluation(fewer, digits, None).queries) == 15
    assert set(Evaluation(fewer, digits, None).rows) < set(evaluation.rows)
    assert Evaluation(digits_config, digits, None).rows == list(range(500)), "no number means all of them"


# ---------------------------------------------------------------------- answers, scores, files


class Knowing:
    """An LVLM that writes every second answer as an annotator did, then in capitals, and else `two`."""

    def __init__(self):
        self.prompts = []

    def answer(self, prompts, what):
        self.prompts += prompts
        return [(p.query.answer, p.query.answer.upper(), "two", "two")[i % 4] for i, p in enumerate(prompts)]


@pytest.fixture(scope="module")
def lvlm():
    return Knowing()


@pytest.fixture(scope="module")
def evaluated(evaluation, lvlm, tmp_path_factory):
    """(folder, outcomes, choices) of three methods at one and three shots."""
    choices = {"zero_shot": [[]] * QUERIES, "img_text_sim": [[3 * i, 1, 2] for i in range(1, QUERIES + 1)]}
    choices["grpo"] = [[100 + i, 7, 9] for i in range(QUERIES)]
    outcomes = evaluation.run(choices, [1, 3], lvlm)
    folder = tmp_path_factory.mktemp("inference") / "results"
    examples = (evaluation.queries, evaluation.data.train_examples)
    reasons = {"grpo": [{"probabilities": [0.5, 0.4, 0.3], "considered": [[1, 0.5]]}] * QUERIES}
    write_results(folder, *examples, outcomes, choices, "grpo", {"checkpoint": "x.pt"}, reasons, print)
    return folder, outcomes, choices


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_method_is_asked_at_every_number_of_shots_with_its_first_picks_and_zero_shot_once(
    evaluated, evaluation, lvlm, digits
):
    _, outcomes, choices = evaluated
    jobs = [(outcome.method, outcome.shots) for outcome in outcomes]
    assert jobs == [("zero_shot", 0), ("img_text_sim", 1), ("img_text_sim", 3), ("grpo", 1), ("grpo", 3)]
    asked = [(prompt.query, [icd.question_id for icd in prompt.icds]) for prompt in lvlm.prompts]
    assert asked == [
        (query, [digits.train_examples[i].question_id for i in reversed(picks[:shots])])
        for method, shots in jobs
        for query, picks in zip(evaluation.queries, choices[method], strict=True)
    ]


def test_predictions_are_an_official_result_file_that_scores_as_written(evaluated, evaluation):
    folder, outcomes, _ = evaluated
    annotations = json.loads((asset_path("asset:digits") / "mscoco_val2014_annotations.json").read_text())
    references = {
        annotation["question_id"]: [answer["answer"] for answer in annotation["answers"]]
        for annotation in annotations["annotations"]
    }
    results = json.loads((folder / "metrics.json").read_text())["results"]
    for result, outcome in zip(results, outcomes, strict=True):
        rows = json.loads((folder / f"predictions_{outcome.method}_{outcome.shots}shot.json").read_text())
        assert rows == [
            {"question_id": query.question_id, "answer": answer}
            for query, answer in zip(evaluation.queries, outcome.predictions, strict=True)
        ]
        scores = [vqa_accuracy(row["answer"], references[row["question_id"]]) for row in rows]
        assert result["accuracy"] == pytest.approx(np.mean(scores), abs=1e-9)
        assert result["ci"][0] < result["accuracy"] < result["ci"][1]
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
            surely = [0.5, 0.4, 0.3][: result["shots"]] if result["method"] == "grpo" else None
            assert row.get("probabilities") == surely
    assert read_lines(folder / "icds.jsonl") == [
        {"question_id": query.question_id, "icds": [digits.train_examples[i].question_id for i in picks]}
        for query, picks in zip(evaluation.queries, choices["grpo"], strict=True)
    ]


def test_three_accuracies_are_labelled_apart(evaluated, evaluation):
    """The official one is the headline; beside it that with answers always normalised, and that against raw answers."""
    for outcome in evaluated[1]:
        pairs = list(zip(outcome.predictions, evaluation.queries, strict=True))
        row = outcome.summary()
        official = [vqa_accuracy(a, q.answers) for a, q in pairs]
        normalized = [vqa_accuracy(a, q.answers, always_normalize=True) for a, q in pairs]
        assert row["accuracy"] == pytest.approx(np.mean(official))
        assert row["normalized_accuracy"] == pytest.approx(np.mean(normalized))
        assert row["raw_accuracy"] == pytest.approx(np.mean([vqa_accuracy(a, q.raw_answers) for a, q in pairs]))
        assert row["normalized_accuracy"] > row["accuracy"] + 0.05, "capitals count as wrong where all annotators agree"


def test_paired_tests_compare_at_the_same_number_of_shots(evaluated):
    outcomes = evaluated[1]
    tests = compare("grpo", outcomes)
    assert [(test["against"], test["shots"]) for test in tests] == [
        (other, shots) for shots in (1, 3) for other in ("zero_shot", "img_text_sim")
    ]
    for test in tests:
        ours = next(o for o in outcomes if (o.method, o.shots) == ("grpo", test["shots"]))
        other = next(o for o in outcomes if o.method == test["against"] and o.shots in (0, test["shots"]))
        assert test["difference"] == pytest.approx(np.mean(ours.scores) - np.mean(other.scores))


# ---------------------------------------------------------------------- the command


def test_infer_writes_below_its_checkpoints_name_and_says_which_and_why(trained, lever):
    words = ("infer", "--shots", "1,2", "--limit", 8, "--ckpt", RUN / "grpo_epoch2.pt", "--baselines", "--json")
    done = lever(*words)
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
    again = lever(*words)
    assert again.json == result
    assert "inference:" in done.err
    assert "inference:" not in again.err, "every prompt was answered before"


def test_inferences_are_called_by_the_phase_and_lie_under_their_checkpoints_own_run(trained, lever):
    (trained / RUN).rename(trained / RUN.parent / "mine")
    done = lever("infer", "--ckpt", RUN.parent / "mine" / "rce_epoch2.pt", "--shots", "1", "--limit", "5", "--json")
    assert done.json["folder"] == "results/digits/inference/mine/rce_epoch2"
    assert [row["method"] for row in done.json["results"]] == ["answer_match"]  # by what the warm-up learnt from


def test_a_checkpoint_of_another_encoder_stops_infer_before_anything_is_written(trained, lever):
    content = load_torch(trained / RUN / "grpo_epoch1.pt")
    content["config"]["encoder"] = "clip-vit-large-patch14@hub"
    save_torch(trained / "other.pt", content)
    before = files_in(trained)
    done = lever("infer", "--shots", "1", "--limit", 5, "--ckpt", "other.pt")
    assert done.status == 1
    assert "clip-vit-large-patch14" in done.err
    assert files_in(trained) == before


def test_the_run_folder_holds_the_config_that_was_resolved(trained_once, digits_config):
    there = yaml.safe_load((trained_once / RUN / "config.yaml").read_text())
    expected = to_dict(digits_config)
    expected["rollout"]["num_queries"] = expected["infer"]["num_queries"] = expected["reward"]["max_groups"] = 24
    expected["rce"]["epochs"], expected["grpo"]["epochs"] = 2, 4
    assert there == expected


def test_results_of_the_same_setting_add_up_and_others_replace_them(trained, lever):
    def rows(*options):
        done = lever("infer", "--ckpt", "latest", "--json", *options)
        assert done.status == 0, done.err
        content = json.loads((trained / done.json["folder"] / "metrics.json").read_text())
        return [(row["method"], row["shots"], row["n"]) for row in content["results"]]

    assert rows("--shots", "1", "--limit", "6") == [("grpo", 1, 6)]
    assert rows("--shots", "2", "--limit", "6") == [("grpo", 1, 6), ("grpo", 2, 6)]
    assert rows("--shots", "1,2", "--limit", "6") == [("grpo", 1, 6), ("grpo", 2, 6)]
    assert rows("--shots", "2", "--limit", "5") == [("grpo", 2, 5)]
    assert rows("--shots", "1", "--limit", "5", "--set", "prompt.cut=classic") == [("grpo", 1, 5)]
