"""Checkpoints: the lineage's files read to equal logits, conversion both ways, and no file is ever executed."""

import json
import math
import pickle
import signal
from collections import OrderedDict

import pytest
import torch
from helpers import CHECKOUT
from hostile import Executed
from safetensors.torch import load_file

from lever_lm.selectors.pointer.checkpoint import (
    load_policy,
    own_config,
    save_torch,
    to_v2,
    to_v3,
    v2_to_v3_keys,
    v3_content,
    v3_to_v2_keys,
)
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_torch_load import load_torch

GOLDEN = CHECKOUT / "tests/data" / "checkpoints"
V3 = GOLDEN / "rce_epoch2_plain_L1.pt"
V2 = GOLDEN / "rce_epoch2_plain_L1_v2format.ckpt"
FACTS = json.loads((GOLDEN / "rce_epoch2_plain_L1.json").read_text(encoding="utf-8"))
PROBE = load_file(GOLDEN / "rce_epoch2_plain_L1_probe.safetensors")


def make(**kwargs):
    torch.manual_seed(0)
    return PointerSelector(**{"d_model": 6, "hidden_dim": 8, **kwargs}).eval()


def save_v3(path, policy, **config):
    save_torch(path, v3_content(policy, epoch=24, phase="grpo", kl_beta=0.1, metrics={"val_loss": 1.5}, config=config))
    return path


def assert_same_policy(one, other):
    torch.manual_seed(1)
    query, candidates = torch.randn(3, one.d_model), torch.randn(3, 7, one.d_model)
    sequences = torch.tensor([[0, 3], [5, 1], [2, 6]])
    assert torch.equal(one.logits(query, candidates, sequences), other.logits(query, candidates, sequences))
    assert torch.equal(one.select(query, candidates, 3), other.select(query, candidates, 3))


# ---------------------------------------------------------------------- the lineage's files


@pytest.mark.parametrize("path", [V3, V2], ids=["v3", "v2"])
def test_golden_checkpoint_gives_the_probes_logits_and_picks(path):
    policy = load_policy(path)
    assert not policy.training
    picks = policy.select(PROBE["query_emb"], PROBE["cand_emb"], 2)
    assert torch.equal(picks, PROBE["predictions"])
    with torch.no_grad():
        logits = policy.logits(PROBE["query_emb"], PROBE["cand_emb"], picks)
    torch.testing.assert_close(logits, PROBE["logits_greedy"], rtol=0, atol=1e-5)


def test_the_key_map_is_exactly_the_golden_one():
    state = load_torch(V3)["model_state_dict"]
    converted = v3_to_v2_keys(state)
    pairs = zip(state, converted, strict=True)
    assert dict(pairs) == FACTS["key_map"]
    back = v2_to_v3_keys(converted)
    assert list(back) == list(state)
    assert all(back[key] is state[key] for key in state)


def test_converting_the_golden_v3_gives_the_golden_v2():
    converted, dropped = to_v2(load_torch(V3), V3)
    golden = load_torch(V2)
    assert dropped == FACTS["dropped"] == []
    assert converted.keys() == golden.keys()
    assert {key: value for key, value in converted.items() if key != "state_dict"} == FACTS["v2_top_level"]
    assert converted["state_dict"].keys() == golden["state_dict"].keys()
    for key, tensor in golden["state_dict"].items():
        assert torch.equal(converted["state_dict"][key], tensor)


def test_a_v2_state_without_the_outer_prefix_is_read_too(tmp_path):
    content = load_torch(V2)
    content["state_dict"] = {key.removeprefix("lever_lm."): tensor for key, tensor in content["state_dict"].items()}
    save_torch(tmp_path / "inner.ckpt", content)
    assert_same_policy(load_policy(tmp_path / "inner.ckpt"), load_policy(V3))


def test_the_number_of_heads_is_taken_as_given_where_the_file_does_not_say():
    assert load_policy(V3).num_heads == 1
    assert load_policy(V3, num_heads=4).num_heads == 4


# ---------------------------------------------------------------------- ours


