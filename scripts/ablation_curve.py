"""Accuracy against LVLM calls: the same training on fewer queries, smaller groups, and with a probe; ablate.py --curve.

Every number is a mean over seeds; a difference is taken seed by seed, with Student's 95 % interval over the seeds.
Calls are the different prompts that were put to the LVLM to train, validation queries among them, those of online
rounds too. The largest rollout file of a seed is asked once: smaller settings are part of it, the queries that `lever
rollout --limit` would take, and of each group so many rollouts, evenly apart in the file's order, which is by kind, so
that beams, similarity, samples and random sequences keep their shares. A probe is what rollout.probe does. GRPO is its
epoch of the largest val_reward.
"""

import json
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from ablation_report import interval

from lever_lm.config.schema import Config, to_dict
from lever_lm.config.values import build, dotted, merge, named_yaml, parse_set
from lever_lm.evaluation.evaluate import Evaluation
from lever_lm.lvlm import CachedLvlm, Prompt, build_prompt
from lever_lm.selectors.learned import choose
from lever_lm.training.find_checkpoint import load_for
from lever_lm.training.pipeline import Pipeline
from lever_lm.training.rollouts.file_format import is_query, read_rollouts
from lever_lm.training.rollouts.generate import tied
from lever_lm.training.rollouts.propose import evenly, query_rows
from lever_lm.utils.atomic_io import write_json
from lever_lm.utils.console import Screen
from lever_lm.utils.errors import UsageError
from lever_lm.utils.fingerprint import fingerprint

# A training → the config keys that make it. Each is judged after its warm-up and after GRPO.
TRAININGS = {
    "rce": {"warmup": "rce"},
    "match": {"warmup": "match"},
    "online": {"warmup": "rce", "grpo.online": True, "grpo.online_samples": 4, "grpo.online_every": 10},
}
# A curve → its training, and the phase that it is judged after.
CURVES = {
    "RCE": ("rce", "rce"),
    "RCE → GRPO": ("rce", "grpo"),
    "match → GRPO": ("match", "grpo"),
    "RCE → GRPO, online": ("online", "grpo"),
}
# What the digits asked in 0.1, which at inference looked at the pools of the rollouts: the difference is against this.
REFERENCE = ("RCE → GRPO", 600, 15, 0)
SHOTS = [1, 2]
WITHIN = 0.01  # of the reference's accuracy at 1 shot: what counts as the same


@dataclass(frozen=True, order=True)
class Cell:
    """One training: so many queries with groups of so many rollouts, `probe` of them asked first."""

    queries: int
    group: int
    probe: int
    training: str
    seed: int

    def file(self, folder: Path) -> Path:
        """Return the file that the outcome is kept in."""
        return folder / f"{self.seed}_{self.training}_{self.queries}_{self.group}_{self.probe}.json"


# ---------------------------------------------------------------------- what is asked


def add_options(parser: ArgumentParser) -> None:
    """Add the options of --curve."""
    parser.add_argument("--curve", action="store_true", help="accuracy against LVLM calls, in place of the rows")
    parser.add_argument("--queries", type=int, nargs="+", default=[75, 150, 300, 600, 1200], help="of --curve")
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 8, 15], help="of --curve: rollouts of a query")
    parser.add_argument("--probe", type=int, nargs="+", default=[0, 3], help="of --curve: rollout.probe, below a group")
    parser.add_argument("--training", choices=TRAININGS, action="append", help="of --curve: this one only")
    parser.add_argument("--dataset", default="digits", help="of --curve: configs/dataset/NAME.yaml")
    parser.add_argument("--lvlm", default="tiny_qwen2.5_vl", help="of --curve: configs/lvlm/NAME.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of --curve: a config key")


def cells_of(arguments: Namespace) -> list[Cell]:
    """Return the trainings that the options name, the longest first: none is what the others wait for at the end."""
    settings = [
        Cell(queries, group, probe, training, seed)
        for seed in range(arguments.seeds)
        for queries in arguments.queries
        for group in arguments.groups
        for probe in arguments.probe
        if probe < group
        for training in arguments.training or TRAININGS
    ]
    return sorted(settings, key=lambda cell: (cell.queries * cell.group, cell.training == "online"), reverse=True)


def config_of(arguments: Namespace, seed: int, training: dict) -> Config:
    """Return the config of a dataset and LVLM, with --set and the keys of a training over it."""
    values = merge(
        named_yaml("lvlm", arguments.lvlm), named_yaml("dataset", arguments.dataset)
    )  # which may name its own
    changes = [*map(parse_set, arguments.set), *(dotted(key, value) for key, value in training.items())]
    rollouts = {"num_queries": max(arguments.queries), "probe": 0}
    return build({**reduce(merge, [*changes, {"rollout": rollouts}], values), "seed": seed, "device": "cpu"})


