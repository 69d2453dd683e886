"""The `lever` command: parse, resolve the config, call one stage. No logic; heavy imports stay inside the commands."""

import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from lever_lm import __version__
from lever_lm.errors import LeverError, UsageError

app = typer.Typer(
    name="lever",
    help="Learn which demonstrations to show a frozen vision-language model, and show them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEFAULT_DATASET, DEFAULT_LVLM = "digits", "tiny_qwen2.5_vl"


@dataclass
class Common:
    """Options that every command takes."""

    config: Annotated[Path | None, typer.Option(help="YAML of config keys, over the named ones.")] = None
    dataset: Annotated[str | None, typer.Option(help="configs/dataset/NAME.yaml: digits, okvqa_local")] = None
    lvlm: Annotated[str | None, typer.Option(help="configs/lvlm/NAME.yaml: tiny_qwen2.5_vl, qwen2.5_vl_3B, …")] = None
    sampler: Annotated[
        str | None, typer.Option(help="rand_sampler, text_sim_sampler, img_sim_sampler, mix_sampler")
    ] = None
    recipe: Annotated[str | None, typer.Option(help="configs/recipe/NAME.yaml, for example classic")] = None
    features: Annotated[
        str | None, typer.Option(help="What queries and ICDs are encoded by: query_img_text_icd_img_text, …")
    ] = None
    set_: Annotated[list[str] | None, typer.Option("--set", help="One config key: grpo.kl_beta=0.05 (repeatable)")] = (
        None
    )
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1")] = None
    limit: Annotated[int | None, typer.Option(min=2, help="Use N queries only, for a quick look.")] = None
    results: Annotated[Path, typer.Option(help="Folder for everything that is made.")] = Path("results")
    run_name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with a run, or refuse one that is there.")
    ] = True
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start the run over; its checkpoints are deleted.")] = (
        False
    )
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and with which config.")] = False
    json_: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout; all else goes to stderr.")] = (
        False
    )
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False


def command(name: str) -> Callable:
    """Register a function as a command: its first parameter becomes the Common options, the others are its own."""

    def register(function: Callable) -> Callable:
        signature = inspect.signature(function, eval_str=True)
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in list(signature.parameters.values())[1:]]
        shared = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields(Common)
        ]

        @wraps(function)
        def run(**values: Any) -> None:
            _state["debug"], _state["json"] = values["debug"], values["json_"]
            common = Common(**{f.name: values.pop(f.name) for f in fields(Common)})
            function(common, **values)

        run.__signature__ = signature.replace(parameters=[*own, *shared])
        run.__annotations__ = {p.name: p.annotation for p in [*own, *shared]}
        app.command(name)(run)
        return function

    return register


_state = {"debug": False, "json": False}

Strategy = Annotated[str, typer.Option(help="val_loss, ppo_loss, kl, adv_std or val_reward")]
RceEpochs = Annotated[int | None, typer.Option(min=0, help="Epochs of RCE warm-up.")]
GrpoEpochs = Annotated[int | None, typer.Option(min=0, help="Epochs of GRPO; raising it continues a finished run.")]
RunDir = Annotated[Path | None, typer.Argument(help="Run folder; by default the one the options name.")]


# ---------------------------------------------------------------------- commands


@command("demo")
def demo(
    common: Common,
    rce_epochs: RceEpochs = None,
    grpo_epochs: GrpoEpochs = None,
    shots: Annotated[str, typer.Option(help="Numbers of demonstrations: 1,2,4 or 1-5")] = "1,2,4",
) -> None:
    """The whole way on the embedded data and model, offline, in two minutes: ends with a table and a report."""
    common.recipe = common.recipe or "demo"
    common.run_name = common.run_name or "demo"
    numbers = parse_shots(shots)
    pipeline = _pipeline(common, _epochs(rce_epochs, grpo_epochs))
    if _planned(common, pipeline):
        return
    result = pipeline.demo(numbers, overwrite=common.overwrite)
    _show_results(pipeline.screen, result["table"], result["tests"])
    pipeline.screen.say(f"report: {result['report']}")
    _emit(common, result)


