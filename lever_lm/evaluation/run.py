"""What comes after training: a policy's choices, or anybody's, are answered and scored beside the baselines; the demo,
which is all of it; and the page of a run.

Under torchrun `infer` and `infer_icds` are calls of the whole job, as Pipeline.rollouts is.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lever_lm.data import VqaData, load_dataset
from lever_lm.data.embeddings import encoder_fingerprint
from lever_lm.evaluation.choices_file import read_icds
from lever_lm.evaluation.evaluate import BASELINES, Evaluation, Outcome, compare, rows_of_another_setting
from lever_lm.evaluation.report.figures import check_plots, write_plots
from lever_lm.evaluation.report.page import Evaluated, evaluations, last_evaluation, write_report
from lever_lm.selectors.pointer.checkpoint import policy_digest
from lever_lm.training.environment import command_line, recorded
from lever_lm.training.find_checkpoint import find_checkpoint, load_for
from lever_lm.training.from_checkpoint import change_lines, changes, changes_of_run
from lever_lm.training.pipeline import Pipeline
from lever_lm.training.preflight import ALL
from lever_lm.training.run_dir import LOCK, RunFolder, inference_folder, lvlm_name
from lever_lm.utils.atomic_io import file_digest
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.fingerprint import CODE, fingerprint
from lever_lm.utils.locks import alone


@dataclass(frozen=True)
class Chosen:
    """What is evaluated: a method's name, its picks for each query, the digest of the policy or file that made them
    (results of another stand in no table with its own), and what Evaluation.explain tells of them."""

    method: str
    picks: list[list[int]]
    digest: str
    reasons: list[dict] | None = None


def evaluation_of(pipeline: Pipeline) -> Evaluation:
    """Return the evaluation queries with their pools, made once for a pipeline."""
    if pipeline.evaluation is None:
        pipeline.evaluation = Evaluation(pipeline.config, pipeline.data, pipeline.features, pipeline.screen.track)
    return pipeline.evaluation


def infer(pipeline: Pipeline, shots: Sequence[int], *, ckpt: str | None = None, baselines: bool = False) -> dict:
    """Answer the evaluation queries with a checkpoint's choices; writes and returns results and paired tests."""
    _check_shots(pipeline, shots)
    path, why = find_checkpoint(pipeline.run, ckpt, dict(os.environ))
    pipeline.check(*ALL)
    pipeline.screen.say(f"checkpoint: {path} ({why})")
    policy = load_for(path, pipeline.config, pipeline.screen.say)
    method = next((phase for phase in ("rce", "grpo") if path.stem.startswith(phase)), "policy")
    picks = evaluation_of(pipeline).choose(policy, max(shots), path)
    if policy.stop:
        mean = sum(map(len, picks)) / len(picks)
        pipeline.screen.say(
            f"the policy may stop early: it chose {mean:.2f} ICDs a query where {max(shots)} were allowed"
        )
    chosen = Chosen(method, picks, policy_digest(policy), evaluation_of(pipeline).explain(policy, picks))
    changed = _changed(pipeline, path, pipeline.data)
    facts = {"checkpoint": str(path), "why": why, "changed": changed}
    return _evaluate(pipeline, chosen, shots, baselines, _folder_for(pipeline, path, changed), facts)


def infer_icds(pipeline: Pipeline, path: Path, shots: Sequence[int], *, baselines: bool = False) -> dict:
    """Answer the evaluation queries with the choices in a file, anybody's."""
    pipeline.check(*(ALL if baselines else ("data", "lvlm")))
    without_pools = Evaluation(pipeline.config, pipeline.data, None)  # and so without features
    picks = read_icds(path, without_pools.queries, pipeline.data.train_examples, max(shots))
    if baselines:
        _check_shots(pipeline, shots)
    else:
        pipeline.evaluation = without_pools
    changed = _changed(pipeline, None, pipeline.data)
    facts = {"icds": str(path), "changed": changed}
    folder = _folder_of_icds(pipeline, path, changed)
    return _evaluate(pipeline, Chosen("icds", picks, file_digest(path)), shots, baselines, folder, facts)


