"""VQA accuracy against the official evaluator's own numbers, relevance by hand."""

import json
import random

import pytest
import vqa_rule
from helpers import CHECKOUT

from lever_lm.tasks.vqa_metrics import normalize_answer, relevance, vqa_accuracy

DATA = CHECKOUT / "tests/data"
OFFICIAL = json.loads((DATA / "vqa_official.json").read_text(encoding="utf-8"))
LINEAGE = json.loads((DATA / "vqa_metric.json").read_text(encoding="utf-8"))


def official_accuracies():
    references = {a["question_id"]: [answer["answer"] for answer in a["answers"]] for a in OFFICIAL["annotations"]}
    return {r["question_id"]: vqa_accuracy(r["answer"], references[r["question_id"]]) for r in OFFICIAL["results"]}


def test_every_question_scores_as_the_official_evaluator_says():
    found = {str(question): round(100 * accuracy, 2) for question, accuracy in official_accuracies().items()}
    assert found == OFFICIAL["per_question"]
    assert len(found) == 150


def test_the_overall_accuracy_is_the_official_one():
    found = list(official_accuracies().values())
    assert round(100 * sum(found) / len(found), 2) == OFFICIAL["overall"]


def test_every_string_normalises_as_the_official_evaluator_does():
    wrong = [
        (text, normalize_answer(text), out) for text, out in OFFICIAL["normalised"] if normalize_answer(text) != out
    ]
    assert len(OFFICIAL["normalised"]) == 265
    assert not wrong


def test_strings_and_accuracies_are_those_of_the_lineage():
    for case in LINEAGE["normalise"]:
        assert normalize_answer(case["text"]) == case["normalised"], case
    for case in LINEAGE["accuracy"]:
        found = vqa_accuracy(case["prediction"], case["answers"])
        assert round(100 * found, 2) == case["accuracy_percent"], case
        assert int(found > 0) == case["vqa_correct"], case


@pytest.mark.parametrize(
    ("matches", "accuracy"),
    # m matching sets miss one match of their own: (m · min(1, (m−1)/3) + (10−m) · min(1, m/3)) / 10.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)],
)
def test_accuracy_by_the_number_of_matching_annotators(matches, accuracy):
    answers = ["cat"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert vqa_accuracy("cat", answers) == pytest.approx(accuracy)


def test_where_all_annotators_agree_nothing_is_normalised():
    assert vqa_accuracy("A Cat", ["cat"] * 10) == 0.0
    assert vqa_accuracy("cat", ["cat"] * 10) == 1.0
    assert vqa_accuracy(" cat\n", ["cat"] * 10) == 1.0
    assert vqa_accuracy("A Cat", ["cat"] * 9 + ["dog"]) == 1.0


@pytest.mark.parametrize("outer", ["black ", " black", "black\n", "\tblack", "\xa0black"])
def test_annotators_agree_whatever_the_blanks_around_their_answers(outer):
    answers = ["black"] * 9 + [outer]
    assert vqa_accuracy("Black", answers) == 0.0
    assert vqa_accuracy("black", answers) == 1.0
    assert vqa_accuracy("Black", answers, always_normalize=True) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answers", "official", "always"),
    [
        ("Yes", ["yes"] * 10, 0.0, 1.0),
        ("the cat.", ["cat"] * 10, 0.0, 1.0),
        ("2", ["two"] * 10, 0.0, 1.0),
        ("yes", ["yes"] * 10, 1.0, 1.0),
        ("Yes", ["yes"] * 9 + ["no"], 1.0, 1.0),
        ("no", ["yes"] * 10, 0.0, 0.0),
        ("Yes", ["yes"], 0.0, 0.0),
        ("Yes", [], 0.0, 0.0),
    ],
)
def test_what_is_always_normalised_differs_where_all_agree_and_nowhere_else(prediction, answers, official, always):
    assert vqa_accuracy(prediction, answers) == official
    assert vqa_accuracy(prediction, answers, always_normalize=True) == always


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Two Dogs.", "2 dogs"),
        ("dont know", "don't know"),
        ("ice-cream", "ice cream"),
        ("red, white", "red white"),
        ("1,000 miles", "1000 miles"),
        ("3.5", "3.5"),
        ("none", "0"),
        ("a an the", ""),
        ("", ""),
    ],
)
def test_normalisation_by_hand(text, normalised):
    assert normalize_answer(text) == normalised