@command("train")
def train(
    common: Common,
    rce_epochs: RceEpochs = None,
    grpo_epochs: GrpoEpochs = None,
    rl_data: Annotated[Path | None, typer.Option(help="Train on this rollout file; no dataset, no LVLM.")] = None,
    embeddings: Annotated[Path | None, typer.Option(help="(N, D) features for --rl-data: .pt or .safetensors")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the run, in place of the default one.")] = None,
) -> None:
    """Features, pools and rollouts where missing; then RCE and GRPO; then the recommended checkpoint is converted."""
    if rl_data is None and (path := os.environ.get("RL_DATA_PATH", "").strip()):
        rl_data = Path(path)
    pipeline = _pipeline(common, _epochs(rce_epochs, grpo_epochs), run_dir)
    if _planned(common, pipeline):
        return
    _emit(common, pipeline.train(rl_data=rl_data, embeddings=embeddings, overwrite=common.overwrite))


@command("rollout")
def rollout(common: Common) -> None:
    """Only the rollouts: the costly part, in which the LVLM answers."""
    pipeline = _pipeline(common)
    if not _planned(common, pipeline):
        _emit(common, pipeline.rollouts())


@command("best-ckpt")
def best_ckpt(
    common: Common,
    run_dir: RunDir = None,
    strategy: Strategy = "val_loss",
    show_all: Annotated[bool, typer.Option("--show-all", help="Print every epoch.")] = False,
    log: Annotated[Path | None, typer.Option(help="Choose from a training log, ours or Lever-Plus's.")] = None,
) -> None:
    """Pick an epoch by its metrics; the answer is kept in the run's best.json."""
    from lever_lm.selection import check_strategy, choose, read_history

    check_strategy(strategy)
    pipeline = _pipeline(common, run_dir=run_dir)
    if _planned(common, pipeline):
        return
    run = pipeline.run if log is None or run_dir is not None else None
    history = read_history(run, log)
    answer = choose(history, strategy, run)
    _show_choice(pipeline.screen, history, answer, show_all)
    if answer["epoch"] is not None and run is not None:
        from lever_lm.runs import write_json

        write_json(run.best, _finite(answer))
    _emit(common, answer)
    if answer["epoch"] is None:
        raise LeverError(answer["why"])


@command("convert")
def convert(
    common: Common,
    ckpt: Annotated[Path | None, typer.Argument(help="Checkpoint; by default the run's best.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to, in place of <stem>_v2format.ckpt")] = None,
    to: Annotated[str, typer.Option(help="v2, or v3 for the way back")] = "v2",
    allow_truncate: Annotated[bool, typer.Option("--allow-truncate", help="Keep the first of several layers.")] = False,
) -> None:
    """A v3 checkpoint to the v2 format, or back."""
    if to not in ("v2", "v3"):
        raise UsageError(f"--to takes v2 or v3, found {to!r}")
    pipeline = _pipeline(common)
    if not _planned(common, pipeline):
        _emit(common, pipeline.convert(ckpt, output=output, to=to, allow_truncate=allow_truncate))


@command("infer")
def infer(
    common: Common,
    shots: Annotated[str, typer.Option(help="Numbers of demonstrations: 5, or 1,2,4, or 1-5")] = "4",
    ckpt: Annotated[str | None, typer.Option(help="A path, best, or latest")] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also zero-shot, random, similarities and oracle.")
    ] = False,
) -> None:
    """N-shot inference with a checkpoint on the evaluation split."""
    numbers = parse_shots(shots)
    pipeline = _pipeline(common)
    if _planned(common, pipeline):
        return
    result = pipeline.infer(numbers, ckpt=ckpt, baselines=baselines)
    _show_results(pipeline.screen, result["results"], result["tests"])
    _emit(common, result)


@command("report")
def report(common: Common, run_dir: RunDir = None) -> None:
    """One self-contained HTML page of an evaluated run."""
    pipeline = _pipeline(common, run_dir=run_dir)
    if not _planned(common, pipeline):
        result = pipeline.report()
        pipeline.screen.say(f"report: {result['report']}")
        _emit(common, result)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"lever_lm {__version__}")
        raise typer.Exit


# ---------------------------------------------------------------------- from options to a pipeline


