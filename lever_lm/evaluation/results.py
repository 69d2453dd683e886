"""What `lever infer` leaves in a folder, written and read: metrics.json with results and paired tests; for each method
and number of shots the official predictions, and the sample of every query; icds.jsonl with the choices themselves."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lever_lm.data import Example
from lever_lm.evaluation.choices_file import write_icds
from lever_lm.evaluation.evaluate import Outcome
from lever_lm.selectors import BASELINES, LEARNED, RANDOM
from lever_lm.utils.atomic_io import write_json, write_text
from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_parse import LINE_LIMIT, Line, lines, loads, open_file, read_object
from lever_lm.utils.terminal import shown

LARGEST = 1e300  # of what is drawn: differences stay finite
MOST = 2000  # results of an evaluation, and tests: ours have some ten methods at some ten numbers of shots
METRICS_FILE = "metrics.json"


def is_finite(value) -> bool:
    """Return whether a value is a number that can be drawn."""
    return type(value) in (int, float) and abs(value) < LARGEST


# ---------------------------------------------------------------------- what is in the files


def _is_number(value) -> bool:
    return type(value) in (int, float)


def is_share(value) -> bool:
    """Return whether a value is a number from 0 to 1."""
    return is_finite(value) and 0 <= value <= 1


def is_method(value) -> bool:
    """Return whether a value can be the name of a method: files are called by it."""
    return type(value) is str and Path(value).name == value and "\0" not in value


def _is_told(value) -> bool:
    """Return whether a value is a number, or none because nothing can be said."""
    return value is None or _is_number(value)


_PLAIN = {"method": is_method, "shots": int, "accuracy": _is_number, "n": int, "ci": (_is_number, _is_number)}
_SCORES = {"raw_accuracy": _is_number, "normalized_accuracy": _is_number}  # of the task vqa


def _is_result(row) -> bool:
    """Return whether a JSON value is the result of a method. What 0.1 wrote has neither metrics nor a normalised
    accuracy, and is none."""
    if not fits(row, _PLAIN) or (not fits(row, _SCORES) and "metrics" not in row):
        return False
    told = row.get("metrics", {})
    named = dict.fromkeys(("value", "low", "high"), _is_told)
    return type(told) is dict and all(fits(one, named) for one in told.values())


_TEST = {"method": str, "against": str, "shots": int}
_TEST |= dict.fromkeys(("difference", "low", "high", "p"), _is_number)
_READ = {"results": [_is_result], "tests": [_TEST], "policies": dict, "okvqa_stem": bool}
_READ |= {"checkpoint": str, "lvlm": str, "order": str, "task": str, "score": str}
NOTHING = {"results": [], "tests": [], "policies": {}, "okvqa_stem": False, "checkpoint": "", "lvlm": "", "order": ""}
NOTHING |= {"task": "vqa", "score": "VQA accuracy"}


def _is_id(value) -> bool:
    return type(value) in (int, str)


_SAMPLE = {"question_id": _is_id, "answer": str, "accuracy": is_finite, "references": [str], "icds": [_is_id]}
_SAMPLE |= {"probabilities": [is_share], "considered": [(_is_id, is_share)]}


def fits(value, kind) -> bool:
    """Return whether a JSON value is of a kind: a type, a predicate, [kind] for a list of any length, (kind, …) for a
    list of just these, or a dict for an object with these names, and maybe others."""
    if isinstance(kind, dict):
        return type(value) is dict and all(name in value and fits(value[name], kind[name]) for name in kind)
    if isinstance(kind, list):
        return type(value) is list and all(fits(part, kind[0]) for part in value)
    if isinstance(kind, tuple):
        return type(value) is list and len(value) == len(kind) and all(map(fits, value, kind))
    return type(value) is kind if isinstance(kind, type) else kind(value)


# ---------------------------------------------------------------------- all files of a folder


def write_results(
    folder: Path,
    queries: Sequence[Example],
    train: Sequence[Example],
    outcomes: Sequence[Outcome],
    choices: dict[str, list[list[int]]],
    ours: str,
    facts: dict,
    reasons: dict[str, list[dict]],
    say: Callable[[str], None],
) -> dict:
    """Write predictions and samples of each outcome, the choices of the method `ours` as icds.jsonl, and metrics.json,
    whose content is returned. facts: `setting`, `tests` and what else it says. reasons: of a method, query by query,
    what `selectors.learned.explain` returns. say: is told where results of another setting are replaced."""
    shown_ids = {m: [[train[row].question_id for row in picks] for picks in chosen] for m, chosen in choices.items()}
    for outcome in outcomes:
        predictions = [
            {"question_id": q.question_id, "answer": a} for q, a in zip(queries, outcome.predictions, strict=True)
        ]
        write_json(folder / f"predictions_{outcome.method}_{outcome.shots}shot.json", predictions, indent=None)
        why = reasons.get(outcome.method) or [{}] * len(queries)
        rows = zip(predictions, queries, outcome.scores, shown_ids[outcome.method], why, strict=True)
        samples = [_sample_row(*row, outcome.shots) for row in rows]
        lines_of_json = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
        write_text(samples_file(folder, outcome.method, outcome.shots), lines_of_json)
    write_icds(folder / "icds.jsonl", queries, train, choices[ours])
    return _write_metrics(folder / METRICS_FILE, [outcome.summary() for outcome in outcomes], facts, say)


def evaluations(folder: Path, *, own: bool = True) -> list[Path]:
    """Return the evaluations in a run's inference folder that were made under the setting in which the run was trained;
    or where not `own`, the others. Those with random demonstrations to compare with come first, then the newest."""

    def is_own(one: Path) -> bool:
        found = read_object(one / METRICS_FILE)  # what cannot be read is left to `read_metrics` to refuse
        return not found or found.get("changed") == {}

    def rank(one: Path) -> tuple[bool, float]:
        return any(one.glob(f"samples_{RANDOM}_*.jsonl")), (one / METRICS_FILE).stat().st_mtime

    found = [one for one in (folder, *folder.glob("*/")) if (one / METRICS_FILE).is_file() and is_own(one) == own]
    return sorted(found, key=rank, reverse=True)


def last_evaluation(folder: Path) -> Path | None:
    """Return the first of the `evaluations` in a run's inference folder, or None where there is none."""
    return next(iter(evaluations(folder)), None)


