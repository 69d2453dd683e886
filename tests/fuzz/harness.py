"""Run a reader on case after case in processes of their own, and tell what is wrong from what may be.

A case may be accepted or refused with a message. All else is a failure: another exception, a warning or output, a
message that is no short line, a file written elsewhere, anything executed, too much memory or time, a dead process.
"""

import contextlib
import faulthandler
import gc
import mmap
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import NamedTuple

from fuzz.mutations import Mutation, noise, spoil_bytes
from lever_lm.utils.errors import LeverError
from lever_lm.utils.terminal import printable

FAILURES = ("tracebacks", "printed", "messages", "written", "executed", "over memory", "over time", "crashes")
MEGABYTE = 1 << 20
CANARY = "fuzz-canary"  # what payloads make in the folder of the case; nothing else does
LONGEST_MESSAGE = 2000  # characters
# What must reach no terminal: C0 but tab and newline, DEL, C1, separators of lines, bidi controls, half characters.
STEERS = {*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
STEERS = STEERS.union(range(0xD800, 0xE000)) - {0x09, 0x0A}
_MEMORY_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # no case waits for a disk
_HEADROOM = 2 << 30  # bytes of addresses beyond those in use at the start
_WORST = 6  # times its CPU seconds that a case may take by the clock
# Events of sys.addaudithook, for none of which a reader has a reason.
_EXECUTES = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen")
_EXECUTES += ("pickle.find_class", "ctypes.dlopen", "socket.connect", "socket.getaddrinfo", "urllib.Request")
_WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink")
_WRITES += ("shutil.rmtree", "shutil.move", "shutil.copyfile")


class Target(NamedTuple):
    """A reader made ready. seeds: inputs that it takes; spoil: a change that knows their format; parse: what the
    commands do with an input; known: inputs made by hand, each of which is a case."""

    seeds: Sequence[bytes]
    spoil: Mutation
    parse: Callable[[bytes], object]
    known: Sequence[bytes] = ()

    def case(self, name: str, seed: int, number: int) -> bytes:
        """Return the input of a case, the same at each call: first the seeds, then those made by hand in every other
        place; of each eight of the rest one of noise, three of spoilt bytes, four of spoilt structure."""
        place, odd = divmod(number - len(self.seeds), 2)
        if place < 0:
            return self.seeds[number]
        if not odd and place < len(self.known):
            return self.known[place]
        rng = Random(f"{seed} {name} {number}")
        if number % 8 == 0:
            return noise(rng)
        content = rng.choice(self.seeds)
        return spoil_bytes(rng, content, self.seeds) if number % 8 < 4 else self.spoil(rng, content)


class Reader(NamedTuple):
    """`begin` makes the target in a folder of its own, the only one where it may write; memory: bytes that a case may
    take; loads: whether libraries load classes of their own while it runs."""

    name: str
    begin: Callable[[Path], Target]
    memory: int = 256 * MEGABYTE
    loads: bool = False


class Limits(NamedTuple):
    """case: CPU seconds of one; all: seconds after which a reader's other cases are left out."""

    case: float = 5.0
    all: float = float("inf")


class Result(NamedTuple):
    """What came of a case: accepted, refused, or one of FAILURES; why; the bytes that it took."""

    case: int
    outcome: str
    why: str
    memory: int = 0


@dataclass
class Tally:
    """What came of the cases of a reader."""

    reader: str
    cases: int = 0
    counts: Counter = field(default_factory=Counter)
    failures: list[Result] = field(default_factory=list)
    seconds: float = 0.0
    peak: int = 0  # bytes that one case took at most

    def add(self, result: Result) -> None:
        """Count a case."""
        self.cases += 1
        self.counts[result.outcome] += 1
        self.peak = max(self.peak, result.memory)
        if result.outcome in FAILURES:
            self.failures.append(result)


def run(reader: Reader, cases: Sequence[int], seed: int, limits: Limits, keep: Path | None = None) -> Tally:
    """Run all cases of a reader, in one worker after another. keep: a folder for inputs that fail."""
    tally, started, remaining = Tally(reader.name), time.monotonic(), list(cases)
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_MEMORY_DISK) as folder:
        while remaining and time.monotonic() - started < limits.all:
            with contextlib.closing(_results(reader, Path(folder), remaining, seed, limits, keep)) as results:
                for result in results:
                    tally.add(result)
                    if time.monotonic() - started > limits.all:
                        break
            remaining = list(cases)[tally.cases :]
    tally.seconds = time.monotonic() - started
    return tally


def _results(reader, folder: Path, cases: Sequence[int], seed: int, limits: Limits, keep) -> Iterator[Result]:
    """Fork a worker and yield the results of its cases until it ends; a case that ends it has a result, too."""
    shutil.rmtree(folder / "case", ignore_errors=True)
    (folder / "case").mkdir()
    pipe, theirs = multiprocessing.Pipe(duplex=False)
    sys.stdout.flush()
    if not (process := os.fork()):
        pipe.close()
        _Worker(reader, folder, seed, limits, keep, theirs).work(cases)
    theirs.close()
    ended, case = None, -1
    try:
        if (said := pipe.recv()) != "ready":
            raise RuntimeError(f"{reader.name}: its worker failed: {said}")
        for case in cases:
            if not pipe.poll(limits.case * _WORST):
                yield Result(case, "over time", "no answer")
                return
            if (said := pipe.recv()) == "again":
                return
            if isinstance(said, str):
                raise RuntimeError(f"{reader.name}: its worker failed: {said}")
            yield said
    except EOFError:
        ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if case < 0:
            raise RuntimeError(f"{reader.name}: its worker ended: exit status {ended}") from None
        yield Result(case, "crashes", f"exit status {ended}")
    finally:
        pipe.close()
        if ended is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


