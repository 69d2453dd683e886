"""What comes after training: the choices of a policy or of a file are answered and scored beside those of other
selectors, and asked what a sceptic asks; and the page of a run.

Under torchrun `infer` is a call of the whole job, as Pipeline.rollouts is.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lever_lm.data import VqaData
from lever_lm.data.embeddings import encoder_fingerprint
from lever_lm.evaluation.arena import (
    Cost,
    arena_rows,
    check_runs,
    check_shots,
    checkpoint_of,
    chooses_from,
    cost_of,
    method_of,
    missing,
    timed,
)
from lever_lm.evaluation.choices_file import read_icds
from lever_lm.evaluation.diagnose import Diagnosis
from lever_lm.evaluation.evaluate import Evaluation, compare
from lever_lm.evaluation.findings_files import DIAGNOSIS
from lever_lm.evaluation.report.curves import Evaluated
from lever_lm.evaluation.report.figures import check_plots, write_plots
from lever_lm.evaluation.report.page import write_report
from lever_lm.evaluation.report.seeds import over_seeds
from lever_lm.evaluation.results import evaluations, last_evaluation, write_results
from lever_lm.selectors import BASELINES, FROM_FILE, SELECTORS
from lever_lm.selectors.learned import choose
from lever_lm.selectors.pointer.checkpoint import policy_digest
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.selectors.pool_recall import recall_in_words
from lever_lm.tasks import load_data
from lever_lm.training.environment import command_line, recorded
from lever_lm.training.find_checkpoint import find_checkpoint, load_for
from lever_lm.training.from_checkpoint import change_lines, changes, changes_of_run
from lever_lm.training.pipeline import Pipeline
from lever_lm.training.preflight import ALL
from lever_lm.training.run_dir import LOCK, RunFolder, inference_folder, lvlm_name
from lever_lm.utils.atomic_io import file_digest, write_json
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.fingerprint import CODE, fingerprint
from lever_lm.utils.locks import alone


@dataclass(frozen=True)
class Chosen:
    """A method that is evaluated: its name, its picks for each query, the digest of the policy or file that made them
    (results of another stand in no table with its own), and what `explain` tells of a policy's picks."""

    method: str
    picks: list[list[int]]
    digest: str
    reasons: list[dict] | None = None


def infer(
    pipeline: Pipeline,
    shots: Sequence[int],
    *,
    ckpt: str | None = None,
    icds: Path | None = None,
    baselines: bool = False,
    against: Sequence[str] = (),
    named: bool = True,
) -> dict:
    """Answer the evaluation queries with a checkpoint's choices, or with those in the file `icds`, which need no
    features without baselines; write and return results and paired tests. against: selectors that are set against it in
    one table, with what each costs (arena.py); named: each is asked for by name, and must have its checkpoint."""
    most, say, path = max(shots), pipeline.screen.say, None
    if icds is None:
        path, why = find_checkpoint(pipeline.run, ckpt, dict(os.environ))
    ours = FROM_FILE if path is None else method_of(path)
    check_shots(pipeline.config, shots, [ours, *(BASELINES if baselines else ()), *against])
    check_runs(pipeline, [name for name in against if named and name != ours])
    if icds is None:
        pipeline.check(*ALL)
        say(f"checkpoint: {path} ({why})")
        policy = load_for(path, pipeline.config, say)
        evaluation = evaluation_of(pipeline, shots)
        chosen, seconds = timed(lambda: chosen_by(policy, evaluation, most, ours, path))
        costs = [cost_of(ours, path, seconds, evaluation)]
        if policy.stop:
            mean = sum(map(len, chosen.picks)) / len(chosen.picks)
            say(f"the policy may stop early: it chose {mean:.2f} ICDs a query where {most} were allowed")
        facts = {"checkpoint": str(path), "why": why}
    else:
        pipeline.check(*(ALL if baselines or against else ("data", "lvlm")))
        evaluation = Evaluation(pipeline.config, pipeline.data, None)
        picks = read_icds(icds, evaluation.queries, pipeline.data.train_examples, most)
        chosen, facts = Chosen(FROM_FILE, picks, file_digest(icds)), {"icds": str(icds)}
        costs = [Cost(FROM_FILE, None, 0, 0.0, "a file")]
        if baselines or against:
            evaluation = evaluation_of(pipeline, shots)
    folder, changed = _destination(pipeline, pipeline.data, path, icds)
    for line in change_lines(changed):
        say(line)
    if changed:
        say("these results stand apart from those of the run's own setting")
    if against and baselines:  # all in one table
        against, baselines = [name for name in SELECTORS if name in (*against, *BASELINES)], False
    choices = {name: evaluation.select(name, most) for name in BASELINES if baselines}
    others: list[Chosen] = []
    for name in against:
        if name != chosen.method and (found := _contender(pipeline, evaluation, name, most)):
            (picks, of_checkpoint), cost = found
            choices[name] = picks
            others += of_checkpoint
            costs.append(cost)
    choices[chosen.method] = chosen.picks
    facts["changed"] = changed
    table = costs if against else ()
    metrics = evaluate_methods(pipeline, evaluation, choices, [*others, chosen], shots, folder, facts, table)
    say(f"predictions and metrics: {folder}")
    return {**metrics, "folder": str(folder)}


