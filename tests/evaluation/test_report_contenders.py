"""The page's sections on other selectors and on what the demonstrations do: their values, and files that are broken."""

import html
import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import INFERENCE, RUN, run_here

from lever_lm.evaluation.findings_files import read_arena, read_diagnosis
from lever_lm.evaluation.report import contenders
from lever_lm.evaluation.report.svg import Dot, dot_chart
from lever_lm.evaluation.results import NOTHING, _write_metrics, method_of
from lever_lm.utils.errors import LeverError

QUERIES = 12
TEST = {"method": "grpo", "against": "random", "shots": 1, "difference": 0.1, "low": 0.0, "high": 0.2, "p": 0.2}


@pytest.fixture(scope="module")
def contested_once(evaluated_once, tmp_path_factory):
    """A folder in which `lever infer --against` and `lever diagnose` were run as well."""
    folder = tmp_path_factory.mktemp("contested")
    shutil.copytree(evaluated_once, folder, dirs_exist_ok=True)
    shots = ("infer", "--shots", "1,2", "--against", "random,img_text_sim,mmr,oracle,zero_shot")
    for words in (shots, ("diagnose", "--shots", "1", "--against", "img_text_sim")):
        done = run_here(*words, "--limit", QUERIES, cwd=folder)
        assert done.status == 0, done.err
    return folder


