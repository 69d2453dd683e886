"""The tasks beside `vqa`, by hand: what is asked, read and scored, and what is reported of many."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lever_lm.config.schema import DataConfig
from lever_lm.data import Example, VqaData
from lever_lm.data.rows import Unusable
from lever_lm.evaluation.statistics import corpus_differences, corpus_metrics, roc_auc
from lever_lm.tasks import TASKS, pose_of, task_of
from lever_lm.utils.errors import UsageError

SHORT, CHOICE, NUMBER, CAPTION = (TASKS[name] for name in ("short_answer", "choice", "number", "caption"))


def example(*answers: str, question: str = "What?", options: tuple[str, ...] = (), number: int = 1) -> Example:
    return Example(number, number, question, answers, answers, f"{number}.png", options)


def posed(one: Example, task: str = "choice", **settings) -> Example:
    return pose_of(DataConfig(task=task, **settings))(one)


# ---------------------------------------------------------------------- short_answer


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("cat", 1),
        ("The Cat.", 1),
        ("a-cat", 1),
        ("(cat)", 1),
        ("-2", 0),
        ("+2", 0),
        ("cat+", 0),
        ("two", 1),
        ("2", 1),
        ("dog", 0),
        ("cats", 0),
        ("", 0),
        ("  ", 0),
        ("the", 0),
    ],
)
def test_a_short_answer_is_right_where_it_is_one_of_the_accepted_ones(said, score):
    assert SHORT.score(said, example("a cat", "Two")) == score


def test_an_answer_that_normalises_to_nothing_is_itself_and_not_every_blank():
    grade = example("A")
    assert [SHORT.score(said, grade) for said in ("A", "a", "", "the", "B")] == [1, 1, 0, 0, 0]


def test_short_answers_are_reported_by_exact_match_and_the_share_of_empty_ones():
    found = SHORT.summary(["cat", "dog", "", "cat"], [example("cat")] * 4)
    assert found == {"exact_match": 0.5, "unparsed": 0.25}


# ---------------------------------------------------------------------- choice

COLOURS = ("red", "dark blue", "blue")


def test_a_choice_letters_its_options_in_the_question_and_shows_the_letter():
    one = posed(example("blue", question="Which colour?", options=COLOURS))
    assert one.question == "Which colour? (A) red (B) dark blue (C) blue"
    assert (one.answer, one.answers) == ("C", ("blue",))
    shown = posed(example("blue", question="Which colour?", options=COLOURS), show="text")
    assert (shown.question, shown.answer) == (one.question, "blue")
    hidden = posed(example("blue", question="Which colour?", options=COLOURS), show="hidden")
    assert (hidden.question, hidden.answer) == ("Which colour?", "blue")
    assert [CHOICE.read(said, hidden) for said in ("Blue", "red", "green")] == ["blue", "red", None]


@pytest.mark.parametrize(
    ("said", "read"),
    [
        *[(text, "C") for text in ("C", "c", "(C)", "c.", "C: blue", "C) blue", "The answer is C", "answer: (c)")],
        *[(text, "C") for text in ("blue", "Blue.", "a blue", "it is blue")],
        *[("dark blue", "B"), ("it is dark blue", "B"), ("It is red, I think", "A"), ("A", "A")],
        # D is no option, `a bird` no letter, and of two options in a text neither is meant.
        *[(text, None) for text in ("D", "", "green", "a bird", "red or blue", "Cats")],
    ],
)
def test_the_letter_or_the_text_of_an_option_is_read(said, read):
    one = posed(example("blue", options=COLOURS))
    assert CHOICE.read(said, one) == read
    assert CHOICE.score(said, one) == (read == "C")


def test_signs_and_letters_among_the_options_are_no_noise():
    numbers = posed(example("1", options=("1", "2", "10")))
    assert [CHOICE.read(said, numbers) for said in ("1", "one", "-1", "1.5", "10%", "-10", "10.")] == [
        *("A", "A", None, None, None, None, "C")
    ]
    letters = posed(example("a", options=("a", "b", "c")), show="text")
    assert [CHOICE.read(said, letters) for said in ("A", "b", "A or B", "A and B", "it is c")] == [
        *("a", "b", None, None, "c")
    ]


def test_with_texts_shown_the_text_is_read_first_and_the_letter_else():
    one = posed(example("B", options=("B", "A")), show="text")
    assert [CHOICE.read(said, one) for said in ("B", "A", "(A)", "b.")] == ["B", "A", "A", "B"]
    lettered = posed(example("B", options=("B", "A")))
    assert [CHOICE.read(said, lettered) for said in ("B", "A", "(A)")] == ["B", "A", "A"]
    assert CHOICE.score("A", lettered) == 1


def test_options_that_differ_by_capitals_alone_are_told_apart_to_the_letter():
    one = posed(example("The Cat", options=("the cat", "The Cat", "a dog")))
    assert [CHOICE.read(said, one) for said in ("the cat", "The Cat", "THE CAT", "Dog")] == ["A", "B", None, "C"]


@given(st.integers(2, 26), st.data())
def test_what_was_read_is_read_as_itself(count, data):
    options = tuple(f"thing {i}" for i in range(count))
    place = data.draw(st.integers(0, count - 1))
    for show in ("letter", "text"):
        one = posed(example(options[place], options=options), show=show)
        read = CHOICE.read(data.draw(st.sampled_from([one.answer, options[place]])), one)
        assert CHOICE.read(read, one) == read == one.answer
        assert CHOICE.score(read, one) == 1


@pytest.mark.parametrize(
    ("answer", "options", "said"),
    [
        ("blue", ("red",), "1 options"),
        ("blue", (), "0 options"),
        ("blue", tuple(map(str, range(27))), "27 options"),
        ("blue", ("blue", "blue "), "the same"),
        ("green", COLOURS, "'green' is none of its options: red, dark blue, blue"),
    ],
)
def test_what_is_no_choice_is_refused(answer, options, said):
    with pytest.raises(Unusable, match=said):
        posed(example(answer, options=options))


def test_choices_are_reported_by_accuracy_and_the_share_that_names_no_option():
    one = posed(example("blue", options=COLOURS))
    assert CHOICE.summary(["C", "blue", "A", "green"], [one] * 4) == {"accuracy": 0.5, "unparsed": 0.25}
    assert CHOICE.relevance("blue", one) == (1.0, 1.0)
    assert CHOICE.relevance("dark blue", one)[0] == pytest.approx(2 / 3)


# ---------------------------------------------------------------------- number


@pytest.mark.parametrize(
    ("said", "number"),
    [
        *[("3", "3"), ("3.0", "3"), ("-2.5", "-2.5"), ("−4", "-4"), (".5", "0.5"), ("7.", "7"), ("1,250", "1250")],
        *[("2e3", "2000"), ("40 %", "40"), ("about 12 cats", "12"), ("three", "3"), ("Zero", "0"), ("$5", "5")],
        *[("two of 5", "2"), ("5 of two", "5"), ("none", "0"), ("12,345,678.5", "12345678.5"), ("10:30", "10")],
        *[("minus 5", "-5"), ("negative two", "-2"), ("twenty one", "21"), ("Forty-two.", "42"), ("eleven", "11")],
        # A comma that stands before no three digits is none of ours, and `one hundred` is more than 1.
        *[(text, None) for text in ("0,250", "12,3456", "3,5", "1,25", "1.250,5", "1.2.3", "one hundred", "1 million")],
        *[(text, None) for text in ("", "many", "v2", "e5", "1e999", "-", "no one")],
    ],
)
def test_the_first_number_of_a_text_is_read(said, number):
    assert NUMBER.read(said, example("1")) == number


def test_a_number_scores_one_less_its_error_over_the_scale():
    task = replace(NUMBER, scale=4.0)
    scores = [task.score(said, example("10")) for said in ("10", "11", "8", "14", "20", "many")]
    assert scores == [1, 0.75, 0.5, 0, 0, 0]
    assert task.fits("10.4", example("10")) is True
    assert task.fits("10.5", example("10")) is False


def test_the_scale_is_that_of_the_config_or_the_range_of_the_training_answers():
    train = tuple(example(text, number=i) for i, text in enumerate(["2", "12", "7"]))
    data = VqaData("own", train, (example("100", number=9),), "", task="number")
    assert task_of(data).scale == 10
    assert task_of(replace(data, settings=DataConfig(scale=4.0))).scale == 4
    assert task_of(replace(data, train_examples=train[:1])).scale == 1


@pytest.mark.parametrize(
    "answer", ["abc", "3 cats", "", "1,2", "0,250", "twenty cats", "one hundred", "nan", "inf", "1e999", "3-4"]
)
def test_a_reference_that_is_no_number_is_refused(answer):
    with pytest.raises(Unusable, match="is no number"):
        posed(example(answer), task="number")
    assert posed(example("1,250 %"), task="number").answer == "1,250 %"


def test_words_of_another_language_are_numbers_where_the_config_says_so():
    config = DataConfig(task="number", number_words={"Cinco": 5, "seis": 6, "z\xe9ro": 0})
    one, other = (pose_of(config)(example(text)) for text in ("cinco", "Seis"))
    task = task_of(VqaData("own", (one, other), (), "", task="number", settings=config))
    assert [task.read(said, one) for said in ("seis", "Z\xc9RO", "es cinco", "3", "three", "tres")] == [
        *("6", "0", "5", "3", "3", None)
    ]
    assert task.score("seis", one) == 0
    with pytest.raises(Unusable, match="is no number"):
        posed(example("cinco"), task="number")
    for value in ("one", float("nan"), [1], 10**400):
        with pytest.raises(UsageError, match=r"data\.number_words"):
            pose_of(DataConfig(task="number", number_words={"uno": value}))


def test_numbers_are_reported_by_mae_rmse_and_r2_of_those_that_were_written():
    rights, said = ("1", "2", "3", "4", "9"), ("2", "2", "1", "4", "many")
    found = replace(NUMBER, scale=4.0).summary(said, [example(right) for right in rights])
    assert found == pytest.approx(
        {
            "score": (0.75 + 1 + 0.5 + 1 + 0) / 5,
            "mae": 3 / 4,  # errors 1, 0, 2, 0
            "rmse": math.sqrt(5 / 4),
            "r2": 1 - 5 / 5,  # around the mean 2.5: 1.5² + .5² + .5² + 1.5² = 5
            "unparsed": 0.2,
        }
    )
    assert math.isnan(NUMBER.summary(["1", "2"], [example("1")] * 2)["r2"]), "all right numbers are equal"
    assert math.isnan(NUMBER.summary(["many"], [example("1")])["mae"])


# ---------------------------------------------------------------------- caption


def test_a_caption_is_scored_with_the_document_frequencies_of_its_own_split():
    texts = ["a red ball on the grass", "two dogs run over a field", "a man rides a horse", "the cat sleeps on a mat"]
    train = tuple(example(text, number=i) for i, text in enumerate(texts))
    val = tuple(example(text, number=i + 10) for i, text in enumerate([*texts[:2], "a red ball", "a red kite"]))
    task = task_of(VqaData("own", train, val, "", task="caption"))
    assert task.score(texts[0], train[0]) == pytest.approx(1.0)
    said = "a red ball lies there"
    assert task.score(said, train[0]) != task.score(said, val[0]), "`red` is rarer among the training captions"
    assert task.summary([texts[0], ""], [train[0]] * 2) == {"cider_d": pytest.approx(5.0), "unparsed": 0.5}
    assert task.references(example("a", "b", "a")) == {"a": 0.5, "b": 0.5}
    assert task.fits(texts[0], train[0])
    assert not task.fits("nothing of it", train[0])


# ---------------------------------------------------------------------- of all queries together


def test_corpus_metrics_have_intervals_and_differences_are_paired():
    rng = np.random.default_rng(0)
    right = rng.integers(0, 10, 60)
    ones = [example(str(value), number=i) for i, value in enumerate(right)]
    near, far = (right + rng.integers(-spread, spread + 1, 60) for spread in (1, 4))
    of = [
        np.array([NUMBER.measures(str(v), one) for v, one in zip(values, ones, strict=True)]) for values in (near, far)
    ]
    told = corpus_metrics(of[0], NUMBER.summarize)
    assert told["mae"]["value"] == pytest.approx(np.abs(near - right).mean())
    assert told["mae"]["low"] < told["mae"]["value"] < told["mae"]["high"]
    gap = corpus_differences(*of, NUMBER.summarize)["metrics"]
    assert gap.keys() == {"mae", "rmse", "r2"}
    assert gap["mae"]["difference"] == pytest.approx(np.abs(near - right).mean() - np.abs(far - right).mean())
    assert gap["mae"]["high"] < 0 < gap["r2"]["low"]
    same = corpus_differences(of[0], of[0], NUMBER.summarize)["metrics"]
    assert set(same["rmse"].values()) == {0.0}, "the same queries are drawn for both"


def test_what_nothing_can_be_said_of_is_none():
    rows = np.array([NUMBER.measures("many", example("1"))] * 3)
    assert corpus_metrics(rows, NUMBER.summarize)["mae"] == {"value": None, "low": None, "high": None}


def test_roc_auc_counts_pairs_and_ties_as_halves():
    margins, positive = np.array([0.1, 0.4, 0.35, 0.8, 0.4]), np.array([0, 0, 1, 1, 1])
    # Of 3 × 2 pairs: .35 > .1; .8 > .1, .4; .4 > .1; .4 = .4: (4 + .5) / 6.
    assert roc_auc(margins, positive) == pytest.approx(4.5 / 6)
    assert roc_auc(np.stack([margins, -margins]), np.stack([positive] * 2)) == pytest.approx([4.5 / 6, 1.5 / 6])
    assert math.isnan(roc_auc(margins, np.zeros(5)))
