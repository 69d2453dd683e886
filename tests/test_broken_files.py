"""Files that were changed by hand, and what their readers make of them; tests/fuzz changes them anywhere."""

import json

import pytest
from helpers import small_digits

from lever_lm.config.load import resolve
from lever_lm.config.values import build
from lever_lm.data import load_dataset
from lever_lm.evaluation.evaluate import Evaluation, Outcome
from lever_lm.evaluation.report.page import write_report
from lever_lm.evaluation.results import write_results
from lever_lm.training.run_dir import RunFolder
from lever_lm.utils.errors import LeverError
from lever_lm.utils.hub import missing_files


def put(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


# ---------------------------------------------------------------------- a run's own files


@pytest.fixture
def run(tmp_path):
    """A run folder with the metrics of an epoch."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.metrics.write_text('{"phase": "grpo", "epoch": 1, "val_loss": 2.0, "kl": 0.05}\n')
    return run


def test_of_many_missing_shards_some_are_named(tmp_path):
    put(tmp_path / "model.safetensors.index.json", {"weight_map": {str(i): f"{i}.safetensors" for i in range(5000)}})
    (tmp_path / "config.json").write_text("{}")
    assert len(missing_files(tmp_path)) < 50
    assert missing_files(tmp_path)[-1].endswith("more")


def test_a_shard_outside_its_folder_is_none(tmp_path):
    put(tmp_path / "model" / "model.safetensors.index.json", {"weight_map": {"a": "../secret.safetensors"}})
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "secret.safetensors").touch()
    assert missing_files(tmp_path / "model") == ["../secret.safetensors"]


# ---------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def evaluation(digits_config, digits):
    config = resolve({"dataset": "digits", "lvlm": "tiny_qwen2.5_vl"}, None, [], {"infer": {"num_queries": 3}})[0]
    return Evaluation(config, digits, None)


@pytest.fixture
def results(evaluation, tmp_path):
    """A folder that an evaluation wrote, and its metrics.json."""
    folder = tmp_path / "inference"
    return folder, write(evaluation, folder, "random")


def write(evaluation, folder, other: str) -> dict:
    scores = [0.0, 0.3, 1.0]
    others = dict.fromkeys(("raw_accuracy", "normalized_accuracy"), scores)
    outcomes = [Outcome(name, 1, ["two"] * 3, scores, others) for name in (other, "grpo")]
    choices = {outcome.method: [[0], [1], [2]] for outcome in outcomes}
    test = {"method": "grpo", "against": other, "shots": 1, "difference": 0.1, "low": 0.0, "high": 0.2, "p": 0.5}
    facts = {"setting": "s", "checkpoint": "c", "tests": [test]}
    examples = (evaluation.queries, evaluation.data.train_examples)
    return write_results(folder, *examples, outcomes, choices, "grpo", facts, {}, print)


def test_earlier_results_of_another_type_are_no_results(evaluation, results):
    folder, sound = results
    for there in (5, [5], [{"method": "random", "shots": [1]}]):
        put(folder / "metrics.json", {**sound, "results": there})
        assert [row["method"] for row in write(evaluation, folder, "text_sim")["results"]] == ["text_sim", "grpo"]


def test_html_in_a_prediction_stays_text(run, results, digits):
    folder, _ = results
    samples = folder / "samples_grpo_1shot.jsonl"
    trap = "<script>alert(1)</script>\x1b[2J"
    rows = [{**json.loads(line), "answer": trap, "references": [trap]} for line in samples.read_text().splitlines()]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.config.write_text(trap)
    page = write_report(run, folder, digits).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "\x1b" not in page
    assert page.count("&lt;script&gt;") == 1 + 2 * len(rows)


# ---------------------------------------------------------------------- data and choices


@pytest.mark.parametrize(
    "text", ['{"questions": [], "questions": []}', '{"questions": NaN}', "\ufeff{}", '{"questions": "\\ud800"}']
)
def test_official_files_are_read_strictly(tmp_path, text):
    root = small_digits(tmp_path / "world", 3, 2)
    (root / "OpenEnded_mscoco_train2014_questions.json").write_text(text, encoding="utf-8")
    with pytest.raises(LeverError, match="OpenEnded_mscoco_train2014_questions"):
        load_dataset(build({"data": {"okvqa_path": str(root), "coco_path": str(root)}}).data)
