"""The ablation's own arithmetic: what it says of runs is computed here by hand."""

import json
import math

import pytest


@pytest.fixture
def report(script):
    return script("ablation_report")


@pytest.fixture
def ablate(script):
    return script("ablate")


def epochs(rce, grpo, **metrics):
    """Epochs of a run: true reward after each, the greedy one .1 above, val_reward half of it."""
    base = dict.fromkeys(("val_loss", "ppo_loss", "kl", "adv_std", "val_top_reward"), 1.0)
    base |= dict.fromkeys(("frac_reward_zero_std", "zero_grad_frac", "clip_frac", "kl_share"), 0.5)
    return [
        {**base, "phase": name, "epoch": i, "true_reward": x, "true_greedy": x + 0.1, "val_reward": x / 2, **metrics}
        for name, values in (("rce", rce), ("grpo", grpo))
        for i, x in enumerate(values, 1)
    ]


def test_the_interval_is_students(report):
    mean, low, high = report.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert high - mean == pytest.approx(4.303 * 1.0 / math.sqrt(3))
    assert mean - low == pytest.approx(high - mean)
    assert report.interval([5.0])[0] == 5.0
    assert math.isnan(report.interval([5.0])[1])


def test_rank_correlation_by_hand(report):
    assert report.ranks([3.0, 1.0, 3.0]).tolist() == [1.5, 0.0, 1.5]
    assert report.spearman([1, 2, 3, 4], [10, 100, 1000, 1e6]) == pytest.approx(1)
    assert report.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # d = 1, 1, 2 and 0: 1 − 6 · 6 / (4 · 15)
    assert report.spearman([1, 2, 3, 4], [2, 3, 1, 4]) == pytest.approx(1 - 36 / 60)
    assert math.isnan(report.spearman([1, 1, 1], [1, 2, 3]))


def test_a_run_is_read_at_rces_end_grpos_end_and_where_each_metric_points(report):
    rows = epochs([0.5, 0.8], [0.9, 1.2, 1.0])
    rows[3]["val_loss"], rows[4]["kl"] = 0.5, 0.1
    found = report.points({"rows": rows}, "true_reward")
    assert found["rce"] == 0.8
    assert found["last"] == 1.0
    assert found["best"] == found["val_reward"] == found["val_loss"] == 1.2
    assert found["kl"] == 1.0
    assert found["adv_std"] == 0.9  # the first of equals


def written(tmp_path, report, rows):
    """A results folder with runs of two rows over three seeds."""
    (tmp_path / "ablation").mkdir()
    for row, gain in rows.items():
        for seed in range(3):
            run = {"world": "synthetic", "row": row, "seed": seed}
            run["rows"] = epochs([0.8], [0.8 + gain * 0.5, 0.8 + gain + 0.01 * seed])
            run["signals"] = {"hard_only": {"all": 1.0, "top 3": 0.1, "top 5": 0.4 if gain > 0 else 0.6}}
            report.run_file(tmp_path, "synthetic", row, seed).write_text(json.dumps(run))
    return report.load(tmp_path, {"synthetic": {row: {} for row in rows}})


def test_the_claims_follow_the_runs(report, tmp_path):
    lines = report.claims(written(tmp_path, report, {"ours": 0.1, "classic in full": -0.2}))
    said = {line.split(" | ")[0].strip("| "): line.endswith("| yes |") for line in lines[2:]}
    assert said["synthetic, hard_only: Adv Std of classic's best 5 is less than half of that of all rollouts"]
    assert said["classic's GRPO ends below its RCE (expected)"]
    assert said["ours, expected: last epoch ≥ RCE − .005 on every seed"]
    assert said["ours, greedy: by val_reward within .02 of the best epoch"]
    assert said["rank correlation of val_reward with expected reward ≥ .8"]


def test_claims_that_fail_are_said_to_fail(report, tmp_path):
    lines = report.claims(written(tmp_path, report, {"ours": -0.1, "classic in full": 0.2}))
    said = {line.split(" | ")[0].strip("| "): line.endswith("| yes |") for line in lines[2:]}
    assert not said["synthetic, hard_only: Adv Std of classic's best 5 is less than half of that of all rollouts"]
    assert not said["classic's GRPO ends below its RCE (expected)"]
    assert not said["ours, expected: last epoch ≥ RCE − .005 on every seed"]
    assert not said["ours, expected: last epoch above RCE on the mean"]


def test_the_table_holds_the_paired_gain_and_the_worst_seed(report, tmp_path):
    table = report.synthetic_table(written(tmp_path, report, {"ours": 0.1}), "true_reward")
    mean, low, high = report.interval([0.10, 0.11, 0.12])
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert cells[:4] == ["ours", "0.800", "0.910", "0.910"]
    assert cells[4] == f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    assert cells[5] == "+0.100"
    assert cells[7] == "0.000"


def test_the_summary_has_a_line_a_row_and_a_cell_a_world(report, tmp_path):
    lines = report.summary_table(written(tmp_path, report, {"ours": 0.1, "classic in full": -0.2}))
    ours = "+0.110 [{:+.3f}, {:+.3f}]".format(*report.interval([0.10, 0.11, 0.12])[1:])
    assert lines[2] == f"| ours | {ours} | {ours} |  |"
    assert lines[3].startswith("| classic in full | -0.190 [")


@pytest.mark.parametrize("world", ["synthetic", "digits"])
def test_every_row_is_a_config_that_differs_from_ours(ablate, world):
    ours = ablate.config_of(world, "ours", 3)
    assert (ours.seed, ours.device) == (3, "cpu")
    for row in set(ablate.ROWS[world]) - {"ours"}:
        same = ablate.config_of(world, row, 3) == ours
        assert same == (world == "synthetic" and row == "mostly random rollouts")  # whose world differs, not its config


def test_classic_is_the_recipe(ablate):
    config = ablate.config_of("synthetic", ablate.CLASSIC, 0).grpo
    assert (config.anchor, config.top_k, config.dropout, config.reference) == ("init", (3, 5), "new_only", "old")


def test_the_ablation_is_as_large_as_the_page_says(ablate):
    assert ablate.synthetic.World().queries == 800
    assert (ablate.UNSEEN, ablate.SHOTS) == (1000, [1, 2, 4])
