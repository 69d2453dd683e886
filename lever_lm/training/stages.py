"""Data, features and LVLM of one config: what every command and the Python API work with, made when first needed."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from lever_lm.config.schema import Config
from lever_lm.data import VqaData
from lever_lm.data.embeddings import Features, compute_features
from lever_lm.data.pools import check_sampler
from lever_lm.lvlm import CachedLvlm, check_pixel_budget, load_lvlm
from lever_lm.selectors.candidate_features import Labelled, candidate_columns, check_candidate_features
from lever_lm.tasks import check_task, load_data, task_of
from lever_lm.training.losses import LOSSES
from lever_lm.training.own_results import keep_source
from lever_lm.training.rollouts.propose import new_policy
from lever_lm.training.rollouts.scores import check_reward_mode
from lever_lm.training.run_dir import Layout
from lever_lm.utils.device import check_device_name
from lever_lm.utils.distributed import Shards
from lever_lm.utils.errors import UsageError
from lever_lm.utils.file_hashes import DIGESTS
from lever_lm.utils.progress import Track
from lever_lm.utils.terminal import shown


class Stages:
    """The stages of one config over one results folder. say: takes lines for the user; track: shows progress. Under
    torchrun every process has its own; the leader alone writes."""

    def __init__(self, config: Config, layout: Layout, say: Callable[[str], None], track: Track):
        check_names(config)
        self.config, self.layout, self.say, self.track = config, layout, say, track
        self.shards = Shards.from_environment()
        DIGESTS.keep_in(layout.cache / "digests.json", track, make_folder=self.shards.world > 1)

    @cached_property
    def data(self) -> VqaData:
        """The dataset; examples that were left out are counted aloud."""
        # The leader first: `datasets` makes a cache of its own from parquet files.
        with self.shards.leader_first():
            data = load_data(self.config.data)
        counts = f"{len(data.train_examples)} training and {len(data.val_examples)} evaluation examples"
        self.say(f"data: {data.name}, {counts}")
        if data.skipped:
            self.say(f"data: {len(data.skipped)} bad examples left out, the first: {data.skipped[0]}")
        return data

    def keep_source(self) -> None:
        """Write beside the results, before the first of them, which table of the user's own they are of, if any."""
        if self.config.data.file and self.shards.leader:
            keep_source(self.layout.dataset, self.config.data.file)

    @cached_property
    def features(self) -> Features:
        """Features of both splits, and the columns of policy.candidate_features."""
        data, names = self.data, self.config.policy.candidate_features
        self.keep_source()
        with self.shards.leader_first():
            features = compute_features(
                data, self.config.features, self.layout.features, self.config.device, self.track, self.say
            )
        if not names:
            return features
        labelled = Labelled(data.train_examples, features.train, task_of(data), self.track)
        return replace(features, columns=candidate_columns(names, labelled))

    @cached_property
    def lvlm(self) -> CachedLvlm:
        """The LVLM behind the answer cache."""
        self.keep_source()
        return load_lvlm(
            self.config.lvlm,
            self.config.prompt,
            device=self.config.device,
            cache=self.layout.answers,
            track=self.track,
            shards=self.shards,
            say=self.say,
        )


def check_names(config: Config) -> None:
    """Raise UsageError for a name or shape that a stage would only refuse after the costly ones before it."""
    check_reward_mode(config.reward.mode)
    check_sampler(config.sampler)
    check_task(config.data.task)
    if config.grpo.loss not in LOSSES:
        raise UsageError(f"unknown loss {shown(config.grpo.loss)}: one of {', '.join(LOSSES)} (grpo.loss)")
    new_policy(config, config.policy.hidden_dim)
    check_candidate_features(config.policy.candidate_features)
    check_device_name(config.device)
    check_pixel_budget(config.lvlm)
