"""Rollout files: what the lineage's loader makes of its odd cases, and what ours refuses."""

import copy
import json
import re

import pytest
from helpers import CHECKOUT, DATA

from lever_lm.config.schema import RewardConfig
from lever_lm.training.rollouts.file_format import (
    Group,
    is_query,
    load_groups,
    read_groups,
    read_rollouts,
    split_ids,
)
from lever_lm.training.rollouts.scores import check_reward_mode
from lever_lm.utils.errors import LeverError, UsageError

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
    rows = [{"pointer": [70, 9]}, {"pointer": [0, 1], "pointer_pos": [300, 9]}]
    content = {"1": {"pointer_candidates": [{**row, "vqa_correct": 0, "vqa_acc_score": 0.0} for row in rows]}}
    (group,) = load_groups(write(tmp_path, content))
    assert (group.pool, group.sequences) == ([9, 70, 300], [[1, 0], [2, 0]])


SCORES = {"vqa_correct": 1, "vqa_acc_score": 0.6}


def pointed(*pointers, **more):
    """A query whose trajectories hold these keys, and its pool where `pool` is given."""
    pool = {"candidate_pool_ids": list(more.pop("pool"))} if "pool" in more else {}
    return {**pool, "pointer_candidates": [{**SCORES, **pointer} for pointer in pointers], **more}


def rows_of(path):
    """The rows that each rollout of the only query shows, in pick order."""
    (group,) = load_groups(path)
    return [[group.pool[place] for place in sequence] for sequence in group.sequences]


@pytest.mark.parametrize(
    ("entry", "rows"),
    [
        pytest.param(
            pointed({"pointer": [1, 2]}, {"pointer": [2, 0]}, pool=[3, 5, 7]), [[5, 7], [7, 3]], id="least: places"
        ),
        pytest.param(pointed({"pointer": [7, 5]}, {"pointer": [3, 7]}, pool=[3, 5, 7]), [[7, 5], [3, 7]], id="ids"),
        pytest.param(pointed({"pointer": [1, 2]}, pool=[2, 0, 1]), [[0, 1]], id="either: places"),
        pytest.param(pointed({"pointer": [1, 2]}), [[1, 2]], id="no pool: rows"),
        pytest.param(pointed({"pointer": [1, 2]}, pool=[2, 0, 1], _fix_failed=True), [[1, 2]], id="fix failed: rows"),
        pytest.param(pointed({"pointer": [0, 1], "pointer_pos": [1, 2]}, pool=[2, 0, 1]), [[1, 2]], id="pos: rows"),
        pytest.param(
            pointed({"pointer": [0, 1], "pointer_global": [3, 5]}, {"pointer": [7, 5]}, pool=[3, 5, 7]),
            [[3, 5], [7, 5]],
            id="both layouts, the present one first",
        ),
        pytest.param(
            pointed({"pointer": [7, 5]}, {"pointer": [0, 1], "pointer_global": [3, 5]}, pool=[3, 5, 7]),
            [[7, 5], [3, 5]],
            id="both layouts, the older one first",
        ),
        pytest.param(
            pointed({"pointer_pos": [0, 2]}, {"pointer": [0, 1], "pointer_global": [2, 0]}, pool=[2, 0, 1]),
            [[0, 2], [2, 0]],
            id="both layouts, marked",
        ),
        pytest.param(
            pointed(
                {"pointer": [2, 1], "pointer_global": [7, 5], "eval_failed": True}, {"pointer": [0, 1]}, pool=[3, 5, 7]
            ),
            [[3, 5]],
            id="the only marked one failed",
        ),
    ],
)
def test_each_trajectory_is_read_by_its_own_layout(tmp_path, entry, rows):
    assert rows_of(write(tmp_path, {"1": entry})) == rows