# ---------------------------------------------------------------------- metrics.json


def _write_metrics(path: Path, results: list[dict], facts: dict, say: Callable[[str], None]) -> dict:
    """Write results and tests to those of the same setting that are there; new ones replace their like, and all of a
    method whose policy is another now. The table of `--against` stays until there is a new one."""
    earlier, tests = read_object(path), facts.get("tests", [])
    rows = earlier.get("results")
    if earlier.get("setting") == facts.get("setting"):
        before, policies = ({**part} if type(part := each.get("policies")) is dict else {} for each in (earlier, facts))
        other = {method for method in before if policies.get(method, before[method]) != before[method]}
        results = _others(rows, _is_result, results, ("method", "shots"), other) + results
        tests = _others(earlier.get("tests"), _TEST, tests, ("method", "against", "shots"), other) + tests
        kept = {"arena": earlier["arena"]} if "arena" in earlier and not other else {}
        others = {method: digest for method, digest in before.items() if method not in policies}
        facts = {**kept, **facts, "policies": others | policies}
    elif isinstance(rows, list) and rows:
        others = "results of other queries, other data, another policy or version"
        say(f"{path.parent}: {len(rows)} {others} are replaced")
    metrics = {**facts, "tests": tests, "results": results}
    write_json(path, metrics)
    return metrics


