"""What the numbers of a run say, in sentences."""

from collections.abc import Sequence

from lever_lm.report.results import is_finite
from lever_lm.selection import STRATEGIES, best_row

METHODS = {
    "zero_shot": "no demonstrations",
    "random": "random",
    "text_sim": "text similarity",
    "img_sim": "image similarity",
    "img_text_sim": "image and text similarity",
    "rce": "RCE",
    "grpo": "GRPO",
    "policy": "the policy",
    "icds": "choices from a file",
    "oracle": "oracle",
}
_ALPHA = 0.05


def named(method: str) -> str:
    """A method as a person calls it."""
    return METHODS.get(method, method)


def percent(value: float) -> str:
    """78.6 %."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """+16.0."""
    return f"{100 * value:+.1f}".replace("-", "−")


def count_shots(shots: int) -> str:
    """1 demonstration, 4 demonstrations."""
    return f"{shots} demonstration{'s' * (shots != 1)}"


def in_one_sentence(results: Sequence[dict], tests: Sequence[dict], method: str, shots: int, lvlm: str) -> str:
    """The result of a run: the accuracy of its method at its most shots, beside random and similarity."""
    ours = next(row for row in results if (row["method"], row["shots"]) == (method, shots))
    said = (
        f"With {count_shots(shots)} chosen by {named(method)}, {lvlm} answers {percent(ours['accuracy'])} of "
        f"{ours['n']:,} queries right"
    )
    against = [test for test in tests if test["method"] == method and test["shots"] == shots]
    gaps = [
        f"{points(test['difference'])} points against {named(test['against'])}"
        + (" demonstrations" if test["against"] == "random" else "")
        for test in against
        if test["against"] in ("random", "img_text_sim")
    ]
    return said + (f": {' and '.join(gaps)}." if gaps else ".")


def of_test(test: dict) -> str:
    """A paired test in words."""
    gap, low, high, p = (test[name] for name in ("difference", "low", "high", "p"))
    ours, theirs = named(test["method"]), named(test["against"])
    where = f"With {count_shots(test['shots'])}"
    interval = f"95 % interval {points(low)} to {points(high)}, p {_p(p)}"
    if p >= _ALPHA:
        return f"{where}, {ours} and {theirs} cannot be told apart ({points(gap)} points, {interval})."
    word = "better" if gap > 0 else "worse"
    return f"{where}, {ours} is {abs(100 * gap):.1f} points {word} than {theirs} ({interval})."


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def of_choices(rows: Sequence[dict], method: str) -> str:
    """What a policy learned to show, from `right_labels`."""
    found = {row["method"]: row for row in rows}
    if method not in found:
        return ""
    ours = found[method]
    first, any_right, none = ours["first"], ours["with_right"], ours["without"]
    said = f"The first demonstration that {named(method)} shows has an answer that is right for {percent(first)} of "
    said += "the queries"
    beside = [f"{percent(found[m]['first'])} for {named(m)}" for m in ("img_text_sim", "random") if m in found]
    said += f" (it is {' and '.join(beside)})." if beside else "."
    if any_right is not None and none is not None:
        said += (
            f" The model is right on {percent(any_right)} of the queries where any of its demonstrations is, and on "
            f"{percent(none)} of the others."
        )
    return said


# ---------------------------------------------------------------------- training


def strategies(rows: Sequence[dict]) -> list[dict]:
    """Of each strategy the epoch that it chooses, and that epoch's metrics; None where none qualifies."""
    chosen = []
    for name, strategy in STRATEGIES.items():
        row = best_row(list(rows), strategy)
        chosen.append({"name": name, "why": strategy.why, "epoch": row["epoch"] if row else None, "row": row or {}})
    return chosen


_HEALTH = {
    "frac_reward_zero_std": ("groups tied in reward", "share", "no signal: more varied rollouts, a finer reward.mode"),
    "zero_grad_frac": ("rollouts without gradient", "share", "tied or clipped: lower grpo.refresh_every, grpo.lr"),
    "clip_frac": ("ratios outside the clip range", "share", "above 70 %: lower grpo.lr or grpo.refresh_every"),
    "kl_share": ("share of KL in the loss", "share", "above 90 %: lower grpo.kl_beta"),
    "entropy": ("entropy of the first pick (nats)", "number", "falling to 0: raise grpo.entropy_beta or grpo.kl_beta"),
    "grad_norm": ("gradient norm", "number", "growing: lower grpo.lr"),
    "reward": ("mean reward of the rollouts", "number", ""),
    "reward_std": ("spread of rewards in a group", "number", ""),
}


def health(rows: Sequence[dict]) -> list[dict]:
    """What GRPO had to learn from, at its first and last epoch, and what to do about it."""
    rows = [row for row in rows if row["phase"] == "grpo"]
    table = []
    for key, (name, kind, mend) in _HEALTH.items():
        values = [row[key] for row in rows if is_finite(row.get(key))]
        if values:
            show = percent if kind == "share" else "{:.3g}".format
            table.append({"name": name, "first": show(values[0]), "last": show(values[-1]), "mend": mend})
    return table


def of_groups(rows: Sequence[dict]) -> str:
    """The state of the groups in a sentence."""
    last = next((row for row in reversed(rows) if row["phase"] == "grpo"), {})
    skipped, tied = last.get("groups_skipped"), last.get("frac_reward_zero_std")
    if not (is_finite(skipped) and is_finite(tied)):
        return ""
    said = f"{skipped:,} groups ({percent(tied)}) teach nothing, since all their rollouts have the same reward"
    return said + ("; that is much." if tied > 1 / 2 else "; the others do.")


def warnings_of(rows: Sequence[dict]) -> list[str]:
    """What training warned of, each kind the first time."""
    first: dict[str, str] = {}
    for row in rows:
        found = row.get("warnings")
        for kind, text in (found if isinstance(found, dict) else {}).items():
            first.setdefault(kind, f"{row['phase']} epoch {row['epoch']}: {text}")
    return list(first.values())
