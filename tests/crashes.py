"""A `lever` command that logs each prompt it puts to the LVLM, and a server of such commands for the crash tests.

    python tests/crashes.py [--log FILE] -- train --limit 24 …
    python tests/crashes.py --serve

The server has imported everything and forks for each command, so that a kill costs no import: see lab.py.
"""

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn


def log_asked(path: Path) -> None:
    """From now on each prompt that goes to the LVLM is a line of `path` before it does: process, batch, key."""
    from lever_lm.lvlm import CachedLvlm

    inner = CachedLvlm.backend
    batches = iter(range(1 << 30))

    class Logged:
        def __init__(self, lvlm, backend):
            self._lvlm, self._backend = lvlm, backend

        def __getattr__(self, name):
            return getattr(self._backend, name)

        def ask(self, prompts, batches, answers=None, *, end=False):
            kind = "answer" if answers is None else "log_prob_end" if end else "log_prob"
            kinds = [kind] * len(prompts) if answers is None else [f"{kind}:{answer}" for answer in answers]
            for batch in batches:
                self._log([self._lvlm._key(kinds[i], prompts[i]) for i in batch])
                yield from self._backend.ask(prompts, [batch], answers, end=end)

        def _log(self, keys):
            batch = next(batches)
            with open(path, "a") as file:
                file.write("".join(f"{os.getpid()} {batch} {key}\n" for key in keys))

    CachedLvlm.backend = lambda lvlm, prompts: Logged(lvlm, inner(lvlm, prompts))


def run_command(arguments: list[str], log: str | None) -> None:
    """The `lever` command in this process; ends it."""
    from lever_lm.cli.commands import main

    if log:
        log_asked(Path(log))
    sys.argv = ["lever", *arguments]
    main()


def serve() -> None:
    """Read commands as JSON lines; for each, fork, answer with the process id, then with its exit status."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ.pop("LD_PRELOAD")  # for the commands alone, not for what they start
    _load_everything()
    for line in sys.stdin:
        job = json.loads(line)
        if "shell" in job:
            answers.write(f"{subprocess.run(job['shell']).returncode}\n")
            continue
        process = os.fork()
        if not process:
            _become(job)
        answers.write(f"{process}\n")
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}\n")


def _load_everything() -> None:
    """Modules, and the models once for what loading them makes the libraries remember; nothing is computed."""
    for name in (
        "lever_lm.cli.commands",
        "lever_lm.training.pipeline",
        "PIL.JpegImagePlugin",
        "pydantic.type_adapter",
        "requests",
    ):
        importlib.import_module(name)
    from lever_lm.config.load import resolve
    from lever_lm.data.encoder import FeatureEncoder
    from lever_lm.lvlm.backend import load_local

    config = resolve({"dataset": "digits", "lvlm": "tiny_qwen2.5_vl"}, None, [], {})[0]
    FeatureEncoder(config.features.encoder, "cpu", 1)
    load_local(config.lvlm, config.prompt, "cpu")


def _become(job: dict) -> NoReturn:
    for descriptor, path in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(job["cwd"])
    os.environ.update(job["environment"])
    if job["unprivileged"]:
        _drop_capabilities()
    ctypes.CDLL(None).faults_arm()
    status = 0
    try:
        run_command(job["arguments"], job["log"])
    except SystemExit as error:
        status = error.code or 0
    # The end of an interpreter without the second that it takes to give back what the server had loaded.
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):  # stderr may be a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _drop_capabilities() -> None:
    """Root too must heed permissions from now on, and keeps its files."""
    version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if ctypes.CDLL(None, use_errno=True).capset(version_3, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        cut = sys.argv.index("--")
        options = dict(zip(sys.argv[1:cut:2], sys.argv[2:cut:2], strict=True))
        run_command(sys.argv[cut + 1 :], options.get("--log"))
