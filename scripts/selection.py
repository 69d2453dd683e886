"""Which metric to select a checkpoint by: rank correlations of val_reward and val_accuracy with held-out accuracy.

    python scripts/selection.py FOLDER [--dataset digits] [--seeds 5] [--run NAME …] [--shots 2] [--every 3]
        [--jobs 2] [--set KEY=VALUE …]

For each seed and run of RUNS: `lever train --validate-on answers`, then the accuracy on the evaluation split of every
third checkpoint of GRPO and of the last one of the warm-up. Each leaves one JSON file in FOLDER; what is there is not
made again. Ends with a Markdown table: Spearman's ρ over the checkpoints of a run, and over those of all runs of a
seed, means over the seeds with 95 % intervals; and what the checkpoint that a metric picks lacks against the best one.
"""

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from ablate import BY_RCE
from ablation_report import spearman

from lever_lm.config.schema import Config
from lever_lm.config.values import build, configs_root, merge, named_yaml, parse_set, read_yaml
from lever_lm.evaluation.evaluate import Evaluation
from lever_lm.selectors.learned import choose
from lever_lm.training.find_checkpoint import load_for
from lever_lm.training.metrics import MEASURED, RECOMMENDED, STRATEGIES
from lever_lm.training.pipeline import Pipeline
from lever_lm.utils.atomic_io import write_json
from lever_lm.utils.console import Screen

# Good runs and a bad one, so that there is something to tell apart.
RUNS = {
    "rce": BY_RCE,
    "match": merge(BY_RCE, {"warmup": "match"}),
    "online": merge(BY_RCE, {"grpo": {"online": True}}),
    "classic": merge(BY_RCE, read_yaml(configs_root() / "recipe" / "classic.yaml")),
}
METRICS = (RECOMMENDED, MEASURED, "val_top_reward")
ALL = "all runs of a seed"
EPOCHS = {"rce": {"epochs": 10}, "grpo": {"epochs": 15}}


def config_of(dataset: str, run: str, seed: int, sets: list[str]) -> Config:
    """Return the config of a run."""
    values = merge(named_yaml("lvlm", "tiny_qwen2.5_vl"), named_yaml("dataset", dataset))  # which may name its own LVLM
    for more in (EPOCHS, RUNS[run], *map(parse_set, sets)):
        values = merge(values, more)
    return build({**values, "seed": seed, "device": "cpu", "validate_on": "answers"})


def run_file(options: argparse.Namespace, name: str, seed: int) -> Path:
    """Return the file of a run."""
    return options.folder / options.dataset / f"{name}_{seed}.json"


def make(options: argparse.Namespace, name: str, seed: int) -> Path:
    """Train and judge a run unless its file is there."""
    path = run_file(options, name, seed)
    if not path.is_file():
        torch.set_num_threads(1)
        config = config_of(options.dataset, name, seed, options.sets)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"rows": judged(config, path.with_suffix(""), options.every, options.shots)})
    return path


def judged(config: Config, folder: Path, every: int, shots: int) -> list[dict]:
    """Train a run and return the rows of the checkpoints that are judged, each with its held-out `accuracy`."""
    name = folder.name
    pipeline = Pipeline(config, Screen(quiet=True), results=folder, run_name=name)
    pipeline.train()
    rows = pipeline.run.rows()
    last = [row for row in rows if row["phase"] == "rce"][-1:]
    rows = last + [row for row in rows if row["phase"] == "grpo" and row["epoch"] % every == 0]
    evaluation = Evaluation(config, pipeline.data, pipeline.features)
    for row in rows:
        policy = load_for(pipeline.run.checkpoint(row["phase"], row["epoch"]), config)
        picks = choose(policy, evaluation.problem, shots)[0]
        (outcome,) = evaluation.run({name: picks}, [shots], pipeline.lvlm)
        row["accuracy"] = outcome.summary()["accuracy"]
    return rows


def scored(rows: list[dict], metric: str) -> list[float]:
    """Return what a strategy maximises, of each row."""
    return [-STRATEGIES[metric].score(row[metric]) for row in rows]


def lost(rows: list[dict], metric: str) -> float:
    """Return the accuracy that the checkpoint which a metric picks lacks against the best one."""
    accuracy = [row["accuracy"] for row in rows]
    return max(accuracy) - accuracy[int(np.argmax(scored(rows, metric)))]


def mean(values: list[float]) -> str:
    """Return a mean over seeds with its 95 % interval; what is NaN, a constant metric, left out."""
    values = [value for value in values if not np.isnan(value)]
    if not values:
        return "–"
    error = 1.96 * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{np.mean(values):+.2f} ± {error:.2f}"


def table(found: dict[tuple[str, int], list[dict]]) -> list[str]:
    """Return the table of the runs {(name, seed): rows} as lines of Markdown."""
    columns = [f"{what} {metric}" for what in ("ρ", "lost by") for metric in METRICS]
    lines = [f"| run | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    names, seeds = (list(dict.fromkeys(key[part] for key in found)) for part in (0, 1))
    for name in [*names, ALL]:
        groups = [
            [row for key, rows in found.items() if key[1] == seed and name in (key[0], ALL) for row in rows]
            for seed in seeds
        ]
        truth = [[row["accuracy"] for row in rows] for rows in groups]
        cells = [mean([spearman(scored(rows, m), t) for rows, t in zip(groups, truth, strict=True)]) for m in METRICS]
        cells += [f"{np.mean([lost(rows, m) for rows in groups]):.3f}" for m in METRICS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Make what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset", default="digits", help="a name in configs/dataset")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--run", choices=RUNS, action="append", help="these only")
    parser.add_argument("--shots", type=int, default=2)
    parser.add_argument("--every", type=int, default=3, help="judge each N-th checkpoint of GRPO")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    wanted = [(name, seed) for seed in range(options.seeds) for name in options.run or RUNS]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for job in as_completed([pool.submit(make, options, name, seed) for name, seed in wanted]):
            print(job.result(), file=sys.stderr, flush=True)
    found = {key: json.loads(run_file(options, *key).read_text(encoding="utf-8"))["rows"] for key in wanted}
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
