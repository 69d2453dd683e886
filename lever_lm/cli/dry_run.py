"""What a command would do, without doing it: stages, what is there, LVLM calls, time and disk. Writes nothing."""

import contextlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from lever_lm.config.schema import Config
from lever_lm.data import StoredImage, VqaData, load_dataset, open_image
from lever_lm.data.embeddings import Features, cached_features
from lever_lm.lvlm import CachedLvlm, load_lvlm, tokens_of_pixels
from lever_lm.training.preflight import disk_needed, group_size
from lever_lm.training.rollouts.file_format import query_ids, read_rollouts, split_ids
from lever_lm.training.rollouts.generate import is_made, made_elsewhere, references, rollout_stamp
from lever_lm.training.rollouts.infoscore import infoscore_calls
from lever_lm.training.rollouts.propose import propose_groups, query_rows
from lever_lm.training.run_dir import Layout, RunFolder
from lever_lm.utils.device import resolve_device
from lever_lm.utils.errors import LeverError
from lever_lm.utils.hub import model_folder, parameter_count
from lever_lm.utils.progress import duration

# Multiply-adds a second that are reached in practice, for a first guess before anything was measured.
_REACHED = {"cuda": 1e14, "cpu": 5e10}
_TEXT_TOKENS = 30  # of a question with its answer
_REFERENCES = 10  # different answers to a question of a dataset that is not here


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
        """For the terminal."""
        parts = [self.state]
        if self.lvlm_calls:
            parts.append(f"{'' if self.exact else 'at most '}{self.lvlm_calls:,} LVLM calls")
        if self.seconds is None or self.seconds >= 1:
            parts.append("time unknown" if self.seconds is None else f"about {duration(self.seconds)}")
        if self.bytes:
            parts.append(f"{self.bytes / 1e6:,.0f} MB")
        return f"{self.name}: {', '.join(filter(None, parts))}{f' ({self.path})' if self.path else ''}"


def in_all(stages: list[Stage]) -> Stage:
    """The sums over a plan; the time is unknown where that of a stage is."""
    times = [stage.seconds for stage in stages]
    return Stage(
        "in all",
        "",
        "",
        sum(stage.lvlm_calls for stage in stages),
        all(stage.exact for stage in stages),
        None if None in times else sum(times),
        sum(stage.bytes for stage in stages),
    )


def as_json(stages: list[Stage]) -> list[dict]:
    """Plain values of a plan."""
    return [asdict(stage) for stage in stages]


def make_plan(
    config: Config,
    layout: Layout,
    run: RunFolder,
    command: str,
    *,
    rl_data: Path | None = None,
    embeddings: Path | None = None,
    answers: int = 0,
    inference: Path | None = None,
) -> list[Stage]:
    """The stages of a command (`rollout`, `train`, `infer`, `demo`).

    rl_data, embeddings: rollouts and features of the user's own, so that none are made. answers: evaluation prompts for
    each query; inference: the folder that they go to, by default the run's. What the cache knows is counted where data,
    features and model are here; else calls are bounded from above: no command asks more than its plan says.
    """
    planner = _Planner(config, layout)
    if command != "infer" and rl_data is None and made_elsewhere(layout.rollouts):
        rl_data = layout.rollouts
    with_features = rl_data is not None and (embeddings is not None or layout.exported.is_file())
    stages = [] if with_features else planner.features()
    if rl_data is not None:
        stages.append(Stage("rollouts", "there, not of `lever rollout`: taken as it is", str(rl_data)))
    elif command != "infer":
        stages.append(planner.rollouts())
    if command in ("train", "demo"):
        stages += planner.training(run, planner.queries() if rl_data is None else planner.queries_of(rl_data))
    if answers:
        stages.append(planner.inference(answers, inference or layout.inference))
    return stages