def subset(content: dict, rows: list[int], group: int, probe: int) -> dict:
    """Return the rollout file that these queries would have in groups of `group`, `probe` of them asked first. content:
    a rollout file that holds them all."""
    entries = {}
    for row in rows:
        entry = content[str(row)]
        rollouts = [entry["pointer_candidates"][place] for place in evenly(len(entry["pointer_candidates"]), group)]
        probed = [rollouts[place] for place in evenly(len(rollouts), probe or len(rollouts))]
        entries[str(row)] = {**entry, "pointer_candidates": probed if probe and tied(probed) else rollouts}
    return {"_meta": {"lvlm_calls": sum(len(e["pointer_candidates"]) for e in entries.values())}, **entries}


def counted(lvlm: CachedLvlm, seen: set[tuple]) -> Callable[[], int]:
    """Have an LVLM note in `seen` what it is asked. Returns the function that gives the number of different prompts."""
    generate = lvlm.generate

    def noted(prompts, what):
        seen.update(map(identity, prompts))
        return generate(prompts, what)

    lvlm.generate = noted
    return lambda: len(seen)


def identity(prompt: Prompt) -> tuple:
    """Return the query and the demonstrations of a prompt, in their order."""
    return prompt.query.question_id, *(icd.question_id for icd in prompt.icds)


# ---------------------------------------------------------------------- the runs


def prepare(arguments: Namespace, seed: int, work: Path) -> str:
    """Make the features and the largest rollout file of a seed, which all its cells start from."""
    torch.set_num_threads(1)  # one run a core
    pipeline = Pipeline(config_of(arguments, seed, {}), Screen(quiet=True), results=work / f"seed_{seed}")
    made = pipeline.rollouts()
    return f"seed {seed}: {made['groups']} groups, {made['tied']} tied"


def train(arguments: Namespace, cell: Cell, folder: Path, work: Path) -> str:
    """Train one cell unless its file is there, and answer the evaluation queries with its policies."""
    config = config_of(arguments, cell.seed, TRAININGS[cell.training])
    made_of = fingerprint(to_dict(config) | {"rollout": {**vars(config.rollout), "num_queries": 0}})
    path = cell.file(folder)
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8"))["made_of"] != made_of:
            raise UsageError(f"{path} is of another config: give this one a folder of its own with --results")
        return f"{path.stem}: there"
    torch.set_num_threads(1)
    # A copy: two processes in one answer cache wait for one another.
    here = work / path.stem
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(work / f"seed_{cell.seed}", here)
    pipeline = Pipeline(config, Screen(quiet=True), results=here, run_dir=here / "run")
    content = read_rollouts(pipeline.layout.rollouts)
    examples = pipeline.data.train_examples
    logged = subset(content, query_rows(cell.queries, len(examples), cell.seed), cell.group, cell.probe)
    write_json(here / "logged.json", logged, indent=None)
    groups = [(int(row), entry["pointer_candidates"]) for row, entry in logged.items() if is_query(row)]
    seen = {
        identity(build_prompt([examples[i] for i in rollout["pointer_global"]], examples[row], config.prompt))
        for row, group in groups
        for rollout in group
    }
    calls = counted(pipeline.lvlm, seen)
    pipeline.train(rl_data=here / "logged.json", dataset_named=True)
    found = {"calls": calls(), "untied": sum(not tied(group) for _, group in groups)}
    found["accuracy"] = accuracies(pipeline)
    write_json(path, {**vars(cell), "made_of": made_of, **found})
    shutil.rmtree(here, ignore_errors=True)
    return f"{path.stem}: {found['calls']} calls, {found['accuracy']}"


def accuracies(pipeline: Pipeline) -> dict[str, float]:
    """Return `phase@shots` → the accuracy of the warm-up's last policy and of GRPO's of the largest val_reward, each
    again as `0.1 phase@shots` from pools as large as those of the rollouts."""
    rows = pipeline.run.rows()
    grpo = [row for row in rows if row["phase"] == "grpo"]
    epochs = {"rce": len(rows) - len(grpo), "grpo": max(grpo, key=lambda row: row["val_reward"])["epoch"]}
    found = {}
    for before, pool in {"": pipeline.config.infer.pool_size, "0.1 ": pipeline.config.rollout.pool_size}.items():
        config = build(merge(to_dict(pipeline.config), {"infer": {"pool_size": pool}}))
        evaluation = Evaluation(config, pipeline.data, pipeline.features)
        choices = {}
        for phase, epoch in epochs.items():
            policy = load_for(pipeline.run.checkpoint(phase, epoch), config)
            choices[phase] = choose(policy, evaluation.problem, max(SHOTS))[0]
        for one in evaluation.run(choices, SHOTS, pipeline.lvlm):
            found[f"{before}{one.method}@{one.shots}"] = one.summary()["accuracy"]
    return found


