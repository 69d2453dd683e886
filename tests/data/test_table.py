"""Tables of the user's own: what each kind of file, column, cell and split becomes, and what is refused, with where."""

import csv
import json
import re
import tracemalloc
from pathlib import Path

import pytest
from loopback import Loopback, Reply
from official import photo, write_parquet

from lever_lm.config.load import resolve
from lever_lm.config.schema import DataConfig
from lever_lm.data import in_parquet, load_dataset, load_split, open_image, source_of
from lever_lm.data.checks import check_examples, check_files
from lever_lm.data.rows import BadExamples, Unusable
from lever_lm.data.table import view
from lever_lm.utils.errors import LeverError, UsageError


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with six photographs, 0.jpg to 5.jpg."""
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(photo(number))
    return tmp_path


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    import datasets
    from huggingface_hub import constants

    home = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))


def rows_of(count: int = 12, **more) -> list[dict]:
    """Rows about the six photographs in turn, the answer `blue` or `red`."""
    return [
        {"image": f"{i % 6}.jpg", "question": f"Which colour has {i}?", "answer": ("blue", "red")[i % 2], **more}
        for i in range(count)
    ]


def write(path: Path, rows: list[dict]) -> str:
    """Write rows as the kind of file that the name says. Returns the path as a user writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        write_parquet(path, rows)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def load(file: str, **how):
    return load_dataset(DataConfig("mine", file=file, **how))


def only(path: Path, row: dict, **how):
    """The example of one row, beside another about another image that makes a split."""
    other = {**row, "image": "5.jpg"} if "image" in row else {**row, "question": "Another?"}
    data = load(write(path, [row, other]), **how)
    return next(e for e in (*data.train_examples, *data.val_examples) if e.question_id == 0)


def both(data) -> list:
    return sorted((*data.train_examples, *data.val_examples), key=lambda e: str(e.question_id))


# ---------------------------------------------------------------------- kinds of files


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.tsv", "t.parquet", "T.CSV"])
def test_every_kind_of_file_gives_the_same_examples(photos, name):
    file = photos / name
    write(file, rows_of()) if name != "T.CSV" else Path(write(photos / "t.csv", rows_of())).rename(file)
    examples = sorted(both(load(str(file))), key=lambda e: e.question_id)
    assert [e.question_id for e in examples] == list(range(12))
    assert [e.question for e in examples] == [f"Which colour has {i}?" for i in range(12)]
    assert [e.answers for e in examples] == [("blue",), ("red",)] * 6
    assert all(e.raw_answers == e.answers for e in examples)
    assert [e.image for e in examples] == [str(photos / f"{i % 6}.jpg") for i in range(12)]
    assert [e.image_id for e in examples[:6]] == [e.image_id for e in examples[6:]]
    assert len({e.image_id for e in examples}) == 6


