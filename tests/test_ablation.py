"""The ablation's own arithmetic: what it says of runs is computed here by hand."""

import argparse
import json
import math
from types import SimpleNamespace

import pytest
from helpers import ROLLOUTS

from lever_lm.training.warmup import MatchGroups
from lever_lm.utils.errors import UsageError


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


def test_a_claim_about_two_rows_is_paired_by_seed(report, tmp_path):
    (tmp_path / "ablation").mkdir()
    found = {
        "stateless": {0: 0.3, 1: 0.2, 2: 0.28},
        "mmr": {0: 0.7, 1: 0.65, 2: 0.69, 3: 0.1},
        "gate": {0: 0.1, 1: 0.2},
    }
    for row, seeds in found.items():
        for seed, accuracy in seeds.items():
            run = {"world": "digits_sets", "row": row, "seed": seed, "rows": []}
            run["accuracy"] = {f"grpo_best@{k}": accuracy for k in (1, 2, 4)}
            report.run_file(tmp_path, "digits_sets", row, seed).write_text(json.dumps(run))
    runs = report.load(tmp_path, {"digits_sets": found})
    pairs = ("digits_sets", "mmr", "grpo_best"), ("digits_sets", "stateless", "grpo_best")
    assert report.contrast(runs, *pairs, 2) == pytest.approx([0.4, 0.45, 0.41])
    assert report.contrast(runs, pairs[0], ("digits_sets", "stateless", "rce"), 2) == []
    lines = report.claims(runs)
    spread = "+0.420 [{:+.3f}, {:+.3f}]".format(*report.interval([0.4, 0.45, 0.41])[1:])
    assert f"| digits sets: mmr above no state, 2 shots | {spread} | yes |" in lines
    assert any(
        line.startswith("| digits sets: gate above no state, 2 shots | -0.100 [") and "**no**" in line for line in lines
    )
    assert not any("gru" in line for line in lines)
    page = report.write(tmp_path, {"digits_sets": found}).read_text()
    assert "## Digits sets" in page
    assert "## Digits: " not in page


def test_picks_of_the_own_style_are_counted_among_the_first_two(ablate):
    styles = ablate.codes.STYLES[:3]
    wording = ablate.codes.WORDINGS[0]
    asked = [SimpleNamespace(question=wording.format(style)) for style in styles]
    evaluation = SimpleNamespace(data=SimpleNamespace(train_examples=asked, val_examples=[asked[0]] * 4))
    picks = [[0, 1, 0], [0, 0], [1, 2, 0], [2, 0]]  # one, both, none, one
    assert ablate.of_style(evaluation, picks) == [0.25, 0.5, 0.25]


def test_of_sparse_matches_the_same_are_hidden_in_every_epoch(ablate, digits_config, digits, digits_features):
    groups, rows = MatchGroups(digits_config, digits, digits_features), list(range(60))
    left = {}
    for epoch in range(4):
        everything = groups.all(rows, epoch)
        with ablate.hidden(0.85):
            some = groups.all(rows, epoch)
        assert some.pools.tolist() == everything.pools.tolist()
        for row, pool, seen, there in zip(rows, some.pools.tolist(), some.rewards, everything.rewards, strict=True):
            for candidate, one, other in zip(pool, seen.tolist(), there.tolist(), strict=True):
                if other:
                    assert one in (0, other)
                    assert left.setdefault((row, candidate), one) == one
    assert sum(map(bool, left.values())) / len(left) == pytest.approx(0.15, abs=0.02)


# ---------------------------------------------------------------------- accuracy against calls


@pytest.fixture
def curve(script):
    return script("ablation_curve")


def options(curve, *words):
    parser = argparse.ArgumentParser()
    curve.add_options(parser)
    parser.add_argument("--seeds", type=int, default=5)
    return parser.parse_args(words)