def run(arguments: Namespace, pool: Executor) -> Path:
    """Make what is missing, then write the table and the figure. Returns the table's path."""
    folder = arguments.results / "ablation" / f"curve_{arguments.dataset}"
    work = folder / "work"
    cells = cells_of(arguments)
    if any(not cell.file(folder).is_file() for cell in cells):
        for job in as_completed([pool.submit(prepare, arguments, seed, work) for seed in range(arguments.seeds)]):
            print(job.result(), flush=True)
    for job in as_completed([pool.submit(train, arguments, cell, folder, work) for cell in cells]):
        print(job.result(), flush=True)
    return write(folder)


# ---------------------------------------------------------------------- table and figure


def load(folder: Path) -> dict[tuple[str, int, int, int], dict[int, dict]]:
    """Return (curve, queries, group, probe) → seed → {calls, untied, and accuracy and warm-up's, by shots}."""
    found: dict[tuple[str, int, int, int], dict[int, dict]] = {}
    for path in folder.glob("*.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        for curve, (training, phase) in CURVES.items():
            if run["training"] == training:
                point = {"calls": run["calls"], "untied": run["untied"]}
                point["accuracy"] = {k: run["accuracy"][f"{phase}@{k}"] for k in SHOTS}
                point["warmup"] = {k: run["accuracy"][f"rce@{k}"] for k in SHOTS}
                point["0.1"] = {k: run["accuracy"][f"0.1 {phase}@{k}"] for k in SHOTS}
                key = (curve, run["queries"], run["group"], run["probe"])
                found.setdefault(key, {})[run["seed"]] = point
    order = {curve: i for i, curve in enumerate(CURVES)}
    return {key: found[key] for key in sorted(found, key=lambda key: (order[key[0]], *key[1:]))}


def summary(points: dict) -> list[dict]:
    """Return for each setting its calls, untied groups and accuracy, and the paired differences to the reference and to
    its own warm-up, each as (mean, low, high)."""
    reference, rows = points.get(REFERENCE, {}), []
    for (curve, queries, group, probe), seeds in points.items():
        row = {"curve": curve, "queries": queries, "group": group, "probe": probe, "seeds": len(seeds)}
        row |= {name: float(np.mean([point[name] for point in seeds.values()])) for name in ("calls", "untied")}
        for k in SHOTS:
            row[f"accuracy@{k}"] = interval([point["accuracy"][k] for point in seeds.values()])
            row[f"0.1@{k}"] = interval([point["0.1"][k] for point in seeds.values()])
            shared = [seed for seed in seeds if seed in reference]
            gaps = [seeds[seed]["accuracy"][k] - reference[seed]["0.1"][k] for seed in shared]
            row[f"against reference@{k}"] = interval(gaps) if gaps else None
            gaps = [point["accuracy"][k] - point["warmup"][k] for point in seeds.values()]
            row[f"against warm-up@{k}"] = None if CURVES[curve][1] == "rce" else interval(gaps)
        rows.append(row)
    return rows


def table(rows: list[dict]) -> list[str]:
    """Return the settings as a markdown table."""
    shown = [f"{k} shot{'s' * (k > 1)} | − reference | − its warm-up" for k in SHOTS]
    lines = [f"| curve | queries | group | probe | calls | untied groups | {' | '.join(shown)} |"]
    lines.append("| --- | --- | --- | --- | --- | --- |" + " --- | --- | --- |" * len(SHOTS))
    for row in rows:
        cells = [row["curve"], row["queries"], row["group"], row["probe"] or "off"]
        cells += [f"{row['calls']:,.0f}", f"{row['untied']:,.0f}"]
        for k in SHOTS:
            cells.append(f"{row[f'accuracy@{k}'][0]:.3f}")
            cells += [_spread(row[f"against {name}@{k}"]) for name in ("reference", "warm-up")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def reference_of(rows: list[dict]) -> str:
    """Return the accuracies of the reference in words, or nothing if it is not among the settings."""
    for row in rows:
        if (row["curve"], row["queries"], row["group"], row["probe"]) == REFERENCE:
            return ", ".join(f"{row[f'0.1@{k}'][0]:.3f} at {k} shot{'s' * (k > 1)}" for k in SHOTS)
    return ""


def _spread(found: tuple[float, float, float] | None) -> str:
    return "" if found is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*found)


def cheapest(rows: list[dict]) -> list[str]:
    """Return the cheapest setting of each curve that is within WITHIN of the reference at 1 shot, as sentences."""
    lines = []
    for curve in dict.fromkeys(row["curve"] for row in rows):
        own = [row for row in rows if row["curve"] == curve]
        same = [row for row in own if (row["against reference@1"] or (-np.inf,))[0] >= -WITHIN]
        for row in sorted(same, key=lambda row: row["calls"])[:1]:
            probe = f", probe {row['probe']}" if row["probe"] else ""
            lines.append(
                f"- {curve}: {row['calls']:,.0f} calls ({row['queries']} queries, groups of {row['group']}{probe}), "
                f"{row['accuracy@1'][0]:.3f} at 1 shot"
            )
    return lines


def write(folder: Path) -> Path:
    """Write FOLDER.md, .json and .png beside the folder of the runs; returns the page's path."""
    points = load(folder)
    rows, page = summary(points), folder.with_suffix(".md")
    write_json(folder.with_suffix(".json"), list(map(_without_nan, rows)))
    name, queries, group, _ = REFERENCE
    text = "# Accuracy against LVLM calls\n\nMade by `python scripts/ablate.py --curve`.\n\n"
    text += __doc__.split("\n\n", 1)[1]
    text += f"The reference is {name} on {queries} queries with groups of {group}, all asked at once, which picks "
    text += "from pools as large as those of the rollouts, as in 0.1"
    text += f": {reached}.\n\n" if (reached := reference_of(rows)) else ".\n\n"
    text += f"![accuracy against calls]({folder.name}.png)\n\n" + "\n".join(table(rows)) + "\n"
    if found := cheapest(rows):
        text += f"\n## The least calls within {WITHIN} of the reference\n\n" + "\n".join(found) + "\n"
    page.write_text(text, encoding="utf-8")
    chart(folder.with_suffix(".png"), rows)
    return page


def _without_nan(row: dict) -> dict:
    """Return a row as JSON holds it: a single seed has no interval."""
    lists = {key: value for key, value in row.items() if isinstance(value, tuple)}
    return row | {key: [None if np.isnan(bound) else bound for bound in value] for key, value in lists.items()}


def lines_of(rows: list[dict], curve: str) -> Iterator[tuple[int, int, list[dict]]]:
    """Yield (group, probe, settings by calls) for each line of a curve's panel."""
    own = [row for row in rows if row["curve"] == curve]
    for group, probe in sorted({(row["group"], row["probe"]) for row in own}):
        line = [row for row in own if (row["group"], row["probe"]) == (group, probe)]
        yield group, probe, sorted(line, key=lambda row: row["calls"])


def chart(path: Path, rows: list[dict]) -> None:
    """A panel for each curve and number of shots: accuracy against calls, a line for each size of group, dashed with a
    probe."""
    try:
        import matplotlib
    except ImportError:
        print("no chart: pip install '.[plots]'")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves, groups = list(dict.fromkeys(row["curve"] for row in rows)), sorted({row["group"] for row in rows})
    shape = {"nrows": len(SHOTS), "ncols": len(curves), "sharex": True, "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(**shape, figsize=(4 * len(curves), 3.5 * len(SHOTS)), constrained_layout=True)
    for column, curve in enumerate(curves):
        for axis, k in zip(axes[:, column], SHOTS, strict=True):
            for group, probe, line in lines_of(rows, curve):
                mean, low, high = np.array([row[f"accuracy@{k}"] for row in line]).T
                axis.errorbar(
                    [row["calls"] for row in line],
                    mean,
                    yerr=np.nan_to_num([mean - low, high - mean]),
                    color=f"C{groups.index(group)}",
                    linestyle="--" if probe else "-",
                    marker="o",
                    markersize=3,
                    capsize=2,
                    label=f"groups of {group}" + (f", probe {probe}" if probe else ""),
                )
            axis.set_xscale("log")
            axis.set_title(f"{curve}, {k} shot{'s' * (k > 1)}")
    for axis in axes[-1]:
        axis.set_xlabel("LVLM calls")
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy")
    means = [row[f"accuracy@{k}"][0] for row in rows for k in SHOTS]
    axes[0, 0].set_ylim(min(means) - 0.05, max(means) + 0.05)  # of two seeds the intervals would fill the figure
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
