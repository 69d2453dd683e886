"""Two sections of the page: the table of `lever infer --against`, and what `lever diagnose` found."""

from lever_lm.evaluation.report.svg import Dot, dot_chart
from lever_lm.evaluation.results import table
from lever_lm.selectors import SELECTORS
from lever_lm.utils.terminal import printable

_ALPHA = 0.05


def arena(rows: list[dict], ours: str | None, score: str = "VQA accuracy") -> dict | None:
    """Return what the page shows of the rows of read_arena: shots, a line for each method, the best first, all tests,
    that of `ours` at the most shots, and a chart of the task's `score`; None where there are no rows."""
    if not rows:
        return None
    shots, methods = table(rows)
    lines = [{"method": method, "cells": cells, "last": cells[-1]} for method, cells in methods if cells[-1]]
    lines.sort(key=lambda line: (-line["last"]["accuracy"], line["method"]))
    tests = [row for row in rows if "against" in row]
    at_most = [row for row in tests if row["shots"] == shots[-1]]
    simple = at_most[0]["against"] if at_most else ""
    return {
        "shots": shots,
        "lines": lines,
        "tests": tests,
        "simple": simple,
        "ours": next(({**row, "p": row["p_holm"]} for row in at_most if row["method"] == ours), None),
        "chart": dot_chart(
            [_dot(line["last"], line["method"] == ours) for line in lines],
            title=f"{score} in percent with {shots[-1]} demonstrations",
            across=f"{score} (%)",
            show="{:.1f}".format,
            mark=next((100 * line["last"]["accuracy"] for line in lines if line["method"] == simple), None),
        ),
    }


def _dot(row: dict, ours: bool) -> Dot:
    method, (low, high) = row["method"], row["ci"]
    colour = f"m_{method}" if method in SELECTORS else "m_policy"
    return Dot(printable(method), colour, 100 * row["accuracy"], 100 * low, 100 * high, ours)


def diagnosis(found: dict | None) -> dict | None:
    """Return what the page shows of a diagnosis, None of none: n, shots, methods, and for each question what was done,
    the row of each method, None where it has none, and what that of the first says."""
    if found is None:
        return None
    of = {(method, row["key"]): row for method, rows in found["methods"].items() for row in rows}
    methods = list(found["methods"])
    labels = {row["key"]: row["label"] for rows in found["methods"].values() for row in rows}
    lines = [
        {
            "label": label,
            "cells": [of.get((method, key)) for method in methods],
            "says": of[methods[0], key]["says"] if (methods[0], key) in of else "",
            "gap": key != "other_lvlm",  # its test is against that LVLM without demonstrations
        }
        for key, label in labels.items()
    ]
    return {"n": found["n"], "shots": found["shots"], "methods": methods, "lines": lines, "alpha": _ALPHA}
