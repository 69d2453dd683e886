"""The command line: parse, call, print. One module a group of commands."""

from lever_lm.cli.commands import app, main

__all__ = ["app", "main"]
