"""The plan of a command: its stages, which of them are done, LVLM calls, time and disk. Nothing is written."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from lever_lm.config.schema import Config, to_dict
from lever_lm.data import Example, StoredImage, VqaData, load_dataset, open_image
from lever_lm.data.embeddings import DEFAULT_WIDTH, Features, cached_features
from lever_lm.data.okvqa import OFFICIAL_SIZES
from lever_lm.lvlm import CachedLvlm, load_lvlm, tokens_of_pixels
from lever_lm.selectors import BASELINES
from lever_lm.tasks import TASKS
from lever_lm.training.environment import own_files
from lever_lm.training.preflight import ALL, disk_needed, examine, group_size
from lever_lm.training.rollouts.file_format import is_made, made_elsewhere, query_ids, read_rollouts, split_ids
from lever_lm.training.rollouts.generate import rollout_stamp
from lever_lm.training.rollouts.infoscore import infoscore_calls
from lever_lm.training.rollouts.propose import propose_groups, query_rows
from lever_lm.training.run_dir import Layout, RunFolder
from lever_lm.utils.device import resolve_device
from lever_lm.utils.errors import LeverError
from lever_lm.utils.file_hashes import DIGESTS
from lever_lm.utils.hub import model_folder, parameter_count
from lever_lm.utils.progress import duration, untracked

# Multiply-adds a second that are reached in practice: a first guess before a speed was measured.
_REACHED = {"cuda": 1e14, "cpu": 5e10}
_TEXT_TOKENS = 30  # of a question with its answer
_ENCODER_TOKENS = 257  # of an image, for CLIP ViT-L/14
_REFERENCES = 10  # different answers to a question of a dataset that is not here
_ANSWER, _PREDICTION = 300, 500  # bytes of an answer in the cache, of a prediction with its sample


def show_plan(
    pipeline,
    command: str,
    *,
    rl_data: Path | None = None,
    embeddings: Path | None = None,
    from_run: Path | None = None,
    shots: Sequence[int] = (),
    learned: int = 0,
    baselines: bool = False,
) -> dict:
    """Show and return the config and the paths of a command; for `rollout`, `train`, `infer` and `demo` also their
    stages and what is missing for them.

    rl_data, embeddings: rollouts and features of the user's own, else those of the run `from_run`, so that none are
    made. shots, learned, baselines: the numbers of demonstrations that are evaluated, the number of learned methods,
    and whether the baselines are evaluated too. LVLM calls are counted against the cache where data, features and model
    are here, else bounded from above.
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
    needs = ALL if rl_data is None or config.grpo.online else () if embeddings else ("data", "encoder")
    missing = [check for check in examine(config, layout, needs) if check.status != "ok"]
    if command != "infer" and rl_data is None and made_elsewhere(layout.rollouts):
        rl_data = layout.rollouts
    planner, stages = _Planner(config, layout), []
    if rl_data is None or not (embeddings or layout.exported.is_file()):
        stages.append(planner.features())
    if rl_data is not None:
        stages.append(Stage("rollouts", "there, not of `lever rollout`: taken as it is", str(rl_data)))
    elif command != "infer":
        stages.append(planner.rollouts())
    if command in ("train", "demo"):
        stages += planner.training(pipeline.run, rl_data)
    if shots:
        answers = learned * len(shots) + baselines * (1 + (len(BASELINES) - 1) * len(shots))  # zero-shot has one
        stages.append(planner.inference(answers, pipeline.inference))
    times = [stage.seconds for stage in stages]
    calls, size = (sum(getattr(stage, name) for stage in stages) for name in ("lvlm_calls", "bytes"))
    seconds = None if None in times else sum(times)
    total = Stage("in all", "", "", calls, all(stage.exact for stage in stages), seconds, size)
    for line in (*(check.line() for check in missing), *(stage.line() for stage in stages)):
        screen.say(line)
    screen.say(f"{total.line()}; estimates are good to a factor of 3")
    plan |= {"lvlm_calls": calls, "seconds": seconds, "bytes": size}
    return {**plan, "stages": [asdict(stage) for stage in stages], "missing": [vars(check) for check in missing]}