def test_kinds_of_files_have_one_fingerprint_and_no_place_in_it(photos, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for number in range(6):
        (elsewhere / f"{number}.jpg").write_bytes(photo(number))
    stamps = {
        load(write(folder / name, rows_of())).stamps for folder in (photos, elsewhere) for name in ("a.csv", "b.jsonl")
    }
    assert len(stamps) == 1


def test_what_is_asked_otherwise_has_another_fingerprint(photos):
    rows = [{name: cell for name, cell in row.items() if name != "question"} for row in rows_of()]
    file = write(photos / "t.csv", rows)
    one, other = (load(file, question=question) for question in ("What?", "Well?"))
    assert all(a != b for a, b in zip(one.stamps, other.stamps, strict=True))


@pytest.mark.parametrize(
    ("one", "other"), [({}, {"task": "short_answer"}), ({"task": "number"}, {"task": "number", "scale": 4.0})]
)
def test_what_is_scored_otherwise_is_other_data_and_has_the_same_features(photos, one, other):
    file = write(photos / "t.csv", rows_of())
    before, after = load(file, **one), load(file, **other)
    assert before.stamps == after.stamps
    assert before.fingerprint != after.fingerprint


def test_images_inside_parquet_are_not_decoded_and_are_read_as_they_were(photos):
    rows = [{**row, "image": {"bytes": photo(i % 6), "path": None}} for i, row in enumerate(rows_of())]
    rows[3]["image"] = {"bytes": b"no image at all", "path": None}
    examples = {e.question_id: e for e in both(load(write(photos / "t.parquet", rows)))}
    assert examples[4].image.read() == photo(4)
    assert open_image(examples[4].image).size == (64, 48)
    assert examples[4].image == examples[10].image


def test_a_column_of_images_of_another_name_is_read_from_parquet(photos):
    rows = [{"bild": {"bytes": photo(i), "path": None}, "question": "Who?", "answer": "I"} for i in range(4)]
    data = load(write(photos / "t.parquet", rows), columns={"image": "bild"})
    assert {e.image.read() for e in both(data)} == {photo(i) for i in range(4)}


def test_texts_of_csv_stay_as_they_are(photos):
    texts = ["007", "NA", "1.0", " true", "null", "nan", "1e5", "a|b", "[not, json"]
    rows = [{"image": f"{i % 6}.jpg", "question": "What stands there?", "answer": text} for i, text in enumerate(texts)]
    found = {e.question_id: e.answers for e in both(load(write(photos / "t.csv", rows)))}
    assert [found[i] for i in range(len(texts))] == [(text,) for text in texts]


def test_numbers_of_json_become_their_texts(photos):
    values = [3, 3.0, 2.5, True, -4, "3.0", 10**18]
    rows = [{"image": f"{i % 6}.jpg", "question": "How many?", "answer": value} for i, value in enumerate(values)]
    found = {e.question_id: e.answers[0] for e in both(load(write(photos / "t.jsonl", rows)))}
    assert [found[i] for i in range(len(values))] == ["3", "3", "2.5", "True", "-4", "3.0", str(10**18)]


def test_csv_of_a_spreadsheet_has_a_byte_order_mark_quotes_and_line_breaks(photos):
    (photos / "t.csv").write_bytes(
        '\ufeffImage,Question,Answer\r\n0.jpg,"Who says ""no"", now?","a,\nb"\r\n1.jpg,Who?,c\r\n'.encode()
    )
    first = next(e for e in both(load(str(photos / "t.csv"))) if e.question_id == 0)
    assert (first.question, first.answers) == ('Who says "no", now?', ("a,\nb",))


def test_a_folder_of_files_is_one_table_in_the_order_of_their_names(photos):
    write(photos / "parts/b.csv", [{**row, "image": f"../{row['image']}"} for row in rows_of(4)])
    write(photos / "parts/a.csv", [{**row, "image": f"../{row['image']}", "question": "A?"} for row in rows_of(2)])
    with pytest.raises(LeverError, match=r"parts/a\.csv, line 2: its image .* is no file"):
        load(str(photos / "parts"))
    data = load(str(photos / "parts"), coco_path=str(photos / "parts"), columns={"image": ""})
    assert [e.question for e in both(data)][:2] == ["A?", "A?"]


# ---------------------------------------------------------------------- columns


def test_columns_go_by_usual_names_whatever_their_capitals(photos):
    row = {"Img": "0.jpg", "QUERY": "Who?", "Label": "I", "QID": "q1", "Image_ID": "i7"}
    data = load(write(photos / "t.csv", [row, {**row, "Img": "1.jpg", "QID": "q2", "Image_ID": "8"}]))
    found = {e.question_id: e for e in both(data)}
    assert found["q1"].image_id == "i7"
    assert (found["q2"].image_id, found["q2"].question, found["q2"].answers) == (8, "Who?", ("I",))


def test_columns_of_other_names_are_mapped_by_set(photos):
    rows = [{"foto": f"{i}.jpg", "Frage": f"Wer {i}?", "Antwort": "ich", "1": f"n{i}", "no": "x"} for i in range(4)]
    file = write(photos / "t.csv", rows)
    sets = [f"data.file={file}", "data.columns.question=Frage", "data.columns={image: foto, answer: Antwort, id: 1}"]
    config = resolve({}, None, sets, {})[0].data
    assert config.columns == {"question": "Frage", "image": "foto", "answer": "Antwort", "id": 1}
    assert {e.question_id for e in both(load_dataset(config))} == {f"n{i}" for i in range(4)}
    config = resolve({}, None, [*sets, "data.columns.answer=no"], {})[0].data
    assert {e.answers for e in both(load_dataset(config))} == {("x",)}, "which YAML reads as a flag"


def test_what_two_columns_could_be_is_taken_from_the_first_and_said(photos):
    file = write(photos / "t.csv", [{"path": "nowhere", **row} for row in rows_of()])
    assert both(load(file))[0].image == str(photos / "0.jpg")
    assert "path could be the image, too: image is taken" in view(DataConfig(file=file)).odd


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ({"columns": {"frage": "question"}}, UsageError, r"data\.columns\.frage is no role .* image, question"),
        ({"columns": {"question": "Qestion"}}, LeverError, r"no column 'Qestion' .*'question'.*found image, question"),
        ({"columns": {"question": ""}}, LeverError, r"no column of the question .*data\.columns\.question=NAME"),
        ({"columns": {"answer": ""}}, LeverError, r"no column of the answer .*data\.columns\.answer=NAME"),
        ({"question": "Is {colour} it?"}, LeverError, r"\{colour\} .*found image, question, answer"),
        ({"options": ("a", " A")}, UsageError, r"data\.options holds an option twice"),
    ],
)
def test_a_wrong_column_is_refused_before_any_work_with_those_that_are_there(photos, how, kind, said):
    with pytest.raises(kind, match=said):
        load(write(photos / "t.csv", rows_of()), **how)


