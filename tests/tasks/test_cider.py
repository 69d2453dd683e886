"""CIDEr-D against the public evaluation code's own numbers, and by hand.

cider.json holds corpora of 280, 20, 2 and 1 images: a prediction, 1 to 5 references and a score each, and the mean. The
captions are words drawn by a seeded generator (Zipf's law over some 60 words, lengths of 3 to 14; predictions are
references with words changed, repeated, cut or unseen, or nothing); the scores are those that `Cider().compute_score`
of pycocoevalcap 1.2 gives to the captions as they stand, without its tokenizer.
"""

import json
import math
import random

import pytest
from helpers import CHECKOUT

from lever_lm.tasks.cider import CACHED, CiderD, tokens

CORPORA = json.loads((CHECKOUT / "tests/data/cider.json").read_text(encoding="utf-8"))["corpora"]
# Ten images: "a" in all of them, other words in one each.
TEN = [[f"a w{image}x w{image}y w{image}z"] for image in range(10)]


@pytest.mark.parametrize("corpus", CORPORA, ids=lambda corpus: f"{len(corpus['sets'])} images")
def test_every_image_and_the_mean_score_as_the_public_code_says(corpus):
    cider = CiderD([references for _, references, _ in corpus["sets"]])
    found = [cider.score(prediction, references) for prediction, references, _ in corpus["sets"]]
    assert found == pytest.approx([score for *_, score in corpus["sets"]], rel=0, abs=1e-9)
    assert sum(found) / len(found) == pytest.approx(corpus["mean"], rel=0, abs=1e-9)


def test_the_golden_captions_are_many_and_already_tokenised():
    sets = [case for corpus in CORPORA for case in corpus["sets"]]
    assert len(sets) == 303
    assert sum(0 < score < 10 for *_, score in sets) > 200
    assert all(tokens(text) == text.split() for prediction, references, _ in sets for text in [prediction, *references])


def test_a_score_by_hand():
    # Two images: "a" is in both and weighs 0, all others log 2, which cancels. "a red cat" shares with "a red dog" one
    # of two unigrams that weigh and one of two bigrams: cosines 1/2, 1/2, 0, 0, at equal lengths.
    cider = CiderD([["a red dog"], ["a bus"]])
    assert cider.score("a red cat", ["a red dog"]) == pytest.approx(10 * (1 / 2 + 1 / 2) / 4)
    # One word more: unigrams 1 / sqrt(2 · 3), bigrams 1 / sqrt(2 · 3), under exp(-1 / 72).
    longer = 10 * 2 / math.sqrt(6) / 4 * math.exp(-1 / 72)
    assert cider.score("a red cat here", ["a red dog"]) == pytest.approx(longer)
    # A reference that shares nothing halves the mean.
    assert cider.score("a red cat here", ["a red dog", "no such thing"]) == pytest.approx(longer / 2)


def test_the_caption_itself_scores_ten_from_four_words_on():
    cider = CiderD(TEN)
    assert cider.score(TEN[3][0], TEN[3]) == pytest.approx(10)
    assert cider.score(TEN[3][0], TEN[3]) <= 10
    assert cider.score("w3x w3y w3z", ["w3x w3y w3z"]) == pytest.approx(7.5), "there is no 4-gram"


def test_words_of_every_image_are_worth_nothing():
    assert CiderD(TEN).score("a", ["a"]) == 0


def test_the_order_of_references_and_of_images_is_irrelevant():
    sets = CORPORA[1]["sets"]
    cider, backwards = CiderD([r for _, r, _ in sets]), CiderD([r[::-1] for _, r, _ in sets[::-1]])
    for prediction, references, score in sets:
        assert backwards.score(prediction, references[::-1]) == pytest.approx(score, abs=1e-9)
        assert cider.score(prediction, references[::-1]) == pytest.approx(score, abs=1e-9)


def test_an_image_counts_once_however_many_of_its_captions_say_a_word():
    once, often = CiderD([["red dog"], ["bus"], ["cat"]]), CiderD([["red dog", "red", "red"], ["bus"], ["cat"]])
    assert once.score("red bus", ["red dog"]) == often.score("red bus", ["red dog"]) > 0


@pytest.mark.parametrize("corpus", [[["a red dog on grass"]], [], [[]]], ids=["one image", "none", "no captions"])
def test_a_corpus_that_tells_no_words_apart_scores_zero(corpus):
    assert CiderD(corpus).score("a red dog on grass", ["a red dog on grass"]) == 0


def test_an_image_without_captions_is_no_document():
    assert CiderD([*TEN, []]).score("w1x", TEN[1]) == CiderD(TEN).score("w1x", TEN[1])
    assert CiderD([["a b"], []]).score("a b", ["a b"]) == 0, "one image"


@pytest.mark.parametrize(("prediction", "references"), [("", TEN[0]), (" .\n", TEN[0]), ("w0x", []), ("w0x", [""])])
def test_nothing_said_or_nothing_to_compare_scores_zero(prediction, references):
    assert CiderD(TEN).score(prediction, references) == 0


def test_a_word_repeated_is_clipped_to_the_reference():
    # One of three equal weights, counted once whatever the prediction says: 1 · 1 / (k · sqrt(3)), lengths apart k - 4.
    for k in (1, 2, 7):
        expected = 10 / (k * math.sqrt(3)) / 4 * math.exp(-((k - 4) ** 2) / 72)
        assert CiderD(TEN).score(" ".join(["w5x"] * k), TEN[5]) == pytest.approx(expected)


def test_case_and_punctuation_do_not_matter():
    cider = CiderD(TEN)
    assert cider.score('A W1x, "w1y" w1z.', TEN[1]) == cider.score("a w1x w1y w1z", TEN[1])


def test_references_beyond_the_cache_score_the_same():
    cider = CiderD(TEN)
    before = cider.score("w1x w1y", TEN[1])
    rng = random.Random(0)
    for _ in range(CACHED + 1):
        cider.score("w1x", [f"{rng.random()}"])
    assert len(cider._cache) <= CACHED
    assert cider.score("w1x w1y", TEN[1]) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man, a plan: a canal!", "a man a plan a canal"),
        ("Two dogs...  one\tball ;\nwhy?", "two dogs one ball why"),
        ("The dog's t-shirt -- it isn't red - or is it", "the dog 's t-shirt it is n't red or is it"),
        ("the dogs' 'big' \"day\" (``out'')", "the dogs big day out"),
        ("They\u2019re at 10:30, with 1,000 at 3.5 o'clock", "they 're at 10:30 with 1,000 at 3.5 o'clock"),
        ("red,blue at 5 p.m. for $5, 50% off (a #1)", "red blue at 5 p.m for $ 5 50 % off a # 1"),
        ("\u00c9clair caf\u00e9. \u201cNo\u201d\u2026", "\u00e9clair caf\u00e9 no"),
        (" . - '", ""),
        ("", ""),
    ],
)
def test_captions_are_split_as_coco_does(text, words):
    assert tokens(text) == words.split()
    assert tokens(words) == words.split(), "and once more changes nothing"