def test_the_curve_is_as_large_as_it_says(curve):
    cells = curve.cells_of(options(curve))
    # 5 seeds, 5 numbers of queries, 3 sizes of groups with and without a probe, 3 trainings
    assert len(cells) == len(set(cells)) == 5 * 5 * 3 * 2 * 3
    assert (cells[0].queries, cells[0].group, cells[-1].queries, cells[-1].group) == (1200, 15, 75, 4)
    small = curve.cells_of(options(curve, "--seeds", "1", "--groups", "3", "4", "--probe", "3", "--training", "rce"))
    assert {(cell.group, cell.probe, cell.training) for cell in small} == {(4, 3, "rce")}  # a probe below the group


def test_a_smaller_setting_is_part_of_the_largest(curve):
    def entry(scores):
        return {"candidate_pool_ids": [7, 8], "pointer_candidates": [{"vqa_acc_score": score} for score in scores]}

    content = {"3": entry([1, 0, 1, 1, 1, 1]), "5": entry([0, 1, 0, 0, 0, 1]), "9": entry([0] * 6), "_meta": {}}
    found = curve.subset(content, [3, 5], group=6, probe=0)
    assert found == {"_meta": {"lvlm_calls": 12}, "3": content["3"], "5": content["5"]}
    # places 1, 3 and 5 of each; then 0 and 2 of these
    found = curve.subset(content, [3, 5], group=3, probe=0)
    assert found == {"_meta": {"lvlm_calls": 6}, "3": entry([0, 1, 1]), "5": entry([1, 0, 1])}
    found = curve.subset(content, [3, 9], group=3, probe=2)
    assert found == {"_meta": {"lvlm_calls": 5}, "3": entry([0, 1, 1]), "9": entry([0, 0])}


def test_a_subset_with_a_probe_is_the_file_that_rollout_makes(curve, lever, digits_folder):
    file = digits_folder / ROLLOUTS
    done = lever("rollout", "--limit", "8", "--set", "rollout.pool_size=16")
    assert done.status == 0, done.err
    content = json.loads(file.read_text())
    rows = curve.query_rows(6, 2504, 0)
    expected = curve.subset(content, rows, group=15, probe=4)
    done = lever("rollout", "--limit", "6", "--set", "rollout.pool_size=16", "--set", "rollout.probe=4", "--json")
    made = json.loads(file.read_text())
    assert done.json["rollouts"] == made["_meta"]["lvlm_calls"] == expected["_meta"]["lvlm_calls"]
    assert {**made, "_meta": None} == {**expected, "_meta": None}
    sizes = {len(made[str(row)]["pointer_candidates"]) for row in rows}
    assert 4 in sizes
    assert max(sizes) > 12


def test_calls_are_different_prompts(curve, numbered_prompts):
    class Model:
        def generate(self, prompts, what):
            return [what] * len(prompts)

    model, first = Model(), numbered_prompts[:2]
    calls = curve.counted(model, {curve.identity(first[0])})
    assert calls() == 1
    assert model.generate(numbered_prompts[:3], "online") == ["online"] * 3
    model.generate(numbered_prompts[1:5], "online")
    assert calls() == 5


def written_curve(folder, curve):
    """Two seeds of the reference and of a cheaper setting, whose GRPO is .016 below on one of them; and match."""
    folder.mkdir()
    for seed in range(2):
        for training, queries, group, probe, lower in (
            ("rce", 600, 15, 0, 0.0),
            ("rce", 300, 15, 4, 0.016 if seed else 0.0),
            ("match", 150, 15, 0, -0.1 - 0.02 * seed),
        ):
            grpo = 0.8 + 0.01 * seed - lower
            run = {"queries": queries, "group": group, "probe": probe, "training": training, "seed": seed, "untied": 90}
            run |= {"calls": queries * group - 10 * seed, "made_of": "x"}
            run["accuracy"] = {"rce@1": grpo - 0.1, "rce@2": 0.5, "grpo@1": grpo, "grpo@2": grpo}
            run["accuracy"] |= {f"0.1 {name}": value - 0.05 for name, value in run["accuracy"].items()}
            curve.Cell(queries, group, probe, training, seed).file(folder).write_text(json.dumps(run))


