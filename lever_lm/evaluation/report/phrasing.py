"""What the numbers of a run say, in sentences."""

from collections.abc import Sequence

from lever_lm.evaluation.results import is_finite
from lever_lm.selectors import CONTRASTS, FROM_FILE, RANDOM, named
from lever_lm.training.metrics import STRATEGIES, metrics_on
from lever_lm.training.select_checkpoint import best_row

_ALPHA = 0.05


def percent(value: float) -> str:
    """Return `78.6 %`."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """Return `+16.0`."""
    return f"{100 * value:+.1f}".replace("-", "−")


def count_shots(shots: int) -> str:
    """Return `1 demonstration`, `4 demonstrations`."""
    return f"{shots} demonstration{'s' * (shots != 1)}"


def in_one_sentence(results: Sequence[dict], tests: Sequence[dict], method: str, shots: int, lvlm: str) -> str:
    """Return the result of a run: the accuracy of its method, beside random demonstrations and similarity."""
    ours = next(row for row in results if (row["method"], row["shots"]) == (method, shots))
    chosen = "from a file" if method == FROM_FILE else f"chosen by {named(method)}"
    said = (
        f"With {count_shots(shots)} {chosen}, {lvlm} reaches a VQA accuracy of {percent(ours['accuracy'])} on "
        f"{ours['n']:,} queries"
    )
    beside = {test["against"]: test for test in tests if (test["method"], test["shots"]) == (method, shots)}
    gaps = [_gap(beside[other]) for other in CONTRASTS if other in beside]
    return said + (f": {' and '.join(gaps)}." if gaps else ".")


def _gap(test: dict) -> str:
    """Return `+50.4 points [+45.4, +55.8] against random demonstrations`, or that they cannot be told apart."""
    other = "random demonstrations" if test["against"] == RANDOM else named(test["against"])
    if test["p"] >= _ALPHA:
        return f"not to be told apart from {other}"
    return f"{points(test['difference'])} points [{points(test['low'])}, {points(test['high'])}] against {other}"


def of_test(test: dict) -> str:
    """Return a paired test in words."""
    gap, low, high, p = (test[name] for name in ("difference", "low", "high", "p"))
    ours, theirs = named(test["method"]), named(test["against"])
    where = f"With {count_shots(test['shots'])}"
    interval = f"95 % interval {points(low)} to {points(high)}, p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
    if p >= _ALPHA:
        return f"{where}, {ours} and {theirs} cannot be told apart ({points(gap)} points, {interval})."
    word = "better" if gap > 0 else "worse"
    return f"{where}, {ours} is {abs(100 * gap):.1f} points {word} than {theirs} ({interval})."


def of_choices(rows: Sequence[dict], method: str) -> str:
    """Return what a policy learned to show, from `Gallery.labels`."""
    found = {row["method"]: row for row in rows}
    if method not in found:
        return ""
    ours, name = found[method], "the file" if method == FROM_FILE else named(method)
    said = f"The answer of the first demonstration that {name} shows matches a reference of {percent(ours['first'])}"
    said += " of the queries"
    beside = [f"{percent(found[m]['first'])} for {named(m)}" for m in reversed(CONTRASTS) if m in found]
    said += f" (it is {' and '.join(beside)})." if beside else "."
    if ours["with_right"] is not None and ours["without"] is not None:
        said += (
            f" Where any shown answer matches, the VQA accuracy is {percent(ours['with_right'])}, elsewhere "
            f"{percent(ours['without'])}."
        )
    return said


# ---------------------------------------------------------------------- training


def strategies(rows: Sequence[dict]) -> list[dict]:
    """Return for each strategy the epoch that it chooses, and that epoch's metrics; None where none qualifies."""
    chosen = []
    for name, strategy in STRATEGIES.items():
        row = best_row(list(rows), strategy)
        values = [value for row in rows if is_finite(value := row.get(strategy.key))]
        equal = row is not None and len(values) > 1 == len(set(values))
        why = "equal in all epochs: the first" if equal else strategy.why
        chosen.append({"name": name, "why": why, "epoch": row["epoch"] if row else None, "row": row or {}})
    return chosen


def health(rows: Sequence[dict]) -> list[dict]:
    """Return what GRPO had to learn from, at its first and last epoch."""
    rows = [row for row in rows if row["phase"] == "grpo"]
    table = []
    for key, metric in metrics_on("health").items():
        values = [row[key] for row in rows if is_finite(row.get(key))]
        if values:
            show = percent if "percent" in metric.on else "{:.3g}".format
            shown = {"first": show(values[0]), "last": show(values[-1])}
            table.append({"name": metric.title, **shown, "what": metric.note})
    return table


def of_groups(rows: Sequence[dict]) -> str:
    """Return the state of the groups in a sentence."""
    last = next((row for row in reversed(rows) if row["phase"] == "grpo"), {})
    skipped, tied = last.get("groups_skipped"), last.get("frac_reward_zero_std")
    if not (is_finite(skipped) and is_finite(tied)):
        return ""
    said = f"{skipped:,} groups teach nothing: all their rollouts have the same reward, or they have a single one"
    return said + (". That is more than half of them." if tied > 1 / 2 else ".")


def warnings_of(rows: Sequence[dict]) -> list[str]:
    """Return what training warned of, each kind the first time."""
    first: dict[str, str] = {}
    for row in rows:
        found = row.get("warnings")
        for kind, text in (found if isinstance(found, dict) else {}).items():
            first.setdefault(kind, f"{row['phase']} epoch {row['epoch']}: {text}")
    return list(first.values())