def _check_shots(pipeline: Pipeline, shots: Sequence[int]) -> None:
    size = pipeline.config.rollout.pool_size
    if max(shots) > size:
        raise UsageError(f"--shots {max(shots)} exceeds rollout.pool_size {size}")


def planned_folder(pipeline: Pipeline, icds: Path | None) -> Path:
    """The folder that `infer` or `infer_icds` would write to; that of the run's inferences where there is no checkpoint
    yet, or the data cannot be read."""
    path = pipeline.checkpoint[0] if pipeline.checkpoint else None
    with contextlib.suppress(LeverError):
        if icds is not None:
            return _folder_of_icds(pipeline, icds, _changed(pipeline, None, load_dataset(pipeline.config.data)))
        if path is not None:
            return _folder_for(pipeline, path, _changed(pipeline, path, load_dataset(pipeline.config.data)))
    return pipeline.inference


def _changed(pipeline: Pipeline, checkpoint: Path | None, data: VqaData) -> dict[str, dict]:
    """What the pipeline's config changes about the setting that a checkpoint, or for None the pipeline's run, was
    trained in, and whether the data are others than the run's of that name."""
    run = pipeline.run if checkpoint is None else RunFolder(checkpoint.parent)
    changed = changes_of_run(run, pipeline.config) if checkpoint is None else changes(checkpoint, pipeline.config)
    there = recorded(run, "fingerprints").get("data")
    if isinstance(there, str) and there != data.fingerprint and "data.name" not in changed:
        changed["data"] = {"run": there, "here": data.fingerprint}
    return changed


def _say_changed(pipeline: Pipeline, changed: dict[str, dict]) -> None:
    keys = {key: pair for key, pair in changed.items() if key != "data"}
    for line in change_lines(keys):
        pipeline.screen.say(line)
    if "data" in changed:
        pipeline.screen.say(
            f"data: not what the run was trained on, though its data.name is {pipeline.config.data.name} too"
        )
    if changed:
        pipeline.screen.say("these results stand apart from those of the run's own setting")


def _folder_for(pipeline: Pipeline, checkpoint: Path, changed: dict[str, dict]) -> Path:
    """Where the inferences of a checkpoint go: by its own run, which need not be the one the options name, and apart
    when it is used with another LVLM or under another setting than it was trained in."""
    path = checkpoint.resolve()
    name = (path.stem if path.is_file() else path.name).removesuffix("_v2format")
    apart = _apart(pipeline, changed, with_lvlm="lvlm.path" in changed)
    return pipeline.layout.inference.with_name(path.parent.name) / f"{name}{apart}"


def _folder_of_icds(pipeline: Pipeline, path: Path, changed: dict[str, dict]) -> Path:
    # The default run's name holds the LVLM's already.
    apart = _apart(pipeline, changed, with_lvlm=bool(pipeline.layout.run_name))
    return pipeline.layout.inference / f"icds_{path.stem}{apart}"


def _apart(pipeline: Pipeline, changed: dict[str, dict], *, with_lvlm: bool) -> str:
    """The end of a folder's name where the setting is not the run's own: the LVLM, and a fingerprint of the other keys'
    values, which are in its metrics.json."""
    others = {key: pair["here"] for key, pair in changed.items() if key != "lvlm.path"}
    named = f"_with_{lvlm_name(pipeline.config.lvlm.path)}" if with_lvlm else ""
    return named + (f"_changed_{fingerprint(others)[:8]}" if others else "")


def _setting(pipeline: Pipeline) -> str:
    """Fingerprint of what results must share to stand in one table: data, pools, features, model, prompt."""
    config = pipeline.config
    parts = (config.sampler, config.rollout.pool_size, config.seed, config.infer, config.prompt.cut, CODE["inference"])
    encoder = encoder_fingerprint(config.features.encoder)
    return fingerprint(pipeline.data.fingerprint, encoder, config.features.name, pipeline.lvlm.fingerprint, *parts)


