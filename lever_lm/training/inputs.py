"""The inputs of a training: a rollout file, the features that go with it, and its groups as tensors.

N examples, D embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lever_lm.config.schema import Config, FeatureConfig
from lever_lm.data.embeddings import read_embeddings
from lever_lm.training.batches import GroupTensors, to_tensors
from lever_lm.training.rollouts.file_format import RolloutFile, read_groups, split_ids
from lever_lm.training.stages import Stages
from lever_lm.utils.atomic_io import file_digest
from lever_lm.utils.errors import LeverError, UsageError

_OWN = "leave --rl-data out, and `lever train --selector {}` makes such rollouts"


@dataclass(frozen=True)
class Source:
    """The data of a training: a rollout file, features (N, D) of queries and ICDs, and their fingerprint.

    made_for: what a checkpoint says of the features; made_of: fingerprints of what rollouts and features were made of;
    files: those of the user's own.
    """

    rollouts: Path | None  # None where none are learnt from
    queries: Tensor
    icds: Tensor
    stamp: str
    made_for: dict[str, str | list[str]]
    made_of: dict[str, str]
    files: dict[str, str]


def check_scores(config: Config) -> None:
    """Raise UsageError where the rollouts that would be made lack the scores that the reward needs."""
    if "gtprob" in config.reward.mode and not config.rollout.gt_prob:
        raise UsageError(f"reward.mode {config.reward.mode} needs --set rollout.gt_prob=true")
    if config.reward.mode == "infoscore" and not config.rollout.infoscore:
        raise UsageError("reward.mode infoscore needs rollouts of that kind: --set rollout.infoscore=5")


def check_own_features(config: Config, embeddings: Path, say: Callable[[str], None]) -> None:
    """Raise UsageError for an option that features from a file cannot serve; warn of one without effect."""
    if config.grpo.online:
        raise UsageError(
            f"grpo.online asks the LVLM about examples of the dataset, and features of your own ({embeddings}) "
            "name none: leave --embeddings out where the rollouts are of this dataset, or grpo.online=false"
        )
    if config.validate_on == "answers":
        raise UsageError(
            f"validate_on=answers asks the LVLM about examples of the dataset, and features of your own ({embeddings}) "
            "name none: --validate-on rollouts"
        )
    if names := config.policy.candidate_features:
        raise UsageError(
            f"policy.candidate_features ({', '.join(names)}) tells of examples of the dataset, and features of your "
            f"own ({embeddings}) name none: leave --embeddings out where the rollouts are of this dataset, or "
            "--set policy.candidate_features=[]"
        )
    if config.features.name != FeatureConfig.name:
        name = config.features.name
        say(f"warning: the features are those of {embeddings}: features.name {name} has no effect")


def source_of_file(rl_data: Path, embeddings: Path, dataset: str | None) -> Source:
    """Return rollouts with the features in a file, which are those of queries and ICDs alike; dataset: the name of the
    one that they are of, where it is known. Raises LeverError for a file that cannot be read."""
    matrix, digest = read_embeddings(embeddings), file_digest(embeddings)
    made_for = {"embeddings": f"{embeddings.name}@{digest}", **({} if dataset is None else {"dataset": dataset})}
    files = {"rl_data": str(rl_data.resolve()), "embeddings": str(embeddings.resolve())}
    return Source(rl_data, matrix, matrix, digest, made_for, {}, files)


def source_of_dataset(stages: Stages, rl_data: Path | None) -> Source:
    """Return rollouts with the features of the dataset; rl_data: a file of the user's own in place of the one that is
    made."""
    features, config = stages.features, stages.config
    queries, icds = features.learnt_from(config.features)
    made_for = {"encoder": features.encoder, "features": features.name, "dataset": config.data.name}
    if names := config.policy.candidate_features:
        made_for["candidate_features"] = list(names)
    made_of = {"data": stages.data.fingerprint, "encoder": features.encoder}
    if rl_data is None:
        made_of["lvlm"] = stages.lvlm.fingerprint
    files = {"rl_data": str(rl_data.resolve())} if rl_data else {}
    return Source(rl_data or stages.layout.rollouts, queries, icds, features.fingerprint, made_for, made_of, files)


def read_source(source: Source, config: Config, say: Callable[[str], None]) -> tuple[GroupTensors, GroupTensors]:
    """Read the training and the validation groups of a source. Raises LeverError where one of them has none, or where
    there is nothing to learn."""
    read = read_groups(source.rollouts, config.reward)
    say(read.summary())
    train_ids, val_ids = split_ids(read.query_ids)
    groups = sorted(read.groups, key=lambda group: group.query_id)
    train, val = ([g for g in groups if g.query_id in ids] for ids in (train_ids, val_ids))
    say(f"training on {len(train)} groups, validating on {len(val)}")
    _check_groups(read, len(train), len(val), config)
    return to_tensors(train, source.queries, source.icds), to_tensors(val, source.queries, source.icds)


def check_kind(warmup: str, groups: GroupTensors, path: Path | None) -> None:
    """Raise LeverError for rollouts that a warm-up cannot learn from."""
    shown = (groups.sequences >= 0).sum(-1)[groups.mask]  # demonstrations of each rollout
    if warmup == "epr" and bool((shown != 1).any()):
        raise LeverError(
            f"{path}: warmup=epr learns from demonstrations that are shown alone, and these rollouts show up to "
            f"{int(shown.max())}: {_OWN.format(warmup)}"
        )
    if warmup == "lever_lm" and len(shown.unique()) > 1:
        raise LeverError(
            f"{path}: warmup=lever_lm learns from sequences of one length, and these rollouts show {int(shown.min())} "
            f"to {int(shown.max())} demonstrations: {_OWN.format(warmup)}"
        )


def _check_groups(read: RolloutFile, train: int, val: int, config: Config) -> None:
    """Raise LeverError where a split is left without groups, or where no group's rewards differ."""
    path, groups, dropped = read.path, read.groups, read.counts["dropped"]
    because = f" ({dropped} rollouts lack a score that reward.mode needs)" if dropped else ""
    if not read.counts["judged"]:
        because = because or " (no rollout has a vqa_correct or vqa_acc_score)"
    if not (train and val):
        if config.warmup == "lever_lm" and dropped and not groups:
            raise LeverError(
                f"{path}: warmup=lever_lm learns from the sequences of an InfoScore search, and none of these "
                f"{dropped} rollouts is one: {_OWN.format(config.warmup)}"
            )
        raise LeverError(
            f"{path}: {train} training and {val} validation groups are left after filtering; both are needed{because}. "
            "Raise rollout.num_queries (--limit), relax reward.require_positive and reward.skip_fallback, or choose a "
            "reward.mode whose scores the rollouts have"
        )
    # Single sequences that InfoScore found are there to be imitated, and online rounds bring rollouts of their own.
    compared = config.reward.mode != "infoscore" and (dropped or any(len(g.rewards) > 1 for g in groups))
    if compared and not config.grpo.online and all(len(set(g.rewards)) == 1 for g in groups):
        raise LeverError(
            f"{path}: in none of its {len(groups)} groups do the rewards differ, so there is nothing to learn"
            f"{because}: take rollouts that differ, or a reward.mode by which they do"
        )