class _Planner:
    """What is known of data, features and model before any of them is made."""

    def __init__(self, config: Config, layout: Layout):
        self.config, self.layout, self.disk = config, layout, disk_needed(config)
        self.data: VqaData | None = None
        self.known: Features | None = None
        self.lvlm: CachedLvlm | None = None
        try:
            self.data = load_dataset(config.data)
            self.known = cached_features(self.data, config.features, layout.features)
            if layout.answers.is_file() and (config.lvlm.server or model_folder(config.lvlm.path)):
                where = {"device": config.device, "cache": layout.answers}
                self.lvlm = load_lvlm(config.lvlm, config.prompt, **where, track=lambda items, *_: items)
        except LeverError:
            pass  # `lever doctor` says what is missing; the plan is then an upper bound

    def features(self) -> list[Stage]:
        path = str(self.layout.features)
        if self.known is not None:
            return [Stage("features", "there", path)]
        count = len(self.data.train_examples) + len(self.data.val_examples) if self.data else 14055
        seconds = self._seconds(self.config.features.encoder, count, 257)
        return [Stage("features", "to be made", path, seconds=seconds, bytes=self.disk["features"])]

    def rollouts(self) -> Stage:
        path, rollout = self.layout.rollouts, self.config.rollout
        size = self.disk["rollouts"] + self.disk["answers"] + self.disk["vision"]
        rows = self.queries()
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
                calls += sum(len(references(prompt.query)) for prompt in prompts)
                exact = False
        if search := infoscore_calls(self.config, rollout.pool_size):
            calls, exact = calls + search * len(rows), False
        state = "to be made again" if path.is_file() else "to be made"
        seconds = self._answering(calls, rollout.shots)
        return Stage("rollouts", state, str(path), calls, exact, seconds, size)

    def queries(self) -> list[int]:
        """The training rows that get a group; of a dataset that is not here, as many."""
        count = self.config.rollout.num_queries
        return query_rows(count, len(self.data.train_examples), self.config.seed) if self.data else list(range(count))

    def queries_of(self, rl_data: Path) -> list[int]:
        """The training rows that have a group in a rollout file; none where it cannot be read."""
        with contextlib.suppress(LeverError):
            return query_ids(read_rollouts(rl_data), self.config.reward.max_groups)
        return []

    def _calls(self, rows: list[int], scored: bool) -> int:
        """LVLM calls of a rollout for each of these queries: the answer, and where it is `scored` that of each
        reference."""
        if not scored:
            return len(rows)
        train = self.data.train_examples if self.data else ()
        return sum(1 + (len(references(train[row])) if row < len(train) else _REFERENCES) for row in rows)

    def training(self, run: RunFolder, queries: list[int]) -> list[Stage]:
        stages, rows = [], run.rows()
        width = self.known.train.image.shape[1] if self.known else 768
        flops = 12 * self.config.rollout.pool_size * width * self.config.policy.hidden_dim * len(queries)
        for phase, config in (("rce", self.config.rce), ("grpo", self.config.grpo)):
            done = [row for row in rows if row["phase"] == phase]
            left = max(0, config.epochs - len(done))
            times = [row["epoch_time"] for row in done if isinstance(row.get("epoch_time"), float)]
            each = sum(times) / len(times) if times else flops / _REACHED["cpu"]
            size = self.disk["checkpoints"] * left // max(1, self.config.rce.epochs + self.config.grpo.epochs)
            state = f"{len(done)} of {config.epochs} epochs there"
            stages.append(Stage(phase, state, str(run.path), seconds=each * left, bytes=size if left else 0))
        if self.config.grpo.online and left:
            rounds = sum((epoch - 1) % config.online_every == 0 for epoch in range(len(done) + 1, config.epochs + 1))
            learnt = sorted(split_ids(queries)[0])
            calls = rounds * config.online_samples * self._calls(learnt, "gtprob" in self.config.reward.mode)
            seconds = self._answering(calls, self.config.rollout.shots)
            stages.append(Stage("online rollouts", f"{rounds} rounds", "", calls, False, seconds, 300 * calls))
        return stages

    def inference(self, answers: int, folder: Path) -> Stage:
        total = len(self.data.val_examples) if self.data else 5046
        calls = answers * min(self.config.infer.num_queries or total, total)
        seconds = self._answering(calls, 4)
        return Stage("inference", "to be answered", str(folder), calls, False, seconds, 500 * calls)

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
        folder = model_folder(model)
        if folder is None or calls == 0:
            return None if calls else 0.0
        parameters = parameter_count(folder)
        try:
            reached = _REACHED.get(resolve_device(self.config.device).type, _REACHED["cuda"])
        except LeverError:
            return None
        return calls * tokens * parameters / reached