def test_text_is_never_guessed_to_be_the_question(photos):
    with pytest.raises(LeverError, match="no column of the question"):
        load(write(photos / "t.csv", [{"image": "0.jpg", "text": "words", "label": "1"}]))


# ---------------------------------------------------------------------- rows


def test_one_question_for_all_takes_what_a_row_has(photos):
    row = {"image": "0.jpg", "text": "so {true}", "answer": "yes"}
    how = {"question": 'Is "{text}" true?'}
    assert only(photos / "t.csv", row, **how).question == 'Is "so {true}" true?'
    assert only(photos / "t.csv", {**row, "question": "Is it?"}, **how).question == "Is it?"
    with pytest.raises(LeverError, match=r"t\.csv, line 2: it has no text, which data\.question asks about"):
        only(photos / "t.csv", {**row, "text": ""}, **how)


def test_a_row_may_have_no_image(photos):
    rows = rows_of(6)
    rows[2]["image"], rows[3]["image"] = None, ""
    found = {e.question_id: e for e in both(load(write(photos / "t.jsonl", rows)))}
    assert [(found[i].image, found[i].image_id, found[i].content) for i in (2, 3)] == [(None, None, "")] * 2
    assert found[1].image == str(photos / "1.jpg")


def test_a_table_without_images_is_split_by_question(photos):
    rows = [{"question": f"q{i // 2}", "answer": str(i)} for i in range(20)]
    data = load(write(photos / "t.jsonl", rows))
    assert len(data.val_examples) == 4
    assert not {e.question for e in data.train_examples} & {e.question for e in data.val_examples}


@pytest.mark.parametrize(
    ("cell", "answers", "raw"),
    [
        (["a", "b", 3], ("a", "b", "3"), None),
        ([{"answer": "a"}, {"answer": "b"}], ("a", "b"), None),
        ([{"answer": "surf", "raw_answer": "surfing"}], ("surf",), ("surfing",)),
        ([{"raw": "A dog.", "tokens": ["a", "dog"]}], ("A dog.",), None),
        ({"raw": ["A dog.", "Dogs."]}, ("A dog.", "Dogs."), None),
        ("['a', 'b']", ("a", "b"), None),
        ('["a", "b|c"]', ("a", "b|c"), None),
        ("a|b", ("a|b",), None),
    ],
)
def test_answers_are_lists_of_texts_or_objects(photos, cell, answers, raw):
    found = only(photos / "t.jsonl", {"image": "0.jpg", "question": "What?", "answers": cell})
    assert (found.answers, found.raw_answers) == (answers, raw or answers)


def test_bars_part_the_answers_of_a_csv_cell_and_no_single_answer(photos):
    row = {"image": "0.jpg", "question": "What?", "answers": "a| b |c", "answer": "x|y"}
    assert only(photos / "t.csv", row).answers == ("a", "b", "c")
    assert only(photos / "t.csv", {**row, "answers": ""}).answers == ("x|y",)


BAD_CELLS = {
    "no answer": ({"answer": None}, "it has no answer"),
    "an empty list": ({"answer": []}, "its answers must be a list of texts"),
    "a list of nothing": ({"answer": [None]}, "its answers must be a list of texts"),
    "numpy's list": ({"answers": "['a' 'b']"}, "begins and ends as a list and is none"),
    "an object": ({"question": {"a": 1}}, "a text or a number is needed"),
    "no question": ({"question": " "}, "it has no question"),
    "the LVLM's own token": ({"answer": "<|im_end|>"}, "a token of the LVLM's own"),
    "no file": ({"image": "9.jpg"}, r"its image '9\.jpg' is no file .*data\.coco_path"),
    "a path to elsewhere": ({"image": "/etc/hostname"}, "is no file in the folder of the data"),
    "a way out": ({"image": "../../../etc/hostname"}, "is no file in the folder of the data"),
    "an address": ({"image": "http://127.0.0.1:9/a.jpg"}, "with --allow-remote alone"),
    "a number for an image": ({"image": 7}, "its image must be a path, found 7"),
    "an id of nothing": ({"id": ""}, "its id must be a text of one line"),
    "an id of two lines": ({"id": "a\nb"}, "its id must be a text of one line"),
}


