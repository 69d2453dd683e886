"""`lever config`: what config a command line gives, what set each value, and how two configs differ."""

from typing import Annotated

import typer

from lever_lm.cli import completion
from lever_lm.cli.options import Common, command, emit, named_yamls, option_values
from lever_lm.utils.errors import UsageError

config_app = typer.Typer(help="Show the config that options give or a run has, or compare two.", no_args_is_help=True)

Where = "a recipe, a YAML file, or a run folder"


@command(config_app, "show")
def show(
    common: Common,
    what: Annotated[
        str | None,
        typer.Argument(
            help=f"What to show: {Where}; by default what the options give.", autocompletion=completion.configs
        ),
    ] = None,
    docs: Annotated[bool, typer.Option("--docs", help="With what each key means.")] = False,
) -> None:
    """The config as YAML; a value that is not the default says what set it. `> my.yaml` makes a file for --config."""
    from lever_lm.cli.config_views import as_yaml, is_run
    from lever_lm.config.schema import key_docs, to_dict
    from lever_lm.utils.console import Screen

    if is_run(what):
        _refuse(common, what, "dataset", "lvlm", "sampler", "recipe", "config")
    shown = _view(common, what)
    documented = key_docs() if docs else None
    if not common.json_:
        screen = Screen(quiet=common.quiet)
        for line in as_yaml(shown, documented):
            screen.result(line)
    told = {"docs": documented} if docs else {}
    emit(common, {"config": to_dict(shown.config), "changed": shown.changed(), **told})


@command(config_app, "diff")
def diff(
    common: Common,
    one: Annotated[str, typer.Argument(metavar="A", help=f"One config: {Where}.", autocompletion=completion.configs)],
    other: Annotated[
        str | None,
        typer.Argument(
            metavar="B", help="The other; by default what the options give.", autocompletion=completion.configs
        ),
    ] = None,
) -> None:
    """What differs between two configs, key by key. The options complete recipes and YAML files, not run folders."""
    from lever_lm.cli.config_views import difference_lines, differences
    from lever_lm.utils.console import Screen

    there, here = (_view(common, what, alone=True) for what in (one, other))
    if not common.json_:
        screen = Screen(quiet=common.quiet)
        for line in difference_lines(there, here):
            screen.result(line)
    found = {key: {"a": old, "b": new} for key, (old, new) in differences(there, here).items()}
    emit(common, {"a": there.name, "b": here.name, "identical": not found, "differences": found})


def _view(common: Common, what: str | None, alone: bool = False):
    """The view of an argument among the common options; where `alone`, a run folder is taken as it is."""
    from lever_lm.cli.config_views import is_run, view

    if alone and is_run(what):
        return view(what, {}, None, [], {})
    if what is not None and what.endswith((".yaml", ".yml")):
        _refuse(common, what, "config")
    return view(what, named_yamls(common), common.config, common.set_ or [], option_values(common))


def _refuse(common: Common, what: str, *names: str) -> None:
    """Raise UsageError for options that would only seem to change what is shown."""
    if extra := [f"--{name}" for name in names if getattr(common, name) is not None]:
        raise UsageError(f"{what} stands in the place of {', '.join(extra)}: give one of them")