def show_places(pipeline) -> dict[str, str]:
    """Say and return the path of what each stage of a pipeline makes, and say whether it is there."""
    layout = pipeline.layout
    made = {"features": layout.features, "rollouts": layout.rollouts}
    made |= {"run": pipeline.run.path, "inference": pipeline.inference}
    for name, path in made.items():
        pipeline.screen.say(f"{name}: {path} ({'there' if path.exists() else 'to be made'})")
    return {name: str(path) for name, path in made.items()}


@dataclass(frozen=True)
class Stage:
    """One stage of a plan. seconds: None where nothing is known of the model; `exact` when the calls were counted
    against the cache and not bounded from above."""

    name: str
    state: str
    path: str
    lvlm_calls: int = 0
    exact: bool = True
    seconds: float | None = 0.0
    bytes: int = 0

    def line(self) -> str:
        """Return the stage as a line for the terminal."""
        calls = f"{'' if self.exact else 'at most '}{self.lvlm_calls:,} LVLM calls" if self.lvlm_calls else ""
        time = "time unknown" if self.seconds is None else f"about {duration(self.seconds)}"
        parts = [self.state, calls, "" if self.seconds is not None and self.seconds < 1 else time]
        parts.append(f"{self.bytes / 1e6:,.0f} MB" if self.bytes else "")
        return f"{self.name}: {', '.join(filter(None, parts))}{f' ({self.path})' if self.path else ''}"