@pytest.mark.parametrize(("change", "said"), BAD_CELLS.values(), ids=BAD_CELLS)
def test_a_bad_row_stops_with_file_and_line_or_is_left_out(photos, change, said):
    rows = rows_of(8) if "id" not in change else [{**row, "id": f"n{i}"} for i, row in enumerate(rows_of(8))]
    rows[5] |= change
    file = write(photos / "t.jsonl", rows)
    with pytest.raises(LeverError, match=rf"t\.jsonl, line 6: .*{said}.*--skip-bad-examples"):
        load(file)
    data = load(file, skip_bad_examples=True)
    assert len(both(data)) == 7
    assert len(data.skipped) == 1


def test_a_line_that_is_no_object_stops_with_its_number(photos):
    good = [json.dumps(row) for row in rows_of(4)]
    for bad, said in (("{", "JSON: "), ("[1]", "JSON object, found"), ('{"a": 1, "a": 2}', "'a' appears twice")):
        (photos / "t.jsonl").write_text("\n".join([*good[:2], "", bad, *good[2:]]))
        with pytest.raises(LeverError, match=rf"t\.jsonl, line 4: it is no.*{said}"):
            load(str(photos / "t.jsonl"))
    (photos / "t.jsonl").write_bytes("\n".join(good).encode() + b'\n{"question": "\xff"}\n')
    with pytest.raises(LeverError, match=r"line 5: it holds what is no UTF-8"):
        load(str(photos / "t.jsonl"))
    (photos / "t.jsonl").write_text("\n".join([*good, json.dumps({"question": "x" * (3 << 20)}), good[0]]))
    data = load(str(photos / "t.jsonl"), skip_bad_examples=True)
    assert (len(both(data)), len(data.skipped)) == (5, 1)
    assert "line 5: it is longer than 1 MiB" in data.skipped[0]


