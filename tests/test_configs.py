"""Every YAML that is shipped builds a Config."""

import pytest
import yaml

from lever_lm.config import Config, asset_path
from lever_lm.settings import all_keys, configs_root, resolve

YAMLS = sorted(configs_root().rglob("*.yaml"))


def flat(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_the_names_users_bring_are_there():
    names = {f"{path.parent.name}/{path.stem}" for path in YAMLS}
    assert names >= {
        "dataset/digits",
        "dataset/okvqa_local",
        "lvlm/qwen2.5_vl_3B",
        "lvlm/qwen2.5_vl_7B",
        "sampler/rand_sampler",
        "sampler/text_sim_sampler",
        "sampler/img_sim_sampler",
        "sampler/mix_sampler",
        "recipe/classic",
    }


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_yaml_builds_a_config_that_holds_its_values(path, monkeypatch):
    from lever_lm.settings import ENVIRONMENT

    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    config, in_effect = resolve({path.parent.name: path.stem}, None, [], {})
    assert in_effect == []
    for key, value in flat(yaml.safe_load(path.read_text(encoding="utf-8"))):
        found = config
        for part in key.split("."):
            found = getattr(found, part)
        assert (list(found) if isinstance(value, list) else found) == value, key


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_asset_a_yaml_names_is_shipped(path):
    for key, value in flat(yaml.safe_load(path.read_text(encoding="utf-8"))):
        if isinstance(value, str) and value.startswith("asset:"):
            assert asset_path(value).is_dir(), key


def test_yamls_hold_known_keys_only():
    known = set(all_keys())
    for path in YAMLS:
        assert {key for key, _ in flat(yaml.safe_load(path.read_text(encoding="utf-8")))} <= known, path


def test_the_classic_lvlm_asks_decodes_and_cuts_as_lever_plus_does():
    config, _ = resolve({"lvlm": "qwen2.5_vl_3B_classic"}, None, [], {})
    lvlm, prompt = config.lvlm, config.prompt
    assert (lvlm.num_beams, lvlm.max_new_tokens, lvlm.length_penalty) == (3, 5, 0.0)
    assert (lvlm.repetition_penalty, lvlm.eos) == (1.05, "tokenizer")
    assert (prompt.order, prompt.cut) == ("first_pick_first", "classic")


def test_the_defaults_alone_are_a_config():
    assert Config().rollout.pool_size == 64
    assert Config().grpo.epochs == 50
    assert Config().rce.epochs == 5
