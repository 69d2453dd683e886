"""What `lever infer` left in a folder, read back: results, paired tests, and the sample of every query."""

import errno
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lever_lm.evaluation.evaluate import is_result, is_test
from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_parse import LINE_LIMIT, Line, lines, loads, read_json, read_object
from lever_lm.utils.terminal import shown

LARGEST = 1e300  # of what is drawn: differences stay finite
_MOST = 2000  # results of an evaluation, and tests: ours have some ten methods at some ten numbers of shots


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


def is_finite(value) -> bool:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def read_metrics(path: Path) -> dict:
    """results, tests and checkpoint of a metrics.json, okvqa_stem, and policies, method → digest; where they are known
    also lvlm and order (of the prompt). Raises LeverError where it is none."""
    mend = "run `lever infer --baselines` or `lever demo` first"
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise LeverError(f"no results to report in {path.parent}: {mend}") from error
    found = found if isinstance(found, dict) else {}
    results, tests, checkpoint = found.get("results"), found.get("tests", []), found.get("checkpoint", "")
    sound = isinstance(results, list) and isinstance(tests, list) and all(map(is_result, results))
    if not (sound and results and all(map(is_test, tests)) and isinstance(checkpoint, str)):
        raise LeverError(f"{path} holds no results of `lever infer`: {mend}")
    if max(len(results), len(tests)) > _MOST:
        raise LeverError(f"{path} holds {len(results):,} results and {len(tests):,} tests, more than {_MOST:,}: {mend}")
    known = {name: value for name in ("lvlm", "order") if isinstance(value := found.get(name), str)}
    policies = found.get("policies")
    known |= {"policies": policies if isinstance(policies, dict) else {}, "okvqa_stem": found.get("okvqa_stem") is True}
    return {"results": results, "tests": tests, "checkpoint": checkpoint, **known}


def last_evaluation(folder: Path) -> Path | None:
    """Return the first of the `evaluations` in a run's inference folder, or None where there is none."""
    return next(iter(evaluations(folder)), None)


def evaluations(folder: Path, *, own: bool = True) -> list[Path]:
    """Return the evaluations in a run's inference folder that were made under the setting in which the run was trained;
    or where not `own`, the others. Those with random demonstrations to compare with come first, then the newest."""
    found = [one for one in (folder, *folder.glob("*/")) if (one / "metrics.json").is_file()]
    found = [one for one in found if _is_own(one) == own]
    return sorted(found, key=_rank, reverse=True)


def _rank(folder: Path) -> tuple[bool, float]:
    return any(folder.glob("samples_random_*.jsonl")), (folder / "metrics.json").stat().st_mtime


def _is_own(folder: Path) -> bool:
    """Return whether an evaluation's metrics.json says that nothing was changed. What cannot be read is left to
    `read_metrics` to refuse."""
    found = read_object(folder / "metrics.json")
    return not found or found.get("changed") == {}


def samples_file(folder: Path, method: str, shots: int) -> Path:
    """Where the samples of a method are. Raises LeverError for a method whose name is no file's."""
    name = f"samples_{method}_{shots}shot.jsonl"
    if Path(name).name != name or "\0" in name:
        raise LeverError(f"{folder / 'metrics.json'} names a method {shown(method)}: run `lever infer` again")
    return folder / name


def read_samples(path: Path) -> dict[int, Sample]:
    """The samples in a file by question id, in its order. Raises LeverError naming the line that holds none."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise OSError(errno.EINVAL, "it is no regular file")
        return {sample.question_id: sample for sample in _samples(path)}
    except OSError as error:
        raise LeverError(f"cannot read {path}: {error.strerror or error}; run `lever infer` again") from error


def _samples(path: Path) -> Iterator[Sample]:
    for line in lines(path, LINE_LIMIT):
        if line.text.strip():
            yield _sample(line, path)


def _sample(line: Line, path: Path) -> Sample:
    try:
        row = loads(line.text)
        considered = [(place, share) for place, share in row.get("considered", [])]
        sample = Sample(
            *(row[name] for name in ("question_id", "answer", "accuracy", "references", "icds")),
            row.get("probabilities", []),
            considered,
        )
        _check(sample)
        return sample
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LeverError(
            f"{path}, line {line.number}: no prediction of `lever infer` ({shown(str(error))}); run `lever infer` again"
        ) from error


def _check(sample: Sample) -> None:
    """Raise TypeError where a part is of another type."""
    ids = [sample.question_id, *sample.icds, *(place for place, _ in sample.considered)]
    shares = [*sample.probabilities, *(share for _, share in sample.considered)]
    texts = [sample.answer, *sample.references]
    sound = (
        isinstance(sample.references, list)
        and isinstance(sample.icds, list)
        and isinstance(sample.probabilities, list)
        and all(type(number) is int for number in ids)
        and all(isinstance(text, str) for text in texts)
        and is_finite(sample.accuracy)
        and all(is_finite(share) and 0 <= share <= 1 for share in shares)
        and len(sample.probabilities) in (0, len(sample.icds))
    )
    if not sound:
        raise TypeError("a part of another type")