def test_a_v3_file_has_the_lineages_keys_and_ours(tmp_path):
    path = save_v3(tmp_path / "grpo_epoch25.pt", make(), seed=3)
    content = torch.load(path, weights_only=True)
    assert set(content) == {"epoch", "phase", "model_state_dict", "kl_beta", "metrics", "config", "format"}
    assert (content["epoch"], content["phase"], content["kl_beta"]) == (24, "grpo", 0.1)
    assert content["metrics"] == {"val_loss": 1.5}
    assert content["config"]["seed"] == 3
    assert content["config"]["policy"]["hidden_dim"] == 8


def test_weights_in_a_checkpoint_do_not_follow_further_training():
    policy = make()
    content = v3_content(policy, epoch=0, phase="rce", kl_beta=0.0, metrics={}, config={})
    before = content["model_state_dict"]["query_proj.weight"].clone()
    with torch.no_grad():
        policy.query_proj.weight.zero_()
    assert torch.equal(content["model_state_dict"]["query_proj.weight"], before)


# ---------------------------------------------------------------------- conversion


@pytest.mark.parametrize("kwargs", [{}, {"state_update": "gate"}, {"num_heads": 2, "temperature": 0.5}], ids=str)
def test_v3_to_v2_and_back_is_the_same_policy(tmp_path, kwargs):
    policy = make(**kwargs)
    v3 = save_v3(tmp_path / "grpo_epoch25.pt", policy)
    content, _ = to_v2(load_torch(v3), v3)
    save_torch(tmp_path / "v2.ckpt", content)
    assert_same_policy(load_policy(tmp_path / "v2.ckpt"), policy)
    save_torch(tmp_path / "back.pt", to_v3(load_torch(tmp_path / "v2.ckpt"), tmp_path / "v2.ckpt"))
    again = load_policy(tmp_path / "back.pt")
    assert again.shape == policy.shape
    assert_same_policy(again, policy)
    assert load_torch(tmp_path / "back.pt")["epoch"] == 24


def test_our_config_has_a_key_of_its_own_in_v2(tmp_path):
    path = save_v3(tmp_path / "a.pt", make(), dataset="digits")
    content, _ = to_v2(load_torch(path), path)
    assert set(content) == {*load_torch(V2), "lever_lm_config"}
    assert content["hyper_parameters"] == FACTS["v2_top_level"]["hyper_parameters"]
    assert own_config(content)["dataset"] == "digits"


def test_the_golden_v2_converts_back_to_the_golden_v3():
    content = to_v3(load_torch(V2), V2)
    golden = load_torch(V3)
    assert content["epoch"] == golden["epoch"]
    assert content["model_state_dict"].keys() == golden["model_state_dict"].keys()
    for key, tensor in golden["model_state_dict"].items():
        assert torch.equal(content["model_state_dict"][key], tensor)


def test_several_layers_are_refused_unless_truncation_is_allowed(tmp_path):
    policy = make(num_layers=3)
    path = save_v3(tmp_path / "a.pt", policy)
    with pytest.raises(LeverError, match=r"has 3 cross-attention layers and v2 has one.*--allow-truncate"):
        to_v2(load_torch(path), path)
    content, dropped = to_v2(load_torch(path), path, allow_truncate=True)
    assert {key.split(".")[1] for key in dropped} == {"1", "2"}
    assert len(dropped) == 2 * 6
    save_torch(tmp_path / "v2.ckpt", content)
    truncated = load_policy(tmp_path / "v2.ckpt")
    assert truncated.num_layers == 1
    first = make()
    first.load_state_dict({key: tensor for key, tensor in policy.state_dict().items() if key not in dropped})
    assert_same_policy(truncated, first)


def test_a_converted_file_shares_no_memory_with_its_source():
    source = load_torch(V3)
    content, _ = to_v2(source, V3)
    source["model_state_dict"]["query_proj.weight"].zero_()
    assert content["state_dict"]["lever_lm.pointer_selector.query_proj.weight"].abs().sum() > 0


# ---------------------------------------------------------------------- files that are none


@pytest.mark.parametrize("inside", [False, True], ids=["plain-pickle", "in-a-checkpoint"])
def test_a_file_with_code_is_refused_and_not_executed(tmp_path, inside):
    trap = tmp_path / "executed"
    path = tmp_path / "evil.pt"
    if inside:
        torch.save({**load_torch(V3), "extra": Executed(trap)}, path)
    else:
        path.write_bytes(pickle.dumps(Executed(trap)))
    with pytest.raises(LeverError, match=r"evil\.pt is not a checkpoint of tensors and plain values .*not executed"):
        load_policy(path)
    assert not trap.exists()


