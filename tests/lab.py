"""Commands under the fault injector: what goes wrong and when, and what the commands then did."""

import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SOURCE, PROGRAM = Path(__file__).with_name("faults.c"), Path(__file__).with_name("crashes.py")
PATIENCE = 120.0  # seconds that a command of these sizes never takes


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and when: see faults.c. With `seconds`, a signal from outside, so long after the event."""

    do: str = ""
    at: int = 0
    when: str = "before"
    kind: str = ""
    path: str = ""
    sticky: bool = False
    clock: str = ""
    seconds: float | None = None

    def variables(self) -> dict[str, str]:
        """As the injector reads them."""
        at = self.at if self.seconds is None else 0
        own = {"do": self.do, "at": str(at), "when": self.when, "kind": self.kind, "path": self.path}
        own |= {"sticky": str(int(self.sticky)), "clock": self.clock}
        return {f"FAULTS_{name.upper()}": value for name, value in own.items()}


@dataclass(frozen=True)
class Event:
    """One line of the injector's log. `target` is the name under which a temporary file appeared in the end."""

    number: int
    kind: str
    path: str
    new: str = ""
    target: str = ""


@dataclass(frozen=True)
class Ended:
    """A command that has ended, killed or not."""

    status: int
    out: str
    err: str


SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}


class Lab:
    """Runs commands under the injector, each in a fork of one interpreter. A context manager.

    The interpreter has a mount namespace of its own where the system allows it (`mounts`): a disk that is mounted by
    `shell` is seen through `seen`, and goes with the interpreter.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.library = compile_injector(folder)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FAULTS_")}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"PYTHONPATH": os.pathsep.join([str(SOURCE.parents[1]), environment.get("PYTHONPATH", "")])}
        apart = ["unshare", "-m" if os.geteuid() == 0 else "-rm"]
        self.mounts = shutil.which("unshare") is not None and subprocess.run([*apart, "true"]).returncode == 0
        self._server = subprocess.Popen(
            [*(apart if self.mounts else []), "env", f"LD_PRELOAD={self.library}", sys.executable, PROGRAM, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # a line at a time, so that select tells the truth
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *_) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=PATIENCE)
        self._server.stdout.close()

    def seen(self, path: Path) -> Path:
        """A path as the commands see it."""
        return Path(f"/proc/{self._server.pid}/root{path.resolve()}") if self.mounts else path

    def shell(self, *command: object) -> None:
        """A system command among the commands' mounts."""
        self._ask({"shell": [str(part) for part in command]})
        if (status := int(self._server.stdout.readline())) != 0:
            raise OSError(f"{' '.join(map(str, command))}: exit status {status}")

    def run(
        self,
        arguments: list[str],
        cwd: Path,
        fault: Fault = Fault(),
        *,
        root: Path | None = None,
        meanwhile: Callable[[], None] | None = None,
        unprivileged: bool = False,
        err: Path | None = None,
    ) -> Ended:
        """One command in the folder `cwd`. Prompts go to `asked` beside it, file events below `root` to `events`.

        meanwhile: what happens when a fault `stop` has stopped the command. unprivileged: as somebody who must heed
        permissions, also where root runs the tests. err: where stderr goes.
        """
        names = {name: cwd.with_name(f"{cwd.name}.{name}") for name in ("out", "err", "asked", "events")}
        names["events"].unlink(missing_ok=True)
        names["err"].write_text("")
        root = (root or cwd / "results").resolve()
        variables = {**fault.variables(), "FAULTS_ROOT": str(root), "FAULTS_LOG": str(names["events"])}
        job = {"arguments": arguments, "cwd": str(cwd), "environment": variables, "log": str(names["asked"])}
        job |= {"out": str(names["out"]), "err": str(err or names["err"]), "unprivileged": unprivileged}
        process = int(self._ask(job))
        if meanwhile and self._stops(process):
            meanwhile()
            os.kill(process, signal.SIGCONT)
        if fault.seconds is not None and self._come_to(fault.at, names["events"]) and not self._answers(fault.seconds):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, SIGNALS[fault.do])
        if not self._answers(PATIENCE):
            os.kill(process, signal.SIGKILL)
            self._server.stdout.readline()
            raise TimeoutError(f"lever {' '.join(arguments)} hangs after {fault}: {names['err'].read_text()}")
        status = int(self._server.stdout.readline())
        return Ended(
            status,
            *(names[name].read_text(errors="replace") if names[name].exists() else "" for name in ("out", "err")),
        )

    def _ask(self, job: dict) -> bytes:
        self._server.stdin.write((json.dumps(job) + "\n").encode())
        answer = self._server.stdout.readline() if "shell" not in job else b"-"
        if not answer:
            raise RuntimeError(f"the interpreter of the commands has ended: {self._server.wait()}")
        return answer

    def _stops(self, process: int) -> bool:
        """Wait until a command has stopped itself; False where it ends before."""
        while not self._answers(0.001):
            with contextlib.suppress(FileNotFoundError):
                if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                    return True
        return False

    def _come_to(self, number: int, log: Path) -> bool:
        """Wait for an event of the command that runs; False where it ends before."""
        while not self._answers(0.001):
            if log.exists() and log.read_bytes().count(b"\n") >= number:
                return True
        return False

    def _answers(self, seconds: float) -> bool:
        return bool(select.select([self._server.stdout], [], [], seconds)[0])


def compile_injector(folder: Path) -> Path:
    """faults.c as a library in a folder. Raises FileNotFoundError where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        raise FileNotFoundError("the fault injector needs a C compiler and Linux")
    library = folder / "faults.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def events(cwd: Path) -> list[Event]:
    """The file events of the last command in a folder, temporary files under the name they got in the end."""
    lines = [line.split("\t") for line in cwd.with_name(f"{cwd.name}.events").read_text().splitlines()]
    found = [Event(int(number), kind, *paths) for number, kind, *paths in lines]
    named: dict[str, str] = {}
    for event in reversed(found):
        if event.kind == "rename":
            named[event.path] = event.new
    return [dataclasses.replace(event, target=named.get(event.path, event.path)) for event in found]
