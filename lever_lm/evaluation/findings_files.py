"""What `lever infer --against` and `lever diagnose` leave in the folder of an evaluation, read."""

import os
from pathlib import Path

from lever_lm.evaluation.results import METRICS_FILE, MOST, fits, is_method, is_share
from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_parse import read_object

DIAGNOSIS = "diagnosis.json"


def _is_score(value) -> bool:
    """Return whether a value can be an accuracy or a difference of two: a score of a caption may be above 1."""
    return type(value) in (int, float) and abs(value) <= 1e3


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 1e15


def _is_known(value) -> bool:
    return value is None or _is_count(value)


def _is_seconds(value) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e15


_PAIRED = {**dict.fromkeys(("difference", "low", "high"), _is_score), "p": is_share}
_CONTENDER = {"method": is_method, "train_calls": _is_known, "query_calls": _is_count, "seconds": _is_seconds}
_CONTENDER |= {"chooses_from": str, "shots": _is_count, "n": _is_count, "accuracy": _is_score}
_CONTENDER |= {"ci": (_is_score, _is_score)}
_TESTED = {"against": str, **_PAIRED, "p_holm": is_share}
_FINDING = {"key": str, "label": str, "value": _is_score, "says": str}
_DIAGNOSIS = {"n": _is_count, "shots": _is_count, "checkpoint": str, "policies": dict, "methods": dict}


def own_folder(folder: Path, metrics: dict) -> Path:
    """Return where the checkpoint that was evaluated in a folder has its own evaluations, where that is another: the
    demo's results lie one above."""
    return folder / Path(metrics["checkpoint"]).stem


def read_arena(folder: Path, metrics: dict) -> list[dict]:
    """Return the rows of `lever infer --against` in what read_metrics returned of a folder, [] where there are none.
    Raises LeverError where they are none of ours, or some are of the same method and shots."""
    rows = metrics.get("arena", [])
    sound = fits(rows, [lambda row: fits(row, _CONTENDER) and ("against" not in row or fits(row, _TESTED))])
    if not (sound and _are_few([(row["method"], row["shots"]) for row in rows])):
        raise LeverError(
            f"{folder / METRICS_FILE}: its `arena` is no table of `lever infer --against`: run `lever infer "
            "--against all` again"
        )
    return rows


def read_diagnosis(folder: Path, metrics: dict) -> dict | None:
    """Return what `lever diagnose` found of the checkpoint that was evaluated in a folder: n, shots, checkpoint,
    policies and methods (name → rows); None where it was not asked. Raises LeverError where a part is none of ours."""
    folders = (folder, own_folder(folder, metrics))
    path = next((one / DIAGNOSIS for one in folders if os.path.exists(one / DIAGNOSIS)), None)
    if path is None:
        return None
    found = {"policies": {}} | read_object(path)
    methods = found["methods"] if fits(found, _DIAGNOSIS) else {}
    sound = methods and fits([*methods.values()], [lambda rows: rows and fits(rows, [_is_finding])])
    if not (sound and _are_few([(method, row["key"]) for method, rows in methods.items() for row in rows])):
        raise LeverError(f"{path} is no diagnosis of `lever diagnose`: run `lever diagnose` again, or delete the file")
    return found


def _is_finding(row) -> bool:
    optional = {"interval": (_is_score, _is_score), "test": _PAIRED}
    return fits(row, _FINDING) and all(name not in row or fits(row[name], kind) for name, kind in optional.items())


def _are_few(cells: list[tuple]) -> bool:
    """Return whether the cells of a table are each there once, and the table is as large as ours can be."""
    rows, columns = (len(set(names)) for names in zip(*cells, strict=True)) if cells else (0, 0)
    return len(set(cells)) == len(cells) and rows * columns <= MOST
