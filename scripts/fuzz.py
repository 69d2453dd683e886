"""Every parser of what others made, on thousands of spoilt inputs each: nothing may be executed, and nothing may fail.

    python scripts/fuzz.py [--parsers NAMES] [--cases N] [--seed N] [--limit-seconds S] [--keep DIR] [--results FILE]
    python scripts/fuzz.py --parsers icds --case 17    # one case again, with its traceback

Ends with a table, and with status 1 where anything failed. One process works at a time.
"""

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from fuzzing import binaries, checkpoints, folders, pictures, sources, texts
from fuzzing.harness import FAILURES, MEGABYTE, Limits, Parser, Tally, run

_MODULES = (texts, folders, checkpoints, binaries, pictures, sources)
PARSERS = {parser.name: parser for module in _MODULES for parser in module.PARSERS}
_HEADER = ("parser", "cases", "accepted", "refused", *FAILURES, "cases/s", "peak MB")


def table(tallies: list[Tally]) -> list[str]:
    """The tallies as lines of a Markdown table, with their sum."""
    rows = [_row(tally) for tally in tallies]
    total = Tally("all", sum(t.cases for t in tallies), seconds=sum(t.seconds for t in tallies))
    for tally in tallies:
        total.counts += tally.counts
        total.peak = max(total.peak, tally.peak)
    rows = [_HEADER, ("---", *["---:"] * (len(_HEADER) - 1)), *rows, _row(total)]
    return [f"| {' | '.join(map(str, row))} |" for row in rows]


def _row(tally: Tally) -> tuple:
    counts = (f"{tally.counts[name]:,}" for name in ("accepted", "refused", *FAILURES))
    speed = tally.cases / max(tally.seconds, 1e-9)
    return (tally.parser, f"{tally.cases:,}", *counts, f"{speed:,.0f}", f"{tally.peak / MEGABYTE:,.0f}")


def failures(tally: Tally, most: int = 20) -> list[str]:
    """What failed, equal failures together, with a case of each."""
    alike = defaultdict(list)
    for failure in tally.failures:
        why = failure["why"]
        alike[failure["kind"], why[:25] if failure["kind"] == "messages" else why.rsplit("(", 1)[-1][:120]].append(
            failure
        )
    return [
        f"{tally.parser}: {kind}, {len(found)} times: case {found[0]['case']}: {found[0]['why']}"
        for (kind, _), found in list(alike.items())[:most]
    ]


def again(parser: Parser, seed: int, number: int) -> None:
    """One case in this process, to be looked into."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.chdir(folder)
        target = parser.begin(Path(folder))
        content = target.case(parser.name, seed, number)
        print(f"{parser.name}, case {number}: {len(content)} bytes, {content!r:.1000}")
        try:
            print("accepted:", target.parse(content))
        except Exception:
            traceback.print_exc()
        os.chdir("/")


def main() -> int:
    """Entry point: status 0 where nothing failed."""
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--parsers", help=f"some of {', '.join(PARSERS)}; all of them by default")
    parse.add_argument("--cases", type=int, default=10_000, help="of each parser")
    parse.add_argument("--case", type=int, help="one case, in this process")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--limit-seconds", type=float, default=float("inf"), help="for a parser, after which it is left")
    parse.add_argument("--case-seconds", type=float, default=5.0, help="CPU seconds for a case")
    parse.add_argument("--keep", type=Path, help="folder for the inputs that fail")
    parse.add_argument("--results", type=Path, help="Markdown file for the table")
    options = parse.parse_args()
    names = options.parsers.split(",") if options.parsers else list(PARSERS)
    if unknown := [name for name in names if name not in PARSERS]:
        parse.error(f"unknown parsers {', '.join(unknown)}: some of {', '.join(PARSERS)}")
    if options.case is not None:
        again(PARSERS[names[0]], options.seed, options.case)
        return 0
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        options.keep = options.keep.resolve()
    limits, tallies, started = Limits(options.case_seconds, options.limit_seconds), [], time.monotonic()
    for name in names:
        tallies.append(run(PARSERS[name], range(options.cases), options.seed, limits, options.keep))
        print(table(tallies)[-2], flush=True)
        for line in failures(tallies[-1]):
            print(f"  {line}", flush=True)
    lines = [*table(tallies), "", f"Seed {options.seed}, {time.monotonic() - started:.0f} seconds."]
    print("\n".join(lines))
    if options.results:
        options.results.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if any(tally.failed for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