class _Planner:
    """The plan of each stage, from the data, features and model that are here already."""

    def __init__(self, config: Config, layout: Layout):
        self.config, self.layout, self.disk = config, layout, disk_needed(config)
        self.data: VqaData | None = None
        self.known: Features | None = None
        self.lvlm: CachedLvlm | None = None
        self.sizes = OFFICIAL_SIZES.get(config.data.name, OFFICIAL_SIZES["okvqa"])
        with contextlib.suppress(LeverError):  # among what is missing; the plan is then an upper bound
            self.data = load_dataset(config.data)
            self.sizes = len(self.data.train_examples), len(self.data.val_examples)
            self.known = cached_features(self.data, config.features, layout.features)
            if layout.answers.is_file() and (config.lvlm.server or model_folder(config.lvlm.path)):
                where = {"device": config.device, "cache": layout.answers}
                self.lvlm = load_lvlm(config.lvlm, config.prompt, **where, track=untracked)

    def features(self) -> Stage:
        path = str(self.layout.features)
        if self.known is not None:
            return Stage("features", "there", path)
        seconds = self._seconds(self.config.features.encoder, sum(self.sizes), _ENCODER_TOKENS)
        return Stage("features", "to be made", path, seconds=seconds, bytes=self.disk["features"])

    def rollouts(self) -> Stage:
        path, rollout, rows = self.layout.rollouts, self.config.rollout, self.queries()
        size = self.disk["rollouts"] + self.disk["answers"] + self.disk["vision"]
        calls, exact = group_size(self.config) * self._calls(rows, rollout.gt_prob), False
        if self.known is not None:
            proposals = propose_groups(self.config, self.data, self.known)
            prompts = proposals.prompts(self.config, self.data.train_examples)
            calls, exact = len(prompts), True
            if self.lvlm is not None:
                if is_made(path, rollout_stamp(self.config, self.data, self.known.fingerprint, self.lvlm)):
                    return Stage("rollouts", "there", str(path))
                calls = self.lvlm.unknown(prompts)
            # As many rollouts more for each query, unknown before the search.
            calls += rollout.infoscore * self._calls(proposals.rows, rollout.gt_prob)
            if rollout.gt_prob:
                calls, exact = calls + sum(self._references(prompt.query) for prompt in prompts), False
        if search := infoscore_calls(self.config, rollout.pool_size):
            calls, exact = calls + search * len(rows), False
        state = "to be made again" if path.is_file() else "to be made"
        return Stage("rollouts", state, str(path), calls, exact, self._answering(calls, rollout.shots), size)

    def queries(self) -> list[int]:
        """The training rows that get a group; of a dataset that is not here, as many."""
        count = self.config.rollout.num_queries
        return query_rows(count, len(self.data.train_examples), self.config.seed) if self.data else list(range(count))

    def _calls(self, rows: list[int], scored: bool) -> int:
        """LVLM calls of one rollout of each query: the answer, and where it is `scored` each reference."""
        if not scored:
            return len(rows)
        train = self.data.train_examples if self.data else ()
        return sum(1 + (self._references(train[row]) if row < len(train) else _REFERENCES) for row in rows)

    def _references(self, query: Example) -> int:
        return len(TASKS[self.data.task].references(query))

    def training(self, run: RunFolder, rl_data: Path | None) -> list[Stage]:
        queries: list[int] = [] if rl_data else self.queries()
        if rl_data:
            with contextlib.suppress(LeverError):  # refused when it is read
                queries = query_ids(read_rollouts(rl_data), self.config.reward.max_groups)
        stages, rows, online = [], run.rows(), self.config.grpo
        width = self.known.train.image.shape[1] if self.known else DEFAULT_WIDTH
        flops = 12 * self.config.rollout.pool_size * width * self.config.policy.hidden_dim * len(queries)
        for phase, config in (("rce", self.config.rce), ("grpo", self.config.grpo)):
            done = [row for row in rows if row["phase"] == phase]
            left = max(0, config.epochs - len(done))
            times = [row["epoch_time"] for row in done if isinstance(row.get("epoch_time"), float)]
            each = sum(times) / len(times) if times else flops / _REACHED["cpu"]
            size = self.disk["checkpoints"] * left // max(1, self.config.rce.epochs + self.config.grpo.epochs)
            state = f"{len(done)} of {config.epochs} epochs there"
            stages.append(Stage(phase, state, str(run.path), seconds=each * left, bytes=size if left else 0))
        if online.online and left:
            rounds = sum((epoch - 1) % online.online_every == 0 for epoch in range(len(done) + 1, online.epochs + 1))
            scored = "gtprob" in self.config.reward.mode
            calls = rounds * online.online_samples * self._calls(sorted(split_ids(queries)[0]), scored)
            seconds = self._answering(calls, self.config.rollout.shots)
            stages.append(Stage("online rollouts", f"{rounds} rounds", "", calls, False, seconds, _ANSWER * calls))
        return stages

    def inference(self, answers: int, folder: Path) -> Stage:
        calls = answers * min(self.config.infer.num_queries or self.sizes[1], self.sizes[1])
        seconds = self._answering(calls, 4)
        return Stage("inference", "to be answered", str(folder), calls, False, seconds, _PREDICTION * calls)

    def _answering(self, calls: int, shots: int) -> float | None:
        """Seconds for LVLM calls: from the speed last measured with this model, else from its size."""
        if self.lvlm is not None and self.lvlm.speed:
            return calls / self.lvlm.speed
        if self.config.lvlm.server:
            return None if calls else 0.0
        tokens = (shots + 1) * (_TEXT_TOKENS + self._image_tokens())
        return self._seconds(self.config.lvlm.path, calls, tokens)

    def _image_tokens(self) -> float:
        """Return about how many tokens the first training image has."""
        pixels = 640 * 480
        if self.data is not None and not isinstance(image := self.data.train_examples[0].image, StoredImage):
            with contextlib.suppress(LeverError):  # refused when it is used
                pixels = math.prod(open_image(image).size)
        return tokens_of_pixels(pixels, self.config.lvlm)

    def _seconds(self, model: str, calls: int, tokens: float) -> float | None:
        """Seconds of forward passes by the model's size; None where it is not here."""
        if calls == 0:
            return 0.0
        with contextlib.suppress(LeverError):
            if folder := model_folder(model):
                reached = _REACHED.get(resolve_device(self.config.device).type, _REACHED["cuda"])
                return calls * tokens * parameter_count(folder) / reached
        return None
