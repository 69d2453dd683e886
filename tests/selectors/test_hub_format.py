"""A shared policy's folder or hub id: every variant comes back whole; what does not fit is refused."""

import json
from pathlib import Path

import pytest
import torch
from official import hub_cache
from policies import logits, saved
from safetensors.torch import load_file, save_file

from lever_lm import load_policy
from lever_lm.evaluation.export import export
from lever_lm.selectors.pointer.checkpoint import save_torch
from lever_lm.selectors.pointer.hub_format import policy_folder, setting_of
from lever_lm.selectors.pointer.variants import VARIANTS
from lever_lm.utils.errors import LeverError

# Every value of every variant, each once.
EVERY = [
    {},
    {"stop": True},
    *({name: value} for name, values in VARIANTS.items() for value in values if value not in ("none", "dot")),
]


@pytest.fixture
def shared(tmp_path) -> Path:
    """An exported folder."""
    export(saved(tmp_path / "grpo_epoch5.pt"), "named", tmp_path / "shared")
    return tmp_path / "shared"


@pytest.mark.parametrize("variant", EVERY, ids=lambda v: "-".join(map(str, v.values())) or "plain")
def test_every_variant_comes_back_with_equal_logits(tmp_path, variant):
    path = saved(tmp_path / "grpo_epoch5.pt", num_layers=2, num_heads=2, temperature=0.3, **variant)
    export(path, "named", tmp_path / "shared")
    before, after = load_policy(path), load_policy(tmp_path / "shared")
    assert not after.training
    assert after.shape == before.shape
    assert torch.equal(logits(after), logits(before))


# ---------------------------------------------------------------------- a hub id


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    return tmp_path / "home"


def test_a_hub_id_is_taken_from_the_hubs_cache(hub, shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub_cache(hub, "some.one/my-policy_1.0", "model", shared, left_out=("README.md", "more.safetensors"))
    assert torch.equal(logits(load_policy("some.one/my-policy_1.0")), logits(load_policy(shared)))


def test_a_hub_id_that_is_not_here_names_the_command_that_fetches_it(hub, shared, tmp_path, lever):
    wanted = r"hf download some/one config\.json model\.safetensors"
    with pytest.raises(LeverError, match=wanted):
        load_policy("some/one")
    hub_cache(hub, "some/one", "model", shared, left_out=("model.safetensors",))
    with pytest.raises(LeverError, match=wanted):
        load_policy("some/one")
    done = lever("infer", "--ckpt", "some/one")
    assert done.status == 1
    assert done.err.count("lever: ") == 1
    with pytest.raises(LeverError, match=r"cannot read the checkpoint some/one\.pt"):  # a file's name: no hub id
        load_policy("some/one.pt")


# ---------------------------------------------------------------------- strictly


def test_weights_that_do_not_fit_are_refused(shared):
    weights, good = shared / "model.safetensors", load_file(shared / "model.safetensors")
    for bad, message in (
        ({**good, "more": torch.zeros(1)}, "does not hold the weights"),
        ({k: v for k, v in good.items() if k != "attn_norms.0.bias"}, "does not hold the weights"),
        ({**good, "query_proj.weight": torch.zeros(9, 9)}, "'hidden_dim'=8, as its config says"),
        ({**good, "attn_norms.0.bias": torch.full((8,), float("nan"))}, "NaN or infinite weights in attn_norms"),
        ({**good, "attn_norms.0.bias": torch.zeros(8, dtype=torch.int8)}, "not the weights"),
        ({name: tensor.to(torch.float8_e4m3fn) for name, tensor in good.items()}, "float8"),
    ):
        save_file(bad, weights)
        with pytest.raises(LeverError, match=message):
            load_policy(shared)
    weights.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(LeverError, match=r"cannot read the weights .*model\.safetensors"):
        load_policy(shared)
    save_torch(weights, {"weights": torch.zeros(3)})  # a pickle
    with pytest.raises(LeverError, match="cannot read the weights"):
        load_policy(shared)
    weights.unlink()
    with pytest.raises(LeverError, match="No such file"):
        load_policy(shared)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": {"d_model": 6, "hidden_dim": 1 << 40}}, "does not hold the weights"),
        ({"policy": {"d_model": 6, "hidden_dim": 8, "num_layers": 1 << 40}}, "does not hold the weights"),
        ({"policy": {"d_model": 6, "hidden_dim": 8, "script": "x"}}, "does not hold the weights"),
        ({"policy": None}, "does not say the policy's shape"),
        ({"format_version": 2}, "version 2, not 1: install the lever_lm"),
        ({"format": "transformers"}, "is of something else"),
        ({"auto_map": {"AutoModel": "x.py"}}, "holds a key 'auto_map'"),
    ],
)
def test_a_config_that_lies_is_refused(shared, values, message):
    config = json.loads((shared / "config.json").read_text())
    (shared / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(LeverError, match=message):
        load_policy(shared)


def test_folders_of_something_else_are_refused(tmp_path, shared):
    for content in ("", "[]", "{", '{"architectures": ["CLIPModel"]}', '{"format": "lever_lm/policy"' * 9):
        (shared / "config.json").write_text(content)
        with pytest.raises(LeverError, match=r"config\.json"):
            load_policy(shared)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LeverError, match=r"cannot read the checkpoint .*empty: .*lever export"):
        load_policy(tmp_path / "empty")


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("features", "encoder", "asset:../../../home/me/clip"),
        ("features", "encoder", ".."),
        ("features", "encoder", "~"),
        ("lvlm", "path", "asset:../lvlm"),
        ("data", "okvqa_path", "asset:../../okvqa"),
        ("data", "train_path", "hub:../here"),
        ("data", "file_prefix", "../../../photos/"),
    ],
)
def test_no_path_of_a_strangers_config_leads_out_of_the_assets(section, name, value):
    assert setting_of({section: {name: value}}) == {}


def test_a_mistyped_path_into_a_folder_that_is_here_is_no_hub_id(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("lever_lm.selectors.pointer.hub_format.fetch_policy", asked.append)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    for path in ("results/demo", "reslts/grpo.pt"):
        assert policy_folder(path) is None
    assert asked == []
    policy_folder("some/one")
    assert asked == ["some/one"]
