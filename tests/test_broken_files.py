"""Files that a stranger changed anywhere: what reads them goes on soundly or refuses in one short line."""

import copy
import json

import pytest
import yaml
from helpers import small_digits
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lever_lm.config.load import resolve
from lever_lm.config.schema import Config, to_dict
from lever_lm.config.values import build
from lever_lm.data import load_dataset
from lever_lm.evaluation.choices_file import read_icds
from lever_lm.evaluation.evaluate import Evaluation, Outcome
from lever_lm.evaluation.report.page import write_report
from lever_lm.evaluation.results import write_results
from lever_lm.training.find_checkpoint import find_checkpoint
from lever_lm.training.rollouts.file_format import load_groups
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.select_checkpoint import STRATEGIES, choose, kept_choice, read_history
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.hub import missing_files
from lever_lm.utils.terminal import json_text

many = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 2**63, 10**19, -(10**30), 10**400, 1e308, float("nan"), float("inf"), 0.5])
    | st.sampled_from(["", "x", "..", "../../x", "/", "a\0b", "\x1b[2J", "\u202e", "é" * 300, "1", "grpo", "y" * 5000])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def places(value, path=()):
    """The path of every value within a value, its own among them."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def changed(draw, sound):
    """A sound value, another value in one or two places of which, or with one left out."""
    value = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(sorted(places(value), key=repr)))
        if not path:
            value = draw(JUNK)
            continue
        inside = value
        for key in path[:-1]:
            inside = inside[key]
        if draw(st.booleans()) and draw(st.booleans()):
            del inside[path[-1]]
        else:
            inside[path[-1]] = draw(JUNK)
    return value


def calm(work, allowed=LeverError):
    """What `work` returns; None where it refuses in a short line."""
    try:
        return work()
    except allowed as error:
        message = str(error).split("/", 1)[-1]
        return None if len(message) < 1000 else pytest.fail(f"a message of {len(message)} characters: {message[:2000]}")


def put(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


# ---------------------------------------------------------------------- a run's own files

METRICS = [
    {"phase": p, "epoch": e, "val_loss": 2.0, "kl": 0.05, "warnings": {"a": "b"}}
    for p in ("rce", "grpo")
    for e in (1, 2)
]
BEST = {"strategy": "val_loss", "epoch": 1, "phase": "grpo", "checkpoint": "a/grpo_epoch1.pt", "rows": 2}


@pytest.fixture
def run(tmp_path):
    """A run folder with metrics and two files for checkpoints."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in METRICS), encoding="utf-8")
    for epoch in (1, 2):
        run.checkpoint("grpo", epoch).touch()
    return run


@many
@given(changed(BEST))
@example({**BEST, "checkpoint": "../../x"})
@example({**BEST, "checkpoint": "run/.."})
@example({**BEST, "checkpoint": "z" * 300})
@example({**BEST, "strategy": ["val_loss"]})
@example({**BEST, "rows": 10**400})
def test_a_best_json_only_ever_names_a_file_of_its_run(run, answer):
    put(run.best, answer)
    for name in ("x", "y"):
        (run.path.parent.parent / name).touch()
    found = calm(lambda: find_checkpoint(run, None, {}))
    if found is not None:
        assert found[0].resolve().parent == run.path.resolve()
        assert found[0].is_file()
    kept = kept_choice(run)
    assert kept is None or (kept[0] in STRATEGIES and isinstance(kept[1], int))


@many
@given(changed(METRICS), st.sampled_from(sorted(STRATEGIES)))
def test_metrics_are_read_or_refused_by_line(run, rows, strategy):
    rows = rows if isinstance(rows, list) else [rows]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    history = calm(lambda: read_history(run, None))
    if history is not None:
        json_text(choose(history, strategy, run))
        assert len(run.rows()) == len(rows)


@settings(many, max_examples=40)
@given(changed(to_dict(Config())))
def test_a_runs_config_is_compared_or_refused(run, values):
    run.config.write_text(yaml.safe_dump(values), encoding="utf-8")
    differences = calm(lambda: run.differences(Config()))
    assert differences is None or all(len(line) < 400 and "\n" not in line for line in differences)
    assert run.lvlm() is None or isinstance(run.lvlm(), str)


@settings(many, max_examples=40)
@given(changed(to_dict(Config())))
def test_a_config_is_built_or_refused(tmp_path, values):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    for work in (lambda: build(values), lambda: resolve({}, path, [], {})):
        found = calm(work, UsageError)
        assert found is None or "/" not in (found if isinstance(found, Config) else found[0]).data.name


