"""Results and choices as a person reads them on the terminal."""

from lever_lm.training.log_parser import History
from lever_lm.training.metrics import LOGGED, STRATEGIES, table_header, table_row
from lever_lm.utils.console import Screen

_ACROSS = 3


def show_results(screen: Screen, results: list[dict], tests: list[dict], *, stemmed: bool = False) -> None:
    """Show accuracies with 95 % intervals: methods down and shots across, or a row each where those are too wide."""
    from lever_lm.selectors import RIVALS  # loads torch, which a choice among epochs does not need

    shots = sorted({row["shots"] for row in results if row["shots"]}) or [0]
    scored = "reduced predictions against `answer`" if stemmed else "against `answer`"
    title = f"Official VQA accuracy on {results[0]['n']} queries, {scored}, with 95 % intervals"
    if len(shots) > _ACROSS:
        rows = [[row["method"], count_shots(row["shots"]), _cell(row)] for row in results]
        screen.table(title, ["method", "shots", "accuracy"], rows)
    else:
        cells = {(row["method"], row["shots"] or shots[0]): _cell(row) for row in results}
        methods = dict.fromkeys(row["method"] for row in results)
        rows = [[method, *(cells.get((method, k), "") for k in shots)] for method in methods]
        screen.table(title, ["method", *map(count_shots, shots)], rows)
    ours = tests[0]["method"] if tests else results[-1]["method"]
    for row in results:
        if row["method"] == ours:
            screen.result(f"{row['method']} at {count_shots(row['shots'])}: {_accuracies(row)}")
    for test in tests:
        if test["against"] in RIVALS:
            screen.result(
                f"{test['method']} − {test['against']} at {count_shots(test['shots'])}: {test['difference']:+.3f} "
                f"[{test['low']:+.3f}, {test['high']:+.3f}], p = {test['p']:.4f} (paired)"
            )


def _accuracies(row: dict) -> str:
    """`0.812 official, 0.830 with answers always normalised`, and against `raw_answer` where that is another number."""
    said = [f"{row['accuracy']:.3f} official"]
    if "normalized_accuracy" in row:  # results that 0.1 wrote have none
        said.append(f"{row['normalized_accuracy']:.3f} with answers always normalised")
    if row["raw_accuracy"] != row["accuracy"]:
        said.append(f"{row['raw_accuracy']:.3f} official against `raw_answer`")
    return ", ".join(said)


def _cell(row: dict) -> str:
    return f"{row['accuracy']:.3f} [{row['ci'][0]:.2f}, {row['ci'][1]:.2f}]"


def count_shots(shots: int) -> str:
    """`1 shot`, `4 shots`."""
    return f"{shots} shot{'s' * (shots != 1)}"


def show_choice(screen: Screen, history: History, answer: dict, show_all: bool) -> None:
    """Show the chosen epoch, why, which epochs were left out, and what the other strategies would choose."""
    for note in history.notes:
        screen.say(f"note: {note}")
    if show_all:
        marker, names, rule = table_header(history.phase)
        metric = STRATEGIES[answer["strategy"]].key
        beside = "" if metric in LOGGED else metric  # a strategy of ours has no column in the table that scripts parse
        width = len(beside) + 2 if beside else 0
        for line in (marker, f"{names}{beside:>{width}}", rule + "-" * width):
            screen.result(line)
        for row in history.rows:
            value = row.get(beside)
            screen.result(table_row(row) + (f"{value:>{width}.5f}" if isinstance(value, float) else ""))
    for item in answer["excluded"]:
        screen.result(f"excluded: epoch {item['epoch']} ({item['why']})")
    if answer["epoch"] is not None:
        place = f": {answer['checkpoint']}" if answer["checkpoint"] else ""
        why = f"{answer['why']}; from {answer['source']}"
        screen.result(f"{answer['strategy']}: epoch {answer['epoch']}{place} ({why})")
        if answer["checkpoint"] and not answer["exists"]:
            screen.say("warning: that checkpoint file is not there")
    others = ", ".join(f"{name} {epoch if epoch is not None else 'none'}" for name, epoch in answer["others"].items())
    screen.say(f"other strategies: {others}")
