"""What the supervised epochs before GRPO, or in place of it, learn from: one loss for each name of `warmup`.

B queries in a batch, K candidates, G rollouts. Every warm-up is epochs of the phase `rce`, with rce.epochs, rce.lr and
rce.batch_size: a checkpoint `rce_epochN.pt` is that of the warm-up, whichever it was.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lever_lm.config.schema import Config, RceConfig
from lever_lm.data import VqaData
from lever_lm.data.embeddings import Features
from lever_lm.data.pools import Candidates, sample_pools
from lever_lm.selectors.fixed_set import FixedSet
from lever_lm.selectors.lever_lm import LeverLM
from lever_lm.selectors.pointer.checkpoint import Policy
from lever_lm.selectors.pointer.decoding import gather_rows
from lever_lm.selectors.pointer.encoder import Noise
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.tasks import task_of
from lever_lm.training.batches import Batch, GroupTensors
from lever_lm.training.losses import epr_loss, match_loss, rce_loss
from lever_lm.training.rewards import normalize_group
from lever_lm.training.rollouts.file_format import query_ids, read_rollouts, split_ids
from lever_lm.training.rollouts.propose import new_policy, query_rows
from lever_lm.utils.errors import LeverError

# (policy, batch, dropout, temperature, config) → the loss, and the scores (B, G) that it is made of.
WarmupLoss = Callable[[PointerSelector, Batch, Noise, float, RceConfig], tuple[Tensor, Tensor]]
_FRESH = 1_000_003  # between the seeds of two epochs' pools


def _rce(policy: PointerSelector, batch: Batch, noise: Noise, temperature: float, config: RceConfig):
    log_probs = policy.log_prob(*batch.inputs, noise=noise, label_smoothing=config.label_smoothing)
    rewards = normalize_group(batch.rewards, batch.mask, method=config.normalize)
    return rce_loss(log_probs, rewards, batch.mask, temperature), log_probs


def _match(policy: PointerSelector, batch: Batch, noise: Noise, temperature: float, config: RceConfig):
    log_probs = policy.log_prob(*batch.inputs, noise=noise)
    return match_loss(log_probs, batch.rewards, batch.mask), log_probs


def _epr(policy: PointerSelector, batch: Batch, noise: Noise, temperature: float, config: RceConfig):
    """The candidates of a query's one-shot rollouts, against those of all other queries of the batch."""
    states, candidates = policy.encode(batch.query, batch.candidates, batch.pool_mask, noise)
    shown = F.normalize(gather_rows(candidates, batch.sequences[..., 0].clamp(min=0)), dim=-1)  # (B, G, H)
    scores = torch.einsum("bh,cgh->bcg", states, shown) / policy.temperature
    own = torch.eye(len(states), dtype=torch.bool, device=states.device)
    others = scores.masked_fill(own[..., None] | ~batch.mask[None], -torch.inf).flatten(1)
    return epr_loss(scores[own], batch.rewards, batch.mask, others), scores[own]


WARMUP_LOSSES: dict[str, WarmupLoss] = {"rce": _rce, "match": _match, "epr": _epr}


# ---------------------------------------------------------------------- answer match


