"""Runs that differ in their seed alone, laid over each other: one table over seeds and queries, and when there is none.

The runs are copies of one whose scores are changed at random, so that nothing is trained here."""

import json
import re
import shutil

import numpy as np
import pytest
from helpers import INFERENCE, RUN, run_here

from lever_lm.evaluation.report.curves import Evaluated
from lever_lm.evaluation.report.seeds import over_seeds
from lever_lm.evaluation.results import last_evaluation
from lever_lm.evaluation.statistics import interval_over_seeds
from lever_lm.training.run_dir import RunFolder, inference_folder

QUERIES = 24  # as in conftest.py
RUNS = [RUN.with_name(f"seed{seed}") for seed in range(3)]


def edit(path, change):
    """Replace the object in a JSON file by what `change` makes of it."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def seeded_once(evaluated_once, tmp_path_factory):
    """A folder with three runs of the seeds 0, 1, 2."""
    folder, rng = tmp_path_factory.mktemp("seeded"), np.random.default_rng(0)
    shutil.copytree(evaluated_once, folder, dirs_exist_ok=True)
    for seed, run in enumerate(RUNS):
        shutil.copytree(folder / RUN, folder / run)
        shutil.copytree(folder / INFERENCE, folder / INFERENCE.with_name(run.name))
        config = folder / run / "config.yaml"
        config.write_text(re.sub("(?m)^seed: .*$", f"seed: {seed}", config.read_text()))
        evaluation = last_evaluation(folder / INFERENCE.with_name(run.name))
        for path in evaluation.glob("samples_*.jsonl"):
            rows = rows_of(path)
            write_rows(path, [row | {"accuracy": float(rng.integers(0, 2))} for row in rows])
        edit(evaluation / "metrics.json", lambda found, seed=seed: found | {"policies": {"grpo": f"digest {seed}"}})
    return folder


@pytest.fixture
def seeded(seeded_once, tmp_path, monkeypatch):
    """A folder of the test's own with the same, which is the current one."""
    shutil.copytree(seeded_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluation_of(run):
    return last_evaluation(inference_folder(run))


def found():
    return over_seeds([Evaluated(RunFolder(run), evaluation_of(run)) for run in RUNS])


def test_the_command_tables_what_all_seeds_evaluated(seeded, lever):
    done = lever("report", "--compare", *RUNS, "--json")
    assert done.status == 0, done.err
    results = json.loads((evaluation_of(RUNS[0]) / "metrics.json").read_text())["results"]
    rows = done.json["seeds"]
    assert {(row["method"], row["shots"]) for row in rows} == {(row["method"], row["shots"]) for row in results}
    for row in rows:
        name = f"samples_{row['method']}_{row['shots']}shot.jsonl"
        scores = [[one["accuracy"] for one in rows_of(evaluation_of(run) / name)] for run in RUNS]
        counts = {"method": row["method"], "shots": row["shots"], "seeds": 3, "n": QUERIES}
        assert row == counts | interval_over_seeds(scores)
    assert "differ in their seed alone: 0, 1, 2" in done.err
    page = " ".join((seeded / RUNS[0] / "report.html").read_text().split())
    assert "<h3>Over 3 seeds</h3>" in page
    assert f"on the {QUERIES} queries that all answered" in page
    row = next(row for row in rows if (row["method"], row["shots"]) == ("grpo", 2))
    numbers = [f"{100 * row[name]:.1f}" for name in ("mean", "low", "high", "seed_std")]
    assert '{} % <span class="ci">{}–{}, ± {}</span>'.format(*numbers) in page


def test_the_terminal_has_the_table_too(seeded, lever):
    done = lever("report", "--compare", *RUNS)
    assert "over 3 seeds, with 95 % intervals over seeds and queries" in done.out
    row = next(row for row in found().rows if (row["method"], row["shots"]) == ("grpo", 2))
    line = next(line for line in done.out.splitlines() if re.match(r"\W*grpo\W+2\b", line))
    assert re.findall(r"\d\.\d+", line) == [f"{row[name]:.3f}" for name in ("mean", "low", "high", "seed_std")]


def test_only_queries_that_all_answered_with_the_same_references_count(seeded):
    name = "samples_grpo_2shot.jsonl"
    one, two = (evaluation_of(run) / name for run in RUNS[1:])
    write_rows(one, rows_of(one)[1:])
    first, *others, last = rows_of(two)
    write_rows(two, [first, *others, last | {"references": ["another"]}])
    over = found()
    assert {row["n"] for row in over.rows if (row["method"], row["shots"]) == ("grpo", 2)} == {QUERIES - 2}
    assert {row["n"] for row in over.rows if row["method"] != "grpo"} == {QUERIES}
    assert any("without --limit" in note for note in over.notes)
    for path in evaluation_of(RUNS[2]).glob("samples_*.jsonl"):
        write_rows(path, [row | {"question_id": 10**9 + row["question_id"]} for row in rows_of(path)])
    assert found().rows == []
    assert "without --limit" in found().notes[0]


def test_methods_that_some_run_lacks_are_left_out(seeded):
    without = lambda found: found | {"results": [r for r in found["results"] if r["method"] != "random"]}  # noqa: E731
    edit(evaluation_of(RUNS[1]) / "metrics.json", without)
    methods = {row["method"] for row in found().rows}
    assert "random" not in methods
    assert {"grpo", "zero_shot", "oracle"} < methods


def test_scores_beyond_what_can_be_drawn_make_no_row(seeded):
    path = evaluation_of(RUNS[1]) / "samples_grpo_1shot.jsonl"
    write_rows(path, [row | {"accuracy": 9e299} for row in rows_of(path)])
    assert ("grpo", 1) not in [(row["method"], row["shots"]) for row in found().rows]


def test_what_the_interval_does_not_hold_is_said(seeded):
    notes = " ".join(found().notes)
    assert "the same rollouts" in notes  # the runs are copies
    assert "the same policy" not in notes
    assert "3 seeds are few" in notes
    for run in RUNS:
        edit(evaluation_of(run) / "metrics.json", lambda found: found | {"policies": {"grpo": "one"}})
        edit(run / "env.json", lambda found, run=run: found | {"inputs": {"rollouts": run.name}})
    notes = " ".join(found().notes)
    assert "the same policy in all the runs: GRPO" in notes
    assert "the same rollouts" not in notes


def test_names_places_and_speed_may_differ(seeded):
    config = RUNS[1] / "config.yaml"
    text = re.sub("device: .*", "device: cpu", config.read_text())
    config.write_text(re.sub("(  okvqa_path: ).*", r"\g<1>elsewhere", text))
    assert found().seeds == [0, 1, 2]


def config_of_another_shape():
    config = RUNS[2] / "config.yaml"
    config.write_text(re.sub("hidden_dim: .*", "hidden_dim: 7", config.read_text()))


def seed_again():
    config = RUNS[2] / "config.yaml"
    config.write_text(re.sub("(?m)^seed: .*$", "seed: 1", config.read_text()))


def other_data():
    edit(RUNS[2] / "env.json", lambda found: found | {"fingerprints": {"data": "other"}})


def stemmed():
    edit(evaluation_of(RUNS[2]) / "metrics.json", lambda found: found | {"okvqa_stem": True})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (config_of_another_shape, "the configs differ in policy.hidden_dim too"),
        (seed_again, "seed2 has the seed of a run before it"),
        (other_data, "different data"),
        (stemmed, "infer.okvqa_stem"),
        (lambda: shutil.rmtree(inference_folder(RUNS[2])), "lever infer --baselines --run-name seed2"),
        (lambda: (RUNS[2] / "config.yaml").unlink(), "seed2 has no config.yaml"),
        (lambda: (RUNS[2] / "config.yaml").write_text("seed: [[1], {}]"), "seed2 has no config.yaml that names"),
    ],
)
def test_other_runs_make_no_table_and_it_is_said_why(seeded, change, said):
    change()
    over = found()
    assert over.rows == over.seeds == []
    assert said in over.notes[0]


def test_runs_of_one_seed_are_compared_as_before(compared_once, tmp_path):
    page = tmp_path / "page.html"
    others = ("--compare", "--json", "--output", page)
    done = run_here("report", RUN, RUN.with_name("other"), *others, cwd=compared_once)
    assert done.json["seeds"] == []
    assert "over seeds" not in done.err
    assert "Over 2 seeds" not in page.read_text()
