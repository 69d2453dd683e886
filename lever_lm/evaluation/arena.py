"""`lever infer --against`: selectors in one table, on the same queries, with what each of them costs.

A selector is a name of `selectors.SELECTORS`. A learnt one has a run of its own, beside the run that the options name,
made by `lever train --selector NAME`; `rce` and `grpo` are phases of that run.
"""

import contextlib
import difflib
import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lever_lm.config.load import layers
from lever_lm.config.schema import Config, to_dict
from lever_lm.config.values import configs_root
from lever_lm.data.pools import pool_bound
from lever_lm.evaluation.evaluate import Evaluation, Outcome
from lever_lm.evaluation.statistics import holm, paired_test
from lever_lm.selectors import ANY_POLICY, FROM_FILE, SELECTORS, SIMPLE, ZERO_SHOT
from lever_lm.selectors.pointer.checkpoint import own_config, read_checkpoint
from lever_lm.selectors.pointer.hub_format import SETTING
from lever_lm.training.find_checkpoint import find_checkpoint
from lever_lm.training.metrics import PHASES, STRATEGIES, recommended_by, table_of
from lever_lm.training.pipeline import Pipeline
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.select_checkpoint import best_row
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.terminal import shown

ALL = "all"
_NAMED = ("dataset", "lvlm")  # kinds of YAMLs by whose names a config is told
_SAID_BY_TABLE = [("data", key) for key in ("name", "file", "val_file", "task")]  # --data, --val and --task
_OF_RIVAL = [*SETTING, ("rollout", "pool_size")]  # keys that a run beside another one shares with it


@dataclass(frozen=True)
class Cost:
    """What the choices of a method took: LVLM calls to train it and for the choice of one query, seconds of choosing,
    and from where it chose. train_calls: None where it is not known."""

    method: str
    train_calls: int | None
    query_calls: int
    seconds: float
    chooses_from: str


def parse_names(text: str) -> list[str]:
    """Return the selectors of `--against NAME,NAME` in the order of the table; `all` is every one. Raises UsageError
    with the nearest name for one that there is not."""
    known = [name for name in SELECTORS if name not in (ANY_POLICY, FROM_FILE)]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in (*known, ALL):
            nearest = difflib.get_close_matches(name[:100], known, n=1)
            meant = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise UsageError(f"unknown selector {shown(name)}{meant}: all, or some of {', '.join(known)} (--against)")
    if not names:
        raise UsageError(f"--against takes names of selectors, or all: {', '.join(known)}")
    return [name for name in known if name in names or ALL in names]


def timed(choose: Callable[[], list]) -> tuple[list, float]:
    """Return what a function makes, and the seconds that it took."""
    began = time.perf_counter()
    made = choose()
    return made, time.perf_counter() - began


# warmup → the selector that it makes
WARMUPS = {"match": "answer_match", "epr": "epr", "lever_lm": "lever_lm", "fixed_set": "fixed_set"}


def method_of(checkpoint: Path) -> str:
    """Return the selector that a checkpoint is: by its phase, and of a warm-up by what that learnt from."""
    own = own_config(read_checkpoint(checkpoint))
    if isinstance(own.get("policy"), dict) and "vocabulary" in own["policy"]:  # also in an exported folder
        return "lever_lm" if "d_model" in own["policy"] else "fixed_set"
    phase = next((phase for phase in PHASES if checkpoint.stem.startswith(phase)), ANY_POLICY)
    return made_by(own.get("warmup")) if phase == "rce" else phase


def made_by(warmup) -> str:
    """Return the selector that a warm-up makes, as a checkpoint or a row names it: that of its last loss."""
    return WARMUPS.get(warmup.split("+")[-1], "rce") if isinstance(warmup, str) else "rce"


def checkpoint_of(run: RunFolder, name: str) -> Path | None:
    """Return the checkpoint of a learnt selector: of `grpo`, and of the warm-up of the run if it is this one, the best
    of that phase as it is recommended; of another one that of its own run; None where there is none. A run of its own
    is called after the selector, or after the run and the selector."""
    phase = name if name in PHASES else "rce"
    rows = [row for row in run.rows() if row["phase"] == phase]
    rows = [row for row in rows if table_of(row) == table_of(rows[-1])]
    row = best_row(rows, STRATEGIES[recommended_by(rows)])
    path = run.checkpoint(phase, row["epoch"]) if row else None
    if path and path.is_file() and method_of(path) == name:
        return path
    if name in PHASES:
        return None
    for folder in (f"{run.path.name}_{name}", name):
        with contextlib.suppress(LeverError):
            return find_checkpoint(RunFolder(run.path.with_name(folder)), None, {})[0]
    return None


def missing(pipeline: Pipeline, name: str) -> str:
    """Return that a learnt selector has no run, and the command that makes it."""
    run = pipeline.run.path
    if name in PHASES:
        return f"{name}, of which {run} has no epoch: --run-name NAME of a run that `lever train` made with it"
    return f"{name}, which has no run beside {run}: `{training_command(pipeline, name)}`"


