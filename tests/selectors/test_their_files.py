"""Files of Lever-Plus and its users: embeddings, rollouts, checkpoints and logs; other models; their prompt."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import DATA, INFERENCE, ROLLOUTS, RUN, files_in, small_digits
from lvlm_helpers import FIRST, QUERY, SECOND, VISION
from safetensors.torch import load_file, save_file

from lever_lm.config.schema import Config, FeatureConfig, PromptConfig
from lever_lm.config.values import named_yaml
from lever_lm.lvlm import build_prompt
from lever_lm.lvlm.prompt import to_messages
from lever_lm.selectors.pointer.checkpoint import load_policy, own_config, save_torch, to_v2, v3_content
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.find_checkpoint import load_for
from lever_lm.training.rollouts.file_format import is_query
from lever_lm.training.run_dir import RunFolder
from lever_lm.utils.atomic_io import file_digest
from lever_lm.utils.paths import asset_path
from lever_lm.utils.safe_torch_load import load_torch
from lever_lm.utils.transformers_compat import import_transformers

EMBEDDINGS = DATA / "small_embeddings.safetensors"
QUICK = ("--rce-epochs", "1", "--grpo-epochs", "1", "--set", "policy.hidden_dim=8", "--json")
FEW = ("--limit", "8", *QUICK)  # answer match learns from these alone, not from the whole training split


def refused(done, *words, status=1):
    assert done.status == status, done.err
    told = [line for line in done.err.splitlines() if line.startswith("lever: ")]
    assert len(told) == 1, done.err
    assert "defect" not in told[0]
    for word in words:
        assert str(word) in told[0], told[0]


# ---------------------------------------------------------------------- rollouts of Lever-Plus


def golden_file() -> dict:
    """The golden edge cases, a copy for each test: some change it."""
    return json.loads((DATA / "small_edge_cases.json").read_text(encoding="utf-8"))


def present_layout() -> dict:
    """The golden edge cases that name their pools."""
    return {k: v for k, v in golden_file().items() if is_query(k) and v.get("candidate_pool_ids")}


def old_layout() -> dict:
    """The same trajectories as global rows, without pools, a few of each so that 64 rows hold them."""
    old = {}
    for key, entry in present_layout().items():
        rows = []
        for trajectory in entry["pointer_candidates"]:
            row = {name: value for name, value in trajectory.items() if name != "pointer_global"}
            rows.append({**row, "pointer": [entry["candidate_pool_ids"][i] for i in trajectory["pointer"]]})
        old[key] = {"pointer_candidates": rows}
    return old


LAYOUTS = {"golden": golden_file, "present": present_layout, "old": old_layout}


def dumped(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("mode", "layout"),
    [("hard01_plus_gtprob", "golden"), ("hard_plus_soft", "present"), ("legacy", "old")],
)
def test_training_on_their_rollouts_of_each_layout(lever, tmp_path, mode, layout):
    path = dumped(tmp_path / "rl_data.json", LAYOUTS[layout]())
    options = ("--embeddings", EMBEDDINGS, "--set", f"reward.mode={mode}", *QUICK)
    if "gtprob" in mode:  # query 69 has none
        refused(lever("train", "--rl-data", path, *options), "query 69, trajectory 0 has no vqa_gt_prob")
        options += ("--set", "reward.missing=lineage")
    done = lever("train", "--rl-data", path, *options)
    assert done.status == 0, done.err
    assert ("13 have no vqa_gt_prob, which counts as 0" in done.err) == ("gtprob" in mode)
    rows = RunFolder(tmp_path / done.json["run"]).rows()
    assert [row["phase"] for row in rows] == ["rce", "grpo"]
    assert all(math.isfinite(row["val_loss"]) for row in rows)
    assert load_policy(done.json["recommended"]["checkpoint"]).d_model == 32
    assert load_policy(done.json["converted"]).d_model == 32
    assert "features" not in load_torch(done.json["recommended"]["checkpoint"])["config"]


def test_embeddings_of_too_few_rows_or_with_nan_are_refused(lever, tmp_path):
    matrix = load_file(EMBEDDINGS)["embeddings"]
    torch.save(matrix[:100], tmp_path / "few.pt")
    few = lever("train", "--rl-data", DATA / "small_edge_cases.json", "--embeddings", "few.pt", *QUICK)
    refused(few, "embeddings have 100 rows")
    matrix[7, 3] = math.nan
    torch.save(matrix, tmp_path / "nan.pt")
    nan = lever("train", "--rl-data", DATA / "small_edge_cases.json", "--embeddings", "nan.pt", *QUICK)
    refused(nan, "row 7", "NaN")
    assert {path.name for path in tmp_path.rglob("*.pt")} == {"few.pt", "nan.pt"}


def without_queries() -> dict:
    """Rollouts that do not say their questions."""
    return {k: {name: v for name, v in entry.items() if name != "query"} for k, entry in present_layout().items()}


def test_rollouts_of_no_dataset_without_features_are_refused(lever, tmp_path):
    """Not trained on the features of the embedded dataset, which is only the default one."""
    path = dumped(tmp_path / "rl_data.json", without_queries())
    refused(lever("train", "--rl-data", path, *QUICK), "no query.question_id", "--embeddings FILE", "--dataset NAME")
    assert not list(tmp_path.rglob("*.pt"))
    named = lever("train", "--rl-data", path, "--dataset", "digits", *FEW)
    assert named.status == 0, named.err
    config = load_torch(named.json["recommended"]["checkpoint"])["config"]
    assert (config["dataset"], "encoder" in config, "embeddings" in config) == ("digits", True, False)


def test_a_limit_takes_so_many_groups_of_the_file_and_a_repetition_takes_the_same(lever, tmp_path):
    """The first by id: of the training share query 57, the third, has no rollout that counts."""
    files = ("--rl-data", DATA / "small_edge_cases.json", "--embeddings", EMBEDDINGS)
    done = lever("train", *files, "--limit", 5, *QUICK)
    assert done.status == 0, done.err
    assert "training on 3 groups, validating on 1\n" in done.err
    again = lever("train", "--from-run", done.json["run"], "--run-name", "again", "--json")
    assert again.status == 0, again.err
    assert again.json["repeated"]["identical"]


def test_where_no_group_differs_nothing_is_recommended_and_missing_scores_are_named(lever, tmp_path):
    content = {
        str(i): {
            "candidate_pool_ids": [100, 101, 102],
            "pointer_candidates": [
                {"pointer": [0, 1], "vqa_correct": 1, "vqa_acc_score": 1.0},
                {"pointer": [1, 2], "vqa_correct": None, "vqa_acc_score": 1.0},
            ],
        }
        for i in range(5)
    }
    path = dumped(tmp_path / "rl_data.json", content)
    files = ("--rl-data", path, "--embeddings", EMBEDDINGS, "--set", "reward.missing=drop", *QUICK)
    done = lever("train", *files)
    refused(done, "in none of its 5 groups do the rewards differ")
    assert "5 rollouts lack a score that reward.mode needs" in done.err
    assert not list(tmp_path.rglob("*.pt"))


def test_a_checkpoint_of_ones_own_features_says_so_when_it_is_given_others(lever, tmp_path, small):
    """The width fits, which says nothing."""
    features = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    torch.save(features, tmp_path / "mine.pt")
    done = lever("train", "--rl-data", DATA / "small_edge_cases.json", "--embeddings", "mine.pt", *QUICK)
    assert done.status == 0, done.err
    for checkpoint in (done.json["recommended"]["checkpoint"], done.json["converted"]):
        config = own_config(load_torch(checkpoint))
        assert config["embeddings"] == f"mine.pt@{file_digest(tmp_path / 'mine.pt')}"
        assert "dataset" not in config
        used = lever("infer", "--ckpt", checkpoint, "--shots", "1", *small)
        assert used.status == 0, used.err
        assert "was trained on features of your own, 'mine.pt@" in used.out
        with pytest.warns(UserWarning, match=r"was trained on features of your own, 'mine\.pt@"):
            load_for(Path(checkpoint), Config(features=FeatureConfig(encoder="asset:tiny-clip")))


def test_a_choice_of_features_is_refused_or_has_no_effect_on_features_of_ones_own(lever, tmp_path):
    (tmp_path / "mine.yaml").write_text("features: {name: query_img_icd_img}\n")
    files = ("--rl-data", DATA / "small_edge_cases.json", "--embeddings", EMBEDDINGS, *QUICK)
    done = lever("train", *files, "--features", "query_img_icd_img")
    assert (done.status, "--embeddings are the features" in done.err) == (2, True)
    said = f"warning: the features are those of {EMBEDDINGS}: features.name query_img_icd_img has no effect"
    assert said in lever("train", *files, "--config", "mine.yaml").err


# ---------------------------------------------------------------------- rollouts in the results folder


@pytest.fixture
def theirs(warm, trained_once):
    """`warm`, with the rollouts of its run as if they had been made elsewhere. Returns their path."""
    content = json.loads((trained_once / ROLLOUTS).read_text())
    content["_meta"] = {"version": 1}
    (warm / ROLLOUTS).parent.mkdir(parents=True)
    return dumped(warm / ROLLOUTS, content)


def test_rollouts_made_elsewhere_are_taken_as_they_are_and_it_says_so(theirs, lever):
    before = theirs.read_bytes()
    done = lever("train", *QUICK)
    assert done.status == 0, done.err
    assert f"{ROLLOUTS} was not made by `lever rollout` and is taken as it is" in done.err
    assert theirs.read_bytes() == before
    assert load_torch(done.json["recommended"]["checkpoint"])["config"]["encoder"].startswith("tiny-clip@")


def test_exported_query_embeddings_are_its_features(theirs, warm, lever, digits):
    matrix = torch.randn(len(digits.train_examples), 12, generator=torch.Generator().manual_seed(0))
    torch.save(matrix, warm / "results/digits/cache/query_embeddings.pt")
    done = lever("train", "--set", "warmup=rce", *QUICK)
    assert done.status == 0, done.err
    assert "query_embeddings.pt, as exported by Lever-Plus" in done.err
    assert load_policy(done.json["recommended"]["checkpoint"]).d_model == 12
    torch.save(torch.randn(len(digits.train_examples), 20), warm / "mine.pt")
    named = lever("train", "--embeddings", "mine.pt", "--overwrite", *QUICK)
    assert named.status == 0, named.err
    assert load_policy(named.json["recommended"]["checkpoint"]).d_model == 20


def test_exported_embeddings_do_not_touch_our_own_rollouts(trained, lever):
    torch.save(torch.randn(3000, 12), trained / "results/digits/cache/query_embeddings.pt")
    options = ("--limit", 24, "--run-name", "again", *QUICK)
    done = lever("train", *options)
    assert done.status == 0, done.err
    assert load_policy(done.json["recommended"]["checkpoint"]).d_model == 64


def test_rollouts_of_another_dataset_are_refused_with_both_ids(theirs, lever, warm, digits):
    content = json.loads(theirs.read_text())
    key = next(key for key in content if is_query(key))
    there = content[key]["query"]["question_id"]
    content[key]["query"]["question_id"] = 12345
    dumped(theirs, content)
    before = files_in(warm)
    refused(lever("train", *QUICK), ROLLOUTS, f"query {key}", "question 12345", f"question {there}", "--embeddings")
    assert files_in(warm) == before
    content[key]["query"]["question_id"] = str(there)
    dumped(theirs, content)
    assert lever("train", *FEW).status == 0, "an id may be text"


def test_rows_beyond_the_training_split_are_refused(theirs, lever, digits):
    content = json.loads(theirs.read_text())
    key = next(key for key in content if is_query(key))
    dumped(theirs, {**content, "99999": content[key]})
    refused(lever("train", *QUICK), "query 99999", f"{len(digits.train_examples)} rows")
    content[key]["candidate_pool_ids"][5] = 99_999
    dumped(theirs, content)
    refused(lever("train", "--set", "warmup=rce", *QUICK), f"query {key}", "99999")


def test_the_variable_names_their_rollouts_too(theirs, warm, lever, monkeypatch, digits):
    theirs.rename(warm / "mine.json")
    monkeypatch.setenv("RL_DATA_PATH", "mine.json")
    done = lever("train", *FEW)
    assert done.status == 0, done.err
    assert "from the environment: RL_DATA_PATH=mine.json" in done.err
    assert load_policy(done.json["recommended"]["checkpoint"]).d_model == 64
    content = json.loads((warm / "mine.json").read_text())
    content[next(filter(is_query, content))]["query"]["question_id"] = 12345
    dumped(warm / "mine.json", content)
    refused(lever("train", "--overwrite", *FEW), "mine.json", "question 12345")


def test_rollout_refuses_to_replace_a_file_made_elsewhere(theirs, lever, warm):
    for meta in (None, {}, [], "text", 1):  # none has our fingerprint
        dumped(theirs, {**json.loads(theirs.read_text()), "_meta": meta})
        before = files_in(warm)
        refused(lever("rollout", "--limit", 24), ROLLOUTS, "not replaced", "--rl-data")
        assert files_in(warm) == before


# ---------------------------------------------------------------------- checkpoints


@pytest.fixture
def small(tmp_path):
    """A few of the digits, and the options that name them."""
    root = small_digits(tmp_path / "world", 70, 6)
    return ("--set", f"data.okvqa_path={root}", "--set", f"data.coco_path={root}")


def bare_v3(path, policy):
    """As Lever-Plus writes them: no config of ours."""
    content = v3_content(policy, epoch=1, phase="rce", kl_beta=0.0, metrics={"val_loss": 1.0}, config={})
    save_torch(path, {key: value for key, value in content.items() if key not in ("config", "format")})
    return path


@pytest.mark.parametrize("state_update", ["none", "gate"])
def test_their_checkpoints_of_both_formats_are_used_alike(lever, tmp_path, small, state_update):
    torch.manual_seed(5)
    policy = PointerSelector(d_model=64, hidden_dim=16, state_update=state_update).eval()
    (tmp_path / "ckpt").mkdir()
    v3 = bare_v3(tmp_path / "ckpt/rce_epoch2.pt", policy)
    v2 = tmp_path / "ckpt/rce_epoch2_v2format.ckpt"
    save_torch(v2, to_v2(load_torch(v3), v3)[0])
    query, candidates = torch.randn(2, 64), torch.randn(2, 9, 64)
    sequences = torch.tensor([[1, 4], [0, 8]])
    wanted = policy.logits(query, candidates, sequences)
    picks = []
    for path in (v3, v2):
        loaded = load_policy(path)
        assert loaded.state_update == state_update
        assert torch.equal(loaded.logits(query, candidates, sequences), wanted)
        done = lever("infer", "--ckpt", path, "--shots", "2", "--json", *small)
        assert done.status == 0, done.err
        folder = tmp_path / done.json["folder"]
        assert folder == tmp_path / "results/digits/inference/ckpt/rce_epoch2"
        picks.append([(folder / f"{name}").read_text() for name in ("icds.jsonl", "predictions_rce_2shot.json")])
    assert picks[0] == picks[1]


def test_a_checkpoint_of_another_width_is_refused(lever, tmp_path, small):
    refused_by = lever("infer", "--ckpt", bare_v3(tmp_path / "a.pt", PointerSelector(32, 8)), "--shots", "1", *small)
    refused(refused_by, "32 dimensions", "64", "features.encoder")
    assert not (tmp_path / "results/digits/inference").exists()


# ---------------------------------------------------------------------- other models


def copied_model(folder, asset="asset:tiny-qwen2.5-vl"):
    shutil.copytree(asset_path(asset), folder)
    return folder


def test_another_lvlms_results_stand_apart(trained, lever):
    options = ("--ckpt", RUN / "grpo_epoch2.pt", "--shots", "1", "--limit", 4, "--json")
    first = lever("infer", *options)
    assert first.json["folder"] == str(INFERENCE / "grpo_epoch2")
    before = files_in(trained / INFERENCE / "grpo_epoch2")
    other = copied_model(trained / "Other.VL")
    second = lever("infer", "--set", f"lvlm.path={other}", *options)
    assert second.status == 0, second.err
    assert second.json["folder"] == str(INFERENCE / "grpo_epoch2_with_Other_VL")
    assert files_in(trained / INFERENCE / "grpo_epoch2") == before
    assert second.json["results"] == first.json["results"], "they are the same weights"
    again = lever("infer", *options)
    assert again.json["folder"] == first.json["folder"]


def test_features_of_another_encoder_are_refused_and_of_the_same_under_another_name_taken(trained, lever, small):
    same, other = (copied_model(trained / name, "asset:tiny-clip") for name in ("my-clip", "tuned/tiny-clip"))
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if weights[name].is_floating_point() and weights[name].ndim == 2)
    weights[name] += 0.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    options = ("--ckpt", RUN / "grpo_epoch2.pt", "--shots", "2", "--json", *small)
    before = files_in(trained)
    refused(lever("infer", "--set", f"features.encoder={other}", *options), "tiny-clip@", "features.encoder")
    assert files_in(trained) == before
    plain = lever("infer", *options)
    assert plain.status == 0, plain.err
    renamed = lever("infer", "--set", f"features.encoder={same}", *options)
    assert renamed.status == 0, renamed.err
    assert renamed.json["results"] == plain.json["results"]


@pytest.mark.parametrize("lvlm", ["qwen2.5_vl_3B", "qwen2.5_vl_3B_classic"])
def test_the_shipped_configs_load_any_qwen_directory(lever, tmp_path, small, lvlm):
    model = copied_model(tmp_path / "my-qwen")
    train = json.loads((tmp_path / "world/OpenEnded_mscoco_train2014_questions.json").read_text())["questions"]
    val = json.loads((tmp_path / "world/OpenEnded_mscoco_val2014_questions.json").read_text())["questions"]
    picks = {question["question_id"]: [q["question_id"] for q in train[:2]] for question in val}
    dumped(tmp_path / "picks.json", picks)
    options = ("--set", f"lvlm.path={model}", "--icds", "picks.json", "--shots", "2", "--limit", 3, "--json")
    done = lever("infer", "--lvlm", lvlm, *options, *small)
    assert done.status == 0, done.err
    assert done.json["results"][0]["n"] == 3
    assert "_my-qwen/" in done.json["folder"]


@pytest.fixture(scope="module")
def backends(digits_config):
    """attention → an LVLM with it."""
    from lever_lm.lvlm.backend import load_local

    def load(attention):
        return load_local(dataclasses.replace(digits_config.lvlm, attention=attention), digits_config.prompt, "cpu")

    return {attention: load(attention) for attention in ("auto", "eager", "sdpa")}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_kind_of_attention_changes_no_answer(backends, digits, digits_config, attention):
    train, val = digits.train_examples, digits.val_examples
    prompts = [build_prompt(train[3 * i : 3 * i + i % 4], val[7 * i], digits_config.prompt) for i in range(16)]
    assert backends[attention].family.model.config.text_config._attn_implementation == attention
    assert backends[attention].generate(prompts) == backends["auto"].generate(prompts)
    scores = [backends[name].answer_log_prob(prompts, ["two"] * 16) for name in (attention, "auto")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


# ---------------------------------------------------------------------- their prompt


@pytest.fixture(scope="module")
def processor():
    return import_transformers().AutoProcessor.from_pretrained(asset_path("asset:tiny-qwen2.5-vl"))


def rendered(processor, picks, query, config) -> str:
    messages = to_messages(build_prompt(picks, query, config), config)
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def classic(**settings) -> PromptConfig:
    """The prompt of the shipped classic YAML."""
    return PromptConfig(**{**named_yaml("lvlm", "qwen2.5_vl_3B_classic")["prompt"], "system": "Be brief.", **settings})


def test_the_classic_prompt_in_one_turn(processor):
    assert rendered(processor, [FIRST, SECOND], QUERY, classic()) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        f"{VISION}Question:what digit is it? Short answer:three"
        f"{VISION}Question:is it even? Short answer:no"
        f"{VISION}Question:which comes next? Short answer:<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_classic_prompt_as_a_dialogue(processor):
    assert rendered(processor, [FIRST], QUERY, classic(style="dialogue")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{VISION}Question:what digit is it? Short answer:<|im_end|>\n"
        "<|im_start|>assistant\nthree<|im_end|>\n"
        f"<|im_start|>user\n{VISION}Question:which comes next? Short answer:<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("style", ["interleaved", "dialogue"])
def test_braces_and_backslashes_in_questions_and_answers_come_through(processor, style):
    text = r"{question} or {answer}? {0} {x!r} C:\new\1 \g<0> 100 % {{done}} {% raw %}{{ 7 * 7 }}"
    icd = dataclasses.replace(FIRST, question=text, answers=(text,) * 10)
    query = dataclasses.replace(QUERY, question=text)
    written = rendered(processor, [icd], query, classic(style=style, template="Q[{question}] A\\{x}: {answer}"))
    assert written.count(f"Q[{text}] A\\{{x}}:") == 2
    shown = f"A\\{{x}}: {text}{VISION}" if style == "interleaved" else f"assistant\n{text}<|im_end|>"
    assert shown in written


@pytest.mark.parametrize("template", ["", "{answer} {question}", "{question} {answer}.", "{question:>5} {answer}"])
def test_a_bad_template_is_a_usage_error_and_nothing_is_written(lever, tmp_path, template):
    done = lever("rollout", "--set", f"prompt.template={json.dumps(template)}", "--limit", 2)
    refused(done, "prompt.template", "{question}", "{answer}", status=2)
    assert list(tmp_path.iterdir()) == []
