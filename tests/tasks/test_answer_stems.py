"""OK-VQA's reduced answers: what is learned from pairs of answers, and what `--okvqa-stem` scores and writes."""

import json

import pytest
from helpers import small_digits

from lever_lm.config.load import resolve
from lever_lm.data import load_dataset
from lever_lm.lvlm import CachedLvlm
from lever_lm.tasks.answer_stems import learn_stems
from lever_lm.tasks.vqa_metrics import vqa_accuracy

# As they stand in OK-VQA's annotations: (raw_answer, answer).
PAIRS = [
    ("racing", "race"),
    ("surfing", "surf"),
    ("teddy bears", "teddy bear"),
    ("christmas", "christmas"),
    ("police", "police"),
    ("pony tail", "pony tail"),
    ("skateboard", "skateboard"),
    ("bus", "bus"),
    ("grass", "grass"),
    ("tennis", "tennis"),
    ("city", "city"),
    ("box", "box"),
    ("ski", "ski"),
    ("run", "run"),
    ("bake", "bake"),
]
STEMS = learn_stems(PAIRS)


# ---------------------------------------------------------------------- what is learned


# (text, what it is reduced to), by why.
REDUCED = {
    "typed so by an annotator": PAIRS,
    "an inflection never seen": [
        ("skateboards", "skateboard"),
        ("skateboarding", "skateboard"),
        ("buses", "bus"),
        ("boxes", "box"),
        ("cities", "city"),
        ("skiing", "ski"),
        ("running", "run"),
        ("baking", "bake"),
        ("races", "race"),
    ],
    "a word of the reduced answers": [(word, word) for word in ("bus", "grass", "tennis", "christmas", "race", "city")],
    "a word of which nothing is known": [
        (word, word) for word in ("zebras", "glasses", "snowing", "gas", "is", "king", "ing", "3", "éclairs", "汽车")
    ],
    "words of longer answers, one by one": [
        ("brown bears", "brown bear"),
        ("racing bears", "race bear"),
        ("bears surfing", "bear surf"),
        ("teddy", "teddy"),
        ("pony tails", "pony tail"),
        ("two skateboards racing", "two skateboard race"),
    ],
    "case and blanks do not matter": [
        (text, "teddy bear") for text in (" Teddy   BEARS ", "TEDDY BEARS", "teddy\tbears\n")
    ],
}


@pytest.mark.parametrize("cases", REDUCED.values(), ids=REDUCED)
def test_a_text_is_reduced_as_the_annotators_answers_were(cases):
    assert [STEMS.reduce(text) for text, _ in cases] == [reduced for _, reduced in cases]


def test_words_are_not_paired_where_their_number_changed():
    stems = learn_stems([("horse back riding", "horseback ride"), ("riding", "ride")])
    assert stems.reduce("horse back riding") == "horseback ride"
    assert stems.reduce("back") == "back"
    assert stems.reduce("back riding") == "back ride"


def test_the_commonest_reduction_counts():
    stems = learn_stems([("leaves", "leave"), *[("leaves", "leaf")] * 2, ("leaves", "leave"), ("leaves", "leaf")])
    assert stems.reduce("leaves") == "leaf"
    assert stems.reduce("green leaves") == "green leaf"


def test_an_answer_as_a_whole_comes_before_its_words():
    stems = learn_stems([("hot dogs", "hotdog"), *[("dogs", "dog")] * 5])
    assert stems.reduce("hot dogs") == "hotdog"
    assert stems.reduce("big dogs") == "big dog"


@pytest.mark.parametrize("text", ["Surfing.", "surfing!", "surfing,"])
def test_punctuation_that_the_metric_strips_does_not_keep_a_prediction_from_being_reduced(text):
    references = ("surf",) * 9 + ("ski",)  # the metric strips nothing where all ten agree
    assert vqa_accuracy("surf.", references) == 1
    assert vqa_accuracy(STEMS.reduce(text), references) == 1


