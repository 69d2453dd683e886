"""From the options of a command to the pipeline that it works with: one that makes something new, or that of a run."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer import Exit

from lever_lm.cli.options import Common, emit, nested, option_values
from lever_lm.cli.own_data import check_val, fresh_layers, layers_on_run, task_line
from lever_lm.config.load import Layer, Layers, file_layer, layers
from lever_lm.config.schema import Config, DataConfig
from lever_lm.training.metrics import PHASES
from lever_lm.training.run_dir import Layout, RunFolder
from lever_lm.utils.errors import LeverError, UsageError

_KINDS = ("dataset", "lvlm", "sampler", "task", "recipe")  # of which a later one's values count
NO_CONFIG = (*_KINDS, "config", "data", "val")  # options that a config in their place leaves no room for


def make_pipeline(
    common: Common,
    flags: dict | None = None,
    run_dir: Path | None = None,
    from_run: Path | None = None,
    selector: str | None = None,
    *,
    own_features: bool = False,
):
    """The pipeline of a command line that makes something: named YAMLs < --config < environment < --set < flags. The
    config of the run folder `from_run` stands in the place of the first two.

    flags: dotted config keys that the command's own options set, None for an option that is not given. selector: the
    name of a YAML in configs/selector, over the recipe; its run has that name unless it is given another. own_features:
    the features are a file of the user's own.
    """
    _check_run_name(common.run_name)
    run_name, sets, options = common.run_name, common.set_ or [], _options(common, flags)
    _check_selector(selector)
    if from_run is None:
        made = fresh_layers(common, file_layer(common.config), options, selector=selector)
        own_data = common.dataset is None and made.config().data.okvqa_path != DataConfig.okvqa_path
        if own_features or own_data:
            _own_warmup(made.found, "--embeddings" if own_features else "data.okvqa_path")
        run_name = run_name or selector
    else:
        from lever_lm.training.environment import config_of

        if selector:
            raise UsageError("--from-run brings its own config: leave --selector out")
        refuse_options(common, "--from-run brings its own config", *NO_CONFIG)
        made = layers({}, None, sets, options, base=Layer("base", config_of(RunFolder(from_run))))
        run_name = run_name or f"{from_run.resolve().name}_repeat"
    if not common.overwrite:
        made = _going_on(made, RunFolder(run_dir or Layout(made.config(), common.results, run_name).run))
    return _pipeline(common, made, run_name, run_dir)


def _own_warmup(found: list[Layer], why: str) -> None:
    """Put the default warm-up over that of a dataset's YAML where the data are others than the YAML's: what pays there
    need not pay here, and features of the user's own have no answers to match. why: what says so."""
    places = [place for place, layer in enumerate(found) if "warmup" in layer.values]
    if places and found[places[-1]].source.startswith("configs/dataset/"):
        found.insert(places[-1] + 1, Layer(why, {"warmup": Config.warmup}))


def _going_on(made: Layers, run: RunFolder) -> Layers:
    """Return the layers of a command that goes on with the run in a folder, if there is one: the size of its pools at
    inference stays unless a layer names another, so that a run of 0.1 goes on as well."""
    with contextlib.suppress(LeverError):  # `RunFolder.check` refuses what cannot be read
        infer = run.settings()["infer"] if run.config.is_file() else None
        if isinstance(infer, dict):
            own = Layer("the run", {"infer": {"pool_size": infer["pool_size"]}})
            return made._replace(found=[own, *made.found])
    return made


def pipeline_of_run(
    common: Common,
    flags: dict | None = None,
    *,
    run_dir: Path | None = None,
    find: Callable[[Any, Any], tuple[Path, str]] | None = None,
):
    """The pipeline of a command on a run: the run's own config, and over it what the command line says. Where there is
    none, that of the command line alone.

    run_dir: the run's folder; by default the one that the options name. find: (RunFolder, its Layout) → the checkpoint
    that is used and why, for a command that uses one: the config beside it counts, and `Pipeline.checkpoint` is it.
    With --dry-run none need be there.
    """
    from lever_lm.training.find_checkpoint import locate, values_of
    from lever_lm.training.from_checkpoint import layers_beside

    made, file, layout, folder = _named_run(common, flags)
    run = RunFolder(run_dir or folder)
    values, checkpoint, lacking = {}, None, None
    try:
        checkpoint = find(run, layout) if find else None
        values = locate(checkpoint[0])[2] if find else values_of(run)
    except LeverError as error:
        if find is None or not common.dry_run:
            raise
        lacking = f"without --dry-run this stops: {error}"
    if values:
        named = checkpoint[0] if checkpoint else run.path
        names = {kind: getattr(common, kind) for kind in _KINDS}
        made = layers_beside(values, named, names, file, common.set_ or [], _options(common, flags))
        made = layers_on_run(common, made)
    pipeline = _pipeline(common, made, common.run_name, run_dir, run)
    pipeline.checkpoint = checkpoint
    if lacking:
        pipeline.screen.say(lacking)
    if values:
        pipeline.screen.detail(f"the setting is that of {named}")
    return pipeline