def test_the_least_file_of_the_page_shows_what_the_page_says(tmp_path):
    page = (CHECKOUT / "docs" / "own-data.md").read_text(encoding="utf-8")
    (least,) = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    path = write(tmp_path, least)
    assert rows_of(path) == [[5, 7], [7, 3]]
    assert load_groups(path)[0].rewards == [2.0, 0.0]


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (
            pointed({"pointer": [0, 1]}, {"pointer": [1, 9]}, pool=[3, 5, 7]),
            r"positions \[1, 9\] do not lie in a pool of 3",
        ),
        (
            pointed({"pointer": [0, 1]}, {"pointer": [0, 1], "pointer_global": [5, 3]}, pool=[3, 5, 7]),
            r"pointer_global is \[5, 3\], but pointer names rows \[3, 5\]",
        ),
        (
            pointed({"pointer": [5, 0]}, {"pointer": [1, 2]}, pool=[2, 0, 1, 5, 9]),
            "can be places in the pool and ids of it",
        ),
        (
            pointed({"pointer": [0], "pointer_global": [3]}, {"pointer_pos": [4]}, pool=[3, 5, 7]),
            r"rows \[4\] do not lie in candidate_pool_ids",
        ),
        (pointed({"pointer": [0, 1]}, {"pointer": [1, 1]}, pool=[3, 5, 7]), "names a candidate twice"),
        (pointed({"pointer": [0, 1]}, {"pointer": [5, 5]}, pool=[3, 5, 7]), "names a candidate twice"),
        (pointed({"pointer": [0, 1]}, {"pointer": [9, 9]}), "names a candidate twice"),
        (pointed({"pointer": [0, 1]}, {"pointer": []}), "its pointer is empty"),
    ],
)
def test_a_pointer_that_says_two_things_or_nothing_is_refused_by_query_and_trajectory(tmp_path, entry, why):
    with pytest.raises(LeverError, match=f"query 1, trajectory 1: .*{why}"):
        load_groups(write(tmp_path, {"1": entry}))


@pytest.mark.parametrize("size", [65, 100, 1000])
def test_a_pool_may_be_of_any_size(tmp_path, size):
    pool = list(range(2000, 2000 + size))
    content = {
        "1": pointed({"pointer": [size - 1, 0], "pointer_global": [pool[-1], 2000]}, pool=pool),
        "2": pointed(*({"pointer": [row]} for row in pool)),
    }
    present, older = load_groups(write(tmp_path, content))
    assert (present.pool, present.sequences) == (pool, [[size - 1, 0]])
    assert (older.pool, older.sequences) == (pool, [[i] for i in range(size)])


# ---------------------------------------------------------------------- missing scores

LACKING = [
    ("hard_plus_soft", "vqa_correct"),
    ("hard_plus_soft", "vqa_acc_score"),
    ("hard_plus_soft_v2", "vqa_acc_score"),
    ("separated", "vqa_correct"),
    ("hard_only", "vqa_correct"),
    ("soft_only", "vqa_acc_score"),
    ("hard01_plus_gtprob", "vqa_correct"),
    ("hard01_plus_gtprob", "vqa_gt_prob"),
    ("hard01_plus_gtprob_separated", "vqa_gt_prob"),
    ("hard_plus_gtprob_plus_rel", "vqa_gt_prob"),
    ("hard_plus_gtprob_plus_rel", "vqa_rel_score"),
]


@pytest.mark.parametrize(("mode", "field"), LACKING)
def test_a_rollout_without_a_score_that_the_reward_needs_is_refused_or_left_out(tmp_path, mode, field):
    whole = trajectory(vqa_gt_prob=0.5, vqa_rel_score=0.5)
    lacking = {**trajectory([1, 2], vqa_gt_prob=0.5, vqa_rel_score=0.5), field: None}
    absent = {name: value for name, value in lacking.items() if name != field}
    path = write(tmp_path, {"7": query(whole, lacking), "8": query(absent)})
    with pytest.raises(
        LeverError, match=rf"query 7, trajectory 1 has no {field}, which reward\.mode={mode} needs: .*drop"
    ):
        load_groups(path, reward_mode=mode, missing="refuse")
    read = read_groups(path, RewardConfig(mode=mode, missing="drop"))
    assert [(group.query_id, group.sequences, group.numbers) for group in read.groups] == [(7, [[0, 1]], [0])]
    assert "; 2 left out, as they lack a score" in read.summary()
    if field == "vqa_gt_prob":  # Lever-Plus's loader
        values = [reward for group in load_groups(path, reward_mode=mode) for reward in group.rewards]
        assert values[1] == values[2] == values[0] - 0.5
    else:
        with pytest.raises(LeverError, match=field):
            load_groups(path, reward_mode=mode)


