"""Groups as padded tensors: what is padding stays padding, and nothing points outside the features."""

import dataclasses
import math

import pytest
import torch

from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training import batches
from lever_lm.training.batches import to_tensors
from lever_lm.training.rollouts.file_format import Group
from lever_lm.utils.errors import LeverError

FEATURES = torch.arange(40, dtype=torch.float32).reshape(10, 4)
GROUPS = [
    Group(2, [5, 7, 9], [[0, 2], [1, 0]], [1.0, 0.5]),
    Group(0, [8, 1], [[1]], [2.0]),
    Group(9, [3, 4, 6, 0], [[3, 1], [0, 2], [2, 1]], [0.0, 0.1, 0.2]),
]


def test_groups_of_different_sizes_are_padded_to_the_largest():
    data = to_tensors(GROUPS, FEATURES, FEATURES)
    assert len(data) == 3
    assert data.rows.tolist() == [2, 0, 9]
    assert data.pools.tolist() == [[5, 7, 9, 0], [8, 1, 0, 0], [3, 4, 6, 0]]
    assert data.pool_mask.tolist() == [[True, True, True, False], [True, True, False, False], [True] * 4]
    assert data.sequences.tolist() == [
        [[0, 2], [1, 0], [-1, -1]],
        [[1, -1], [-1, -1], [-1, -1]],
        [[3, 1], [0, 2], [2, 1]],
    ]
    assert data.mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert data.rewards.tolist() == [
        pytest.approx([1.0, 0.5, 0.0]),
        pytest.approx([2.0, 0.0, 0.0]),
        pytest.approx([0.0, 0.1, 0.2]),
    ]


def test_equal_pools_need_no_mask():
    data = to_tensors([GROUPS[0]], FEATURES, FEATURES)
    assert data.pool_mask is data.batch(torch.tensor([0])).pool_mask is None


def test_a_batch_looks_up_the_features_of_queries_and_candidates():
    icds = -FEATURES
    batch = to_tensors(GROUPS, FEATURES, icds).batch(torch.tensor([2, 0]))
    assert batch.query_ids == [9, 2]
    assert torch.equal(batch.query, FEATURES[[9, 2]])
    assert torch.equal(batch.candidates[0], icds[[3, 4, 6, 0]])
    assert torch.equal(batch.candidates[1, :3], icds[[5, 7, 9]])
    assert batch.pool_mask.tolist() == [[True] * 4, [True, True, True, False]]
    assert batch.sequences[1].tolist() == [[0, 2], [1, 0], [-1, -1]]
    assert batch.mask.tolist() == [[True] * 3, [True, True, False]]
    assert batch.rewards[1].tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(("size", "places"), [(1, [[0], [1], [2]]), (2, [[0, 1], [2]]), (5, [[0, 1, 2]])])
def test_chunks_cover_all_groups_in_order(size, places):
    data = to_tensors(GROUPS, FEATURES, FEATURES)
    chunks = list(data.chunks(size))
    assert [index.tolist() for index, _ in chunks] == places
    assert [batch.query_ids for _, batch in chunks] == [[[2, 0, 9][i] for i in place] for place in places]


def test_a_chunk_has_fewer_groups_where_pools_are_large(monkeypatch):
    data = to_tensors(GROUPS, FEATURES, FEATURES)
    for limit, sizes in ((2 * data.pools.shape[1], [2, 1]), (1, [1, 1, 1])):
        monkeypatch.setattr(batches, "CHUNK_CANDIDATES", limit)
        assert [len(index) for index, _ in data.chunks(3)] == sizes


def test_a_padded_group_scores_as_it_does_alone():
    torch.manual_seed(0)
    features = torch.randn(10, 4)
    policy = PointerSelector(d_model=4, hidden_dim=8, state_update="gate").eval()
    together = to_tensors(GROUPS, features, features).batch(torch.arange(3))
    log_probs = policy.log_prob(together.query, together.candidates, together.sequences, together.pool_mask)
    for i, group in enumerate(GROUPS):
        alone = to_tensors([group], features, features).batch(torch.tensor([0]))
        expected = policy.log_prob(alone.query, alone.candidates, alone.sequences, alone.pool_mask)[0]
        torch.testing.assert_close(log_probs[i][together.mask[i]], expected, rtol=0, atol=1e-5)


def test_features_of_half_precision_become_floats_and_moving_keeps_everything():
    data = to_tensors(GROUPS, FEATURES.half(), FEATURES.double()).to(torch.device("cpu"))
    assert (data.queries.dtype, data.icds.dtype, data.rewards.dtype) == (torch.float32,) * 3
    assert torch.equal(data.queries, FEATURES)
    assert data.rows.tolist() == [2, 0, 9]


def test_no_groups_at_all_are_refused():
    with pytest.raises(LeverError, match="no group of rollouts is left to work with"):
        to_tensors([], FEATURES, FEATURES)


@pytest.mark.parametrize("group", [Group(10, [0, 1], [[0]], [1.0]), Group(3, [0, 10], [[0]], [1.0])])
def test_a_row_outside_the_embeddings_is_refused_by_query(group):
    message = f"query {group.query_id} refers to row 10, but the embeddings have 10 rows"
    with pytest.raises(LeverError, match=message):
        to_tensors([GROUPS[0], group], FEATURES, FEATURES)


@pytest.mark.parametrize("which", ["query", "ICD"])
@pytest.mark.parametrize(
    ("value", "why"), [(math.nan, "NaN"), (-math.inf, "infinite"), (1e30, "reaches 1e.30"), (-1e300, "reaches 1e.300")]
)
def test_a_feature_that_is_not_finite_or_too_long_is_refused_by_row(which, value, why):
    broken = FEATURES.double()
    broken[6, 1] = value
    matrices = (broken, FEATURES) if which == "query" else (FEATURES, broken)
    with pytest.raises(LeverError, match=f"the {which} feature of row 6 .*{why}"):
        to_tensors(GROUPS, *matrices)


def test_features_without_a_dimension_are_refused():
    with pytest.raises(LeverError, match=r"expected \(N, D\) with D > 0"):
        to_tensors(GROUPS, FEATURES[:, :0], FEATURES[:, :0])


@pytest.mark.parametrize("value", [1e39, -1e300, math.nan])
def test_rewards_beyond_float32_are_refused_by_query_and_rollout(value):
    broken = dataclasses.replace(GROUPS[2], rewards=[0.0, value, 0.2])
    with pytest.raises(LeverError, match="query 9, rollout 1: its reward"):
        to_tensors([*GROUPS[:2], broken], FEATURES, FEATURES)