def test_an_image_at_an_address_is_fetched_where_that_is_allowed_and_in_no_view(photos, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Loopback(lambda request: Reply(body=photo(3))).running() as server:
        rows = [{**row, "image": f"{server.url}/{row['image']}"} if i == 2 else row for i, row in enumerate(rows_of(6))]
        file = write(photos / "t.csv", rows)
        assert view(DataConfig(file=file, allow_remote=True)).odd == ()
        assert server.requests == []
        examples = {e.question_id: e for e in both(load(file, allow_remote=True))}
        assert len(server.requests) == 1
    assert Path(examples[2].image).read_bytes() == photo(3)
    assert examples[2].image_id == examples[3].image_id


# ---------------------------------------------------------------------- ids


def test_ids_are_numbers_or_texts_and_each_is_of_one_row(photos):
    for given, held in (("12", 12), ("007", 7), ("a-1", "a-1"), (" x ", "x"), (5, 5), (5.0, 5), (2.5, "2.5")):
        rows = [{**row, "id": name} for row, name in zip(rows_of(2), (given, "other"), strict=True)]
        assert {e.question_id for e in both(load(write(photos / "t.jsonl", rows)))} == {held, "other"}
    rows = [{**row, "id": name} for row, name in zip(rows_of(4), (1, "b", "c", "1"), strict=True)]
    with pytest.raises(LeverError, match=r"t\.jsonl, line 4: an earlier row has its id, 1;"):
        load(write(photos / "t.jsonl", rows))


def test_rows_of_two_files_without_ids_are_counted_through(photos):
    train, val = write(photos / "train.csv", rows_of(3)), write(photos / "val.csv", rows_of(5)[3:])
    data = load(train, val_file=val)
    assert [e.question_id for e in data.train_examples] == [0, 1, 2]
    assert [e.question_id for e in data.val_examples] == [3, 4]


def test_an_id_in_both_files_is_refused_with_the_mend_that_works(photos):
    train = write(photos / "train.csv", [{**row, "id": i} for i, row in enumerate(rows_of(3))])
    val = write(photos / "val.csv", [{**row, "id": i} for i, row in enumerate(rows_of(5)[3:], 2)])
    with pytest.raises(
        LeverError, match=r"val\.csv, line 2: its id 2 is that of a row in .*train\.csv.*columns\.id=''"
    ):
        load(train, val_file=val)
    config = resolve({}, None, [f"data.file={train}", f"data.val_file={val}", "data.columns.id=''"], {})[0].data
    assert [e.question_id for e in load_dataset(config).val_examples] == [3, 4]


# ---------------------------------------------------------------------- choices


def choice(photos, row: dict, name: str = "t.jsonl", **how):
    return only(photos / name, {"image": "0.jpg", "question": "Which?", **row}, task="choice", **how)


@pytest.mark.parametrize(
    ("name", "row", "right"),
    [
        ("t.jsonl", {"options": ["red", "blue"], "answer": " blue "}, "blue"),
        ("t.jsonl", {"choices": ["Red", "Blue"], "answer": "blue"}, "Blue"),
        ("t.jsonl", {"options": ["it", "It"], "answer": "It"}, "It"),
        ("t.jsonl", {"options": ["red", "blue"], "answer_index": 1}, "blue"),
        ("t.jsonl", {"options": ["red", "blue"], "correct_choice_idx": 0.0}, "red"),
        ("t.jsonl", {"options": ["red", "blue"], "answer": "B"}, "blue"),
        ("t.jsonl", {"options": ["B", "A"], "answer": "B"}, "B"),
        ("t.jsonl", {"options": [3, 4, 5], "answer": 4}, "4"),
        ("t.jsonl", {"options": "['red', 'blue']", "answers": ["red"]}, "red"),
        ("t.csv", {"options": "red| blue", "answer": "blue"}, "blue"),
        ("t.csv", {"options": '["red", "a|b"]', "answer": "a|b"}, "a|b"),
        ("t.csv", {"options": "red|blue", "answer_idx": "1"}, "blue"),
    ],
)
def test_the_answer_of_a_choice_is_the_text_of_its_option(photos, name, row, right):
    found = choice(photos, row, name)
    assert (found.answers, found.raw_answers) == ((right,), (right,))
    assert right in found.options


def test_options_of_all_rows_take_a_label_of_json_for_an_index(photos):
    options = ("no", "yes")
    assert choice(photos, {"label": 1}, options=options).answers == ("yes",)
    assert choice(photos, {"label": False}, options=options).answers == ("no",)
    assert choice(photos, {"label": "no"}, "t.csv", options=options).answers == ("no",)
    found = choice(photos, {"label": "1"}, "t.csv", options=options, columns={"answer_index": "label"})
    assert (found.answers, found.options) == (("yes",), options)
    with pytest.raises(LeverError, match=r"its answer '1' is none of its options .*data\.columns\.answer_index=label"):
        choice(photos, {"label": "1"}, "t.csv", options=options)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"options": ["a1", "b1"], "answer": "c1"}, "its answer 'c1' is none of its options 'a1, b1'"),
        ({"options": ["it", "It"], "answer": "IT"}, "is none of its options"),
        ({"options": ["a1", "b1"], "answer": "C"}, "is none of its options"),
        ({"options": ["a1", "b1"], "answer": 1}, r"is none of its options .*data\.columns\.answer_index=answer"),
        ({"options": ["a1", "b1"], "answer_index": 2}, "must be a whole number of 0 to 1, found 2"),
        ({"options": ["a1", "b1"], "answer_index": -1}, "must be a whole number of 0 to 1"),
        ({"options": ["a1", "b1"], "answer": "a1", "answer_index": 1}, "name two options, 'a1' and 'b1'"),
        ({"options": ["a1", " a1"], "answer": "a1"}, "two of its options are the same"),
        ({"options": ["a1", ""], "answer": "a1"}, "one of its options is blank"),
        ({"options": None, "answer": "a1"}, r"it has no options .*data\.options"),
        ({"options": ["a1", "b1"], "answers": ["a1", "b1"]}, "a choice has one answer"),
        ({"options": ["a1", "<|im_end|>"], "answer": "a1"}, "a token of the LVLM's own"),
    ],
)
def test_a_choice_that_is_none_is_refused(photos, row, said):
    with pytest.raises(LeverError, match=rf"t\.jsonl, line 1: .*{said}"):
        choice(photos, row)


def test_another_task_takes_the_text_at_an_index_and_needs_no_options(photos):
    row = {"image": "0.jpg", "question": "Which?", "choices": ["red", "blue"], "answer_index": 1}
    found = only(photos / "t.jsonl", row, task="short_answer")
    assert (found.answers, found.options) == (("blue",), ())
    row = {"image": "0.jpg", "question": "Which?", "choices": None, "answer": "red"}
    assert only(photos / "t.jsonl", row, task="short_answer").answers == ("red",)


def test_a_pose_is_applied_and_what_it_refuses_has_its_line(photos):
    from dataclasses import replace

    def pose(example):
        if example.question.endswith("5?"):
            raise Unusable("five is refused")
        return replace(example, question=example.question.upper())

    config = DataConfig("mine", file=write(photos / "t.csv", rows_of(8)))
    with pytest.raises(LeverError, match=r"t\.csv, line 7: five is refused"):
        load_dataset(config, pose)
    bad = BadExamples(skip=True)
    found = [e for split in ("train", "val") for e in load_split(config, split, bad, pose)[0]]
    assert {e.question for e in found} == {f"WHICH COLOUR HAS {i}?" for i in (0, 1, 2, 3, 4, 6, 7)}
    assert len(bad.problems) == 1


