"""The stages of a training in their order, each made where it is missing: data → features → rollouts → training →
selection → conversion. evaluation/run.py goes on from there."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch

from lever_lm.config.schema import Config
from lever_lm.data.embeddings import features_fingerprint
from lever_lm.data.encoder import fetch_encoder
from lever_lm.selectors.fixed_set import split_of
from lever_lm.tasks import load_data
from lever_lm.training.answer_validation import answer_accuracy, validation_calls
from lever_lm.training.batches import GroupTensors
from lever_lm.training.convert import convert
from lever_lm.training.environment import compare as compare_runs
from lever_lm.training.environment import environment, own_files, record, verdict
from lever_lm.training.find_checkpoint import find_checkpoint
from lever_lm.training.grpo import train_grpo
from lever_lm.training.inputs import (
    Source,
    check_kind,
    check_own_features,
    check_scores,
    read_source,
    source_of_dataset,
    source_of_file,
)
from lever_lm.training.metrics import recommended_by
from lever_lm.training.nan_debug import detecting
from lever_lm.training.preflight import ALL, examine
from lever_lm.training.rce import NO_POINTER, warm_up
from lever_lm.training.rollouts.file_format import made_of, rollout_calls, why_made_again
from lever_lm.training.rollouts.generate import check_rows, make_rollouts, online_rewards, rollout_stamp
from lever_lm.training.run_dir import LOCK, Layout, RunFolder, inference_folder
from lever_lm.training.run_state import Journal, state_of
from lever_lm.training.select_checkpoint import choose, read_history, worth_keeping
from lever_lm.training.stages import Stages
from lever_lm.training.tensorboard import TRACKERS, TensorBoard
from lever_lm.training.validation import Validate
from lever_lm.training.warmup import MatchGroups, match_hint, new_learner
from lever_lm.utils.atomic_io import file_digest
from lever_lm.utils.checks import require
from lever_lm.utils.console import Screen
from lever_lm.utils.device import resolve_device
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.fingerprint import CODE
from lever_lm.utils.locks import alone


class Pipeline(Stages):
    """The stages of one config over one results folder, up to a checkpoint.

    Under torchrun `rollouts` is a call of the whole job: its processes share the questions to the LVLM, each does the
    rest for itself, and the leader alone writes. The other stages are the work of one process.
    """

    def __init__(
        self,
        config: Config,
        screen: Screen,
        *,
        results: Path | str = "results",
        run_name: str | None = None,
        run_dir: Path | None = None,
    ):
        super().__init__(config, Layout(config, results, run_name), screen.say, screen.track)
        self.screen = screen
        self.run = RunFolder(run_dir or self.layout.run)
        self.inference = inference_folder(run_dir) if run_dir else self.layout.inference
        self.checkpoint: tuple[Path, str] | None = None  # the one that a command on a run uses, and why
        self.detect_anomaly = False  # in training, for the module and operation of a NaN
        self.tracker: str | None = None  # the name of one, see tensorboard.py

    def check(self, *needs: str, writes: bool = True) -> None:
        """Raise LeverError with all that is missing for a command, before anything is loaded or made. writes: the
        results folder has to take what is made."""
        found = examine(self.config, self.layout, needs, wait=self.config.lvlm.wait, say=self.say)
        require(check for check in found if writes or check.what not in ("results", "disk"))

    # ------------------------------------------------------------------ rollouts

    def rollouts(self) -> dict:
        """Make the rollout file where needed. Returns the group report with the file's path."""
        self.check(*ALL)
        # What is missing is said before features are made.
        with self.shards.leader_first():
            fetch_encoder(self.config.features.encoder)
        data, lvlm, path = self.data, self.lvlm, self.layout.rollouts
        with self._alone_with(path):
            report = make_rollouts(self.config, data, self.features, lvlm, path, self.say)
        self.screen.detail(lvlm.tally)
        self.screen.result(
            f"rollouts: {report['groups']} groups, {report['rollouts']} rollouts, mean accuracy "
            f"{report['accuracy']:.3f}; {report['tied']} groups tied in accuracy, "
            f"{report['all_right']} all right, {report['all_wrong']} all wrong"
        )
        return {**report, "path": str(path)}

    @contextlib.contextmanager
    def _alone_with(self, path: Path) -> Iterator[None]:
        """Keep a file to this process, or to the job whose leader it is."""
        if not self.shards.leader:
            yield
            return
        with alone(path.with_name(f".{path.name}{LOCK}"), str(path), "make another one with --run-name NAME"):
            yield

    # ------------------------------------------------------------------ training

    def train(
        self,
        *,
        rl_data: Path | None = None,
        embeddings: Path | None = None,
        overwrite: bool = False,
        from_run: Path | None = None,
        dataset_named: bool = False,
    ) -> dict:
        """Train by RCE, then GRPO, resuming what is there; convert the recommended checkpoint. Returns what was
        recommended, and with `from_run`, the folder of a run that this one repeats, what differs from it.

        dataset_named: rl_data is of this dataset, also where it does not say so. Raises LeverError where another
        process is at work in the run's folder."""
        original = None if from_run is None else RunFolder(from_run)
        if original is not None:
            if original.path.resolve() == self.run.path.resolve():
                raise UsageError(f"{from_run} cannot be repeated in itself: another --run-name or --run-dir")
            own, dataset_named = own_files(original), dataset_named or rl_data is None
            rl_data, embeddings = rl_data or own.get("rl_data"), embeddings or own.get("embeddings")
        with self.run.alone(self.say):
            trained = self.train_here(rl_data, embeddings, overwrite, dataset_named)
        if original is None:
            return trained
        repeated = compare_runs(original, self.run, self.config)
        for line in verdict(repeated):
            self.screen.result(line)
        return {**trained, "repeated": repeated}

    def train_here(
        self, rl_data: Path | None, embeddings: Path | None, overwrite: bool, dataset_named: bool = False
    ) -> dict:
        """Do the work of `train` in a run folder that is kept to this process already."""
        if not overwrite:
            self.run.check(self.config)  # before the costly part, not after it
            self._check_inputs(rl_data, embeddings)
        source = self._source(rl_data, embeddings, dataset_named)
        train, val = read_source(source, self.config, self.say) if source.rollouts else (None, None)
        for groups in filter(None, (train, val)):
            check_kind(self.config.warmups[-1], groups, source.rollouts)
        device = resolve_device(self.config.device)
        initial = new_learner(self.config, source.icds.shape[1], len(source.icds))
        policy = new_learner(self.config, source.icds.shape[1], len(source.icds)).to(device)
        inputs = {"rollouts": file_digest(source.rollouts)} if source.rollouts else {}
        inputs["features"] = source.stamp
        made_from = {**inputs, "training code": str(CODE["training"])}
        if not overwrite and self.run.state.is_file():
            state_of(self.run, made_from, policy)  # a run that is refused stays as it was
        self.keep_source()
        self.run.open(self.config, overwrite=overwrite)
        record(self.run, environment(self.config, inputs, source.made_of, source.files), self.say)
        also, asked = self._measure(val)
        own = {"policy": policy.shape, **source.made_for, "seed": self.config.seed, **self._cost(source, asked)}
        # Answer match asks nothing, whatever the rollouts cost that GRPO learns from after it.
        of_phase = {"rce": {"lvlm_calls": asked}} if self.config.warmup == "match" else {}
        journal = self._journal(own, made_from, of_phase)
        torch.manual_seed(self.config.seed)
        if train is not None:
            train, val = train.to(device), val.to(device)
            if self.config.warmup == "rce" and self.config.rce.epochs and "encoder" in source.made_for:
                self.say(match_hint(train, self.data))
        answer = None
        if self.config.grpo.online:
            answer = online_rewards(self.config, self.data, train.rows, train.pools, self.lvlm)
        grpo = {"val_temperature": self.config.rce.temperature_end, "answer": answer, "also": also}
        with detecting(policy, self.say) if self.detect_anomaly else contextlib.nullcontext():
            matches = self._matches if "match" in self.config.warmups else None
            given = source.rollouts if "rl_data" in source.files else None
            warm_up(policy, train, val, self.config, journal, matches=matches, rl_data=given, also=also)
            if train is not None:
                train_grpo(policy, initial, train, val, self.config.grpo, journal, **grpo)
        recommended = self.recommend()
        try:
            converted = self.convert(Path(recommended["checkpoint"]))["output"]
        except LeverError as error:  # the run is sound; only the older format cannot hold its policy
            self.say(f"not converted: {error}")
            converted = None
        return {"run": str(self.run.path), "recommended": recommended, "converted": converted}

    def _cost(self, source: Source, asked: int) -> dict:
        """Return what a checkpoint says of what it learnt from: the warm-up, where it is not RCE, the LVLM calls that
        were made for it, where they are known, with those `asked` for validation and without those of online rounds,
        and the training split whose examples alone it can choose."""
        calls = rollout_calls(source.rollouts) if source.rollouts else 0
        own = {} if calls is None else {"lvlm_calls": calls + asked}
        if self.config.warmup in NO_POINTER and "encoder" in source.made_for:
            own["train_split"] = split_of(self.data.train_examples)
        return own if self.config.warmup == "rce" else {**own, "warmup": self.config.warmup}

    @cached_property
    def _matches(self) -> MatchGroups:
        return MatchGroups(self.config, self.data, self.features)

    def _tell_matches(self, rl_data: Path | None = None) -> None:
        """Say how dense matches are where the warm-up learns from them, before anything is asked or trained. rl_data:
        a rollout file of the user's own. Raises LeverError where there is no match."""
        if "match" in self.config.warmups and self.config.rce.epochs:
            self.say(self._matches.density(self._matches.split(rl_data)[0]))

    def _measure(self, val: GroupTensors | None) -> tuple[Validate | None, int]:
        """Return what measures an epoch by the LVLM's answers, None where nothing does, and the calls of all epochs."""
        if self.config.validate_on == "rollouts":
            return None, 0
        if val is None:  # the queries and pools that rollouts would have
            val = self._matches.all(self._matches.split()[1], 0)
        val = val.to(resolve_device(self.config.device))
        return answer_accuracy(self.config, self.data, val, self.lvlm), validation_calls(self.config, len(val))

    def _journal(self, own: dict, inputs: dict[str, str], of_phase: dict[str, dict]) -> Journal:
        """Return the journal of the run, up to date; own: what its checkpoints carry, of_phase: those of one phase."""
        keep = partial(worth_keeping, self.run, latest=self.config.keep) if self.config.keep else None
        shown = {"track": self.track, "tracker": self.tracking}
        journal = Journal(self.run, own, inputs, self.say, keep, of_phase=of_phase, **shown)
        journal.resume()
        if journal.done("grpo") > self.config.grpo.epochs:
            self.say(f"the run has {journal.done('grpo')} GRPO epochs already: nothing is left to train")
        return journal

    def _check_inputs(self, rl_data: Path | None, embeddings: Path | None) -> None:
        """Raise LeverError where the run that is there was begun on other data, features or answers, before anything is
        made for it or asked."""
        if embeddings is not None or self.layout.exported.is_file() or not self.run.state.is_file():
            return
        asks = self.config.asks if rl_data is None else self.config.validate_on == "answers"
        self.check(*(ALL if asks else ("data", "encoder")))
        fetch_encoder(self.config.features.encoder)
        data = load_data(self.config.data)
        features = features_fingerprint(data, self.config.features)
        state_of(self.run, {"features": features})
        path = self.layout.rollouts
        if not self.config.needs_rollouts:
            return
        made = made_of(path) if rl_data is None else None
        if made and (why := why_made_again(made, rollout_stamp(self.config, data, features, self.lvlm))):
            raise LeverError(
                f"the run in {self.run.path} was begun on {path} as it is, and it would be made again: {why}. Choose "
                "another folder with --run-name NAME, or start over with --overwrite"
            )

    @cached_property
    def tracking(self) -> TensorBoard | None:
        """The tracker that the metrics go to besides the run's own files, if any."""
        if self.tracker is None:
            return None
        self.say(f"tracker: tensorboard --logdir {self.run.path}")
        return TRACKERS[self.tracker](self.run)

    def _source(self, rl_data: Path | None, embeddings: Path | None, dataset_named: bool) -> Source:
        """Return rollouts and features to train on: made here; or the rollouts that are there, with the features in a
        file, those that Lever-Plus exported, or those of the dataset whose rows the rollouts name."""
        if "match" in self.config.warmups and embeddings is not None:
            raise UsageError(f"warmup={self.config.warmup} compares answers of the dataset: leave --embeddings out")
        if not self.config.needs_rollouts:
            if rl_data is not None:
                raise UsageError("warmup=match learns from no rollouts: leave --rl-data out, or give --grpo-epochs")
            self.check(*(ALL if self.config.asks else ("data", "encoder")))
            self._tell_matches()
            return replace(source_of_dataset(self, self.layout.rollouts), rollouts=None, files={})
        if rl_data is None and made_of(self.layout.rollouts) == {}:
            rl_data, dataset_named = self.layout.rollouts, True
            self.say(f"rollouts: {rl_data} was not made by `lever rollout` and is taken as it is")
        if rl_data is None:
            if embeddings is not None:
                raise UsageError("--embeddings belongs to rollouts of your own: name them with --rl-data FILE")
            check_scores(self.config)
            self.check(*ALL)
            self._tell_matches()
            self.rollouts()
            return source_of_dataset(self, None)
        if embeddings is None and self.layout.exported.is_file():
            embeddings = self.layout.exported
            self.say(f"features: {embeddings}, as exported by Lever-Plus")
            if "match" in self.config.warmups:
                raise UsageError(
                    f"warmup={self.config.warmup} compares answers of the dataset, and {embeddings} are features of "
                    "Lever-Plus's own: --set warmup=rce, or move that file"
                )
        if embeddings is not None:
            check_own_features(self.config, embeddings, self.say)
            self.check()
            return source_of_file(rl_data, embeddings, self.config.data.name if dataset_named else None)
        asks = self.config.grpo.online or self.config.validate_on == "answers"
        self.check(*(ALL if asks else ("data", "encoder")))
        check_rows(rl_data, self.data.train_examples, named=dataset_named)
        self._tell_matches(rl_data)
        return source_of_dataset(self, rl_data)

    def recommend(self) -> dict:
        """Return the checkpoint that `train` and `demo` recommend: the best by val_accuracy where it was measured, else
        by val_reward."""
        history = read_history(self.run, None)
        answer = choose(history, recommended_by(history.rows), self.run)
        if answer["epoch"] is None:
            raise LeverError(f"no checkpoint of {self.run.path} can be recommended: {answer['why']}")
        self.screen.result(f"recommended: {answer['checkpoint']} ({answer['why']})")
        return answer

    def convert(self, path: Path | None = None, **options) -> dict:
        """Convert a checkpoint, by default the run's best; options and result: as of `convert.convert`."""
        if path is None:
            path, why = find_checkpoint(self.run, "best", {})
            self.say(f"checkpoint: {path} ({why})")
        return convert(path, self.screen, **options)
