"""Runs a parser on case after case in processes of their own, and tells what is wrong from what may be.

A case may be accepted or refused with a message. All else is a failure: another exception, a warning or output, a
message that is no short line, a file written elsewhere, anything executed, too much memory or time, a dead process.
"""

import contextlib
import ctypes
import faulthandler
import gc
import json
import mmap
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import NamedTuple

from fuzzing.mutations import Mutation, noise, spoil_bytes

FAILURES = ("tracebacks", "printed", "messages", "written", "executed", "over memory", "over time", "crashes")
_OUTCOMES = ("accepted", "refused", *FAILURES)
MEGABYTE = 1 << 20
SHARED_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # no disk is waited for
CANARY = "fuzz-canary"  # what payloads make in the folder of the case; nothing else does
# What must reach no terminal: C0 but tab and newline, DEL, C1, separators of lines, bidi controls, half characters.
STEERS = {*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
STEERS = STEERS.union(range(0xD800, 0xE000)) - {0x09, 0x0A}
_LONGEST = 2000  # characters of a message
_HEADROOM = 2 << 30  # bytes of addresses beyond those in use at the start
_WORST = 6  # times its CPU seconds that a case may take by the clock
_AGAIN, _BROKEN = 3, 4  # exit status of a worker that asks for another in its place; of one that fails by itself
# Events of sys.addaudithook, for none of which a parser has a reason.
_EXECUTES = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen")
_EXECUTES += ("pickle.find_class", "ctypes.dlopen", "socket.connect", "socket.getaddrinfo", "urllib.Request")
_WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink")
_WRITES += ("shutil.rmtree", "shutil.move", "shutil.copyfile")


class Target(NamedTuple):
    """A parser made ready. seeds: inputs that it takes; spoil: a change that knows their format; parse: what the
    commands do with an input; known: inputs made by hand, each of which is a case."""

    seeds: Sequence[bytes]
    spoil: Mutation
    parse: Callable[[bytes], object]
    known: Sequence[bytes] = ()

    def case(self, name: str, seed: int, number: int) -> bytes:
        """The input of a case, the same at each call: first the seeds, then those made by hand in every other place; of
        each eight of the rest one of noise, three of spoilt bytes, four of spoilt structure."""
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


class Parser(NamedTuple):
    """`begin` makes the target in a folder of its own, the only one where it may write; memory: bytes that a case may
    take; loads: whether libraries load classes of their own while it runs."""

    name: str
    begin: Callable[[Path], Target]
    memory: int = 256 * MEGABYTE
    loads: bool = False


@dataclass
class Tally:
    """What came of the cases of a parser."""

    parser: str
    cases: int = 0
    counts: Counter = field(default_factory=Counter)
    failures: list[dict] = field(default_factory=list)  # {case, kind, why}
    seconds: float = 0.0
    peak: int = 0  # bytes that one case took at most

    @property
    def failed(self) -> int:
        """How often something went wrong."""
        return sum(self.counts[kind] for kind in FAILURES)


class Limits(NamedTuple):
    """case: CPU seconds of one; all: seconds after which a parser's other cases are left out."""

    case: float = 5.0
    all: float = float("inf")


def run(parser: Parser, cases: Sequence[int], seed: int, limits: Limits, keep: Path | None = None) -> Tally:
    """All cases of a parser, in one worker after another. keep: a folder for inputs that fail."""
    tally, started, remaining = Tally(parser.name), time.monotonic(), list(cases)
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=SHARED_MEMORY) as folder:
        while remaining and time.monotonic() - started < limits.all:
            worker = _Worker(parser, Path(folder), seed, limits, started + limits.all, keep)
            status = worker.run(remaining)
            state, done = worker.state, remaining.index(worker.state.case) + 1 if worker.state.since else 0
            tally.counts += Counter({o: n for o, n in zip(_OUTCOMES, state.counts, strict=True) if n})
            tally.peak = max(tally.peak, state.peak)
            tally.failures += worker.failures()
            if status == _BROKEN or (status not in (0, _AGAIN) and not done):
                raise RuntimeError(f"{parser.name}: its worker failed: {worker.last_words() or _ending(status)}")
            if status not in (0, _AGAIN):
                kind = "over time" if worker.killed else "crashes"
                why = "no answer" if worker.killed else _ending(status)
                tally.counts[kind] += 1
                tally.failures.append({"case": state.case, "kind": kind, "why": why})
            tally.cases += done
            remaining = remaining[done:] if status else []
    tally.seconds = time.monotonic() - started
    return tally


