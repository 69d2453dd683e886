"""`lever demo`: the whole way on the embedded data, every method of a table on the same queries, and the page."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lever_lm.evaluation.arena import check_shots, method_of
from lever_lm.evaluation.report.page import write_report
from lever_lm.evaluation.run import Chosen, chosen_by, evaluate_methods, evaluation_of
from lever_lm.selectors import BASELINES, SELECTORS, named
from lever_lm.training.environment import command_line
from lever_lm.training.find_checkpoint import load_for
from lever_lm.training.metrics import PHASES
from lever_lm.training.pipeline import Pipeline
from lever_lm.training.preflight import ALL


def demo(pipeline: Pipeline, shots: Sequence[int], *, overwrite: bool = False) -> dict:
    """Train, run every method on the same evaluation queries, and write the report: everything on one page."""
    check_shots(pipeline.config, shots, PHASES)
    most, say = max(shots), pipeline.screen.say
    with pipeline.run.alone(say):
        pipeline.check(*ALL)
        if not overwrite:
            pipeline.run.check(pipeline.config)
        beside = {} if "match" in pipeline.config.warmups else {"answer_match": _answer_match(pipeline, overwrite)}
        trained = pipeline.train_here(None, None, overwrite)
        best, evaluation = Path(trained["recommended"]["checkpoint"]), evaluation_of(pipeline, shots)
        warm = pipeline.run.checkpoint("rce", pipeline.config.rce.epochs)
        policies = {**beside, method_of(warm): warm, "grpo": best}
        chosen = {
            method: chosen_by(load_for(path, pipeline.config, say), evaluation, most, method, path)
            for method, path in policies.items()
        }
        choices = {
            name: chosen[name].picks if name in chosen else evaluation.select(name, most)
            for name in SELECTORS
            if name in chosen or name in BASELINES
        }
        facts = {"checkpoint": str(best), "learned": _learned(pipeline, chosen, method_of(warm)), "changed": {}}
        metrics = evaluate_methods(
            pipeline, evaluation, choices, list(chosen.values()), shots, pipeline.inference, facts
        )
        if pipeline.tracking is not None:
            pipeline.tracking.results(metrics["results"])
        page = write_report(pipeline.run, pipeline.inference, pipeline.data, command=command_line())
        return {
            "table": metrics["results"],
            "report": str(page),
            "tests": metrics["tests"],
            "learned": metrics["learned"],
            "recommended": trained["recommended"],
            "run": str(pipeline.run.path),
        }


def _answer_match(pipeline: Pipeline, overwrite: bool) -> Path:
    """Train the selector that asks the LVLM nothing, in a run beside the demo's: what GRPO must be compared with."""
    config = pipeline.config
    config = replace(config, warmup="match", grpo=replace(config.grpo, epochs=0))
    name = f"{pipeline.run.path.name}_answer_match"
    other = Pipeline(config, pipeline.screen, results=pipeline.layout.dataset.parent, run_name=name)
    vars(other).update(data=pipeline.data, features=pipeline.features)
    return Path(other.train(overwrite=overwrite)["recommended"]["checkpoint"])


def _learned(pipeline: Pipeline, chosen: dict[str, Chosen], warmup: str) -> dict:
    """Return what GRPO changed after the warm-up: the share of queries with another first pick, and val_reward."""
    pairs = list(zip(chosen["grpo"].picks, chosen[warmup].picks, strict=True))
    rows = pipeline.run.rows()
    learned = {
        "first_picks_changed": sum(ours[0] != theirs[0] for ours, theirs in pairs) / len(pairs),
        "val_reward_rce": [row for row in rows if row["phase"] == "rce"][-1]["val_reward"],
        "val_reward_grpo": max(row["val_reward"] for row in rows if row["phase"] == "grpo"),
    }
    pipeline.screen.say(
        f"GRPO changed the first pick of {learned['first_picks_changed']:.0%} of the queries; validation reward "
        f"{learned['val_reward_rce']:.3f} after the warm-up ({named(warmup)}), {learned['val_reward_grpo']:.3f} after "
        "GRPO"
    )
    return learned
