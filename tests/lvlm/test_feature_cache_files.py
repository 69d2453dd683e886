"""Files of the feature cache that are not what they say."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lever_lm.lvlm.feature_cache import FeatureCache

BAD_BANKS = {
    "nested": ({}, "[" * 100_000),
    "a number": ({}, "3"),
    "rows": ({"a" * 16: torch.zeros(3, 5)}, json.dumps({"a" * 16: [1, 4, 4]})),
    "flat": ({"a" * 16: torch.zeros(4)}, json.dumps({"a" * 16: [1, 4, 4]})),
    "integers": ({"a" * 16: torch.zeros(4, 5, dtype=torch.int64)}, json.dumps({"a" * 16: [1, 4, 4]})),
    "widths": (
        {"a" * 16: torch.zeros(4, 5), "b" * 16: torch.zeros(4, 6)},
        json.dumps({"a" * 16: [1, 4, 4], "b" * 16: [1, 4, 4]}),
    ),
    "a huge grid": ({"a" * 16: torch.zeros(4, 5)}, json.dumps({"a" * 16: [10**9, 10**9, 10**9]})),
    "negative": ({"a" * 16: torch.zeros(4, 5)}, json.dumps({"a" * 16: [1, -4, -4]})),
    "infinite": ({"a" * 16: torch.zeros(4, 5)}, '{"aaaaaaaaaaaaaaaa": [1, 4, 1e999]}'),
}


@pytest.mark.parametrize("kind", BAD_BANKS)
def test_a_bank_file_that_is_not_what_it_says_is_thrown_out(tmp_path, kind):
    tensors, grids = BAD_BANKS[kind]
    good, bad = tmp_path / f"{'1' * 16}.safetensors", tmp_path / f"{'2' * 16}.safetensors"
    save_file({"c" * 16: torch.zeros(4, 5)}, good, metadata={"grids": json.dumps({"c" * 16: [1, 4, 4]})})
    save_file(tensors, bad, metadata={"grids": grids})
    bank = FeatureCache(tmp_path, memory=1 << 20, disk=1 << 20)
    assert len(bank) == 1
    assert (good.exists(), bad.exists()) == (True, False)