class _TimeUp(BaseException):
    """A case has had its CPU seconds."""


class _Worker:
    """The process that runs cases until they are done, or one of them ends it."""

    def __init__(self, reader: Reader, folder: Path, seed: int, limits: Limits, keep: Path | None, pipe):
        self.reader, self.seed, self.limits, self.keep, self.pipe = reader, seed, limits, keep, pipe
        self.folder = Path(os.path.realpath(folder)) / "case"
        self._watching, self._seen = False, []

    def work(self, cases: Sequence[int]) -> None:
        """Send "ready", then the result of each case, and end the process; "again" asks for another in its place."""
        try:
            os.chdir(self.folder)
            warnings.simplefilter("always")  # what the readers themselves leave unsaid comes before it
            warnings.showwarning = lambda message, category, *_: self._seen.append(("printed", f"{message!r}"))
            target = self.reader.begin(self.folder)
            with contextlib.suppress(Exception):
                target.parse(target.seeds[0])  # what libraries do once
            self._confine()
            self.pipe.send("ready")
            for number in cases:
                result = self._result(target, number)
                if number < len(target.seeds) and result.outcome == "refused":
                    raise ValueError(f"seed {number} is refused: {result.why}")
                self.pipe.send(result)
                if result.memory > self.reader.memory // 4:  # the memory of the next could not be measured
                    self.pipe.send("again")
                    break
        except BaseException:
            self.pipe.send(traceback.format_exc())
        finally:
            os._exit(0)

    def _confine(self) -> None:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (in_use + _HEADROOM,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self._terminal = os.open(self.folder.with_name("output"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        for descriptor in (1, 2):
            os.dup2(self._terminal, descriptor)
        sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
        faulthandler.disable()
        sys.addaudithook(self._audit)
        signal.signal(signal.SIGPROF, self._time_is_up)
        gc.collect()
        gc.freeze()

    def _time_is_up(self, number: int, frame) -> None:
        if self._watching:
            raise _TimeUp

    def _audit(self, event: str, arguments: tuple) -> None:
        """Take down what a case does that it should not: the interpreter calls this before it does it."""
        if not self._watching:
            return
        if event == "open":
            flags = arguments[2] or 0
            places = arguments[: bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))]
        elif event in _EXECUTES:
            loads = self.reader.loads and event in ("pickle.find_class", "ctypes.dlopen")
            if not loads and not (event == "socket.connect" and arguments[1][:1] == ("127.0.0.1",)):
                self._seen.append(("executed", f"{event} {arguments!r:.200}"))
            return
        else:
            places = arguments[: 0 if event not in _WRITES else 2 if event in ("os.rename", "shutil.move") else 1]
        for path in places:
            place = os.path.abspath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else os.devnull
            if not place.startswith(f"{self.folder}/") and place not in (str(self.folder), os.devnull):
                self._seen.append(("written", f"{event} {place}"))

    def _result(self, target: Target, number: int) -> Result:
        content, before = target.case(self.reader.name, self.seed, number), _most_memory()
        outcome, why = self._try(target, content)
        memory = _most_memory() - before
        if memory > self.reader.memory and outcome != "over memory":
            outcome, why = "over memory", f"{memory >> 20} MiB"
        if outcome in FAILURES and self.keep is not None:
            (self.keep / f"{self.reader.name}-{number}").write_bytes(content)
        return Result(number, outcome, why[:1000], memory)

    def _try(self, target: Target, content: bytes) -> tuple[str, str]:
        self._seen.clear()
        outcome, why = "accepted", ""
        try:
            try:
                self._watching = True
                signal.setitimer(signal.ITIMER_PROF, self.limits.case)
                target.parse(content)
            finally:
                self._watching = False
                signal.setitimer(signal.ITIMER_PROF, 0)
        except _TimeUp as error:
            outcome, why = "over time", _where(error)
        except BaseException as error:
            outcome, why = _judge(error)
        if os.path.exists(CANARY):
            os.unlink(CANARY)
            self._seen.append(("executed", "a payload ran"))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if os.fstat(self._terminal).st_size:
            self._seen.append(("printed", os.pread(self._terminal, 300, 0).decode(errors="replace")))
            os.ftruncate(self._terminal, 0)
            os.lseek(self._terminal, 0, os.SEEK_SET)
        said = [(outcome, why), *self._seen]
        return max(said, key=lambda each: FAILURES.index(each[0]) if each[0] in FAILURES else -1)


def _most_memory() -> int:
    """Return the bytes of memory that this process had at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _judge(error: BaseException) -> tuple[str, str]:
    """Return what an exception of a reader is: a refusal, or a failure."""
    cause: BaseException | None = error
    while cause is not None:  # behind a message, too
        if isinstance(cause, MemoryError) or "can't allocate memory" in str(cause):
            return "over memory", _where(cause)
        cause = cause.__cause__ or cause.__context__
    if not isinstance(error, LeverError):
        return "tracebacks", _where(error)
    message = printable(str(error))
    if not message.strip() or "\n" in message or len(message) > LONGEST_MESSAGE or STEERS & set(map(ord, message)):
        return "messages", f"{message[:100]!r}… ({len(message)} characters)"
    return "refused", message


def _where(error: BaseException) -> str:
    """Return an exception in a line: what, and the last places that it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/fuzz/" not in f.filename][-3:]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
    return f"{type(error).__name__}: {error!s:.200} ({places})"