def _others(rows, kind, new: list[dict], names: Sequence[str], without: set[str]) -> list[dict]:
    """Return the sound ones among `rows` that differ from all new ones in some of the named values, and name no method
    of `without`."""
    replaced = [[row[name] for name in names] for row in new]
    rows = rows if isinstance(rows, list) else []
    return [
        row
        for row in rows
        if fits(row, kind)
        and [row[name] for name in names] not in replaced
        and without.isdisjoint(row[name] for name in names)
    ]


def read_metrics(folder: Path) -> dict:
    """Return what the metrics.json in a folder says: results, tests, policies (method → digest), checkpoint,
    okvqa_stem, lvlm, and order (of the prompt), as NOTHING has them where it does not say. Raises LeverError where
    there are no results."""
    path = folder / METRICS_FILE
    found = NOTHING | read_object(path)
    if not (fits(found, _READ) and found["results"] and max(len(found["results"]), len(found["tests"])) <= MOST):
        raise LeverError(
            f"{path} holds no results of `lever infer`, or more than {MOST:,}: run `lever infer --baselines` or "
            "`lever demo` first"
        )
    return found


def method_of(metrics: dict) -> str | None:
    """Return the method whose evaluation read_metrics returned: the one that its newest tests are of, else the last
    checkpoint's, else the first learned one; None where only baselines were run."""
    there = {row["method"] for row in metrics["results"]} - {*BASELINES}
    told = (*(test["method"] for test in reversed(metrics["tests"])), *reversed(metrics["policies"]), *LEARNED)
    return next((method for method in told if method in there), None)


def table(results: Sequence[dict]) -> tuple[list[int], list[tuple[str, list[dict | None]]]]:
    """Return the numbers of shots, and for each method its result at each of them, None where there is none; that of
    zero-shot is the same at all."""
    cells = {(row["method"], row["shots"]): row for row in results}
    shots = sorted({k for _, k in cells if k}) or [0]
    methods = dict.fromkeys(method for method, _ in cells)
    return shots, [(m, [cells.get((m, k)) or cells.get((m, 0)) for k in shots]) for m in methods]


# ---------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Sample:
    """One query under one method: the LVLM's answer, its accuracy, the references; the ICDs' question ids in pick
    order. Of a policy's choice also the probability of each pick, and the likeliest candidates for the first place."""

    question_id: int
    answer: str
    accuracy: float
    references: list[str]
    icds: list[int]
    probabilities: list[float]
    considered: list[list]


def samples_file(folder: Path, method: str, shots: int) -> Path:
    """Return where the samples of a method are."""
    return folder / f"samples_{method}_{shots}shot.jsonl"


def _sample_row(prediction: dict, query: Example, score: float, icds: list[int], why: dict, shots: int) -> dict:
    """Return the line of a sample; its choices are cut to the shots that were shown."""
    row = {
        **prediction,
        "question": query.question,
        "image_id": query.image_id,
        "accuracy": round(score, 6),
        "references": list(query.answers),
        "icds": icds[:shots],
        **why,
    }
    return row | ({"probabilities": row["probabilities"][:shots]} if "probabilities" in row else {})


def read_samples(path: Path) -> dict[int, Sample]:
    """Return the samples in a file by question id, in its order. Raises LeverError naming the line that holds none."""
    try:
        open_file(path).close()  # a pipe would be waited for
        samples = [_sample(line, path) for line in lines(path, LINE_LIMIT) if line.text.strip()]
    except OSError as error:
        raise LeverError(f"cannot read {path}: {error.strerror or error}; run `lever infer` again") from error
    return {sample.question_id: sample for sample in samples}


def _sample(line: Line, path: Path) -> Sample:
    try:
        row = {"probabilities": [], "considered": [], **loads(line.text)}
        if not fits(row, _SAMPLE) or len(row["probabilities"]) not in (0, len(row["icds"])):
            raise TypeError("a part of another type")
    except (ValueError, TypeError) as error:
        raise LeverError(
            f"{path}, line {line.number}: no prediction of `lever infer` ({shown(str(error))}); run `lever infer` again"
        ) from error
    return Sample(**{name: row[name] for name in _SAMPLE})
