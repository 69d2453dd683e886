"""A run folder and its evaluation → one self-contained HTML page: results, training curves, chosen demonstrations."""

import base64
import json
from html import escape
from io import BytesIO
from pathlib import Path

from lever_lm.data import Example, Image, VqaData, open_image
from lever_lm.errors import LeverError
from lever_lm.runs import RunFolder, write_text
from lever_lm.selection import read_history

CURVES = ("train_loss", "val_loss", "val_reward", "ppo_loss", "kl", "adv_std")
GALLERY = 12
_THUMBNAIL = 320
_WIDTH, _HEIGHT = 320, 120


def write_report(run: RunFolder, inference: Path, data: VqaData) -> Path:
    """Write `report.html` into the run folder and return its path. `inference` is a folder that Evaluation.write
    filled, over `data`. Raises LeverError when nothing was evaluated."""
    import jinja2

    metrics_path = inference / "metrics.json"
    try:
        metrics = json.loads(metrics_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LeverError(
            f"no results to report in {inference}: run `lever infer --baselines` or `lever demo` first"
        ) from error
    rows = run.rows()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lever_lm"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        run=run.path.name,
        results=metrics["results"],
        tests=metrics.get("tests", []),
        checkpoint=metrics.get("checkpoint", ""),
        curves=_curves(rows),
        gallery=_gallery(inference, metrics["results"], data),
        config=run.config.read_text(encoding="utf-8") if run.config.is_file() else "",
        source=read_history(run, None).source,
    )
    write_text(run.report, page)
    return run.report


def _curves(rows: list[dict]) -> list[dict]:
    """One inline SVG per metric and phase that was logged."""
    curves = []
    for phase in ("rce", "grpo"):
        for name in CURVES:
            points = [(row["epoch"], row[name]) for row in rows if row["phase"] == phase and name in row]
            if len(points) > 1:
                curves.append({"phase": phase, "name": name, "svg": _svg(points, f"{phase} {name}")})
    return curves


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
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    step = max(1, len(rows) // GALLERY)
    return [
        {
            "query": _card(val[row["question_id"]]),
            "icds": [_card(train[question_id]) for question_id in row["icds"]],
            "prediction": row["answer"],
            "references": sorted(set(row["references"])),
            "accuracy": row["accuracy"],
        }
        for row in rows[::step][:GALLERY]
    ]


def _card(example: Example) -> dict:
    return {"image": image_data_url(example.image), "question": example.question, "answer": example.answer}


def image_data_url(image: Image) -> str:
    """An image as the data URL of a JPEG, not larger than it is shown."""
    picture, file = open_image(image), BytesIO()
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    picture.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
