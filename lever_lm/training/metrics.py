"""The metrics of an epoch, each once: how log, choice of a checkpoint, `status`, page and figures show it.

Keys are those of metrics.jsonl. A statistic that a loss returns is in metrics.jsonl by itself; a line of METRICS shows
it in the other places too.
"""

from collections.abc import Callable
from dataclasses import dataclass

# Phase → its heading in train.log. The headings and the columns of GRPO are what existing scripts parse.
HEADINGS = {"rce": "阶段2：RCE预热", "grpo": "阶段3：GRPO训练"}
PHASES, GRPO_MARKER = tuple(HEADINGS), HEADINGS["grpo"]
KL_RANGE, KL_TARGET = (0.01, 0.1), 0.05
RECOMMENDED = "val_reward"  # the strategy by which `train` and `demo` recommend a checkpoint,
MEASURED = "val_accuracy"  # and the one by which they do where it was measured (validate_on=answers)
# The seed's columns of the GRPO table: older logs have these alone.
LOGGED = ("train_loss", "val_loss", "ppo_loss", "kl", "adv_std", "adv_max", "beta")
TIMES = ("epoch_time", "step_time")  # keys of a row that differ between two equal runs


@dataclass(frozen=True)
class Column:
    """A column of the tables in train.log."""

    heading: str
    width: int
    precision: int
    phases: str = "rce grpo"


@dataclass(frozen=True)
class Metric:
    """One metric. `on` names the places that show it beside its column: curve (of page and figures), status, progress
    (beside the bar), health (of the groups, on the page), and whether it is a percentage there.

    title: on the page; an axis has what stands before the bracket. score: what the strategy of this name minimises,
    None for a value that does not qualify; why: what that strategy looks for. note: on the page, of its health.
    """

    key: str
    title: str = ""
    on: str = ""
    column: Column | None = None
    score: Callable[[float], float | None] | None = None
    why: str = ""
    note: str = ""

    @property
    def label(self) -> str:
        """Return the title for an axis."""
        return self.title.split(" (")[0]


def _least(value: float) -> float:
    return value


def _largest(value: float) -> float:
    return -value


def _near_target(value: float) -> float | None:
    return abs(value - KL_TARGET) if KL_RANGE[0] <= value <= KL_RANGE[1] else None


_SHOWN = "curve status progress"
_ALL = (
    Metric("train_loss", "train loss", _SHOWN, Column("Train Loss", 12, 5)),
    Metric("val_loss", "validation loss", _SHOWN, Column("Val Loss", 12, 5), _least, "least validation loss"),
    Metric("ppo_loss", "PPO loss", "curve status", Column("PPO Loss", 12, 5, "grpo"), _least, "least PPO loss"),
    Metric("kl", "KL", "curve status", Column("KL", 10, 5, "grpo"), _near_target, "KL in [0.01, 0.1], nearest 0.05"),
    Metric("adv_std", "Adv Std (advantages)", "curve", Column("Adv Std", 10, 4, "grpo"), _largest, "largest spread"),
    Metric("adv_max", column=Column("Adv Max", 10, 4, "grpo")),
    Metric("beta", "β (weight of the KL)", "curve status", Column("Beta", 8, 4, "grpo")),
    Metric("temperature", "temperature (RCE weights)", "curve status", Column("Temperature", 12, 3, "rce")),
    Metric("frac_reward_zero_std", "groups tied in reward", "health percent", note="nothing to learn from"),
    Metric("zero_grad_frac", "rollouts without gradient", "health percent", note="tied, or clipped"),
    Metric("clip_frac", "ratios outside the clip range", "health percent", note="how far from the old policy"),
    Metric("kl_share", "share of KL in the loss", "health percent", note="how much pulls back to the reference policy"),
    Metric("entropy", "entropy (first pick, nats)", "curve health", note="near 0 one candidate takes all"),
    Metric("grad_norm", "gradient norm", "health", note="before it is cut at grpo.max_grad_norm"),
    Metric("reward", "mean reward of the rollouts", "health status"),
    Metric("reward_std", "spread of rewards in a group", "health"),
    Metric("val_reward", "val_reward (expected)", _SHOWN, None, _largest, "largest validation reward"),
    Metric("val_top_reward", "val_top_reward (first choice)", "curve", None, _largest, "largest such reward"),
    Metric(MEASURED, "val_accuracy (greedy picks)", _SHOWN, None, _largest, "largest validation accuracy"),
)
# How the line after an epoch's row tells a metric.
_BRIEF = {
    "zero_grad_frac": "rollouts without gradient {:.0%}",
    "clip_frac": "clipped {:.0%}",
    "entropy": "entropy {:.2f}",
    "grad_norm": "gradient norm {:.2g}",
    "val_reward": "val_reward {:.4f}",
    MEASURED: "val_accuracy {:.4f}",
}
METRICS: dict[str, Metric] = {metric.key: metric for metric in _ALL}
STRATEGIES: dict[str, Metric] = {metric.key: metric for metric in _ALL if metric.score is not None}


def recommended_by(rows: list[dict]) -> str:
    """Return the strategy by which one of these epochs is recommended: val_accuracy where it was measured."""
    return MEASURED if any(MEASURED in row for row in rows) else RECOMMENDED


def metrics_on(place: str) -> dict[str, Metric]:
    """Return the metrics that a place shows, in the order of METRICS."""
    return {key: metric for key, metric in METRICS.items() if place in metric.on.split()}


def table_columns(phase: str) -> dict[str, Column]:
    """Return the columns of a phase's table by key."""
    return {
        key: metric.column for key, metric in METRICS.items() if metric.column and phase in metric.column.phases.split()
    }


def table_of(row: dict) -> tuple[str, str]:
    """Return the phase of a row and its warm-up, "" for RCE and for GRPO: together they name its table in the log."""
    warmup = row.get("warmup")
    return row["phase"], warmup if isinstance(warmup, str) else ""


def table_header(phase: str, warmup: str = "") -> list[str]:
    """Return marker line, column names and rule of a phase's table; warmup: the one of the table, where not RCE."""
    names = "".join(f" {column.heading:>{column.width}}" for column in table_columns(phase).values())
    heading = HEADINGS[phase].replace("RCE", warmup.upper()) if warmup else HEADINGS[phase]
    return [heading, f"{'Epoch':>6}{names}", "-" * (6 + len(names))]


def table_row(row: dict) -> str:
    """Return the line of an epoch in its phase's table; `-` for a number that a checkpoint of another program does not
    carry."""
    cells = [f"{row['epoch']:>6}"]
    for key, column in table_columns(row["phase"]).items():
        known = isinstance(row.get(key), (int, float))
        cells.append(f"{row[key]:>{column.width}.{column.precision}f}" if known else f"{'-':>{column.width}}")
    return " ".join(cells)


def brief(row: dict) -> str:
    """Return the metrics that the line after an epoch's row tells, as far as the row has them."""
    return ", ".join(text.format(row[key]) for key, text in _BRIEF.items() if key in row)
