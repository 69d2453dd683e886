"""`lever infer --against`: selectors in one table, on the same queries, with what each of them costs.

A selector is a name of `selectors.SELECTORS`. A learnt one has a run of its own, beside the run that the options name,
made by `lever train --selector NAME`; `rce` and `grpo` are phases of that run.
"""

import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lever_lm.evaluation.evaluate import Outcome
from lever_lm.evaluation.statistics import holm, paired_test
from lever_lm.selectors import ANY_POLICY, FROM_FILE, SELECTORS, SIMPLE
from lever_lm.utils.errors import UsageError
from lever_lm.utils.terminal import shown

ALL = "all"


@dataclass(frozen=True)
class Cost:
    """What the choices of a method took: LVLM calls to train it and for the choice of one query, seconds of choosing,
    and from where it chose. train_calls: None where it is not known."""

    method: str
    train_calls: int | None
    query_calls: int
    seconds: float
    chooses_from: str


def parse_names(text: str) -> list[str]:
    """Return the selectors of `--against NAME,NAME` in the order of the table; `all` is every one. Raises UsageError
    with the nearest name for one that there is not."""
    known = [name for name in SELECTORS if name not in (ANY_POLICY, FROM_FILE)]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in (*known, ALL):
            nearest = difflib.get_close_matches(name[:100], known, n=1)
            meant = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise UsageError(f"unknown selector {shown(name)}{meant}: all, or some of {', '.join(known)} (--against)")
    if not names:
        raise UsageError(f"--against takes names of selectors, or all: {', '.join(known)}")
    return [name for name in known if name in names or ALL in names]


def timed(choose: Callable[[], list]) -> tuple[list, float]:
    """Return what a function makes, and the seconds that it took."""
    began = time.perf_counter()
    made = choose()
    return made, time.perf_counter() - began


def run_of(run: Path, name: str) -> Path:
    """Return the folder of a learnt selector's run beside the run that the options name: `epr`, or `NAME_epr` beside a
    run NAME of its own name."""
    return run.with_name(name if run.name.startswith("v3_") or run.name == "demo" else f"{run.name}_{name}")


def arena_rows(outcomes: Sequence[Outcome], costs: Sequence[Cost]) -> list[dict]:
    """Return the table: for each method and number of shots its costs, its accuracy, and the paired test against the
    best simple selector at the same number of shots, with Holm's adjustment over all tests of the table; sorted by
    accuracy at the most shots, the best first.

    The best simple selector is the best on these very queries, which favours it. It has no test of its own.
    """
    of = {cost.method: cost for cost in costs}
    rows = []
    for one in outcomes:
        rivals = [other for other in outcomes if other.method in SIMPLE and other.shots == one.shots]
        best = max(rivals, key=lambda other: sum(other.scores), default=None)
        row = {**vars(of[one.method]), "shots": one.shots, "accuracy": sum(one.scores) / len(one.scores)}
        if best is not None and best.method != one.method:
            row |= {"against": best.method, **paired_test(one.scores, best.scores)}
        rows.append(row)
    tested = [row for row in rows if "p" in row]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    most = {row["method"]: row["accuracy"] for row in sorted(rows, key=lambda row: row["shots"])}
    return sorted(rows, key=lambda row: (-most[row["method"]], row["method"], row["shots"]))
