"""What the numbers of a run say: how they are written, which epochs strategies choose, and what training had to learn
from. The sentences themselves are in templates/phrases.html.j2."""

from collections.abc import Sequence

from lever_lm.evaluation.results import is_finite
from lever_lm.selectors import named
from lever_lm.training.metrics import STRATEGIES, metrics_on
from lever_lm.training.select_checkpoint import best_row


def percent(value: float) -> str:
    """Return `78.6 %`."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """Return `+16.0`."""
    return f"{100 * value:+.1f}".replace("-", "−")


def capitalize_first(text: str) -> str:
    """Return a text with a capital at its beginning, and the rest as it is."""
    return text[:1].upper() + text[1:]


FILTERS = {
    "percent": percent,
    "points": points,
    "named": named,
    "capitalize_first": capitalize_first,
}  # of the templates


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


def groups(rows: Sequence[dict]) -> tuple[int, float] | None:
    """Return how many groups taught nothing at the last epoch of GRPO, and the share of tied ones."""
    last = next((row for row in reversed(rows) if row["phase"] == "grpo"), {})
    found = (last.get("groups_skipped"), last.get("frac_reward_zero_std"))
    return found if all(map(is_finite, found)) else None


def warnings_of(rows: Sequence[dict]) -> list[str]:
    """Return what training warned of, each kind the first time."""
    first: dict[str, str] = {}
    for row in rows:
        found = row.get("warnings")
        for kind, text in (found if isinstance(found, dict) else {}).items():
            first.setdefault(kind, f"{row['phase']} epoch {row['epoch']}: {text}")
    return list(first.values())
