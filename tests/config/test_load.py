"""From YAML, environment and flags to a Config: which source wins, and what is refused."""

import os
import threading

import pytest

from lever_lm.config.load import ENVIRONMENT, environment_values, file_layer, layers, resolve
from lever_lm.config.schema import Config, FeatureConfig, all_keys, key_docs, to_dict
from lever_lm.config.values import build, dotted, parse_set, read_yaml, typed
from lever_lm.utils.errors import UsageError


def config_file(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def get(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def set_to(*sets: str) -> Config:
    return resolve({}, None, list(sets), {})[0]


# ---------------------------------------------------------------------- precedence


def test_each_source_wins_over_the_ones_before_it(tmp_path, monkeypatch):
    names = {"recipe": "classic", "lvlm": None}  # grpo.lr 5e-6; the dataclass default is 1e-4
    path = config_file(tmp_path, "grpo: {lr: 3.0e-6}")
    found = [resolve({}, None, [], {})[0].grpo.lr, resolve(names, None, [], {})[0].grpo.lr]
    found.append(resolve(names, path, [], {})[0].grpo.lr)
    monkeypatch.setenv("GRPO_LR", "2e-6")
    found.append(resolve(names, path, [], {})[0].grpo.lr)
    found.append(resolve(names, path, ["grpo.lr=4e-6"], {})[0].grpo.lr)
    found.append(resolve(names, path, ["grpo.lr=4e-6"], {"grpo": {"lr": 6e-6}})[0].grpo.lr)
    assert found == [1e-4, 5e-6, 3e-6, 2e-6, 4e-6, 6e-6]


def test_sources_are_merged_key_by_key(tmp_path):
    path = config_file(tmp_path, "grpo: {lr: 3.0e-6}\nseed: 7\n")
    config, _ = resolve({"recipe": "classic"}, path, ["grpo.kl_beta=0.05"], {"grpo": {"epochs": 2}})
    assert (config.grpo.lr, config.grpo.kl_beta, config.grpo.epochs) == (3e-6, 0.05, 2)
    assert (config.grpo.anchor, config.seed) == ("init", 7)  # from the recipe, from the file


def test_of_two_sets_the_last_wins_and_a_config_survives_its_plain_form():
    config = resolve({"recipe": "classic", "dataset": "digits"}, None, ["seed=1", "seed=5"], {})[0]
    assert config.seed == 5
    assert build(to_dict(config)) == config


# ---------------------------------------------------------------------- unknown keys and names


@pytest.mark.parametrize(
    ("item", "named", "nearest"),
    [
        ("grpo.kl_bet=1", "grpo.kl_bet", " (did you mean 'grpo.kl_beta'?)"),
        ("kl_beta=1", "kl_beta", " (did you mean 'grpo.kl_beta'?)"),
        ("policy.layers=1", "policy.layers", " (did you mean 'policy.num_layers'?)"),
        ("sed=1", "sed", " (did you mean 'seed'?)"),
        ("grop.epochs=1", "grop", " (did you mean 'grpo"),
        ("featuers.name=1", "featuers", " (did you mean 'features"),
        ("zzzzqqq=1", "zzzzqqq", ": `lever config show --docs` lists all"),
        ("a" + ".a" * 100_000 + "=1", "a", ""),
    ],
    ids=lambda value: value[:20],
)
def test_an_unknown_key_is_refused_with_the_nearest(tmp_path, item, named, nearest):
    with pytest.raises(UsageError) as by_set:
        parse_set(item)
    key = item.removesuffix("=1").split(".")[:2]
    with pytest.raises(UsageError) as by_file:
        resolve({}, config_file(tmp_path, f"{key[0]}: {{{key[1]}: 1}}" if key[1:] else f"{key[0]}: 1"), [], {})
    assert str(by_set.value).startswith(f"unknown config key '{named}'{nearest}")
    assert str(by_file.value) == str(by_set.value)


def test_a_key_with_dots_or_that_is_no_text_is_refused():
    with pytest.raises(UsageError, match=r"'grpo\.epochs': in YAML, `grpo:` and below it `epochs:`"):
        build({"grpo.epochs": 3})
    for key in (1, None, True, 2.5):
        with pytest.raises(UsageError, match="unknown config key"):
            build({"grpo": {key: 1}})


@pytest.mark.parametrize(
    ("kind", "name", "nearest"),
    [
        ("sampler", "rand_samplr", r" \(did you mean 'rand_sampler'\?\)"),
        ("lvlm", "qwen2.5_vl_3b", r" \(did you mean 'qwen2.5_vl_3B'\?\)"),
        ("sampler", "../recipe/classic", ""),
        ("sampler", "", ""),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_and_all(kind, name, nearest):
    with pytest.raises(UsageError, match=rf"unknown {kind} '{name}'{nearest}: one of .*\(--{kind}\)"):
        resolve({kind: name}, None, [], {})


def test_every_leaf_is_a_key_with_its_meaning():
    assert {"seed", "device", "grpo.kl_beta", "policy.state_update", "data.okvqa_path"} <= set(all_keys())
    assert key_docs().keys() - all_keys() == to_dict(Config()).keys() - all_keys()
    assert all(key_docs().values())


# ---------------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("grpo.lr", "1e-4", 1e-4),
        ("grpo.lr", 1, 1.0),
        ("grpo.lr", "010", 10.0),
        ("grpo.top_k", [3, "5"], (3, 5)),
        ("grpo.top_k", 3, (3,)),
        ("grpo.top_k", [], ()),
        ("rollout.temperatures", ["1e0", 2], (1.0, 2.0)),
        ("data.name", 2014, "2014"),
        ("data.name", "número 數據", "número 數據"),
        ("data.okvqa_path", "data\udcff", "data\udcff"),  # a path whose bytes are no text
        ("lvlm.path", "a" * 99 + "/" + "x" * 100, "a" * 99 + "/" + "x" * 100),
        ("grpo.adaptive_kl", True, True),
        ("grpo.adaptive_kl", "Yes", True),
        ("grpo.adaptive_kl", "off", False),
        ("seed", 3, 3),
        ("seed", "+3", 3),
        ("seed", "5_000", 5000),
    ],
)
def test_values_that_fit_are_taken(key, value, expected):
    found = get(build(dotted(key, value)), key)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("kind", "key", "values"),
    [
        ("int", "seed", [True, 1.5, None, *("010", "0o10", "1:30", "0x10", "1e2", "1.0", "٣", "9" * 5000)]),
        ("float", "grpo.lr", [True, "fast", "nan", float("inf"), 10**400, None, [1.0], "1:30"]),
        ("bool", "grpo.adaptive_kl", [1, "1", "maybe", None]),
        ("str", "data.name", [True, None]),
        ("int", "grpo.top_k", [[3, "x"], {"a": 1}, ["010"]]),
    ],
)
def test_values_of_another_type_are_refused_by_key(key, values, kind):
    for value in values:
        with pytest.raises(UsageError, match=rf"{key} must be of type {kind}, found"):
            build(dotted(key, value))


@pytest.mark.parametrize("text", ["data: 5", "data:", "data: [a]", "data: text", "grpo: 5"])
def test_a_section_that_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(UsageError, match="must be a mapping of keys"):
        resolve({}, config_file(tmp_path, text), [], {})


def test_set_reads_lists_and_mappings_and_refuses_what_has_no_key_or_value():
    config = set_to("grpo.top_k=[1, 2]", "policy={hidden_dim: 8, stop: yes}")
    assert (config.grpo.top_k, config.policy.hidden_dim, config.policy.stop) == ((1, 2), 8, True)
    for item in ("seed", "=3", ""):
        with pytest.raises(UsageError, match="--set takes key=value"):
            parse_set(item)
    with pytest.raises(UsageError, match="seed must be of type int, found None"):
        set_to("seed=")


def test_options_of_a_processor_have_any_name_and_are_flags_numbers_texts_and_mappings_or_lists_of_these():
    config = set_to(
        *(
            "lvlm.processor.do_image_splitting=no",
            "lvlm.processor.max_patches=1",
            "lvlm.processor.size.longest_edge=512",
        ),
        *("lvlm.processor.scale=0.5", "lvlm.processor.mode=best", "lvlm.processor.pinpoints=[[384, 384], [384, 768]]"),
    )
    pinpoints, size = [[384, 384], [384, 768]], {"longest_edge": 512}
    expected = {"do_image_splitting": False, "max_patches": 1, "size": size, "scale": 0.5, "mode": "best"}
    assert config.lvlm.processor == {**expected, "pinpoints": pinpoints}
    assert typed({"lvlm": {"processor": {"size": {"longest_edge": "512"}}}})["lvlm"]["processor"]["size"] == size
    assert build(to_dict(config)) == config
    assert set_to("lvlm.processor.a=1", "lvlm.processor={}").lvlm.processor == {}
    assert set_to("lvlm.processor.a=1", "lvlm.processor.b=2").lvlm.processor == {"a": 1, "b": 2}
    for value in ("3", "[1]", "text"):
        with pytest.raises(UsageError, match=r"lvlm\.processor must be of type dict, found"):
            set_to(f"lvlm.processor={value}")


TYPED = ["007", "1.10", "12:30", "no", "null", "2024-01-02", "", " ", "Answer # briefly", "it's: [so", '"a" b']
QUOTED = [('"\\n"', "\n"), ("' a '", " a "), ("''", "")]


@pytest.mark.parametrize(("text", "value"), [*zip(TYPED, TYPED, strict=True), *QUOTED])
def test_the_value_of_a_text_key_is_what_was_typed_and_in_quotes_is_read_as_yaml(text, value):
    assert set_to(f"prompt.separator={text}").prompt.separator == value


def test_a_file_is_read_by_the_types_of_its_keys(tmp_path):
    for text in ("007", "1.10", "12:30", "no", "2024-01-02"):
        config = resolve({}, config_file(tmp_path, f"data: {{name: {text}}}\nprompt:\n  system: {text}\n"), [], {})[0]
        assert (config.data.name, config.prompt.system) == (text, text)
    with pytest.raises(UsageError, match=r"grpo\.epochs must be of type int, found '010'"):
        resolve({}, config_file(tmp_path, "grpo: {epochs: 010}"), [], {})


def test_values_of_a_run_are_read_by_their_types_where_they_have_one():
    values = {"seed": "3", "grpo": {"top_k": "4", "lr": "fast", "retired": "1"}, "other": {"a": ["1"]}, "data": "x"}
    grpo = {"top_k": [4], "lr": "fast", "retired": "1"}
    assert typed(values) == {"seed": 3, "grpo": grpo, "other": {"a": ["1"]}, "data": "x"}
    assert typed(to_dict(Config())) == to_dict(Config())


NOT_PLAIN = ["[1", "!!python/object/apply:os.getcwd []", "&a 1", "*a", "[" * 9999, "{a: 1, a: 2}"]


@pytest.mark.parametrize("value", NOT_PLAIN, ids=lambda value: value[:20])
def test_set_reads_no_more_than_plain_values(value):
    with pytest.raises(UsageError, match=r"^--set seed: .{0,70} is not a YAML value: .{0,301}$"):
        parse_set(f"seed={value}")


# ---------------------------------------------------------------------- YAML files


def test_a_file_that_is_no_yaml_is_refused_by_name_and_runs_no_code(tmp_path):
    path, trap = tmp_path / "mine.yaml", tmp_path / "executed"
    tag = f"seed: !!python/object/apply:os.mkdir ['{trap}']"
    for text in ("a: [1", "\ta: 1", "a: b: c", "{1: 2}: 3", "a: &x *y", b"\x80\x81\xff", "seed: \0", tag):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UsageError, match=r"mine\.yaml is not a YAML file"):
            read_yaml(path)
    assert not trap.exists()


