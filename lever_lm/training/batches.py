"""Groups and features as padded tensors: what the policy is trained and judged on.

n queries, N candidates in all, K pool, G rollouts, S shots, D embedding. Masks: True is real; padded sequence
positions are −1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.rollouts.file_format import Group
from lever_lm.utils.errors import LeverError

EVAL_BATCH = 256  # queries that are scored together where nothing is learnt
CHUNK_CANDIDATES = 16_384  # 48 MiB of features of D = 768
LONGEST = 1e15  # length of a feature: beyond it squares come near the largest float32
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Batch:
    """query (B, D), candidates (B, K, D), pool_mask (B, K) or None, sequences (B, G, S), mask and rewards (B, G),
    numbers (B, G) as in GroupTensors."""

    query: Tensor
    candidates: Tensor
    pool_mask: Tensor | None
    sequences: Tensor
    mask: Tensor
    rewards: Tensor
    query_ids: list[int]
    numbers: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The first arguments of the policy's `log_prob`, `evaluate` and `steps`."""
        return self.query, self.candidates, self.sequences, self.pool_mask


@dataclass(frozen=True)
class GroupTensors:
    """All groups of a split: features are looked up per batch, so the pools' embeddings are never copied whole."""

    queries: Tensor  # (N, D) features of the training examples as queries
    icds: Tensor  # (N, D) the same examples as ICDs
    rows: Tensor  # (n,) row of each query
    pools: Tensor  # (n, K) rows of its candidates
    pool_mask: Tensor | None  # (n, K), None where no pool is padded
    sequences: Tensor  # (n, G, S)
    mask: Tensor  # (n, G)
    rewards: Tensor  # (n, G)
    numbers: Tensor | None = None  # (n, G) place of each rollout among its query's in the file, −1 where it is in none

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def query_ids(self) -> list[int]:
        """The row of each query, as a list."""
        return self.rows.tolist()

    def batch(self, index: Tensor) -> Batch:
        """Return the groups at these places."""
        return Batch(
            query=F.embedding(self.rows[index], self.queries),
            candidates=F.embedding(self.pools[index], self.icds),
            pool_mask=None if self.pool_mask is None else self.pool_mask[index],
            sequences=self.sequences[index],
            mask=self.mask[index],
            rewards=self.rewards[index],
            query_ids=self.rows[index].tolist(),
            numbers=None if self.numbers is None else self.numbers[index],
        )

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Batch]]:
        """Yield (places, batch) over all groups in order, `size` groups at a time, fewer where pools are large."""
        size = max(1, min(size, CHUNK_CANDIDATES // self.pools.shape[1]))
        for index in torch.arange(len(self), device=self.rows.device).split(size):
            yield index, self.batch(index)

    def shuffled(self, size: int, queries: int = 0) -> Iterator[tuple[Tensor, Batch]]:
        """Yield (places, batch) over all groups in random order, drawn from torch's global generator.

        queries: how many there are, where each has a logged and an online group; both are then in the same batch.
        """
        queries = queries or len(self)
        for index in torch.randperm(queries).to(self.rows.device).split(size):
            index = torch.cat([index + start for start in range(0, len(self), queries)])
            yield index, self.batch(index)

    def only(self, kept: Tensor) -> "GroupTensors":
        """Return the groups where `kept` (n,) is True."""
        names = ("rows", "pools", "pool_mask", "sequences", "mask", "rewards", "numbers")
        parts = {name: getattr(self, name) for name in names}
        return replace(self, **{name: part[kept] for name, part in parts.items() if part is not None})

    def with_rollouts(self, sequences: Tensor, mask: Tensor, rewards: Tensor) -> "GroupTensors":
        """Return the same queries and pools with other rollouts, which are in no file."""
        numbers = torch.full_like(mask, -1, dtype=torch.long)
        return replace(self, sequences=sequences, mask=mask, rewards=rewards, numbers=numbers)

    def stacked(self, other: "GroupTensors") -> "GroupTensors":
        """Return the groups of both, over the same features and pool size; the smaller groups are padded."""
        size = max(self.mask.shape[1], other.mask.shape[1])

        def both(name: str, filler) -> Tensor:
            pair = (getattr(self, name), getattr(other, name))
            return torch.cat([F.pad(t, [0, 0] * (t.ndim - 2) + [0, size - t.shape[1]], value=filler) for t in pair])

        return replace(
            self,
            rows=torch.cat([self.rows, other.rows]),
            pools=torch.cat([self.pools, other.pools]),
            pool_mask=None if self.pool_mask is None else torch.cat([self.pool_mask, other.pool_mask]),
            sequences=both("sequences", -1),
            mask=both("mask", False),
            rewards=both("rewards", 0.0),
            numbers=None if self.numbers is None or other.numbers is None else both("numbers", -1),
        )

    def to(self, device: torch.device) -> "GroupTensors":
        """Return the groups on another device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def projected(policy: PointerSelector, data: GroupTensors) -> tuple[PointerSelector, GroupTensors]:
    """Return the part of the policy behind its projections of the features, and the groups over projected features: for
    a policy that does not change, or whose projections do not."""
    inner, queries, icds = policy.project(data.queries, data.icds)
    return inner, replace(data, queries=queries, icds=icds)


def to_tensors(groups: Sequence[Group], queries: Tensor, icds: Tensor) -> GroupTensors:
    """Return the groups as tensors over feature matrices (N, D). Raises LeverError when a group points outside them,
    when a feature is not finite or too long, or when a reward is not finite in float32. A feature of zeros is allowed:
    its similarity to every other is 0."""
    if not groups:
        raise LeverError(
            "no group of rollouts is left to work with: the file has too few queries (rollout.num_queries)"
        )
    for group in groups:
        _check_group(group, len(icds))
    for name, matrix in (("query", queries), ("ICD", icds)):
        _check_features(name, matrix)
    shots = max(len(sequence) for group in groups for sequence in group.sequences)
    sequences = [[[*s, *[-1] * (shots - len(s))] for s in group.sequences] for group in groups]
    pool_mask = _padded([[True] * len(group.pool) for group in groups], False)
    return GroupTensors(
        queries=queries.float(),
        icds=icds.float(),
        rows=torch.tensor([group.query_id for group in groups]),
        pools=_padded([group.pool for group in groups], 0),
        pool_mask=None if pool_mask.all() else pool_mask,
        sequences=_padded(sequences, [-1] * shots),
        mask=_padded([[True] * len(group.rewards) for group in groups], False),
        rewards=_padded([list(map(float, group.rewards)) for group in groups], 0.0),
        numbers=_padded([_numbers(group) for group in groups], -1),
    )


def _numbers(group: Group) -> list[int]:
    return list(range(len(group.rewards))) if group.numbers is None else group.numbers


def _check_group(group: Group, rows: int) -> None:
    """Raise LeverError where a group points outside `rows` features, or a reward is not finite in float32."""
    top = max(group.query_id, *group.pool)
    if top >= rows:
        raise LeverError(
            f"query {group.query_id} refers to row {top}, but the embeddings have {rows} rows: "
            "rollouts and embeddings are of different data (--rl-data, --embeddings)"
        )
    for place, reward in zip(_numbers(group), group.rewards, strict=True):
        if not abs(reward) <= _LARGEST:
            raise LeverError(
                f"query {group.query_id}, rollout {place}: its reward {reward} is no finite number in float32"
            )


def _check_features(name: str, matrix: Tensor) -> None:
    """Raise LeverError at the first row that is not finite or too long."""
    mend = "encode it again (features.encoder, --embeddings)"
    if matrix.ndim != 2 or not matrix.shape[1]:
        raise LeverError(f"the {name} features have shape {tuple(matrix.shape)}, expected (N, D) with D > 0: {mend}")
    largest = matrix.abs().amax(-1)
    if (bad := ~(largest <= LONGEST)).any():
        row = int(bad.nonzero()[0])
        why = "is NaN or infinite" if not torch.isfinite(largest[row]) else f"reaches {float(largest[row]):.3g}"
        limit = f"its squares overflow float32 above {LONGEST:g}"
        raise LeverError(f"the {name} feature of row {row} {why}, and {limit}: scale it, or {mend}")


def _padded(rows: Sequence[list], filler) -> Tensor:
    """Return lists of different lengths as one tensor (n, longest, …)."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])
