"""Give every reader of untrusted files thousands of spoilt inputs: nothing may be executed, and nothing may fail.

    python tests/fuzz/run.py [--readers NAMES] [--cases N] [--seed N] [--limit-seconds S] [--keep DIR] [--results FILE]
    python tests/fuzz/run.py --readers icds --case 17    # one case again, with its traceback

Ends with a table, and with status 1 where anything failed. One process works at a time.
"""

import argparse
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
if __name__ == "__main__":
    sys.path[:1] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import fuzz.file_readers  # noqa: F401 - puts its readers beside the others
from fuzz.harness import FAILURES, MEGABYTE, Limits, Reader, Tally, run
from fuzz.readers import READERS

_HEADER = ("reader", "cases", "accepted", "refused", *FAILURES, "cases/s", "peak MB")


def table(tallies: list[Tally]) -> list[str]:
    """Return the tallies as lines of a Markdown table, with their sum."""
    total = Tally("all", sum(t.cases for t in tallies), seconds=sum(t.seconds for t in tallies))
    for tally in tallies:
        total.counts += tally.counts
        total.peak = max(total.peak, tally.peak)
    rows = [_HEADER, ("---", *["---:"] * (len(_HEADER) - 1)), *map(_row, tallies), _row(total)]
    return [f"| {' | '.join(row)} |" for row in rows]


def _row(tally: Tally) -> tuple[str, ...]:
    speed = tally.cases / max(tally.seconds, 1e-9)
    counts = [tally.cases, *(tally.counts[name] for name in ("accepted", "refused", *FAILURES)), speed]
    return (tally.reader, *(f"{count:,.0f}" for count in (*counts, tally.peak / MEGABYTE)))


def failures(tally: Tally, most: int = 20) -> list[str]:
    """Return what failed, equal failures together, with a case of each."""
    alike: dict = {}
    for failed in tally.failures:
        end = failed.why[:25] if failed.outcome == "messages" else failed.why.rsplit("(", 1)[-1][:120]
        alike.setdefault((failed.outcome, end), []).append(failed)
    firsts = [(found[0], len(found)) for found in list(alike.values())[:most]]
    return [f"{tally.reader}: {one.outcome}, {n} times: case {one.case}: {one.why}" for one, n in firsts]


def again(reader: Reader, seed: int, number: int) -> None:
    """Run one case in this process, to be looked into."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.chdir(folder)
        target = reader.begin(Path(folder))
        content = target.case(reader.name, seed, number)
        print(f"{reader.name}, case {number}: {len(content)} bytes, {content!r:.1000}")
        try:
            print("accepted:", target.parse(content))
        except Exception:
            traceback.print_exc()
        os.chdir("/")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the status is 0 where nothing failed."""
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--readers", help=f"some of {', '.join(READERS)}; all of them by default")
    parse.add_argument("--cases", type=int, default=10_000, help="of each reader")
    parse.add_argument("--case", type=int, help="one case, in this process")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--limit-seconds", type=float, default=float("inf"), help="for a reader, after which it is left")
    parse.add_argument("--case-seconds", type=float, default=5.0, help="CPU seconds for a case")
    parse.add_argument("--keep", type=Path, help="folder for the inputs that fail")
    parse.add_argument("--results", type=Path, help="Markdown file for the table")
    options = parse.parse_args(arguments)
    names = options.readers.split(",") if options.readers else list(READERS)
    if unknown := [name for name in names if name not in READERS]:
        parse.error(f"unknown readers {', '.join(unknown)}: some of {', '.join(READERS)}")
    if options.case is not None:
        again(READERS[names[0]], options.seed, options.case)
        return 0
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        options.keep = options.keep.resolve()
    limits, tallies, started = Limits(options.case_seconds, options.limit_seconds), [], time.monotonic()
    for name in names:
        tallies.append(run(READERS[name], range(options.cases), options.seed, limits, options.keep))
        print(table(tallies)[-2], *failures(tallies[-1]), sep="\n  ", flush=True)
    lines = [*table(tallies), "", f"Seed {options.seed}, {time.monotonic() - started:.0f} seconds."]
    print("\n".join(lines))
    if options.results:
        options.results.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
