"""Write RESULTS/ablation.md and RESULTS/ablation.png from the JSON files that ablate.py left in RESULTS/ablation/.

Every number is a mean over seeds. A difference is taken seed by seed, so that what the seeds share cancels; its 95 %
interval is Student's over the seeds. Rank correlations are Spearman's.
"""

import json
import re
from pathlib import Path

import numpy as np

METRICS = ("val_loss", "ppo_loss", "kl", "adv_std", "val_reward", "val_top_reward")
LARGER_IS_BETTER = ("adv_std", "val_reward", "val_top_reward")
TRUTHS = {"true_reward": "expected", "true_greedy": "greedy"}
SHOTS = (1, 2, 4)
# The 97.5 % point of Student's t for n − 1 degrees of freedom.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def run_file(results: Path, world: str, row: str, seed: int) -> Path:
    """Return the file that a run's outcome is kept in."""
    name = re.sub(r"[^a-z0-9]+", "_", row.lower()).strip("_")
    return results / "ablation" / f"{world}_{seed}_{name}.json"


def load(results: Path, rows: dict[str, dict]) -> dict[tuple[str, str], dict[int, dict]]:
    """Return (world, row) → seed → outcome, of the runs that are there."""
    runs: dict[tuple[str, str], dict[int, dict]] = {}
    for path in sorted((results / "ablation").glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["row"] in rows.get(run["world"], {}):
            runs.setdefault((run["world"], run["row"]), {})[run["seed"]] = run
    return {(world, row): runs[world, row] for world in rows for row in rows[world] if (world, row) in runs}


# ---------------------------------------------------------------------- statistics


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return the mean and the 95 % Student interval; a single value has none."""
    scores = np.asarray(values, dtype=float)
    if len(scores) < 2:
        return float(scores.mean()), float("nan"), float("nan")
    half = STUDENT.get(len(scores), 2.1) * scores.std(ddof=1) / len(scores) ** 0.5
    return float(scores.mean()), float(scores.mean() - half), float(scores.mean() + half)


def ranks(values: list[float]) -> np.ndarray:
    """Return ranks from 0, equal values sharing their mean."""
    scores = np.asarray(values, dtype=float)
    return np.array([(scores < x).sum() + ((scores == x).sum() - 1) / 2 for x in scores])


def spearman(one: list[float], other: list[float]) -> float:
    """Return the rank correlation; NaN where one of them is constant."""
    a, b = ranks(one), ranks(other)
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _spread(values: list[float], digits: int = 3, sign: bool = True) -> str:
    if not values:
        return ""
    mean, low, high = interval(values)
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


# ---------------------------------------------------------------------- what is read from a run


def phase(run: dict, name: str) -> list[dict]:
    """Return the epochs of a phase."""
    return [row for row in run["rows"] if row["phase"] == name]


def points(run: dict, truth: str) -> dict[str, float]:
    """Return the true reward after RCE, at GRPO's last epoch, at that of the largest val_reward and of each other
    strategy, and at the best epoch there is."""
    grpo = phase(run, "grpo")
    chosen = {metric: best(grpo, metric)[truth] for metric in METRICS}
    ends = {"rce": phase(run, "rce")[-1][truth], "last": grpo[-1][truth], "best": max(row[truth] for row in grpo)}
    return {**ends, **chosen}


def best(rows: list[dict], metric: str) -> dict:
    """The epoch a metric points to: the least, or the largest where larger is better. (`kl` here is the least, which is
    not the strategy's range.)"""
    sign = -1 if metric in LARGER_IS_BETTER else 1
    return min(rows, key=lambda row: sign * row[metric])


# ---------------------------------------------------------------------- tables


def synthetic_table(runs: dict, truth: str) -> list[str]:
    """RCE against GRPO by row, in true reward."""
    lines = [
        "| row | after RCE | GRPO, last | GRPO, by val_reward | last − RCE | worst seed | by val_reward − RCE | "
        "best epoch − by val_reward |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (world, row), seeds in runs.items():
        if world != "synthetic":
            continue
        found = [points(run, truth) for run in seeds.values()]
        mean = {key: np.mean([point[key] for point in found]) for key in ("rce", "last", "val_reward")}
        gain = [point["last"] - point["rce"] for point in found]
        chosen = [point["val_reward"] - point["rce"] for point in found]
        regret = np.mean([point["best"] - point["val_reward"] for point in found])
        lines.append(
            f"| {row} | {mean['rce']:.3f} | {mean['last']:.3f} | {mean['val_reward']:.3f} | {_spread(gain)} | "
            f"{min(gain):+.3f} | {_spread(chosen)} | {regret:.3f} |"
        )
    return lines


def summary_table(runs: dict) -> list[str]:
    """GRPO's last epoch against the RCE it started from, by row, in all three measures."""
    lines = ["| row | synthetic, sampling | synthetic, greedy | digits, 1 shot |", "| --- | --- | --- | --- |"]
    for row in dict.fromkeys(row for _, row in runs):
        seeds = runs.get(("synthetic", row), {})
        cells = [
            _spread([point["last"] - point["rce"] for point in (points(run, truth) for run in seeds.values())])
            if seeds
            else ""
            for truth in TRUTHS
        ]
        accuracies = [run["accuracy"] for run in runs.get(("digits", row), {}).values()]
        gaps = [accuracy["grpo_last@1"] - accuracy["rce@1"] for accuracy in accuracies if "grpo_last@1" in accuracy]
        if seeds or gaps:
            lines.append(f"| {row} | {' | '.join(cells)} | {_spread(gaps) if gaps else ''} |")
    return lines


def signal_table(runs: dict) -> list[str]:
    """Tabulate what the groups had to teach, by row: means over GRPO's epochs and the seeds."""
    names = ("adv_std", "frac_reward_zero_std", "zero_grad_frac", "clip_frac", "kl_share", "kl")
    lines = [f"| world | row | {' | '.join(names)} |", "| --- | --- |" + " --- |" * len(names)]
    for (world, row), seeds in runs.items():
        epochs = [epoch for run in seeds.values() for epoch in phase(run, "grpo")]
        if epochs:
            values = (f"{np.mean([epoch[name] for epoch in epochs]):.3f}" for name in names)
            lines.append(f"| {world} | {row} | {' | '.join(values)} |")
    return lines


def adv_std(runs: dict, world: str) -> dict[tuple[str, str], float]:
    """Return (reward mode, rollouts kept) → Adv Std over all groups, ties counted 0, the mean over the seeds."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in runs.get((world, "ours"), {}).values():
        for mode, kept in run.get("signals", {}).items():
            for name, value in kept.items():
                found.setdefault((mode, name), []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}


def tie_table(runs: dict) -> list[str]:
    """Tabulate what is left of the advantages where only the best rollouts are kept."""
    lines = ["| world | reward | all rollouts | best 5 | best 3 |", "| --- | --- | --- | --- | --- |"]
    for world in ("synthetic", "digits"):
        left = adv_std(runs, world)
        for mode in dict.fromkeys(mode for mode, _ in left):
            cells = " | ".join(f"{left[mode, name]:.3f}" for name in ("all", "top 5", "top 3"))
            lines.append(f"| {world} | {mode} | {cells} |")
    return lines


def correlations(runs: dict) -> dict[tuple[str, str], list[float]]:
    """Return (metric, truth) → by seed, the rank correlation over the GRPO checkpoints of all rows."""
    by_seed: dict[int, list[dict]] = {}
    for (world, _), seeds in runs.items():
        if world == "synthetic":
            for seed, run in seeds.items():
                by_seed.setdefault(seed, []).extend(phase(run, "grpo"))
    return {
        (metric, truth): [
            spearman([row[metric] for row in rows], [row[truth] for row in rows]) for rows in by_seed.values()
        ]
        for metric in METRICS
        for truth in TRUTHS
    }


def correlation_table(runs: dict) -> list[str]:
    """Each selection metric against true reward, over all rows, and within ours."""
    pooled = correlations(runs)
    if not any(pooled.values()):
        return []
    within = correlations({key: seeds for key, seeds in runs.items() if key == ("synthetic", "ours")})
    lines = [
        "| metric | with expected reward, all rows | with greedy reward, all rows | expected, within ours | greedy, "
        "within ours |",
        "| --- | --- | --- | --- | --- |",
    ]
    for metric in METRICS:
        cells = [table[metric, truth] for table in (pooled, within) for truth in TRUTHS]
        lines.append(f"| {metric} | {' | '.join(_spread(cell, 2) for cell in cells)} |")
    return lines


def accuracy_table(runs: dict, world: str, most: int) -> list[str]:
    """Accuracy by row and number of shots; GRPO is its epoch of the largest val_reward. most: the shots that the
    difference is of."""
    shots = " | ".join(_shots(k) for k in SHOTS)
    lines = [f"| row | policy | {shots} | − RCE of ours, {_shots(most)} |"]
    lines.append("| --- | --- |" + " --- |" * (len(SHOTS) + 1))
    ours = runs.get((world, "ours"), {})

    def line(row: str, policy: str, seeds: dict, label: str) -> None:
        cells = [f"{np.mean([run['accuracy'][f'{policy}@{k}'] for run in seeds.values()]):.3f}" for k in SHOTS]
        shared = [seed for seed in seeds if seed in ours]
        gaps = [seeds[seed]["accuracy"][f"{policy}@{most}"] - ours[seed]["accuracy"][f"rce@{most}"] for seed in shared]
        lines.append(f"| {row} | {label} | {' | '.join(cells)} | {_spread(gaps)} |")

    for policy in ("random", "text_sim", "img_sim", "img_text_sim", "oracle"):
        if ours:
            line("baseline", policy, ours, policy)
    for (where, row), seeds in runs.items():
        if where == world:
            for policy, label in (("rce", "RCE"), ("grpo_last", "GRPO, last"), ("grpo_best", "GRPO, by val_reward")):
                if all(f"{policy}@1" in run["accuracy"] for run in seeds.values()):
                    line(row, policy, seeds, label)
    return lines


def style_table(runs: dict) -> list[str]:
    """How many of the first two picks are of the query's own style: one is what a query of digits_sets needs."""
    lines = ["| row | policy | none | one | both |", "| --- | --- | --- | --- | --- |"]
    for (_, row), seeds in runs.items():
        found = [run["of_style"] for run in seeds.values() if "of_style" in run]
        for policy in ("rce", "grpo_best"):
            if found and policy in found[0]:
                shares = np.mean([one[policy] for one in found], axis=0)
                lines.append(f"| {row} | {policy} | {' | '.join(f'{share:.3f}' for share in shares)} |")
    return lines


# ---------------------------------------------------------------------- claims


def _sets(row: str, policy: str = "grpo_best") -> tuple[str, str, str]:
    return "digits_sets", row, policy


def _sparse(row: str) -> tuple:
    return tuple(("digits", row, policy) for policy in ("grpo_best", "rce"))


# What is claimed of pairs of policies, and with how many shots: of the epochs of the largest val_reward.
CONTRASTS = [
    ("digits sets: GRPO above its RCE", (_sets("ours"), _sets("ours", "rce")), (2, 4)),
    ("digits sets: online above offline", (_sets("online"), _sets("ours")), (2, 4)),
    ("digits sets: GRPO above answer match", (_sets("ours"), _sets("answer match", "rce")), (2, 4)),
    ("digits sets: GRPO above epr", (_sets("ours"), _sets("epr", "rce")), (2, 4)),
    ("digits sets: GRPO above image and text similarity", (_sets("ours"), _sets("ours", "img_text_sim")), (2, 4)),
    ("digits sets: gru above no state", (_sets("ours"), _sets("stateless")), (2, 4)),
    ("digits sets: mmr above no state", (_sets("mmr"), _sets("stateless")), (2, 4)),
    ("digits sets: gate above no state", (_sets("gate"), _sets("stateless")), (2, 4)),
    ("digits sets, online: gate above no state", (_sets("gate, online"), _sets("stateless, online")), (2, 4)),
    ("sparse matches: GRPO above match", _sparse("sparse matches"), (1, 2, 4)),
    ("sparse matches, pools of 64: GRPO above match", _sparse("sparse matches, pools of 64"), (1, 2, 4)),
    ("sparse matches, online: GRPO above match", _sparse("sparse matches, online"), (1, 2, 4)),
]


def claims(runs: dict) -> list[str]:
    """Tabulate the claims of the page, and whether these runs bear them out."""
    lines = ["| claim | measured | holds |", "| --- | --- | --- |"]

    def add(claim: str, measured: str, holds: bool) -> None:
        lines.append(f"| {claim} | {measured} | {'yes' if holds else '**no**'} |")

    for world in ("synthetic", "digits"):
        for (mode, kept), value in adv_std(runs, world).items():
            if kept == "top 5":
                every = adv_std(runs, world)[mode, "all"]
                claim = f"{world}, {mode}: Adv Std of classic's best 5 is less than half of that of all rollouts"
                add(claim, f"{value:.3f} against {every:.3f}", 2 * value < every)
    ours, classic = runs.get(("synthetic", "ours")), runs.get(("synthetic", "classic in full"))
    if ours and classic:
        for truth, name in TRUTHS.items():
            gain = [point["last"] - point["rce"] for point in (points(run, truth) for run in classic.values())]
            add(f"classic's GRPO ends below its RCE ({name})", _spread(gain), interval(gain)[2] < 0)
    if ours:
        for truth, name in TRUTHS.items():
            found = [points(run, truth) for run in ours.values()]
            gain = [point["last"] - point["rce"] for point in found]
            add(f"ours, {name}: last epoch ≥ RCE − .005 on every seed", f"worst {min(gain):+.3f}", min(gain) >= -0.005)
            add(f"ours, {name}: last epoch above RCE on the mean", _spread(gain), interval(gain)[1] > 0)
            chosen = [point["val_reward"] - point["rce"] for point in found]
            add(f"ours, {name}: by val_reward ≥ RCE + .01 on the mean", _spread(chosen), np.mean(chosen) >= 0.01)
            regret = [point["best"] - point["val_reward"] for point in found]
            holds = max(regret) <= 0.02
            add(f"ours, {name}: by val_reward within .02 of the best epoch", f"worst {max(regret):.3f}", holds)
        for truth, name in TRUTHS.items():
            rho = correlations(runs)["val_reward", truth]
            add(f"rank correlation of val_reward with {name} reward ≥ .8", _spread(rho, 2), np.mean(rho) >= 0.8)
    ours, classic = runs.get(("digits", "ours")), runs.get(("digits", "classic in full"))
    if classic:
        gap = [run["accuracy"]["grpo_last@1"] - run["accuracy"]["rce@1"] for run in classic.values()]
        add("digits, 1 shot: classic's GRPO ends below its RCE", _spread(gap), interval(gap)[2] < 0)
    if ours:
        for k in SHOTS:
            gap = [run["accuracy"][f"grpo_best@{k}"] - run["accuracy"][f"img_text_sim@{k}"] for run in ours.values()]
            add(f"digits, {_shots(k)}: GRPO ≥ image+text similarity + .15", _spread(gap), np.mean(gap) >= 0.15)
        for k in SHOTS:
            gap = [run["accuracy"][f"grpo_best@{k}"] - run["accuracy"][f"rce@{k}"] for run in ours.values()]
            add(f"digits, {_shots(k)}: GRPO above RCE", _spread(gap), interval(gap)[1] > 0)
    for row in ("online", "online alone"):
        online = {seed: run for seed, run in runs.get(("digits", row), {}).items() if seed in (ours or {})}
        for k in SHOTS if online else ():
            key = f"grpo_best@{k}"
            gap = [run["accuracy"][key] - ours[seed]["accuracy"][key] for seed, run in online.items()]
            add(f"digits, {_shots(k)}: {row} above offline", _spread(gap), interval(gap)[1] > 0)
    for claim, (one, other), counts in CONTRASTS:
        for k in counts:
            if gap := contrast(runs, one, other, k):
                add(f"{claim}, {_shots(k)}", _spread(gap), interval(gap)[1] > 0)
    return lines


def contrast(runs: dict, one: tuple[str, str, str], other: tuple[str, str, str], shots: int) -> list[float]:
    """Return by how much one (world, row, policy) is more accurate than another, seed by seed."""
    first, second = (runs.get(key[:2], {}) for key in (one, other))
    names = [f"{key[2]}@{shots}" for key in (one, other)]
    pairs = [
        [run["accuracy"].get(name) for run, name in zip((first[s], second[s]), names, strict=True)]
        for s in first
        if s in second
    ]
    return [a - b for a, b in pairs if a is not None is not b]


def _shots(count: int) -> str:
    return f"{count} shot{'s' * (count > 1)}"


def gap_closed(runs: dict) -> list[str]:
    """Tabulate how much of the way from image+text similarity to the oracle each policy goes, on the digits."""
    lines = [f"| policy | {' | '.join(map(_shots, SHOTS))} |", "| --- |" + " --- |" * len(SHOTS)]
    ours = runs.get(("digits", "ours"), {})
    for row, key, label in (
        ("ours", "rce", "RCE"),
        ("ours", "grpo_best", "GRPO"),
        ("online", "grpo_best", "GRPO, online"),
        ("online alone", "grpo_best", "GRPO, online alone"),
        ("classic in full", "grpo_last", "classic GRPO"),
        ("InfoScore, RCE alone", "rce", "InfoScore, RCE alone"),
    ):
        seeds = {seed: run for seed, run in runs.get(("digits", row), {}).items() if seed in ours}
        if seeds:
            cells = []
            for k in SHOTS:
                closed = [
                    (run["accuracy"][f"{key}@{k}"] - ours[seed]["accuracy"][f"img_text_sim@{k}"])
                    / (ours[seed]["accuracy"][f"oracle@{k}"] - ours[seed]["accuracy"][f"img_text_sim@{k}"])
                    for seed, run in seeds.items()
                ]
                cells.append(f"{np.mean(closed):.0%}")
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


# ---------------------------------------------------------------------- writing


def write(results: Path, rows: dict[str, dict]) -> Path:
    """Write the page and the chart; returns the page's path. Raises SystemExit when there are no runs."""
    runs = load(results, rows)
    if not runs:
        raise SystemExit(f"no runs in {results / 'ablation'}: python scripts/ablate.py makes them")
    counts = sorted({len(seeds) for seeds in runs.values()})
    parts = {
        "What GRPO adds to the RCE it starts from": summary_table(runs),
        "Claims": claims(runs),
        "Synthetic: expected true reward of the sampling policy, unseen queries": synthetic_table(runs, "true_reward"),
        "Synthetic: true reward of the greedy picks, unseen queries": synthetic_table(runs, "true_greedy"),
        "Which metric to select by: rank correlation with true reward over checkpoints": correlation_table(runs),
        "Digits: accuracy on the 500 evaluation queries": accuracy_table(runs, "digits", 1),
        "Digits sets: accuracy on the 500 evaluation queries": accuracy_table(runs, "digits_sets", 2),
        "Digits sets: queries by how many of the first two picks are of their style": style_table(runs),
        "Digits: share of the gap from image+text similarity to the oracle that is closed": gap_closed(runs),
        "Adv Std: what keeping the best rollouts alone leaves, ties counted 0": tie_table(runs),
        "What the groups had to teach": signal_table(runs),
    }
    text = f"# Ablation\n\nMade by `python scripts/ablate.py`; {' or '.join(map(str, counts))} seeds a row.\n\n"
    text += __doc__.split("\n\n", 1)[1].strip() + "\n\n![gains](ablation.png)\n"
    for title, lines in parts.items():
        if len(lines) < 3:  # a table without a row
            continue
        text += f"\n## {title}\n\n" + "\n".join(lines) + "\n"
    page = results / "ablation.md"
    page.write_text(text, encoding="utf-8")
    chart(results / "ablation.png", runs)
    return page


def chart(path: Path, runs: dict) -> None:
    """GRPO's last epoch minus the RCE it started from, by row, with the seeds as dots."""
    try:
        import matplotlib
    except ImportError:
        print("no chart: pip install '.[plots]'")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "synthetic, expected true reward": ("synthetic", lambda run: _gain(points(run, "true_reward"))),
        "synthetic, greedy true reward": ("synthetic", lambda run: _gain(points(run, "true_greedy"))),
        "digits, accuracy at 1 shot": ("digits", lambda run: run["accuracy"]["grpo_last@1"] - run["accuracy"]["rce@1"]),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 5), constrained_layout=True)
    for axis, (title, (world, gain)) in zip(axes, panels.items(), strict=True):
        shown = [
            (row, seeds) for (w, row), seeds in runs.items() if w == world and phase(next(iter(seeds.values())), "grpo")
        ]
        for place, (_, seeds) in enumerate(reversed(shown)):
            values = [gain(run) for run in seeds.values()]
            mean, low, high = interval(values)
            color = "tab:green" if low > 0 else "tab:red" if high < 0 else "tab:gray"
            axis.plot(values, [place] * len(values), ".", color=color, alpha=0.4)
            axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=color, capsize=3)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(shown)), [row for row, _ in reversed(shown)])
        axis.set_title(title)
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel("GRPO's last epoch − its RCE")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _gain(point: dict[str, float]) -> float:
    return point["last"] - point["rce"]