@many
@given(changed({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
def test_an_index_names_what_is_missing_beside_it(tmp_path, index):
    put(tmp_path / "model.safetensors.index.json", index)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "one.safetensors").touch()
    found = missing_files(tmp_path)
    assert all(isinstance(name, str) and name.isprintable() for name in found)
    assert sum(map(len, found)) < 10_000


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
    outcomes = [Outcome(name, 1, ["two"] * 3, *[[0.0, 0.3, 1.0]] * 3) for name in (other, "grpo")]
    choices = {outcome.method: [[0], [1], [2]] for outcome in outcomes}
    test = {"method": "grpo", "against": other, "shots": 1, "difference": 0.1, "low": 0.0, "high": 0.2, "p": 0.5}
    facts = {"setting": "s", "checkpoint": "c", "tests": [test]}
    examples = (evaluation.queries, evaluation.data.train_examples)
    return write_results(folder, *examples, outcomes, choices, "grpo", facts, {})


@settings(many, max_examples=60)
@given(st.data())
def test_earlier_results_are_kept_or_left_out(evaluation, results, data):
    folder, sound = results
    put(folder / "metrics.json", data.draw(changed(sound)))
    written = write(evaluation, folder, "text_sim")
    assert {row["method"] for row in written["results"][-2:]} == {"text_sim", "grpo"}
    assert {row["method"] for row in written["results"]} <= {"random", "text_sim", "grpo"} | {
        row["method"] for row in written["results"] if isinstance(row["method"], str)
    }
    assert json.loads((folder / "metrics.json").read_text()) == written


def test_earlier_results_of_another_type_are_no_results(evaluation, results):
    folder, sound = results
    for there in (
        5,
        None,
        "x",
        {},
        [5],
        [{}],
        [{"method": "random", "shots": [1]}],
        [{**sound["results"][0], "ci": 1}],
    ):
        put(folder / "metrics.json", {**sound, "results": there})
        assert [row["method"] for row in write(evaluation, folder, "text_sim")["results"]] == ["text_sim", "grpo"]


@settings(many, max_examples=60)
@given(st.data())
def test_a_report_is_written_or_refused(run, results, digits, data):
    folder, sound = results
    samples = folder / "samples_grpo_1shot.jsonl"
    told = {"probabilities": [0.5], "considered": [[digits.train_examples[7].question_id, 0.25]]}
    lines = (folder / "samples_random_1shot.jsonl").read_text().splitlines()
    rows = [{**json.loads(line), **told} for line in lines]
    which = data.draw(st.sampled_from(["metrics", "samples", "rows"]))
    put(folder / "metrics.json", data.draw(changed(sound)) if which == "metrics" else sound)
    rows = data.draw(changed(rows)) if which == "samples" else rows
    samples.write_text("".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows])))
    epochs = data.draw(changed(METRICS)) if which == "rows" else METRICS
    run.metrics.write_text(
        "".join(json.dumps(row) + "\n" for row in (epochs if isinstance(epochs, list) else [epochs]))
    )
    page = calm(lambda: write_report(run, folder, digits))
    assert page is None or "</html>" in page.read_text(encoding="utf-8")


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

TRAJECTORY = {
    "pointer": [0, 1],
    "pointer_global": [5, 6],
    "vqa_correct": 1,
    "vqa_acc_score": 0.6,
    "vqa_eval_mode": "vqa",
}
ENTRY = {"query": {"question_id": 1}, "candidate_pool_ids": [5, 6, 7], "pointer_candidates": [TRAJECTORY, TRAJECTORY]}


@many
@given(changed({"_meta": {"fingerprint": "x"}, "0": ENTRY, "1": ENTRY}))
@example({"0": ENTRY, "00": ENTRY})
@example({"9" * 5000: ENTRY})
def test_rollouts_are_read_or_refused(tmp_path, content):
    put(tmp_path / "rl_data.json", content)
    groups = calm(lambda: load_groups(tmp_path / "rl_data.json"))
    for group in groups or []:
        assert all(abs(reward) <= 5 for reward in group.rewards)
        assert all(0 <= place < len(group.pool) for sequence in group.sequences for place in sequence)
    assert len({group.query_id for group in groups or []}) == len(groups or [])


@many
@given(st.data())
def test_choices_are_read_or_refused(tmp_path, evaluation, digits, data):
    sound = [{"question_id": q.question_id, "icds": [digits.train_examples[0].question_id]} for q in evaluation.queries]
    put(tmp_path / "icds.json", data.draw(changed(sound)))
    picks = calm(lambda: read_icds(tmp_path / "icds.json", evaluation.queries, digits.train_examples, 1))
    assert picks is None or picks == [[0]] * 3 or all(0 <= row < len(digits.train_examples) for [row] in picks)


@settings(many, max_examples=60)
@given(st.data())
def test_official_files_are_read_or_refused(tmp_path_factory, data):
    root = tmp_path_factory.getbasetemp() / "official"
    if not root.exists():
        small_digits(root, 3, 2)
    which = data.draw(
        st.sampled_from(["OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json"])
    )
    before = (root / which).read_text()
    try:
        put(root / which, data.draw(changed(json.loads(before))))
        skip = data.draw(st.booleans())
        values = {"okvqa_path": str(root), "coco_path": str(root), "skip_bad_examples": skip}
        found = calm(lambda: load_dataset(build({"data": values}).data))
        for question in found.train_examples if found else ():
            json.dumps([question.question, *question.answers], ensure_ascii=False).encode("utf-8")
    finally:
        (root / which).write_text(before)


@pytest.mark.parametrize(
    "text", ['{"questions": [], "questions": []}', '{"questions": NaN}', "\ufeff{}", '{"questions": "\\ud800"}']
)
def test_official_files_are_read_strictly(tmp_path, text):
    root = small_digits(tmp_path / "world", 3, 2)
    (root / "OpenEnded_mscoco_train2014_questions.json").write_text(text, encoding="utf-8")
    with pytest.raises(LeverError, match="is not an official VQA file"):
        load_dataset(build({"data": {"okvqa_path": str(root), "coco_path": str(root)}}).data)