# ---------------------------------------------------------------------- a transcription of the official rule

WORDS = """|cat|Cat|black|red car|two|2|none|TEN|a|the|an|A cat|dont|don't|youre|1,000|1000|3.5|.5|st. john|u.s.a.|a.m
t-shirt|rock/roll|what?|(left)|x=y|...|café|cafe\u0301|日本|٣|Å|ß|İ|1،000|yes|Yes|yes!|! yes|4,5|4, 5|-|5'6"""
WORDS = [*WORDS.replace("\n", "|").split("|"), "." * 40]
AROUND = ["", "", "", " ", "  ", "\n", "\t", "\xa0", "\u3000", *".,!;-_", " .", ". ", ", ", "\r", "\x1c"]


def drawn_text(rng: random.Random) -> str:
    """A word or some, what may stand around one before, between and after them."""
    text = rng.choice(AROUND) + rng.choice(WORDS)
    while rng.random() < 0.3:
        text += rng.choice([" ", *AROUND]) + rng.choice(WORDS)
    text += rng.choice(AROUND)
    return text.upper() if rng.random() < 0.1 else text


def drawn_answers(rng: random.Random) -> list[str]:
    """What annotators wrote: all the same, the same but for blanks, or a few texts some times each."""
    texts = [drawn_text(rng) for _ in range(rng.choice([1, 1, 1, 2, 3, 10]))]
    answers = [rng.choice(texts) for _ in range(rng.choice([1, 3, 10, 10, 10]))]
    if rng.random() < 0.5:
        answers = [
            rng.choice(["", "", " ", "\n", "\t"]) + answer + rng.choice(["", "", " ", "\n"]) for answer in answers
        ]
    return answers


def test_accuracy_is_that_of_a_slow_transcription_of_the_official_rule():
    rng, wrong, scores = random.Random(13), [], set()
    for _ in range(2_000):
        answers = drawn_answers(rng)
        near = [rng.choice(AROUND) + rng.choice(answers) + rng.choice(AROUND) for _ in range(6)]
        for prediction in [*near, rng.choice(answers), rng.choice(answers).strip().title(), drawn_text(rng)]:
            expected = vqa_rule.accuracy(prediction, answers)
            scores.add(round(expected, 6))
            if abs(vqa_accuracy(prediction, answers) - expected) > 1e-12:
                wrong.append((prediction, answers, expected))
    assert not wrong
    assert len(scores) >= 5, "scores that are all alike prove nothing"


# ---------------------------------------------------------------------- relevance


@pytest.mark.parametrize(
    ("prediction", "answers", "token_f1", "edit"),
    [
        ("cat", ["cat", "dog"], 1.0, 1.0),
        ("red car", ["car"], 2 * 1 / (2 + 1), 2 * 3 / (7 + 3)),
        ("the cat", ["a cat"], 1.0, 1.0),  # compared as normalised
        ("cat", ["xyz"], 0.0, 0.0),
        ("cat", [], 0.0, 0.0),
        ("ab", ["b", "abc"], 0.0, 2 * 2 / (2 + 3)),
        ("big big dog", ["big dog"], 2 * 2 / (3 + 2), 2 * 7 / (11 + 7)),
    ],
)
def test_relevance_by_hand(prediction, answers, token_f1, edit):
    assert relevance(prediction, answers) == (pytest.approx(token_f1), pytest.approx(edit))
