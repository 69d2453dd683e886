"""The table of `lever infer --against`: which selectors are asked for, and what its tests are."""

from dataclasses import replace

import pytest

from lever_lm.cli.display import show_arena
from lever_lm.evaluation.arena import Cost, arena_rows, check_shots, chooses_from, parse_names
from lever_lm.evaluation.evaluate import Evaluation, Outcome
from lever_lm.evaluation.statistics import holm, paired_test
from lever_lm.selectors import SELECTORS
from lever_lm.utils.console import Screen
from lever_lm.utils.errors import UsageError


def outcome(method, scores, shots=1):
    return Outcome(method, shots, [""] * len(scores), scores)


def test_names_come_in_the_order_of_the_table_each_once():
    assert parse_names("epr, random,epr") == ["random", "epr"]
    everything = parse_names("all")
    assert everything == [name for name in SELECTORS if name not in ("policy", "icds")]
    assert parse_names("mmr,all") == everything


@pytest.mark.parametrize(("text", "said"), [("mmice", "did you mean 'mmices'"), ("zzz", "some of"), (" , ", "names")])
def test_a_name_that_is_none_is_refused_with_the_nearest(text, said):
    with pytest.raises(UsageError, match=said):
        parse_names(text)


def test_each_method_is_tested_against_the_best_simple_one_at_its_shots_and_p_is_adjusted_over_the_table(capsys):
    outcomes = [
        outcome("random", [0.0] * 20),
        outcome("mmr", [1.0, 0.0] * 10),
        outcome("grpo", [1.0] * 20),
        outcome("oracle", [1.0] * 20),
        outcome("random", [1.0] * 20, 2),
        outcome("mmr", [0.0] * 20, 2),
        outcome("grpo", [1.0, 0.0] * 10, 2),
        outcome("oracle", [1.0] * 20, 2),
    ]
    costs = [Cost(name, 0, 0, 0.5, "all 9") for name in ("random", "mmr", "grpo", "oracle")]
    rows = {(row["method"], row["shots"]): row for row in arena_rows(outcomes, costs)}
    assert {key: row.get("against") for key, row in rows.items()} == {
        ("random", 1): "mmr",
        ("mmr", 1): None,
        ("grpo", 1): "mmr",
        ("oracle", 1): "mmr",
        ("random", 2): None,
        ("mmr", 2): "random",
        ("grpo", 2): "random",
        ("oracle", 2): "random",
    }
    assert rows["grpo", 1]["difference"] == paired_test([1.0] * 20, [1.0, 0.0] * 10)["difference"] == 0.5
    tested = [row for row in rows.values() if "p" in row]
    assert [row["p_holm"] for row in tested] == holm([row["p"] for row in tested])
    assert "p_holm" not in rows["mmr", 1]
    show_arena(Screen(), list(rows.values()))
    assert f"adjusted for all {len(tested)} tests of these methods, at all shots" in capsys.readouterr().out


def test_the_table_is_sorted_by_the_accuracy_at_the_most_shots():
    outcomes = [
        outcome("a", [0.0, 1.0]),
        outcome("a", [0.0, 0.0], 4),
        outcome("b", [0.0, 0.0]),
        outcome("b", [1.0, 1.0], 4),
    ]
    costs = [Cost("a", None, 0, 0.0, ""), Cost("b", None, 0, 0.0, "")]
    assert [(row["method"], row["shots"]) for row in arena_rows(outcomes, costs)] == [
        ("b", 1),
        ("b", 4),
        ("a", 1),
        ("a", 4),
    ]


@pytest.mark.parametrize(("size", "said"), [(256, "pools of 256"), (0, "the nearest 1,024")])
def test_the_table_says_from_what_a_selector_chooses(digits_config, digits, digits_features, size, said):
    config = replace(digits_config, infer=replace(digits_config.infer, pool_size=size, num_queries=3))
    evaluation = Evaluation(config, digits, digits_features)
    assert chooses_from("grpo", evaluation) == chooses_from("oracle", evaluation) == said
    assert chooses_from("mmices", evaluation) == "all 2,504"
    assert {len(pool) for pool in evaluation.problem.pools} == {size or 1024}
    small = replace(digits, train_examples=digits.train_examples[:300])
    assert chooses_from("grpo", Evaluation(config, small, None)) == (said if size else "the nearest 300")


@pytest.mark.parametrize(("size", "most"), [(4, 4), (0, 1024)])
def test_more_shots_than_a_pool_holds_are_refused_by_the_option(digits_config, size, most):
    config = replace(digits_config, infer=replace(digits_config.infer, pool_size=size))
    check_shots(config, [1, most], ["oracle"])
    check_shots(config, [2000], ["random", "fixed_set"])
    said = rf"--shots {most + 1} exceeds the {most:,} candidates of infer\.pool_size {size}, from which oracle would"
    with pytest.raises(UsageError, match=said):
        check_shots(config, [1, most + 1], ["random", "oracle"])
