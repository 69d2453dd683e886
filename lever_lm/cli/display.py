"""Results and choices as a person reads them on the terminal."""

from lever_lm.training.log_parser import History
from lever_lm.training.metrics import LOGGED, STRATEGIES, table_header, table_of, table_row
from lever_lm.utils.console import Screen

_ACROSS = 3


VQA = "VQA accuracy"  # the headline of the task vqa


def show_results(
    screen: Screen, results: list[dict], tests: list[dict], *, stemmed: bool = False, score: str = VQA
) -> None:
    """Show scores with 95 % intervals: methods down and shots across, or a row each where those are too wide. score:
    what the task calls its score."""
    from lever_lm.selectors import RIVALS  # loads torch, which a choice among epochs does not need

    shots = sorted({row["shots"] for row in results if row["shots"]}) or [0]
    scored = f", {'reduced predictions ' * stemmed}against `answer`" if score == VQA else ""
    title = f"{_titled(score)} on {results[0]['n']} queries{scored}, with 95 % intervals"
    if len(shots) > _ACROSS:
        rows = [[row["method"], count_shots(row["shots"]), _cell(row)] for row in results]
        screen.table(title, ["method", "shots", "accuracy" if score == VQA else score], rows)
    else:
        cells = {(row["method"], row["shots"] or shots[0]): _cell(row) for row in results}
        methods = dict.fromkeys(row["method"] for row in results)
        rows = [[method, *(cells.get((method, k), "") for k in shots)] for method in methods]
        screen.table(title, ["method", *map(count_shots, shots)], rows)
    ours = tests[0]["method"] if tests else results[-1]["method"]
    for row in results:
        if row["method"] == ours:
            told = _accuracies(row) if score == VQA else _metrics(row)
            screen.result(f"{row['method']} at {count_shots(row['shots'])}: {told}")
    for test in tests:
        if test["against"] in RIVALS:
            screen.result(
                f"{test['method']} − {test['against']} at {count_shots(test['shots'])}: {test['difference']:+.3f} "
                f"[{test['low']:+.3f}, {test['high']:+.3f}], p = {test['p']:.4f} (paired)"
            )


def show_arena(screen: Screen, rows: list[dict], score: str = VQA) -> None:
    """Show the table of `--against`: a line a method, sorted; its costs, its accuracies, and at the most shots the
    difference to the best simple selector with the p-value that is adjusted for all tests of the table."""
    shots = sorted({row["shots"] for row in rows if row["shots"]}) or [0]
    by_method: dict[str, dict[int, dict]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["shots"]] = row
    title = f"{_titled(score)} on {rows[0]['n']} queries with 95 % intervals, sorted; calls are those of the LVLM"
    header = ["method", "chooses from", "calls to train", "a query", "seconds", *map(count_shots, shots), "vs simple"]
    lines = []
    for method, found in by_method.items():
        one, last = next(iter(found.values())), found.get(shots[-1], {})
        calls = "?" if one["train_calls"] is None else f"{one['train_calls']:,}"
        cells = [_cell(found[k]) if k in found else _cell(found[0]) if 0 in found else "" for k in shots]
        gap = f"{last['difference']:+.3f}, p {last['p_holm']:.3f}" if "p_holm" in last else ""
        costs = [one["chooses_from"], calls, str(one["query_calls"]), f"{one['seconds']:.1f}"]
        lines.append([method, *costs, *cells, gap])
    screen.table(title, header, lines)
    simple = next((row["against"] for row in rows if "against" in row and row["shots"] == shots[-1]), None)
    if simple:
        screen.result(
            f"vs simple: against {simple}, the best of those that learn nothing, at {count_shots(shots[-1])}; paired, "
            f"p adjusted for all {sum('p_holm' in row for row in rows)} tests of these methods, at all shots (Holm)"
        )


def show_seeds(screen: Screen, rows: list[dict], score: str = VQA) -> None:
    """Show what runs of several seeds reach together, a line for each method and number of shots."""
    title = f"{_titled(score)} over {rows[0]['seeds']} seeds, with 95 % intervals over seeds and queries"
    header = ["method", "shots", "mean", "interval", "std over seeds", "queries"]
    lines = []
    for row in rows:
        numbers = [f"{row['mean']:.3f}", f"[{row['low']:.3f}, {row['high']:.3f}]", f"{row['seed_std']:.3f}"]
        lines.append([row["method"], str(row["shots"]), *numbers, f"{row['n']:,}"])
    screen.table(title, header, lines)


def show_findings(screen: Screen, result: dict) -> None:
    """Show what `lever diagnose` found: a line a question, a column a method; then for the run's own what it says."""
    methods = result["methods"]
    keys = list(dict.fromkeys(row["key"] for rows in methods.values() for row in rows))
    of = {(method, row["key"]): row for method, rows in methods.items() for row in rows}
    labels = {row["key"]: row["label"] for rows in methods.values() for row in rows}

    def cell(row: dict | None) -> str:
        if row is None:
            return ""
        test = row.get("test") if row["key"] != "other_lvlm" else None  # that one is against its own zero-shot
        gap = f" ({test['difference']:+.3f}{'*' if test['p'] < 0.05 else ''})" if test else ""
        return f"{row['value']:.3f}{gap}"

    title = (
        f"{result['n']} queries, {count_shots(result['shots'])}; in brackets: as chosen minus this; * p < 0.05, paired"
    )
    rows = [[labels[key], *(cell(of.get((method, key))) for method in methods)] for key in keys]
    screen.table(title, ["", *methods], rows)
    first = next(iter(methods))
    for row in methods[first]:
        screen.say(f"{row['label']}: {row['says']}")


def _accuracies(row: dict) -> str:
    """`0.812 official, 0.830 with answers always normalised`, and against `raw_answer` where that is another number."""
    said = [f"{row['accuracy']:.3f} official"]
    if "normalized_accuracy" in row:  # results that 0.1 wrote have none
        said.append(f"{row['normalized_accuracy']:.3f} with answers always normalised")
    if row["raw_accuracy"] != row["accuracy"]:
        said.append(f"{row['raw_accuracy']:.3f} official against `raw_answer`")
    return ", ".join(said)


def _metrics(row: dict) -> str:
    """`mae 0.812 [0.700, 0.930], rmse …`: what the task reports of all queries together, with intervals."""

    def told(one: dict) -> str:
        numbers = [one["value"], one["low"], one["high"]]
        if None in numbers:
            return "none"
        return "{:.3f} [{:.3f}, {:.3f}]".format(*numbers)

    return ", ".join(f"{name} {told(one)}" for name, one in row.get("metrics", {}).items())


def _titled(score: str) -> str:
    return "Official VQA accuracy" if score == VQA else score[0].upper() + score[1:]


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
        marker, names, rule = table_header(*table_of({"phase": history.phase, **history.rows[-1]}))
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