def _evaluate(
    pipeline: Pipeline, chosen: Chosen, shots: Sequence[int], baselines: bool, folder: Path, facts: dict
) -> dict:
    """Run a method's picks, beside the baselines if asked for; write and return results and paired tests."""
    evaluation, choices = evaluation_of(pipeline), {chosen.method: chosen.picks}
    _say_changed(pipeline, facts["changed"])
    if baselines:
        choices = {**{name: evaluation.baseline(name, max(shots)) for name in BASELINES}, **choices}
    outcomes = evaluation.run(choices, shots, pipeline.lvlm)
    facts |= {"tests": _tests(outcomes, chosen.method), "okvqa_stem": pipeline.config.infer.okvqa_stem}
    facts |= {"setting": f"{_setting(pipeline)}-{chosen.digest}", **_shown_to(pipeline)}
    facts["policies"] = {chosen.method: chosen.digest} if chosen.reasons is not None else {}
    results = (outcomes, choices, chosen.method, facts, {chosen.method: chosen.reasons})
    metrics = pipeline.shards.from_leader(lambda: _write(pipeline, folder, *results))
    pipeline.screen.detail(pipeline.lvlm.tally)
    pipeline.screen.say(f"predictions and metrics: {folder}")
    return {**metrics, "folder": str(folder)}


def _shown_to(pipeline: Pipeline) -> dict:
    """Which model saw the demonstrations, and in which order: facts of a metrics.json."""
    return {"lvlm": lvlm_name(pipeline.config.lvlm.path), "order": pipeline.config.prompt.order}


def _tests(outcomes: Sequence[Outcome], ours: str) -> list[dict]:
    """The paired tests of one method against the others."""
    return [test for outcome in outcomes if outcome.method == ours for test in compare(outcome, list(outcomes))]


def _write(pipeline: Pipeline, folder: Path, *results) -> dict:
    """Evaluation.write, by one process after another: each adds its rows to those in the folder. Rows that it replaces
    are said."""
    with alone(folder / LOCK, str(folder), "infer with another checkpoint", wait=True):
        if count := rows_of_another_setting(folder / "metrics.json", results[3]["setting"]):
            pipeline.screen.say(
                f"{folder}: {count} results of other queries, other data, another policy or version are replaced"
            )
        return evaluation_of(pipeline).write(folder, *results)


# ---------------------------------------------------------------------- the demo


def demo(pipeline: Pipeline, shots: Sequence[int], *, overwrite: bool = False) -> dict:
    """Everything on one page: train, then every method on the same evaluation queries, then the report."""
    _check_shots(pipeline, shots)
    with pipeline.run.alone(pipeline.screen.say):
        return _demo(pipeline, shots, overwrite)


def _demo(pipeline: Pipeline, shots: Sequence[int], overwrite: bool) -> dict:
    trained = pipeline.train_here(None, None, overwrite)
    best, evaluation = Path(trained["recommended"]["checkpoint"]), evaluation_of(pipeline)
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
    facts |= {"policies": digests, "changed": {}, **_shown_to(pipeline)}
    metrics = _write(pipeline, pipeline.inference, outcomes, choices, "grpo", facts, reasons)
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
        check_plots(figures)
    main = Evaluated(pipeline.run, last_evaluation(pipeline.inference))
    if main.inference is None and not main.rows():
        raise LeverError(f"no results in {pipeline.inference}: run `lever infer --baselines` or `lever demo` first")
    if main.inference is not None:
        pipeline.screen.say(f"results: {main.inference} (the last evaluation with baselines; without any, the last)")
    if left_out := sorted(folder.name for folder in evaluations(pipeline.inference, own=False)):
        pipeline.screen.say(
            f"left out: {', '.join(left_out)}: not the run's own setting (metrics.json says "
            "what was changed), or evaluated by lever_lm 0.1, which did not say: `lever infer` again"
        )
    beside = [Evaluated(RunFolder(path), last_evaluation(inference_folder(path))) for path in others]
    data = None if main.inference is None else pipeline.data
    page = {"others": beside, "output": output, "command": command_line()}
    made = {"report": str(write_report(pipeline.run, main.inference, data, **page))}
    if figures is not None:
        made["figures"] = [str(path) for path in write_plots([main, *beside], figures)]
    return made