def evaluation_of(pipeline: Pipeline, shots: Sequence[int]) -> Evaluation:
    """Return the evaluation of a pipeline. Raises UsageError for more shots than there are training examples."""
    total = len(pipeline.data.train_examples)
    if max(shots) > total:
        raise UsageError(f"--shots {max(shots)} exceeds the training split, which has {total} examples: lower --shots")
    return Evaluation(pipeline.config, pipeline.data, pipeline.features, pipeline.screen.track, lambda: pipeline.lvlm)


def _contender(
    pipeline: Pipeline, evaluation: Evaluation, name: str, shots: int
) -> tuple[tuple[list[list[int]], list[Chosen]], Cost] | None:
    """Return the picks of a selector of the table, with its checkpoint's, if it has one, as Chosen, and their cost.
    None, which is said, where a learnt one has no run."""
    one = SELECTORS[name]
    if one.select is not None:
        picks, seconds = timed(lambda: evaluation.select(name, shots))
        return (picks, []), Cost(name, 0, one.calls, seconds, chooses_from(name, evaluation))
    path = checkpoint_of(pipeline.run, name)
    if path is None:
        pipeline.screen.say(f"left out: {missing(pipeline, name)}")
        return None
    for line in change_lines(changes(path, pipeline.config)):
        pipeline.screen.say(f"{name}: {line}")
    policy = load_for(path, pipeline.config, pipeline.screen.say)
    chosen, seconds = timed(lambda: chosen_by(policy, evaluation, shots, name, path))
    return (chosen.picks, [chosen]), cost_of(name, path, seconds, evaluation)


def chosen_by(policy: PointerSelector, evaluation: Evaluation, shots: int, method: str, path: Path) -> Chosen:
    """Return the picks of a checkpoint's policy as those of a method."""
    picks, reasons = choose(policy, evaluation.problem, shots, path)
    return Chosen(method, picks, policy_digest(policy), reasons)