# ---------------------------------------------------------------------- splits


def sides(data) -> tuple[set, set]:
    return {e.image for e in data.train_examples}, {e.image for e in data.val_examples}


def test_a_table_is_split_by_image_by_a_seed_and_not_by_the_order_of_its_rows(photos):
    for number in range(6, 20):
        (photos / f"{number}.jpg").write_bytes(photo(number))
    (photos / "copy.jpg").write_bytes(photo(7))
    rows = [{"image": f"{i % 20}.jpg", "question": f"q{i}", "answer": "a"} for i in range(60)]
    rows += [{"image": "copy.jpg", "question": "q", "answer": "a"}]
    train, val = sides(load(write(photos / "a.csv", rows)))
    assert not train & val
    assert len((train | val) - {str(photos / "copy.jpg")}) == 20
    assert len(val - {str(photos / "copy.jpg")}) == 4, "a fifth of 20 images of distinct content"
    assert (str(photos / "7.jpg") in val) == (str(photos / "copy.jpg") in val), "equal content is one image"
    assert sides(load(write(photos / "b.csv", rows[::-1]))) == (train, val)
    assert sides(load(write(photos / "a.csv", rows), split_seed=1)) != (train, val)
    assert len(sides(load(str(photos / "a.csv"), val_share=0.5))[1] - {str(photos / "copy.jpg")}) == 10


def test_a_share_leaves_an_image_on_each_side(photos):
    file = write(photos / "t.csv", rows_of(2))
    for share in (0.01, 0.99):
        assert [len(side) for side in sides(load(file, val_share=share))] == [1, 1]
    with pytest.raises(LeverError, match=r"is about 1 image .*--data FILE --val FILE"):
        load(write(photos / "t.csv", [{**row, "image": "0.jpg"} for row in rows_of(4)]))


@pytest.mark.parametrize("word", ["val", "validation", "Valid", "dev", "test"])
def test_a_column_says_the_split(photos, word):
    rows = [{**row, "split": ("train", word, "extra")[i % 3]} for i, row in enumerate(rows_of())]
    data = load(write(photos / "t.csv", rows))
    assert [e.question_id for e in data.train_examples] == [0, 3, 6, 9]
    assert [e.question_id for e in data.val_examples] == [1, 4, 7, 10]


def test_validation_is_preferred_over_test_and_rows_of_test_need_no_answer(photos):
    rows = [{**row, "split": ("train", "val", "test")[i % 3]} for i, row in enumerate(rows_of())]
    rows = [{**row, "answer": None} if row["split"] == "test" else row for row in rows]
    config = DataConfig("mine", file=write(photos / "t.jsonl", rows))
    data = load_dataset(config)
    assert [e.question_id for e in data.val_examples] == [1, 4, 7, 10]
    assert "'train' is train, 'val' is val; rows of other words are left out" in view(config).split
    assert "4 training, 4 evaluation, 4 left out" in view(config).split


def test_a_column_that_says_one_split_says_none(photos):
    rows = [{**row, "set": ("train", "A")[i % 2]} for i, row in enumerate(rows_of())]
    assert len(both(load(write(photos / "t.csv", rows)))) == 12


def test_files_of_a_folder_are_named_after_splits(photos):
    for name, part in (("train", slice(0, 8)), ("val", slice(8, 10)), ("test", slice(10, 12)), ("other", slice(0, 2))):
        write(photos / f"{name}.jsonl", rows_of()[part])
    data = load(str(photos))
    assert [len(data.train_examples), len(data.val_examples)] == [8, 2]
    assert [e.question for e in data.val_examples] == ["Which colour has 8?", "Which colour has 9?"]
    assert [Path(file).name for file in view(DataConfig(file=str(photos))).files] == ["train.jsonl", "val.jsonl"]


def test_a_file_of_one_name_is_split_whatever_it_is_called(photos):
    assert len(both(load(write(photos / "train.csv", rows_of())))) == 12
    (photos / "alone").mkdir()
    rows = [{**row, "image": None} for row in rows_of()]
    assert len(both(load(str(Path(write(photos / "alone/test.jsonl", rows)).parent)))) == 12


def test_an_evaluation_split_alone_names_the_option_that_it_lacks(photos):
    config = DataConfig("mine", val_file=write(photos / "v.csv", rows_of()))
    with pytest.raises(LeverError, match=r"--data FILE, data\.file"):
        load_dataset(config)
    assert [check.status for check in check_files(config)] == ["missing", "ok"]


