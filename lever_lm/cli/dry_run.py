"""The plan of a command: its stages, which of them are done, LVLM calls, time and disk. Nothing is written."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from lever_lm.config.schema import Config, to_dict
from lever_lm.data import VqaData
from lever_lm.data.embeddings import Features, cached_features
from lever_lm.data.okvqa import OFFICIAL_SIZES
from lever_lm.lvlm import CachedLvlm, load_lvlm
from lever_lm.selectors import BASELINES, SELECTORS, ZERO_SHOT
from lever_lm.tasks import load_data, task_of
from lever_lm.training.answer_validation import MOST
from lever_lm.training.environment import own_files
from lever_lm.training.preflight import ALL, disk_needed, examine, group_size
from lever_lm.training.rollouts.file_format import made_of, query_ids, read_rollouts, split_ids, why_made_again
from lever_lm.training.rollouts.generate import rollout_stamp
from lever_lm.training.rollouts.infoscore import infoscore_calls
from lever_lm.training.rollouts.propose import propose_groups, query_rows
from lever_lm.training.run_dir import Layout, RunFolder
from lever_lm.utils.checks import Check
from lever_lm.utils.errors import LeverError
from lever_lm.utils.file_hashes import DIGESTS
from lever_lm.utils.hub import model_folder
from lever_lm.utils.progress import duration, untracked

_REFERENCES = 10  # different answers to a question of a dataset that is not here


def show_plan(
    pipeline,
    command: str,
    *,
    rl_data: Path | None = None,
    embeddings: Path | None = None,
    from_run: Path | None = None,
    shots: Sequence[int] = (),
    baselines: bool = False,
    against: Sequence[str] = (),
) -> dict:
    """Show and return the config and the paths of a command; for `rollout`, `train`, `infer` and `demo` also their
    stages and what is missing for them.

    rl_data, embeddings: rollouts and features of the user's own, else those of the run `from_run`, so that none are
    made. shots, baselines, against: the numbers of demonstrations that are evaluated, whether the baselines are, too,
    and which selectors. LVLM calls are counted against the cache where data, features and model are here, else bounded
    from above.
    """
    DIGESTS.keep_in(None)
    config, layout, screen = pipeline.config, pipeline.layout, pipeline.screen
    for line in yaml.safe_dump(to_dict(config), sort_keys=False).splitlines():
        screen.say(line)
    plan = {"config": to_dict(config), "paths": show_places(pipeline)}
    if not command:
        return plan
    files = own_files(RunFolder(from_run)) if from_run is not None else {}
    rl_data, embeddings = rl_data or files.get("rl_data"), embeddings or files.get("embeddings")
    asks = command not in ("train", "demo") or config.needs_rollouts
    needs = () if embeddings else ("data", "encoder")
    answered = command in ("train", "demo") and config.validate_on == "answers"
    needs = ALL if answered or (asks and (rl_data is None or config.grpo.online)) else needs
    missing = [check for check in examine(config, layout, needs) if check.status != "ok"]
    if command != "infer" and asks and rl_data is None and made_of(layout.rollouts) == {}:
        rl_data = layout.rollouts
    planner, stages = _Planner(config, layout), []
    if planner.lacking and "data" in needs and not any("data" in check.what for check in missing):
        found, _, mend = planner.lacking.partition("; ")
        missing.append(Check("data", "missing", found, mend))
    if rl_data is None or not (embeddings or layout.exported.is_file()):
        made = "there" if planner.known is not None else "to be made"
        stages.append(Stage("features", made, str(layout.features)))
    if rl_data is not None:
        stages.append(Stage("rollouts", "there, not of `lever rollout`: taken as it is", str(rl_data)))
    elif command != "infer" and asks:
        stages.append(planner.rollouts())
    if command in ("train", "demo"):
        stages += planner.training(pipeline.run, rl_data)
    if shots:
        learned = 1 if command != "demo" else 2 if "match" in config.warmups else 3
        others = dict.fromkeys([*(BASELINES if baselines else ()), *against])
        answers = learned * len(shots) + sum(1 if name == ZERO_SHOT else len(shots) for name in others)
        answers += sum(SELECTORS[name].calls for name in others)
        stages.append(planner.inference(answers, pipeline.inference))
    times, calls = [stage.seconds for stage in stages], sum(stage.lvlm_calls for stage in stages)
    total = Stage("in all", "", "", calls, all(stage.exact for stage in stages), None if None in times else sum(times))
    for line in (*(check.line() for check in missing), *(stage.line() for stage in (*stages, total))):
        screen.say(line)
    size = sum(disk_needed(config).values())
    screen.say(f"disk: at most about {size / 1e6:,.0f} MB, with what is there")
    plan |= {"lvlm_calls": calls, "seconds": total.seconds, "bytes": size}
    return {**plan, "stages": [asdict(stage) for stage in stages], "missing": [vars(check) for check in missing]}


def show_places(pipeline) -> dict[str, str]:
    """Say and return the path of what each stage of a pipeline makes, and say whether it is there."""
    layout = pipeline.layout
    made = {"features": layout.features} | ({"rollouts": layout.rollouts} if pipeline.config.needs_rollouts else {})
    made |= {"run": pipeline.run.path, "inference": pipeline.inference}
    for name, path in made.items():
        pipeline.screen.say(f"{name}: {path} ({'there' if path.exists() else 'to be made'})")
    return {name: str(path) for name, path in made.items()}


@dataclass(frozen=True)
class Stage:
    """One stage of a plan. `exact` when its LVLM calls were counted against the cache and not bounded from above;
    seconds: for these calls, None where the model's speed is not known."""

    name: str
    state: str
    path: str
    lvlm_calls: int = 0
    exact: bool = True
    seconds: float | None = 0.0

    def line(self) -> str:
        """Return the stage as a line for the terminal."""
        time = "time unknown" if self.seconds is None else f"about {duration(self.seconds)}"
        calls = f"{'' if self.exact else 'at most '}{self.lvlm_calls:,} LVLM calls, {time}" if self.lvlm_calls else ""
        said = ", ".join(filter(None, [self.state, calls])) or "no LVLM calls"
        return f"{self.name}: {said}{f' ({self.path})' if self.path else ''}"


