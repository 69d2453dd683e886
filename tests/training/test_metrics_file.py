"""The reader of metrics.jsonl."""

import pytest

from lever_lm.training.metrics_file import metrics_rows
from lever_lm.utils.errors import LeverError


def write_metrics(folder, text) -> object:
    path = folder / "metrics.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    "line",
    [
        '{"epoch": 1, "phase": "rce", "phase": "grpo"}',
        '{"epoch": true, "phase": "rce"}',
        '{"epoch": -1, "phase": "rce"}',
        '{"epoch": 1' + "0" * 30 + ', "phase": "rce"}',
        '{"epoch": 1e3, "phase": "rce"}',
        '{"epoch": 1, "phase": ["rce"]}',
        '{"epoch": 1, "phase": "rce", "x": ' + "[" * 500 + "]" * 500 + "}",
        "[" * 100_000,
        "\x00",
        "{'epoch': 1}",
    ],
    ids=lambda line: line[:44],
)
def test_a_broken_metrics_row_is_named_by_file_and_line(tmp_path, line):
    good = '{"epoch": 1, "phase": "rce"}\n'
    path = write_metrics(tmp_path, good + "\n" + line + "\n" + good)
    with pytest.raises(LeverError, match=r"metrics\.jsonl, line 3: not a metrics row"):
        metrics_rows(path)


def test_bytes_that_are_no_text_break_a_metrics_row_or_stay_in_its_words(tmp_path):
    path = write_metrics(tmp_path, b'{"epoch": 1, "phase": "rce", "x": "\xff"}\n')
    assert metrics_rows(path)[0] == [{"epoch": 1, "phase": "rce", "x": "\ufffd"}]
    with pytest.raises(LeverError, match="line 1: not a metrics row"):
        metrics_rows(write_metrics(tmp_path, b"\xff\xfe\n"))


def test_a_last_row_that_was_cut_short_is_left_out_and_said(tmp_path):
    row = '{"epoch": 1, "phase": "rce"}'
    rows, notes = metrics_rows(write_metrics(tmp_path, f"{row}\n\n{row}"))
    assert rows == [{"epoch": 1, "phase": "rce"}]
    assert len(notes) == 1
    assert metrics_rows(write_metrics(tmp_path, f"{row}\n")) == (rows, [])


def test_a_metrics_file_out_of_all_bounds_is_refused(tmp_path):
    with open(tmp_path / "metrics.jsonl", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(LeverError, match="larger than 16 MiB"):
        metrics_rows(tmp_path / "metrics.jsonl")