def training_command(pipeline: Pipeline, name: str) -> str:
    """Return the command that trains a learnt selector beside a run, on the same data, features, pools and LVLM: the
    named YAMLs that are nearest to the config, and what of it they do not say."""
    here, run = to_dict(pipeline.config), pipeline.run.path
    table = here["data"]["file"]
    task = here["data"]["task"] if table else None

    def others(dataset: str, lvlm: str) -> list[tuple[str, str]]:
        """Return the keys that the YAMLs of these names do not say as the config does."""
        names = {"dataset": dataset, "lvlm": lvlm, "task": task, "selector": name}
        made = to_dict(layers(names, None, [], {}).config())
        found = [key for key in _OF_RIVAL if made[key[0]][key[1]] != here[key[0]][key[1]]]
        return [key for key in found if not (table and key in _SAID_BY_TABLE)]

    datasets, lvlms = (sorted(file.stem for file in (configs_root() / kind).glob("*.yaml")) for kind in _NAMED)
    dataset = "digits" if table else min(datasets, key=lambda dataset: len(others(dataset, lvlms[0])))
    lvlm = min(lvlms, key=lambda lvlm: len(others(dataset, lvlm)))
    data = ["--data", table, "--task", here["data"]["task"]] if table else ["--dataset", dataset]
    data += ["--val", here["data"]["val_file"]] if here["data"]["val_file"] else []
    words = ["lever", "train", "--selector", name, *data, "--lvlm", lvlm]
    words += [
        f"--set={'.'.join(key)}={json.dumps(here[key[0]][key[1]], ensure_ascii=False)}" for key in others(dataset, lvlm)
    ]
    for option, value, default in (
        ("--server", here["lvlm"]["server"], ""),
        ("--seed", str(here["seed"]), "0"),
        ("--results", str(pipeline.layout.dataset.parent), "results"),
        ("--run-dir", str(run.with_name(name)), str(pipeline.layout.run.with_name(name))),
    ):
        words += [option, value] if value != default else []
    return shlex.join(words)


def check_runs(pipeline: Pipeline, names: Sequence[str]) -> None:
    """Raise LeverError where a learnt selector has no run, with the command that makes it."""
    for name in names:
        if SELECTORS[name].select is None and checkpoint_of(pipeline.run, name) is None:
            raise LeverError(f"--against {missing(pipeline, name)}")


def check_shots(config: Config, shots: Sequence[int], names: Sequence[str]) -> None:
    """Raise UsageError for more shots than a pool holds, where one of these selectors chooses from pools."""
    size, most = pool_bound(config.infer.pool_size), max(shots)
    pooled = [name for name in dict.fromkeys(names) if SELECTORS[name].pool]
    if pooled and most > size:
        raise UsageError(
            f"--shots {most} exceeds the {size:,} candidates of infer.pool_size {config.infer.pool_size}, from which "
            f"{', '.join(pooled)} would choose: lower --shots, raise infer.pool_size, or leave out what chooses from "
            "pools"
        )


def chooses_from(name: str, evaluation: Evaluation) -> str:
    """Return from what a selector chooses."""
    if name == ZERO_SHOT:
        return "nothing"
    size, total = evaluation.config.infer.pool_size, len(evaluation.data.train_examples)
    if not SELECTORS[name].pool:
        return f"all {total:,}"
    return f"pools of {size:,}" if size else f"the nearest {min(pool_bound(size), total):,}"


def cost_of(name: str, checkpoint: Path, seconds: float, evaluation: Evaluation) -> Cost:
    """Return the cost of the choices that a checkpoint made."""
    calls = own_config(read_checkpoint(checkpoint)).get("lvlm_calls")
    known = calls if isinstance(calls, int) and not isinstance(calls, bool) else None
    return Cost(name, known, 0, seconds, chooses_from(name, evaluation))


def arena_rows(outcomes: Sequence[Outcome], costs: Sequence[Cost]) -> list[dict]:
    """Return the table: for each method and number of shots its costs, its accuracy, and the paired test against the
    best simple selector at the same number of shots, with Holm's adjustment over all tests of the table; sorted by
    accuracy at the most shots, the best first.

    The best simple selector is the best on these very queries, which favours it. It has no test of its own.
    """
    of = {cost.method: cost for cost in costs}
    rows = []
    for one in outcomes:
        rivals = [other for other in outcomes if other.method in SIMPLE and other.shots == one.shots]
        best = max(rivals, key=lambda other: sum(other.scores), default=None)
        summary = one.summary()
        row = {**vars(of[one.method]), **{key: summary[key] for key in ("shots", "accuracy", "ci", "n")}}
        if best is not None and best.method != one.method:
            row |= {"against": best.method, **paired_test(one.scores, best.scores)}
        rows.append(row)
    tested = [row for row in rows if "p" in row]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    most = {row["method"]: row["accuracy"] for row in sorted(rows, key=lambda row: row["shots"])}
    return sorted(rows, key=lambda row: (-most[row["method"]], row["method"], row["shots"]))