class _Planner:
    """The plan of each stage, from the data, features and model that are here already."""

    def __init__(self, config: Config, layout: Layout):
        self.config, self.layout = config, layout
        self.data: VqaData | None = None
        self.known: Features | None = None
        self.lvlm: CachedLvlm | None = None
        self.lacking = ""  # why the data cannot be read
        self.queries = OFFICIAL_SIZES.get(config.data.name, OFFICIAL_SIZES["okvqa"])[1]
        with contextlib.suppress(LeverError):  # among what is missing; the plan is then an upper bound
            try:
                self.data = load_data(config.data)
            except LeverError as error:
                self.lacking = str(error)
                raise
            self.queries = len(self.data.val_examples)
            self.known = cached_features(self.data, config.features, layout.features)
            if layout.answers.is_file() and (config.lvlm.server or model_folder(config.lvlm.path)):
                where = {"device": config.device, "cache": layout.answers}
                self.lvlm = load_lvlm(config.lvlm, config.prompt, **where, track=untracked)

    def rollouts(self) -> Stage:
        path, rollout, rows = self.layout.rollouts, self.config.rollout, self.rows()
        calls = group_size(self.config) * self._calls(rows, rollout.gt_prob)
        calls, exact = calls + infoscore_calls(self.config, rollout.pool_size) * len(rows), False
        if self.known is not None:
            made, inputs = made_of(path), (self.config, self.data, self.known.fingerprint, self.lvlm)
            if self.lvlm is not None and made and not why_made_again(made, rollout_stamp(*inputs)):
                return Stage("rollouts", "there", str(path))
            if not (rollout.gt_prob or rollout.infoscore):  # else the calls hang on answers and scores
                proposals = propose_groups(self.config, self.data, self.known)
                prompts = proposals.prompts(self.config, self.data.train_examples)
                calls, exact = self.lvlm.unknown(prompts) if self.lvlm else len(prompts), not rollout.probe
        state = "to be made again" if path.is_file() else "to be made"
        return Stage("rollouts", state, str(path), calls, exact, self._seconds(calls))

    def rows(self) -> list[int]:
        """The training rows that get a group; of a dataset that is not here, as many."""
        count = self.config.rollout.num_queries
        return query_rows(count, len(self.data.train_examples), self.config.seed) if self.data else list(range(count))

    def _calls(self, rows: list[int], scored: bool) -> int:
        """LVLM calls of one rollout of each query, at most: the answer, and where it is `scored` each reference."""
        if not scored:
            return len(rows)
        train = self.data.train_examples if self.data else ()
        known = [len(task_of(self.data).references(train[row])) for row in rows if row < len(train)]
        return len(rows) + sum(known) + _REFERENCES * (len(rows) - len(known))

    def training(self, run: RunFolder, rl_data: Path | None) -> list[Stage]:
        stages, rows, online, missing = [], run.rows(), self.config.grpo, 0
        for phase, config in (("rce", self.config.rce), ("grpo", self.config.grpo)):
            done = sum(row["phase"] == phase for row in rows)
            left = max(0, config.epochs - done)
            missing += left
            name = self.config.warmup if phase == "rce" else phase
            stages.append(Stage(name, f"{done} of {config.epochs} epochs there", str(run.path)))
        if online.online and left:
            rounds = sum((epoch - 1) % online.online_every == 0 for epoch in range(done + 1, online.epochs + 1))
            queries = self._queries(rl_data)
            scored = "gtprob" in self.config.reward.mode
            calls = rounds * online.online_samples * self._calls(sorted(split_ids(queries)[0]), scored)
            stages.append(Stage("online rollouts", f"{rounds} rounds", "", calls, False, self._seconds(calls)))
        if self.config.validate_on == "answers" and missing:
            calls = missing * min(MOST, len(split_ids(self._queries(rl_data))[1]))
            stages.append(Stage("validation", f"{missing} epochs", "", calls, False, self._seconds(calls)))
        return stages

    def _queries(self, rl_data: Path | None) -> list[int]:
        """The queries of the rollouts, of a file of the user's own or as they are drawn."""
        most = self.config.reward.max_groups
        return query_ids(read_rollouts(rl_data), most) if rl_data else self.rows()[: most or None]

    def inference(self, answers: int, folder: Path) -> Stage:
        calls = answers * min(self.config.infer.num_queries or self.queries, self.queries)
        return Stage("inference", "to be answered", str(folder), calls, False, self._seconds(calls))

    def _seconds(self, calls: int) -> float | None:
        """Seconds for LVLM calls at the speed last measured with this model; None where there is none."""
        speed = self.lvlm.speed if self.lvlm is not None else None
        return calls / speed if speed else None if calls else 0.0
