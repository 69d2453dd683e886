"""Runs that differ in their seed alone, as one: the accuracy of each method over seeds and queries."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lever_lm.config.schema import keys_of
from lever_lm.evaluation.report.curves import Evaluated, distinct_names
from lever_lm.evaluation.results import is_finite, read_samples, samples_file
from lever_lm.evaluation.statistics import interval_over_seeds
from lever_lm.selectors import named
from lever_lm.training.environment import recorded
from lever_lm.training.run_dir import RunFolder, differing
from lever_lm.utils.errors import LeverError
from lever_lm.utils.progress import WORTH_A_WORD, Track, Work, untracked

_ALIKE = {("seed",), *keys_of("command", "speed", "place")}  # keys in which runs of one table may differ
_ALL = "`lever infer` without --limit answers all queries in each (with it, every seed draws others)"
FEW = 5  # seeds, below which it is said that the interval is too narrow


@dataclass(frozen=True)
class OverSeeds:
    """seeds: those of the runs, in their order; none where the runs make no table. rows: of each method and number of
    shots that all runs evaluated method, shots, seeds (how many), n (queries), and what `interval_over_seeds` returns.
    notes: what is to be said of it."""

    seeds: list[int] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def over_seeds(runs: Sequence[Evaluated], track: Track = untracked) -> OverSeeds:
    """Return what runs make together that differ in their seed and in names, places and speed alone, over the queries
    that all of them answered with the same references. Raises LeverError where the samples cannot be read."""
    settings = [settings_of(one.run) for one in runs]
    seeds = [found.get("seed") for found in settings]
    if all(seed == seeds[0] for seed in seeds):
        return OverSeeds()
    if why := _hindrance(runs, settings, seeds):
        return OverSeeds(notes=[f"no table over seeds: {why}"])
    rows, cells = [], _in_all(runs)
    for method, shots in track(Work(cells, "results", after=WORTH_A_WORD), "samples", len(cells)):
        scores = shared_scores([one.inference for one in runs], method, shots)
        found = interval_over_seeds(scores) if scores[0] else {}
        if found and all(map(is_finite, found.values())):
            rows.append({"method": method, "shots": shots, "seeds": len(runs), "n": len(scores[0]), **found})
    if not rows:
        return OverSeeds(notes=[f"no table over seeds: no result of the same method and queries in all; {_ALL}"])
    return OverSeeds(seeds, rows, _notes(runs, rows))


def shared_scores(folders: Sequence[Path], method: str, shots: int) -> list[list[float]]:
    """Return the accuracies of a method in each of several evaluations, on the queries that all of them answered with
    the same references. Raises LeverError where the samples cannot be read."""
    samples = [read_samples(samples_file(folder, method, shots)) for folder in folders]
    first, *others = samples
    shared = [i for i in first if all(i in one and one[i].references == first[i].references for one in others)]
    return [[one[i].accuracy for i in shared] for one in samples]


def settings_of(run: RunFolder) -> dict:
    """Return the config of a run; {} where it has none, or none that can be read."""
    try:
        return run.settings()
    except LeverError:
        return {}


def _hindrance(runs: Sequence[Evaluated], settings: list[dict], seeds: list) -> str:
    """Return why runs of several seeds make no table; "" where they do."""
    names = distinct_names([one.run.path for one in runs])
    found = [key for other in settings[1:] for key, *_ in differing(settings[0], other) if key not in _ALIKE]
    keys = list(dict.fromkeys(map(".".join, found)))
    if unread := [name for name, one in zip(names, settings, strict=True) if type(one.get("seed")) is not int]:
        return f"{unread[0]} has no config.yaml that names its seed"
    if keys:
        return f"the configs differ in {', '.join(keys[:5])} too{f', and {len(keys) - 5} more keys' * (len(keys) > 5)}"
    if twice := [name for i, name in enumerate(names) if seeds[i] in seeds[:i]]:
        return f"{twice[0]} has the seed of a run before it; leave one of them out"
    if absent := [one.run.path.name for one in runs if not one.metrics["results"]]:
        return f"{absent[0]} was not evaluated; run `lever infer --baselines --run-name {absent[0]}`"
    if _differ(recorded(one.run, "fingerprints").get("data") for one in runs):
        return "the runs were trained on different data"
    if _differ(one.metrics["okvqa_stem"] for one in runs):
        return "predictions are reduced (infer.okvqa_stem) in some of the runs only; run `lever infer` again"
    return ""


def _differ(values) -> bool:
    first, *others = values
    return any(one != first for one in others)


def _in_all(runs: Sequence[Evaluated]) -> list[tuple[str, int]]:
    """Return method and shots of each result that all runs have, in the order of the first."""
    first, *others = ({(row["method"], row["shots"]): None for row in one.metrics["results"]} for one in runs)
    return [cell for cell in first if all(cell in one for one in others)]


def _notes(runs: Sequence[Evaluated], rows: list[dict]) -> list[str]:
    """Return what the reader of the table must know about it."""
    notes = []
    policies = [one.metrics["policies"] for one in runs]
    methods = [name for name in dict.fromkeys(row["method"] for row in rows) if name in policies[0]]
    if same := [named(name) for name in methods if not _differ(one.get(name) for one in policies)]:
        notes.append(f"the same policy in all the runs: {', '.join(same)}; their training is not in the interval")
    rollouts = [recorded(one.run, "inputs").get("rollouts") for one in runs]
    if rollouts[0] is not None and not _differ(rollouts):
        notes.append("all the runs learnt from the same rollouts; another draw of these is not in the interval")
    asked = {(row["method"], row["shots"]): row["n"] for one in runs for row in one.metrics["results"]}
    if any(row["n"] < asked[row["method"], row["shots"]] for row in rows):
        notes.append(f"some runs answered queries that others did not, which are left out; {_ALL}")
    if len(runs) < FEW:
        notes.append(f"{len(runs)} seeds are few: where seeds differ more than queries do, the interval is too narrow")
    return notes
