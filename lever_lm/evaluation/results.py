"""What `lever infer` leaves in a folder, written and read: metrics.json with results and paired tests; for each method
and number of shots the official predictions, and the sample of every query; icds.jsonl with the choices themselves."""

import errno
import json
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lever_lm.data import Example
from lever_lm.evaluation.choices_file import write_icds
from lever_lm.evaluation.evaluate import Outcome
from lever_lm.selectors import RANDOM
from lever_lm.utils.atomic_io import write_json, write_text
from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_parse import LINE_LIMIT, Line, lines, loads, read_json, read_object
from lever_lm.utils.terminal import shown

LARGEST = 1e300  # of what is drawn: differences stay finite
_MOST = 2000  # results of an evaluation, and tests: ours have some ten methods at some ten numbers of shots
_METRICS = "metrics.json"
_NUMBER = (int, float)
_RESULT = {"method": str, "shots": int, "accuracy": _NUMBER, "raw_accuracy": _NUMBER, "n": int, "ci": list}
_TEST = {"method": str, "against": str, "shots": int, **dict.fromkeys(("difference", "low", "high", "p"), _NUMBER)}


def is_finite(value) -> bool:
    """Return whether a value is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


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
) -> dict:
    """Write predictions and samples of each outcome, the choices of the method `ours` as icds.jsonl, and metrics.json,
    whose content is returned. facts: `setting`, `tests` and what else it says. reasons: of a method, query by query,
    what `selectors.learned.explain` returns."""
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
    return _write_metrics(folder / _METRICS, [outcome.summary() for outcome in outcomes], facts)


def evaluations(folder: Path, *, own: bool = True) -> list[Path]:
    """Return the evaluations in a run's inference folder that were made under the setting in which the run was trained;
    or where not `own`, the others. Those with random demonstrations to compare with come first, then the newest."""

    def is_own(one: Path) -> bool:
        found = read_object(one / _METRICS)  # what cannot be read is left to `read_metrics` to refuse
        return not found or found.get("changed") == {}

    def rank(one: Path) -> tuple[bool, float]:
        return any(one.glob(f"samples_{RANDOM}_*.jsonl")), (one / _METRICS).stat().st_mtime

    found = [one for one in (folder, *folder.glob("*/")) if (one / _METRICS).is_file() and is_own(one) == own]
    return sorted(found, key=rank, reverse=True)


def last_evaluation(folder: Path) -> Path | None:
    """Return the first of the `evaluations` in a run's inference folder, or None where there is none."""
    return next(iter(evaluations(folder)), None)


# ---------------------------------------------------------------------- metrics.json


def _write_metrics(path: Path, results: list[dict], facts: dict) -> dict:
    """Write results and tests to those of the same setting that are there; new ones replace their like."""
    earlier = read_object(path)
    tests = facts.get("tests", [])
    if facts.get("setting") is not None and earlier.get("setting") == facts["setting"]:
        tests = _others(earlier.get("tests"), tests, is_test, ("method", "against", "shots")) + tests
        results = _others(earlier.get("results"), results, is_result, ("method", "shots")) + results
    metrics = {**facts, "tests": tests, "results": results}
    write_json(path, metrics)
    return metrics


def _others(rows, new: Iterable[dict], is_one: Callable, names: Sequence[str]) -> list[dict]:
    """Return the sound ones among `rows` that differ from all new ones in some of the named values."""
    replaced = {tuple(row[name] for name in names) for row in new}
    rows = rows if isinstance(rows, list) else []
    return [row for row in rows if is_one(row) and tuple(row[name] for name in names) not in replaced]


def rows_of_another_setting(folder: Path, setting: str) -> int:
    """Return how many results the metrics.json of a folder holds of another setting, which new ones would replace."""
    there = read_object(folder / _METRICS)
    rows = there.get("results")
    return len(rows) if isinstance(rows, list) and there.get("setting") != setting else 0


def is_result(row) -> bool:
    """Return whether a value is one of the results in a metrics.json. lever_lm 0.1 wrote no normalized_accuracy."""
    if not _has(row, _RESULT) or len(row["ci"]) != 2:
        return False
    return all(isinstance(value, _NUMBER) for value in (*row["ci"], row.get("normalized_accuracy", 0.0)))


def is_test(row) -> bool:
    """Return whether a value is one of the tests in a metrics.json."""
    return _has(row, _TEST)


def _has(row, kinds: dict) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in kinds.items())


def read_metrics(folder: Path) -> dict:
    """Return results, tests, checkpoint, okvqa_stem, and policies, method → digest, of the metrics.json in a folder;
    where they are known also lvlm and order (of the prompt). Raises LeverError where there is none."""
    path, mend = folder / _METRICS, "run `lever infer --baselines` or `lever demo` first"
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise LeverError(f"no results to report in {folder}: {mend}") from error
    found = found if isinstance(found, dict) else {}
    results, tests, checkpoint = found.get("results"), found.get("tests", []), found.get("checkpoint", "")
    sound = isinstance(results, list) and isinstance(tests, list) and all(map(is_result, results))
    if not (sound and results and all(map(is_test, tests)) and isinstance(checkpoint, str)):
        raise LeverError(f"{path} holds no results of `lever infer`: {mend}")
    if max(len(results), len(tests)) > _MOST:
        raise LeverError(f"{path} holds {len(results):,} results and {len(tests):,} tests, more than {_MOST:,}: {mend}")
    policies = found.get("policies")
    return {
        "results": results,
        "tests": tests,
        "checkpoint": checkpoint,
        "policies": policies if isinstance(policies, dict) else {},
        "okvqa_stem": found.get("okvqa_stem") is True,
        **{name: value for name in ("lvlm", "order") if isinstance(value := found.get(name), str)},
    }


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
    considered: list[tuple[int, float]]


def samples_file(folder: Path, method: str, shots: int) -> Path:
    """Return where the samples of a method are. Raises LeverError for a method whose name is no file's."""
    name = f"samples_{method}_{shots}shot.jsonl"
    if Path(name).name != name or "\0" in name:
        raise LeverError(f"{folder / _METRICS} names a method {shown(method)}: run `lever infer` again")
    return folder / name


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
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise OSError(errno.EINVAL, "it is no regular file")
        samples = [_sample(line, path) for line in lines(path, LINE_LIMIT) if line.text.strip()]
    except OSError as error:
        raise LeverError(f"cannot read {path}: {error.strerror or error}; run `lever infer` again") from error
    return {sample.question_id: sample for sample in samples}


def _sample(line: Line, path: Path) -> Sample:
    try:
        row = loads(line.text)
        considered = [(place, share) for place, share in row.get("considered", [])]
        names = ("question_id", "answer", "accuracy", "references", "icds")
        sample = Sample(*(row[name] for name in names), row.get("probabilities", []), considered)
        if not _is_sound(sample):
            raise TypeError("a part of another type")
        return sample
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LeverError(
            f"{path}, line {line.number}: no prediction of `lever infer` ({shown(str(error))}); run `lever infer` again"
        ) from error


def _is_sound(sample: Sample) -> bool:
    ids = [sample.question_id, *sample.icds, *(place for place, _ in sample.considered)]
    shares = [*sample.probabilities, *(share for _, share in sample.considered)]
    return (
        all(isinstance(part, list) for part in (sample.references, sample.icds, sample.probabilities))
        and all(type(number) is int for number in ids)
        and all(isinstance(text, str) for text in (sample.answer, *sample.references))
        and is_finite(sample.accuracy)
        and all(is_finite(share) and 0 <= share <= 1 for share in shares)
        and len(sample.probabilities) in (0, len(sample.icds))
    )