def evaluate_methods(
    pipeline: Pipeline,
    evaluation: Evaluation,
    choices: dict[str, list[list[int]]],
    chosen: Sequence[Chosen],
    shots: Sequence[int],
    folder: Path,
    facts: dict,
    costs: Sequence[Cost] = (),
) -> dict:
    """Answer and score the choices of all methods, and add the results to those in the folder, in which processes take
    turns. chosen: those among the methods that are no baselines; the last is tested against all others, and its choices
    are kept. facts: what else metrics.json says, whose content is returned. costs: of the methods of `--against`."""
    config, ours = pipeline.config, chosen[-1].method
    outcomes = evaluation.run(choices, shots, pipeline.lvlm)
    pipeline.screen.detail(pipeline.lvlm.tally)
    infer = {name: value for name, value in vars(config.infer).items() if name != "auc" or value}  # a key since 0.2
    # What results must share to stand in one table: data, features, model, pools, prompt.
    setting = fingerprint(
        pipeline.data.fingerprint,
        encoder_fingerprint(config.features.encoder),
        config.features.name,
        pipeline.lvlm.fingerprint,
        *(config.sampler, config.seed, infer, config.prompt.cut, CODE["inference"]),
    )
    if any(SELECTORS[method].pool for method in choices if method in SELECTORS):
        recalls = evaluation.pool_recall()
        facts = {**facts, "pool_recall": {str(size): share for size, share in recalls.items()}}
        if recalls:
            pipeline.screen.say(f"pools: {recall_in_words(config, recalls)}")
    facts = {
        **facts,
        "tests": compare(ours, outcomes),
        **({"arena": arena_rows(outcomes, costs)} if costs else {}),
        "okvqa_stem": config.infer.okvqa_stem,
        "task": evaluation.data.task,
        "score": evaluation.task.headline,
        "setting": f"{setting}-{chosen[-1].digest}",
        "lvlm": lvlm_name(config.lvlm.path),
        "order": config.prompt.order,
        "policies": {one.method: one.digest for one in chosen if one.reasons is not None},
    }
    reasons = {one.method: one.reasons for one in chosen if one.reasons is not None}
    examples = (evaluation.queries, evaluation.data.train_examples)

    def write() -> dict:
        with alone(folder / LOCK, str(folder), "infer with another checkpoint", wait=True):
            return write_results(folder, *examples, outcomes, choices, ours, facts, reasons, pipeline.screen.say)

    return pipeline.shards.from_leader(write)


def diagnose(pipeline: Pipeline, shots: int, *, against: Sequence[str] = (), other: Pipeline | None = None) -> dict:
    """Ask what `Diagnosis` asks of the picks of the pipeline's checkpoint, and of those of the selectors `against`;
    other: a pipeline whose LVLM is given the same picks. Writes diagnosis.json beside the checkpoint's predictions, and
    returns its content: n, shots, and for each method its findings."""
    path, why = pipeline.checkpoint
    check_shots(pipeline.config, [shots], [method_of(path), *against])
    check_runs(pipeline, [name for name in against if name != method_of(path)])
    pipeline.check(*ALL)
    pipeline.screen.say(f"checkpoint: {path} ({why})")
    evaluation = evaluation_of(pipeline, [shots])
    method, policy = method_of(path), load_for(path, pipeline.config, pipeline.screen.say)
    chosen = chosen_by(policy, evaluation, shots, method, path)
    picks = {method: chosen.picks}
    for name in against:
        if name not in picks and (found := _contender(pipeline, evaluation, name, shots)):
            picks[name] = found[0][0]
    beside = (lvlm_name(other.config.lvlm.path), other.lvlm) if other else None
    findings = {
        name: [one.row() for one in Diagnosis(evaluation, pipeline.lvlm, rows, shots, beside).findings()]
        for name, rows in picks.items()
    }
    folder, changed = _destination(pipeline, pipeline.data, path, None)
    result = {"n": len(evaluation.queries), "shots": shots, "checkpoint": str(path), "methods": findings}
    write_json(folder / DIAGNOSIS, {**result, "changed": changed, "policies": {method: chosen.digest}})
    pipeline.screen.say(f"diagnosis: {folder / DIAGNOSIS}")
    return {**result, "folder": str(folder)}


# ---------------------------------------------------------------------- where results go


