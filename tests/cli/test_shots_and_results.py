"""Numbers of shots as they are typed, and results as a terminal shows them."""

import pytest

from lever_lm.cli.display import show_results
from lever_lm.cli.options import parse_shots
from lever_lm.utils.console import Screen
from lever_lm.utils.errors import UsageError


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("5", [5]), ("1,2,4", [1, 2, 4]), ("1-5", [1, 2, 3, 4, 5]), ("4,1,4", [1, 4]), ("1-2, 8", [1, 2, 8])],
)
def test_shots_are_a_number_a_list_or_a_range(text, numbers):
    assert parse_shots(text) == numbers


@pytest.mark.parametrize("text", ["0", "0-3", "x", "", "1,,2", "-1", "2.5", "5-", "3-1", "5,3-1", "²", "1-99999999999"])
def test_other_shots_are_a_usage_error(text):
    with pytest.raises(UsageError, match="--shots"):
        parse_shots(text)


def test_the_terminal_labels_both_accuracies(capsys):
    row = {"method": "grpo", "shots": 1, "accuracy": 0.5, "ci": [0.4, 0.6], "raw_accuracy": 0.5, "n": 8}
    show_results(Screen(), [{**row, "normalized_accuracy": 0.75}, {**row, "shots": 2, "raw_accuracy": 0.25}], [])
    seen = capsys.readouterr().out
    assert "Official VQA accuracy on 8 queries" in seen
    assert "grpo at 1 shot: 0.500 official, 0.750 with answers always normalised\n" in seen
    assert "grpo at 2 shots: 0.500 official, 0.250 official against `raw_answer`\n" in seen
