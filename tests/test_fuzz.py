"""What is read of anybody's making, by property: what was written reads back, what is shown steers nothing, and what is
spoilt is refused with a message. The fuzz script itself must see what goes wrong."""

import json
import os
import pickle
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
import yaml
from helpers import SCRIPTS, clean_environment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lever_lm.cli.options import parse_shots
from lever_lm.config.values import build, parse_set
from lever_lm.lvlm.openai_server import log_prob_at_end
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.safe_parse import load_yaml, loads
from lever_lm.utils.safe_torch_load import load_torch
from lever_lm.utils.terminal import json_text, one_line, printable, shown

NUMBERS = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
PLAIN = st.none() | st.booleans() | NUMBERS | TEXTS
TREES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4))
ANY_TEXT = st.text(st.characters(), max_size=200)  # half characters among it
STEERS = {*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {
    0x09,
    0x0A,
}


# ---------------------------------------------------------------------- showing


@given(ANY_TEXT)
def test_what_is_shown_steers_no_terminal_and_can_be_encoded(text):
    for made in (printable(text), one_line(text), json_text([text]), shown(text)):
        assert not STEERS & set(map(ord, made))
        made.encode()
    assert "\n" not in one_line(text)
    assert len(shown(text)) <= 60


@given(TREES)
def test_json_that_is_shown_reads_back_as_what_it_was(value):
    assert json.loads(json_text(value)) == value


# ---------------------------------------------------------------------- reading


@given(TREES)
def test_json_reads_back(value):
    assert loads(json.dumps(value)) == value


def words_of(parse, text: str) -> str:
    """What a text is refused with; nothing where it is taken."""
    try:
        parse(text)
    except (ValueError, UsageError) as error:
        return str(error) or "refused without a word"
    return ""


@given(st.text(max_size=60) | st.lists(st.sampled_from('[]{}",:\\ud800 NaN1e9truefals-0.'), max_size=60).map("".join))
def test_a_text_is_json_or_is_refused_with_few_words(text):
    words = words_of(lambda content: json.dumps(loads(content), allow_nan=False).encode(), text)
    assert len(words) < 300
    assert "\n" not in words


@given(TREES)
def test_yaml_reads_back(value):
    assert load_yaml(yaml.safe_dump(value)) == value


@given(
    st.lists(st.sampled_from([*"[]{}:,-?&*!|>%@`'\"#\n \t", "a", "1", "<<", "!!set", "2001-01-01", "é"]), max_size=40)
)
def test_a_text_is_yaml_or_is_refused_with_few_words(parts):
    words = words_of(load_yaml, "".join(parts))
    assert len(words) < 320
    assert "\n" not in words


@given(ANY_TEXT, TREES)
def test_a_setting_is_taken_or_refused_as_usage(key, value):
    assert len(words_of(lambda text: build(parse_set(text)), f"{key}={json.dumps(value)}")) < 1000


@given(st.text(st.sampled_from("0123456789,- x٣"), max_size=12))
def test_numbers_of_shots_are_sorted_and_positive_or_refused(text):
    try:
        numbers = parse_shots(text)
    except UsageError:
        return
    assert numbers == sorted(set(numbers))
    assert numbers[0] >= 1


TENSORS = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]),
)
SAVED = st.dictionaries(
    TEXTS, st.recursive(PLAIN | TENSORS, lambda inner: st.lists(inner, max_size=3), max_leaves=6), max_size=4
)


@given(SAVED)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_torch_saves_of_tensors_and_plain_values_reads_back(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    assert same(load_torch(tmp_path / "x.pt"), content)


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@given(st.binary(max_size=400))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_are_no_checkpoint(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(LeverError, match="not executed"):
        load_torch(tmp_path / "x.pt")


PLACES = st.none() | st.dictionaries(
    TEXTS, TREES | st.fixed_dictionaries({"logprob": TREES, "decoded_token": TREES}), max_size=2
)


@given(st.lists(PLACES, max_size=5) | TREES, TEXTS)
def test_scores_of_a_server_are_a_finite_number_or_none(places, answer):
    score = log_prob_at_end(places, answer)
    assert score is None or score - score == 0


# ---------------------------------------------------------------------- the fuzz script


def fuzz(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / "fuzz.py"), *map(str, arguments)]
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True)


@pytest.mark.slow
def test_no_parser_fails_on_the_first_spoilt_inputs():
    done = fuzz("--cases", 10)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_no_parser_fails_on_ten_thousand_spoilt_inputs():
    done = fuzz("--cases", 10_000)
    assert done.returncode == 0, done.stdout + done.stderr


def eats_memory(content):
    return b"x" * (600 << 20)