def test_cut_files_files_of_another_kind_missing_ones_and_folders_are_refused(tmp_path):
    whole, path = V3.read_bytes(), tmp_path / "other.pt"
    others = [b"hello", b"{}", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x80\x04N."]
    for content in [*others, *(whole[:size] for size in (0, 1, 100, 5000, -1))]:
        path.write_bytes(content)
        with pytest.raises(LeverError, match=r"other\.pt"):
            load_policy(path)
    for missing in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(LeverError, match="cannot read the checkpoint"):
            load_policy(missing)


@pytest.mark.parametrize(
    "content", [[1], {}, {"model_state_dict": {}}, {"state_dict": {"a": 1}}, {"epoch": 3}, 5], ids=str
)
def test_a_torch_file_without_policy_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(LeverError, match=r"other\.pt"):
        load_policy(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("query_proj.weight", torch.zeros(8, 9)),
        ("query_proj.weight", torch.zeros(8)),
        ("query_proj.weight", torch.tensor(1.0)),
        ("query_proj.weight", torch.zeros(0, 0)),
        ("input_proj.weight", torch.zeros(8)),
        ("cand_proj.weight", torch.zeros(3, 3)),
        ("cross_attn_layers.0.in_proj_weight", None),
        ("attn_norms.7.weight", torch.zeros(8)),
        ("surplus.weight", torch.zeros(1)),
    ],
    ids=lambda value: value if isinstance(value, str) else str(getattr(value, "shape", "absent")),
)
def test_weights_of_another_shape_or_name_are_refused(tmp_path, key, tensor):
    content = v3_content(make(), epoch=0, phase="rce", kl_beta=0.0, metrics={}, config={})
    del content["config"]
    content["model_state_dict"][key] = tensor
    if tensor is None:
        del content["model_state_dict"][key]
    save_torch(tmp_path / "odd.pt", content)
    with pytest.raises(LeverError, match=r"odd\.pt.*PointerSelector"):
        load_policy(tmp_path / "odd.pt")


@pytest.mark.parametrize(
    "shape", [{"hidden_dim": 9}, {"width": 3}, {"num_heads": 3}, "abc", {"hidden_dim": "x"}], ids=str
)
def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path, shape):
    content = v3_content(make(), epoch=0, phase="rce", kl_beta=0.0, metrics={}, config={})
    content["config"]["policy"] = shape
    save_torch(tmp_path / "odd.pt", content)
    with pytest.raises(LeverError, match=r"odd\.pt.*PointerSelector"):
        load_policy(tmp_path / "odd.pt")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    policy = make()
    with torch.no_grad():
        policy.cand_proj.weight[2, 3] = value
    path = save_v3(tmp_path / "grpo_epoch3.pt", policy)
    with pytest.raises(LeverError, match=r"grpo_epoch3\.pt: NaN or infinite weights in cand_proj\.weight"):
        load_policy(path)


# ---------------------------------------------------------------------- writing


@pytest.mark.parametrize("moment", [0, 100])
def test_an_interrupt_within_a_save_comes_after_it(tmp_path, moment):
    """torch.save writes through a callback and answers an interrupt in it with a RuntimeError of its own."""
    seen = []

    class Interrupting:
        def __reduce__(self):  # reached while torch.save pickles
            signal.raise_signal(signal.SIGINT)
            seen.append(moment)
            return (OrderedDict, ())

    content = {f"tensor{i}": torch.zeros(8) for i in range(moment)} | {"last": Interrupting()}
    with pytest.raises(KeyboardInterrupt):
        save_torch(tmp_path / "a.pt", content)
    assert seen == [moment]
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert len(load_torch(tmp_path / "a.pt")) == moment + 1


def test_a_save_that_fails_leaves_what_was_there_and_no_temporary_file(tmp_path):
    path = tmp_path / "a.pt"
    save_torch(path, {"epoch": 1})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_torch(path, {"epoch": 2, "cannot": lambda: None})
    assert load_torch(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]
