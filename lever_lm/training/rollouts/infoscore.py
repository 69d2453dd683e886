"""Demonstrations by InfoScore: beam search for what raises the log-probability of the reference answer most.

The supervision of Lever-LM (arXiv:2312.10104, where it builds its training sequences): the InfoScore of a candidate is
log P(a | query, ICDs with it) − log P(a | query, ICDs without it), a the query's reference answer; larger is better.
Over the steps of a sequence the gains sum to log P(a | query, ICDs) − log P(a | query).
"""

from collections.abc import Callable, Sequence

import numpy as np

from lever_lm.config.schema import Config
from lever_lm.data import Example
from lever_lm.data.pools import seed_of
from lever_lm.lvlm import CachedLvlm, build_prompt
from lever_lm.training.rollouts.propose import Proposals, identity

# Queries searched at once: what is asked for them is one list of work.
_CHUNK = 128
# (query, sequence of pool positions) pairs → log P of each query's reference answer after those ICDs
LogProb = Callable[[list[tuple[int, list[int]]]], list[float]]


def search(
    log_prob: LogProb,
    candidates: Sequence[Sequence[int]],
    shots: int,
    width: int,
    same: Callable[[Sequence[int]], object] = tuple,
) -> list[list[tuple[list[int], float]]]:
    """Search the `width` best sequences of each query; returns them with their InfoScores, best first.

    candidates: pool positions that are tried at each step, query by query. same: what two sequences share of which only
    the better is kept.
    """
    queries = range(len(candidates))
    nothing = log_prob([(i, []) for i in queries])
    beams: list[list[tuple[list[int], float]]] = [[([], score)] for score in nothing]
    for _ in range(shots):
        asked = [(i, [*seq, c]) for i in queries for seq, _ in beams[i] for c in candidates[i] if c not in seq]
        found: list[dict] = [{} for _ in queries]
        for (i, sequence), score in sorted(zip(asked, log_prob(asked), strict=True), key=lambda pair: -pair[1]):
            if len(found[i]) < width:
                found[i].setdefault(same(sequence), (sequence, score))
        beams = [list(best.values()) for best in found]
    return [[(sequence, score - nothing[i]) for sequence, score in beams[i]] for i in queries]


def add_infoscore(proposals: Proposals, config: Config, train: Sequence[Example], lvlm: CachedLvlm) -> None:
    """Put the best sequences by InfoScore in front of each group, in place of the same ones found otherwise."""
    rollout = config.rollout
    tried = []
    for query, pool in zip(proposals.queries, proposals.pools, strict=True):
        count = min(rollout.infoscore_candidates or len(pool), len(pool))
        rng = np.random.default_rng([config.seed, 3, seed_of(query)])
        tried.append(rng.permutation(len(pool))[:count].tolist())
    for start in range(0, len(tried), _CHUNK):

        def log_prob(pairs: list[tuple[int, list[int]]], start=start) -> list[float]:
            prompts = [
                build_prompt(
                    [train[proposals.pools[start + i][place]] for place in sequence],
                    proposals.queries[start + i],
                    config.prompt,
                )
                for i, sequence in pairs
            ]
            return lvlm.answer_log_prob(prompts, [prompt.query.answer for prompt in prompts], "InfoScore")

        chunk = tried[start : start + _CHUNK]
        beams = search(log_prob, chunk, rollout.shots, rollout.infoscore, lambda s: identity(s, rollout))
        for i, best in enumerate(beams, start):
            known = {identity(sequence, rollout) for sequence, _ in best}
            others = [t for t in proposals.groups[i] if identity(t["pointer"], rollout) not in known]
            found = [
                {"pointer": sequence, "gen_method": "infoscore", "infoscore": round(gain, 6)} for sequence, gain in best
            ]
            proposals.groups[i][:] = [*found, *others]


def infoscore_calls(config: Config, pool: int) -> int:
    """Return the number of LVLM calls of the search for one query, at most."""
    rollout = config.rollout
    tried = min(rollout.infoscore_candidates or pool, pool)
    return 1 + tried + (rollout.shots - 1) * rollout.infoscore * tried if rollout.infoscore else 0
