"""Datasets in OK-VQA's official layout: what loads, what is refused in which words, what is left out and counted."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from lever_lm.config.schema import DataConfig
from lever_lm.data import Example, load_dataset, open_image
from lever_lm.data.pools import Candidates
from lever_lm.data.rows import whole_id
from lever_lm.utils.errors import LeverError

QUESTIONS = "OpenEnded_mscoco_{}2014_questions.json"
ANNOTATIONS = "mscoco_{}2014_annotations.json"


def answers(*texts):
    padded = [*texts, *[texts[-1]] * (10 - len(texts))]
    return [
        {"answer": text, "raw_answer": f"{text}s", "answer_confidence": "yes", "answer_id": i}
        for i, text in enumerate(padded, 1)
    ]


class World:
    """A small dataset on disk: question 10·n and 10·n + 1 are about image n; train has images 1–3, val 4–5."""

    def __init__(self, root: Path):
        self.root = root
        self.images = {"train": [1, 2, 3], "val": [4, 5]}
        self.questions = {
            split: [
                {"question_id": 10 * i + k, "image_id": i, "question": f"what is {k} in {i}?"}
                for i in ids
                for k in (0, 1)
            ]
            for split, ids in self.images.items()
        }
        self.annotations = {
            split: [
                {"question_id": q["question_id"], "image_id": q["image_id"], "answers": answers("cat", "dog")}
                for q in rows
            ]
            for split, rows in self.questions.items()
        }
        for split, ids in self.images.items():
            for i in ids:
                self.save(split, i, Image.new("RGB", (8, 6), (40 * i, 10, 20)))

    def path(self, split: str, image: int) -> Path:
        return self.root / f"{split}2014" / f"COCO_{split}2014_{image:012d}.jpg"

    def save(self, split: str, image: int, picture: Image.Image, **how) -> None:
        self.path(split, image).parent.mkdir(exist_ok=True)
        picture.save(self.path(split, image), **{"format": "JPEG", **how})

    def write(self) -> None:
        for split in self.images:
            for name, key, rows in (
                (QUESTIONS, "questions", self.questions),
                (ANNOTATIONS, "annotations", self.annotations),
            ):
                content = rows[split] if isinstance(rows[split], str) else json.dumps({"info": {}, key: rows[split]})
                (self.root / name.format(split)).write_text(content, encoding="utf-8")

    def load(self, **how):
        self.write()
        return load_dataset(DataConfig("small", str(self.root), str(self.root), **how))


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


# ---------------------------------------------------------------------- what loads


def test_both_splits_load_row_by_row(world):
    data = world.load()
    assert (data.name, data.skipped) == ("small", ())
    assert (len(data.train), len(data.val)) == (6, 4)
    assert data.train_examples[1] == Example(
        question_id=11,
        image_id=1,
        question="what is 1 in 1?",
        answers=("cat", *["dog"] * 9),
        raw_answers=("cats", *["dogs"] * 9),
        image=str(world.path("train", 1)),
    )
    assert [example.question_id for example in data.val_examples] == [40, 41, 50, 51]


def test_the_shown_answer_is_the_commonest_the_first_of_equals(world):
    world.annotations["train"][0]["answers"] = answers("a", "b", "b", "c")[:4]
    world.annotations["train"][1]["answers"] = answers("z", "b", "z", "b")[:4]
    examples = world.load().train_examples
    assert (examples[0].answer, examples[1].answer) == ("b", "z")


@pytest.mark.parametrize("deeper", [("val",), ("train", "val")], ids="+".join)
def test_images_are_found_below_mscoco2014_split_by_split(world, deeper):
    (world.root / "mscoco2014").mkdir()
    for split in deeper:
        (world.root / f"{split}2014").rename(world.root / "mscoco2014" / f"{split}2014")
    data = world.load()
    for split in ("train", "val"):
        assert all(("mscoco2014/" in e.image) == (split in deeper) for e in data.examples(split))


def test_a_split_is_also_a_table_whose_images_are_decoded_on_access_and_not_before(world):
    data = world.load()
    assert data.train[2]["image"].size == (8, 6)
    for row, example in zip(data.val.remove_columns("image"), data.val_examples, strict=True):
        texts = {name: tuple(row[name]) for name in ("answers", "raw_answers")}
        assert Example(**{**row, **texts}, image=example.image) == example
    world.path("train", 1).unlink()
    assert data.train["question"][0] == "what is 0 in 1?"
    with pytest.raises(FileNotFoundError):
        data.train[0]["image"]


# ---------------------------------------------------------------------- refusals


def test_an_empty_image_is_refused_by_question_and_file(world):
    world.path("val", 5).write_bytes(b"")
    with pytest.raises(LeverError, match=r"question 50: image .*_000000000005\.jpg is missing or empty.*--skip-bad"):
        world.load()


@pytest.mark.parametrize(("which", "name"), [("questions", QUESTIONS), ("annotations", ANNOTATIONS)])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[1]",
        '{"questions": 5, "annotations": 5}',
        '{"questions": [1], "annotations": ["a"]}',
        "[" * 100_000,
        '{"questions": [{}], "annotations": [{"question_id": "1", "image_id": 1}]}',
    ],
    ids=["empty", "text", "list", "no-list", "no-objects", "deep", "no-ids"],
)
def test_a_file_of_another_schema_is_refused_by_name(world, which, name, text):
    getattr(world, which)["train"] = text
    with pytest.raises(LeverError, match=name.format("train")):
        world.load()


@pytest.mark.parametrize(
    "change",
    [
        {"answers": entries}
        for entries in (
            None,
            [],
            "cat",
            [{}],
            [{"answer": 3}],
            [{"answer": "a", "raw_answer": 1}],
            [{"answer": " "}] * 3,
        )
    ]
    + [{"question": text} for text in (None, "", "  ", 7)],
    ids=str,
)
def test_answers_of_another_schema_and_questions_without_text_are_refused_by_id(world, change):
    (world.annotations if "answers" in change else world.questions)["train"][4].update(change)
    found = r"questions\.json and mscoco_train2014_annotations\.json, question 30: .*--skip-bad"
    with pytest.raises(LeverError, match=found):
        world.load()


def test_an_annotator_who_left_a_blank_is_one_of_ten(world):
    world.annotations["train"][4]["answers"] = [{"answer": text} for text in ("", " ", "", "cat", "cat", "dog")]
    example = world.load().train_examples[4]
    assert example.answers == ("", " ", "", "cat", "cat", "dog"), "a blank still counts in the accuracy"
    assert example.answer == "cat", "and is never shown"


def test_a_question_about_two_images_is_refused(world):
    world.annotations["train"][4]["image_id"] = 1
    with pytest.raises(LeverError, match=r"question 30: it is about image 3 here, about 1 there"):
        world.load()


def test_missing_files_and_folders_are_refused_with_the_variable(world, tmp_path):
    world.write()
    absent = str(tmp_path / "absent")
    with pytest.raises(LeverError, match=r"cannot read .*questions\.json: .*OKVQA_PATH"):
        load_dataset(DataConfig("small", absent, str(tmp_path)))
    with pytest.raises(LeverError, match=r"no folder .*train2014 or .*mscoco2014.*COCO_PATH"):
        load_dataset(DataConfig("small", str(tmp_path), absent))


@pytest.mark.parametrize(
    ("value", "read"),
    [("12", 12), (12.0, 12), (0, 0), (2**63 - 1, 2**63 - 1), ("012", 12)]
    + [(value, None) for value in (True, False, None, 1.5, -1, -2.0, float("nan"), float("inf"), 2.0**60, 2**63)]
    + [(value, None) for value in ("", " 12", "-1", "12.0", "²", "٣", "9" * 5000, [12], {})],
    ids=lambda value: str(value)[:12],
)
def test_an_id_is_a_whole_number_or_a_text_of_its_digits(value, read):
    assert whole_id(value) == read
    assert type(whole_id(value)) is type(read)


def test_ids_as_text_or_as_whole_floats_are_those_numbers(world):
    for rows in (world.questions["train"], world.annotations["val"]):
        for row in rows:
            row |= {"question_id": str(row["question_id"]), "image_id": float(row["image_id"])}
    data = world.load()
    assert [(e.question_id, e.image_id) for e in data.train_examples[:3]] == [(10, 1), (11, 1), (20, 2)]
    assert [e.question_id for e in data.val_examples] == [40, 41, 50, 51]
    assert {type(e.question_id) for e in data.train_examples} == {int}
    world.questions["train"].append({**world.questions["train"][0], "question_id": 10})
    with pytest.raises(LeverError, match="question_id 10 appears more than once"):
        world.load()


SPOILT = {
    "an id that is NaN": (lambda q, a: q.update(question_id=float("nan")), "entry 4 of 'questions'"),
    "an id that is true": (lambda q, a: q.update(question_id=True), "entry 4 of 'questions'"),
    "no image id": (lambda q, a: q.pop("image_id"), "entry 4 of 'questions'"),
    "an answer that is NaN": (lambda q, a: a["answers"][2].update(answer=float("nan")), "question 30"),
    "half a character": (lambda q, a: q.update(question="a \ud800?"), "question 30: '\\ud800' can stand in no"),
    "an image token in the question": (lambda q, a: q.update(question="a <|image_pad|>?"), "question 30: '<|image_p"),
    "the end of a turn in an answer": (
        lambda q, a: a["answers"][2].update(answer="<|im_end|>"),
        "question 30: '<|im_end",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILT.values(), ids=SPOILT)
def test_what_is_wrong_in_one_entry_is_that_entrys_and_can_be_left_out(world, spoil, words):
    spoil(world.questions["train"][4], world.annotations["train"][4])
    with pytest.raises(LeverError, match=rf"{re.escape(words)}.*--skip-bad-examples"):
        world.load()
    data = world.load(skip_bad_examples=True)
    assert [e.question_id for e in data.train_examples] == [10, 11, 20, 21, 31]
    assert any(words in told for told in data.skipped)


def test_a_text_that_only_looks_like_a_token_is_read(world):
    world.questions["train"][0]["question"] = "What is <|cat|> or <image> or <|im_ende|>?"
    assert len(world.load().train_examples) == 6


@pytest.mark.parametrize("how", [{"encoding": "utf-8-sig"}, {"newline": "\r\n"}], ids=str)
def test_files_of_a_windows_editor_load_alike(world, how):
    expected = world.load()
    for path in world.root.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()), indent=1), **{"encoding": "utf-8", **how})
    data = load_dataset(DataConfig("small", str(world.root), str(world.root)))
    assert data.train_examples == expected.train_examples
    assert data.val_examples == expected.val_examples


def repeat(world, question: str = "what is 0 in 4?") -> None:
    """The photograph of an evaluation question among the training images, under another id, with a question."""
    world.questions["train"].append({"question_id": 90, "image_id": 9, "question": question})
    world.annotations["train"].append({"question_id": 90, "image_id": 9, "answers": answers("cat")})
    world.path("train", 9).write_bytes(world.path("val", 4).read_bytes())


def test_a_question_of_both_splits_about_one_image_is_refused_or_leaves_the_training_split(world):
    repeat(world)
    with pytest.raises(LeverError, match=r"1 of 7 training questions are in .*: question 90 is question 40 there"):
        world.load()
    data = world.load(skip_bad_examples=True)
    assert [e.question_id for e in data.train_examples] == [10, 11, 20, 21, 30, 31]
    assert [e.question_id for e in data.val_examples] == [40, 41, 50, 51]
    assert len(data.skipped) == 1
    assert "question 90 is question 40" in data.skipped[0]


def test_another_question_about_an_image_of_both_splits_is_kept_and_never_shown_before_it(world):
    repeat(world, "what else?")
    data = world.load()
    assert (len(data.train_examples), data.skipped) == (7, ())
    candidates = Candidates(data.train_examples)
    assert [candidates.allowed(query).tolist() for query in data.val_examples] == [
        *[[0, 1, 2, 3, 4, 5]] * 2,
        *[[0, 1, 2, 3, 4, 5, 6]] * 2,
    ]


# ---------------------------------------------------------------------- leaving out


def test_bad_examples_are_left_out_and_counted(world):
    world.path("train", 1).unlink()  # questions 10 and 11
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    world.save("train", 2, noise)
    whole = world.path("train", 2).read_bytes()
    world.path("train", 2).write_bytes(whole[: len(whole) // 2])  # questions 20 and 21
    world.questions["train"][4]["question"] = ""  # question 30
    del world.annotations["val"][0]  # question 40
    data = world.load(skip_bad_examples=True)
    assert [example.question_id for example in data.train_examples] == [31]
    assert [example.question_id for example in data.val_examples] == [41, 50, 51]
    assert len(data.skipped) == 6
    for told, words in zip(
        data.skipped, ["question 10", "question 11", "question 30", "0002.jpg", "0002.jpg", "question 40"], strict=True
    ):
        assert words in told


@pytest.mark.parametrize("which", ["questions", "annotations"])
def test_repeated_ids_and_annotations_without_question_are_left_out_and_counted(world, which):
    rows = getattr(world, which)["train"]
    rows.append(dict(rows[3]))
    world.annotations["train"].append({"question_id": 99, "image_id": 1, "answers": answers("cat")})
    data = world.load(skip_bad_examples=True)
    assert [example.question_id for example in data.train_examples] == [10, 11, 20, 21, 30, 31]
    assert ["question_id 21" in told for told in data.skipped] == [True, False]
    assert ["annotation 99" in told for told in data.skipped] == [False, True]


def test_a_split_without_a_usable_example_is_refused(world):
    for i in (4, 5):
        world.path("val", i).unlink()
    with pytest.raises(LeverError, match=r"the val split holds no usable example"):
        world.load(skip_bad_examples=True)


# ---------------------------------------------------------------------- fingerprint


def test_the_fingerprint_stays_where_nothing_changed_and_changes_with_the_data(world):
    seen = [world.load().fingerprint]
    assert world.load().fingerprint == seen[0]
    world.questions["train"][0]["question"] = "another?"
    seen.append(world.load().fingerprint)
    world.annotations["val"][0]["answers"][0]["answer"] = "cow"
    seen.append(world.load().fingerprint)
    world.save("val", 4, Image.effect_noise((64, 64), 80).convert("RGB"))
    seen.append(world.load().fingerprint)
    del world.questions["val"][3], world.annotations["val"][3]
    seen.append(world.load().fingerprint)
    assert len(set(seen)) == 5


# ---------------------------------------------------------------------- the embedded digits


def test_the_embedded_digits_load_whole():
    data = load_dataset(DataConfig())
    assert (len(data.train), len(data.val)) == (2504, 500)
    assert data.skipped == ()
    ids = [e.question_id for e in (*data.train_examples, *data.val_examples)]
    assert len(set(ids)) == 3004
    assert all(len(e.answers) == len(e.raw_answers) == 10 for e in (*data.train_examples, *data.val_examples))
    assert not {e.image for e in data.train_examples} & {e.image for e in data.val_examples}
    assert open_image(data.val_examples[0].image).mode == "RGB"
