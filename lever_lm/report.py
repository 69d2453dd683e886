"""A run folder and its evaluation → one self-contained HTML page: results, training curves, chosen demonstrations."""

import base64
from html import escape
from io import BytesIO
from itertools import islice
from pathlib import Path

from lever_lm.data import Example, Image, VqaData, open_image
from lever_lm.errors import LeverError
from lever_lm.files import write_text
from lever_lm.inference import is_result
from lever_lm.runs import RunFolder
from lever_lm.selection import read_history
from lever_lm.untrusted import CONFIG_LIMIT, LINE_LIMIT, Line, lines, loads, printable, read_bytes, read_json, shown

CURVES = ("train_loss", "val_loss", "val_reward", "ppo_loss", "kl", "adv_std")
GALLERY = 12
_THUMBNAIL = 320
_WIDTH, _HEIGHT = 320, 120
_LARGEST = 1e300  # of what is drawn: differences stay finite


def write_report(run: RunFolder, inference: Path, data: VqaData) -> Path:
    """Write `report.html` into the run folder and return its path. `inference` is a folder that Evaluation.write
    filled, over `data`. Raises LeverError when nothing was evaluated."""
    import jinja2

    metrics, rows = _metrics(inference / "metrics.json"), run.rows()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lever_lm"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        run=printable(run.path.name),
        results=[_shown(row) for row in metrics["results"]],
        tests=[_shown(row) for row in metrics["tests"]],
        checkpoint=printable(metrics["checkpoint"]),
        curves=_curves(rows),
        gallery=_gallery(inference, metrics["results"], data),
        config=_config(run.config),
        source=printable(read_history(run, None).source),
    )
    write_text(run.report, page)
    return run.report


def _metrics(path: Path) -> dict:
    """Results, tests and checkpoint of a metrics.json. Raises LeverError where it is none."""
    mend = "run `lever infer --baselines` or `lever demo` first"
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise LeverError(f"no results to report in {path.parent}: {mend}") from error
    found = found if isinstance(found, dict) else {}
    results, tests, checkpoint = found.get("results"), found.get("tests", []), found.get("checkpoint", "")
    sound = isinstance(results, list) and isinstance(tests, list) and all(map(is_result, results))
    if not (sound and results and all(map(_is_test, tests)) and isinstance(checkpoint, str)):
        raise LeverError(f"{path} holds no results of `lever infer`: {mend}")
    return {"results": results, "tests": tests, "checkpoint": checkpoint}


def _is_test(row) -> bool:
    kinds = {
        "method": str,
        "against": str,
        "shots": int,
        **dict.fromkeys(("difference", "low", "high", "p"), (int, float)),
    }
    return isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in kinds.items())


def _config(path: Path) -> str:
    """The text of a run's config.yaml; nothing where it cannot be shown."""
    try:
        return printable(read_bytes(path, CONFIG_LIMIT).decode("utf-8", "replace"))
    except (OSError, ValueError):
        return ""


def _curves(rows: list[dict]) -> list[dict]:
    """One inline SVG per metric and phase that was logged."""
    curves = []
    for phase in ("rce", "grpo"):
        for name in CURVES:
            points = [(row["epoch"], row[name]) for row in rows if row["phase"] == phase and _is_finite(row.get(name))]
            if len(points) > 1:
                curves.append({"phase": phase, "name": name, "svg": _svg(points, f"{phase} {name}")})
    return curves


def _is_finite(value) -> bool:
    return isinstance(value, (int, float)) and abs(value) < _LARGEST


def _svg(points: list[tuple[int, float]], label: str) -> str:
    low, high = min(value for _, value in points), max(value for _, value in points)
    span, last = (high - low) or 1.0, points[-1][0]
    first = points[0][0]
    places = " ".join(
        f"{8 + (epoch - first) / max(last - first, 1) * (_WIDTH - 16):.1f},"
        f"{_HEIGHT - 8 - (value - low) / span * (_HEIGHT - 16):.1f}"
        for epoch, value in points
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}: '
        f'{points[0][1]:.4g} to {points[-1][1]:.4g}"><polyline points="{places}"/></svg>'
        f"<p>{points[0][1]:.4g} → {points[-1][1]:.4g}</p>"
    )


def _gallery(inference: Path, results: list[dict], data: VqaData) -> list[dict]:
    """Some evaluation queries with the ICDs that the policy chose, in pick order, and what the LVLM made of them."""
    learned = [result for result in results if result["method"] in ("grpo", "rce", "policy", "icds")]
    if not learned:
        return []
    shown = max(learned, key=lambda result: (result["method"] == "grpo", result["shots"]))
    samples = inference / f"samples_{shown['method']}_{shown['shots']}shot.jsonl"
    train = {example.question_id: example for example in data.train_examples}
    val = {example.question_id: example for example in data.val_examples}
    try:
        step = max(1, sum(bool(line.text.strip()) for line in lines(samples, LINE_LIMIT)) // GALLERY)
        filled = (line for line in lines(samples, LINE_LIMIT) if line.text.strip())
        return [_sample(line, samples, train, val) for line in islice(filled, 0, step * GALLERY, step)]
    except OSError as error:
        raise LeverError(f"cannot read {samples}: {error.strerror or error}; run `lever infer` again") from error


def _sample(line: Line, path: Path, train: dict[int, Example], val: dict[int, Example]) -> dict:
    """One row of a samples file over this data. Raises LeverError where it is none."""
    try:
        row = loads(line.text)
        texts, accuracy = [row["answer"], *row["references"]], row["accuracy"]
        if not all(isinstance(text, str) for text in texts) or not _is_finite(accuracy):
            raise TypeError("an answer or an accuracy of another type")
        query, icds = val[row["question_id"]], [train[question_id] for question_id in row["icds"]]
    except (ValueError, KeyError, TypeError) as error:
        raise LeverError(
            f"{path}, line {line.number}: no prediction of `lever infer` on these data ({shown(str(error))})"
        ) from error
    return {
        "query": _card(query),
        "icds": [_card(example) for example in icds],
        "prediction": printable(row["answer"]),
        "references": sorted({printable(text) for text in row["references"]}),
        "accuracy": accuracy,
    }


def _shown(row: dict) -> dict:
    return {key: printable(value) if isinstance(value, str) else value for key, value in row.items()}


def _card(example: Example) -> dict:
    question, answer = printable(example.question), printable(example.answer)
    return {"image": image_data_url(example.image), "question": question, "answer": answer}


def image_data_url(image: Image) -> str:
    """An image as the data URL of a JPEG, not larger than it is shown."""
    picture, file = open_image(image), BytesIO()
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    picture.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
