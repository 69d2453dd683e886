"""Every YAML that is shipped builds a Config, and the defaults are those of the pages and of the public functions."""

import inspect

import pytest
import yaml

from lever_lm.config.load import resolve
from lever_lm.config.schema import Config, to_dict
from lever_lm.config.values import configs_root
from lever_lm.losses import grpo_loss, rce_temperature
from lever_lm.policy import PointerSelector
from lever_lm.rewards import group_advantage, reward
from lever_lm.rollouts import load_groups
from lever_lm.utils.paths import asset_path

YAMLS = sorted(configs_root().rglob("*.yaml"))
LVLMS = ("qwen2.5_vl_3B", "qwen2.5_vl_3B_classic", "qwen2.5_vl_3B_server")


def flat(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def values(config) -> dict:
    return dict(flat(to_dict(config)))


def test_the_names_users_bring_are_there():
    names = "dataset/digits dataset/okvqa_local lvlm/qwen2.5_vl_3B lvlm/qwen2.5_vl_7B recipe/classic"
    names += " sampler/rand_sampler sampler/text_sim_sampler sampler/img_sim_sampler sampler/mix_sampler"
    names += " selector/answer_match selector/epr selector/lever_lm selector/fixed_set"
    assert set(names.split()) <= {f"{path.parent.name}/{path.stem}" for path in YAMLS}


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_yaml_builds_a_config_that_holds_its_values(path):
    config, in_effect = resolve({path.parent.name: path.stem}, None, [], {})
    assert in_effect == []
    held = values(config)
    for key, value in flat(yaml.safe_load(path.read_text(encoding="utf-8"))):
        assert held[key] == value, key
        if isinstance(value, str) and value.startswith("asset:"):
            assert asset_path(value).is_dir(), key


def test_models_of_the_hub_have_yamls_by_the_names_of_the_page():
    named = {
        "qwen2_vl_2B": ("Qwen/Qwen2-VL-2B-Instruct", {}, "interleaved"),
        "qwen3_vl_2B": ("Qwen/Qwen3-VL-2B-Instruct", {}, "interleaved"),
        "qwen3_vl_4B": ("Qwen/Qwen3-VL-4B-Instruct", {}, "interleaved"),
        "qwen3_vl_8B": ("Qwen/Qwen3-VL-8B-Instruct", {}, "interleaved"),
        "internvl3_5_4B": ("OpenGVLab/InternVL3_5-4B-HF", {"crop_to_patches": False}, "interleaved"),
        "gemma3_4B": ("google/gemma-3-4b-it", {"do_pan_and_scan": False}, "interleaved"),
        "smolvlm2_2B": ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", {"do_image_splitting": False}, "interleaved"),
        "llava_onevision_7B": ("llava-hf/llava-onevision-qwen2-7b-ov-hf", {}, "dialogue"),
        "idefics3_8B": ("HuggingFaceM4/Idefics3-8B-Llama3", {"do_image_splitting": False}, "interleaved"),
    }
    for name, (path, options, style) in named.items():
        config, _ = resolve({"lvlm": name}, None, [], {})
        assert (config.lvlm.path, config.lvlm.processor, config.prompt.style) == (path, options, style)
        assert (config.lvlm.family, config.lvlm.num_beams) == ("auto", 3)


def test_the_classic_lvlm_asks_decodes_and_cuts_as_lever_plus_does():
    config, _ = resolve({"lvlm": "qwen2.5_vl_3B_classic"}, None, [], {})
    lvlm, prompt = config.lvlm, config.prompt
    assert (lvlm.num_beams, lvlm.max_new_tokens, lvlm.length_penalty) == (3, 5, 0.0)
    assert (lvlm.repetition_penalty, lvlm.eos) == (1.05, "tokenizer")
    assert (prompt.order, prompt.cut) == ("first_pick_first", "classic")


def test_the_defaults_are_those_that_the_pages_name():
    named = {
        "grpo.top_k": [], "grpo.dropout": "both", "grpo.anchor": "rce", "grpo.refresh_every": 5,
        "grpo.reference": "start",
        "grpo.advantage": "zscore", "grpo.advantage_scale": "group", "grpo.advantage_clip": 5.0,
        "grpo.clip_epsilon": 0.2, "grpo.clip_epsilon_high": 0.0, "grpo.kl_beta": 0.1, "grpo.kl": "k3",
        "grpo.adaptive_kl": False, "grpo.schedule": "constant", "grpo.warmup_steps": 0, "grpo.patience": 0,
        "grpo.entropy_beta": 0.0, "grpo.freeze_backbone": False, "grpo.online": False, "grpo.epochs": 50,
        "grpo.batch_size": 64, "rce.epochs": 5, "rce.batch_size": 64, "rce.temperature_start": 2.0,
        "rce.temperature_end": 0.5, "policy.state_update": "none", "policy.scorer": "dot", "policy.diversity": "none",
        "policy.stop": False, "rollout.infoscore": 0, "rollout.pool_size": 64, "rollout.num_queries": 5000,
        "infer.pool_size": 256,
        "rollout.shots": 2,
        "reward.mode": "hard_plus_soft",
        "reward.missing": "refuse", "lvlm.bank_disk": 64.0, "lvlm.batch_tokens": 0, "lvlm.concurrency": 32,
        "lvlm.retries": 5, "lvlm.timeout": 120.0, "lvlm.wait": 0.0, "lvlm.max_new_tokens": 5, "lvlm.num_beams": 1,
    }  # fmt: skip
    found = values(Config())
    assert {key: found[key] for key in named} == named
    of_lvlms = {name: resolve({"lvlm": name}, None, [], {})[0].lvlm.num_beams for name in LVLMS}
    assert of_lvlms == {"qwen2.5_vl_3B": 3, "qwen2.5_vl_3B_classic": 3, "qwen2.5_vl_3B_server": 1}
    digits, okvqa, vqav2 = (resolve({"dataset": n}, None, [], {})[0] for n in ("digits", "okvqa_local", "vqav2_local"))
    assert (digits.rollout.num_queries, digits.rollout.shots, digits.sampler.name) == (300, 2, "mix_sampler")
    assert (okvqa.sampler.name, vqav2.sampler.name) == ("rand_sampler", "rand_sampler")


def test_classic_sets_what_the_page_has_in_bold():
    ours, classic = (values(resolve({"recipe": name}, None, [], {})[0]) for name in (None, "classic"))
    assert {key: value for key, value in classic.items() if ours[key] != value} == {
        "grpo.top_k": [3, 5],
        "grpo.dropout": "new_only",
        "grpo.anchor": "init",
        "grpo.refresh_every": 0,
        "grpo.reference": "old",
        "grpo.adaptive_kl": True,
        "reward.missing": "lineage",
        "rce.batch_size": 1,
        "grpo.batch_size": 1,
        "rce.lr": 1e-4,
        "grpo.lr": 5e-6,
        "grpo.weight_decay": 0.01,
    }


def test_the_public_functions_have_the_defaults_of_the_config():
    defaults = Config()
    for function, section, names in [
        (grpo_loss, defaults.grpo, {"clip_epsilon": "clip_epsilon", "kl_beta": "kl_beta"}),
        (group_advantage, defaults.grpo, {"min_std": "advantage_min_std", "clip": "advantage_clip"}),
        (rce_temperature, defaults.rce, {"start": "temperature_start", "end": "temperature_end"}),
        *(
            (function, defaults.reward, {f"{name}_weight": f"{name}_weight" for name in ("hard", "soft", "rel")})
            for function in (reward, load_groups)
        ),
        (
            PointerSelector,
            defaults.policy,
            {key: key for key in to_dict(defaults.policy) if key != "candidate_features"},
        ),
    ]:
        found = inspect.signature(function).parameters
        assert {name: found[name].default for name in names} == {name: getattr(section, names[name]) for name in names}
