"""Writes docs/commands.md from the commands themselves: `python scripts/build_commands.py [--check]`."""

import sys
from dataclasses import fields
from pathlib import Path

import typer

from lever_lm.cli.commands import app
from lever_lm.cli.options import Common

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"
OPENING = """# Commands

Every command and option, as `lever COMMAND --help` has them. This page is made by `python scripts/build_commands.py`.

`lever --version` prints the version. `lever --install-completion` installs completion for the present shell, and
`lever --show-completion` prints it. `-h` is `--help`.
"""
COMMON_HEADING = "## Options of every command"
COMMON_TEXT = "A command that lacks some of them says so in its own section."


def spelling(option) -> str:
    """`--resume / --no-resume`, `--seed VALUE`."""
    names = ", ".join(option.opts) + (f" / {', '.join(option.secondary_opts)}" if option.secondary_opts else "")
    value = "" if option.is_flag else " VALUE"
    return f"{names}{value}"


def place(argument) -> str:
    """`[RUN_DIR]`, `[RUN_DIR]…`, `NAME`."""
    if argument.metavar and argument.metavar.startswith("["):
        return argument.metavar
    name = argument.metavar or argument.name.upper()
    return (name if argument.required else f"[{name}]") + "…" * (argument.nargs < 0)


def table(options) -> list[str]:
    """Return options as rows of a table, with their help as it is."""
    rows = ["| option | |", "| --- | --- |"]
    for option in options:
        default = option.default
        shown = (
            f" Default: `{default}`." if isinstance(default, (str, Path, int)) and not isinstance(default, bool) else ""
        )
        rows.append(f"| `{spelling(option)}` | {(option.help or '').replace('|', '/')}{shown} |")
    return rows


def commands(command, path: str = "lever"):
    """Yield (full name, command) of every command that does something."""
    for name, inner in getattr(command, "commands", {}).items():
        if getattr(inner, "commands", None):
            yield from commands(inner, f"{path} {name}")
        else:
            yield f"{path} {name}", inner


def page() -> str:
    """Return the whole page."""
    shared = {f.name for f in fields(Common)}
    found = list(commands(typer.main.get_command(app)))
    train = next(command for name, command in found if name == "lever train")
    common = [p for p in train.params if p.name in shared]
    lines = [OPENING, COMMON_HEADING, "", COMMON_TEXT, "", *table(common), ""]
    for name, command in found:
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        own = [p for p in command.params if p.param_type_name == "option" and p.name not in shared and p.name != "help"]
        lacking = [p.opts[0] for p in common if p.name not in {q.name for q in command.params}]
        usage = " ".join(map(place, arguments))
        lines += [
            f"## {name}",
            "",
            " ".join(command.help.split()),
            "",
            f"    {name} {usage}".rstrip() + " [OPTIONS]",
            "",
        ]
        lines += [f"- `{p.metavar or p.name.upper()}`: {getattr(p, 'help', '') or ''}" for p in arguments]
        lines += [""] if arguments else []
        lines += [*table(own), ""] if own else []
        lines += [f"Without {', '.join(f'`{option}`' for option in lacking)}.", ""] if lacking else []
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write the page, or with --check exit 1 where it is not up to date."""
    text = page()
    if "--check" in sys.argv[1:]:
        sys.exit(
            0 if PAGE.read_text(encoding="utf-8") == text else f"{PAGE} is not up to date: run this without --check"
        )
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
