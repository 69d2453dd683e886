"""Every selector in one table over several seeds, and the diagnostics of three of them: the tables of
docs/selectors.md and docs/is-it-real.md.

    python scripts/arena.py FOLDER [--seeds 0,1,2] [--shots 1,2,4] [--limit N] [--infoscore-candidates 16]
                                   [--set infer.pool_size=64 …]

For each seed, in FOLDER/seedN: the demo's training, then every learnt selector (`lever train --selector NAME`), then
`lever infer --against all` and `lever diagnose`. What is there is not made again. Ends with two Markdown tables: means
over the seeds with 95 % intervals over seeds and queries; of the diagnostics the first seed's.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RUN = "main"
QUERIES = ["--set", "rollout.num_queries=600"]  # of both tables, as 0.1 had them: the digits' own YAML asks 300
LEARNT = {  # selector → what its training is given beside the defaults
    "answer_match": [],
    "fixed_set": [],
    "epr": [],
    "lever_lm": ["--set", "rollout.infoscore_candidates={candidates}"],
}
DIAGNOSED = "img_text_sim,answer_match"


def lever(folder: Path, *words: str) -> str:
    """Run a command in a folder and return what it wrote to stdout."""
    print("lever", *words, f"({folder})", file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "lever_lm", *words]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def run_seed(folder: Path, seed: int, options: argparse.Namespace) -> None:
    """Train and evaluate everything with one seed."""
    folder.mkdir(parents=True, exist_ok=True)
    common = ["--seed", str(seed), "--quiet", *QUERIES, *(["--limit", str(options.limit)] if options.limit else [])]
    common += [word for item in options.set for word in ("--set", item)]
    # The digits' own warm-up is answer match, which has a run to itself.
    rce = ["--set", "warmup=rce", "--rce-epochs", "10"]
    lever(folder, "train", "--recipe", "demo", "--run-name", RUN, *rce, *common)
    for name, more in LEARNT.items():
        more = [word.format(candidates=options.infoscore_candidates) for word in more]
        lever(folder, "train", "--selector", name, *more, *common)
    used = ["--run-name", RUN, *common, "--json"]
    (folder / "arena.json").write_text(lever(folder, "infer", "--shots", options.shots, "--against", "all", *used))
    most = options.shots.split(",")[-1]
    (folder / "diagnosis.json").write_text(lever(folder, "diagnose", "--shots", most, "--against", DIAGNOSED, *used))


def arena_table(folders: list[Path]) -> list[str]:
    """Return the table of all methods as lines of Markdown, the best at the most shots first."""
    from lever_lm.evaluation.report.seeds import shared_scores
    from lever_lm.evaluation.statistics import interval_over_seeds

    tables = [json.loads((folder / "arena.json").read_text()) for folder in folders]
    first = tables[0]["arena"]
    shots = sorted({row["shots"] for row in first if row["shots"]})
    lines = []
    for method in dict.fromkeys(row["method"] for row in first):
        cells, means = [], []
        for k in shots:
            count = k if any(row["method"] == method and row["shots"] == k for row in first) else 0
            places = [folder / table["folder"] for folder, table in zip(folders, tables, strict=True)]
            found = interval_over_seeds(shared_scores(places, method, count))
            means.append(found["mean"])
            spread = f" ± {found['seed_std']:.3f}" if len(folders) > 1 else ""
            cells.append(f"{found['mean']:.3f}{spread} [{found['low']:.3f}, {found['high']:.3f}]")
        one = next(row for row in first if row["method"] == method)
        calls = "?" if one["train_calls"] is None else f"{one['train_calls']:,}"
        line = f"| `{method}` | {one['chooses_from']} | {calls} | {one['query_calls']} | {' | '.join(cells)} |"
        lines.append((-means[-1], line))
    header = " | ".join(f"{k} shot{'s' * (k != 1)}" for k in shots)
    rule = "| --- | --- | ---: | ---: | " + " | ".join("---:" for _ in shots) + " |"
    top = f"| method | chooses from | LVLM calls to train | a query | {header} |"
    return [top, rule, *(line for _, line in sorted(lines))]


def diagnosis_table(folder: Path) -> list[str]:
    """Return the diagnostics of a seed as lines of Markdown."""
    found = json.loads((folder / "diagnosis.json").read_text())["methods"]
    labels = {row["key"]: row["label"] for rows in found.values() for row in rows}
    of = {(method, row["key"]): row for method, rows in found.items() for row in rows}

    def cell(row: dict | None) -> str:
        if row is None:
            return ""
        star = "*" if row.get("test", {}).get("p", 1) < 0.05 else ""
        return f"{row['value']:.3f}" + (f" ({row['test']['difference']:+.3f}{star})" if "test" in row else "")

    lines = [f"| {label} | {' | '.join(cell(of.get((m, key))) for m in found)} |" for key, label in labels.items()]
    return [f"| | {' | '.join(f'`{m}`' for m in found)} |", f"| --- |{' ---: |' * len(found)}", *lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a config key, of all runs")
    parser.add_argument("--shots", default="1,2,4")
    parser.add_argument("--limit", type=int, help="queries, for a quick look")
    parser.add_argument(
        "--infoscore-candidates", type=int, default=16, help="that Lever-LM's search tries at each step"
    )
    parser.add_argument("--only-seed", type=int, help="train and evaluate this one, print nothing: to share the work")
    options = parser.parse_args()
    seeds = [int(text) for text in options.seeds.split(",")]
    for seed in [options.only_seed] if options.only_seed is not None else seeds:
        run_seed(options.folder / f"seed{seed}", seed, options)
    if options.only_seed is None:
        folders = [options.folder / f"seed{seed}" for seed in seeds]
        print("\n".join([*arena_table(folders), "", *diagnosis_table(folders[0])]))


if __name__ == "__main__":
    main()
