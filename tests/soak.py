"""Kills commands at random moments, or at every file event, runs them again, and counts what became of them.

    python tests/soak.py [--kills 200] [--seed 0] [--commands rollout,train,infer,demo,online] [--results FILE.md]
    python tests/soak.py --exhaustive train [--part 3/10] [--results FILE.md]

Each trial kills one command up to three times (SIGKILL, SIGTERM, SIGINT, before or after a file event, in the middle
of a write, or from outside at any time), lets it finish and compares all it wrote with an unbroken run. The table is
written after every trial; the exit status is 1 when anything was lost. A trial that went wrong leaves its folder.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from lab import Fault, Lab
from trials import PROBLEMS, Bench, benches, commands

from lever_lm.utils.atomic_io import write_text

DEEDS = (("kill", "before"), ("kill", "after"), ("torn", "before"), ("term", "before"), ("int", "after"))
MOST_KILLS = 3  # of one trial
MOST_DELAY = 0.3  # seconds between a file event and a signal from outside


def random_faults(rng: random.Random, bench: Bench) -> list[Fault]:
    """One to three kills; each somewhere in what an unbroken run would do."""
    faults = []
    for _ in range(rng.randint(1, MOST_KILLS)):
        at = rng.randint(1, len(bench.events))
        if rng.random() < 0.25:
            faults.append(Fault(rng.choice(("kill", "term", "int")), at, seconds=rng.uniform(0, MOST_DELAY)))
        else:
            do, when = rng.choice(DEEDS)
            faults.append(Fault(do, at, when))
    return faults


def named(fault: Fault, bench: Bench) -> str:
    """A fault in the table: what was done, at which kind of event."""
    how = {"kill": "SIGKILL", "torn": "SIGKILL", "term": "SIGTERM", "int": "SIGINT"}[fault.do]
    if fault.seconds is not None:
        return f"{how} at any time"
    kind = bench.events[min(fault.at, len(bench.events)) - 1].kind
    return f"{how} within a write" if fault.do == "torn" and kind == "write" else f"{how} {fault.when} {kind}"


class Table:
    """Kills by fault, and how the trials ended in which they struck."""

    def __init__(self, path: Path | None):
        self.path, self.began, self.trials = path, time.perf_counter(), 0
        self.rows: dict[str, Counter] = defaultdict(Counter)
        self.commands: Counter = Counter()

    def add(self, command: str, faults: list[str], problems: dict[str, list[str]]) -> None:
        """A trial in which these faults struck; kept on disk at once."""
        self.trials += 1
        self.commands[command] += len(faults)
        for fault in faults or (["none"] if problems else []):
            counts = self.rows[fault]
            counts["kills"] += bool(faults)
            counts["identical"] += not problems
            counts.update(dict.fromkeys(problems, 1))
        if self.path:
            write_text(self.path, str(self))

    @property
    def totals(self) -> Counter:
        """Sums over all rows."""
        return sum(self.rows.values(), Counter())

    def __str__(self) -> str:
        columns = ("kills", "identical", *PROBLEMS)
        lines = [f"| fault | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
        for fault, counts in [*sorted(self.rows.items()), ("**all**", self.totals)]:
            lines.append(f"| {fault} | {' | '.join(str(counts[name]) for name in columns)} |")
        of = ", ".join(f"{command} {kills}" for command, kills in self.commands.items())
        seconds = time.perf_counter() - self.began
        return "\n".join([*lines, "", f"Kills by command: {of}. {self.trials} trials, {seconds:.0f} seconds.", ""])


def every_event(bench: Bench, part: str) -> Iterator[list[Fault]]:
    """A kill before each file event of the command in turn, a torn one where it is a write; 2/5: the second fifth."""
    number, of = map(int, part.split("/"))
    for event in bench.events[number - 1 :: of]:
        yield [Fault("torn" if event.kind == "write" else "kill", event.number)]
    if number == of:
        yield [Fault("kill", len(bench.events), "after")]


def random_trials(names: list[str], kills: int, seed: int, table: Table, bench) -> Iterator[tuple[str, list[Fault]]]:
    """The commands in turn until there were so many kills."""
    rng = random.Random(seed)
    while True:
        for name in names:
            if table.totals["kills"] >= kills:
                return
            yield name, random_faults(rng, bench(name))


def soak(arguments: argparse.Namespace, folder: Path) -> Table:
    """All trials, in a folder."""
    table = Table(arguments.results)
    names = [arguments.exhaustive] if arguments.exhaustive else arguments.commands.split(",")
    if unknown := set(names) - commands(folder).keys():
        raise SystemExit(f"unknown command {', '.join(unknown)}: one of {', '.join(commands(folder))}")
    with Lab(folder) as lab:
        bench = benches(lab, folder)
        if arguments.exhaustive:
            trials = ((names[0], faults) for faults in every_event(bench(names[0]), arguments.part))
        else:
            trials = random_trials(names, arguments.kills, arguments.seed, table, bench)
        try:
            for i, (name, faults) in enumerate(trials):
                trial = bench(name).attempt(faults, f"trial{i}")
                struck = [named(fault, bench(name)) for fault in faults[: trial.kills]]
                table.add(name, struck, trial.problems)
                print(f"{name}: {', '.join(struck) or 'none struck'}: {trial.problems or 'identical'}", file=sys.stderr)
                for kind, found in trial.problems.items():
                    print(f"  {kind}: {found}\n  {faults}\n  kept: {folder / name / f'trial{i}'}", file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted: the table holds what was done until then", file=sys.stderr)
    return table


def main() -> int:
    """Exit status 1 when anything was lost or otherwise wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default="rollout,train,infer,demo,online")
    parser.add_argument("--exhaustive", metavar="COMMAND", help="kill at every file event of this one")
    parser.add_argument("--part", default="1/1", help="of the events: 2/5 is every fifth from the second on")
    parser.add_argument("--results", type=Path, help="file for the table, as Markdown")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one by default")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    table = soak(arguments, folder.resolve())
    print(table)
    return int(any(table.totals[kind] for kind in PROBLEMS))


if __name__ == "__main__":
    sys.exit(main())
