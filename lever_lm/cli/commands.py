"""The `lever` command: parse, resolve the config, call one stage. No logic; heavy imports stay inside the commands."""

import os
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option, Typer, echo

from lever_lm import __version__
from lever_lm.cli import completion, entrypoint
from lever_lm.cli.config_command import config_app
from lever_lm.cli.options import Common, command, emit, finite, parse_shots
from lever_lm.cli.run_config import make_pipeline, pipeline_of_run, plan_only, refuse_resuming, run_without_pipeline
from lever_lm.config.schema import DataConfig
from lever_lm.training.metrics import STRATEGIES
from lever_lm.training.tensorboard import check_tracker
from lever_lm.utils.errors import LeverError, UsageError

app = Typer(
    name="lever",
    help="Learn which demonstrations to show a frozen vision-language model, and show them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RceEpochs = Annotated[int | None, Option(min=0, help="Epochs of the warm-up.")]
GrpoEpochs = Annotated[int | None, Option(min=0, help="Epochs of GRPO; raising it continues a finished run.")]
ValidateOn = Annotated[
    str | None, Option(help="rollouts, or answers: also ask the LVLM after each epoch, and recommend by what is right.")
]
Keep = Annotated[int | None, Option(min=1, help="Keep N checkpoints of a phase and each strategy's best; else all.")]
DetectAnomaly = Annotated[bool, Option("--detect-anomaly", help="Name the module and operation of a NaN; slower.")]
Tracker = Annotated[
    str | None, Option(help="tensorboard: also write its files into the run.", autocompletion=completion.trackers)
]
RunDir = Annotated[
    Path | None,
    Argument(help="Run folder; by default the one the options name.", autocompletion=completion.run_folders),
]
Ckpt = Annotated[str | None, Option(help="A path, best, latest, an exported folder or a hub id OWNER/NAME")]


@command(app, "demo", one_process=True)
def demo(
    common: Common,
    rce_epochs: RceEpochs = None,
    grpo_epochs: GrpoEpochs = None,
    keep: Keep = None,
    shots: Annotated[str, Option(help="Numbers of demonstrations: 1,2,4 or 1-5")] = "1,2,4",
    detect_anomaly: DetectAnomaly = False,
    tracker: Tracker = None,
) -> None:
    """The whole way on the embedded data and model, offline, in two minutes: ends with a table and a report."""
    check_tracker(tracker)
    common.recipe, common.run_name = common.recipe or "demo", common.run_name or "demo"
    numbers = parse_shots(shots)
    pipeline = make_pipeline(common, {"rce.epochs": rce_epochs, "grpo.epochs": grpo_epochs, "keep": keep})
    plan_only(common, pipeline, "demo", shots=numbers, baselines=True)
    from lever_lm.cli.display import show_results
    from lever_lm.evaluation.demo import demo as run_demo

    refuse_resuming(common, pipeline)
    pipeline.detect_anomaly, pipeline.tracker = detect_anomaly, tracker
    result = run_demo(pipeline, numbers, overwrite=common.overwrite)
    show_results(pipeline.screen, result["table"], result["tests"])
    pipeline.screen.result(f"report: {result['report']}")
    emit(common, result)


@command(app, "train", one_process=True)
def train(
    common: Common,
    rce_epochs: RceEpochs = None,
    grpo_epochs: GrpoEpochs = None,
    keep: Keep = None,
    validate_on: ValidateOn = None,
    rl_data: Annotated[
        Path | None, Option(help="Train on this rollout file; with --embeddings, no dataset and no LVLM.")
    ] = None,
    embeddings: Annotated[
        Path | None, Option(help="(N, D) features for --rl-data: .pt, .pth, .npy or .safetensors")
    ] = None,
    run_dir: Annotated[Path | None, Option(help="Folder of the run, in place of the default one.")] = None,
    detect_anomaly: DetectAnomaly = False,
    tracker: Tracker = None,
    from_run: Annotated[
        Path | None,
        Option(help="Repeat this run in another folder, say what differs.", autocompletion=completion.run_folders),
    ] = None,
    selector: Annotated[
        str | None,
        Option(
            help="Train another selector: answer_match, epr, lever_lm, fixed_set.",
            autocompletion=completion.named("selector"),
        ),
    ] = None,
) -> None:
    """Features, pools and rollouts where missing; warm-up and GRPO; then the recommended checkpoint is converted."""
    check_tracker(tracker)
    if embeddings is not None and (common.features or any(key.startswith("features.") for key in common.set_ or [])):
        raise UsageError("--embeddings are the features: leave --features and features.* out")
    flags = {"rce.epochs": rce_epochs, "grpo.epochs": grpo_epochs, "keep": keep, "validate_on": validate_on}
    pipeline = make_pipeline(common, flags, run_dir, from_run, selector, own_features=embeddings is not None)
    if rl_data is None and from_run is None and (path := os.environ.get("RL_DATA_PATH", "").strip()):
        pipeline.screen.say(f"from the environment: RL_DATA_PATH={path}")
        rl_data = Path(path)
    own = {"rl_data": rl_data, "embeddings": embeddings, "from_run": from_run}
    plan_only(common, pipeline, "train", **own)
    refuse_resuming(common, pipeline)
    pipeline.detect_anomaly, pipeline.tracker = detect_anomaly, tracker
    # A dataset that nothing names is the embedded one.
    data = pipeline.config.data
    named = common.dataset is not None or bool(data.file) or data.okvqa_path != DataConfig.okvqa_path
    emit(common, pipeline.train(**own, overwrite=common.overwrite, dataset_named=named))


@command(app, "rollout")
def rollout(common: Common) -> None:
    """Only the rollouts: the costly part, in which the LVLM answers. torchrun shares it among GPUs and hosts."""
    pipeline = make_pipeline(common)
    plan_only(common, pipeline, "rollout")
    emit(common, pipeline.rollouts())


@command(app, "best-ckpt", one_process=True)
def best_ckpt(
    common: Common,
    run_dir: RunDir = None,
    strategy: Annotated[str, Option(help=", ".join(STRATEGIES), autocompletion=completion.strategies)] = "val_loss",
    show_all: Annotated[bool, Option("--show-all", help="Print every epoch.")] = False,
    log: Annotated[Path | None, Option(help="Choose from a training log, ours or Lever-Plus's.")] = None,
) -> None:
    """Pick an epoch by its metrics; the answer is kept in the run's best.json."""
    from lever_lm.cli.display import show_choice
    from lever_lm.training.select_checkpoint import check_strategy, choose, read_history
    from lever_lm.utils.atomic_io import write_json

    check_strategy(strategy)
    run, _, screen = run_without_pipeline(common, run_dir)
    run = run if log is None or run_dir is not None else None
    history = read_history(run, log)
    answer = choose(history, strategy, run)
    if answer["epoch"] is not None and run is not None:
        try:
            write_json(run.best, finite(answer))
        except LeverError as error:
            screen.say(f"warning: the choice is not kept: {error}; `--ckpt {answer['checkpoint']}` names it")
    show_choice(screen, history, answer, show_all)
    emit(common, answer)
    if answer["epoch"] is None:
        raise LeverError(answer["why"])


@command(app, "convert", one_process=True)
def convert(
    common: Common,
    ckpt: Annotated[Path | None, Argument(help="Checkpoint; by default the run's best.")] = None,
    output: Annotated[
        Path | None, Option(help="Where to, in place of <stem>_v2format.ckpt or <stem>_v3format.pt")
    ] = None,
    to: Annotated[str, Option(help="v2, or v3 for the way back")] = "v2",
    allow_truncate: Annotated[bool, Option("--allow-truncate", help="Keep the first of several layers.")] = False,
) -> None:
    """A v3 checkpoint to the v2 format, or back."""
    if to not in ("v2", "v3"):
        raise UsageError(f"--to takes v2 or v3, found {to!r}")
    pipeline = pipeline_of_run(common)
    plan_only(common, pipeline)
    emit(common, pipeline.convert(ckpt, output=output, to=to, allow_truncate=allow_truncate))


@command(app, "infer")
def infer(
    common: Common,
    shots: Annotated[str, Option(help="Numbers of demonstrations: 5, or 1,2,4, or 1-5")] = "4",
    ckpt: Ckpt = None,
    baselines: Annotated[bool, Option("--baselines", help="Also zero-shot, random, similarities and oracle.")] = False,
    icds: Annotated[
        Path | None, Option(help="Choices of your own, question_id → ICD question_ids, in place of a checkpoint.")
    ] = None,
    okvqa_stem: Annotated[
        bool, Option("--okvqa-stem", help="Reduce predictions as OK-VQA's `answer`s are, before scoring.")
    ] = False,
    against: Annotated[
        str | None, Option(help="Selectors set against it in one table, with their costs: all, or mmr,dpp,answer_match")
    ] = None,
) -> None:
    """N-shot inference with a checkpoint, or with choices of your own, on the evaluation split; torchrun shares it."""
    numbers = parse_shots(shots)
    if icds is not None and ckpt is not None:
        raise UsageError("--icds and --ckpt both say what is shown: give one of them")
    from lever_lm.cli.display import show_arena, show_results
    from lever_lm.evaluation import run as evaluation
    from lever_lm.evaluation.arena import parse_names
    from lever_lm.training.find_checkpoint import find_checkpoint

    find = None if icds else lambda run, _: find_checkpoint(run, ckpt, dict(os.environ))
    pipeline = pipeline_of_run(common, {"infer.okvqa_stem": okvqa_stem or None}, find=find)
    if common.dry_run:
        pipeline.inference = evaluation.planned_folder(pipeline, icds)
    names = parse_names(against) if against else []
    plan_only(common, pipeline, "infer", shots=numbers, baselines=baselines, against=names)
    rivals = {"against": names, "named": "all" not in against.split(",")} if against else {}
    result = evaluation.infer(pipeline, numbers, ckpt=ckpt, icds=icds, baselines=baselines, **rivals)
    if against:
        show_arena(pipeline.screen, result["arena"], result["score"])
    else:
        told = {"stemmed": result["okvqa_stem"], "score": result["score"]}
        show_results(pipeline.screen, result["results"], result["tests"], **told)
    emit(common, result)


@command(app, "diagnose", one_process=True)
def diagnose(
    common: Common,
    run_dir: RunDir = None,
    shots: Annotated[int, Option(min=1, help="Number of demonstrations.")] = 4,
    ckpt: Ckpt = None,
    against: Annotated[
        str | None, Option(help="Selectors whose picks are diagnosed too: img_text_sim,answer_match")
    ] = None,
) -> None:
    """What a sceptic asks of the demonstrations: images, answers, order, copies, format; --lvlm: another LVLM too."""
    from lever_lm.cli.display import show_findings
    from lever_lm.evaluation import run as evaluation
    from lever_lm.evaluation.arena import parse_names
    from lever_lm.training.find_checkpoint import find_checkpoint

    names = parse_names(against) if against else []
    find = lambda run, _: find_checkpoint(run, ckpt, dict(os.environ))  # noqa: E731
    other, common.lvlm = common.lvlm, None
    pipeline = pipeline_of_run(common, run_dir=run_dir, find=find)
    plan_only(common, pipeline)
    if other is not None:
        common.lvlm = other
        other = pipeline_of_run(common, run_dir=run_dir, find=find)
    result = evaluation.diagnose(pipeline, shots, against=names, other=other)
    show_findings(pipeline.screen, result)
    emit(common, result)


@command(app, "pick", one_process=True)
def pick(
    common: Common,
    image: Annotated[Path | None, Option(help="An image of yours: JPEG, PNG, WEBP, BMP or GIF.")] = None,
    question: Annotated[str | None, Option(help="What is asked about it.")] = None,
    example: Annotated[
        str | None, Option(help="A question_id of the evaluation split in place of both; by default the first.")
    ] = None,
    shots: Annotated[int, Option(min=1, help="Number of demonstrations.")] = 4,
    ckpt: Ckpt = None,
    no_answer: Annotated[bool, Option("--no-answer", help="Choose only; the LVLM is not needed.")] = False,
    prompt: Annotated[bool, Option("--prompt", help="Also print the prompt, as the LVLM is given it.")] = False,
) -> None:
    """The demonstrations a policy chooses for one image and question, why these, and the LVLM's answer."""
    if (image is None) != (question is None) or (image is not None and example is not None):
        raise UsageError("pick takes an --image with its --question, or --example QUESTION_ID, or none of them")
    from lever_lm.cli.pick import pick_for, show_picks, the_query
    from lever_lm.evaluation.retriever import Retriever
    from lever_lm.training.find_checkpoint import find_or_newest
    from lever_lm.training.from_checkpoint import change_lines, changes

    pipeline = pipeline_of_run(common, find=lambda run, layout: find_or_newest(run, layout, ckpt))
    plan_only(common, pipeline)
    path, why = pipeline.checkpoint
    changed = changes(path, pipeline.config)
    for line in (f"checkpoint: {path} ({why})", *change_lines(changed)):
        pipeline.screen.say(line)
    pipeline.check("data", "encoder", *([] if no_answer else ["lvlm"]), writes=not no_answer)
    retriever = Retriever(path, stages=pipeline)
    query, source = the_query(retriever, image and str(image), question, example)
    result = pick_for(retriever, query, shots, answer=not no_answer, prompt=prompt)
    result |= {"why": why, "changed": changed}
    show_picks(pipeline.screen, result, source)
    emit(common, result)


@command(app, "status")
def status(
    common: Common,
    run_dir: RunDir = None,
    all_: Annotated[bool, Option("--all", help="Every run below --results, a line each.")] = False,
) -> None:
    """How far a run is, and whether it is at work: epochs, speed, time left, metrics, GPU. Nothing is touched."""
    from lever_lm.cli.status import gpus, run_status, runs_below
    from lever_lm.cli.status_views import status_lines, status_row

    run, layout, screen = run_without_pipeline(common, run_dir)
    if all_:
        result = {"runs": runs_below(common.results)}
        lines = [status_row(found) for found in result["runs"]]
    else:
        result = {**run_status(run, layout), "gpus": gpus()}
        lines = status_lines(result)
    for line in lines:
        screen.result(line)
    emit(common, result)


@command(app, "export", one_process=True)
def export(
    common: Common,
    where: Annotated[
        list[Path] | None,
        Argument(metavar="[RUN_DIR] DIR", help="The run, by default the one the options name; and where to."),
    ] = None,
    ckpt: Annotated[str | None, Option(help="A path, best, or latest")] = None,
    license_: Annotated[str, Option("--license", help="Of the weights, as the hub names it.")] = "apache-2.0",
) -> None:
    """A checkpoint as a folder to share: weights, config, model card, picks and prompts. `--ckpt DIR` takes it."""
    where = where or []
    if len(where) > 2 or not (where or common.dry_run):
        raise UsageError(f"export takes [RUN_DIR] DIR, found {len(where)} folders: `lever export policy`")
    pipeline = pipeline_of_run(common, run_dir=where[0] if len(where) == 2 else None)
    plan_only(common, pipeline)
    from lever_lm.evaluation.export import export as write
    from lever_lm.training.find_checkpoint import find_checkpoint

    named = len(where) == 2 or common.run_name
    path, why = find_checkpoint(pipeline.run, ckpt, {} if named else dict(os.environ))
    pipeline.screen.say(f"checkpoint: {path} ({why})")
    result = write(path, why, where[-1], data=lambda: pipeline.data, license_=license_, overwrite=common.overwrite)
    for name, reason in result["left_out"].items():
        pipeline.screen.say(f"left out: {name}: {reason}")
    if not result["evaluated"]:
        pipeline.screen.say("no results of this checkpoint were found: `lever infer --baselines`, then export it again")
    pipeline.screen.result(f"exported: {result['folder']} (to share it: hf upload OWNER/NAME {result['folder']})")
    emit(common, result)


@command(app, "doctor")
def doctor(common: Common) -> None:
    """What is missing for a config, before any model is loaded: files, counts, models, GPU, disk; and what mends it."""
    from lever_lm.cli.table_view import look_at
    from lever_lm.training.preflight import ALL, examine

    pipeline = (pipeline_of_run if common.run_name else make_pipeline)(common)
    plan_only(common, pipeline)
    table = look_at(pipeline.config.data)
    # What cannot be read is told once, and not by the stages as well.
    needs = [stage for stage in ALL if stage != "data" or not table.missing]
    checks = [*table.missing, *examine(pipeline.config, pipeline.layout, needs, count=True)]
    missing = sum(check.status == "missing" for check in checks)
    for line in (*table.lines, *(check.line() for check in checks)):
        pipeline.screen.result(line)
    emit(common, {"ok": not missing, **table.json, "checks": [vars(check) for check in checks]})
    if missing:
        raise LeverError(f"{missing} missing: the lines above say what mends {'them' if missing > 1 else 'it'}")
    pipeline.screen.result("nothing is missing")


@command(app, "report", one_process=True)
def report(
    common: Common,
    runs: Annotated[
        list[Path] | None,
        Argument(
            metavar="RUN_DIR", help="One run folder, with --compare several.", autocompletion=completion.run_folders
        ),
    ] = None,
    compare: Annotated[bool, Option("--compare", help="Lay the further runs over the first; seeds: as one.")] = False,
    output: Annotated[Path | None, Option(help="Where to, in place of report.html in the run folder.")] = None,
    png: Annotated[Path | None, Option(metavar="DIR", help="Also its charts as PNG and PDF for papers.")] = None,
) -> None:
    """One self-contained HTML page: results, what was chosen and how surely, training, config; runs compared."""
    first, *others = runs or [None]
    if others and not compare:
        raise UsageError(f"{len(others) + 1} run folders make one page only with --compare")
    pipeline = pipeline_of_run(common, run_dir=first)
    plan_only(common, pipeline)
    from lever_lm.cli.display import show_seeds
    from lever_lm.evaluation.run import report as make_report

    result = make_report(pipeline, others, output, png)
    if result.get("seeds"):
        show_seeds(pipeline.screen, result["seeds"], result["score"])
    pipeline.screen.result(f"report: {result['report']}")
    for figure in result.get("figures", ()):
        pipeline.screen.result(f"figure: {figure}")
    emit(common, result)


app.add_typer(config_app, name="config")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    if version:
        echo(f"lever_lm {__version__}")
        raise Exit


def main() -> None:
    """Run the installed command."""
    entrypoint.main(app)
