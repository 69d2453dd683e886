"""What is refused of selectors on the command line, and the commands that the refusals give."""

import json
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from helpers import ROLLOUTS, RUN, files_in
from loopback import Loopback, Reply, models, said

from lever_lm import Retriever
from lever_lm.data.okvqa import questions_file
from lever_lm.selectors.pointer.hub_format import SETTING
from lever_lm.utils.errors import LeverError
from lever_lm.utils.paths import asset_path


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("train", "--selector", "grpo"), 2, "by itself: leave --selector out"),
        (("train", "--selector", "rce"), 2, "by itself: leave --selector out"),
        (("train", "--selector", "mmr"), 2, "`lever infer --against mmr`"),
        (("train", "--selector", "fixedset"), 2, "did you mean 'fixed_set'?"),
        (("infer", "--against", "mmice"), 2, "did you mean 'mmices'?"),
        (("diagnose", "--against", "grpo_"), 2, "did you mean 'grpo'?"),
        (("infer", "--against", "epr,mmr"), 1, "`lever train --selector epr --dataset digits"),
        (("diagnose", "--against", "lever_lm"), 1, "`lever train --selector lever_lm --dataset digits"),
        (("infer", "--shots", "299", "--against", "mmr"), 2, "from which grpo would choose"),
        (("diagnose", "--shots", "299"), 2, "from which grpo would choose"),
        (
            ("train", "--selector", "epr", "--rl-data", ROLLOUTS),
            1,
            "leave --rl-data out, and `lever train --selector epr`",
        ),
        (("train", "--selector", "lever_lm", "--rl-data", ROLLOUTS), 1, "none of these"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_said_in_one_message_with_what_mends_it_before_anything_is_made(
    trained, lever, words, status, told
):
    before = {name for name in files_in(trained) if not name.endswith("digests.json")}
    done = lever(*words)
    assert done.status == status, done.err
    assert told in done.err
    assert done.err.count("lever: ") == 1
    assert {name for name in files_in(trained) if not name.endswith("digests.json")} == before


def test_the_command_that_is_given_makes_what_was_missing(trained, lever):
    missing = lever("infer", "--against", "fixed_set", "--limit", "5", "--shots", "1")
    command = shlex.split(re.search("`(lever train .*)`", missing.err)[1])
    assert lever(*command[1:], "--limit", "24").status == 0
    done = lever("infer", "--against", "fixed_set", "--limit", "5", "--shots", "1", "--json")
    assert [row["method"] for row in done.json["arena"]].count("fixed_set") == 1
    (trained / RUN).with_name("fixed_set").rename(trained / RUN.with_name("other"))
    own = lever("infer", "--run-name", "other", "--against", "fixed_set,mmr", "--limit", "5", "--shots", "1", "--json")
    assert {row["method"] for row in own.json["arena"]} == {"fixed_set", "mmr"}, "its own is no other"


def test_the_command_has_the_options_of_the_run_as_far_as_they_are_needed(trained, lever):
    own = ("--sampler", "text_sim_sampler", "--seed", "3", "--set", "prompt.template=Q {question}: A {answer}")
    own += (
        "--set",
        "rollout.pool_size=9",
        "--set",
        "infer.pool_size=30",
        "--features",
        "query_img_icd_text",
        "--lvlm",
        "tiny_qwen2.5_vl",
    )
    missing = lever("infer", *own, "--ckpt", RUN / "grpo_epoch4.pt", "--against", "epr", "--results", "elsewhere")
    assert missing.status == 1, missing.err
    command = shlex.split(re.search("`(lever train .*)`", missing.err)[1])
    assert ("--results", "elsewhere") in pairwise(command)
    planned = lever(*command[1:], "--dry-run", "--json").json["config"]
    here = lever("infer", *own, "--ckpt", RUN / "grpo_epoch4.pt", "--dry-run", "--json").json["config"]
    assert planned["warmup"] == "epr"
    assert (planned["rollout"]["pool_size"], planned["infer"]["pool_size"]) == (9, 30)
    for section, name in SETTING:
        assert planned[section][name] == here[section][name], name
    assert planned["seed"] == here["seed"] == 3


def test_only_what_chooses_from_pools_is_bound_by_their_size(trained, lever):
    small = ("--limit", "24", "--set", "infer.pool_size=8", "--run-name", "fixed_set")
    assert lever("train", "--selector", "fixed_set", *small).status == 0
    fixed = ("infer", "--run-name", "fixed_set", "--limit", "2", "--shots", "9")
    done = lever(*fixed, "--against", "mmr,random", "--json")
    assert done.status == 0, done.err
    assert {row["shots"] for row in done.json["results"]} == {9}
    refused = lever(*fixed, "--against", "mmr,oracle")
    assert (refused.status, "from which oracle would choose" in refused.err) == (2, True)
    refused = lever(*fixed[:-1], "9999")
    assert (refused.status, "exceeds the training split, which has 2504 examples" in refused.err) == (2, True)


def test_a_selector_of_one_training_split_goes_nowhere_else(trained, lever):
    """Neither its checkpoint nor the folder that is exported of it; not even where the split is as large."""
    assert lever("train", "--selector", "fixed_set", "--limit", "24").status == 0
    assert lever("export", RUN.with_name("fixed_set"), "shared").status == 0
    card = (trained / "shared/README.md").read_text()
    assert "a score\nfor each of 2504 training examples" in card
    assert "examples=[" not in card
    for checkpoint in (RUN.with_name("fixed_set"), "shared"):
        assert lever("infer", "--ckpt", checkpoint, "--limit", "2", "--shots", "1", "--json").status == 0
        with pytest.raises(LeverError, match="leave examples= out"):
            Retriever(checkpoint, examples=[("x.jpg", "what?", "that")])
        refused = lever("infer", "--ckpt", checkpoint, "--limit", "2", "--shots", "1", "--config", other_split(trained))
        assert refused.status == 1
        assert "was made of a training split of 2504 examples, and the 2504 here are others" in refused.err


def other_split(folder: Path) -> Path:
    """A config of the digits with two training questions in each other's place."""
    world = folder / "world"
    if not world.exists():
        shutil.copytree(asset_path("asset:digits"), world)
        path = questions_file(world, "train")
        content = json.loads(path.read_text())
        questions = content["questions"]
        questions[0], questions[1] = questions[1], questions[0]
        path.write_text(json.dumps(content))
    config = folder / "other.yaml"
    config.write_text(f"data: {{name: digits, okvqa_path: {world}, coco_path: {world}}}\n")
    return config


@pytest.mark.parametrize(
    "reply", [said("2"), Reply(400, {"error": {"message": "Unrecognized request argument: prompt_logprobs"}})]
)
def test_a_server_without_log_probs_is_refused_before_any_work(tmp_path, lever, reply):
    listed = models(str(asset_path("asset:tiny-qwen2.5-vl")), owner="someone")
    answer = lambda request: listed if request.path == "/v1/models" else reply  # noqa: E731
    with Loopback(answer).running() as server:
        done = lever("train", "--selector", "lever_lm", "--limit", "4", "--server", server.url)
        assert done.status == 1
        assert "log-probs: " in done.err
        assert "drop --server" in done.err
        assert len(server.asked) == 1
    assert not list(tmp_path.rglob("features_*"))
    assert not list(tmp_path.rglob("*.pt"))
