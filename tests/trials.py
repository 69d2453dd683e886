"""Trials of the long commands: broken off, run again, compared with an unbroken run. For tests and soak.py."""

import shutil
import time
from collections.abc import Callable
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


def commands(data: Path) -> dict[str, list[str]]:
    """Return the long commands, small; `infer` goes on from what `train` wrote."""
    shared = ["--limit", "10", "--set", "rollout.pool_size=8", "--set", "lvlm.batch_size=8"]
    shared += ["--set", "rollout.sample=1", "--set", "rollout.random=2"]
    shared += ["--set", f"data.okvqa_path={data}", "--set", f"data.coco_path={data}"]
    epochs = ["--rce-epochs", "2", "--grpo-epochs", "4"]
    train = ["train", *shared, *epochs]
    return {
        "rollout": ["rollout", *shared],
        "train": train,
        "infer": ["infer", *shared, "--shots", "1,2", "--baselines"],
        "demo": ["demo", *shared, *epochs, "--shots", "1,2"],
        "online": [*train, "--set", "grpo.online=true"],
    }


def expected_end(fault: Fault) -> tuple[int, str]:
    """Exit status of a command that the fault's signal ended, and what its one message begins with."""
    return {"int": (130, "lever: interrupted"), "term": (143, "lever: terminated")}.get(fault.do, (-9, ""))


@dataclass(frozen=True)
class Trial:
    """What came of a command that was killed and run again: what should not be, in words, by kind."""

    kills: int
    problems: dict[str, list[str]]


class Bench:
    """One of the commands: its folder before, its unbroken run, and trials of it."""

    def __init__(self, lab: Lab, command: list[str], folder: Path, before: Path | None):
        self.lab, self.command, self.folder = lab, command, folder
        self.start, self.reference = folder / "start", folder / "reference"
        self.start.mkdir(parents=True)
        if before:
            shutil.copytree(before, self.start, dirs_exist_ok=True)
        shutil.copytree(self.start, self.reference)
        done = lab.run(command, self.reference)
        if done.status:
            raise RuntimeError(f"lever {' '.join(command)}: {done.status}: {done.err}")
        self.events = events(self.reference)

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
        problems["asked again"] += [f"{again} prompts beyond the batches of the kill"] if again else []
        found = {kind: what for kind, what in problems.items() if what}
        if not found:
            shutil.rmtree(cwd)
            for beside in cwd.parent.glob(f"{cwd.name}.*"):
                beside.unlink()
        return Trial(kills, found)


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


def benches(lab: Lab, folder: Path) -> Callable[[str], Bench]:
    """Return a function: the name of a command → its Bench, made once."""
    data, made = make_data(folder / "data"), {}

    def of(name: str) -> Bench:
        if name not in made:
            before = of("train").reference if name == "infer" else None
            made[name] = Bench(lab, commands(data)[name], folder / name, before)
        return made[name]

    return of


# ---------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """Commands under the fault injector."""
    folder = tmp_path_factory.mktemp("lab")
    try:
        compile_injector(folder)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with Lab(folder) as started:
        yield started


@pytest.fixture(scope="session")
def bench(lab):
    """A function: the name of a command → its Bench."""
    return benches(lab, lab.folder)
