"""The table of metrics: a loss that returns another statistic shows it by one line of the table, or by none."""

import dataclasses
import json

from worlds import GRPO, RCE, train

from lever_lm.evaluation.report.curves import training_curves
from lever_lm.evaluation.report.phrasing import health
from lever_lm.training import metrics
from lever_lm.training.losses import LOSSES, group_mean
from lever_lm.training.metrics import METRICS, STRATEGIES, Metric, table_header, table_row
from lever_lm.training.select_checkpoint import best_row


def surprise_loss(log_probs, old_log_probs, advantages, mask, *, weights=None, **_):
    """A loss of a researcher's own, without ratio and KL, that tells how unlikely its rollouts are."""
    loss = -group_mean(advantages * log_probs, mask, weights)
    return loss, {"ppo_loss": loss.detach(), "surprise": -group_mean(log_probs.detach(), mask, weights)}


def test_a_statistic_of_a_new_loss_is_shown_everywhere_by_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "clip", surprise_loss)
    said = []
    grpo = dataclasses.replace(GRPO, epochs=2, adaptive_kl=True)  # β keeps its value where no KL is told
    _, rows = train(tmp_path, dataclasses.replace(RCE, epochs=1), grpo, say=said.append)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["surprise"] > 0 for row in written if row["phase"] == "grpo"] == [True, True]
    assert {row["beta"] for row in written if row["phase"] == "grpo"} == {GRPO.kl_beta}
    assert table_row(rows[-1]).split()[4] == "-"  # the column of a KL that there is not
    assert any("groups skipped" in line and "clipped" not in line for line in said)

    line = Metric("surprise", "surprise (nats)", "curve health status", score=lambda value: value, why="least surprise")
    monkeypatch.setitem(metrics.METRICS, "surprise", line)
    (curve,) = (
        of_phase["surprise"] for of_phase in training_curves([("run", rows)]).values() if "surprise" in of_phase
    )
    assert [y for _, y in curve[0].points] == [row["surprise"] for row in rows if "surprise" in row]
    assert line.label == "surprise"
    assert health(rows)[-1]["name"] == "surprise (nats)"
    best = best_row([row for row in rows if row["phase"] == "grpo"], line)
    assert best["surprise"] == min(row["surprise"] for row in rows if "surprise" in row)


def test_the_columns_of_the_tables_are_those_that_scripts_parse():
    assert table_header("grpo")[:2] == [
        "阶段3：GRPO训练",
        " Epoch   Train Loss     Val Loss     PPO Loss         KL    Adv Std    Adv Max     Beta",
    ]
    assert table_header("rce")[1].split() == ["Epoch", "Train", "Loss", "Val", "Loss", "Temperature"]


def test_every_strategy_says_what_it_looks_for_and_every_shown_metric_has_a_title():
    assert list(STRATEGIES) == ["val_loss", "ppo_loss", "kl", "adv_std", "val_reward", "val_top_reward", "val_accuracy"]
    assert all(metric.why for metric in STRATEGIES.values())
    assert all(metric.title for metric in METRICS.values() if metric.on)
