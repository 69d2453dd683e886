"""`lever infer --icds`: choices from a file are read in any of three forms, checked, and judged like a policy's."""

import json
import re

import pytest
from helpers import INFERENCE, RUN, files_in, small_digits

from lever_lm.config.load import resolve
from lever_lm.data import load_dataset
from lever_lm.evaluation.choices_file import read_icds
from lever_lm.evaluation.evaluate import Evaluation
from lever_lm.lvlm import CachedLvlm
from lever_lm.selectors import BASELINES
from lever_lm.utils.errors import LeverError

LIMIT = 6


def few_queries(config):
    return resolve({"dataset": "digits", "lvlm": "tiny_qwen2.5_vl"}, None, [], {"infer": {"num_queries": LIMIT}})[0]


@pytest.fixture(scope="module")
def queries(digits_config, digits):
    """The evaluation questions of `--limit 6`."""
    return Evaluation(few_queries(digits_config), digits, None).queries


@pytest.fixture(scope="module")
def choices(queries, digits):
    """Three ICDs for each of them, by question_id: the training rows 0-2, 10-12, …"""
    train = [example.question_id for example in digits.train_examples]
    return {query.question_id: train[10 * i : 10 * i + 3] for i, query in enumerate(queries)}


def as_object(choices) -> str:
    return json.dumps({str(question): icds for question, icds in choices.items()})


def as_list(choices) -> str:
    return json.dumps([{"question_id": question, "icds": icds} for question, icds in choices.items()], indent=2)


def as_lines(choices) -> str:
    return "".join(json.dumps({"question_id": q, "icds": icds}) + "\n" for q, icds in choices.items())


FORMS = {"object": as_object, "list": as_list, "lines": as_lines}


