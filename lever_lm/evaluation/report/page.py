"""Runs and their evaluations → one self-contained HTML page: what came out, what was chosen and how surely, how the
policy was trained, and with what. No script and no address is in it: it can be mailed, and printed."""

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from lever_lm.data import VqaData
from lever_lm.evaluation.arena import WARMUPS, made_by
from lever_lm.evaluation.findings_files import own_folder, read_arena, read_diagnosis
from lever_lm.evaluation.report import contenders
from lever_lm.evaluation.report import phrasing as words
from lever_lm.evaluation.report.curves import PHASES, Evaluated, Series, charts_of
from lever_lm.evaluation.report.gallery import Gallery, pick_queries, read_shown
from lever_lm.evaluation.report.seeds import OverSeeds, settings_of, shared_scores
from lever_lm.evaluation.report.svg import line_chart
from lever_lm.evaluation.results import METRICS_FILE, is_finite, method_of, read_metrics, table
from lever_lm.evaluation.statistics import paired_test
from lever_lm.evaluation.templates import render
from lever_lm.selectors import CONTRASTS, LEARNED, SIMPLE, named
from lever_lm.selectors.pointer.checkpoint import load_policy, policy_digest
from lever_lm.training.environment import read_environment, typed_again
from lever_lm.training.metrics import LOGGED, MEASURED, METRICS, RECOMMENDED, recommended_by
from lever_lm.training.run_dir import RunFolder, differing
from lever_lm.utils.atomic_io import write_text
from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_parse import CONFIG_LIMIT, read_bytes
from lever_lm.utils.terminal import shown

_EPOCHS = ("phase", "epoch", *LOGGED, RECOMMENDED, MEASURED)
_MOST = 200  # epochs in the table
_LONGEST = 200  # characters of a value that differs


def write_report(
    run: RunFolder,
    inference: Path | None,
    data: VqaData | None,
    *,
    others: Sequence[Evaluated] = (),
    seeds: OverSeeds | None = None,
    output: Path | None = None,
    command: str = "",
) -> Path:
    """Write the page of a run and return its path: `report.html` in the run folder, or `output`.

    inference: a folder that write_results filled over `data`; None for a run that was not evaluated. others: runs
    that are laid over it; seeds: what all of them make over seeds. command: the command line that made the page. Raises
    LeverError for a run without metrics, and for files that are not those of a run.
    """
    page = _page(Evaluated(run, inference), data, list(others)) | _over_seeds(seeds or OverSeeds())
    text = render("report.html.j2", words.FILTERS, command=command, **page)
    try:
        write_text(output or run.report, text)
    except LeverError as error:
        raise LeverError(f"{error}; --output FILE puts the page elsewhere") from error
    return output or run.report


def _page(main: Evaluated, data: VqaData | None, others: list[Evaluated]) -> dict:
    """Return the values of the page's template."""
    metrics, history, rows = main.metrics, main.history, main.rows
    names, series, curves = charts_of([main, *others])
    environment = read_environment(main.run, CONFIG_LIMIT)
    judged = [row for row in rows if row["phase"] == (history.phase if history else "grpo")]
    return {
        "run": names[0],
        "names": names,
        "results": metrics["results"],
        **_by_shots(metrics),
        "checkpoint": metrics["checkpoint"],
        "chart": _accuracy_chart(series, metrics["score"]) if any(one.points for one in series) else "",
        "score": metrics["score"],
        "corpus": _corpus(metrics),
        "nearest": metrics["order"] == "first_pick_last",
        "stale": _is_stale(main.run, metrics),
        **_chosen(main, data),
        **_contenders(main),
        "phases": [
            (title, [_curve_chart(title, metric, lines) for metric, lines in of_phase.items()])
            for title, of_phase in ((_title(phase, main.run), of_phase) for phase, of_phase in curves.items())
        ],
        "strategies": words.strategies(judged),
        "source": history.source if history else "",
        "health": words.health(rows),
        "groups": words.groups(rows),
        "warnings": words.warnings_of(rows),
        "columns": [key for key in _EPOCHS if key != MEASURED or recommended_by(rows) == MEASURED],
        "epochs": rows[-_MOST:],
        "left_out": max(0, len(rows) - _MOST),
        "config": _text(main.run.config),
        "environment": yaml.safe_dump(environment, sort_keys=False, allow_unicode=True),
        "trained_by": typed_again(environment.get("command")),
        "compared": [_compared((main, names[0]), pair) for pair in zip(others, names[1:], strict=True)],
    }


def _corpus(metrics: dict) -> list[dict]:
    """Return the results whose task reports more than means of scores: none of the task vqa, which has columns."""
    return [row for row in metrics["results"] if row.get("metrics")] if metrics["task"] != "vqa" else []


def _accuracy_chart(series: list[Series], score: str) -> str:
    room = 20 + min(150, 7 * max((len(one.label) for one in series), default=0))
    return line_chart(
        series,
        title=f"{score} in percent by number of demonstrations",
        across="demonstrations (shots)",
        ticks=sorted({x for one in series if not one.flat for x, _ in one.points}),
        show="{:.1f}".format,
        size=(270 + room, 290),
        labels=room,
    )


def _title(phase: str, run: RunFolder) -> str:
    """Return what a phase of a run is called: a warm-up that is not RCE, by the selectors that its losses make."""
    losses = str(settings_of(run).get("warmup")).split("+")
    if phase != "rce" or not any(loss in WARMUPS for loss in losses):
        return PHASES[phase]
    return f"Warm-up: {', then '.join(named(made_by(loss)) for loss in losses)}"


