"""The model card of a policy: README.md with the hub's metadata. What comes from files is text, no markup."""

import re

import yaml

from lever_lm.config.schema import Config
from lever_lm.evaluation.templates import render
from lever_lm.selectors import CONTRASTS, ZERO_SHOT
from lever_lm.utils.hub import is_hub_id
from lever_lm.utils.paths import HUB_PREFIX
from lever_lm.utils.terminal import one_line

TAGS = ("in-context-learning", "demonstration-selection", "visual-question-answering", "vision-language-model")
_MARKUP = re.compile(r"([\\`*_\[\]<>|~&#!$])")
_NORMALIZED = "normalized_accuracy"  # a score that results of 0.1 do not hold
# Licenses that are certain; of other datasets their own pages tell.
_DATA_LICENSES = {
    "asset:digits": "CC BY 4.0, derived from *Optical Recognition of Handwritten Digits* (E. Alpaydin and C. Kaynak, "
    "1998, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49), CC BY 4.0"
}


def model_card(
    name: str, license_: str, config: Config | None, shared: dict, evaluated: dict | None, *, known: bool
) -> str:
    """Return the text of README.md.

    name: of the folder. config: of the run, None where it is not known. shared: the content of config.json. evaluated:
    results (rows of a metrics.json), tests, and the method that is this policy; None where it was not evaluated.
    known: whether dataset and encoder are those of the config; else rollouts and features were the maker's own.
    """
    front = _front_matter(name, license_, config, shared, evaluated, known)
    values = {"name": name, "config": config, "shared": shared, "known": known, "evaluated": evaluated}
    text = render(
        "model_card.md.j2",
        {"md": markdown},
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000),
        license=license_,
        lvlm=shared["setting"]["lvlm"]["path"] if config else "",
        table=_table(evaluated) if evaluated else [],
        tests=_tests(evaluated) if evaluated else [],
        data_license=_DATA_LICENSES.get(config.data.okvqa_path, "see the dataset's own terms") if config else "",
        **values,
    )
    return text.rstrip() + "\n"


def markdown(value) -> str:
    """Return a value as text in Markdown, on one line."""
    return _MARKUP.sub(r"\\\1", one_line(str(value)))


def _front_matter(name: str, license_: str, config: Config, shared: dict, evaluated: dict | None, known: bool) -> dict:
    front: dict = {"license": license_, "library_name": "lever_lm", "tags": list(TAGS)}
    if not known:
        return front
    setting = shared["setting"]  # without paths of this machine
    if bases := [path for path in (setting["features"]["encoder"], setting["lvlm"]["path"]) if is_hub_id(path)]:
        front["base_model"] = bases
    # Hub ids where the data came from the hub, else the dataset's name.
    paths = (config.data.train_path, config.data.okvqa_path)
    front["datasets"] = [p.removeprefix(HUB_PREFIX) for p in paths if p.startswith(HUB_PREFIX)] or [config.data.name]
    if evaluated:
        indexed = {
            "task": {"type": "visual-question-answering", "name": "Visual question answering"},
            "dataset": {"type": front["datasets"][-1], "name": config.data.name, "split": "validation"},
            "metrics": [
                {"type": "accuracy", "name": f"VQA accuracy, {_shots(r['shots'])}", "value": round(r["accuracy"], 4)}
                for r in shared["results"]
            ],
        }
        front["metrics"] = ["accuracy"]
        front["model-index"] = [{"name": name, "results": [indexed]}]
    return front


def _shots(count: int) -> str:
    return f"{count} shot{'s' * (count != 1)}"


def _table(evaluated: dict) -> list[list[str]]:
    """Return methods down, numbers of shots across: rows of cells, the first is the heading; the last has the accuracy
    of this policy with answers always normalised, where the results hold it."""
    rows, ours = evaluated["results"], evaluated["method"]
    shots = sorted({row["shots"] for row in rows if row["shots"]})
    cells = {(r["method"], r["shots"]): f"{r['accuracy']:.3f} [{r['ci'][0]:.3f}, {r['ci'][1]:.3f}]" for r in rows}
    called = {m: f"**{markdown(m)}, this policy**" if m == ours else markdown(m) for m, _ in cells}
    always = {row["shots"]: row[_NORMALIZED] for row in rows if row["method"] == ours and _NORMALIZED in row}
    normalized = [f"{always[k]:.3f}" if k in always else "" for k in shots]
    return [
        ["method", *map(_shots, shots)],
        *([name, *(cells.get((m, k), cells.get((m, 0), "")) for k in shots)] for m, name in called.items()),
        *([[f"{called[ours]}, answers always normalised", *normalized]] if any(normalized) else []),
    ]


def _tests(evaluated: dict) -> list[dict]:
    """Return the paired tests of this policy at its largest number of shots, against what a reader compares with."""
    ours = [test for test in evaluated["tests"] if test["method"] == evaluated["method"]]
    most = max((test["shots"] for test in ours), default=0)
    return [test for test in ours if test["shots"] == most and test["against"] in (ZERO_SHOT, *CONTRASTS)]
