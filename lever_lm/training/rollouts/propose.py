"""Proposals: the pool and the group of sequences of each query, before anything is asked.

K pool, S shots, D embedding. A group holds sequences of several kinds (`gen_method`): beams and samples of the freshly
initialised policy, similarity, random. Sequences with the same ICDs in another order count as the same unless
rollout.distinct_orders. For a policy that may stop, sequences of fewer shots are among them.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lever_lm.config.schema import Config, RolloutConfig
from lever_lm.data import Example, VqaData
from lever_lm.data.embeddings import Features
from lever_lm.data.pools import query_rng, sample_pools
from lever_lm.lvlm import Prompt, build_prompt
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.progress import WORTH_A_WORD, Track, Work, untracked

# How many more sequences than wanted are drawn, so that repeats can be dropped.
_SPARE = 4


def new_policy(config: Config, d_model: int, columns: int = 0, **changed) -> PointerSelector:
    """Return the untrained policy of a config for features of `d_model` numbers and `columns` of candidate_features
    after them: the same weights for the same seed, whatever was drawn before. Columns have no weight yet, so that
    rollouts are proposed without them. changed: arguments in place of the config's. Raises UsageError for a shape that
    cannot be."""
    shape = {name: value for name, value in vars(config.policy).items() if name != "candidate_features"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            policy = PointerSelector(d_model=d_model, **{**shape, **changed})
            return policy.widened(columns) if columns else policy
        except ValueError as error:
            raise UsageError(f"policy: {error}") from error


def query_rows(count: int, total: int, seed: int) -> list[int]:
    """Return the rows of the training examples that get a group: the first `count` of a seeded permutation, in order of
    row number. The rows of a smaller count are a subset of those of a larger one."""
    return sorted(np.random.default_rng([seed, 1]).permutation(total)[:count].tolist())


@dataclass(frozen=True)
class Proposals:
    """Rows of the queries in the training split, the queries, their pools and their groups, in this order."""

    rows: list[int]
    queries: list[Example]
    pools: list[list[int]]
    groups: list[list[dict]]

    def prompts(
        self, config: Config, train: Sequence[Example], places: Sequence[Sequence[int]] | None = None
    ) -> list[Prompt]:
        """Return the prompts to be answered, group by group; places: of which rollouts of each group, all if None."""
        places = [range(len(group)) for group in self.groups] if places is None else places
        return [
            build_prompt([train[pool[i]] for i in group[place]["pointer"]], query, config.prompt)
            for query, pool, group, chosen in zip(self.queries, self.pools, self.groups, places, strict=True)
            for place in chosen
        ]


def evenly(total: int, count: int) -> list[int]:
    """Return `count` of `total` places, evenly apart, or all of them: a group lists its kinds one after the other, so
    that each kind keeps its share."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)] if count < total else list(range(total))


def propose_groups(config: Config, data: VqaData, features: Features, track: Track = untracked) -> Proposals:
    """Propose the groups of a config."""
    train = data.train_examples
    rows = query_rows(config.rollout.num_queries, len(train), config.seed)
    queries = [train[row] for row in rows]
    embeddings = (features.train.take(rows), features.train)
    made = {"size": config.rollout.pool_size, "seed": config.seed, "track": track}
    pools = sample_pools(config.sampler, queries, train, embeddings, **made)
    policy = new_policy(config, features.train.image.shape[1]).eval()
    query_features, icd_features = features.queries("train", config.features), features.icds(config.features)
    work = Work(zip(queries, rows, pools, strict=True), "groups", after=WORTH_A_WORD)
    groups = [
        propose(config.rollout, query, policy, query_features[row], icd_features[pool], config.seed)
        for query, row, pool in track(work, f"proposals: {len(rows)} groups", len(rows))
    ]
    return Proposals(rows, queries, pools, groups)


def identity(sequence: Sequence[int], config: RolloutConfig) -> Hashable:
    """Return what two sequences share that count as the same rollout."""
    return tuple(sequence) if config.distinct_orders else frozenset(sequence)


def propose(
    config: RolloutConfig, query: Example, policy: PointerSelector, feature: Tensor, candidates: Tensor, seed: int
) -> list[dict]:
    """Propose the sequences of one group, best-founded kinds first: feature (D,), candidates (K, D). Raises LeverError
    for a pool of fewer candidates than shots."""
    shots, pool = config.shots, len(candidates)
    if pool < shots:
        raise LeverError(f"question {query.question_id} has {pool} candidates for {shots} shots: lower rollout.shots")
    rng = query_rng(seed, query)
    similarity = candidates @ feature
    seen: set[Hashable] = set()
    group: list[dict] = []

    def add(kind: str, sequences: Sequence[Sequence[int]], count: int, facts: Callable[[int], dict]) -> None:
        for i, drawn in enumerate(sequences):
            if count == 0:
                return
            sequence = [int(place) for place in drawn if place >= 0]
            if identity(sequence, config) not in seen:
                seen.add(identity(sequence, config))
                group.append({"pointer": sequence, "gen_method": kind, **facts(i)})
                count -= 1

    def length(i: int) -> int:
        """Return the number of shots of the i-th sequence that no policy draws."""
        return shots - i % shots if policy.stop else shots

    batch = (feature[None], candidates[None])
    beams, log_probs, probs = (t[0].tolist() for t in policy.beams(*batch, shots, _SPARE * max(config.beam, 1)))
    add(
        "beam",
        beams,
        config.beam,
        lambda i: {"beam_rank": i, "beam_score": round(probs[i], 6), "logprob_score": round(log_probs[i], 6)},
    )
    order = similarity.argsort(descending=True, stable=True).tolist()
    starts = range(0, pool - shots + 1, shots)
    windows = [order[start : start + length(i)] for i, start in enumerate(starts)]
    add(
        "retrieval",
        windows,
        config.retrieval,
        lambda i: {"similarity_score": round(float(similarity[windows[i]].mean()), 6)},
    )
    for temperature in config.temperatures:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        drawn = policy.sample(
            *batch, shots, num_samples=_SPARE * max(config.sample, 1), temperature=temperature, generator=generator
        )
        with torch.no_grad():
            scores = policy.log_prob(*batch, drawn, temperature=temperature)[0].tolist()
        add(
            "sample",
            drawn[0].tolist(),
            config.sample,
            lambda i, s=scores, t=temperature: {"temperature": t, "logprob_score": round(s[i], 6)},
        )
    random = [rng.permutation(pool)[: length(i)].tolist() for i in range(_SPARE * max(config.random, 1))]
    add("random", random, config.random, lambda i: {})
    return group
