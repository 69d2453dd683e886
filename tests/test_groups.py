"""Rollout files: what the lineage's loader makes of its odd cases, and what ours refuses."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lever_lm.data.groups import Group, check_reward_mode, is_query, load_groups, read_rollouts, split_ids
from lever_lm.errors import LeverError, UsageError
from lever_lm.rollouts import load_groups as public_load_groups

DATA = Path(__file__).parent / "data" / "rl_data"
EDGE_CASES = json.loads((DATA / "small_edge_cases.json").read_text(encoding="utf-8"))
EXPECTED = json.loads((DATA / "small_expected.json").read_text(encoding="utf-8"))
# The lineage's argument → ours; what is normalised within a group is not the loader's business in ours.
ARGUMENTS = {
    "skip_fallback_reward": "skip_fallback",
    "require_positive_query": "require_positive",
    "reward_mode": "reward_mode",
    "hard_weight": "hard_weight",
    "rel_weight": "rel_weight",
}
ELSEWHERE = {"normalize_method", "normalize_clamp_value", "filter_gen_methods"}


def trajectory(pointer=(0, 1), **fields):
    return {
        "pointer": list(pointer),
        "pointer_global": [10 + i for i in pointer],
        "gen_method": "random",
        "vqa_correct": 1,
        "vqa_acc_score": 0.6,
        "vqa_eval_mode": "vqaEval",
        "eval_failed": False,
        **fields,
    }


def query(*trajectories, pool=(10, 11, 12, 13)):
    return {"candidate_pool_ids": list(pool), "pointer_candidates": list(trajectories or [trajectory()])}


def write(folder, content):
    path = folder / "rl_data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# ---------------------------------------------------------------------- the lineage's files


@pytest.mark.parametrize("case", EXPECTED["cases"], ids=lambda case: str(case["args"]))
def test_golden_edge_cases(case, tmp_path):
    args = case["args"]
    assert args.keys() <= ARGUMENTS.keys() | ELSEWHERE
    content = EDGE_CASES
    if "filter_gen_methods" in args:
        content = copy.deepcopy(EDGE_CASES)
        for key in filter(is_query, content):
            content[key]["pointer_candidates"] = [
                t for t in content[key]["pointer_candidates"] if t["gen_method"] in args["filter_gen_methods"]
            ]
    groups = load_groups(
        write(tmp_path, content), **{ours: args[theirs] for theirs, ours in ARGUMENTS.items() if theirs in args}
    )
    assert [group.query_id for group in groups] == [expected["query_id"] for expected in case["queries"]]
    assert len(groups) == case["n_queries"]
    assert any(expected["rewards_raw"] is not None for expected in case["queries"])
    for group, expected in zip(groups, case["queries"], strict=True):
        assert len(group.pool) == expected["K"]
        # Cases repeat only what differs from the first.
        if expected["candidate_ids"] is not None:
            assert group.pool == expected["candidate_ids"]
        if expected["labels"] is not None:
            assert group.sequences == expected["labels"]
        if expected["rewards_raw"] is not None:
            assert group.rewards == pytest.approx(expected["rewards_raw"], abs=1e-5)


def test_golden_split():
    train, val = split_ids([int(key) for key in EDGE_CASES if is_query(key)])
    assert sorted(train) == [int(key) for key in EXPECTED["train_ids"]]
    assert sorted(val) == [int(key) for key in EXPECTED["val_ids"]]


def test_the_split_is_by_number_and_taken_before_anything_is_dropped():
    # As strings 100 would come before 9.
    train, val = split_ids([100, 9, 10, 11, 2])
    assert (train, val) == ({2, 9, 10, 11}, {100})
    # Query 57 is dropped on loading and still takes its place in the split.
    loaded = {group.query_id for group in load_groups(DATA / "small_edge_cases.json")}
    train, _ = split_ids([int(key) for key in EDGE_CASES if is_query(key)])
    assert 57 in train - loaded
    assert len(train) == int(0.8 * 20)


@pytest.mark.parametrize(("count", "cut"), [(1, 0), (2, 1), (4, 3), (5, 4), (9, 7)])
def test_the_split_rounds_the_training_share_down(count, cut):
    train, val = split_ids(list(range(count)))
    assert (len(train), len(val)) == (cut, count - cut)


def test_the_file_decides_the_order_of_queries_and_rollouts(tmp_path):
    order = [[2, 0], [0, 1], [3, 1]]
    content = {"30": query(*map(trajectory, order)), "_meta": {"version": 1}, "4": query(), "note": [], "17": query()}
    groups = load_groups(write(tmp_path, content))
    assert [group.query_id for group in groups] == [30, 4, 17]
    assert groups[0] == Group(30, [10, 11, 12, 13], order, [1.6, 1.6, 1.6])


def test_the_old_layout_takes_the_sorted_rows_as_its_pool(tmp_path):
    rows = [{"pointer": [70, 9]}, {"pointer": [0, 0], "pointer_pos": [300, 9]}]
    content = {"1": {"pointer_candidates": [{**row, "vqa_correct": 0, "vqa_acc_score": 0.0} for row in rows]}}
    (group,) = load_groups(write(tmp_path, content))
    assert (group.pool, group.sequences) == ([9, 70, 300], [[1, 0], [2, 0]])


def test_a_pool_is_cut_to_64(tmp_path):
    content = {"1": query(trajectory([63, 0]), pool=range(100, 170))}
    assert load_groups(write(tmp_path, content))[0].pool == list(range(100, 164))


def test_what_was_not_evaluated_is_dropped(tmp_path):
    content = {
        "1": query(
            trajectory([0, 1], eval_failed=True),
            trajectory([1, 2], vqa_eval_mode="error"),
            trajectory([2, 3], vqa_eval_mode="fallback"),
            trajectory([3, 0]),
        ),
        "2": query(trajectory([0, 1], vqa_eval_mode="fallback")),
        "3": query(trajectory([0, 1], vqa_correct=0, vqa_acc_score=0.0)),
    }
    path = write(tmp_path, content)
    assert [g.sequences for g in load_groups(path)] == [[[3, 0]], [[0, 1]]]
    with_fallback = load_groups(path, skip_fallback=False)
    assert [g.sequences for g in with_fallback] == [[[2, 3], [3, 0]], [[0, 1]], [[0, 1]]]
    assert [g.query_id for g in load_groups(path, require_positive=True)] == [1]


def test_positive_means_correct_whatever_the_reward(tmp_path):
    content = {"1": query(trajectory(vqa_correct=0, vqa_acc_score=1.0)), "2": query(trajectory(vqa_correct=1))}
    groups = load_groups(write(tmp_path, content), require_positive=True, reward_mode="soft_only", soft_weight=0.1)
    assert [group.query_id for group in groups] == [2]


def test_rewards_follow_the_mode_and_the_weights(tmp_path):
    path = write(tmp_path, {"1": query(trajectory(vqa_gt_prob=0.5, vqa_rel_score=None))})
    assert load_groups(path, hard_weight=2, soft_weight=0.5)[0].rewards == [pytest.approx(2 + 0.3)]
    assert load_groups(path, reward_mode="hard01_plus_gtprob")[0].rewards == [1.5]


def test_an_unknown_reward_mode_is_a_usage_error_that_names_the_key():
    assert check_reward_mode("soft_only") is None
    with pytest.raises(
        UsageError, match=r"unknown reward mode 'hybrid'; choose one of hard_plus_soft.*\(reward\.mode\)"
    ):
        check_reward_mode("hybrid")


def test_the_loader_is_public_under_rollouts():
    assert public_load_groups is load_groups


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), "0.6", [], 10**400], ids=["nan", "inf", "text", "list", "huge"]
)
@pytest.mark.parametrize("field", ["vqa_correct", "vqa_acc_score", "vqa_gt_prob", "vqa_rel_score"])
def test_a_score_that_is_no_finite_number_is_refused_by_name(tmp_path, field, value):
    path = write(tmp_path, {"7": query(trajectory(), trajectory([1, 2], **{field: value}))})
    with pytest.raises(
        LeverError, match=rf"rl_data\.json, query 7, trajectory 1: {field} is .* expected a finite number"
    ):
        load_groups(path)


@pytest.mark.parametrize("pointer", [[0, 4], [64, 0], [-1, 0], [], [0, 1.5], [True, 0], None, "01"])
def test_a_position_outside_the_pool_is_refused_by_query_and_trajectory(tmp_path, pointer):
    path = write(tmp_path, {"7": query(trajectory(), {**trajectory(), "pointer": pointer})})
    with pytest.raises(LeverError, match=r"query 7, trajectory 1"):
        load_groups(path)


def test_an_old_layout_with_more_than_64_rows_is_refused(tmp_path):
    rows = [{"pointer": [i, i + 1], "vqa_correct": 0} for i in range(0, 80, 2)]
    with pytest.raises(LeverError, match=r"query 1, trajectory 32: positions \[-1, -1\] do not lie in a pool of 64"):
        load_groups(write(tmp_path, {"1": {"pointer_candidates": rows}}))


@pytest.mark.parametrize("pool", [None, [1.5], "abc", [-3, 2, 1, 0], [True, 2, 3, 4]])
def test_a_pool_that_is_no_list_of_rows_is_refused(tmp_path, pool):
    entry = {**query(), "candidate_pool_ids": pool}
    with pytest.raises(LeverError, match="query 1, candidate_pool_ids: expected a list of non-negative integers"):
        load_groups(write(tmp_path, {"1": entry}))


def test_a_pool_that_repeats_a_row_is_refused(tmp_path):
    with pytest.raises(LeverError, match="query 1: candidate_pool_ids repeats an id"):
        load_groups(write(tmp_path, {"1": query(pool=[10, 11, 11])}))


@pytest.mark.parametrize("entry", [None, 3, [], {}, {"pointer_candidates": {}}, {"pointer_candidates": [1]}])
def test_a_query_of_another_schema_is_refused(tmp_path, entry):
    with pytest.raises(LeverError, match="query 5: expected an object with a list 'pointer_candidates' of objects"):
        load_groups(write(tmp_path, {"1": query(), "5": entry}))


@pytest.mark.parametrize(
    "text", ["", "not json", '{"1": ', "[" * 100_000, "\ufeff"], ids=["empty", "text", "cut", "deep", "bom"]
)
def test_a_file_that_is_no_json_is_refused(tmp_path, text):
    with pytest.raises(LeverError, match=r"rl_data\.json is not JSON"):
        read_rollouts(write(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "rl_data.json"
    path.write_bytes(b"\x80\x04\x95\xff")
    with pytest.raises(LeverError, match=r"rl_data\.json is not JSON"):
        read_rollouts(path)


@pytest.mark.parametrize("content", [[], {}, {"_meta": {}}, {"a": 1, "1.5": 2, "-1": 3, "²": 4}, 5])
def test_a_file_without_queries_is_refused(tmp_path, content):
    with pytest.raises(
        LeverError, match=r"rl_data\.json holds no queries: expected an object whose keys are query ids"
    ):
        read_rollouts(write(tmp_path, content))


def test_a_missing_file_is_refused_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(LeverError, match=r"none\.json: No such file or directory; make it with `lever rollout`"):
        load_groups(tmp_path / "none.json")


# ---------------------------------------------------------------------- anything at all

JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 100),
        st.just(10**400),
        st.floats(),
        st.text(max_size=6),
        st.sampled_from(["fallback", "error", "vqaEval"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=8,
)
FIELDS = ["pointer", "pointer_global", "pointer_pos", "vqa_correct", "vqa_acc_score", "vqa_gt_prob", "vqa_rel_score"]
FIELDS += ["vqa_eval_mode", "eval_failed", "beam_score", "logprob_score", "gen_method"]
TRAJECTORIES = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3).map(lambda odd: {**trajectory(), **odd})
ENTRIES = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {"pointer_candidates": st.one_of(JSON, st.lists(st.one_of(TRAJECTORIES, JSON), max_size=3))},
        optional={"candidate_pool_ids": st.one_of(JSON, st.just([10, 11, 12, 13])), "query": JSON},
    ),
    st.lists(TRAJECTORIES, min_size=1, max_size=3).map(lambda ts: query(*ts)),
)
FILES = st.one_of(JSON, st.dictionaries(st.sampled_from(["1", "2", "007", "_meta", "x"]), ENTRIES, max_size=3))


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    content=FILES, loose=st.booleans(), mode=st.sampled_from(["hard_plus_soft", "legacy", "hard_plus_gtprob_plus_rel"])
)
def test_any_json_loads_or_is_refused_in_plain_words(tmp_path, content, loose, mode):
    path = write(tmp_path, content)
    try:
        groups = load_groups(path, reward_mode=mode, skip_fallback=not loose, require_positive=loose)
    except LeverError as error:
        groups, told = [], str(error)
    else:
        told = str(path)
    assert str(path) in told
    for group in groups:
        assert len(group.sequences) == len(group.rewards) > 0
        assert all(0 <= position < len(group.pool) for sequence in group.sequences for position in sequence)
        assert all(-5 <= value <= 5 for value in group.rewards)
