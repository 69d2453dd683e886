"""The rows of `lever diagnose`, by hand, with an LVLM that copies the answer that stands nearest the query."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from lever_lm.evaluation.diagnose import ORDERS, Diagnosis
from lever_lm.evaluation.evaluate import Evaluation
from lever_lm.tasks.vqa_metrics import normalize_answer, vqa_accuracy

QUERIES, SHOTS = 30, 3


class Copier:
    """Answers with the answer of the last demonstration, and without any with what is asked first: a fixed word."""

    def __init__(self):
        self.prompts = {}

    def answer(self, prompts, what):
        self.prompts.setdefault(what, list(prompts))
        return [prompt.icds[-1].answer if prompt.icds else "bare" if prompt.bare else "cuatro" for prompt in prompts]


@pytest.fixture(scope="module")
def diagnosed(digits_config, digits, digits_features):
    """The evaluation, its picks, the LVLM, and the findings by key."""
    config = dataclasses.replace(digits_config, infer=dataclasses.replace(digits_config.infer, num_queries=QUERIES))
    evaluation, lvlm = Evaluation(config, digits, digits_features), Copier()
    picks = evaluation.select("img_text_sim", SHOTS)
    found = Diagnosis(evaluation, lvlm, picks, SHOTS, ("another", Copier())).findings()
    return evaluation, picks, lvlm, {one.key: one for one in found}


def accuracy(evaluation, predictions):
    pairs = zip(predictions, evaluation.queries, strict=True)
    return np.mean([vqa_accuracy(text, query.answers) for text, query in pairs])


def answers(evaluation, rows):
    return [evaluation.data.train_examples[row].answer for row in rows]


def test_an_accuracy_is_that_of_the_answers_to_the_changed_prompts(diagnosed):
    evaluation, picks, _, found = diagnosed
    first, last = (accuracy(evaluation, [answers(evaluation, p)[i] for p in picks]) for i in (0, -1))
    for key in ("picks", "copy_first", "images_removed", "images_shuffled", "images_replaced", "other_lvlm"):
        assert found[key].value == pytest.approx(first), key
    assert found["reversed"].value == pytest.approx(last)
    assert found["zero_shot"].value == pytest.approx(accuracy(evaluation, ["cuatro"] * QUERIES))
    assert found["zero_shot_bare"].value == pytest.approx(accuracy(evaluation, ["bare"] * QUERIES))
    votes = [Counter(answers(evaluation, p)).most_common(1)[0][0] for p in picks]
    assert found["majority_vote"].value == pytest.approx(accuracy(evaluation, votes))
    assert found["reversed"].test["difference"] == pytest.approx(first - last)
    assert found["copy_first"].test["difference"] == 0


def test_the_changed_prompts_differ_in_what_they_say_alone(diagnosed):
    _, _, lvlm, _ = diagnosed
    plain = lvlm.prompts["picks"]

    def parts(prompts, name):
        return [[getattr(icd, name) for icd in prompt.icds] for prompt in prompts]

    for label, changed, kept in (
        ("images of demonstrations removed", "image", ("question", "answer")),
        ("images shuffled among them", "image", ("question", "answer")),
        ("images replaced by others", "image", ("question", "answer")),
        ("answers shuffled among them", "answer", ("question", "image")),
        ("answers replaced by others", "answer", ("question", "image")),
    ):
        for name in kept:
            assert parts(lvlm.prompts[label], name) == parts(plain, name), label
        before, after = parts(plain, changed), parts(lvlm.prompts[label], changed)
        assert before != after, label
        if "shuffled" in label:
            assert [Counter(part) for part in before] == [Counter(part) for part in after]
            for ours, theirs in zip(before, after, strict=True) if changed == "image" else ():
                assert not any(a == b for a, b in zip(ours, theirs, strict=True) if ours.count(a) == 1)
    removed = parts(lvlm.prompts["images of demonstrations removed"], "image")
    assert {image for part in removed for image in part} == {None}
    assert [prompt.query for prompt in plain] == [prompt.query for prompt in lvlm.prompts["zero-shot"]]


def test_what_is_copied_beyond_the_answers_that_come_without_demonstrations(diagnosed):
    evaluation, picks, _, found = diagnosed
    shown = [set(map(normalize_answer, answers(evaluation, p))) for p in picks]
    without = np.mean([normalize_answer("cuatro") in part for part in shown])
    one = found["excess_copy"]
    assert one.value == pytest.approx(1 - without)
    assert (one.parts["rate"], one.parts["zero_shot_rate"]) == pytest.approx((1, without))
    assert len(one.parts["by_place"]) == SHOTS


def test_the_accuracy_is_split_by_whether_a_right_answer_was_shown(diagnosed):
    evaluation, picks, _, found = diagnosed
    right = np.array(
        [
            any(vqa_accuracy(text, query.answers, always_normalize=True) > 0 for text in answers(evaluation, p))
            for p, query in zip(picks, evaluation.queries, strict=True)
        ]
    )
    scores = np.array(
        [vqa_accuracy(answers(evaluation, p)[0], q.answers) for p, q in zip(picks, evaluation.queries, strict=True)]
    )
    one = found["answer_in_context"]
    assert one.value == pytest.approx(right.mean())
    assert one.parts["accuracy_with"] == pytest.approx(scores[right].mean())
    assert one.parts["accuracy_without"] == pytest.approx(scores[~right].mean())


def test_orders_and_the_most_picked_are_asked(diagnosed):
    evaluation, picks, _, found = diagnosed
    assert 0 < found["order_sensitivity"].value < 0.3
    assert found["order_sensitivity"].label == f"spread over {ORDERS} orders"
    counts = Counter(row for p in picks for row in p)
    popular = sorted(counts, key=lambda row: (-counts[row], row))
    first = [
        next(row for row in popular if evaluation.data.train_examples[row].image_id != query.image_id)
        for query in evaluation.queries
    ]
    expected = accuracy(evaluation, [evaluation.data.train_examples[row].answer for row in first])
    assert found["most_picked"].value == pytest.approx(expected)
    assert 0.9 < found["entropy"].value <= 1


def test_every_row_says_what_it_means_and_is_json(diagnosed):
    *_, found = diagnosed
    assert len(found) == 17
    for one in found.values():
        assert one.says.endswith(".")
        assert "None" not in one.says
        assert {"key", "label", "value", "says"} <= one.row().keys()


def test_one_shot_has_no_order(digits_config, digits, digits_features):
    config = dataclasses.replace(digits_config, infer=dataclasses.replace(digits_config.infer, num_queries=5))
    evaluation = Evaluation(config, digits, digits_features)
    found = Diagnosis(evaluation, Copier(), evaluation.select("random", 1), 1).findings()
    assert not {"reversed", "order_sensitivity", "other_lvlm"} & {one.key for one in found}