def test_the_curve_has_paired_differences_to_the_reference_and_to_the_warm_up(curve, report, tmp_path):
    folder = tmp_path / "curve_digits"
    written_curve(folder, curve)
    rows = {(row["curve"], row["queries"]): row for row in curve.summary(curve.load(folder))}
    assert list(rows) == [("RCE", 300), ("RCE", 600), ("RCE → GRPO", 300), ("RCE → GRPO", 600), ("match → GRPO", 150)]
    cheap, match = rows["RCE → GRPO", 300], rows["match → GRPO", 150]
    assert cheap["calls"] == 4495
    assert cheap["accuracy@1"] == pytest.approx(report.interval([0.8, 0.794]))
    assert cheap["against reference@1"] == pytest.approx(report.interval([0.05, 0.034]))
    assert cheap["against warm-up@1"] == pytest.approx((0.1, 0.1, 0.1))
    assert match["against reference@1"] == pytest.approx(report.interval([0.15, 0.17]))
    assert rows["RCE", 300]["against warm-up@1"] is None
    assert rows["RCE", 300]["against reference@1"][0] == pytest.approx(-0.058)

    page = curve.write(folder).read_text(encoding="utf-8")
    spread = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*report.interval([0.15, 0.17]))
    assert "as in 0.1: 0.755 at 1 shot, 0.755 at 2 shots.\n" in page
    assert f"| match → GRPO | 150 | 15 | off | 2,245 | 90 | 0.915 | {spread} | +0.100 [+0.100, +0.100] |" in page
    assert "| RCE → GRPO | 300 | 15 | 4 | 4,495 | 90 | 0.797 | +0.042 " in page
    assert "- RCE → GRPO: 4,495 calls (300 queries, groups of 15, probe 4), 0.797 at 1 shot" in page
    assert "- match → GRPO: 2,245 calls (150 queries, groups of 15), 0.915 at 1 shot" in page
    assert "- RCE:" not in page
    assert len(json.loads(folder.with_suffix(".json").read_text())) == 5

    for path in folder.glob("1_*.json"):
        path.unlink()
    curve.write(folder)  # a single seed has no interval
    assert json.loads(folder.with_suffix(".json").read_text())[-1]["accuracy@1"] == [pytest.approx(0.9), None, None]
    assert folder.with_suffix(".png").stat().st_size > 10_000


def test_a_cell_is_trained_judged_and_not_made_again(curve, tmp_path, capsys):
    small = ("--seeds", "1", "--queries", "6", "8", "--groups", "5", "--probe", "2", "--training", "online")
    quick = ("rce.epochs=1", "grpo.epochs=2", "infer.num_queries=10", "rollout.pool_size=16")
    words = (*small, *(word for key in quick for word in ("--set", key)))
    arguments = options(curve, *words)
    folder, work = tmp_path / "runs", tmp_path / "work"
    assert curve.prepare(arguments, 0, work).startswith("seed 0: 8 groups, ")
    large, cell = curve.cells_of(arguments)
    assert (large.queries, cell.queries) == (8, 6)
    assert curve.train(arguments, cell, folder, work).startswith("0_online_6_5_2: ")
    found = json.loads(cell.file(folder).read_text())
    judged = {"rce@1", "rce@2", "grpo@1", "grpo@2"}
    assert set(found["accuracy"]) == judged | {f"0.1 {name}" for name in judged}
    content = json.loads(next(work.rglob("rl_data*.json")).read_text())
    logged = curve.subset(content, curve.query_rows(6, 2504, 0), 5, 2)["_meta"]["lvlm_calls"]
    # a round of 4 samples for each of the 4 training queries, of which some repeat
    assert logged < found["calls"] <= logged + 16
    assert [path.name for path in work.iterdir()] == ["seed_0"]
    assert curve.train(arguments, cell, folder, work) == "0_online_6_5_2: there"
    with pytest.raises(UsageError, match="--results"):
        curve.train(options(curve, *words, "--set", "grpo.epochs=3"), cell, folder, work)
