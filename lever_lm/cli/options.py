"""Options that every command takes, the config values that they stand for, and what --json does."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from functools import reduce, wraps
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from lever_lm.cli import completion
from lever_lm.cli.completion import named
from lever_lm.config.load import named_yaml
from lever_lm.config.values import dotted, merge
from lever_lm.utils.distributed import Shards
from lever_lm.utils.errors import UsageError
from lever_lm.utils.terminal import json_text, shown

DEFAULT_DATASET, DEFAULT_LVLM = "digits", "tiny_qwen2.5_vl"


def _option(text: str, *names: str, default: Any = None, complete=None, **how: Any) -> Any:
    """A field of Common. text: its help; names: its spellings, by default that of the field; complete: what a shell
    offers for it; how: the rest of what `typer.Option` takes."""
    return field(default=default, metadata={"names": names, "help": text, "autocompletion": complete, **how})


def _switch(text: str, *names: str) -> Any:
    """A field of Common that is False unless the option is given."""
    return _option(text, *names, default=False)


@dataclass
class Common:
    """Options that every command takes."""

    config: Path | None = _option(
        "YAML of config keys, over the named ones; folders that it names win over the environment."
    )
    data: str | None = _option(
        "Data of your own: a .jsonl, .csv, .tsv or .parquet file, a folder of these, or hub:OWNER/NAME.",
        complete=completion.tables,
    )
    val: str | None = _option(
        "The evaluation split, where --data holds the training alone.", complete=completion.tables
    )
    task: str | None = _option(
        "How it is asked and scored: vqa, short_answer, choice, number, caption", complete=named("task")
    )
    dataset: str | None = _option("configs/dataset/NAME.yaml: digits, okvqa_local", complete=named("dataset"))
    lvlm: str | None = _option("configs/lvlm/NAME.yaml: tiny_qwen2.5_vl, qwen2.5_vl_3B, …", complete=named("lvlm"))
    server: str | None = _option("URL[,URL…] of OpenAI-compatible servers that answer as the LVLM: http://HOST:8000/v1")
    sampler: str | None = _option(
        "rand_sampler, text_sim_sampler, img_sim_sampler, mix_sampler", complete=named("sampler")
    )
    recipe: str | None = _option("configs/recipe/NAME.yaml, for example classic", complete=named("recipe"))
    features: str | None = _option(
        "What queries and ICDs are encoded by: query_img_text_icd_img_text, …", complete=completion.features
    )
    set_: list[str] | None = _option("One config key: grpo.kl_beta=0.05 (repeatable)", complete=completion.set_keys)
    seed: int | None = _option("Seed of everything random.")
    device: str | None = _option("auto, cpu, cuda, cuda:1")
    limit: int | None = _option("Use N queries only, for a quick look.", min=2)
    skip_bad_examples: bool = _switch("Go on without examples that cannot be read, and count them.")
    allow_remote: bool = _switch("Fetch images that parquet files name by http(s) address.")
    results: Path = _option("Folder for everything that is made.", default=Path("results"))
    run_name: str | None = _option(
        "Name of the run's folder. What uses a run uses it as it was trained.", complete=completion.run_names
    )
    resume: bool = _option("Go on with a run, or refuse one that is there.", "--resume/--no-resume", default=True)
    overwrite: bool = _switch("Start the run over, its checkpoints are deleted; of an export: replace it.")
    dry_run: bool = _switch("Show what would be done, and with which config.")
    json_: bool = _switch("The result as JSON on stdout; all else goes to stderr.")
    quiet: bool = _switch("Results and errors only; no warnings, no progress.", "--quiet", "-q")
    verbose: bool = _switch("Also versions, paths and cache hits.", "--verbose", "-v")
    debug: bool = _switch("Show tracebacks.")


# Common option → the config keys that it sets.
_KEYS = {
    "data": ["data.file"],
    "val": ["data.val_file"],
    "server": ["lvlm.server"],
    "features": ["features.name"],
    "seed": ["seed"],
    "device": ["device"],
    "limit": ["rollout.num_queries", "reward.max_groups", "infer.num_queries"],
    "skip_bad_examples": ["data.skip_bad_examples"],
    "allow_remote": ["data.allow_remote"],
}


def _spelling(name: str) -> str:
    """`--dry-run` of dry_run, `--set` of set_."""
    return f"--{name.strip('_').replace('_', '-')}"


def _parameter(option: Field) -> Parameter:
    """A field of Common as a parameter of a command."""
    how = dict(option.metadata)
    names = how.pop("names") or [_spelling(option.name)]
    annotation = Annotated[option.type, typer.Option(*names, **how)]
    return Parameter(option.name, Parameter.KEYWORD_ONLY, default=option.default, annotation=annotation)


_in_force: list[Common] = []


def command(app: typer.Typer, name: str, *, one_process: bool = False) -> Callable:
    """Register a function as a command: its first parameter becomes the Common options, the others are its own.
    one_process: the command is refused under torchrun."""

    def register(function: Callable) -> Callable:
        signature = inspect.signature(function, eval_str=True)
        own = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in list(signature.parameters.values())[1:]]
        parameters = [*own, *map(_parameter, fields(Common))]

        @wraps(function)
        def run(**values: Any) -> None:
            from lever_lm.utils.console import settle

            common = Common(**{f.name: values.pop(f.name) for f in fields(Common)})
            _in_force.append(common)
            if common.quiet and common.verbose:
                raise UsageError("--quiet and --verbose ask for less and for more: give one of them")
            if one_process and (world := Shards.from_environment().world) > 1:
                raise UsageError(
                    f"`lever {name}` is the work of one process, not of {world} under torchrun: first let all of them "
                    f"answer, `torchrun --nproc-per-node=N -m lever_lm rollout …`, then run `lever {name} …` plainly"
                )
            try:
                function(common, **values)
            finally:
                settle()  # no bar outlives its command

        run.__signature__ = signature.replace(parameters=parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name)(run)
        return function

    return register


def debugging() -> bool:
    """Return whether the command that ran asked for tracebacks."""
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


def named_yamls(common: Common, *, table: bool = False) -> dict[str, str | None]:
    """Kind → the name of its YAML in configs/; None for no YAML. Where none is named: the default dataset, unless the
    data are a `table` of the user's own, and the default LVLM, unless the dataset brings its own."""
    dataset = common.dataset or (None if table else DEFAULT_DATASET)
    brings = dataset is not None and "lvlm" in named_yaml("dataset", dataset)
    lvlm = common.lvlm or (None if brings else DEFAULT_LVLM)
    names = {"dataset": dataset, "lvlm": lvlm, "sampler": common.sampler}
    # A task says how long its answers are, which an LVLM's YAML may say of all; a recipe may choose another reward.
    return {**names, "task": common.task, "recipe": common.recipe}


def nested(values: dict[str, Any]) -> dict:
    """Dotted config keys with their values, nested by section; keys whose value is None are left out."""
    return reduce(merge, (dotted(key, value) for key, value in values.items() if value is not None), {})


def option_values(common: Common) -> dict[str, dict]:
    """Return the spelling of each common option that is given, with the nested config values that it sets."""
    given = {name: getattr(common, name) for name in _KEYS}
    return {
        _spelling(name): nested(dict.fromkeys(_KEYS[name], value))
        for name, value in given.items()
        if value is not None and value is not False
    }


def emit(common: Common, result: dict) -> None:
    """With --json: write the result to stdout, as one line that does not steer a terminal."""
    if common.json_:
        sys.stdout.write(json_text(finite(result)) + "\n")


def finite(value):
    """Replace NaN and infinity by null: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value
