"""What tests of files that were made to harm share: a pickle that executes, and a process with little memory."""

import os
import resource
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.utils.errors import LeverError

MEMORY = 3 << 30  # bytes of address space, beyond what the process has


def small_policy(**kwargs) -> PointerSelector:
    """Make the same small policy at every call."""
    torch.manual_seed(0)
    return PointerSelector(**{"d_model": 6, "hidden_dim": 8, **kwargs}).eval()


class Executed:
    """Pickles to a shell command that would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def read_in_little_memory(read: Callable, files: list[Path], threads: int = 0) -> tuple[list[str], int]:
    """Give files to `read` in a forked process that has 60 seconds, and MEMORY more of address space than this one;
    with `threads` three times each. Returns what is said of each, and the MiB that it took."""

    def told(path: Path) -> str:
        try:
            read(path)
            return f"read {path}"
        except LeverError as error:
            return f"refused {error}"

    with tempfile.TemporaryFile("w+") as said, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 of a fork where there are threads
        pid = os.fork()
        if pid == 0:  # pragma: no cover
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                _limit_memory_and_time()
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                with ThreadPoolExecutor(max(threads, 1)) as pool:
                    lines = list(pool.map(told, files * 3 if threads else files))
                memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
                os.write(1, "\n".join([*lines, str(memory)]).encode())
                os._exit(0)
            except BaseException:
                os.write(2, traceback.format_exc().encode())
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        *lines, memory = said.read().split("\n")
    assert status == 0, lines
    assert len(lines) == len(files) * (3 if threads else 1), lines  # else a library printed something
    return lines, int(memory)


def _limit_memory_and_time() -> None:
    signal.alarm(60)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
