"""What comes after training: a policy's choices, or anybody's, are answered and scored beside the baselines; the demo,
which is all of it; and the page of a run.

Under torchrun `infer` and `infer_icds` are calls of the whole job, as Pipeline.rollouts is.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lever_lm.checkpoint import policy_digest
from lever_lm.config import fingerprint
from lever_lm.doctor import ALL
from lever_lm.errors import LeverError, UsageError
from lever_lm.features import encoder_fingerprint
from lever_lm.files import file_digest
from lever_lm.finding import find_checkpoint, load_for
from lever_lm.icds import read_icds
from lever_lm.inference import BASELINES, Evaluation, Outcome, compare
from lever_lm.locks import alone
from lever_lm.pipeline import Pipeline
from lever_lm.plots import check_plots, write_plots
from lever_lm.provenance import command_line
from lever_lm.report import Evaluated, last_evaluation, write_report
from lever_lm.runs import LOCK, RunFolder, inference_folder, lvlm_name
from lever_lm.stages import CODE


@dataclass(frozen=True)
class Chosen:
    """What is evaluated: a method's name, its picks for each query, the digest of the policy or file that made them
    (results of another stand in no table with its own), and what Evaluation.explain tells of them."""

    method: str
    picks: list[list[int]]
    digest: str
    reasons: list[dict] | None = None


def infer(pipeline: Pipeline, shots: Sequence[int], *, ckpt: str | None = None, baselines: bool = False) -> dict:
    """Answer the evaluation queries with a checkpoint's choices; writes and returns results and paired tests."""
    _check_shots(pipeline, shots)
    path, why = find_checkpoint(pipeline.run, ckpt, dict(os.environ))
    pipeline.check(*ALL)
    pipeline.screen.say(f"checkpoint: {path} ({why})")
    policy = load_for(path, pipeline.config, pipeline.screen.say)
    method = next((phase for phase in ("rce", "grpo") if path.stem.startswith(phase)), "policy")
    picks = pipeline.evaluation.choose(policy, max(shots), path)
    if policy.stop:
        mean = sum(map(len, picks)) / len(picks)
        pipeline.screen.say(
            f"the policy may stop early: it chose {mean:.2f} ICDs a query where {max(shots)} were allowed"
        )
    chosen = Chosen(method, picks, policy_digest(policy), pipeline.evaluation.explain(policy, picks))
    facts = {"checkpoint": str(path), "why": why}
    return _evaluate(pipeline, chosen, shots, baselines, _folder_for(pipeline, path), facts)


def infer_icds(pipeline: Pipeline, path: Path, shots: Sequence[int], *, baselines: bool = False) -> dict:
    """Answer the evaluation queries with the choices in a file, anybody's."""
    pipeline.check(*(ALL if baselines else ("data", "lvlm")))
    without_pools = Evaluation(pipeline.config, pipeline.data, None)  # and so without features
    picks = read_icds(path, without_pools.queries, pipeline.data.train_examples, max(shots))
    if baselines:
        _check_shots(pipeline, shots)
    else:
        pipeline.evaluation = without_pools
    # The default run's name holds the LVLM's already.
    apart = f"_with_{lvlm_name(pipeline.config.lvlm.path)}" if pipeline.layout.run_name else ""
    folder = pipeline.layout.inference / f"icds_{path.stem}{apart}"
    return _evaluate(pipeline, Chosen("icds", picks, file_digest(path)), shots, baselines, folder, {"icds": str(path)})


def _check_shots(pipeline: Pipeline, shots: Sequence[int]) -> None:
    size = pipeline.config.rollout.pool_size
    if max(shots) > size:
        raise UsageError(f"--shots {max(shots)} exceeds rollout.pool_size {size}")


def _folder_for(pipeline: Pipeline, checkpoint: Path) -> Path:
    """Where the inferences of a checkpoint go: by its own run, which need not be the one the options name, and apart
    when it is used with another LVLM than it was trained against."""
    path = checkpoint.resolve()
    run, name = RunFolder(path.parent), (path.stem if path.is_file() else path.name).removesuffix("_v2format")
    here = lvlm_name(pipeline.config.lvlm.path)
    apart = "" if run.lvlm() in (here, None) else f"_with_{here}"
    return pipeline.layout.inference.with_name(run.path.name) / f"{name}{apart}"


def _setting(pipeline: Pipeline) -> str:
    """Fingerprint of what results must share to stand in one table: data, pools, features, model, prompt."""
    config = pipeline.config
    parts = (config.sampler, config.rollout.pool_size, config.seed, config.infer, CODE["inference"])
    encoder = encoder_fingerprint(config.features.encoder)
    return fingerprint(pipeline.data.fingerprint, encoder, config.features.name, pipeline.lvlm.fingerprint, *parts)


def _evaluate(
    pipeline: Pipeline, chosen: Chosen, shots: Sequence[int], baselines: bool, folder: Path, facts: dict
) -> dict:
    """Run a method's picks, beside the baselines if asked for; write and return results and paired tests."""
    evaluation, choices = pipeline.evaluation, {chosen.method: chosen.picks}
    if baselines:
        choices = {**{name: evaluation.baseline(name, max(shots)) for name in BASELINES}, **choices}
    outcomes = evaluation.run(choices, shots, pipeline.lvlm)
    facts |= {"tests": _tests(outcomes, chosen.method), "okvqa_stem": pipeline.config.infer.okvqa_stem}
    facts |= {"setting": f"{_setting(pipeline)}-{chosen.digest}", **_shown_to(pipeline)}
    facts["policies"] = {chosen.method: chosen.digest} if chosen.reasons is not None else {}
    results = (outcomes, choices, chosen.method, facts, {chosen.method: chosen.reasons})
    metrics = pipeline.shards.from_leader(lambda: _write(evaluation, folder, *results))
    pipeline.screen.detail(pipeline.lvlm.tally)
    pipeline.screen.say(f"predictions and metrics: {folder}")
    return {**metrics, "folder": str(folder)}