def run_without_pipeline(common: Common, run_dir: Path | None) -> tuple[RunFolder, Layout | None, Any]:
    """The run in `run_dir`, by default the one that the options name with the Layout that they give, and a Screen: for
    a command that needs no pipeline, which would load torch. With --dry-run the plan is shown instead."""
    from lever_lm.utils.console import Screen

    if common.dry_run:
        plan_only(common, pipeline_of_run(common, run_dir=run_dir))
    layout, folder = (None, run_dir) if run_dir is not None else _named_run(common)[2:]
    return RunFolder(folder), layout, Screen(to_stderr=common.json_, quiet=common.quiet, verbose=common.verbose)


def _named_run(common: Common, flags: dict | None = None) -> tuple[Any, Any, Any, Path]:
    """The layers of a command line, that of its --config, the Layout that they give, and the folder of the run that the
    options name. A --run-name without a folder where no option names a dataset is that of the only dataset that has
    such a run. Raises UsageError where several have."""
    _check_run_name(common.run_name)
    file = file_layer(common.config)
    made = fresh_layers(common, file, _options(common, flags))
    layout = Layout(made.config(), common.results, common.run_name)
    named = common.dataset or common.data or (file and "data" in file.values)
    named = named or any(item.startswith(("data.", "data=")) for item in common.set_ or [])
    if common.run_name is None or named or layout.run.is_dir():
        return made, file, layout, layout.run
    found = sorted(path for path in common.results.glob("*/model_cpk/*") if path.name == common.run_name)
    if len(found) > 1:
        folders = ", ".join(map(str, found))
        raise UsageError(f"--run-name {common.run_name} is a run of {len(found)} datasets ({folders}): add --dataset")
    return made, file, layout, found[0] if found else layout.run


def _options(common: Common, flags: dict | None) -> dict[str, dict]:
    own = nested(flags or {})
    return {**option_values(common), **({"flags": own} if own else {})}


def _pipeline(common: Common, made, run_name: str | None, run_dir: Path | None, run=None):
    """Return the pipeline of layers, and of the RunFolder `run` if given. Say which variables of the environment
    count and which are passed over; with --verbose also versions and places."""
    from lever_lm.training.environment import versions
    from lever_lm.training.pipeline import Pipeline
    from lever_lm.utils.console import Screen

    quiet = common.quiet and not common.dry_run  # a plan is what was asked for
    screen, config = Screen(to_stderr=common.json_, quiet=quiet, verbose=common.verbose), made.config()
    check_val(common, config)
    for variable in made.in_effect:
        screen.say(f"from the environment: {variable}")
    for variable in made.passed_over:
        screen.say(f"passed over: {variable}")
    if line := task_line(common, made):
        screen.say(line)
    pipeline = Pipeline(config, screen, results=common.results, run_name=run_name, run_dir=run_dir)
    pipeline.run = run or pipeline.run
    if common.verbose and not common.dry_run:
        found = ", ".join(f"{name} {number or 'none'}" for name, number in versions().items())
        screen.detail(f"versions: {found}")
        from lever_lm.cli.dry_run import show_places

        show_places(pipeline)
    return pipeline


def _check_run_name(name: str | None) -> None:
    if name is not None and (name.startswith(".") or Path(name).name != name):
        raise UsageError(f"--run-name takes a folder name, found {name!r}")


def _check_selector(name: str | None) -> None:
    """Raise UsageError for a selector of the table that has no training of its own."""
    if name in PHASES:
        raise UsageError(f"--selector {name}: `lever train` trains rce, then grpo, by itself: leave --selector out")
    from lever_lm.selectors import SELECTORS  # loads torch

    if name in SELECTORS and SELECTORS[name].kind not in ("learnt", "file"):
        raise UsageError(
            f"--selector {name}: it learns nothing, so there is nothing to train: `lever infer --against {name}`"
        )


def refuse_options(common: Common, why: str, *names: str) -> None:
    """Raise UsageError for options that would only seem to change the config."""
    if extra := [f"--{name}" for name in names if getattr(common, name) is not None]:
        raise UsageError(f"{why}: leave {', '.join(extra)} out; --set changes single keys")


def refuse_resuming(common: Common, pipeline) -> None:
    """Raise LeverError where the run's folder holds a run already and --no-resume is given."""
    if not common.resume and not common.overwrite and pipeline.run.config.is_file():
        raise LeverError(
            f"{pipeline.run.path} holds a run already: drop --no-resume to go on with it, or --overwrite it"
        )


def plan_only(common: Common, pipeline, command: str = "", **plan: Any) -> None:
    """With --dry-run: show what the command would do, and end here. `command` and `plan`: see `dry_run`."""
    if common.dry_run:
        from lever_lm.cli.dry_run import show_plan

        emit(common, show_plan(pipeline, command, **plan))
        raise Exit
