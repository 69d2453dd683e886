"""Options that every command takes, what they stand for, and what --dry-run and --json do with them."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from lever_lm.cli import completion
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.terminal import json_text, shown

DEFAULT_DATASET, DEFAULT_LVLM = "digits", "tiny_qwen2.5_vl"


@dataclass
class Common:
    """Options that every command takes."""

    config: Annotated[
        Path | None,
        typer.Option(help="YAML of config keys, over the named ones; folders that it names win over the environment."),
    ] = None
    dataset: Annotated[
        str | None,
        typer.Option(help="configs/dataset/NAME.yaml: digits, okvqa_local", autocompletion=completion.named("dataset")),
    ] = None
    lvlm: Annotated[
        str | None,
        typer.Option(
            help="configs/lvlm/NAME.yaml: tiny_qwen2.5_vl, qwen2.5_vl_3B, …", autocompletion=completion.named("lvlm")
        ),
    ] = None
    server: Annotated[
        str | None,
        typer.Option(help="URL[,URL…] of OpenAI-compatible servers that answer as the LVLM: http://HOST:8000/v1"),
    ] = None
    sampler: Annotated[
        str | None,
        typer.Option(
            help="rand_sampler, text_sim_sampler, img_sim_sampler, mix_sampler",
            autocompletion=completion.named("sampler"),
        ),
    ] = None
    recipe: Annotated[
        str | None,
        typer.Option(help="configs/recipe/NAME.yaml, for example classic", autocompletion=completion.named("recipe")),
    ] = None
    features: Annotated[
        str | None,
        typer.Option(
            help="What queries and ICDs are encoded by: query_img_text_icd_img_text, …",
            autocompletion=completion.features,
        ),
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="One config key: grpo.kl_beta=0.05 (repeatable)", autocompletion=completion.set_keys
        ),
    ] = None
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1")] = None
    limit: Annotated[int | None, typer.Option(min=2, help="Use N queries only, for a quick look.")] = None
    skip_bad_examples: Annotated[
        bool, typer.Option("--skip-bad-examples", help="Go on without examples that cannot be read, and count them.")
    ] = False
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Fetch images that parquet files name by http(s) address.")
    ] = False
    results: Annotated[Path, typer.Option(help="Folder for everything that is made.")] = Path("results")
    run_name: Annotated[
        str | None,
        typer.Option(
            help="Name of the run's folder. What uses a run uses it as it was trained.",
            autocompletion=completion.run_names,
        ),
    ] = None
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with a run, or refuse one that is there.")
    ] = True
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Start the run over, its checkpoints are deleted; of an export: replace it."),
    ] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and with which config.")] = False
    json_: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout; all else goes to stderr.")] = (
        False
    )
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only; no warnings, no progress.")] = (
        False
    )
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Also versions, paths, cache hits, and every warning of every epoch.",
        ),
    ] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False


def command(app: typer.Typer, name: str) -> Callable:
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
            common = Common(**{f.name: values.pop(f.name) for f in fields(Common)})
            _in_force.append(common)
            if common.quiet and common.verbose:
                raise UsageError("--quiet and --verbose ask for less and for more: give one of them")
            from lever_lm.utils.file_hashes import DIGESTS

            try:
                with DIGESTS.saved_at_the_end():
                    function(common, **values)
            finally:
                from lever_lm.utils.console import settle

                settle()  # no bar outlives its command

        run.__signature__ = signature.replace(parameters=[*own, *shared])
        run.__annotations__ = {p.name: p.annotation for p in [*own, *shared]}
        app.command(name)(run)
        return function

    return register


_in_force: list[Common] = []


def debugging() -> bool:
    """Whether the command that ran asked for tracebacks."""
    return bool(_in_force) and _in_force[-1].debug


def parse_shots(text: str) -> list[int]:
    """`5`, `1,2,4`, `1-5` → numbers. Raises UsageError on anything else, zero included."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and len(first) < 5 and len(last) < 5):
            raise UsageError(f"--shots takes 5, 1,2,4 or 1-5, found {shown(text)}")
        if int(last) < int(first):
            raise UsageError(f"--shots {shown(text)}: {part.strip()} runs backwards")
        numbers.update(range(int(first), int(last) + 1))
    if min(numbers) < 1:
        raise UsageError(f"--shots must be 1 or more, found {shown(text)}; zero-shot is among --baselines")
    return sorted(numbers)


def training_flags(rce: int | None, grpo: int | None, keep: int | None) -> dict:
    """Config values of --rce-epochs, --grpo-epochs and --keep."""
    values: dict = {} if keep is None else {"keep": keep}
    if rce is not None:
        values["rce"] = {"epochs": rce}
    if grpo is not None:
        values["grpo"] = {"epochs": grpo}
    return values


