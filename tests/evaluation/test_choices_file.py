"""`lever infer --icds`: choices from a file are read in any of three forms, checked, and judged like a policy's."""

import json
import shutil

import pytest
from helpers import INFERENCE, RUN, files_in, small_digits

from lever_lm.config.load import resolve
from lever_lm.data import load_dataset
from lever_lm.evaluation.choices_file import read_icds
from lever_lm.evaluation.evaluate import Evaluation
from lever_lm.lvlm import CachedLvlm
from lever_lm.selectors import BASELINES
from lever_lm.utils.errors import LeverError
from lever_lm.utils.paths import asset_path

LIMIT = 6


@pytest.fixture(scope="module")
def queries(digits):
    """The evaluation questions of `--limit 6`."""
    config = resolve({"dataset": "digits", "lvlm": "tiny_qwen2.5_vl"}, None, [], {"infer": {"num_queries": LIMIT}})[0]
    return Evaluation(config, digits, None).queries


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
def read(tmp_path, queries, digits):
    """Read a text as the choices for the questions."""
    return lambda text, shots=2: read_icds(written(tmp_path, text), queries, digits.train_examples, shots)


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that an LVLM which always says `two` was given."""
    seen = []

    def answer(self, prompts, what):
        seen.extend(prompts)
        return ["two"] * len(prompts)

    monkeypatch.setattr(CachedLvlm, "answer", answer)
    return seen


# ---------------------------------------------------------------------- the command


def test_our_own_choices_evaluated_again_give_the_policys_numbers(trained, lever):
    options = ("--shots", "1,2", "--limit", 8, "--json")
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
        for row in one:  # a file does not say how sure its maker was
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
    assert len(prompts) == LIMIT * (1 + 6 * 2)


def test_the_first_pick_stands_nearest_the_query_and_fewer_shots_show_the_first(
    lever, tmp_path, choices, queries, prompts
):
    path = written(tmp_path, as_lines(choices), "mine.jsonl")
    done = lever("infer", "--icds", path, "--shots", "1,2", "--limit", LIMIT, "--json")
    assert done.status == 0, done.err
    shown = [[icd.question_id for icd in prompt.icds] for prompt in prompts]
    wanted = [choices[query.question_id] for query in queries]
    assert shown == [icds[:1] for icds in wanted] + [icds[:2][::-1] for icds in wanted]
    assert [prompt.query for prompt in prompts] == [*queries, *queries]
    samples = (tmp_path / INFERENCE / "icds_mine/samples_icds_2shot.jsonl").read_text().splitlines()
    assert [json.loads(line)["icds"] for line in samples] == [icds[:2] for icds in wanted]
    rows = json.loads((tmp_path / INFERENCE / "icds_mine/predictions_icds_2shot.json").read_text())
    assert rows == [{"question_id": query.question_id, "answer": "two"} for query in queries]
    assert not list(tmp_path.rglob("features_*")), "without baselines no features are made"
    prompts.clear()
    lever("infer", "--icds", path, "--set", "prompt.order=first_pick_first", "--shots", "3", "--limit", LIMIT)
    assert [[icd.question_id for icd in prompt.icds] for prompt in prompts] == wanted


def test_results_of_other_choices_under_one_name_are_never_in_one_table(lever, tmp_path, choices, prompts):
    path = written(tmp_path, as_object(choices))
    assert lever("infer", "--icds", path, "--shots", "1", "--limit", LIMIT, "--json").status == 0
    same = lever("infer", "--icds", path, "--shots", "2", "--limit", LIMIT, "--json")
    assert [row["shots"] for row in same.json["results"]] == [1, 2]
    written(tmp_path, as_object({question: icds[::-1] for question, icds in choices.items()}))
    other = lever("infer", "--icds", path, "--shots", "3", "--limit", LIMIT, "--json")
    assert [row["shots"] for row in other.json["results"]] == [3], "1 and 2 were of the file as it was before"


@pytest.mark.parametrize("options", [(), ("--run-name", "mine")])
def test_another_lvlm_leaves_the_first_ones_results_alone(lever, tmp_path, choices, prompts, options):
    path, other = written(tmp_path, as_object(choices)), tmp_path / "other-vl"
    shutil.copytree(asset_path("asset:tiny-qwen2.5-vl"), other)
    words = ("infer", "--icds", path, "--shots", "1", "--limit", LIMIT, "--json", *options)
    first = tmp_path / lever(*words).json["folder"] / "metrics.json"
    there = first.read_bytes()
    assert lever(*words, "--set", f"lvlm.path={other}", "--set", "lvlm.num_beams=2").status == 0
    assert first.read_bytes() == there


def test_a_refusal_is_one_line_and_comes_before_features_are_made(lever, tmp_path, prompts):
    path = written(tmp_path, "{}")
    before = files_in(tmp_path)
    root = small_digits(tmp_path.parent / f"{tmp_path.name}-world", 70, 6)
    places = ("--set", f"data.okvqa_path={root}", "--set", f"data.coco_path={root}")
    done = lever("infer", "--icds", path, "--shots", "2", "--baselines", "--quiet", "--json", *places)
    assert (done.status, done.out, len(done.err.splitlines())) == (1, "", 1)
    assert f"{path} is empty" in done.err
    assert files_in(tmp_path) == before
    both = lever("infer", "--icds", path, "--ckpt", "latest", "--shots", "2")
    assert both.status == 2
    assert "--icds and --ckpt" in both.err
    assert files_in(tmp_path) == before
    assert prompts == []


# ---------------------------------------------------------------------- what is read


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", [False, True], ids=["numbers", "text"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with a byte order mark"])
def test_three_forms_with_ids_as_numbers_or_text_mean_the_same(read, choices, form, text, mark):
    meant = {str(q): list(map(str, icds)) for q, icds in choices.items()} if text else choices
    content = mark + FORMS[form](meant).replace("\n", "\r\n")
    assert read(content, 3) == [[10 * i, 10 * i + 1, 10 * i + 2] for i in range(LIMIT)]


def test_blank_lines_further_fields_further_questions_and_one_line_do_no_harm(read, tmp_path, queries, digits, choices):
    lines = as_lines(choices).splitlines()
    more = {"question_id": 999_999_999, "icds": [1], "question": "one\u2028two\u0085?", "score": 0.5}
    assert read("\n\n" + "\r\n\r\n".join([json.dumps(more, ensure_ascii=False), *lines]), 3)[1] == [10, 11, 12]
    alone = written(tmp_path, lines[0])
    assert read_icds(alone, queries[:1], digits.train_examples, 3) == [[0, 1, 2]]


def test_of_a_longer_list_only_what_is_shown_is_looked_at(read, choices):
    question = list(choices)[1]
    one, other, _ = choices[question]
    assert read(as_object({**choices, question: [one, other, 987_654_321]}))[1] == [10, 11]
    assert read(as_object({**choices, question: [one, other, one]}))[1] == [10, 11]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("icds", "words"),
    [
        (lambda ids: None, "no choice for 1 of 6"),
        (lambda ids: ids[:1], "1 ICDs for 2 shots.*--shots"),
        (lambda ids: [], "0 ICDs"),
        (lambda ids: [ids[0], 987_654_321], "ICD 987654321 is not a question of the training split"),
        (lambda ids: [ids[0], str(ids[0])], "appears twice"),
    ],
    ids=["without", "too few", "none", "unknown", "twice"],
)
def test_a_choice_that_cannot_be_shown_is_refused_by_file_and_question(read, choices, icds, words):
    question = list(choices)[3]
    wrong = {**choices, question: icds(choices[question])}
    text = as_lines({q: ids for q, ids in wrong.items() if ids is not None})
    with pytest.raises(LeverError, match=rf"picks\.json.*{words}") as refused:
        read(text)
    assert str(question) in str(refused.value)


@pytest.mark.parametrize("image", [None, 555], ids=["its id", "another id"])
def test_an_icd_that_shows_the_querys_own_image_is_refused(tmp_path, image):
    """The digits share no image between their splits: a copy in which one does, under its id or under another."""
    root = small_digits(tmp_path / "world")
    for kind, key in (("OpenEnded_mscoco", "questions"), ("mscoco", "annotations")):
        train, val = (root / f"{kind}_{split}2014_{key}.json" for split in ("train", "val"))
        content = json.loads(train.read_text())
        leak = json.loads(val.read_text())[key][0]
        again = {} if key == "annotations" else {"question": "What else?"}
        content[key].append({**leak, **again, "question_id": 777, "image_id": image or leak["image_id"]})
        train.write_text(json.dumps(content))
        question, number = leak["question_id"], leak["image_id"]
    (shown,) = root.glob(f"val2014/*{number:012d}.jpg")
    (root / f"train2014/COCO_train2014_{image or number:012d}.jpg").write_bytes(shown.read_bytes())
    sets = [f"data.okvqa_path={root}", f"data.coco_path={root}"]
    data = load_dataset(resolve({"dataset": "digits"}, None, sets, {})[0].data)
    train_ids = [example.question_id for example in data.train_examples]
    picks = {example.question_id: train_ids[:2] for example in data.val_examples}
    path = written(tmp_path, as_object({**picks, question: [train_ids[0], 777]}))
    with pytest.raises(LeverError, match=rf"picks\.json, question {question}: ICD 777 .*its image"):
        read_icds(path, data.val_examples, data.train_examples, 2)
    read_icds(path, data.val_examples, data.train_examples, 1)  # the leak is not shown


@pytest.mark.parametrize("again", [str, int], ids=["text", "number"])
@pytest.mark.parametrize("form", FORMS)
def test_a_question_that_appears_twice_is_named(read, choices, form, again):
    first = next(iter(choices))
    row = json.dumps({"question_id": again(first), "icds": choices[first]})
    text = {
        "object": f'{as_object(choices)[:-1]}, "{first}": {choices[first][::-1]}}}',
        "list": f"{as_list(choices)[:-1]}, {row}]",
        "lines": as_lines(choices) + row,
    }[form]
    with pytest.raises(LeverError, match=f"{first}.*twice"):
        read(text)


@pytest.mark.parametrize(
    "icds",
    [None, 5, "1,2", {}, [1.5, 2], [True, 2], [None], [[1, 2]], ["one", "two"], [-1, 2], ["²", "1"], ["9" * 5000]],
    ids=lambda icds: str(icds)[:12],
)
def test_choices_that_are_no_list_of_ids_are_refused_by_question(read, choices, icds):
    question = list(choices)[4]
    for form in FORMS.values():
        with pytest.raises(LeverError, match=f"question .?{question}.*expected.*--icds"):
            read(form({**choices, question: icds}))


@pytest.mark.parametrize("question", [None, 1.5, True, "one", "", -3, "9" * 5000], ids=lambda q: str(q)[:8])
def test_a_question_id_that_is_none_is_refused(read, choices, question):
    with pytest.raises(LeverError, match="--icds"):
        read(as_lines(choices) + json.dumps({"question_id": question, "icds": [1, 2]}))


SHAPES = ["5", "[1, 2]", '"text"', "null", "true", '[{"icds": [1]}]', '{"icds": [1, 2]}', "1\n2\n"]


@pytest.mark.parametrize(
    ("content", "said"),
    [*((shape, "question_id") for shape in SHAPES), *((text, "empty") for text in ("", "\n \n", "{}", "[]"))],
    ids=repr,
)
def test_json_of_another_shape_is_refused_with_the_shapes_that_are_read(read, content, said):
    with pytest.raises(LeverError, match=rf"{said}.*--icds"):
        read(content)


@pytest.mark.parametrize("broken", ["{", "not json", '{"question_id": 1, "icds": [1, 2]', "[" * 100_000], ids=len)
def test_what_is_not_json_is_refused_with_its_line(read, choices, broken):
    lines = as_lines(choices).splitlines()
    with pytest.raises(LeverError, match=r"line 4 is not JSON.*--icds"):
        read("\n".join([*lines[:2], "", broken, *lines[2:]]))


def test_a_folder_a_missing_file_and_one_that_is_no_text_are_refused(tmp_path, queries, digits):
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary.json").write_bytes(b"\x80\x04\x95\xff")
    for name, words in (("folder", "directory"), ("none.json", "No such file"), ("binary.json", "cannot read")):
        with pytest.raises(LeverError, match=f"{words}.*--icds"):
            read_icds(tmp_path / name, queries, digits.train_examples, 2)