class MatchGroups:
    """Groups for the warm-up `match`: of each query every candidate alone, rewarded by what its own answer scores for
    the query. No LVLM is asked. Queries are rows of the training split, their pools as large as those of an
    evaluation."""

    def __init__(self, config: Config, data: VqaData, features: Features):
        self.config, self.train, self.features = config, data.train_examples, features
        task = task_of(data)
        self._answers = list(dict.fromkeys(icd.answer for icd in self.train))
        number = {answer: i for i, answer in enumerate(self._answers)}
        self._answer_of = np.array([number[icd.answer] for icd in self.train])
        self._score = cache(lambda answer, row: task.score(self._answers[answer], self.train[row]))
        self._matrices = features.learnt_from(config.features)
        self._candidates = Candidates(self.train)
        self._drawn = lru_cache(maxsize=2)(self._draw)  # epoch 0 is told of, and validates, before any is learnt from

    def split(self, rollouts: Path | None = None) -> tuple[list[int], list[int]]:
        """Return the rows of the queries that are learnt from, and of those held out: by the split of the queries of a
        rollout file, or of one that would be made. What is held out of the rollouts is the validation; all other
        training examples are learnt from, with reward.max_groups (--limit) those of the rollouts alone."""
        most = self.config.reward.max_groups
        if rollouts is None:
            rows = query_rows(self.config.rollout.num_queries, len(self.train), self.config.seed)[: most or None]
        else:
            rows = query_ids(read_rollouts(rollouts), most)
        learnt, held_out = map(sorted, split_ids(rows))
        return learnt if most else sorted({*range(len(self.train))} - {*held_out}), held_out

    def draw(self, rows: list[int], epoch: int) -> GroupTensors:
        """Return the groups of the queries in these rows with the pools of an epoch, which are other ones each time.
        Queries without a match are left out. Raises LeverError where none has any."""
        groups = self.all(rows, epoch)
        kept = (groups.rewards > 0).any(-1)
        if not kept.any():
            raise LeverError(
                f"no candidate of {len(rows)} training queries has an answer that is right for its query, so there is "
                "nothing to match: warmup=rce (--set warmup=rce)"
            )
        return groups.only(kept)

    def held_out(self, rows: list[int]) -> GroupTensors:
        """Return the groups that judge an epoch, with the pools of epoch 0: of the queries with a match, of all where
        none has any."""
        groups = self.all(rows, 0)
        kept = (groups.rewards > 0).any(-1)
        return groups.only(kept) if kept.any() else groups

    def all(self, rows: list[int], epoch: int) -> GroupTensors:
        """Return the groups of all queries in these rows with the pools of an epoch."""
        return self._drawn(tuple(rows), epoch)

    def _draw(self, rows: tuple[int, ...], epoch: int) -> GroupTensors:
        seed, size = self.config.seed + _FRESH * epoch, self.config.infer.pool_size
        queries = [self.train[row] for row in rows]
        embeddings = self.features.train.take(list(rows)), self.features.train
        options = {"size": size, "seed": seed, "candidates": self._candidates}
        pools = sample_pools(self.config.sampler, queries, self.train, embeddings, **options)
        longest = max(map(len, pools))
        placed, scores = np.zeros((len(rows), longest), dtype=np.int64), np.zeros((len(rows), longest), np.float32)
        for place, (row, pool) in enumerate(zip(rows, pools, strict=True)):
            placed[place, : len(pool)] = pool
            answers, of = np.unique(self._answer_of[pool], return_inverse=True)  # each is scored once
            scores[place, : len(pool)] = np.array([self._score(answer, row) for answer in answers.tolist()])[of]
        mask = torch.arange(longest) < torch.tensor([len(pool) for pool in pools])[:, None]
        return GroupTensors(
            queries=self._matrices[0],
            icds=self._matrices[1],
            rows=torch.tensor(rows),
            pools=torch.from_numpy(placed),
            pool_mask=None if mask.all() else mask,
            sequences=torch.arange(longest).expand(len(rows), -1).unsqueeze(-1).clone(),
            mask=mask,
            rewards=torch.from_numpy(scores),
        )

    def density(self, rows: list[int]) -> str:
        """Return the share of queries whose pool holds a match, and the mean number of matches in a pool of theirs, in
        words. Raises LeverError where none has any."""
        matches = (self.draw(rows, 0).rewards > 0).sum(-1).tolist()
        return density_line([*matches, *[0] * (len(rows) - len(matches))])


_PAYS = 0.5  # share of queries with a match from which answer match is worth a try


def match_hint(groups: GroupTensors, data: VqaData, most: int = 256) -> str:
    """Return the density of matches in the pools of logged groups, of the first `most` of them, and where answer match
    would pay the option."""
    train, task = data.train_examples, task_of(data)
    rows, pools = groups.rows[:most].tolist(), groups.pools[:most].tolist()
    real = groups.pool_mask[:most].tolist() if groups.pool_mask is not None else [[True] * len(pool) for pool in pools]
    counts = [
        sum(task.fits(train[icd].answer, train[row]) for icd, there in zip(pool, mask, strict=True) if there)
        for row, pool, mask in zip(rows, pools, real, strict=True)
    ]
    told = density_line(counts)
    if sum(map(bool, counts)) < _PAYS * len(counts):
        return told
    return f"{told}: --set warmup=match learns from these before GRPO, and asks the LVLM nothing"


def density_line(counts: list[int]) -> str:
    """Return what is told of the numbers of matches in the pools of training queries."""
    share, some = sum(map(bool, counts)) / len(counts), max(1, sum(map(bool, counts)))
    return f"matches: {share:.0%} of the training queries have one in their pool, {sum(counts) / some:.1f} on average"


# ---------------------------------------------------------------------- from a config to what learns


def new_learner(config: Config, d_model: int, vocabulary: int) -> Policy:
    """Return what a warm-up trains, untrained: the policy of the config; for `epr` one without attention, so that query
    and candidate are encoded apart; Lever-LM or a fixed set over `vocabulary` training examples. The same weights for
    the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.warmup == "lever_lm":
            return LeverLM(d_model, vocabulary)
        if config.warmup == "fixed_set":
            return FixedSet(vocabulary)
    columns = len(config.policy.candidate_features)
    shape = {"num_layers": 0} if "epr" in config.warmups else {}
    return new_policy(config, d_model - columns, columns, **shape)
