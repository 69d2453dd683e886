"""Which epoch is best: the lineage's logs with their right answers, and logs with something wrong in them."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import CHECKOUT, clean_environment

from lever_lm.selectors.pointer.checkpoint import save_torch
from lever_lm.training.log_parser import read_log
from lever_lm.training.metrics import STRATEGIES, table_header, table_row
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.select_checkpoint import (
    best_row,
    check_strategy,
    choose,
    epochs_since_best,
    read_history,
    worth_keeping,
)
from lever_lm.utils.errors import LeverError, UsageError

GOLDEN = CHECKOUT / "tests/data" / "best_checkpoint"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))


def row(epoch, phase="grpo", **metrics):
    base = {
        "train_loss": 0.0,
        "val_loss": 5.0,
        "ppo_loss": 0.0,
        "kl": 0.05,
        "adv_std": 0.5,
        "adv_max": 1.0,
        "beta": 0.1,
    }
    return {"phase": phase, "epoch": epoch, **base, **metrics}


def log_text(rows, before=""):
    lines = [*table_header("grpo"), *(table_row(r) for r in rows)]
    return before + "".join(f"{line}\n" for line in lines)


def write_log(folder, text):
    path = folder / "train.log"
    path.write_bytes(text.encode("utf-8"))
    return path


def run_with(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return RunFolder(folder)


def pick(history, strategy="val_loss", run=None):
    return choose(history, strategy, run)["epoch"]


# ---------------------------------------------------------------------- golden logs


@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: f"{Path(case['log']).stem}-{case['strategy']}")
def test_golden_logs(case):
    history = read_log(GOLDEN / Path(case["log"]).name)
    answer = choose(history, case["strategy"], None)
    assert answer["rows"] == case["rows_in_log"]
    assert answer["epoch"] == case["correct_epoch"]
    assert answer["excluded"] == []
    others = {c["strategy"]: c["correct_epoch"] for c in EXPECTED if c["log"] == case["log"] and c is not case}
    assert {name: answer["others"][name] for name in others} == others


def test_golden_log_values():
    rows = read_log(GOLDEN / "normal_50.log").rows
    assert [r["epoch"] for r in rows] == list(range(1, 51))
    assert rows[0] == {
        "phase": "grpo",
        "epoch": 1,
        "train_loss": 0.00432,
        "val_loss": 5.12036,
        "ppo_loss": 0.00079,
        "kl": 0.02941,
        "adv_std": 0.006,
        "adv_max": 0.009,
        "beta": 0.12,
    }


# ---------------------------------------------------------------------- strategies


@pytest.mark.parametrize(
    ("strategy", "metric", "values", "epoch"),
    [
        ("val_loss", "val_loss", [3.0, 1.0, 2.0], 2),
        ("ppo_loss", "ppo_loss", [0.1, -0.2, -0.3], 3),
        ("kl", "kl", [0.09, 0.02, 0.06], 3),
        ("kl", "kl", [0.001, 0.1, 0.3], 2),  # the ends belong to the range
        ("kl", "kl", [0.01, 0.5, 0.0099], 1),
        ("adv_std", "adv_std", [0.2, 0.9, 0.3], 2),
        ("val_reward", "val_reward", [1.2, 1.1, 1.3], 3),
    ],
)
def test_every_strategy(tmp_path, strategy, metric, values, epoch):
    run = run_with(tmp_path, [row(i, **{metric: value}) for i, value in enumerate(values, 1)])
    assert pick(read_history(run, None), strategy) == epoch


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_first_of_equal_epochs_wins(tmp_path, strategy):
    run = run_with(tmp_path, [row(i, val_reward=1.0, val_top_reward=1.0, val_accuracy=1.0) for i in (1, 2, 3)])
    assert pick(read_history(run, None), strategy) == 1


def test_best_row_is_none_where_nothing_qualifies():
    assert best_row([], STRATEGIES["val_loss"]) is None
    assert best_row([row(1, kl=0.5)], STRATEGIES["kl"]) is None
    rows = [row(1, val_loss=2.0), row(2, val_loss=math.nan), row(3, val_loss=1.0)]
    assert best_row(rows, STRATEGIES["val_loss"]) is rows[2]


def test_kl_never_in_range_names_the_nearest(tmp_path):
    run = run_with(tmp_path, [row(1, kl=0.3), row(2, kl=0.005), row(3, kl=0.2)])
    answer = choose(read_history(run, None), "kl", run)
    assert answer["epoch"] is answer["checkpoint"] is answer["metrics"] is None
    assert answer["exists"] is False
    assert "none in range" in answer["why"]
    assert "nearest is epoch 2 with 0.005" in answer["why"]
    assert answer["others"]["val_loss"] == 1


def test_rows_that_are_not_finite_are_excluded_and_said_so(tmp_path):
    values = [math.nan, math.inf, -math.inf, 4.0, None, "3", True]
    run = run_with(tmp_path, [row(i, val_loss=value) for i, value in enumerate(values, 1)])
    answer = choose(read_history(run, None), "val_loss", run)
    assert answer["epoch"] == 4
    assert answer["rows"] == 7
    assert answer["excluded"] == [
        {"epoch": 1, "why": "val_loss is nan"},
        {"epoch": 2, "why": "val_loss is inf"},
        {"epoch": 3, "why": "val_loss is -inf"},
        {"epoch": 5, "why": "no val_loss"},
        {"epoch": 6, "why": "no val_loss"},
        {"epoch": 7, "why": "no val_loss"},
    ]


@pytest.mark.parametrize(
    ("broken", "number", "source"),
    [
        ("train_loss", math.nan, "metrics"),
        ("val_loss", math.inf, "checkpoints"),
        ("ppo_loss", -math.inf, "log"),
        ("kl", math.nan, "log"),
        ("adv_std", math.inf, "metrics"),
        ("adv_max", math.nan, "checkpoints"),
        ("beta", -math.inf, "metrics"),
    ],
)
def test_an_epoch_that_broke_is_chosen_by_no_strategy(tmp_path, broken, number, source):
    """Epoch 2 is the best by every metric, but for one number."""
    best = {"val_loss": 0.1, "ppo_loss": -9.0, "kl": 0.05, "adv_std": 9.0, "val_reward": 9.0, "val_top_reward": 9.0}
    best["val_accuracy"] = 9.0
    usual = {"val_loss": 1.0, "ppo_loss": 0.0, "kl": 0.03, "adv_std": 1.0, "val_reward": 1.0, "val_top_reward": 1.0}
    usual["val_accuracy"] = 1.0
    rows = [row(1, **usual), row(2, **{**best, broken: number}), row(3, **{**usual, "val_loss": 0.5})]
    if source == "log":
        run, history = None, read_log(write_log(tmp_path, log_text(rows)))
    else:
        run = run_with(tmp_path, rows)
        if source == "checkpoints":
            for one in rows:
                save_torch(run.checkpoint("grpo", one["epoch"]), {"metrics": one})
            run.metrics.unlink()
        history = read_history(run, None)
    by_log = ("val_reward", "val_top_reward", "val_accuracy") if source == "log" else ()
    for name in STRATEGIES.keys() - by_log:
        answer = choose(history, name, run)
        assert answer["epoch"] == (3 if name == "val_loss" else 1)
        assert answer["excluded"] == [{"epoch": 2, "why": f"{broken} is {number}"}]
        assert answer["others"] == {
            other: None if other in by_log else 3 if other == "val_loss" else 1 for other in STRATEGIES if other != name
        }
    assert epochs_since_best(rows) == 2
    run = RunFolder(tmp_path)
    assert run.checkpoint("grpo", 2) not in worth_keeping(run, rows, latest=1)


def test_where_every_epoch_broke_or_is_out_of_range_none_is_chosen(tmp_path):
    rows = [row(1, kl=0.05, beta=math.nan), row(2, kl=0.2), row(3, kl=0.11, adv_max=math.inf)]
    history = read_history(run_with(tmp_path, rows), None)
    answer = choose(history, "kl", None)
    assert answer["epoch"] is None
    assert "nearest is epoch 2 with 0.2" in answer["why"]
    assert choose(read_history(run_with(tmp_path, rows[::2]), None), "val_loss", None)["epoch"] is None


def test_an_rce_row_is_judged_by_the_columns_it_has(tmp_path):
    rows = [
        {"phase": "rce", "epoch": i, "train_loss": t, "val_loss": v} for i, t, v in ((1, math.nan, 1.0), (2, 1, 2.0))
    ]
    answer = choose(read_history(run_with(tmp_path, rows), None), "val_loss", None)
    assert (answer["epoch"], answer["excluded"]) == (2, [{"epoch": 1, "why": "train_loss is nan"}])


def test_a_metric_nobody_logged_has_no_best_epoch(tmp_path):
    history = read_history(run_with(tmp_path, [row(1)]), None)
    answer = choose(history, "val_reward", None)
    assert answer["epoch"] is None
    assert "no epoch has a finite val_reward" in answer["why"]


def test_the_answer_names_the_checkpoint_and_whether_it_is_there(tmp_path):
    run = run_with(tmp_path, [row(1, val_loss=9.0), row(2, val_loss=1.0, note=7)])
    answer = choose(read_history(run, None), "val_loss", run)
    assert (answer["checkpoint"], answer["exists"]) == (str(tmp_path / "grpo_epoch2.pt"), False)
    assert answer["metrics"]["val_loss"] == 1.0
    assert not {"epoch", "phase"} & answer["metrics"].keys()
    run.checkpoint("grpo", 2).touch()
    assert choose(read_history(run, None), "val_loss", run)["exists"] is True
    assert set(answer) >= {"strategy", "epoch", "checkpoint", "exists", "metrics", "rows", "excluded", "others"}
    assert answer["others"].keys() == STRATEGIES.keys() - {"val_loss"}


def test_an_unknown_strategy_is_refused_with_the_known_ones():
    with pytest.raises(
        UsageError, match=r"unknown strategy 'best': one of val_loss, ppo_loss, kl, adv_std, val_reward"
    ):
        check_strategy("best")


# ---------------------------------------------------------------------- logs


def test_signed_and_scientific_numbers(tmp_path):
    text = log_text([]) + (
        "     1      -0.00432      5.12036e+00      -7.9e-04    2.941E-02     +0.0060     .009   1e-1\n"
        "     2      1.      -1e-05      1e3    0.06     0     0   0\n"
    )
    rows = read_log(write_log(tmp_path, text)).rows
    assert [r["val_loss"] for r in rows] == [5.12036, -1e-05]
    assert (rows[0]["ppo_loss"], rows[0]["kl"], rows[0]["adv_std"], rows[0]["adv_max"]) == (
        -7.9e-4,
        0.02941,
        0.006,
        0.009,
    )
    assert (rows[1]["ppo_loss"], rows[0]["beta"]) == (1000.0, 0.1)


def test_rows_with_nan_and_inf_are_read_and_excluded(tmp_path):
    text = log_text([]) + (
        "     1      nan      nan      nan    nan     0.1     0.1   0.1\n"
        "     2      1.0      4.0      -inf    0.05     0.1     0.1   0.1\n"
        "     3      1.0      5.0      Infinity    NaN     0.1     0.1   0.1\n"
        "     4      1.0      6.0      0.5    0.3     0.1     0.1   0.1\n"
    )
    history = read_log(write_log(tmp_path, text))
    assert len(history.rows) == 4
    assert pick(history, "val_loss") == 4
    assert pick(history, "ppo_loss") == 4
    assert [e["epoch"] for e in choose(history, "ppo_loss", None)["excluded"]] == [1, 2, 3]


def test_a_table_is_read_by_the_names_in_its_heading_and_without_one_by_the_seeds_columns(tmp_path):
    rows = [row(1), row(2, kl=0.07)]
    marker, names, rule, *lines = log_text(rows).splitlines()
    beside = [f"{names[:7]}   Entropy{names[7:]}", rule, *(f"{line[:6]}   1.23456{line[6:]}" for line in lines)]
    for found in ([names, rule, *lines], beside, lines):
        assert read_log(write_log(tmp_path, "\n".join([marker, *found, ""]))).rows == rows


def test_rows_of_another_table_after_the_last_grpo_table_are_none_of_it(tmp_path):
    rce = [*table_header("rce"), table_row({"phase": "rce", "epoch": 1, "train_loss": 1.0, "val_loss": 1.0}), ""]
    assert read_log(write_log(tmp_path, log_text([row(1)]) + "\n".join(rce))).rows == [row(1)]


def test_of_two_runs_in_one_log_the_last_counts_and_it_says_so(tmp_path):
    first = log_text([row(1, val_loss=0.1), row(2, val_loss=0.2)])
    second = log_text([row(1, val_loss=9.0), row(2, val_loss=8.0), row(3, val_loss=8.5)])
    history = read_log(write_log(tmp_path, first + second))
    assert [r["val_loss"] for r in history.rows] == [9.0, 8.0, 8.5]
    assert history.notes == ["the log holds 2 GRPO tables: the last one counts"]


def test_a_cut_last_row_is_ignored_and_said_so(tmp_path):
    text = log_text([row(1, val_loss=3.0), row(2, val_loss=2.0), row(3, val_loss=1.0)])
    history = read_log(write_log(tmp_path, text[:-1]))  # whole but for its newline: it could be cut all the same
    assert [r["epoch"] for r in history.rows] == [1, 2]
    assert "cut short" in history.notes[0]
    shorter = read_log(write_log(tmp_path, text[:-30]))
    assert [r["epoch"] for r in shorter.rows] == [1, 2]
    whole = read_log(write_log(tmp_path, text))
    assert len(whole.rows) == 3
    assert whole.notes == []


def test_a_log_with_windows_line_ends_reads_the_same(tmp_path):
    text = (GOLDEN / "negative_ppo_50.log").read_text(encoding="utf-8")
    history = read_log(write_log(tmp_path, text.replace("\n", "\r\n")))
    assert history.rows == read_log(GOLDEN / "negative_ppo_50.log").rows
    assert history.notes == []


def test_lines_between_the_rows_do_no_harm(tmp_path):
    lines = log_text([row(1), row(2)]).splitlines()
    lines[4:4] = ["2024-01-01 12:00:00 saved grpo_epoch1.pt", "  7 of 9", "\x1b[2K 50%|#####"]
    rows = read_log(write_log(tmp_path, "\n".join(lines) + "\n")).rows
    assert [r["epoch"] for r in rows] == [1, 2]


def test_a_log_without_a_grpo_table_is_refused(tmp_path):
    for text in ("", "hello\n", log_text([])):
        with pytest.raises(LeverError, match=r"train\.log holds no row of a GRPO table"):
            read_log(write_log(tmp_path, text))
    with pytest.raises(LeverError, match=r"cannot read the log .*none\.log.*--log"):
        read_log(tmp_path / "none.log")


# ---------------------------------------------------------------------- where a run's metrics come from


def test_metrics_come_before_checkpoints_before_the_log(tmp_path):
    run = RunFolder(tmp_path)
    write_log(tmp_path, log_text([row(1), row(2, val_loss=3.0)]))
    assert pick(read_history(run, None)) == 2
    for epoch, loss in ((2, 3.0), (3, 2.0), (10, 2.5)):
        save_torch(run.checkpoint("grpo", epoch), {"metrics": {"val_loss": loss}})
    history = read_history(run, None)
    assert [r["epoch"] for r in history.rows] == [2, 3, 10]
    assert "checkpoints" in history.source
    assert pick(history) == 3
    run_with(tmp_path, [row(4)])
    assert pick(read_history(run, None)) == 4
    assert pick(read_history(run, tmp_path / "train.log")) == 2  # a log that is named comes first


def test_checkpoints_without_metrics_and_converted_ones_are_no_epochs(tmp_path):
    run = RunFolder(tmp_path)
    save_torch(run.checkpoint("grpo", 1), {"metrics": {}})
    save_torch(run.checkpoint("grpo", 2), {"epoch": 1})
    save_torch(tmp_path / "grpo_epoch3_v2format.ckpt", {"metrics": {"val_loss": 0.0}})
    save_torch(tmp_path / "grpo_epoch4_v3format.pt", {"metrics": {"val_loss": 0.0}})
    save_torch(run.checkpoint("grpo", 5), {"metrics": {"val_loss": 9.0}})
    assert [r["epoch"] for r in read_history(run, None).rows] == [5]


def test_grpo_rows_only_and_rce_rows_where_there_was_no_grpo(tmp_path):
    rce = [row(1, "rce", val_loss=0.5), row(2, "rce", val_loss=0.4), row(3, "rce", val_loss=0.6)]
    run = run_with(tmp_path, rce)
    answer = choose(read_history(run, None), "val_loss", run)
    assert (answer["epoch"], answer["phase"], answer["rows"]) == (2, "rce", 3)
    assert answer["checkpoint"] == str(tmp_path / "rce_epoch2.pt")
    run = run_with(tmp_path, [*rce, row(1, val_loss=9.0)])
    answer = choose(read_history(run, None), "val_loss", run)
    assert (answer["epoch"], answer["phase"], answer["rows"]) == (1, "grpo", 1)


def test_a_folder_with_nothing_and_no_folder_are_refused(tmp_path):
    with pytest.raises(
        LeverError, match=r"has no metrics\.jsonl, no checkpoint with metrics and no train\.log.*--log FILE"
    ):
        read_history(RunFolder(tmp_path), None)
    with pytest.raises(LeverError, match=r"no run folder .*absent: train first"):
        read_history(RunFolder(tmp_path / "absent"), None)
    with pytest.raises(LeverError, match="no run folder a run"):
        read_history(None, None)


# ---------------------------------------------------------------------- logs out of all bounds


@pytest.mark.parametrize("epoch", ["9" * 5000, "9" * 10, "٣" * 12], ids=["thousands", "ten", "arabic"])
def test_a_row_whose_epoch_is_no_number_of_an_epoch_is_no_row(tmp_path, epoch):
    text = log_text([row(1)]) + f"{epoch} 1 2 3 4 5 6 7\n"
    assert [r["epoch"] for r in read_log(write_log(tmp_path, text)).rows] == [1]


def test_numbers_of_any_length_take_no_time(tmp_path):
    lines = [
        "1 1 1 1 1 1 1 " + "1" * 60_000 + "x",
        "1 " * 30_000,
        " " * 60_000,
        "1" * 60_000,
        "1 " + "9" * 900 + " 1" * 6,
    ]
    begun = time.process_time()
    history = read_log(write_log(tmp_path, log_text([row(1)]) + "".join(f"{line}\n" * 20 for line in lines)))
    assert [r["epoch"] for r in history.rows] == [1] * 21
    assert math.isinf(history.rows[-1]["train_loss"])
    assert time.process_time() - begun < 10


def test_a_heading_after_a_progress_bar_without_line_ends_counts(tmp_path):
    bar = "\r 12%|###" * 20_000
    for shift in range(0, 40, 3):  # the heading lies across the border of what is looked at together
        text = log_text([row(7)]) + "x" * shift + bar[: 64 * 1024 - 20] + log_text([row(1), row(2)])
        assert [r["epoch"] for r in read_log(write_log(tmp_path, text)).rows] == [1, 2]


# What a log is made of: one line without an end, one row over and over, table after table, each going on.
GIANTS = {
    "line": "'x' * (1 << 20)",
    "row": "'not a row 1 2 3 4 5 6 7\\n' * 40_000",
    "tables": "(MARKER + '\\n1 0 0 0 0 0 0 0\\n') * 20_000",
    "headings": "(MARKER + '\\n') * 40_000",
    "bytes": "'\\udcff' * (1 << 20)",
}
CHILD = """
import resource, sys, time
from lever_lm.training.log_parser import GRPO_MARKER as MARKER, read_log
piece = ({piece}).encode("utf-8", "surrogateescape")
with open("giant.log", "wb") as file:
    for _ in range(max(1, {size} // len(piece))):
        file.write(piece)
    file.write((f"\\n{{MARKER}}\\n" + "1 0 5 0 0 0 0 0\\n").encode())
del piece
before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
assert [row["val_loss"] for row in read_log("giant.log").rows] == [5.0]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, time.process_time() - begun)
"""


def read_giant(folder, kind: str, size: int) -> tuple[float, float]:
    """MiB of memory and seconds that reading a log of `size` bytes takes in a process of its own."""
    code = CHILD.format(piece=GIANTS[kind], size=size)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=600
    )
    (folder / "giant.log").unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    memory, seconds = done.stdout.split()
    return float(memory), float(seconds)


@pytest.mark.parametrize(("kind", "size"), [("line", 100 << 20), ("tables", 8 << 20)])
def test_a_large_log_takes_little_memory(tmp_path, kind, size):
    memory, _ = read_giant(tmp_path, kind, size)
    assert memory < 50


@pytest.mark.slow
@pytest.mark.parametrize("kind", GIANTS)
def test_a_log_of_a_gigabyte_takes_little_memory(tmp_path, kind):
    memory, seconds = read_giant(tmp_path, kind, 1 << 30)
    print(f"{kind}: {memory:.0f} MiB, {seconds:.0f} s")
    assert memory < 300
