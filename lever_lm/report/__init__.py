"""Runs and their evaluations → one self-contained HTML page: what came out, what was chosen and how surely, how the
policy was trained, and with what. No script and no address is in it: it can be mailed, and printed."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from lever_lm.data import VqaData
from lever_lm.errors import LeverError
from lever_lm.files import write_text
from lever_lm.provenance import read_environment
from lever_lm.report import words
from lever_lm.report.curves import (
    PHASES,
    Evaluated,
    accuracy_chart,
    accuracy_series,
    curve_chart,
    training_curves,
)
from lever_lm.report.gallery import EACH, LEARNED, make_cards, pick_queries, read_shown, right_labels
from lever_lm.report.results import is_finite, last_evaluation, read_samples, samples_file
from lever_lm.runs import RunFolder, differing
from lever_lm.selection import read_history
from lever_lm.stats import paired_test
from lever_lm.untrusted import CONFIG_LIMIT, printable, read_bytes, shown

__all__ = ["Evaluated", "last_evaluation", "write_report"]

_EPOCHS = ("phase", "epoch", "train_loss", "val_loss", "ppo_loss", "kl", "adv_std", "adv_max", "beta", "val_reward")
_MOST = 200  # epochs in the table
_NOT_COMPARED = ("command", "sources", "resumed_with")  # of env.json


def write_report(
    run: RunFolder,
    inference: Path | None,
    data: VqaData | None,
    *,
    others: Sequence[Evaluated] = (),
    output: Path | None = None,
    command: str = "",
) -> Path:
    """Write the page of a run and return its path: `report.html` in the run folder, or `output`.

    inference: a folder that Evaluation.write filled over `data`; None for a run that was not evaluated. others: runs
    that are laid over it. command: the command line that made the page. Raises LeverError for a run without metrics,
    and for files that are not those of a run.
    """
    page = _page(Evaluated(run, inference), data, list(others))
    output = output or run.report
    write_text(output, _render(command=printable(command), **page))
    return output


def _render(**values) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lever_lm"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": words.percent, "points": words.points, "named": words.named}
    return environment.get_template("report.html.j2").render(**values)


def _page(main: Evaluated, data: VqaData | None, others: list[Evaluated]) -> dict:
    """The values of the page's template."""
    metrics = main.metrics()
    history = read_history(main.run, None) if main.inference is None else _history(main.run)
    runs = [(one.name, one.run.rows()) for one in (main, *others)]
    rows = runs[0][1] or (history.rows if history else [])
    series = accuracy_series(metrics["results"], [(one.name, one.metrics()["results"]) for one in others])
    curves = training_curves([(main.name, rows), *runs[1:]])
    environment = read_environment(main.run)
    judged = [row for row in rows if row["phase"] == (history.phase if history else "grpo")]
    return {
        "run": main.name,
        "names": [name for name, _ in runs],
        "results": [_readable(row) for row in metrics["results"]],
        **_by_shots(metrics),
        "checkpoint": printable(metrics["checkpoint"]),
        "chart": accuracy_chart(series) if any(one.points for one in series) else "",
        "nearest": _settings(main.run).get("prompt", {}).get("order") == "first_pick_last",
        **_chosen(main, metrics, data),
        "phases": [
            (title, [(curve.title, curve_chart(curve)) for curve in curves if curve.phase == phase])
            for phase, title in PHASES.items()
            if any(curve.phase == phase for curve in curves)
        ],
        "strategies": words.strategies(judged),
        "source": printable(history.source) if history else "",
        "health": words.health(rows),
        "groups": words.of_groups(rows),
        "warnings": [printable(text) for text in words.warnings_of(rows)],
        "columns": _EPOCHS,
        "epochs": [[_cell(row.get(name)) for name in _EPOCHS] for row in rows[-_MOST:]],
        "left_out": max(0, len(rows) - _MOST),
        "config": _text(main.run.config),
        "environment": printable(yaml.safe_dump(environment, sort_keys=False, allow_unicode=True)),
        "trained_by": printable(str(environment.get("command") or "")),
        "compared": [_compared(main, one) for one in others],
    }