def test_a_question_in_both_files_is_refused_with_both_files(photos):
    train, val = write(photos / "train.csv", rows_of(6)), write(photos / "val.csv", rows_of(9)[5:])
    with pytest.raises(
        LeverError, match=r"train\.csv: 1 of 6 training questions .*val\.csv\): question 5 is question 6"
    ):
        load(train, val_file=val)
    data = load(train, val_file=val, skip_bad_examples=True)
    assert [len(data.train_examples), len(data.val_examples)] == [5, 4]
    told = list(check_examples(DataConfig("mine", file=train, val_file=val), {}))
    assert [(check.what, check.status) for check in told][-1] == ("splits", "missing")


def test_images_may_be_named_by_id_in_a_table_of_their_own(photos):
    for split, numbers in (("train", (0, 1, 2)), ("val", (3, 4))):
        images = [{"id": f"n{i}", "image": {"bytes": photo(i), "path": None}} for i in numbers]
        write(photos / f"{split}_images/{split}.parquet", images)
        write(photos / f"{split}.csv", [{"imageId": f"n{i}", "question": f"q{i}", "answer": "a"} for i in numbers])
    how = {"val_file": str(photos / "val.csv"), "image_table": str(photos / "{split}_images")}
    data = load(str(photos / "train.csv"), **how, columns={"image_id": "imageId"})
    assert [(e.image_id, e.image.read()) for e in data.train_examples] == [(f"n{i}", photo(i)) for i in (0, 1, 2)]
    assert [(e.image_id, e.image.read()) for e in data.val_examples] == [(f"n{i}", photo(i)) for i in (3, 4)]
    write(photos / "train.csv", [{"imageId": "n3", "question": "q", "answer": "a"}])
    with pytest.raises(LeverError, match=r"train\.csv, line 2: its image 'n3' is not in .*train_images"):
        load(str(photos / "train.csv"), **how, columns={"image_id": "imageId"})
    with pytest.raises(LeverError, match=r"no column of image ids; name it: --set data\.columns\.image_id=NAME"):
        load(str(photos / "train.csv"), **how)


# ---------------------------------------------------------------------- files that are none

BAD_FILES = {
    "not there": ("t.csv", None, r"t\.csv is not there; name a \.jsonl"),
    "of another kind": ("t.xlsx", b"PK", r"t\.xlsx ends in '\.xlsx'; name a \.jsonl"),
    "empty csv": ("t.csv", b"", "t.csv is empty; its first line must name the columns"),
    "empty jsonl": ("t.jsonl", b"\n", "holds no row: it is empty"),
    "no jsonl": ("t.jsonl", b"a,b\n", "holds no row: it is no JSON"),
    "no json": ("t.json", b'{"a": 1}\n{"a": 2}', "JSON lines end in .jsonl"),
    "an object": ("t.json", b'{"a": 1}', "must hold a list of rows"),
    "semicolons": ("t.csv", b"image;question;answer\n", "separated by ';'"),
    "a column twice": ("t.csv", b"answer,answer\n", "names a column twice: 'answer'"),
    "no header": ("t.csv", b"0.jpg,Who?,I\n", r"no column of the question .*found 0\.jpg, Who\?, I"),
    "no rows": ("t.csv", b"image,question,answer\n", "holds no row below the names of its columns"),
    "latin-1": ("t.csv", "question,answer\nWo?,Köln\n".encode("latin-1"), "line 1 or soon after: it is no UTF-8"),
    "an open quote": ("t.csv", b'question,answer\nWho?,"I\n', r"t\.csv, line 2: unexpected end of data"),
    "a wrong quote": ("t.csv", b'question,answer\nWho?,I\nWho?,"I"x\n', r"t\.csv, line 3: .*mend its quotes"),
    "a long line": ("t.csv", b"question,answer\n" + b"x" * (2 << 20), r"line 2: a line of more than 1 MiB"),
    "no parquet": ("t.parquet", b"PAR1", r"cannot read t\.parquet in .* as parquet"),
    "missing cells": ("t.csv", b"question,answer\nWho?,I\nWho?\n", r"line 3: it has 1 cells, .*names 2 columns"),
}