def _ending(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


class _TimeUp(BaseException):
    """A case has had its CPU seconds."""


class _State(ctypes.Structure):
    """What a worker and its parent both see, and what outlives the worker: the case it is at, since when, the most
    memory that one took, and counts."""

    _fields_ = (
        ("case", ctypes.c_int64),
        ("since", ctypes.c_double),
        ("peak", ctypes.c_int64),
        ("counts", ctypes.c_int64 * len(_OUTCOMES)),
    )


class _Worker:
    """One process that runs cases until they are done, or one of them ends it."""

    def __init__(self, parser: Parser, folder: Path, seed: int, limits: Limits, until: float, keep: Path | None):
        self.parser, self.seed, self.limits, self.until, self.keep = parser, seed, limits, until, keep
        self.folder = Path(os.path.realpath(folder)) / "case"
        self.report, self.output, self._words = folder / "failures.jsonl", folder / "output", folder / "last-words"
        self.state = _State.from_buffer(mmap.mmap(-1, ctypes.sizeof(_State)))
        self.killed = False
        self._watching, self._seen = False, []

    # ------------------------------------------------------------------ the parent's side

    def run(self, cases: Sequence[int]) -> int:
        """Fork, and wait for the end; kill it where one case takes too long by the clock. Returns the exit status."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.report.write_text("")
        sys.stdout.flush()
        if not (process := os.fork()):
            self._be_worker(cases)
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if self.state.since and time.monotonic() - self.state.since > self.limits.case * _WORST:
                self.killed = True
                os.kill(process, signal.SIGKILL)
            time.sleep(0.005)

    def failures(self) -> list[dict]:
        """What the worker has reported."""
        return [json.loads(line) for line in self.report.read_text().splitlines()]

    def last_words(self) -> str:
        """Why a worker failed by itself."""
        return self._words.read_text() if self._words.exists() else ""

    # ------------------------------------------------------------------ the worker's side

    def _be_worker(self, cases: Sequence[int]) -> None:
        status = _BROKEN
        try:
            os.chdir(self.folder)
            warnings.simplefilter("always")  # what the parsers themselves leave unsaid comes before it
            warnings.showwarning = self._warned
            target = self.parser.begin(self.folder)
            with contextlib.suppress(Exception):
                target.parse(target.seeds[0])  # what libraries do once
            self._confine()
            status = self._work(target, cases)
        except BaseException:
            self._words.write_text(traceback.format_exc())
        finally:
            os._exit(status)

    def _confine(self) -> None:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (in_use + _HEADROOM,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self._terminal = os.open(self.output, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        for descriptor in (1, 2):
            os.dup2(self._terminal, descriptor)
        sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
        faulthandler.disable()
        sys.addaudithook(self._audit)
        signal.signal(signal.SIGPROF, self._time_is_up)
        gc.collect()
        gc.freeze()

    def _warned(self, message, category, *_) -> None:
        self._seen.append(("printed", f"{category.__name__}: {message}"))

    def _time_is_up(self, number: int, frame) -> None:
        if self._watching:
            raise _TimeUp

    def _audit(self, event: str, arguments: tuple) -> None:
        if not self._watching:
            return
        if event == "open":
            path, _, flags = arguments
            writes = flags and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if writes and isinstance(path, (str, bytes, os.PathLike)):
                self._check_place(event, path)
        elif event in _WRITES:
            for path in arguments[: 2 if event in ("os.rename", "shutil.move") else 1]:
                if isinstance(path, (str, bytes, os.PathLike)):
                    self._check_place(event, path)
        elif event in _EXECUTES and not (self.parser.loads and event in ("pickle.find_class", "ctypes.dlopen")):
            if event == "socket.connect" and arguments[1][:1] == ("127.0.0.1",):
                return
            self._seen.append(("executed", f"{event} {arguments!r:.200}"))

    def _check_place(self, event: str, path) -> None:
        place = os.path.abspath(os.fsdecode(path))
        if not place.startswith(f"{self.folder}/") and place not in (str(self.folder), os.devnull):
            self._seen.append(("written", f"{event} {place}"))

    def _work(self, target: Target, cases: Sequence[int]) -> int:
        taken = len(target.seeds)
        for number in cases:
            content = target.case(self.parser.name, self.seed, number)
            self.state.case, self.state.since = number, time.monotonic()
            before = _most_memory()
            outcome, why = self._try(target, content)
            memory = _most_memory() - before
            self.state.peak = max(self.state.peak, memory)
            if memory > self.parser.memory and outcome != "over memory":
                outcome, why = "over memory", f"{memory >> 20} MiB"
            if number < taken and outcome == "refused":
                raise ValueError(f"{self.parser.name}: seed {number} is refused: {why}")
            self.state.counts[_OUTCOMES.index(outcome)] += 1
            if outcome in FAILURES:
                self._tell(number, outcome, why, content)
            if memory > self.parser.memory // 4:
                return _AGAIN  # whose memory can be measured
            if time.monotonic() > self.until:
                break
        return 0

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
        if self._seen and outcome in ("accepted", "refused"):
            outcome, why = max(self._seen, key=lambda seen: FAILURES.index(seen[0]))
        return outcome, why

    def _tell(self, number: int, kind: str, why: str, content: bytes) -> None:
        with open(self.report, "a") as file:
            file.write(json.dumps({"case": number, "kind": kind, "why": why[:1000]}) + "\n")
        if self.keep is not None:
            (self.keep / f"{self.parser.name}-{number}").write_bytes(content)


def _most_memory() -> int:
    """Bytes of memory that this process had at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _judge(error: BaseException) -> tuple[str, str]:
    """What an exception of a parser is: a refusal, or a failure."""
    from lever_lm.utils.errors import LeverError
    from lever_lm.utils.terminal import printable

    cause: BaseException | None = error
    while cause is not None:  # behind a message, too
        if isinstance(cause, MemoryError) or "can't allocate memory" in str(cause):
            return "over memory", _where(cause)
        cause = cause.__cause__ or cause.__context__
    if not isinstance(error, LeverError):
        return "tracebacks", _where(error)
    message = printable(str(error))
    if not message.strip() or "\n" in message or len(message) > _LONGEST or STEERS & set(map(ord, message)):
        return "messages", f"{message[:100]!r}… ({len(message)} characters)"
    return "refused", message


def _where(error: BaseException) -> str:
    """An exception in a line: what, and the last places that it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "fuzzing" not in f.filename][-3:]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
    return f"{type(error).__name__}: {error!s:.200} ({places})"