def test_an_empty_file_changes_nothing_and_what_is_no_mapping_missing_or_huge_is_refused(tmp_path):
    assert resolve({}, config_file(tmp_path, "# nothing\n"), [], {})[0] == Config()
    for text in ("- a", "5", "text"):
        with pytest.raises(UsageError, match=r"mine\.yaml must hold a mapping of config keys, found"):
            read_yaml(config_file(tmp_path, text))
    with pytest.raises(UsageError, match=r"none\.yaml: No such file or directory \(--config\)"):
        read_yaml(tmp_path / "none.yaml")
    os.truncate(tmp_path / "mine.yaml", 1 << 40)
    with pytest.raises(UsageError, match="larger than 256 KiB"):
        read_yaml(tmp_path / "mine.yaml")


def test_a_config_may_come_through_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("seed: 5",))
    writer.start()
    assert read_yaml(tmp_path / "pipe") == {"seed": "5"}
    writer.join()


# ---------------------------------------------------------------------- environment

VALUES = {
    "GRPO_EPOCHS": ("7", {"grpo.epochs": 7}),
    "RCE_EPOCHS": ("3", {"rce.epochs": 3}),
    "BATCH_SIZE": ("16", {"rce.batch_size": 16, "grpo.batch_size": 16}),
    "RCE_LR": ("2e-4", {"rce.lr": 2e-4}),
    "GRPO_LR": ("3e-6", {"grpo.lr": 3e-6}),
    "KL_BETA": ("0.05", {"grpo.kl_beta": 0.05}),
    "NUM_LAYERS": ("2", {"policy.num_layers": 2}),
    "USE_RANK_ADVANTAGE": ("true", {"grpo.advantage": "rank"}),
    "REWARD_MODE": ("soft_only", {"reward.mode": "soft_only"}),
    "HARD_WEIGHT": ("2", {"reward.hard_weight": 2.0}),
    "SOFT_WEIGHT": ("0.5", {"reward.soft_weight": 0.5}),
    "REL_WEIGHT": ("0.3", {"reward.rel_weight": 0.3}),
    "RCE_USE_RAW_REWARD": ("false", {"rce.normalize": "zscore"}),
    "FREEZE_BACKBONE_IN_GRPO": ("1", {"grpo.freeze_backbone": True}),
    "SKIP_FALLBACK_REWARD": ("no", {"reward.skip_fallback": False}),
    "REQUIRE_POSITIVE_QUERY": ("YES", {"reward.require_positive": True}),
    "OKVQA_PATH": ("/a", {"data.okvqa_path": "/a", "data.train_path": ""}),
    "VQAV2_PATH": ("/c", {"data.okvqa_path": "/c", "data.train_path": ""}),
    "COCO_PATH": ("/b", {"data.coco_path": "/b"}),
}


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_every_variable_of_the_lineage_works(monkeypatch, name):
    text, expected = VALUES[name]
    names = {"dataset": "vqav2_local" if name == "VQAV2_PATH" else "okvqa_local"}
    unset = resolve(names, None, [], {})[0]
    monkeypatch.setenv(name, text)
    config, in_effect = resolve(names, None, [], {})
    assert in_effect == [f"{name}={text}"]
    assert {key: get(config, key) for key in expected} == expected != {key: get(unset, key) for key in expected}


