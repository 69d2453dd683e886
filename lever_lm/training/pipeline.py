"""Which stages a training needs, what is already there, and in what order: data → features → rollouts → training →
selection → conversion. evaluating.py goes on from there."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from lever_lm.config.schema import Config, FeatureConfig
from lever_lm.data import load_dataset
from lever_lm.data.embeddings import features_fingerprint, read_embeddings
from lever_lm.selectors.pointer.checkpoint import format_of, read_checkpoint, save_torch, to_v2, to_v3
from lever_lm.training.batches import GroupTensors, to_tensors
from lever_lm.training.environment import compare as compare_runs
from lever_lm.training.environment import environment, own_files, record, verdict
from lever_lm.training.find_checkpoint import find_checkpoint
from lever_lm.training.grpo import train_grpo
from lever_lm.training.metrics import RECOMMENDED
from lever_lm.training.nan_debug import detecting
from lever_lm.training.preflight import ALL, examine
from lever_lm.training.rce import train_rce
from lever_lm.training.rollouts.file_format import (
    made_elsewhere,
    read_groups,
    split_ids,
    why_made_again,
)
from lever_lm.training.rollouts.generate import check_rows, make_rollouts, online_rewards, rollout_stamp
from lever_lm.training.rollouts.propose import new_policy
from lever_lm.training.run_dir import LOCK, Layout, RunFolder, inference_folder, v2_name
from lever_lm.training.run_state import Journal, state_of
from lever_lm.training.select_checkpoint import choose, read_history, worth_keeping
from lever_lm.training.stages import Stages
from lever_lm.training.tensorboard import TRACKERS, TensorBoard
from lever_lm.utils.atomic_io import file_digest
from lever_lm.utils.checks import require
from lever_lm.utils.console import Screen
from lever_lm.utils.device import resolve_device
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.fingerprint import CODE
from lever_lm.utils.hub import fetch_model
from lever_lm.utils.locks import alone


@dataclass(frozen=True)
class Source:
    """What a policy is trained on: a rollout file, features (N, D) of queries and ICDs, their fingerprint, what a
    checkpoint should say of them, the fingerprints of what they were made of, and files of somebody's own."""

    rollouts: Path
    queries: Tensor
    icds: Tensor
    stamp: str
    made_for: dict[str, str]
    made_of: dict[str, str]
    files: dict[str, str]


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
        self.checkpoint: tuple[Path, str] | None = None  # that a command on a run uses, and why this one
        self.detect_anomaly = False  # in training, for the module and operation of a NaN
        self.tracker: str | None = None  # where the metrics of a training go besides the run's own files

    def check(self, *needs: str, writes: bool = True) -> None:
        """Raise LeverError with all that is missing for a command, before anything is loaded or made. writes: the
        results folder has to take what is made."""
        found = examine(self.config, self.layout, needs, wait=self.config.lvlm.wait, say=self.screen.say)
        require(check for check in found if writes or check.what not in ("results", "disk"))

    # ------------------------------------------------------------------ rollouts

    def rollouts(self) -> dict:
        """The rollout file, made where needed. Returns the group report with the file's path."""
        self.check(*ALL)
        # What is missing is said before features are made.
        with self.shards.leader_first():
            fetch_model(self.config.features.encoder, "features.encoder")
        data, lvlm, path = self.data, self.lvlm, self.layout.rollouts
        with self._alone_with(path):
            report = make_rollouts(self.config, data, self.features, lvlm, path, self.screen.say)
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
        """RCE, then GRPO, resuming what is there; converts the recommended checkpoint. Returns what was recommended,
        and with `from_run`, the folder of a run that this one repeats, what differs from it. `dataset_named`: rl_data
        is of this dataset, also where it does not say so. Raises LeverError where another process is at work in the
        run's folder."""
        if from_run is None:
            with self.run.alone(self.screen.say):
                return self.train_here(rl_data, embeddings, overwrite, dataset_named)
        original = RunFolder(from_run)
        if original.path.resolve() == self.run.path.resolve():
            raise UsageError(f"{from_run} cannot be repeated in itself: another --run-name or --run-dir")
        own = {**own_files(original), **({"rl_data": rl_data} if rl_data else {})}
        with self.run.alone(self.screen.say):
            files = (own.get("rl_data"), embeddings or own.get("embeddings"))
            trained = self.train_here(*files, overwrite, dataset_named or rl_data is None)
        repeated = compare_runs(original, self.run, self.config)
        for line in verdict(repeated):
            self.screen.result(line)
        return {**trained, "repeated": repeated}

    def train_here(
        self, rl_data: Path | None, embeddings: Path | None, overwrite: bool, dataset_named: bool = False
    ) -> dict:
        """`train` in a run folder that is kept to this process already."""
        if not overwrite:
            self.run.check(self.config)  # before the costly part, not after it
            self._check_inputs(rl_data, embeddings)
        source = self._source(rl_data, embeddings, dataset_named)
        train, val = self._groups(source.rollouts, source.queries, source.icds)
        device = resolve_device(self.config.device)
        initial = new_policy(self.config, source.icds.shape[1])
        policy = new_policy(self.config, source.icds.shape[1]).to(device)
        inputs = {"rollouts": file_digest(source.rollouts), "features": source.stamp}
        made_from = {**inputs, "training code": str(CODE["training"])}
        if not overwrite and self.run.state.is_file():
            state_of(self.run, made_from, policy)  # a run that is refused stays as it was
        self.run.open(self.config, overwrite=overwrite)
        record(self.run, environment(self.config, inputs, source.made_of, source.files), self.screen.say)
        own = {"policy": policy.shape, **source.made_for, "seed": self.config.seed}
        keep = partial(worth_keeping, self.run, latest=self.config.keep) if self.config.keep else None
        beside = {"detail": self.screen.detail, "track": self.screen.track, "tracker": self.tracking}
        journal = Journal(self.run, own, made_from, self.screen.say, keep, **beside)
        journal.resume()
        if journal.done("grpo") > self.config.grpo.epochs:
            self.screen.say(f"the run has {journal.done('grpo')} GRPO epochs already: nothing is left to train")
        torch.manual_seed(self.config.seed)
        train, val = train.to(device), val.to(device)
        answer = None
        if self.config.grpo.online:
            answer = online_rewards(self.config, self.data, train.rows, train.pools, self.lvlm)
        grpo = {"val_temperature": self.config.rce.temperature_end, "answer": answer}
        with detecting(policy, self.screen.say) if self.detect_anomaly else contextlib.nullcontext():
            train_rce(policy, train, val, self.config.rce, journal)
            train_grpo(policy, initial, train, val, self.config.grpo, journal, **grpo)
        recommended = self.recommend()
        try:
            converted = self.convert(Path(recommended["checkpoint"]))["output"]
        except LeverError as error:  # the run is sound; only the older format cannot hold its policy
            self.screen.say(f"not converted: {error}")
            converted = None
        return {"run": str(self.run.path), "recommended": recommended, "converted": converted}

    def _check_inputs(self, rl_data: Path | None, embeddings: Path | None) -> None:
        """Raise LeverError where the run that is there was begun on other data, features or answers, before anything is
        made for it or asked."""
        if embeddings is not None or self.layout.exported.is_file() or not self.run.state.is_file():
            return
        self.check(*(ALL if rl_data is None else ("data", "encoder")))
        fetch_model(self.config.features.encoder, "features.encoder")
        data = load_dataset(self.config.data)
        features = features_fingerprint(data, self.config.features)
        state_of(self.run, {"features": features})
        path = self.layout.rollouts
        if rl_data is not None or made_elsewhere(path):
            return
        if why := why_made_again(path, rollout_stamp(self.config, data, features, self.lvlm)):
            raise LeverError(
                f"the run in {self.run.path} was begun on {path} as it is, and it would be made again: {why}. Choose "
                "another folder with --run-name NAME, or start over with --overwrite"
            )

    @cached_property
    def tracking(self) -> TensorBoard | None:
        """Where the metrics go besides the run's own files; None for nowhere."""
        if self.tracker is None:
            return None
        self.screen.say(f"tracker: tensorboard --logdir {self.run.path}")
        return TRACKERS[self.tracker](self.run)

    def _source(self, rl_data: Path | None, embeddings: Path | None, dataset_named: bool) -> "Source":
        """Rollouts and features to train on: made here; or the rollouts that are there, with the features in a file,
        those that Lever-Plus exported, or those of the dataset whose rows the rollouts name."""
        if rl_data is None and made_elsewhere(self.layout.rollouts):
            rl_data, dataset_named = self.layout.rollouts, True
            self.screen.say(f"rollouts: {rl_data} was not made by `lever rollout` and is taken as it is")
        if rl_data is None:
            if embeddings is not None:
                raise UsageError("--embeddings belongs to rollouts of your own: name them with --rl-data FILE")
            if "gtprob" in self.config.reward.mode and not self.config.rollout.gt_prob:
                raise UsageError(f"reward.mode {self.config.reward.mode} needs --set rollout.gt_prob=true")
            if self.config.reward.mode == "infoscore" and not self.config.rollout.infoscore:
                raise UsageError("reward.mode infoscore needs rollouts of that kind: --set rollout.infoscore=5")
            self.rollouts()
        if rl_data is not None and embeddings is None and self.layout.exported.is_file():
            embeddings = self.layout.exported
            self.screen.say(f"features: {embeddings}, as exported by Lever-Plus")
        if embeddings is not None:
            if self.config.grpo.online:
                raise UsageError(
                    f"grpo.online asks the LVLM about examples of the dataset, and features of your own ({embeddings}) "
                    "name none: leave --embeddings out where the rollouts are of this dataset, or grpo.online=false"
                )
            if self.config.features.name != FeatureConfig.name:
                name = self.config.features.name
                self.screen.say(f"warning: the features are those of {embeddings}: features.name {name} has no effect")
            self.check()
            matrix = read_embeddings(embeddings)
            files = {"rl_data": str(rl_data.resolve()), "embeddings": str(embeddings.resolve())}
            digest = file_digest(embeddings)
            made_for = {"embeddings": f"{embeddings.name}@{digest}"}
            made_for |= {"dataset": self.config.data.name} if dataset_named else {}
            return Source(rl_data, matrix, matrix, digest, made_for, {}, files)
        if rl_data is not None:
            self.check(*(ALL if self.config.grpo.online else ("data", "encoder")))
            check_rows(rl_data, self.data.train_examples, named=dataset_named)
        features = self.features
        queries, icds = features.queries("train", self.config.features), features.icds(self.config.features)
        made_for = {"encoder": features.encoder, "features": features.name, "dataset": self.config.data.name}
        made_of = {"data": self.data.fingerprint, "encoder": features.encoder}
        if rl_data is None:
            made_of["lvlm"] = self.lvlm.fingerprint
        files = {"rl_data": str(rl_data.resolve())} if rl_data else {}
        return Source(rl_data or self.layout.rollouts, queries, icds, features.fingerprint, made_for, made_of, files)

    def _groups(self, path: Path, queries: Tensor, icds: Tensor) -> tuple[GroupTensors, GroupTensors]:
        read = read_groups(path, self.config.reward)
        self.screen.say(read.summary())
        train_ids, val_ids = split_ids(read.query_ids)
        groups = sorted(read.groups, key=lambda group: group.query_id)
        parts = [[g for g in groups if g.query_id in ids] for ids in (train_ids, val_ids)]
        self.screen.say(f"training on {len(parts[0])} groups, validating on {len(parts[1])}")
        dropped = read.counts["dropped"]
        because = f" ({dropped} rollouts lack a score that reward.mode needs)" if dropped else ""
        if not read.counts["judged"]:
            because = because or " (no rollout has a vqa_correct or vqa_acc_score)"
        if not all(parts):
            raise LeverError(
                f"{path}: {len(parts[0])} training and {len(parts[1])} validation groups are left after filtering; "
                f"both are needed{because}. Raise rollout.num_queries (--limit), relax reward.require_positive and "
                "reward.skip_fallback, or choose a reward.mode whose scores the rollouts have"
            )
        # Single sequences that InfoScore found are there to be imitated, and online rounds bring rollouts of their own.
        compared = self.config.reward.mode != "infoscore" and (dropped or any(len(g.rewards) > 1 for g in groups))
        if compared and not self.config.grpo.online and all(len(set(g.rewards)) == 1 for g in groups):
            raise LeverError(
                f"{path}: in none of its {len(groups)} groups do the rewards differ, so there is nothing to learn"
                f"{because}: take rollouts that differ, or a reward.mode by which they do"
            )
        return to_tensors(parts[0], queries, icds), to_tensors(parts[1], queries, icds)

    def recommend(self) -> dict:
        """The checkpoint that `train` and `demo` recommend: the best by val_reward."""
        answer = choose(read_history(self.run, None), RECOMMENDED, self.run)
        if answer["epoch"] is None:
            raise LeverError(f"no checkpoint of {self.run.path} can be recommended: {answer['why']}")
        self.screen.result(f"recommended: {answer['checkpoint']} ({answer['why']})")
        return answer

    # ------------------------------------------------------------------ conversion

    def convert(
        self, path: Path | None = None, *, output: Path | None = None, to: str = "v2", allow_truncate: bool = False
    ) -> dict:
        """A v3 file to `<stem>_v2format.ckpt`, or a v2 file to `<stem>_v3format.pt`. Without a path, the run's best."""
        if path is None:
            path, why = find_checkpoint(self.run, "best", {})
            self.screen.say(f"checkpoint: {path} ({why})")
        content = read_checkpoint(path)
        if path.is_file() and format_of(content) == to:
            other = {"v2": "v3", "v3": "v2"}[to]
            raise LeverError(f"{path} is a {to} checkpoint already: nothing to convert (--to {other} is the other way)")
        # What is made of a folder or a hub id goes into the current folder.
        beside = path if path.is_file() else Path(f"{path.resolve().name}.pt")
        if to == "v3":
            converted, dropped = to_v3(content, path), []
            output = output or beside.with_name(f"{beside.stem.removesuffix('_v2format')}_v3format.pt")
        else:
            converted, dropped = to_v2(content, path, allow_truncate=allow_truncate)
            output = output or v2_name(beside)
        if output.resolve() == path.resolve():
            raise LeverError(f"{output} is the file to convert: choose another --output")
        save_torch(output, converted)
        self.screen.result(f"converted {path} → {output}")
        if dropped:
            self.screen.say(f"warning: v2 has one layer; left out {', '.join(dropped)}: its choices will differ")
        return {"input": str(path), "output": str(output), "to": to, "dropped": dropped}
