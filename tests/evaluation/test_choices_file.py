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


def lines_in(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
        both = ((theirs, f"grpo_{shots}shot"), (ours, f"icds_{shots}shot"))
        one, other = ((folder / f"predictions_{job}.json").read_text() for folder, job in both)
        assert one == other
        one, other = (lines_in(folder / f"samples_{job}.jsonl") for folder, job in both)
        for row in one:  # a file does not say how sure its maker was
            assert len(row.pop("probabilities")) == shots
            assert len(row.pop("considered")) == 8
        assert one == other
    assert (ours / "icds.jsonl").read_text() == (theirs / "icds.jsonl").read_text()
    rows = [[{**row, "method": "x"} for row in done.json["results"]] for done in (policy, again)]
    assert rows[0] == rows[1]
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
    samples = lines_in(tmp_path / INFERENCE / "icds_mine/samples_icds_2shot.jsonl")
    assert [row["icds"] for row in samples] == [icds[:2] for icds in wanted]
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


def test_a_refusal_comes_before_features_are_made(lever, tmp_path, prompts):
    path = written(tmp_path, "{}")
    before = files_in(tmp_path)
    root = small_digits(tmp_path.parent / f"{tmp_path.name}-world", 70, 6)
    places = ("--set", f"data.okvqa_path={root}", "--set", f"data.coco_path={root}")
    for words, status in ((("--baselines", *places), 1), (("--ckpt", "latest"), 2)):
        done = lever("infer", "--icds", path, "--shots", "2", "--quiet", *words)
        assert (done.status, done.out, done.err.count("lever: ")) == (status, "", 1)
        assert files_in(tmp_path) == before
    assert prompts == []


# ---------------------------------------------------------------------- what is read


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("text", "mark"), [(False, ""), (True, "\ufeff")], ids=["numbers", "text after a mark"])
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
    question, (one, other, _) = list(choices.items())[1]
    for beyond in (987_654_321, one):  # of a longer list only what is shown is looked at
        assert read(as_object({**choices, question: [one, other, beyond]}))[1] == [10, 11]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "wrong",
    [None, [0], [], [0, 987_654_321], [0, "0"]],
    ids=["without", "too few", "none", "unknown", "twice"],
)
def test_a_choice_that_cannot_be_shown_is_refused_by_file_and_question(read, choices, digits, wrong):
    question, first = list(choices)[3], digits.train_examples[0].question_id
    made = {0: first, "0": str(first)}
    changed = {} if wrong is None else {question: [made.get(icd, icd) for icd in wrong]}
    text = as_lines({**{q: icds for q, icds in choices.items() if q != question}, **changed})
    with pytest.raises(LeverError, match=rf"picks\.json, question {question}: "):
        read(text)


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


@pytest.mark.parametrize("form", FORMS)
def test_a_question_that_appears_twice_is_named(read, choices, form):
    first = next(iter(choices))
    row = json.dumps({"question_id": str(first), "icds": choices[first]})
    text = {
        "object": f'{as_object(choices)[:-1]}, "{first}": {choices[first][::-1]}}}',
        "list": f"{as_list(choices)[:-1]}, {row}]",
        "lines": as_lines(choices) + row,
    }[form]
    with pytest.raises(LeverError, match=f"{first}.*twice"):
        read(text)


NO_LISTS = [None, 5, "1,2", {}, [1.5, 2], [True, 2], [[1, 2]], ["one", "two"], [-1, 2], ["²", "1"], ["9" * 5000]]


@pytest.mark.parametrize("icds", NO_LISTS, ids=lambda icds: str(icds)[:12])
def test_choices_that_are_no_list_of_ids_are_refused_by_question(read, choices, icds):
    question = list(choices)[4]
    for form in FORMS.values():
        with pytest.raises(LeverError, match=f"question .?{question}.*--icds"):
            read(form({**choices, question: icds}))


BROKEN = ["", "\n \n", "{}", "[]", "5", "[1, 2]", '"text"', "null", '[{"icds": [1]}]', '{"icds": [1, 2]}', "1\n2\n"]
BROKEN += [json.dumps({"question_id": q, "icds": [1, 2]}) for q in (None, 1.5, True, "one", "", -3, "9" * 5000)]


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: repr(content[:30]))
def test_json_of_another_shape_is_refused(read, content):
    with pytest.raises(LeverError, match="--icds"):
        read(content)


@pytest.mark.parametrize("broken", ["{", "not json", '{"question_id": 1, "icds": [1, 2]', "[" * 100_000], ids=len)
def test_what_is_not_json_is_refused_with_its_line(read, choices, broken):
    lines = as_lines(choices).splitlines()
    with pytest.raises(LeverError, match=r"line 4 .*--icds"):
        read("\n".join([*lines[:2], "", broken, *lines[2:]]))


def test_a_folder_a_missing_file_and_one_that_is_no_text_are_refused(tmp_path, queries, digits):
    (tmp_path / "binary.json").write_bytes(b"\x80\x04\x95\xff")
    for name in ("", "none.json", "binary.json"):
        with pytest.raises(LeverError, match="cannot read"):
            read_icds(tmp_path / name, queries, digits.train_examples, 2)