def parse_shots(text: str) -> list[int]:
    """`5`, `1,2,4`, `1-5` → numbers. Raises UsageError on anything else, zero included."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UsageError(f"--shots takes 5, 1,2,4 or 1-5, found {text!r}")
        numbers += range(int(first), int(last if dash else first) + 1)
    if not numbers or min(numbers) < 1 or max(numbers) > 1000:
        raise UsageError(f"--shots must be between 1 and the pool size, found {text!r}; zero-shot is among --baselines")
    return sorted(set(numbers))


def _epochs(rce: int | None, grpo: int | None) -> dict:
    values: dict = {}
    if rce is not None:
        values["rce"] = {"epochs": rce}
    if grpo is not None:
        values["grpo"] = {"epochs": grpo}
    return values


def _pipeline(common: Common, flags: dict | None = None, run_dir: Path | None = None):
    """The pipeline of a command line: named YAMLs < --config < environment < --set < flags."""
    from lever_lm.console import Screen
    from lever_lm.settings import resolve

    screen = Screen(to_stderr=common.json_, quiet=common.quiet)
    if common.run_name is not None and Path(common.run_name).name != common.run_name:
        raise UsageError(f"--run-name takes a folder name, found {common.run_name!r}")
    flags = dict(flags or {})
    for key, value in (("seed", common.seed), ("device", common.device)):
        if value is not None:
            flags[key] = value
    if common.features is not None:
        flags["features"] = {"name": common.features}
    if common.limit is not None:
        flags["rollout"], flags["infer"] = {"num_queries": common.limit}, {"num_queries": common.limit}
    names = {
        "dataset": common.dataset or DEFAULT_DATASET,
        "lvlm": common.lvlm or DEFAULT_LVLM,
        "sampler": common.sampler,
        "recipe": common.recipe,
    }
    config, in_effect = resolve(names, common.config, common.set_ or [], flags)
    for variable in in_effect:
        screen.say(f"from the environment: {variable}")
    from lever_lm.pipeline import Pipeline

    pipeline = Pipeline(config, screen, results=common.results, run_name=common.run_name, run_dir=run_dir)
    if not common.resume and pipeline.run.config.is_file():
        raise LeverError(
            f"{pipeline.run.path} holds a run already: drop --no-resume to go on with it, or --overwrite it"
        )
    return pipeline


def _planned(common: Common, pipeline) -> bool:
    """With --dry-run: show the plan instead of doing it."""
    if not common.dry_run:
        return False
    from lever_lm.config import to_dict

    layout = pipeline.layout
    places = {
        "features": layout.features,
        "rollouts": layout.rollouts,
        "run": pipeline.run.path,
        "inference": layout.inference,
    }
    for name, path in places.items():
        pipeline.screen.say(f"{name}: {path} ({'there' if path.exists() else 'to be made'})")
    _emit(common, {"config": to_dict(pipeline.config), "paths": {name: str(path) for name, path in places.items()}})
    return True


# ---------------------------------------------------------------------- output


def _emit(common: Common, result: dict) -> None:
    if common.json_:
        sys.stdout.write(json.dumps(_finite(result), ensure_ascii=False) + "\n")


def _finite(value):
    """NaN and infinity as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value


def _show_results(screen, results: list[dict], tests: list[dict]) -> None:
    """Methods down, shots across: accuracy and its 95 % interval."""
    methods = list(dict.fromkeys(row["method"] for row in results))
    shots = sorted({row["shots"] for row in results if row["shots"]}) or [0]
    cells = {
        (row["method"], row["shots"]): f"{row['accuracy']:.3f} [{row['ci'][0]:.3f}, {row['ci'][1]:.3f}]"
        for row in results
    }
    rows = [
        [m, *(cells.get((m, k), cells.get((m, 0), "") if i == 0 else "") for i, k in enumerate(shots))] for m in methods
    ]
    header = ["method", *(f"{k} shot{'s' * (k > 1)}" for k in shots)]
    screen.table(f"VQA accuracy on {results[0]['n']} queries, with 95 % intervals", header, rows)
    for test in tests:
        if test["against"] in ("img_text_sim", "rce"):
            screen.say(
                f"{test['method']} − {test['against']} at {test['shots']} shots: {test['difference']:+.3f} "
                f"[{test['low']:+.3f}, {test['high']:+.3f}], p = {test['p']:.4f} (paired)"
            )


def _show_choice(screen, history, answer: dict, show_all: bool) -> None:
    from lever_lm.journal import table_header, table_row

    for note in history.notes:
        screen.say(f"note: {note}")
    if show_all:
        for line in [*table_header(history.phase), *(table_row(row) for row in history.rows)]:
            screen.say(line)
    for item in answer["excluded"]:
        screen.say(f"excluded: epoch {item['epoch']} ({item['why']})")
    if answer["epoch"] is not None:
        place = f": {answer['checkpoint']}" if answer["checkpoint"] else ""
        screen.say(f"{answer['strategy']}: epoch {answer['epoch']}{place} ({answer['why']}; from {answer['source']})")
        if answer["checkpoint"] and not answer["exists"]:
            screen.say("warning: that checkpoint file is not there")
    others = ", ".join(f"{name} {epoch if epoch is not None else 'none'}" for name, epoch in answer["others"].items())
    screen.say(f"other strategies: {others}")


def main() -> None:
    """Entry point: exit status 0 done, 1 could not, 2 usage, 130 interrupted; one message on stderr, no traceback."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    import click

    try:
        status = app(args=arguments, prog_name="lever", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.ClickException as error:
        error.show(sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _fail("interrupted; run the same command again to go on", 130)
    except UsageError as error:
        return _fail(str(error), 2)
    except LeverError as error:
        return _fail(str(error), 1)
    except Exception as error:
        return _fail(f"{type(error).__name__}: {error} (a defect of lever_lm; --debug shows where)", 1)


def _fail(message: str, status: int) -> int:
    if _state["debug"]:
        traceback.print_exc()
    sys.stderr.write(f"lever: {message}\n")
    return status