def test_an_empty_prediction_stays_empty():
    assert STEMS.reduce("") == STEMS.reduce("  \n") == ""
    assert learn_stems([]).reduce("Surf boards") == "surf boards"
    assert learn_stems([("", "")]).reduce("") == ""


# ---------------------------------------------------------------------- the flag


@pytest.fixture
def infer(lever, tmp_path, monkeypatch):
    """`lever infer --icds` on digits whose typed answers are plurals and whose reduced ones are not; the LVLM says what
    was typed. Arguments → Done; `infer.data`, the dataset."""
    root = small_digits(tmp_path / "world", 12, 8)
    for path in root.glob("mscoco_*_annotations.json"):
        content = json.loads(path.read_text())
        for annotation in content["annotations"]:
            for answer in annotation["answers"]:
                answer["answer"], answer["raw_answer"] = "surfboard", "surfboards"
            annotation["answers"][8] |= {"raw_answer": "surfboard"}
            annotation["answers"][9] |= {"raw_answer": "surfboard"}
        path.write_text(json.dumps(content))
    places = ("--set", f"data.okvqa_path={root}", "--set", f"data.coco_path={root}")
    data = load_dataset(resolve({"dataset": "digits"}, None, list(places[1::2]), {})[0].data)
    picks = {e.question_id: [t.question_id for t in data.train_examples[:4]] for e in data.val_examples}
    (tmp_path / "picks.json").write_text(json.dumps(picks))
    monkeypatch.setattr(CachedLvlm, "answer", lambda self, prompts, what: ["Surfboards"] * len(prompts))

    def run(*options):
        done = lever("infer", "--icds", "picks.json", "--json", *places, *options)
        assert done.status == 0, done.err
        return done

    run.data = data
    return run


def only(done) -> dict:
    (result,) = done.json["results"]
    return result


def test_the_flag_raises_accuracy_and_leaves_raw_accuracy(infer):
    without, reduced = infer("--shots", "2"), infer("--shots", "2", "--okvqa-stem")
    assert (without.json["okvqa_stem"], reduced.json["okvqa_stem"]) == (False, True)
    assert only(without)["accuracy"] == 0
    assert only(reduced)["accuracy"] == 1
    assert only(without)["raw_accuracy"] == only(reduced)["raw_accuracy"] == 1
    assert infer("--shots", "2", "--set", "infer.okvqa_stem=true").json == reduced.json


def test_the_predictions_written_are_those_scored(infer, tmp_path):
    for options, written in (((), "Surfboards"), (("--okvqa-stem",), "surfboard")):
        done = infer("--shots", "2", *options)
        folder = tmp_path / done.json["folder"]
        rows = json.loads((folder / "predictions_icds_2shot.json").read_text())
        assert [row["answer"] for row in rows] == [written] * 8
        assert [row["question_id"] for row in rows] == [e.question_id for e in infer.data.val_examples]
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["okvqa_stem"] is bool(options)
        scores = [vqa_accuracy(row["answer"], e.answers) for row, e in zip(rows, infer.data.val_examples, strict=True)]
        assert metrics["results"][0]["accuracy"] == sum(scores) / len(scores)


def test_results_with_and_without_the_flag_are_never_in_one_table(infer, tmp_path):
    def shots(*options):
        done = infer(*options)
        metrics = json.loads((tmp_path / done.json["folder"] / "metrics.json").read_text())
        assert metrics["results"] == done.json["results"]
        return [(row["shots"], row["accuracy"]) for row in metrics["results"]]

    assert shots("--shots", "1") == [(1, 0.0)]
    assert shots("--shots", "2", "--okvqa-stem") == [(2, 1.0)]
    assert shots("--shots", "3", "--okvqa-stem") == [(2, 1.0), (3, 1.0)]
    assert shots("--shots", "4") == [(4, 0.0)]