def named_yamls(common: Common) -> dict[str, str | None]:
    """Kind → the name of its YAML in configs/, the default dataset and LVLM where none is named; None for no YAML."""
    return {
        "dataset": common.dataset or DEFAULT_DATASET,
        "lvlm": common.lvlm or DEFAULT_LVLM,
        "sampler": common.sampler,
        "recipe": common.recipe,
    }


def option_values(common: Common) -> dict[str, dict]:
    """How a common option is spelt → the nested config values it stands for, of those that are given."""
    few = {"num_queries": common.limit}
    spelt = {
        "--seed": (common.seed, {"seed": common.seed}),
        "--device": (common.device, {"device": common.device}),
        "--features": (common.features, {"features": {"name": common.features}}),
        "--server": (common.server, {"lvlm": {"server": common.server}}),
        "--limit": (common.limit, {"rollout": few, "reward": {"max_groups": common.limit}, "infer": few}),
        "--skip-bad-examples": (common.skip_bad_examples or None, {"data": {"skip_bad_examples": True}}),
        "--allow-remote": (common.allow_remote or None, {"data": {"allow_remote": True}}),
    }
    return {option: values for option, (given, values) in spelt.items() if given is not None}


def dataset_named(common: Common, config) -> bool:
    """Return whether the command line, a config or the environment says which dataset is meant: else it is the embedded
    one, by default."""
    from lever_lm.config.schema import DataConfig

    return common.dataset is not None or config.data.okvqa_path != DataConfig.okvqa_path


def refuse_resuming(common: Common, pipeline) -> None:
    """With --no-resume: raise LeverError where the run's folder holds a run already."""
    if not common.resume and not common.overwrite and pipeline.run.config.is_file():
        raise LeverError(
            f"{pipeline.run.path} holds a run already: drop --no-resume to go on with it, or --overwrite it"
        )


def planned(
    common: Common,
    pipeline,
    command: str = "",
    *,
    rl_data: Path | None = None,
    embeddings: Path | None = None,
    from_run: Path | None = None,
    answers: int = 0,
) -> bool:
    """With --dry-run: show the plan instead of doing it. For the long commands that is their stages and what is missing
    (rl_data, embeddings: files of the user's own, else those of the run `from_run`; answers: evaluation prompts of each
    query)."""
    if not common.dry_run:
        return False
    import yaml

    from lever_lm.cli.dry_run import as_json, in_all, make_plan
    from lever_lm.config.schema import to_dict
    from lever_lm.training.environment import own_files
    from lever_lm.training.preflight import ALL, examine
    from lever_lm.training.run_dir import RunFolder
    from lever_lm.utils.file_hashes import DIGESTS

    DIGESTS.keep_nothing()
    layout, places = pipeline.layout, _places(pipeline)
    for line in yaml.safe_dump(to_dict(pipeline.config), sort_keys=False).splitlines():
        pipeline.screen.say(line)
    show_places(pipeline)
    plan = {"config": to_dict(pipeline.config), "paths": {name: str(path) for name, path in places.items()}}
    if command:
        files = own_files(RunFolder(from_run)) if from_run is not None else {}
        rl_data, embeddings = rl_data or files.get("rl_data"), embeddings or files.get("embeddings")
        needs = ALL if rl_data is None or pipeline.config.grpo.online else () if embeddings else ("data", "encoder")
        checks = [c for c in examine(pipeline.config, layout, needs) if c.status != "ok"]
        own = {"rl_data": rl_data, "embeddings": embeddings}
        where = {"answers": answers, "inference": pipeline.inference}
        stages = make_plan(pipeline.config, layout, pipeline.run, command, **own, **where)
        for line in (*(check.line() for check in checks), *(stage.line() for stage in stages)):
            pipeline.screen.say(line)
        total = in_all(stages)
        pipeline.screen.say(f"{total.line()}; estimates are good to a factor of 3")
        sums = {"lvlm_calls": total.lvlm_calls, "seconds": total.seconds, "bytes": total.bytes}
        plan |= {**sums, "stages": as_json(stages), "missing": [vars(c) for c in checks]}
    emit(common, plan)
    return True


def _places(pipeline) -> dict[str, Path]:
    """Where the stages of a pipeline leave what they make."""
    layout = pipeline.layout
    made = {"features": layout.features, "rollouts": layout.rollouts}
    return {**made, "run": pipeline.run.path, "inference": pipeline.inference}


def show_places(pipeline) -> None:
    """Say where the stages of a pipeline leave what they make, and whether it is there."""
    for name, path in _places(pipeline).items():
        pipeline.screen.say(f"{name}: {path} ({'there' if path.exists() else 'to be made'})")


def emit(common: Common, result: dict) -> None:
    """With --json: the result on stdout, one line that does not steer a terminal."""
    if common.json_:
        sys.stdout.write(json_text(finite(result)) + "\n")


def finite(value):
    """NaN and infinity as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value