def test_a_score_that_the_reward_does_not_need_may_be_missing(tmp_path):
    bare = {"pointer": [0, 1], "pointer_global": [10, 11]}
    path = write(tmp_path, {"1": query({**bare, "vqa_acc_score": 0.6})})
    assert load_groups(path, reward_mode="soft_only", missing="refuse")[0].rewards == [0.6]
    assert load_groups(path, reward_mode="legacy", missing="refuse")[0].rewards == [0.6]
    with pytest.raises(LeverError, match=r"no vqa_correct, .* needs with reward[.]require_positive"):
        load_groups(path, reward_mode="soft_only", missing="refuse", require_positive=True)


def test_the_legacy_reward_needs_a_correctness_or_an_accuracy(tmp_path):
    bare = {"pointer": [1, 2], "pointer_global": [11, 12], "vqa_correct": None}
    path = write(tmp_path, {"1": query(trajectory(), bare)})
    for missing in ("refuse", "lineage"):
        with pytest.raises(LeverError, match="query 1, trajectory 1 has no vqa_correct and no vqa_acc_score"):
            load_groups(path, reward_mode="legacy", missing=missing)
    (group,) = load_groups(path, reward_mode="legacy", missing="drop")
    assert (group.sequences, group.rewards) == ([[0, 1]], [1.0])


def test_a_file_without_any_reference_probability_is_refused_under_a_mode_of_it(tmp_path):
    path = write(tmp_path, {"1": query(), "2": query()})
    with pytest.raises(LeverError, match="no rollout has a vqa_gt_prob"):
        load_groups(path, reward_mode="hard01_plus_gtprob")


# ---------------------------------------------------------------------- what the screen says


def test_the_summary_tells_layout_groups_rollouts_pools_and_right_answers(tmp_path):
    content = {
        "1": query(trajectory(), trajectory([1, 2], vqa_correct=0, vqa_acc_score=0.0), trajectory(eval_failed=True)),
        "2": pointed({"pointer": [70, 9]}),
    }
    path = write(tmp_path, content)
    assert read_groups(path, RewardConfig()).summary() == (
        f"rollouts: {path}: 2 groups, 3 rollouts (1 of them by row, the older layout), pools of 2 to 4, 66.7% right; "
        "1 left out, as their evaluation failed or fell back (reward.skip_fallback)"
    )


def test_of_a_limited_number_of_groups_the_first_by_id_are_read(tmp_path):
    content = {"30": query(), "4": query(), "9": "broken", "8": query(trajectory(eval_failed=True))}
    read = read_groups(write(tmp_path, content), RewardConfig(max_groups=2))
    assert ([group.query_id for group in read.groups], read.query_ids) == ([4], [4, 8])
    assert "1 groups of 2 queries, 1 rollouts" in read.summary()


def test_a_rollout_is_right_by_its_mark_and_without_one_by_its_accuracy(tmp_path):
    marks = [(0, 0.3), (1, 0.3), (None, 0.3), (None, 0.0)]
    rollouts = [trajectory([0, i], vqa_correct=mark, vqa_acc_score=acc) for i, (mark, acc) in enumerate(marks, 1)]
    path = write(tmp_path, {"1": query(*rollouts, pool=(10, 11, 12, 13, 14))})
    assert "50.0% right" in read_groups(path, RewardConfig(mode="soft_only")).summary()


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


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vqa_correct", float("nan")),
        ("vqa_acc_score", float("inf")),
        ("vqa_gt_prob", "0.6"),
        ("vqa_rel_score", []),
        ("infoscore", 10**400),
    ],
    ids=["nan", "inf", "text", "list", "huge"],
)
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


@pytest.mark.parametrize("content", [[], {}, {"_meta": {}}, {"a": 1, "1.5": 2, "-1": 3, "²": 4}, 5])
def test_a_file_without_queries_is_refused(tmp_path, content):
    with pytest.raises(
        LeverError, match=r"rl_data\.json holds no queries: expected an object whose keys are query ids"
    ):
        read_rollouts(write(tmp_path, content))


def test_a_missing_file_is_refused_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(LeverError, match=r"none\.json: No such file or directory; make it with `lever rollout`"):
        load_groups(tmp_path / "none.json")
