"""What has changed makes again exactly what depends on it, and is named; what only looks changed does not."""

import json
import os
import shutil

import pytest
from helpers import answers_in, run_here, small_digits
from PIL import Image

import lever_lm.data.embeddings
from lever_lm.lvlm.local import LocalLvlm
from lever_lm.utils import fingerprint as stages
from lever_lm.utils.paths import asset_path

SMALL = ("--limit", "8", "--rce-epochs", "1", "--grpo-epochs", "2", "--set", "rollout.pool_size=8")


PLACES = [word for key in ("okvqa_path", "coco_path") for word in ("--set", f"data.{key}=data")]
PLACES += ["--set", "data.name=small", "--set", "lvlm.path=vlm"]


@pytest.fixture(scope="module")
def trained_small(tmp_path_factory):
    """A folder with a small dataset, an LVLM and what `lever train` made of them; the number of prompts asked."""
    folder = tmp_path_factory.mktemp("stale")
    small_digits(folder / "data", train=12, val=4)
    shutil.copytree(asset_path("asset:tiny-qwen2.5-vl"), folder / "vlm")
    done = run_here("train", *SMALL, *PLACES, cwd=folder)
    assert done.status == 0, done.err
    assert "made again" not in done.out
    prompts = answers_in(folder)
    assert prompts > 50
    return folder, prompts


@pytest.fixture
def world(trained_small, lever, tmp_path, monkeypatch):
    """world(options) → what `lever train` in a copy of that folder said, which splits were encoded, and how many
    prompts the LVLM was asked."""
    source, prompts = trained_small
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    encoded, asked = [], []
    encode, ask = lever_lm.data.embeddings.encode, LocalLvlm.ask

    def counted_encode(encoder, data, split, *options):
        encoded.append(split)
        return encode(encoder, data, split, *options)

    def counted_ask(self, prompts, batches, *more, **options):
        asked.extend(prompts[i] for batch in batches for i in batch)
        return ask(self, prompts, batches, *more, **options)

    monkeypatch.setattr(lever_lm.data.embeddings, "encode", counted_encode)
    monkeypatch.setattr(LocalLvlm, "ask", counted_ask)

    def train(*options, command="train", status=0):
        encoded.clear()
        asked.clear()
        small = SMALL if command == "train" else (*SMALL[:2], *SMALL[-2:]) if command == "rollout" else SMALL[:2]
        done = lever(command, *small, *PLACES, *options)
        assert done.status == status, done.out + done.err
        return done.out + done.err, list(encoded), len(asked)

    train.folder, train.prompts = tmp_path, prompts
    return train


def questions(world, split: str):
    return world.folder / "data" / f"OpenEnded_mscoco_{split}2014_questions.json"


def swap(image, keep_date: bool = True) -> None:
    """Another image of the same size in bytes, and of the same date."""
    status = image.stat()
    Image.new("RGB", (32, 32), "red").save(image, "JPEG")
    content = image.read_bytes()
    image.write_bytes(content + b"\0" * (status.st_size - len(content)))
    assert image.stat().st_size == status.st_size
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))


def first_image(world, split: str):
    return sorted((world.folder / "data" / f"{split}2014").iterdir())[0]


def contents(world) -> dict[str, bytes]:
    """Every file below results but the digests, which any command may add to."""
    files = (path for path in (world.folder / "results").rglob("*") if path.is_file() and path.name != "digests.json")
    return {str(path): path.read_bytes() for path in files}


# ---------------------------------------------------------------------- what changes nothing


def test_the_same_command_makes_nothing_again(world):
    said, encoded, asked = world()
    assert (encoded, asked, "made again" in said) == ([], 0, False)


@pytest.mark.parametrize("how", ["touched", "moved"])
def test_files_of_another_date_or_place_are_the_same_data(world, how):
    moved = []
    if how == "moved":
        shutil.copytree(world.folder / "data", world.folder / "elsewhere")
        moved = [word.replace("=data", "=elsewhere") for word in PLACES[:4]]
    else:
        for path in (world.folder / "data").rglob("*"):
            os.utime(path, (1e9, 1e9))
    said, encoded, asked = world(*moved)
    assert (encoded, asked, "made again" in said) == ([], 0, False)


# ---------------------------------------------------------------------- data


def test_a_changed_training_image_of_the_same_size_and_date_makes_again_what_shows_it(world):
    swap(first_image(world, "train"))
    said, encoded, asked = world("--run-name", "b")
    assert encoded == ["train"]
    assert "features_tiny-clip.safetensors is made again: the training data has changed" in said
    assert asked > 0
    said, encoded, asked = world("--run-name", "b")
    assert (encoded, asked) == ([], 0)


def test_a_run_on_data_that_changed_is_not_gone_on_with(world):
    swap(first_image(world, "train"))
    said, encoded, asked = world(status=1)
    assert "the features of the run in" in said
    assert "--overwrite" in said
    assert (encoded, asked) == ([], 0)


def test_a_changed_evaluation_image_leaves_rollouts_and_run_as_they_are(world):
    swap(first_image(world, "val"))
    said, encoded, asked = world()
    assert (encoded, asked) == (["val"], 0)
    assert "is made again: the evaluation data has changed" in said
    assert "rl_data_MixSampler_vlm.json is made again" not in said


