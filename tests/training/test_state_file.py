"""A state.pt that is broken anywhere is refused in one message."""

import math
from pathlib import Path

import pytest
import torch
from hostile import small_policy

from lever_lm.training.run_dir import RunFolder
from lever_lm.training.run_state import Journal
from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_torch_load import load_torch

INPUTS = {"data": "d"}


def run_of(folder: Path, **change) -> Path:
    """A run of one epoch, its state changed: a dotted name → another value, or none for a deleted one."""
    policy = small_policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
    policy.query_proj.weight.sum().backward()
    optimizer.step()
    journal = Journal(RunFolder(folder), {"policy": policy.shape}, INPUTS, lambda text: None)
    extra = {"old": policy.state_dict(), "reference": policy.state_dict(), "beta": 0.1, "online": None}
    journal.commit({"phase": "grpo", "epoch": 1, "train_loss": 0.5, "beta": 0.1}, policy, optimizer, extra)
    state = load_torch(folder / "state.pt")
    for name, value in change.items():
        *outer, last = name.split("__")
        inner = state
        for key in outer:
            inner = inner[int(key) if key.isdecimal() else key]
        inner[int(last) if last.isdecimal() else last] = value
    torch.save(state, folder / "state.pt")
    return folder


BROKEN_STATES = {
    "rows": [None, [], [1], [{}], {"a": 1}, "text"],
    "rows__0__train_loss": [[1.0], math.nan, {"a": 1}, torch.ones(2)],
    "rows__0__epoch": ["1", 2.0, True],
    "rows__0__phase": ["sft", None, 3],
    "rows__0__warnings": [["a"], {"a": 1}],
    "epoch": [None, 7, "1"],
    "phase": [None, "rce", 1],
    "policy": [None, {}, {"a": torch.ones(1)}, [1], {"query_proj.weight": "x"}],
    "policy__query_proj.weight": [torch.ones(3, 3), torch.ones(8, 8, dtype=torch.int64), torch.full((8, 8), math.nan)],
    "optimizer": [None, {}, [1], {"state": {}, "param_groups": 3}, {"state": [], "param_groups": []}],
    "optimizer__param_groups__0__lr": ["fast", None, math.inf],
    "optimizer__param_groups__0__params": [[0], "abc", None],
    "optimizer__state": [{0: 1}, {99: {}}, {"a": {}}, {0: {"step": torch.ones(7)}}],
    "rng": [None, {}, {"cpu": torch.ones(3)}, {"cpu": torch.ones(3, dtype=torch.uint8)}, [1]],
    "extra": [None, [1], "x", {}],
    "extra__beta": ["x", math.nan, None],
    "extra__old": [{"a": torch.ones(1)}, [1], "x"],
    "extra__reference": [{"a": torch.ones(1)}, [1], "x"],
    "extra__online": [[1], {}, {"sequences": 1}, {"sequences": 1, "rewards": 2, "mask": 3}, {"mask": torch.ones(2, 2)}],
    "inputs": [None, [1], {"data": ["d"]}, dict.fromkeys(INPUTS, torch.ones(2)), "x"],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BROKEN_STATES.items() for value in values],
    ids=lambda value: str(value)[:24].replace("\n", " "),
)
def test_a_state_that_is_broken_anywhere_is_refused_in_one_message(tmp_path, name, value):
    run = run_of(tmp_path / "run", **{name: value})
    policy = small_policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
    journal = Journal(RunFolder(run), {"policy": policy.shape}, INPUTS, lambda text: None)

    def go_on():
        journal.resume()
        journal.restore("grpo", policy, optimizer)

    with pytest.raises(LeverError, match=r"^[^\n]*--overwrite[^\n]*$"):
        go_on()


def test_the_state_of_another_policy_is_refused_and_that_of_the_same_is_taken(tmp_path):
    run = run_of(tmp_path / "run")
    for shape, fits in (({}, True), ({"hidden_dim": 12}, False), ({"num_layers": 2}, False)):
        policy = small_policy(**shape)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
        journal = Journal(RunFolder(run), {"policy": small_policy().shape}, INPUTS, lambda text: None)
        journal.resume()
        if fits:
            assert journal.restore("grpo", policy, optimizer)["beta"] == 0.1
            continue
        with pytest.raises(LeverError, match=r"state\.pt is no state of this run: its policy is .*another policy"):
            journal.restore("grpo", policy, optimizer)
        with pytest.raises(LeverError, match=r"state\.pt is no state of this run: its policy is .*another policy"):
            Journal(RunFolder(run), {"policy": policy.shape}, INPUTS, lambda text: None).resume()