def _curve_chart(phase: str, metric: str, series: list[Series]) -> tuple[str, str]:
    """Return the title of a curve and its chart."""
    title = METRICS[metric].title
    return title, line_chart(series, title=f"{phase}, {title}", across="epoch")


def _is_stale(run: RunFolder, metrics: dict) -> bool:
    """Return whether the policy that was evaluated is another than its checkpoint holds now, as after training anew."""
    path = run.path / Path(metrics["checkpoint"]).name
    digests = {digest for digest in metrics["policies"].values() if isinstance(digest, str)}
    if not (digests and metrics["checkpoint"] and os.path.isfile(path)):  # the name may be no name of a file
        return False
    try:
        return policy_digest(load_policy(path)) not in digests
    except LeverError:
        return True


def _chosen(main: Evaluated, data: VqaData | None) -> dict:
    """Return the sentence of the run, and what its policy chose."""
    metrics = main.metrics
    found = read_shown(main.inference, metrics) if main.inference and data else None
    if found is None:
        return {"sentence": None, "learned": None, "labels": [], "cards": [], "counts": {}}
    lvlm = metrics["lvlm"] or main.run.lvlm() or "the LVLM"
    (chosen, counts), gallery = pick_queries(found), Gallery(found, data)
    labels = gallery.labels()
    first = {row["method"]: row for row in labels}
    results, tests = (
        [row for row in metrics[name] if (row["method"], row["shots"]) == (found.method, found.shots)]
        for name in ("results", "tests")
    )
    tests, free = {test["against"]: test for test in tests}, _free(metrics, found.shots)
    against = dict.fromkeys((*CONTRASTS, free))
    return {
        "sentence": (results[0], [tests[name] for name in against if name in tests], free, lvlm, metrics["score"]),
        "learned": found.method in first
        and (first[found.method], [first[name] for name in reversed(CONTRASTS) if name in first]),
        "labels": labels,
        "cards": [gallery.card(question_id, kind) for kind, ids in chosen.items() for question_id in ids],
        "counts": {kind: (len(chosen[kind]), number) for kind, number in counts.items()},
    }


def _free(metrics: dict, shots: int) -> str | None:
    """Return the best of the evaluated methods that ask the LVLM nothing and are not shown the references."""
    rows = [row for row in metrics["results"] if row["method"] in (*SIMPLE, "answer_match") and row["shots"] == shots]
    return max(rows, key=lambda row: row["accuracy"])["method"] if rows else None


def _contenders(main: Evaluated) -> dict:
    """Return the sections on other selectors, and on what the demonstrations do: None where nothing was asked."""
    if main.inference is None:
        return {"arena": None, "arena_is_stale": False, "diagnosis": None, "diagnosis_is_stale": False}
    folder, metrics = main.inference, main.metrics
    own, found = own_folder(folder, metrics), read_diagnosis(folder, metrics)
    if "arena" not in metrics and os.path.isfile(own / METRICS_FILE):
        folder, metrics = own, read_metrics(own)
    return {
        "arena": contenders.arena(read_arena(folder, metrics), method_of(metrics), metrics["score"]),
        "arena_is_stale": folder == own and _is_stale(main.run, metrics),
        "diagnosis": contenders.diagnosis(found),
        "diagnosis_is_stale": found is not None and _is_stale(main.run, found),
    }


def _by_shots(metrics: dict) -> dict:
    """Return the results as a table of methods and shots, and the tests: at the most shots, and at others."""
    shots, methods = table(metrics["results"])
    tests = [t for t in metrics["tests"] if all(is_finite(t[name]) for name in ("difference", "low", "high", "p"))]
    parts = [[t for t in tests if (t["shots"] == shots[-1]) == last] for last in (True, False)]
    return {
        "tests": parts if any(parts) else [],
        "columns_of_shots": shots,
        "by_method": methods,
        "learned_methods": [method_of(metrics)],
    }


def _text(path: Path) -> str:
    """Return the text of a run's config.yaml; nothing where it cannot be shown."""
    try:
        return read_bytes(path, CONFIG_LIMIT).decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""


# ---------------------------------------------------------------------- beside another run


def _compared(ours: tuple[Evaluated, str], theirs: tuple[Evaluated, str]) -> dict:
    """Return how another run differs, both with their names: key and both values of the configs, as they would be
    typed, and the paired tests."""

    def plain(value) -> str:
        return value[:_LONGEST] if isinstance(value, str) and value else shown(value, _LONGEST)

    config = differing(*(settings_of(one.run) for one, _ in (ours, theirs)))
    return {
        "name": theirs[1],
        "config": [(".".join(key), plain(here), plain(there)) for key, here, there in config],
        "tests": _tests(ours, theirs),
    }


def _over_seeds(found: OverSeeds) -> dict:
    """Return what the page shows of runs over seeds, its table as that of `_by_shots`."""
    shots, methods = table(found.rows)
    n = sorted({row["n"] for row in found.rows})
    return {"seeds": found, "seed_shots": shots, "seed_methods": methods, "seed_queries": [n[0], n[-1]] if n else []}


def _tests(ours: tuple[Evaluated, str], theirs: tuple[Evaluated, str]) -> list[dict]:
    """Return what each learned method of both does on the queries that both answered, with the same references."""
    runs, names = zip(ours, theirs, strict=True)
    done = [{(row["method"], row["shots"]) for row in run.metrics["results"] if row["shots"]} for run in runs]
    tests = []
    for method, shots in sorted(done[0] & done[1]):
        if method in LEARNED:
            scores = shared_scores([run.inference for run in runs], method, shots)
            if scores[0]:
                told = {"method": f"{method} of {names[0]}", "against": f"{method} of {names[1]}", "shots": shots}
                tests.append({**told, **paired_test(*scores), "n": len(scores[0])})
    return tests