def written(folder, text, name="picks.json"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that an LVLM which always says `two` was given."""
    seen = []

    def answer(self, prompts, what):
        seen.extend(prompts)
        return ["two"] * len(prompts)

    monkeypatch.setattr(CachedLvlm, "answer", answer)
    return seen


# ---------------------------------------------------------------------- our own choices, from the file


def test_our_own_choices_evaluated_again_give_the_policys_numbers(trained, lever):
    options = ("--shots", "1,2", "--limit", 12, "--json")
    policy = lever("infer", "--ckpt", RUN / "grpo_epoch2.pt", *options)
    assert policy.status == 0, policy.err
    theirs = trained / policy.json["folder"]
    again = lever("infer", "--icds", theirs / "icds.jsonl", *options)
    assert again.status == 0, again.err
    assert again.json["folder"] == str(INFERENCE / "icds_icds")
    ours = trained / again.json["folder"]
    for shots in (1, 2):
        both = ((theirs, "grpo"), (ours, "icds"))
        one, other = (folder / f"predictions_{method}_{shots}shot.json" for folder, method in both)
        assert one.read_text() == other.read_text()
        files = [(folder / f"samples_{method}_{shots}shot.jsonl").read_text() for folder, method in both]
        one, other = ([json.loads(line) for line in file.splitlines()] for file in files)
        for row in one:  # nobody knows how sure a file is of its choices
            assert len(row.pop("probabilities")) == shots
            assert len(row.pop("considered")) == 8
        assert one == other
    assert (ours / "icds.jsonl").read_text() == (theirs / "icds.jsonl").read_text()
    rows = [[{**row, "method": "x"} for row in done.json["results"]] for done in (policy, again)]
    assert rows[0] == rows[1]
    assert [row["shots"] for row in rows[1]] == [1, 2]
    assert again.json["icds"] == str(theirs / "icds.jsonl")
    assert "checkpoint" not in again.json
    assert "inference:" not in again.err, "every prompt was answered before"


def test_baselines_stand_beside_the_choices_with_a_paired_test_each(warm, lever, choices, prompts):
    path = written(warm, as_object(choices))
    done = lever("infer", "--icds", path, "--shots", "1,2", "--limit", LIMIT, "--baselines", "--json")
    assert done.status == 0, done.err
    jobs = {(row["method"], row["shots"]) for row in done.json["results"]}
    others = [name for name in BASELINES if name != "zero_shot"]
    assert jobs == {("zero_shot", 0)} | {(name, k) for name in (*others, "icds") for k in (1, 2)}
    tests = {(test["method"], test["against"], test["shots"]) for test in done.json["tests"]}
    assert tests == {("icds", name, k) for name in BASELINES for k in (1, 2)}
    assert all(row["n"] == LIMIT for row in done.json["results"])
    assert len(prompts) == LIMIT * (1 + 6 * 2)


def test_without_baselines_no_features_are_made(lever, tmp_path, choices, prompts):
    done = lever("infer", "--icds", written(tmp_path, as_object(choices)), "--shots", "2", "--limit", LIMIT)
    assert done.status == 0, done.err
    assert not (tmp_path / "results/digits/cache").exists() or not list(tmp_path.rglob("features_*"))


# ---------------------------------------------------------------------- what is read and shown


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", [False, True], ids=["numbers", "text"])
def test_three_forms_with_ids_as_numbers_or_text_mean_the_same(tmp_path, queries, digits, choices, form, text):
    meant = {str(q): list(map(str, icds)) for q, icds in choices.items()} if text else choices
    path = written(tmp_path, FORMS[form](meant))
    rows = read_icds(path, queries, digits.train_examples, 3)
    assert rows == [[10 * i, 10 * i + 1, 10 * i + 2] for i in range(LIMIT)]


def test_blank_lines_further_fields_further_questions_and_one_line_do_no_harm(tmp_path, queries, digits, choices):
    lines = as_lines(choices).splitlines()
    more = json.dumps({"question_id": 999_999_999, "icds": [1], "question": "which?", "score": 0.5})
    path = written(tmp_path, "\n\n" + "\r\n\r\n".join([more, *lines]))
    assert read_icds(path, queries, digits.train_examples, 3)[1] == [10, 11, 12]
    alone = written(tmp_path, lines[0])
    assert read_icds(alone, queries[:1], digits.train_examples, 3) == [[0, 1, 2]]


@pytest.mark.parametrize("form", FORMS)
def test_a_byte_order_mark_before_the_choices_does_no_harm(tmp_path, queries, digits, choices, form):
    path = written(tmp_path, "\ufeff" + FORMS[form](choices).replace("\n", "\r\n"))
    assert read_icds(path, queries, digits.train_examples, 3)[1] == [10, 11, 12]


def test_a_line_break_of_unicode_within_a_text_ends_no_line(tmp_path, queries, digits, choices):
    rows = [{"question_id": q, "icds": icds, "question": "one\u2028two\u0085?"} for q, icds in choices.items()]
    path = written(tmp_path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert len(read_icds(path, queries, digits.train_examples, 3)) == LIMIT


def test_the_first_pick_stands_nearest_the_query_and_fewer_shots_show_the_first(warm, lever, choices, queries, prompts):
    path = written(warm, as_lines(choices), "mine.jsonl")
    done = lever("infer", "--icds", path, "--shots", "1,2", "--limit", LIMIT, "--json")
    assert done.status == 0, done.err
    shown = [[icd.question_id for icd in prompt.icds] for prompt in prompts]
    wanted = [choices[query.question_id] for query in queries]
    assert shown == [icds[:1] for icds in wanted] + [icds[:2][::-1] for icds in wanted]
    assert [prompt.query for prompt in prompts] == [*queries, *queries]
    written_rows = (warm / INFERENCE / "icds_mine/samples_icds_2shot.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in written_rows]
    assert [row["icds"] for row in samples] == [icds[:2] for icds in wanted]


def test_the_other_order_is_kept_where_the_config_says_so(warm, lever, choices, queries, prompts):
    options = ("--set", "prompt.order=first_pick_first", "--shots", "3", "--limit", LIMIT)
    assert lever("infer", "--icds", written(warm, as_object(choices)), *options).status == 0
    assert [[icd.question_id for icd in p.icds] for p in prompts] == [choices[q.question_id] for q in queries]


def test_predictions_are_official_result_files_of_all_evaluated_questions(warm, lever, choices, queries, prompts):
    done = lever("infer", "--icds", written(warm, as_list(choices)), "--shots", "1-3", "--limit", LIMIT, "--json")
    assert done.json["folder"] == str(INFERENCE / "icds_picks")
    for shots in (1, 2, 3):
        rows = json.loads((warm / INFERENCE / f"icds_picks/predictions_icds_{shots}shot.json").read_text())
        assert [set(row) for row in rows] == [{"question_id", "answer"}] * LIMIT
        assert [row["question_id"] for row in rows] == [query.question_id for query in queries]
        assert all(type(row["question_id"]) is int and row["answer"] == "two" for row in rows)


# ---------------------------------------------------------------------- whose results they are


def test_results_of_other_choices_under_one_name_are_never_in_one_table(warm, lever, choices, prompts):
    path = written(warm, as_object(choices))
    assert lever("infer", "--icds", path, "--shots", "1", "--limit", LIMIT, "--json").status == 0
    same = lever("infer", "--icds", path, "--shots", "2", "--limit", LIMIT, "--json")
    assert [row["shots"] for row in same.json["results"]] == [1, 2]
    written(warm, as_object({question: icds[::-1] for question, icds in choices.items()}))
    other = lever("infer", "--icds", path, "--shots", "3", "--limit", LIMIT, "--json")
    assert [row["shots"] for row in other.json["results"]] == [3], "1 and 2 were of the file as it was before"


def test_another_lvlm_leaves_the_first_ones_results_alone(warm, lever, choices, prompts):
    import shutil

    from lever_lm.utils.paths import asset_path

    path, other = written(warm, as_object(choices)), warm / "other-vl"
    shutil.copytree(asset_path("asset:tiny-qwen2.5-vl"), other)
    for options in ((), ("--run-name", "mine")):
        first = lever("infer", "--icds", path, "--shots", "1", "--limit", LIMIT, "--json", *options)
        there = (warm / first.json["folder"] / "metrics.json").read_bytes()
        swapped = ("--set", f"lvlm.path={other}", "--set", "lvlm.num_beams=2")
        second = lever("infer", "--icds", path, "--shots", "1", "--limit", LIMIT, "--json", *swapped, *options)
        assert second.status == 0, second.err
        assert (warm / first.json["folder"] / "metrics.json").read_bytes() == there, options


# ---------------------------------------------------------------------- refusals


def changed(choices, number, icds):
    """The choices with another list for one question, and that question."""
    question = list(choices)[number]
    return {**choices, question: icds}, question


def refused(done, *words):
    assert done.status == 1, done.err
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert done.out == ""
    assert "defect" not in done.err
    for word in words:
        assert str(word) in done.err, done.err


@pytest.fixture
def refuse(lever, tmp_path, prompts):
    """Run with this text as the file: refused in one line that names the file and these words, nothing written."""

    def run(text, *words, name="picks.json", shots="2"):
        path = written(tmp_path, text, name) if isinstance(text, str) else text
        before = files_in(tmp_path)
        refused(lever("infer", "--icds", path, "--shots", shots, "--limit", LIMIT, "--json", "--quiet"), path, *words)
        assert files_in(tmp_path) == before
        assert prompts == []

    return run


def test_a_question_without_a_choice_is_named(refuse, choices, queries):
    missing = queries[2].question_id
    refuse(as_object({q: icds for q, icds in choices.items() if q != missing}), missing, "1 of 6", "needs one")


def test_too_few_icds_are_refused_with_their_number_and_the_shots(refuse, choices):
    few, question = changed(choices, 3, choices[next(iter(choices))][:1])
    refuse(as_lines(few), f"question {question}", "1 ICDs for 2 shots", "--shots")
    empty, question = changed(choices, 0, [])
    refuse(as_list(empty), f"question {question}", "0 ICDs", "--shots")


def test_an_icd_that_is_no_training_question_is_named(refuse, tmp_path, choices, queries, digits):
    unknown, question = changed(choices, 1, [choices[queries[0].question_id][0], 987_654_321])
    refuse(as_object(unknown), f"question {question}", "ICD 987654321", "training split")
    beyond = {**choices, question: [*choices[question], 987_654_321]}  # a fourth ICD is neither shown nor looked at
    assert len(read_icds(written(tmp_path, as_object(beyond)), queries, digits.train_examples, 3)) == LIMIT


@pytest.mark.parametrize("image", [None, 555], ids=["its id", "another id"])
def test_an_icd_that_shows_the_querys_own_image_is_refused(lever, tmp_path, prompts, image):
    """The digits share no image between their splits: a copy in which one does, under its id or under another."""
    root = small_digits(tmp_path / "world")
    for kind, key in (("OpenEnded_mscoco", "questions"), ("mscoco", "annotations")):
        name = "{}_{}_{}.json"
        train, val = (root / name.format(kind, f"{s}2014", key) for s in ("train", "val"))
        content = json.loads(train.read_text())
        leak = json.loads(val.read_text())[key][0]
        again = {} if key == "annotations" else {"question": "What else?"}
        content[key].append({**leak, **again, "question_id": 777, "image_id": image or leak["image_id"]})
        train.write_text(json.dumps(content))
        question, number = leak["question_id"], leak["image_id"]
    (shown,) = root.glob(f"val2014/*{number:012d}.jpg")
    (root / f"train2014/COCO_train2014_{image or number:012d}.jpg").write_bytes(shown.read_bytes())
    places = ("--set", f"data.okvqa_path={root}", "--set", f"data.coco_path={root}")
    config = resolve({"dataset": "digits"}, None, list(places[1::2]), {})[0]
    data = load_dataset(config.data)
    train_ids = [example.question_id for example in data.train_examples]
    picks = {example.question_id: train_ids[:2] for example in data.val_examples}
    path = written(tmp_path, as_object({**picks, question: [train_ids[0], 777]}))
    before = files_in(tmp_path)
    done = lever("infer", "--icds", path, "--shots", "2", "--quiet", *places)
    refused(done, path, f"question {question}", "ICD 777", "its image")
    assert files_in(tmp_path) == before
    assert lever("infer", "--icds", path, "--shots", "1", "--quiet", *places).status == 0, "the leak is not shown"


def test_an_icd_that_stands_twice_in_a_choice_is_refused(refuse, tmp_path, choices, queries, digits):
    one, other = choices[queries[0].question_id][:2]
    twice, question = changed(choices, 3, [one, str(one), other])
    refuse(as_lines(twice), f"question {question}", f"ICD {one} appears twice")
    beyond, _ = changed(choices, 3, [one, other, one])  # a third ICD is neither shown nor looked at
    assert len(read_icds(written(tmp_path, as_object(beyond)), queries, digits.train_examples, 2)) == LIMIT


@pytest.mark.parametrize("again", [str, int], ids=["text", "number"])
def test_a_question_that_appears_twice_is_named(refuse, choices, again):
    first = next(iter(choices))
    refuse(as_lines(choices) + json.dumps({"question_id": again(first), "icds": choices[first]}), first, "twice")
    refuse(f"[{as_list(choices)[1:-1]}, " + json.dumps({"question_id": again(first), "icds": []}) + "]", first, "twice")


def test_a_question_that_appears_twice_in_an_object_is_named(refuse, choices):
    first = next(iter(choices))
    refuse(as_object(choices)[:-1] + f', "{first}": {choices[first][::-1]}}}', first, "twice")


@pytest.mark.parametrize(
    "icds", [None, 5, "1,2", {}, [1.5, 2], [True, 2], [None], [[1, 2]], ["one", "two"], [-1, 2], ["²", "1"]], ids=str
)
@pytest.mark.parametrize("form", FORMS)
def test_choices_that_are_no_list_of_ids_are_refused_by_question(refuse, choices, form, icds):
    wrong, question = changed(choices, 4, icds)
    refuse(FORMS[form](wrong), f"question {question}".replace("question ", ""), "expected", "--icds")


@pytest.mark.parametrize("question", [None, 1.5, True, "one", "", -3, "9" * 5000], ids=lambda q: str(q)[:8])
def test_a_question_id_that_is_none_is_refused(refuse, choices, question):
    refuse(as_lines({**choices}) + json.dumps({"question_id": question, "icds": [1, 2]}), "--icds")


def test_an_icd_of_thousands_of_digits_is_refused(refuse, choices):
    wrong, question = changed(choices, 0, ["9" * 5000, "1"])
    refuse(as_object(wrong), question)


@pytest.mark.parametrize(
    "content", ["5", "[1, 2]", '"text"', "null", "true", '[{"icds": [1]}]', '{"icds": [1, 2]}', "1\n2\n"], ids=str
)
def test_json_of_another_shape_is_refused_with_the_shapes_that_are_read(refuse, content):
    refuse(content, "question_id", "--icds")


@pytest.mark.parametrize("broken", ["{", "not json", '{"question_id": 1, "icds": [1, 2]', "[" * 100_000])
def test_what_is_not_json_is_refused_with_its_line(refuse, choices, broken):
    lines = as_lines(choices).splitlines()
    refuse("\n".join([*lines[:2], "", broken, *lines[2:]]), "line 4 is not JSON", "--icds", name="picks.jsonl")


@pytest.mark.parametrize("content", ["", "\n \n", "{}", "[]"], ids=repr)
def test_a_file_without_choices_is_refused(refuse, content):
    refuse(content, "empty", "--icds")


def test_a_folder_a_missing_file_and_one_that_is_no_text_are_refused(refuse, tmp_path):
    (tmp_path / "folder").mkdir()
    refuse(tmp_path / "folder", "directory", "--icds")
    refuse(tmp_path / "none.json", "No such file", "--icds")
    (tmp_path / "binary.json").write_bytes(b"\x80\x04\x95\xff")
    refuse(tmp_path / "binary.json", "--icds")


def test_a_refusal_comes_before_features_are_made(lever, tmp_path, prompts):
    path = written(tmp_path, "{}")
    before = files_in(tmp_path)
    root = small_digits(tmp_path.parent / f"{tmp_path.name}-world", 70, 6)
    places = ("--set", f"data.okvqa_path={root}", "--set", f"data.coco_path={root}")
    refused(lever("infer", "--icds", path, "--shots", "2", "--baselines", "--quiet", *places), path, "empty")
    assert files_in(tmp_path) == before


def test_choices_together_with_a_checkpoint_are_a_usage_error(lever, tmp_path, choices):
    path = written(tmp_path, as_object(choices))
    before = files_in(tmp_path)
    done = lever("infer", "--icds", path, "--ckpt", "latest", "--shots", "2")
    assert done.status == 2
    assert re.search(r"--icds and --ckpt", done.err)
    assert len(done.err.strip().splitlines()) == 1
    assert files_in(tmp_path) == before


def test_the_reader_names_file_and_question_in_python_too(tmp_path, queries, digits, choices):
    wrong, question = changed(choices, 5, [1])
    with pytest.raises(LeverError, match=rf"picks\.json, question {question}: 1 ICDs for 2 shots"):
        read_icds(written(tmp_path, as_object(wrong)), queries, digits.train_examples, 2)
