"""Readers of untrusted files, by property: what was written reads back, what is shown steers nothing, and what is
spoilt is refused with a message. The fuzz harness itself must see what goes wrong."""

import json
import os
import pickle
import sys
import time
import warnings

import numpy as np
import pytest
import torch
import yaml
from fuzz import run as fuzz_command
from fuzz.harness import CANARY, LONGEST_MESSAGE, Limits, Reader, Target, run
from fuzz.mutations import spoil_json
from fuzz.readers import READERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lever_lm.config.values import build, parse_set
from lever_lm.lvlm.openai_server import log_prob_at_end
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.safe_parse import load_yaml, loads
from lever_lm.utils.safe_torch_load import load_torch

NUMBERS = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
PLAIN = st.none() | st.booleans() | NUMBERS | TEXTS
TREES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4))
ANY_TEXT = st.text(st.characters(), max_size=200)  # half characters among it


# ---------------------------------------------------------------------- reading


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


# ---------------------------------------------------------------------- the fuzz harness

forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
QUICK = [
    "run-config",
    "rollouts",
    "icds",
    "metrics",
    "best",
    "results",
    "diagnosis",
    "index",
    "official",
    "environment-file",
    "bank",
]


@forks
@pytest.mark.parametrize("name", QUICK)
def test_a_reader_does_not_fail_on_its_first_spoilt_inputs(name):
    tally = run(READERS[name], range(60), 0, Limits())
    assert tally.failures == []
    assert tally.counts["refused"] > 10 or name in ("environment-file", "bank")  # these two read what they can


@pytest.mark.slow
@forks
@pytest.mark.parametrize("cases", [10, 10_000])
def test_no_reader_fails_on_spoilt_inputs(cases, capsys):
    assert fuzz_command.main(["--cases", str(cases)]) == 0, capsys.readouterr().out


def claims_memory():
    try:
        return bytearray(1 << 45)
    except MemoryError as error:
        raise LeverError("it is damaged") from error


def spins():
    while True:
        pass


def refuses(words):
    raise LeverError(words)


DEEDS = {
    "tracebacks": [lambda: {}["key"], lambda: sys.exit(3)],
    "printed": [lambda: warnings.warn("amiss", stacklevel=1), lambda: print("hello"), lambda: os.write(2, b"hello")],
    "messages": [lambda: refuses("two\nlines"), lambda: refuses("x" * 3000), lambda: refuses("")],
    "written": [lambda: open("../not-mine", "a").close(), lambda: os.mkdir("../not-mine-either")],
    "executed": [lambda: os.system(f"touch {CANARY}"), lambda: pickle.loads(pickle.dumps(os.getcwd))],
    "over memory": [lambda: b"x" * (600 << 20), claims_memory],
    "crashes": [os.abort, lambda: os._exit(1)],
    "refused": [lambda: refuses("no")],
}


@forks
@pytest.mark.parametrize(
    ("deeds", "seconds"), [(DEEDS, 3.0), ({"over time": [spins, lambda: time.sleep(1000)]}, 0.3)], ids=["deeds", "time"]
)
def test_a_broken_reader_is_seen_for_what_it_is(tmp_path, deeds, seconds):
    does = {f"{kind} {n}".encode(): deed for kind, each in deeds.items() for n, deed in enumerate(each)}
    target = Target(
        [b"seed"], lambda rng, content: content, lambda content: does.get(content, bool)() and None, list(does)
    )
    cases = range(2 * len(does))
    tally = run(Reader("x", lambda folder: target), cases, 0, Limits(seconds), tmp_path)
    assert tally.cases == len(cases)
    assert [failed.outcome for failed in tally.failures] == [
        kind for kind, each in deeds.items() for _ in each if kind != "refused"
    ]
    assert [failed.case for failed in tally.failures] == list(range(1, 2 * len(tally.failures), 2))
    assert tally.counts["accepted"] == len(cases) - len(does)
    kept = {path.read_bytes() for path in tmp_path.iterdir()}
    assert kept == {content for content in does if not content.startswith((b"crashes", b"refused", b"over time 1"))}


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


@forks
@pytest.mark.parametrize("name", CARELESS)
def test_the_payloads_run_where_a_reader_lets_them(name):
    def begin(folder):
        return READERS[name].begin(folder)._replace(parse=in_a_file(CARELESS[name]))

    assert run(Reader(name, begin, loads=True), range(10), 0, Limits(1.0)).counts["executed"]


def test_a_case_is_made_again_by_its_number():
    target = Target([b'{"a": [1, 2]}'], spoil_json, len, [b"known"])
    first = [target.case("x", 0, number) for number in range(200)]
    assert first == [target.case("x", 0, number) for number in range(200)]
    assert first[:2] == [b'{"a": [1, 2]}', b"known"]
    assert len(set(first)) > 150
    assert first[10:] != [target.case("x", 1, number) for number in range(10, 200)]


def test_the_bounds_of_the_fuzzer():
    assert {reader.memory >> 20 for name, reader in READERS.items() if name != "images"} == {256}
    assert READERS["images"].memory >> 20 == 768
    assert Limits().case == 5.0
    assert LONGEST_MESSAGE == 2000
