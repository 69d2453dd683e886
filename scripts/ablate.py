"""Measure what each choice of ours is worth: one row at a time, over seeds, in two worlds.

    python scripts/ablate.py [--seeds 5] [--jobs 2] [--world synthetic] [--only ROW …] [--results results]

synthetic: scripts/synthetic.py, the 800 queries of its rollout file to train and select on, 1,000 unseen ones to judge
by: the exact true reward of the sampling policy and of its greedy picks. digits, digits_sets: the shipped worlds,
judged by the accuracy of their LVLM on 500 evaluation queries. A row changes the named options of ours and nothing
else; it starts from the same data and weights, and so, where it changes GRPO alone, from the same RCE policy.
Each run leaves one JSON file in RESULTS/ablation/; a run whose file is there is not made again. Writes
RESULTS/ablation.md and RESULTS/ablation.png.

    python scripts/ablate.py --curve [--seeds 5] [--jobs 2] [--queries 75 150 …] [--groups 4 8 15] [--probe 0 3]
                             [--training rce …] [--dataset digits] [--lvlm tiny_qwen2.5_vl] [--set KEY=VALUE …]

Accuracy against LVLM calls, on a dataset and with any --set: see ablation_curve.py. Runs go to
RESULTS/ablation/curve_DATASET/, table and figure to curve_DATASET.md, .json and .png beside it.
"""

import argparse
import multiprocessing
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import ablation_curve
import ablation_report
import synthetic
import torch
from assets_src import codes

from lever_lm.config.schema import Config
from lever_lm.config.values import build, configs_root, dotted, merge, named_yaml, read_yaml
from lever_lm.evaluation.evaluate import Evaluation
from lever_lm.selectors import BASELINES
from lever_lm.selectors.learned import choose
from lever_lm.selectors.pointer.checkpoint import load_policy
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.batches import GroupTensors, to_tensors
from lever_lm.training.find_checkpoint import load_for
from lever_lm.training.grpo import best_rollouts, train_grpo
from lever_lm.training.pipeline import Pipeline
from lever_lm.training.rce import train_rce
from lever_lm.training.rewards import group_advantage
from lever_lm.training.rollouts.file_format import load_groups, split_ids
from lever_lm.training.rollouts.propose import new_policy
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.run_state import Journal
from lever_lm.training.validation import group_statistics
from lever_lm.training.warmup import MatchGroups
from lever_lm.utils.atomic_io import write_json
from lever_lm.utils.console import Screen

CLASSIC = "classic in full"
# LEARNING's rows first: each sets one of our choices back to the lineage's. Then what is offered beside them.
GRPO_ROWS = {
    "ours": {},
    "top-3, then top-5 rollouts": {"grpo.top_k": [3, 5]},
    "anchored before RCE": {"grpo.anchor": "init"},
    "old policy never refreshed": {"grpo.refresh_every": 0},
    "KL against the old policy": {"grpo.reference": "old"},
}
SYNTHETIC_ROWS = {
    **GRPO_ROWS,
    "dropout on for new log-probs only": {"grpo.dropout": "new_only"},
    CLASSIC: {},
    "dropout off for both": {"grpo.dropout": "off"},
    "mostly random rollouts": {},
}
DIGITS_ROWS = {
    **GRPO_ROWS,
    CLASSIC: {},
    "rank advantage": {"grpo.advantage": "rank"},
    "advantage scaled by batch": {"grpo.advantage_scale": "batch"},
    "advantage not scaled": {"grpo.advantage_scale": "none"},
    "mostly random rollouts": {"rollout.beam": 0, "rollout.sample": 0, "rollout.retrieval": 1, "rollout.random": 12},
    "online": {"grpo.online": True},
    "online alone": {"grpo.online": True, "grpo.online_ratio": 1.0},
    "sparse matches": {"warmup": "match", "infer.pool_size": 256},
    "sparse matches, pools of 64": {"warmup": "match"},
    "sparse matches, online": {"warmup": "match", "infer.pool_size": 256, "grpo.online": True},
    "InfoScore, RCE alone": {
        "rollout.beam": 0,
        "rollout.sample": 0,
        "rollout.retrieval": 0,
        "rollout.random": 0,
        "rollout.infoscore": 2,
        "rollout.infoscore_candidates": 16,
        "reward.mode": "infoscore",
        "grpo.epochs": 0,
    },
}
SETS_ROWS = {
    "ours": {},
    "stateless": {"policy.state_update": "none"},
    "gate": {"policy.state_update": "gate"},
    "mmr": {"policy.state_update": "none", "policy.diversity": "mmr"},
    "online": {"grpo.online": True},
    "stateless, online": {"policy.state_update": "none", "grpo.online": True},
    "gate, online": {"policy.state_update": "gate", "grpo.online": True},
    "rollouts of 4": {"rollout.shots": 4},
    "rollouts of 4, online": {"rollout.shots": 4, "grpo.online": True},
    "rollouts of 4, stateless": {"rollout.shots": 4, "policy.state_update": "none"},
    "rollouts of 4, mmr": {"rollout.shots": 4, "policy.state_update": "none", "policy.diversity": "mmr"},
    "answer match": {"warmup": "match", "rce.epochs": 20, "grpo.epochs": 0},
    "epr": {
        "warmup": "epr",
        "rollout.shots": 1,
        "rollout.beam": 0,
        "rollout.sample": 0,
        "rollout.retrieval": 10,
        "rollout.random": 40,
        "rce.epochs": 20,
        "grpo.epochs": 0,
    },
    "mmr, online": {"policy.state_update": "none", "policy.diversity": "mmr", "grpo.online": True},
}
ROWS = {"synthetic": SYNTHETIC_ROWS, "digits": DIGITS_ROWS, "digits_sets": SETS_ROWS}
MOSTLY_RANDOM = {"beams": 0, "retrieval": 1, "samples_per_temp": 0, "random": 13}
# The digits' own YAML begins with answer match and asks little; the rows are about RCE and what GRPO adds to it.
BY_RCE = {"warmup": "rce", "rollout": {"num_queries": 600}}
HIDDEN = 0.85  # share of the matches that the rows `sparse matches` do not see
UNSEEN = 1000
SHOTS = [1, 2, 4]