@pytest.fixture
def contested(contested_once, tmp_path):
    """A folder of the test's own with the same."""
    shutil.copytree(contested_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


def text(markup: str) -> str:
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", markup)).split())


def section(page: str, name: str) -> str:
    """The text of a section."""
    (found,) = re.findall(rf'<section aria-labelledby="{name}">(.*?)</section>', page, re.S)
    return text(found)


def changed(folder: Path, name: str, change) -> None:
    """Change a JSON file of the evaluation."""
    (path,) = (folder / INFERENCE).glob(f"grpo*/{name}.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


# ---------------------------------------------------------------------- real ones


def test_the_table_has_costs_accuracies_and_the_adjusted_tests_sorted(contested, lever):
    changed(contested, "metrics", lambda metrics: metrics["arena"].reverse())  # the page sorts by itself
    (path,) = (contested / INFERENCE).glob("grpo*/metrics.json")
    rows = json.loads(path.read_text())["arena"]
    assert lever("report").status == 0
    page = (contested / RUN / "report.html").read_text(encoding="utf-8")
    said = section(page, "arena")
    lines = re.search(r'aria-label="Selectors, with what they cost">.*?<tbody>(.*?)</tbody>', page, re.S)[1]
    lines = [text(line) for line in lines.split("</tr>") if line.strip()]
    last = sorted((row for row in rows if row["shots"] in (0, 2)), key=lambda row: (-row["accuracy"], row["method"]))
    assert [line.split()[0] for line in lines] == [row["method"] for row in last]
    assert {"grpo", "random", "mmr", "oracle", "zero_shot"} <= {row["method"] for row in last}
    for line, row in zip(lines, last, strict=True):
        calls = "not known" if row["train_calls"] is None else f"{row['train_calls']:,}"
        assert f"{row['method']} {row['chooses_from']} {calls} {row['query_calls']} {row['seconds']:.2f} " in line
        assert f"{percent(row['accuracy'])} {100 * row['ci'][0]:.0f}–{100 * row['ci'][1]:.0f}" in line
        if "against" in row:
            assert f"{points(row['difference'])} {points(row['low'])} to {points(row['high'])}" in line
            assert line.endswith("< 0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.3f}")
    tests = [row for row in rows if "against" in row]
    assert f"adjusted for all {len(tests)} tests of the table (Holm)" in said
    assert said.count(f"{QUERIES} queries") == 1
    assert page.count('<circle cx="', page.index('id="arena"'), page.index("Selectors, with")) == len(last)


def test_a_diagnosis_has_a_row_for_each_question_and_says_what_it_means_of_the_first_method(contested, lever):
    (path,) = (contested / INFERENCE).glob("grpo*/diagnosis.json")
    found = json.loads(path.read_text())
    assert lever("report").status == 0
    page = (contested / RUN / "report.html").read_text(encoding="utf-8")
    said = section(page, "diagnosis")
    assert f"{QUERIES} queries, 1 demonstration for each" in said
    grpo, other = ({row["key"]: row for row in found["methods"][name]} for name in ("grpo", "img_text_sim"))
    assert grpo.keys() == other.keys() >= {"picks", "zero_shot", "answers_replaced", "entropy"}
    for key, row in grpo.items():
        cell = percent(row["value"])
        if "test" in row:
            cell += f" {points(row['test']['difference'])}{' *' if row['test']['p'] < 0.05 else ''}"
        assert f"{row['label']} {cell} {percent(other[key]['value'])}" in said
        assert row["says"] in said
    assert "trained again since" not in said
    (chosen,) = (contested / INFERENCE).glob("grpo*/")
    shutil.copy(contested / RUN / "rce_epoch1.pt", contested / RUN / f"{chosen.name}.pt")
    assert lever("report").status == 0
    assert "trained again since" in section((contested / RUN / "report.html").read_text(encoding="utf-8"), "diagnosis")


def test_a_page_of_the_demos_results_has_both_from_the_checkpoints_own_folder(contested, lever):
    (own,) = (contested / INFERENCE).glob("grpo*/")
    for path in own.glob("*.json*"):
        if path.name != "diagnosis.json":
            shutil.copy(path, contested / INFERENCE)
    above = contested / INFERENCE / "metrics.json"
    above.write_text(json.dumps({**json.loads(above.read_text()), "arena": []}).replace('"arena": [], ', ""))
    for path in own.glob("samples_random_*"):
        path.unlink()
    done = lever("report")
    assert f"results: {INFERENCE} (" in done.out
    page = (contested / RUN / "report.html").read_text(encoding="utf-8")
    assert "mmr" in section(page, "arena")
    assert "as chosen" in section(page, "diagnosis")
    assert "trained again since" not in page
    shutil.copy(contested / RUN / "rce_epoch1.pt", contested / RUN / f"{own.name}.pt")
    assert lever("report").status == 0
    assert "trained again since" in section((contested / RUN / "report.html").read_text(encoding="utf-8"), "arena")


def test_without_either_the_page_has_neither_section(contested, lever):
    changed(contested, "metrics", lambda metrics: metrics.pop("arena"))
    (path,) = (contested / INFERENCE).glob("grpo*/diagnosis.json")
    path.unlink()
    assert lever("report").status == 0
    page = (contested / RUN / "report.html").read_text(encoding="utf-8")
    assert 'id="accuracy"' in page
    assert "#arena" not in page
    assert "#diagnosis" not in page
    assert "Is it real?" not in page


def test_broken_parts_are_refused_with_the_file_and_what_to_run_and_texts_are_no_markup(contested, lever):
    hostile = '<script>alert(1)</script>"><b>'

    def poison(metrics):
        metrics["arena"][0] |= {"chooses_from": hostile, "method": hostile.replace("/", "")}

    changed(contested, "metrics", poison)
    changed(contested, "diagnosis", lambda found: found["methods"]["grpo"][0].update(label=hostile, says=hostile))
    changed(contested, "diagnosis", lambda found: found["methods"].update({hostile: found["methods"]["grpo"]}))
    assert lever("report").status == 0
    page = (contested / RUN / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 4
    changed(contested, "metrics", lambda metrics: metrics.update(arena=[{"method": "grpo"}]))
    done = lever("report")
    assert done.status == 1
    assert "metrics.json" in done.err
    assert "lever infer --against all" in done.err
    changed(contested, "metrics", lambda metrics: metrics.pop("arena"))
    changed(contested, "diagnosis", lambda found: found.update(methods={}))
    done = lever("report")
    assert done.status == 1
    assert "diagnosis.json" in done.err
    assert "lever diagnose" in done.err


def test_the_table_stays_after_an_inference_without_one_and_goes_with_a_policy_of_it(contested, tmp_path):
    (path,) = (contested / INFERENCE).glob("grpo*/metrics.json")
    before = json.loads(path.read_text())
    done = run_here("infer", "--shots", "3", "--limit", QUERIES, cwd=contested)
    assert done.status == 0, done.err
    assert "replaced" not in done.err
    after = json.loads(path.read_text())
    assert after["arena"] == before["arena"]
    assert after["policies"] == before["policies"]
    assert after["results"][:-1] == before["results"]
    assert (after["results"][-1]["method"], after["results"][-1]["shots"]) == ("grpo", 3)

    path = tmp_path / "metrics.json"
    result = {"method": "epr", "shots": 1, "accuracy": 0.5, "raw_accuracy": 0.5, "normalized_accuracy": 0.5, "n": 1}
    result |= {"ci": [0.0, 1.0]}
    facts = {"setting": "s", "arena": [], "policies": {"epr": "a", "grpo": "b"}, "tests": [{**TEST, "against": "epr"}]}
    _write_metrics(path, [result, {**result, "method": "random"}], facts, str)
    again = {"setting": "s", "policies": {"epr": "c", "grpo": "b"}, "tests": []}
    written = _write_metrics(path, [{**result, "shots": 2}], again, str)
    assert [(row["method"], row["shots"]) for row in written["results"]] == [("random", 1), ("epr", 2)]
    assert written["tests"] == []
    assert "arena" not in written
    assert list(written["policies"].items()) == [("epr", "c"), ("grpo", "b")]


def test_a_warm_up_is_called_by_the_selector_that_it_makes(contested, lever):
    config = contested / RUN / "config.yaml"
    for warmup, title in (("rce", "RCE warm-up"), ("match", "Warm-up: answer match")):
        config.write_text(re.sub(r"^warmup: .*$", f"warmup: {warmup}", config.read_text(), flags=re.M))
        assert lever("report").status == 0
        assert f"<h3>{title}</h3>" in (contested / RUN / "report.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------------- read by value

ROW = {"method": "mmr", "train_calls": None, "query_calls": 0, "seconds": 0.1, "chooses_from": "all 9", "shots": 2}
ROW |= {"accuracy": 0.5, "ci": [0.4, 0.6], "n": 10}
TESTED = {"against": "random", "difference": 0.1, "low": -0.1, "high": 0.3, "p": 0.2, "p_holm": 0.4}
FINDING = {"key": "picks", "label": "as chosen", "value": 0.5, "says": "What is compared."}
FOUND = {"n": 10, "shots": 2, "checkpoint": "grpo_epoch1.pt", "methods": {"grpo": [FINDING]}}


@pytest.mark.parametrize(
    "rows",
    [
        "all",
        [7],
        [{**ROW, "accuracy": float("nan")}],
        [{**ROW, "accuracy": 1e200}],
        [{**ROW, "accuracy": True}],
        [{**ROW, "ci": [0.1]}],
        [{**ROW, "train_calls": -1}],
        [{**ROW, "train_calls": 10**18}],
        [{**ROW, "seconds": float("inf")}],
        [{**ROW, "method": "../x"}],
        [{**ROW, "shots": "2"}],
        [{**ROW, "against": "random"}],
        [{**ROW, **TESTED, "p_holm": 2}],
        [ROW, ROW],
        [{**ROW, "method": f"m{i}", "shots": i} for i in range(100)],  # a table of ten thousand cells
    ],
)
def test_rows_that_are_none_of_ours_are_refused(tmp_path, rows):
    with pytest.raises(LeverError, match=r"metrics\.json: its `arena` .*run `lever infer --against all` again"):
        read_arena(tmp_path, {"arena": rows})


def test_a_method_alone_a_learned_one_without_known_calls_and_one_that_is_not_in_the_table_are_shown(tmp_path):
    rows = [ROW, {**ROW, **TESTED, "method": "new"}, {**ROW, "method": "random", "shots": 1}]
    assert read_arena(tmp_path, {"arena": rows}) == rows
    assert read_arena(tmp_path, {}) == []
    assert contenders.arena([], "grpo") is None
    shown = contenders.arena(rows, "new")
    assert [line["method"] for line in shown["lines"]] == ["mmr", "new"], "random has no result at the most shots"
    assert (shown["ours"]["method"], shown["ours"]["p"], shown["simple"]) == ("new", 0.4, "random")
    assert contenders.arena([ROW], None)["simple"] == ""


@pytest.mark.parametrize(
    "change",
    [
        {"methods": {}},
        {"methods": {"grpo": []}},
        {"methods": {"grpo": [FINDING, FINDING]}},
        {"methods": {"grpo": [{**FINDING, "value": 1e9}]}},
        {"methods": {"grpo": [{**FINDING, "says": None}]}},
        {"methods": {"grpo": [{**FINDING, "interval": [0, "1"]}]}},
        {"methods": {"grpo": [{**FINDING, "test": {"difference": 0.1}}]}},
        {"methods": {"grpo": {"picks": FINDING}}},
        {"n": -1},
        {"shots": None},
        {"checkpoint": 3},
        {"policies": []},
    ],
)
def test_a_diagnosis_that_is_none_of_ours_is_refused(tmp_path, change):
    (tmp_path / "diagnosis.json").write_text(json.dumps({**FOUND, **change}))
    with pytest.raises(LeverError, match=r"diagnosis\.json is no diagnosis .*run `lever diagnose` again"):
        read_diagnosis(tmp_path, NOTHING)


def test_a_diagnosis_lies_beside_the_predictions_or_below_those_of_the_demo(tmp_path):
    metrics = {**NOTHING, "checkpoint": "results/x/grpo_epoch1.pt"}
    assert read_diagnosis(tmp_path, metrics) is None
    assert read_diagnosis(tmp_path, {**metrics, "checkpoint": "x" * 5000 + "\0.pt"}) is None
    (tmp_path / "grpo_epoch1").mkdir()
    (tmp_path / "grpo_epoch1/diagnosis.json").write_text(json.dumps(FOUND))
    assert read_diagnosis(tmp_path, metrics) == {**FOUND, "policies": {}}
    (tmp_path / "diagnosis.json").write_text("{")
    with pytest.raises(LeverError, match=r"diagnosis\.json is no diagnosis"):
        read_diagnosis(tmp_path, metrics)


# ---------------------------------------------------------------------- by hand


def test_the_method_of_an_evaluation_is_that_of_its_newest_tests_else_of_its_last_policy():
    results = [{"method": name} for name in ("random", "grpo", "answer_match", "rce")]
    tests = [{"method": "grpo"}, {"method": "answer_match"}]
    assert method_of({**NOTHING, "results": results, "tests": tests}) == "answer_match"
    assert method_of({**NOTHING, "results": results, "policies": {"grpo": "", "rce": ""}}) == "rce"
    assert method_of({**NOTHING, "results": results}) == "grpo"
    assert method_of({**NOTHING, "results": results[:1], "tests": [{"method": "random"}]}) is None


def test_dots_stand_in_rows_where_their_numbers_say():
    dots = [Dot("<b>", "m_grpo", 80.0, 70.0, 90.0, True), Dot("other" * 20, "m_rce", 40.0, 20.0, 60.0)]
    svg = dot_chart(dots, title='"<i>', across="accuracy", show="{:.1f}".format, mark=40.0)
    circles = [tuple(map(float, pair)) for pair in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    whiskers = [tuple(map(float, pair)) for pair in re.findall(r'class="whisker" x1="([\d.]+)" x2="([\d.]+)"', svg)]
    mark = float(re.search(r'flat"><line x1="([\d.]+)"', svg)[1])
    (first, above), (second, below) = circles
    assert above < below
    assert first > second == mark
    assert sum(whiskers[0]) / 2 == pytest.approx(first, abs=0.1)
    assert whiskers[1][1] - whiskers[1][0] == pytest.approx(2 * (whiskers[0][1] - whiskers[0][0]), abs=0.3)
    assert "<title>&lt;b&gt;: 80.0 [70.0, 90.0]</title>" in svg
    assert "<b>" not in svg
    assert "<i>" not in svg
    width = float(re.search(r'viewBox="0 0 (\d+)', svg)[1])
    assert all(0 <= x <= width for pair in (*whiskers, (first, second)) for x in pair)
    one = dot_chart([Dot("one", "m_grpo", 0.0, 0.0, 0.0)], title="t", across="x", show=str)
    assert "nan" not in one