def test_an_empty_variable_is_none_and_flags_can_be_off():
    for text in ("", " ", "\t"):
        assert environment_values({}, dict.fromkeys(ENVIRONMENT, text), {}) == ({}, [])
    for text in ("0", "false", "No", "OFF"):
        found, _ = environment_values({}, {"USE_RANK_ADVANTAGE": text}, {})
        assert found == {"USE_RANK_ADVANTAGE": {"grpo": {"advantage": "zscore"}}}


@pytest.mark.parametrize(
    ("name", "text"),
    [("GRPO_EPOCHS", "many"), ("GRPO_EPOCHS", "1.5"), ("RCE_LR", "fast"), ("USE_RANK_ADVANTAGE", "maybe")],
)
def test_a_bad_variable_is_refused_by_name(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(UsageError, match=rf"the environment variable {name} is '{text}'.*unset it or mend it"):
        resolve({}, None, [], {})


def test_a_variable_that_a_flag_or_set_overrides_is_not_in_effect(monkeypatch):
    for name, text in {"GRPO_EPOCHS": "3", "KL_BETA": "0.2", "BATCH_SIZE": "7"}.items():
        monkeypatch.setenv(name, text)
    config, in_effect = resolve({}, None, ["grpo.kl_beta=0.3", "rce.batch_size=5"], {"grpo": {"epochs": 9}})
    assert (config.grpo.epochs, config.grpo.kl_beta) == (9, 0.3)
    assert (config.rce.batch_size, config.grpo.batch_size) == (5, 7)
    assert in_effect == ["BATCH_SIZE=7"]


def test_the_paths_of_okvqa_leave_the_embedded_digits_alone(monkeypatch):
    monkeypatch.setenv("OKVQA_PATH", "/data/okvqa")
    monkeypatch.setenv("COCO_PATH", "/data/coco")
    for names in ({}, {"dataset": "digits"}):
        config, in_effect = resolve(names, None, [], {})
        assert (config.data.okvqa_path, config.data.coco_path, in_effect) == ("asset:digits", "asset:digits", [])
    config, in_effect = resolve({"dataset": "digits"}, None, ["data.okvqa_path=/S"], {})
    assert (config.data.okvqa_path, config.data.coco_path) == ("/S", "/data/coco")
    assert in_effect == ["COCO_PATH=/data/coco"]
    config, in_effect = resolve({"dataset": "okvqa_local"}, None, ["data.okvqa_path=asset:digits"], {})
    assert (config.data.coco_path, in_effect) == ("data/coco", [])


def test_a_variable_whose_folder_is_set_resets_no_other(monkeypatch):
    monkeypatch.setenv("OKVQA_PATH", "/E")
    config, in_effect = resolve({"dataset": "okvqa_hub"}, None, ["data.okvqa_path=/S"], {})
    assert (config.data.okvqa_path, config.data.train_path) == ("/S", "hub:Multimodal-Fatima/OK-VQA_train")
    assert in_effect == []


@pytest.mark.parametrize("keys", [("okvqa_path",), ("coco_path",), ("coco_path", "okvqa_path")])
def test_a_config_file_that_names_folders_keeps_them(monkeypatch, tmp_path, keys):
    variables = {"okvqa_path": "OKVQA_PATH=/E", "coco_path": "COCO_PATH=/C"}
    for variable in variables.values():
        monkeypatch.setenv(*variable.split("="))
    path = config_file(tmp_path, "data: {" + ", ".join(f"{key}: /{key}" for key in keys) + "}")
    made = layers({"dataset": "okvqa_local"}, file_layer(path), [], {})
    want = {key: f"/{key}" if key in keys else text.split("=")[1] for key, text in variables.items()}
    assert {key: getattr(made.config().data, key) for key in want} == want
    assert made.in_effect == [text for key, text in variables.items() if key not in keys]
    assert made.passed_over == [f"{variables[key]} (the folders are named by {path})" for key in keys]
    assert resolve({"dataset": "okvqa_local"}, path, ["data.okvqa_path=/S"], {})[0].data.okvqa_path == "/S"


def test_a_variable_that_is_passed_over_is_said(lever, monkeypatch, tmp_path):
    monkeypatch.setenv("OKVQA_PATH", "/E")
    path = config_file(tmp_path, "data: {name: mine, okvqa_path: mine, coco_path: mine}")
    done = lever("train", "--config", path, "--dry-run", "--json")
    assert done.json["config"]["data"]["okvqa_path"] == "mine"
    assert f"passed over: OKVQA_PATH=/E (the folders are named by {path})" in done.err


# ---------------------------------------------------------------------- values that cannot be


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rce.epochs": 0, "grpo.epochs": 0}, r"nothing to train.*--rce-epochs, --grpo-epochs"),
        ({"rollout.pool_size": 2, "rollout.shots": 3}, "rollout.pool_size 2 is smaller than rollout.shots 3"),
        ({"rollout.num_queries": 1}, r"rollout.num_queries \(--limit\) must be 2 or more"),
        ({"rollout.temperatures": [1.0, 0]}, "rollout.temperatures must be greater than 0"),
        ({"lvlm.min_pixels": 100, "lvlm.max_pixels": 99}, "lvlm.min_pixels 100 exceeds lvlm.max_pixels 99"),
        ({"lvlm.workers": -3}, "lvlm.workers must be -1 or more, found -3"),
        ({"policy.dropout": 1.0}, r"policy.dropout must lie in \[0, 1\)"),
        ({"policy.hidden_dim": 0}, "policy.hidden_dim must be greater than 0"),
        ({"rce.epochs": -1}, "rce.epochs must not be negative"),
        ({"rce.normalize": "best"}, "rce.normalize is 'best': expected one of none, zscore, rank"),
        ({"grpo.clip_epsilon": 1}, r"grpo.clip_epsilon must lie in \(0, 1\)"),
        ({"grpo.online_ratio": 0}, r"grpo.online_ratio must lie in \(0, 1\]"),
        ({"grpo.top_k": [3, 0]}, r"grpo\.top_k"),
        ({"prompt.style": "x"}, "prompt.style is 'x': expected one of interleaved, dialogue"),
        ({"prompt.template": "{answer}"}, "prompt.template must hold {question} once"),
        ({"lvlm.server": "http://a/v1", "lvlm.num_beams": 2}, "answers greedily"),
        ({"lvlm.server": "http://a/v1", "lvlm.processor.size": 2}, "lvlm.processor is of a model in this process"),
        ({"lvlm.family": "qwen"}, "lvlm.family is 'qwen': expected one of auto, qwen2_5_vl, qwen3_vl, generic"),
        ({"features.name": "img"}, r"unknown features 'img': expected query_X_icd_Y .*\(--features\)"),
        ({"seed": 2**63}, "seed must lie between"),
    ],
    ids=str,
)
def test_values_that_cannot_be_are_refused_before_anything_runs(values, message):
    with pytest.raises(UsageError, match=message):
        set_to(*(f"{key}={value}" for key, value in values.items()))


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", "", "a/b", "x" * 101, "é" * 51, "a\nb", "\x1b[m", "a\u202eb"])
def test_the_name_of_a_dataset_leads_nowhere_else_and_steers_no_terminal(name):
    with pytest.raises(UsageError, match=r"data\.name must be a folder's name"):
        build({"data": {"name": name}})


def test_text_that_is_no_path_and_no_prompt_is_refused():
    for key in ("lvlm.path", "features.encoder"):
        with pytest.raises(UsageError, match=f"{key} ends in a name of more than 100 bytes"):
            build(dotted(key, "a/" + "x" * 101))
    for value in ("a\0b", "x" * 20_000, "\ud800"):
        with pytest.raises(UsageError, match=r"prompt\.system must be text of at most 16384 bytes, .* found .{1,60}$"):
            build({"prompt": {"system": value}})


def test_features_name_what_queries_and_icds_are_encoded_by():
    both = frozenset({"img", "text"})
    assert FeatureConfig(name="query_img_text_icd_img_text").parts() == (both, both)
    assert FeatureConfig(name="query_img_icd_text").parts() == (frozenset({"img"}), frozenset({"text"}))
    assert FeatureConfig(name="query_text_icd_img_text").parts() == (frozenset({"text"}), both)