def _history(run: RunFolder):
    """A run's metrics; None where there are none, as where choices from a file were evaluated."""
    try:
        return read_history(run, None)
    except LeverError:
        return None


def _chosen(main: Evaluated, metrics: dict, data: VqaData | None) -> dict:
    """The sentence of the run, and what its policy chose."""
    found = read_shown(main.inference, metrics["results"]) if main.inference and data else None
    nothing = {"sentence": "", "learned": "", "labels": [], "cards": [], "counts": {}, "each": EACH, "shots": 0}
    if found is None:
        return nothing
    lvlm = printable(main.run.lvlm() or "the LVLM")
    chosen, counts = pick_queries(found)
    labels = right_labels(found, data)
    at = (found.method, found.shots)
    return {
        "sentence": words.in_one_sentence(metrics["results"], metrics["tests"], *at, lvlm),
        "learned": words.of_choices(labels, found.method),
        "labels": [_readable(row) for row in labels],
        "cards": make_cards(found, data, chosen),
        "counts": {kind: (len(chosen[kind]), number) for kind, number in counts.items()},
        "each": EACH,
        "shots": found.shots,
    }


def _by_shots(metrics: dict) -> dict:
    """The results as a table of methods and shots, and the tests in words: those at the most shots, and the others."""
    results = [_readable(row) for row in metrics["results"]]
    cells = {(row["method"], row["shots"]): row for row in results}
    shots = sorted({row["shots"] for row in results if row["shots"]}) or [0]
    methods = dict.fromkeys(row["method"] for row in results)
    tests = [_readable(test) for test in metrics["tests"] if _is_sound(test)]
    said = [[words.of_test(t) for t in tests if (t["shots"] == shots[-1]) == last] for last in (True, False)]
    return {
        "tests": said if any(said) else [],
        "columns_of_shots": shots,
        "by_method": [(m, [cells.get((m, k)) or cells.get((m, 0)) for k in shots]) for m in methods],
        "learned_methods": LEARNED,
    }


def _is_sound(test: dict) -> bool:
    return all(is_finite(test[name]) for name in ("difference", "low", "high", "p"))


def _readable(row: dict) -> dict:
    return {key: printable(value) if isinstance(value, str) else value for key, value in row.items()}


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "–" if value is None else printable(str(value))


def _text(path: Path) -> str:
    """The text of a run's config.yaml; nothing where it cannot be shown."""
    try:
        return printable(read_bytes(path, CONFIG_LIMIT).decode("utf-8", "replace"))
    except (OSError, ValueError):
        return ""


# ---------------------------------------------------------------------- beside another run


def _compared(main: Evaluated, other: Evaluated) -> dict:
    """How another run differs: config, environment, and the paired test on the queries that both answered."""
    settings = [_settings(one.run) for one in (main, other)]
    environments = [{**read_environment(one.run), **dict.fromkeys(_NOT_COMPARED)} for one in (main, other)]
    return {
        "name": other.name,
        "config": _differing(*settings),
        "environment": _differing(*environments),
        "tests": _tests(main, other),
    }


def _settings(run: RunFolder) -> dict:
    """The config of a run; {} where it has none, or none that can be read."""
    try:
        return run.settings()
    except LeverError:
        return {}


def _differing(ours: dict, theirs: dict) -> list[tuple[str, str, str]]:
    return [(printable(".".join(key)), shown(here), shown(there)) for key, here, there in differing(ours, theirs)]


def _tests(main: Evaluated, other: Evaluated) -> list[str]:
    ours, theirs = (
        {(row["method"], row["shots"]) for row in one.metrics()["results"] if row["shots"]} for one in (main, other)
    )
    said = []
    for method, shots in sorted(ours & theirs):
        if method in ("grpo", "rce", "policy", "icds"):
            one, two = (read_samples(samples_file(run.inference, method, shots)) for run in (main, other))
            both = [i for i in one if i in two]
            if both:
                scores = [[samples[i].accuracy for i in both] for samples in (one, two)]
                names = {"method": f"{method} of {main.name}", "against": f"{method} of {other.name}", "shots": shots}
                said.append(f"On {len(both):,} queries. {words.of_test({**names, **paired_test(*scores)})}")
    return said
