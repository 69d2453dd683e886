"""`lever report --png DIR`: figures whose lines are the run's numbers, whatever those and the names are."""

import importlib.util
import json

import matplotlib
import pytest
from helpers import RUN
from PIL import Image

from lever_lm.evaluation.report.curves import Evaluated, accuracy_series, training_curves
from lever_lm.evaluation.report.figures import _accuracy, _look, _training, write_plots
from lever_lm.training.run_dir import RunFolder
from lever_lm.utils.errors import LeverError

NAMES = ["accuracy.png", "accuracy.pdf", "training_rce.png", "training_rce.pdf"]
NAMES += ["training_grpo.png", "training_grpo.pdf"]


def result(method, shots, accuracy, low, high):
    scores = dict.fromkeys(("accuracy", "raw_accuracy", "normalized_accuracy"), accuracy)
    return {"method": method, "shots": shots, **scores, "n": 9, "ci": [low, high]}


RESULTS = [
    result("zero_shot", 0, 0.25, 0.2, 0.3),
    *(result("random", shots, 0.3, 0.2, 0.5) for shots in (1, 4)),
    *(result("grpo", shots, 0.5 + shots / 100, 0.4, 0.75) for shots in (4, 1)),
]
ROWS = [{"phase": "rce", "epoch": i, "train_loss": 1 / i, "val_loss": 2.0, "val_reward": 0.5} for i in (1, 2, 3)]
ROWS += [
    {"phase": "grpo", "epoch": i, "kl": kl, "val_reward": reward, "val_loss": 3.0 - i}
    for i, kl, reward in ((1, 0.02, 0.5), (2, 0.05, 0.9), (3, 0.3, 0.7))
]


def evaluated(folder, name="one", results=RESULTS, rows=ROWS) -> Evaluated:
    """A run folder with an evaluation in it."""
    path = folder / name
    (path / "inference").mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "inference/metrics.json").write_text(json.dumps({"results": results}))
    return Evaluated(RunFolder(path), path / "inference")


def test_accuracy_is_drawn_in_percent_with_its_interval_and_zero_shot_as_a_line():
    (axes,) = _accuracy(accuracy_series(RESULTS)).axes
    (zero,) = (line for line in axes.lines if list(line.get_ydata()) == [25.0, 25.0])
    assert list(zero.get_xdata()) == [0, 1]  # from edge to edge of the axes
    drawn = {bars.get_label(): bars for bars in axes.containers}
    random, grpo = drawn.values()
    assert grpo.lines[0].get_ydata() == pytest.approx([51.0, 54.0])  # by shots, not as in the file
    (whiskers,) = grpo.lines[2]
    assert [[y for _, y in ends] for ends in whiskers.get_segments()] == [pytest.approx([40.0, 75.0])] * 2
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "4"]
    there, here = (bars.lines[0] for bars in (random, grpo))
    assert there.get_xdata()[0] != here.get_xdata()[0]  # side by side: no whisker hides another
    for look in ("get_color", "get_marker", "get_linestyle"):
        assert getattr(there, look)() != getattr(here, look)(), "to be told apart without colours"


def test_no_two_of_a_dozen_lines_look_alike():
    assert len({(look["color"], look["marker"]) for look in map(_look, range(12))}) == 12


def test_training_marks_the_epoch_that_each_strategy_chooses():
    figure = _training(training_curves([("one", ROWS)])["grpo"])
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    rings = {
        name: [tuple(point) for ring in axes.collections for point in ring.get_offsets().tolist()]
        for name, axes in panels.items()
    }
    assert rings == {"val_reward": [(2.0, 0.9)], "KL": [(2.0, 0.05)], "validation loss": [(3.0, 0.0)]}
    for axes in panels.values():  # val_reward's choice runs through all panels
        assert [2, 2] in [list(line.get_xdata()) for line in axes.lines]
    line = next(line for line in panels["KL"].lines if len(line.get_xdata()) == 3)
    assert list(line.get_ydata()) == [0.02, 0.05, 0.3]


def test_runs_are_laid_over_each_other():
    figure = _training({"kl": training_curves([("one", ROWS), ("two", ROWS[:5])])["grpo"]["kl"]})
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [3, 2]  # and no choice through all panels
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["one", "chosen by this metric"]


def test_files_are_300_dpi_sized_for_a_column_and_the_same_again(tmp_path, monkeypatch):
    paths = write_plots([evaluated(tmp_path, rows=ROWS[:3])], tmp_path / "figures")
    assert [path.name for path in paths] == NAMES[:4]
    with Image.open(paths[0]) as picture:
        assert picture.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert "Software" not in picture.info
        assert 3.0 < picture.width / 300 < 3.4
    with Image.open(tmp_path / "figures/training_rce.png") as picture:
        assert 6.4 < picture.width / 300 < 7.0
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30.0)  # as a matplotlibrc of this machine may say
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "red")
    write_plots([evaluated(tmp_path, "again/one", rows=ROWS[:3])], tmp_path / "again")
    for path in paths:
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_hostile_numbers_and_names_are_drawn_or_left_out(tmp_path):
    values = [1e299, -1e299, float("nan"), float("inf"), 1e308, 10**18, "x", None, True, 5e-324]
    rows = [
        {"phase": "grpo", "epoch": 10**8 * i, "kl": value, "val_reward": value, "beta": 1e-300 * i}
        for i, value in enumerate(values)
    ]
    results = [result("a$\\frac{$_" * 30, 1, 1e299, -1e299, 1e299), result("_b", 10**15, -5.0, 3.0, 4.0)]
    one = evaluated(tmp_path, "_\u540d\x1b[31m$\\x{$\n", results, rows)
    paths = write_plots([one, evaluated(tmp_path, "$\\frac")], tmp_path / "figures")
    assert [path.name for path in paths] == NAMES
    assert all(path.stat().st_size > 5000 for path in paths)
    (axes,) = _accuracy(accuracy_series(results)).axes
    assert len(axes.containers) == 2


def test_the_command_writes_page_and_figures_of_what_there_is(lever, tmp_path):
    bare = evaluated(tmp_path, "bare", [result("zero_shot", 0, 0.3, 0.2, 0.4)], [])
    assert [path.name for path in write_plots([bare], tmp_path / "bare")] == NAMES[:2]
    evaluated(tmp_path, str(RUN), [], ROWS)
    (tmp_path / RUN / "inference/metrics.json").unlink()
    done = lever("report", str(RUN), "--png", "figures", "--json")
    assert done.status == 0, done.err
    assert done.json["figures"] == [f"figures/{name}" for name in NAMES[2:]]
    assert all((tmp_path / path).is_file() for path in done.json["figures"])
    with pytest.raises(LeverError, match=r"cannot write .*accuracy\.png"):
        write_plots([evaluated(tmp_path)], tmp_path / RUN / "metrics.jsonl")


def test_without_matplotlib_nothing_is_begun(lever, tmp_path, monkeypatch):
    evaluated(tmp_path, str(RUN), [], ROWS)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    done = lever("report", str(RUN), "--png", "figures")
    assert done.status == 1
    assert done.err == "lever: --png needs a package that is not there: pip install 'lever-lm[plots]'\n"
    assert not (tmp_path / "figures").exists()
    assert not (tmp_path / RUN / "report.html").exists()