def config_of(world: str, row: str, seed: int) -> Config:
    """Return the config of a row: ours or classic, and what the row changes."""
    values = {} if world == "synthetic" else named_yaml("dataset", world)
    if world == "digits":
        values = merge(values, {**named_yaml("lvlm", "tiny_qwen2.5_vl"), **BY_RCE, "infer": {"pool_size": 64}})
    if row == CLASSIC:
        values = merge(values, read_yaml(configs_root() / "recipe" / "classic.yaml"))
    for key, value in ROWS[world][row].items():
        values = merge(values, dotted(key, value))
    return build({**values, "seed": seed, "device": "cpu"})


# ---------------------------------------------------------------------- synthetic


def run_synthetic(row: str, seed: int, folder: Path) -> dict:
    """Train a row and judge every checkpoint on the unseen queries."""
    config = config_of("synthetic", row, seed)
    world = synthetic.World(seed=seed, **(MOSTLY_RANDOM if row == "mostly random rollouts" else {}))
    data = synthetic.generate(world)
    embeddings = torch.from_numpy(data.embeddings)
    write_json(folder / "rl_data.json", data.content, indent=None)
    groups = sorted(load_groups(folder / "rl_data.json"), key=lambda group: group.query_id)
    train, val = (
        to_tensors([group for group in groups if group.query_id in ids], embeddings, embeddings)
        for ids in split_ids(data.qids.tolist())
    )
    initial, policy = (new_policy(config, embeddings.shape[1]) for _ in range(2))
    journal = Journal(RunFolder(folder), {"policy": policy.shape}, {}, lambda line: None)
    journal.resume()
    torch.manual_seed(seed)
    train_rce(policy, train, val, config.rce, journal)
    train_grpo(policy, initial, train, val, config.grpo, journal, val_temperature=config.rce.temperature_end)
    unseen = synthetic.unseen(world, data, UNSEEN)
    checkpoints = (load_policy(journal.run.checkpoint(row["phase"], row["epoch"])) for row in journal.rows)
    judged = [
        {**metrics, **judge(policy, embeddings, unseen)}
        for metrics, policy in zip(journal.rows, checkpoints, strict=True)
    ]
    signal = signals(folder / "rl_data.json")
    return {"rows": judged, "untrained": judge(initial.eval(), embeddings, unseen), "signals": signal}


def judge(policy: PointerSelector, embeddings: torch.Tensor, unseen: synthetic.Unseen) -> dict[str, float]:
    """Return a policy's exact true reward, sampling and greedy. All examples are projected once, not once a pool."""
    with torch.no_grad():
        features = policy.input_proj(embeddings)
    features = (features[unseen.qids], features[unseen.pools])
    expected, greedy = synthetic.true_rewards(policy.after_input(), *features, unseen.truth)
    return {"true_reward": expected, "true_greedy": greedy}


# ---------------------------------------------------------------------- digits, digits_sets


def run_dataset(world: str, row: str, seed: int, folder: Path, results: Path) -> dict:
    """Train a row and answer the evaluation queries with RCE's last policy, GRPO's last, and the one of the largest
    val_reward; beside ours also with the baselines."""
    config = config_of(world, row, seed)
    pipeline = Pipeline(config, Screen(quiet=True), results=results, run_dir=folder)
    with hidden(HIDDEN if row.startswith("sparse") else 0.0):
        pipeline.train()
    rows = pipeline.run.rows()
    of_rce, of_grpo = ([r for r in rows if r["phase"] == phase] for phase in ("rce", "grpo"))
    policies = {"rce": pipeline.run.checkpoint("rce", len(of_rce))}
    if of_grpo:
        best = max(of_grpo, key=lambda r: r["val_reward"])["epoch"]
        policies["grpo_last"] = pipeline.run.checkpoint("grpo", len(of_grpo))
        policies["grpo_best"] = pipeline.run.checkpoint("grpo", best)
    evaluation = Evaluation(config, pipeline.data, pipeline.features)
    choices = {
        name: choose(load_for(path, config), evaluation.problem, max(SHOTS))[0] for name, path in policies.items()
    }
    if row == "ours":
        choices = {**{name: evaluation.select(name, max(SHOTS)) for name in BASELINES}, **choices}
    outcomes = evaluation.run(choices, SHOTS, pipeline.lvlm)
    accuracy = {f"{outcome.method}@{outcome.shots}": outcome.summary()["accuracy"] for outcome in outcomes}
    signal = signals(pipeline.layout.rollouts) if config.needs_rollouts else {}
    found = {"rows": rows, "accuracy": accuracy, "asked": pipeline.lvlm.asked, "signals": signal}
    if world == "digits_sets":
        found["of_style"] = {name: of_style(evaluation, picks) for name, picks in choices.items()}
    return found