def claims_memory(content):
    try:
        return bytearray(1 << 45)
    except MemoryError as error:
        raise LeverError("it is damaged") from error


def spins(content):
    while True:
        len(content)


def calls(content):
    os.system(f"touch {CANARY}")


def unpickles(content):
    pickle.loads(pickle.dumps(os.getcwd))


def warns(content):
    warnings.warn("something is amiss", stacklevel=1)


def writes(content):
    with open("../not-mine", "a"):
        pass


def refuses(words):
    def parse(content):
        raise LeverError(words)

    return parse


CANARY = "fuzz-canary"
BROKEN = {
    "tracebacks": [lambda content: {}["key"], lambda content: sys.exit(3)],
    "printed": [warns, lambda content: print("hello"), lambda content: os.write(2, b"hello")],
    "messages": [refuses("two\nlines"), refuses("x" * 3000), refuses("")],
    "written": [writes, lambda content: os.mkdir("../not-mine")],
    "executed": [calls, unpickles],
    "over memory": [eats_memory, claims_memory],
    "over time": [spins, lambda content: time.sleep(1000)],
    "crashes": [lambda content: os.abort(), lambda content: os._exit(1)],
}


@pytest.mark.parametrize(("kind", "parse"), [(kind, parse) for kind, each in BROKEN.items() for parse in each])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_broken_parser_is_seen_for_what_it_is(script, tmp_path, kind, parse):
    harness = script("fuzzing.harness")

    def breaks_at_last(content):
        return parse(content) if content == b"bad" else None

    target = harness.Target([b"seed"], lambda rng, content: content, breaks_at_last, [b"bad", b"good"])
    tally = harness.run(
        harness.Parser("x", lambda folder: target),
        range(4),
        0,
        harness.Limits(0.3 if kind == "over time" else 1.0),
        tmp_path,
    )
    assert tally.cases == 4
    assert {outcome: n for outcome, n in tally.counts.items() if outcome != "accepted"} == {kind: 1}
    assert tally.counts["accepted"] == 3
    assert [(failure["case"], failure["kind"]) for failure in tally.failures] == [(1, kind)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_parser_that_refuses_its_own_seed_ends_the_run(script):
    harness = script("fuzzing.harness")
    target = harness.Target([b"seed"], lambda rng, content: content, refuses("no"))
    with pytest.raises(RuntimeError, match="seed 0 is refused: no"):
        harness.run(harness.Parser("x", lambda folder: target), range(4), 0, harness.Limits())


def in_a_file(read):
    def parse(content):
        with open("x", "wb") as file:
            file.write(content)
        return read("x")

    return parse


def reads_yaml(path):
    with open(path, "rb") as file:
        return yaml.unsafe_load(file)


CARELESS = {
    "checkpoint": lambda path: torch.load(path, weights_only=False),
    "embeddings.npy": lambda path: np.load(path, allow_pickle=True),
    "config": reads_yaml,
}


@pytest.mark.parametrize("name", CARELESS)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_payloads_run_where_a_parser_lets_them(script, name):
    harness, parser = script("fuzzing.harness"), script("fuzz").PARSERS[name]

    def begin(folder):
        return parser.begin(folder)._replace(parse=in_a_file(CARELESS[name]))

    tally = harness.run(harness.Parser(name, begin, loads=True), range(24), 0, harness.Limits(1.0))
    assert tally.counts["executed"]


def test_a_case_is_made_again_by_its_number(script):
    target = script("fuzzing.harness").Target(
        [b'{"a": [1, 2]}'], script("fuzzing.mutations").spoil_json, len, [b"known"]
    )
    first = [target.case("x", 0, number) for number in range(200)]
    assert first == [target.case("x", 0, number) for number in range(200)]
    assert first[:2] == [b'{"a": [1, 2]}', b"known"]
    assert len(set(first)) > 150
    assert first[10:] != [target.case("x", 1, number) for number in range(10, 200)]


def test_the_script_ends_with_a_table_and_the_status_of_its_worst(tmp_path):
    done = fuzz("--cases", 20, "--parsers", "best,icds", "--results", tmp_path / "table.md")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert [line.split("|")[1].strip() for line in lines[:5]] == ["parser", "---", "best", "icds", "all"]
    assert lines[4].split("|")[2].strip() == "40"
    assert fuzz("--parsers", "nothing").returncode == 2


def test_the_bounds_of_the_fuzzer(script):
    harness, pictures = script("fuzzing.harness"), script("fuzzing.pictures")
    assert harness.Parser("text", None).memory == 256 << 20
    assert [parser.memory for parser in pictures.PARSERS] == [768 << 20]
    assert harness.Limits._field_defaults["case"] == 5.0
    assert harness._LONGEST == 2000