def test_a_changed_evaluation_image_is_asked_about_again_and_no_other(world):
    world("--shots", "1", command="infer")
    swap(first_image(world, "val"))
    about = json.loads(questions(world, "val").read_text())["questions"]
    image = int(first_image(world, "val").stem.split("_")[-1])
    _, _, asked = world("--shots", "1", command="infer")
    assert asked == sum(q["image_id"] == image for q in about) < len(about)


def test_a_changed_question_is_new_data(world):
    path = questions(world, "train")
    content = json.loads(path.read_text())
    content["questions"][0]["question"] += " Really?"
    path.write_text(json.dumps(content))
    said, encoded, asked = world("--run-name", "b")
    assert encoded == ["train"]
    assert "the training data has changed" in said
    assert asked > 0


# ---------------------------------------------------------------------- models


def test_other_weights_of_the_same_size_and_date_are_another_model(world):
    weights = world.folder / "vlm" / "model.safetensors"
    status, content = weights.stat(), bytearray(weights.read_bytes())
    content[len(content) // 2 + 1] ^= 0x01  # far from its ends
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    before = contents(world)
    said, encoded, asked = world(status=1)  # the run is refused before anything is asked for it
    assert "would be made again: the LVLM has changed. Choose another folder with --run-name" in said
    assert (encoded, asked, contents(world)) == ([], 0, before)
    said, encoded, asked = world(command="rollout")
    assert encoded == []
    assert asked == world.prompts
    assert "rl_data_MixSampler_vlm.json is made again: the LVLM has changed;" in said


def test_another_encoder_makes_features_and_pools_again(world):
    shutil.copytree(asset_path("asset:tiny-clip"), world.folder / "tiny-clip")
    said, encoded, _ = world("--set", "features.encoder=tiny-clip", command="rollout")
    assert (encoded, "made again" in said) == ([], False)  # the same model in another place
    weights = world.folder / "tiny-clip" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1001] ^= 0x01
    weights.write_bytes(content)
    said, encoded, _ = world("--set", "features.encoder=tiny-clip", command="rollout")
    assert sorted(encoded) == ["train", "val"]
    assert "features_tiny-clip.safetensors is made again: the encoder has changed" in said
    assert "rl_data_MixSampler_vlm.json is made again: the features have changed" in said.replace("has", "have")


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("change", "why", "all_new"),
    [
        ("prompt.style=dialogue", "the prompt has changed", True),
        ("lvlm.max_new_tokens=4", "the LVLM has changed", True),
        ("rollout.random=6", "the rollout setting has changed", False),
        ("policy.hidden_dim=32", "the policy has changed", False),
        ("seed=5", "the seed has changed", False),
    ],
)
def test_a_changed_setting_asks_what_is_new_under_it(world, change, why, all_new):
    said, encoded, asked = world("--set", change, command="rollout")
    assert encoded == []
    assert f"rl_data_MixSampler_vlm.json is made again: {why};" in said
    assert (asked >= world.prompts) if all_new else (asked < world.prompts)


def test_another_sampler_has_a_file_of_its_own_and_asks_what_is_new(world):
    said, encoded, asked = world("--sampler", "rand_sampler", command="rollout")
    assert (encoded, "made again" in said) == ([], False)
    assert asked > 0


def test_what_is_only_faster_or_slower_makes_nothing_again(world):
    speed = {"batch_size": 3, "bank_disk": 0, "workers": 0, "batch_tokens": 700}
    said, encoded, asked = world(*(word for key, value in speed.items() for word in ("--set", f"lvlm.{key}={value}")))
    assert (encoded, asked, "made again" in said) == ([], 0, False)


# ---------------------------------------------------------------------- code


@pytest.mark.parametrize(
    ("stage", "again", "kept"),
    [
        ("features", ["features_tiny-clip.safetensors is made again: the code has changed"], []),
        ("answers", ["rl_data_MixSampler_vlm.json is made again: the LVLM has changed"], ["features_"]),
        ("rollouts", ["rl_data_MixSampler_vlm.json is made again: the code has changed"], ["features_"]),
    ],
)
def test_another_code_of_a_stage_makes_it_again(world, monkeypatch, stage, again, kept):
    monkeypatch.setitem(stages.CODE, stage, 99)
    said, encoded, asked = world(command="rollout")
    assert all(text in said for text in again), said
    assert not any(f"{name}" in said for name in kept)
    assert bool(encoded) == (stage == "features")
    assert asked == (world.prompts if stage == "answers" else 0)


def test_a_run_of_another_training_code_is_not_gone_on_with(world, monkeypatch):
    monkeypatch.setitem(stages.CODE, "training", 99)
    said, encoded, asked = world(status=1)
    assert "the training code of the run in" in said
    assert (encoded, asked) == ([], 0)


def test_results_of_another_inference_code_stand_in_no_table_with_these(world, monkeypatch):
    world("--shots", "1", command="infer")
    monkeypatch.setitem(stages.CODE, "inference", 99)
    world("--shots", "2", command="infer")
    (metrics,) = world.folder.glob("results/small/inference/*/*/metrics.json")
    assert [row["shots"] for row in json.loads(metrics.read_text())["results"]] == [2]