def of_style(evaluation: Evaluation, picks: list[list[int]]) -> list[float]:
    """Return the shares of queries of which none, one and both of the first two picks are of their own style."""
    styles = {style: re.compile(rf"\b{style}\b") for style in codes.STYLES}
    named = lambda example: next(s for s, word in styles.items() if word.search(example.question))  # noqa: E731
    train = [named(example) for example in evaluation.data.train_examples]
    counts = [
        sum(train[row] == named(query) for row in rows[:2])
        for query, rows in zip(evaluation.data.val_examples, picks, strict=True)
    ]
    return [counts.count(number) / len(counts) for number in range(3)]


@contextmanager
def hidden(share: float) -> Iterator[None]:
    """Hide a share of the matches from the warm-up, always the same ones: what is right is not known to be."""
    seen = MatchGroups.all

    def some(self, rows: list[int], epoch: int) -> GroupTensors:
        groups = seen(self, rows, epoch)
        drawn = (groups.rows[:, None] * 1_000_003 + groups.pools * 7_919) % 1_009 / 1_009
        return replace(groups, rewards=groups.rewards * (drawn >= share))

    with patch.object(MatchGroups, "all", some):
        yield


# ---------------------------------------------------------------------- what ties leave


def signals(rollouts: Path) -> dict[str, dict[str, float]]:
    """Return the Adv Std of a rollout file's groups, by reward mode: over all rollouts and over the best 3 and 5."""
    found = {}
    for mode in ("hard_plus_soft", "hard_only"):
        groups = load_groups(rollouts, reward_mode=mode)
        nothing = torch.zeros(1 + max(row for group in groups for row in (group.query_id, *group.pool)), 1)
        data = to_tensors(groups, nothing, nothing)
        for k in (None, 3, 5):
            mask = best_rollouts(data.rewards, data.mask, k)
            statistics = group_statistics(data.rewards, mask, group_advantage(data.rewards, mask))
            found.setdefault(mode, {})["all" if k is None else f"top {k}"] = statistics["adv_std"]
    return found


# ---------------------------------------------------------------------- all of it


def one_run(world: str, row: str, seed: int, results: Path) -> str:
    """Make one run unless its file is there. Returns a line for the screen."""
    path = ablation_report.run_file(results, world, row, seed)
    if path.is_file():
        return f"{world}, seed {seed}, {row}: there"
    torch.set_num_threads(1)  # one run a core
    folder = results / "ablation" / "work" / f"{world}_{seed}" / path.stem
    shutil.rmtree(folder, ignore_errors=True)
    if world == "synthetic":
        outcome = run_synthetic(row, seed, folder)
    else:
        outcome = run_dataset(world, row, seed, folder, folder.parent / "results")
    write_json(path, {"world": world, "row": row, "seed": seed, **outcome})
    shutil.rmtree(folder, ignore_errors=True)
    return f"{world}, seed {seed}, {row}: done"


def seed_runs(world: str, seed: int, rows: list[str], results: Path) -> None:
    """Make all rows of a seed, one after the other: they share caches."""
    for row in rows:
        print(one_run(world, row, seed, results), flush=True)


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--world", choices=ROWS, action="append", help="one of them only")
    parser.add_argument("--only", action="append", metavar="ROW", help="these rows only")
    parser.add_argument("--results", type=Path, default=Path("results"))
    ablation_curve.add_options(parser)
    arguments = parser.parse_args()
    known = {row for rows in ROWS.values() for row in rows}
    if unknown := set(arguments.only or ()) - known:
        parser.error(f"unknown row {unknown.pop()!r}; one of {', '.join(sorted(known))}")
    worlds = arguments.world or list(ROWS)
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        if arguments.curve:
            print(ablation_curve.run(arguments, pool))
            return
        waiting = []
        for seed in range(arguments.seeds):
            for world in worlds:
                rows = [row for row in ROWS[world] if arguments.only is None or row in arguments.only]
                waiting.append(pool.submit(seed_runs, world, seed, rows, arguments.results))
        for job in waiting:
            job.result()
    print(ablation_report.write(arguments.results, ROWS))


if __name__ == "__main__":
    main()