@pytest.mark.parametrize(("name", "content", "said"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_table_is_refused_in_one_sentence(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(LeverError, match=said):
        load(str(tmp_path / name))


def test_a_folder_that_is_no_table_is_refused(photos):
    with pytest.raises(LeverError, match="holds no table; name a"):
        load(str(photos))
    write(photos / "a.csv", rows_of())
    write(photos / "b.jsonl", rows_of())
    with pytest.raises(LeverError, match=r"several kinds, b\.jsonl and a\.csv; name the file"):
        load(str(photos))


@pytest.mark.parametrize("source", ["hub:owner", "hub:owner/name/../x"])
def test_a_hub_address_that_is_none_is_refused(source):
    with pytest.raises(LeverError, match=r"expected hub:OWNER/NAME or hub:OWNER/NAME/PART"):
        load(source)


# ---------------------------------------------------------------------- checks, view, memory


def test_checks_and_sources_of_tables(photos):
    train, val = write(photos / "train.csv", rows_of(6)), write(photos / "val.csv", rows_of(9)[6:])
    config = DataConfig("mine", file=train, val_file=val)
    assert [source_of(config, split) for split in ("train", "val")] == [train, val]
    assert not in_parquet(config, "train")
    assert [(check.status, check.found) for check in check_files(config)] == [("ok", train), ("ok", val)]
    splits: dict = {}
    assert [check.found for check in check_examples(config, splits)] == ["6 usable", "3 usable"]
    assert [len(splits[split]) for split in ("train", "val")] == [6, 3]
    assert [check.found for check in check_files(DataConfig(file=train))] == [train, f"a part of {train}"]
    (missing, _) = check_files(DataConfig(file=str(photos / "none.csv"), val_file=val))
    assert (missing.status, missing.mend[:6]) == ("missing", "name a")


def test_a_folder_of_a_hub_copy_that_is_not_here_is_to_be_fetched(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (check, _) = check_files(DataConfig(file="hub:owner/name/part"))
    assert (check.status, check.fetched) == ("missing", True)
    fetch = "hf download --repo-type dataset owner/name --include 'part/*'"
    assert fetch in check.mend
    for look in (view, load_dataset):
        with pytest.raises(LeverError, match=rf"not in the hub's cache.*; {re.escape(fetch)}"):
            look(DataConfig(file="hub:owner/name/part"))


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"answer": "red"}, "short_answer"),
        ({"answer": "3,000"}, "number"),
        ({"answer": -2.5}, "number"),
        ({"options": ["red", "blue"], "answer": "red"}, "choice"),
        ({"answers": ["red"] * 10}, "vqa"),
        ({"captions": ["a dog runs over the green grass now"] * 5}, "caption"),
        ({"caption": "a dog runs over the green grass now"}, "caption"),
        ({"answer": "a dog runs over the green grass now"}, "short_answer"),
    ],
)
def test_a_view_names_the_task_that_fits(photos, row, task):
    rows = [{"image": f"{i}.jpg", "question": "Which?", **row} for i in range(4)]
    assert view(DataConfig(file=write(photos / "t.jsonl", rows))).task == task


def test_a_view_says_what_is_there_and_what_is_odd(photos):
    rows = [{**row, "id": i, "note": "n"} for i, row in enumerate(rows_of(8))]
    rows[3] |= {"image": "9.jpg"}
    rows[4] |= {"id": 1}
    rows[5] |= {"answer": "one two three four five six seven"}
    rows[6] |= {"image": ""}
    rows += [{**rows[0], "id": 99}, {**rows[1], "id": 98, "answer": ""}]
    seen = view(DataConfig(file=write(photos / "t.csv", rows)), rows=2)
    assert (seen.files, seen.rows, seen.unused) == ((str(photos / "t.csv"),), 10, ("note",))
    assert seen.columns == {"image": "image", "question": "question", "answer": "answer", "id": "id"}
    assert seen.first == (
        {"image": "0.jpg", "question": "Which colour has 0?", "answer": "blue", "id": "0"},
        {"image": "1.jpg", "question": "Which colour has 1?", "answer": "red", "id": "1"},
    )
    assert seen.split == "by image: 20% of them are evaluated on (data.val_share, data.split_seed)"
    bad, ids, repeated, imageless, longest = seen.odd
    assert bad.startswith(f"2 rows cannot be used, the first: {photos / 't.csv'}, line 5: its image '9.jpg'")
    assert ids.startswith(f"1 rows have the id of another, the first: {photos / 't.csv'}, line 6: 1")
    assert repeated == f"1 rows repeat another, the first: {photos / 't.csv'}, line 10"
    assert imageless == "1 of 8 rows have no image"
    assert longest.startswith("the longest answer has 7 words: 'one two")


def test_a_large_table_keeps_equal_texts_once_and_stops_late_with_its_line(photos):
    rows = [
        {"image": f"{i % 6}.jpg", "question": f"Which of the {i % 50} colours?", "answer": "x"} for i in range(20_000)
    ]
    file = write(photos / "t.csv", rows)
    load(write(photos / "small.csv", rows[:10]))
    tracemalloc.start()
    data = load(file)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(both(data)) == 20_000
    assert held < 20_000 * 450, "bytes of an example"
    assert peak < 20_000 * 1200
    with open(file, "a", encoding="utf-8") as end:
        end.write("9.jpg,Which?,x\n")
    with pytest.raises(LeverError, match=r"t\.csv, line 20002: its image '9\.jpg' is no file"):
        load(file)
