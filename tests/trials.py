"""Trials of the long commands: broken off, run again, compared with an unbroken run. For tests and soak.py."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import small_digits
from lab import Ended, Fault, Lab, compile_injector, events
from remains import asked_again, broken, differences, doubled, left_overs

PROBLEMS = ("lost", "doubled", "left over", "half-written", "messages", "asked again")
TRAIN, QUERIES = 24, 6  # examples of the splits


def make_data(folder: Path) -> Path:
    """A small dataset, old enough for its digests to be kept: else later runs would write more than the first."""
    small_digits(folder, TRAIN, QUERIES)
    time.sleep(2.5)
    return folder


def commands(data: Path) -> dict[str, tuple[list[str], list[str]]]:
    """The long commands, small, each after the one that it needs, if any."""
    shared = ["--limit", "10", "--set", "rollout.pool_size=8", "--set", "lvlm.batch_size=8"]
    shared += ["--set", "rollout.sample=1", "--set", "rollout.random=2"]
    shared += ["--set", f"data.okvqa_path={data}", "--set", f"data.coco_path={data}"]
    epochs = ["--rce-epochs", "2", "--grpo-epochs", "6"]
    train = ["train", *shared, *epochs]
    return {
        "rollout": ([], ["rollout", *shared]),
        "train": ([], train),
        "infer": (train, ["infer", *shared, "--shots", "1,2", "--baselines"]),
        "demo": ([], ["demo", *shared, *epochs, "--shots", "1,2"]),
        "online": ([], [*train, "--set", "grpo.online=true"]),
    }


def expected_end(fault: Fault) -> tuple[int, str]:
    """Exit status of a command that the fault's signal ended, and what its one message begins with."""
    return {"int": (130, "lever: interrupted"), "term": (143, "lever: terminated")}.get(fault.do, (-9, ""))


@dataclass(frozen=True)
class Trial:
    """What came of a command that was killed and run again: what should not be, in words, by kind."""

    kills: int
    problems: dict[str, list[str]]
    seconds: float


class Bench:
    """One of the commands: its folder before, its unbroken run, and trials of it."""

    def __init__(self, lab: Lab, name: str, data: Path, folder: Path):
        self.lab, self.folder, (before, self.command) = lab, folder, commands(data)[name]
        folder.mkdir(parents=True)
        self.start, self.reference = folder / "start", folder / "reference"
        self.start.mkdir()
        if before:
            self._finish(before, self.start)
        shutil.copytree(self.start, self.reference)
        began = time.perf_counter()
        self._finish(self.command, self.reference)
        self.seconds = time.perf_counter() - began
        self.events = events(self.reference)

    def _finish(self, command: list[str], cwd: Path) -> None:
        done = self.lab.run(command, cwd)
        if done.status:
            raise RuntimeError(f"lever {' '.join(command)}: {done.status}: {done.err}")

    def fault(self, do: str, kind: str, file: str, nth: int = 0, **more) -> Fault:
        """A fault at the nth event of a kind about a file whose final name holds `file`, counted among its kind."""
        numbers = [event.number for event in self.events if event.kind == kind]
        events = [event.number for event in self.events if event.kind == kind and file in event.target]
        return Fault(do, numbers.index(events[nth]) + 1, kind=kind, **more)

    def attempt(self, faults: list[Fault], name: str = "trial") -> Trial:
        """Run the command under each fault in turn, then without, and compare with the unbroken run. Its folder goes
        when all is well."""
        cwd, kills = self.folder / name, 0
        shutil.copytree(self.start, cwd)
        began = time.perf_counter()
        problems: dict[str, list[str]] = {kind: [] for kind in PROBLEMS}
        for fault in faults:
            done = self.lab.run(self.command, cwd, fault)
            if done.status == 0:
                break
            kills += 1
            problems["half-written"] += broken(cwd)
            problems["messages"] += _noise(done, fault)
        last = self.lab.run(self.command, cwd)
        if last.status or "Traceback" in last.err:
            problems["lost"].append(f"the last run ended with {last.status}: {last.err}")
        problems["doubled"] += doubled(cwd)
        problems["left over"] += left_overs(cwd)
        problems["lost"] += differences(self.reference, cwd)
        _, again = asked_again(cwd.with_name(f"{cwd.name}.asked"))
        problems["asked again"] += [f"{again} prompts beyond the batch of the kill"] if again else []
        found = {kind: what for kind, what in problems.items() if what}
        if not found:
            shutil.rmtree(cwd)
            for beside in cwd.parent.glob(f"{cwd.name}.*"):
                beside.unlink()
        return Trial(kills, found, time.perf_counter() - began)


def _noise(done: Ended, fault: Fault) -> list[str]:
    """What a killed command said that it should not have, or did not say."""
    status, message = expected_end(fault)
    found = [f"a traceback: {done.err}"] if "Traceback" in done.err else []
    if done.status != status:
        found.append(f"status {done.status}, expected {status}: {done.err}")
    ours = [line for line in done.err.splitlines() if line.startswith("lever: ")]
    if len(ours) != bool(message) or not all(line.startswith(message) for line in ours):
        found.append(f"stderr: {done.err!r}")
    return found


# ---------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Commands under the fault injector."""
    folder = tmp_path_factory.mktemp("lab")
    try:
        compile_injector(folder)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with Lab(folder) as started:
        yield started


@pytest.fixture(scope="module")
def bench(lab):
    """A command by its name → its Bench, made once."""
    data, made = make_data(lab.folder / "data"), {}

    def of(name: str) -> Bench:
        if name not in made:
            made[name] = Bench(lab, name, data, lab.folder / name)
        return made[name]

    return of