def _shown_to(pipeline: Pipeline) -> dict:
    """Which model saw the demonstrations, and in which order: facts of a metrics.json."""
    return {"lvlm": lvlm_name(pipeline.config.lvlm.path), "order": pipeline.config.prompt.order}


def _tests(outcomes: Sequence[Outcome], ours: str) -> list[dict]:
    """The paired tests of one method against the others."""
    return [test for outcome in outcomes if outcome.method == ours for test in compare(outcome, list(outcomes))]


def _write(evaluation: Evaluation, folder: Path, *results) -> dict:
    """Evaluation.write, by one process after another: each adds its rows to those in the folder."""
    with alone(folder / LOCK, str(folder), "infer with another checkpoint", wait=True):
        return evaluation.write(folder, *results)


# ---------------------------------------------------------------------- the demo


def demo(pipeline: Pipeline, shots: Sequence[int], *, overwrite: bool = False) -> dict:
    """Everything on one page: train, then every method on the same evaluation queries, then the report."""
    _check_shots(pipeline, shots)
    with pipeline.run.alone(pipeline.screen.say):
        return _demo(pipeline, shots, overwrite)


def _demo(pipeline: Pipeline, shots: Sequence[int], overwrite: bool) -> dict:
    trained = pipeline.train_here(None, None, overwrite)
    best, evaluation = Path(trained["recommended"]["checkpoint"]), pipeline.evaluation
    policies = {"rce": pipeline.run.checkpoint("rce", pipeline.config.rce.epochs), "grpo": best}
    choices = {name: evaluation.baseline(name, max(shots)) for name in BASELINES if name != "oracle"}
    reasons, digests = {}, {}
    for name, path in policies.items():
        policy = load_for(path, pipeline.config, pipeline.screen.say)
        digests[name] = policy_digest(policy)
        choices[name] = evaluation.choose(policy, max(shots), path)
        reasons[name] = evaluation.explain(policy, choices[name])
    choices["oracle"] = evaluation.baseline("oracle", max(shots))
    outcomes = evaluation.run(choices, shots, pipeline.lvlm)
    tests, learned = _tests(outcomes, "grpo"), _learned(pipeline, choices)
    pipeline.screen.detail(pipeline.lvlm.tally)
    setting = "-".join((_setting(pipeline), *digests.values()))
    facts = {"checkpoint": str(best), "tests": tests, "learned": learned, "setting": setting}
    facts |= {"policies": digests, **_shown_to(pipeline)}
    metrics = _write(evaluation, pipeline.inference, outcomes, choices, "grpo", facts, reasons)
    if pipeline.tracking is not None:
        pipeline.tracking.results(metrics["results"])
    page = write_report(pipeline.run, pipeline.inference, pipeline.data, command=command_line())
    return {
        "table": metrics["results"],
        "report": str(page),
        "tests": tests,
        "learned": learned,
        "recommended": trained["recommended"],
        "run": str(pipeline.run.path),
    }


def _learned(pipeline: Pipeline, choices: dict[str, list[list[int]]]) -> dict:
    """What GRPO changed after RCE: the share of evaluation queries with another first pick, and val_reward."""
    changed = sum(ours[0] != theirs[0] for ours, theirs in zip(choices["grpo"], choices["rce"], strict=True))
    rows = pipeline.run.rows()
    learned = {
        "first_picks_changed": changed / len(choices["grpo"]),
        "val_reward_rce": [row for row in rows if row["phase"] == "rce"][-1]["val_reward"],
        "val_reward_grpo": max(row["val_reward"] for row in rows if row["phase"] == "grpo"),
    }
    pipeline.screen.say(
        f"GRPO changed the first pick of {learned['first_picks_changed']:.0%} of the queries; validation reward "
        f"{learned['val_reward_rce']:.3f} after RCE, {learned['val_reward_grpo']:.3f} after GRPO"
    )
    return learned


# ---------------------------------------------------------------------- the page


def report(
    pipeline: Pipeline, others: Sequence[Path] = (), output: Path | None = None, figures: Path | None = None
) -> dict:
    """The page of the run and of others laid over it, each from its last evaluation; its charts in `figures`."""
    if figures is not None:
        check_plots()
    main = Evaluated(pipeline.run, last_evaluation(pipeline.inference))
    if main.inference is None and not main.rows():
        raise LeverError(f"no results in {pipeline.inference}: run `lever infer --baselines` or `lever demo` first")
    if main.inference is not None:
        pipeline.screen.say(f"results: {main.inference} (the last evaluation with baselines; without any, the last)")
    beside = [Evaluated(RunFolder(path), last_evaluation(inference_folder(path))) for path in others]
    data = None if main.inference is None else pipeline.data
    page = {"others": beside, "output": output, "command": command_line()}
    made = {"report": str(write_report(pipeline.run, main.inference, data, **page))}
    if figures is not None:
        made["figures"] = [str(path) for path in write_plots([main, *beside], figures)]
    return made