def planned_folder(pipeline: Pipeline, icds: Path | None) -> Path:
    """Return the folder that `infer` would write to; that of the run's inferences where there is no
    checkpoint yet, or the data cannot be read."""
    if icds is not None or pipeline.checkpoint is not None:
        with contextlib.suppress(LeverError):
            checkpoint = pipeline.checkpoint[0] if icds is None else None
            return _destination(pipeline, load_data(pipeline.config.data), checkpoint, icds)[0]
    return pipeline.inference


def _destination(
    pipeline: Pipeline, data: VqaData, checkpoint: Path | None, icds: Path | None
) -> tuple[Path, dict[str, dict]]:
    """Return where the inferences of a checkpoint, or of the choices in a file, go, and what the config changes about
    the setting that the checkpoint, or the pipeline's run, was trained in.

    A checkpoint's lie by its own run, which need not be the one the options name. They lie apart where the setting is
    not the run's own: the end of the folder's name says the LVLM, and a fingerprint of the other keys' values, which
    are in metrics.json. `data` is among the changes where the data are others than the run's of that name.
    """
    config = pipeline.config
    if icds is not None:
        run, changed = pipeline.run, changes_of_run(pipeline.run, config)
        folder = pipeline.layout.inference / f"icds_{icds.stem}"
        with_lvlm = bool(pipeline.layout.run_name)  # the default run's name holds the LVLM's already
    else:
        run, changed = RunFolder(checkpoint.parent), changes(checkpoint, config)
        path = checkpoint.resolve()
        name = (path.stem if path.is_file() else path.name).removesuffix("_v2format")
        folder = pipeline.layout.inference.with_name(path.parent.name) / name
        with_lvlm = "lvlm.path" in changed
    there = recorded(run, "fingerprints").get("data")
    if isinstance(there, str) and there != data.fingerprint and "data.name" not in changed:
        changed["data"] = {"run": there, "here": data.fingerprint}
    others = {key: pair["here"] for key, pair in changed.items() if key != "lvlm.path"}
    apart = f"_with_{lvlm_name(config.lvlm.path)}" if with_lvlm else ""
    apart += f"_changed_{fingerprint(others)[:8]}" if others else ""
    return folder.with_name(folder.name + apart), changed


# ---------------------------------------------------------------------- the page


def report(
    pipeline: Pipeline, others: Sequence[Path] = (), output: Path | None = None, figures: Path | None = None
) -> dict:
    """Write the page of the run and of others laid over it, each from its last evaluation; its charts in `figures`.
    Returns report, figures where they are asked for, and seeds: with others, the rows of `over_seeds`."""
    if figures is not None:
        check_plots(figures)
    main = Evaluated(pipeline.run, last_evaluation(pipeline.inference))
    if main.inference is not None:
        pipeline.screen.say(f"results: {main.inference} (the last evaluation with baselines; without any, the last)")
    elif not main.rows:
        raise LeverError(f"no results in {pipeline.inference}: run `lever infer --baselines` or `lever demo` first")
    if left_out := sorted(folder.name for folder in evaluations(pipeline.inference, own=False)):
        pipeline.screen.say(
            f"left out: {', '.join(left_out)}: not the run's own setting (metrics.json says "
            "what was changed), or evaluated by lever_lm 0.1, which did not say: `lever infer` again"
        )
    beside = [Evaluated(RunFolder(path), last_evaluation(inference_folder(path))) for path in others]
    data = None if main.inference is None else pipeline.data
    found = over_seeds([main, *beside], pipeline.screen.track)
    if found.seeds:
        pipeline.screen.say(f"the runs differ in their seed alone: {', '.join(map(str, found.seeds))}")
    for note in found.notes:
        pipeline.screen.say(note)
    laid_over = {"others": beside, "seeds": found}
    page = write_report(pipeline.run, main.inference, data, **laid_over, output=output, command=command_line())
    made = {"report": str(page), **({"seeds": found.rows, "score": main.metrics["score"]} if beside else {})}
    if figures is not None:
        made["figures"] = [str(path) for path in write_plots([main, *beside], figures)]
    return made
