"""One command as a process: its streams, its signals, its exit status, and one message where it failed."""

import gc
import io
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import MutableMapping
from contextlib import redirect_stdout

import typer

from lever_lm.cli.options import debugging
from lever_lm.utils.distributed import Shards
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.terminal import one_line, printable, shown
from lever_lm.utils.transformers_compat import left_out

INTERRUPTED, TERMINATED = 130, 128 + signal.SIGTERM
# The error of a wrong command line. Typer has its own copy of click in some versions and imports click in others.
_CommandLineError = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def main(app: typer.Typer) -> None:
    """Run the command line of this process and exit: 0 done, 1 could not, 2 usage, 130 interrupted, 143 terminated; one
    message on stderr, no traceback. Of the processes of a job the leader alone speaks on stdout."""
    if sys.getfilesystemencoding() != "utf-8":  # a question on the command line would be read as other characters
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    wait_asleep(os.environ)
    left_out.update(("sklearn", "scipy"))  # assisted generation, losses of detectors: a second, and not for us
    gc.set_threshold(100_000)  # the search for cycles takes a fifth of the import of torch and transformers at 700
    _open_streams()
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character of ours shows a question mark
        stream.reconfigure(errors="replace")
    job = Shards.from_environment()
    if job.world == 1:  # processes of a job wait for one another and hear no signal: torchrun ends them
        signal.signal(signal.SIGTERM, _terminate)
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if job.leader else nowhere):
        status = _flushed(run(app, sys.argv[1:]))
        if job.world == 1:  # the work is done: a signal in the last moments changes nothing
            for stop in (signal.SIGINT, signal.SIGTERM):
                signal.signal(stop, signal.SIG_IGN)
    job.leave()
    sys.exit(status)


def wait_asleep(environment: MutableMapping[str, str]) -> None:
    """Have the threads of OpenMP, which torch computes with, sleep after a short wait, unless the user said how long.
    They spin otherwise: on two cores beside one other busy process the policy learns half as fast."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "1000")


def _open_streams() -> None:
    """Open the streams that the caller has closed on /dev/null: the next file that is opened would take their place."""
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def _flushed(status: int) -> int:
    """Return the exit status once all output is written; 1 where it cannot be. A reader that went away is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status or _fail(f"cannot write the output: {error.strerror}", 1)
    return status


_LONGEST = 10_000  # characters of a message
_ended_by: list[int] = []


def _terminate(number: int, frame) -> None:
    """Handle SIGTERM, which schedulers send before they kill: as Ctrl-C, with a status of its own."""
    _ended_by.append(number)
    raise KeyboardInterrupt


def run(app: typer.Typer, arguments: list[str]) -> int:
    """Run a command line and return its exit status; an error is said in one message on stderr."""
    try:
        status = app(args=arguments, prog_name="lever", standalone_mode=False)
        if status == INTERRUPTED:  # typer turns Ctrl-C into this status
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except _CommandLineError as error:
        if not Shards.from_environment().leader:
            return _fail(error.format_message(), error.exit_code)
        return _show_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        how, status = ("terminated", TERMINATED) if _ended_by else ("interrupted", INTERRUPTED)
        return _fail(f"{how}; run the same command again to go on", status)
    except UsageError as error:
        return _fail(str(error), 2)
    except LeverError as error:
        return _fail(str(error), 1)
    except OSError as error:  # as a rule about a path on the command line: too long, no permission
        where = shown(error.filename, 200) if error.filename else "the output"
        return _fail(f"cannot use {where}: {error.strerror or error}", 1)
    except Exception as error:
        return _fail(f"{type(error).__name__}: {error} (a defect of lever_lm; --debug shows where)", 1)


def _show_usage(error: Exception) -> int:
    """Show Typer's own message about a command line; words of the command line in it may steer no terminal."""
    message, text = error.format_message(), io.StringIO()
    error.format_message = lambda: one_line(message)
    error.show(text)
    sys.stderr.write(printable(text.getvalue()))
    return error.exit_code


def _fail(message: str, status: int) -> int:
    if debugging():
        sys.stderr.write(textwrap.indent(printable(traceback.format_exc()), "  "))
    job = Shards.from_environment()
    message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…"
    # Lines after the first are indented: a name from a data file cannot pass for a message of ours.
    message = re.sub(r"\n(?!  )", "\n  ", printable(message))
    sys.stderr.write(f"{'' if job.leader else f'[rank {job.rank}] '}lever: {message}\n")
    return status
